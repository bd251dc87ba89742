//! Who has what a reader wants: stored pieces cut under one mesh, wanted pieces under another. Pure.

use std::collections::{BTreeMap, HashMap};

use api::Rank;

use crate::format::{Dtype, TensorEntry, elements};
use crate::manifest::ShardEntry;
use crate::slice::Slice;

/// Why what is stored does not give what is wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReshardError {
    /// No piece of the tensor is stored.
    #[error("no part of tensor `{name}` is there")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// Some elements are in no stored piece.
    #[error("{slice} of tensor `{name}` is in no shard")]
    Hole {
        /// The tensor.
        name: String,
        /// What is missing.
        slice: Slice,
    },
    /// Two stored pieces are neither the same nor disjoint.
    #[error("{first} and {second} of tensor `{name}` overlap")]
    Overlap {
        /// The tensor.
        name: String,
        /// The one.
        first: Slice,
        /// The other.
        second: Slice,
    },
    /// Two pieces, or a piece and who wants it, take the tensor to have different shapes.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape stored.
        found: Vec<u64>,
        /// The shape wanted, or that of another piece.
        expected: Vec<u64>,
    },
    /// The same for the type of elements.
    #[error("tensor `{name}` has elements of type {found:?}, expected {expected:?}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The type stored.
        found: Dtype,
        /// The type wanted, or that of another piece.
        expected: Dtype,
    },
    /// What is wanted is not inside the tensor.
    #[error("{slice} does not lie inside tensor `{name}` of shape {shape:?}")]
    Outside {
        /// The tensor.
        name: String,
        /// What is wanted.
        slice: Slice,
        /// The tensor's shape.
        shape: Vec<u64>,
    },
}

/// A part of a tensor that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub slice: Slice,
}

/// A part of a want, and the stored piece that it is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Index of the want.
    pub want: usize,
    /// Index of the shard, and of the tensor in it.
    pub shard: usize,
    pub tensor: usize,
    /// What is read, in the whole tensor's indices.
    pub slice: Slice,
}

/// Every stored piece by tensor; pieces of the same place are replicas.
type Pieces<'a> = BTreeMap<&'a str, BTreeMap<Slice, Vec<(usize, usize)>>>;

fn pieces(shards: &[ShardEntry]) -> Pieces<'_> {
    let mut pieces = Pieces::new();
    for (shard, entry) in shards.iter().enumerate() {
        for (tensor, piece) in entry.used_tensors() {
            let places = pieces.entry(piece.name.as_str()).or_default();
            places.entry(piece.place()).or_default().push((shard, tensor));
        }
    }
    pieces
}

fn agree(found: &TensorEntry, shape: &[u64], dtype: Dtype) -> Result<(), ReshardError> {
    let name = found.name.clone();
    if found.shape != shape {
        let (found, expected) = (found.shape.clone(), shape.to_vec());
        return Err(ReshardError::Shape { name, found, expected });
    }
    if found.dtype != dtype {
        return Err(ReshardError::Dtype { name, found: found.dtype, expected: dtype });
    }
    Ok(())
}

/// Checks that the pieces of every tensor agree and make the whole of it.
pub(crate) fn check_whole(shards: &[ShardEntry]) -> Result<(), ReshardError> {
    for (name, places) in pieces(shards) {
        let mut entries = places.values().flatten().map(|(s, t)| &shards[*s].tensors[*t]);
        let Some(first) = entries.next() else { continue };
        entries.try_for_each(|entry| agree(entry, &first.shape, first.dtype))?;
        let slices: Vec<&Slice> = places.keys().collect();
        check_disjoint(name, &slices)?;
        // Disjoint pieces of as many elements as the whole are the whole.
        let held: u64 = slices.iter().map(|slice| slice.elements()).sum();
        if Some(held) != elements(&first.shape) {
            let mut left = vec![Slice::whole(&first.shape)];
            for slice in slices {
                left = left.iter().flat_map(|rest| rest.without(slice)).collect();
            }
            let slice = left.into_iter().next().unwrap_or_else(|| Slice::whole(&first.shape));
            return Err(ReshardError::Hole { name: name.to_owned(), slice });
        }
    }
    Ok(())
}

/// Pieces come sorted: one meets only those after it that begin before it ends.
fn check_disjoint(name: &str, slices: &[&Slice]) -> Result<(), ReshardError> {
    for (index, first) in slices.iter().enumerate() {
        let end = first.ranges().next().map_or(u64::MAX, |range| range.end);
        let begins_before = |slice: &&&Slice| slice.offset.first().is_none_or(|at| *at < end);
        let mut meets = slices[index + 1..].iter().take_while(begins_before);
        if let Some(second) = meets.find(|second| first.intersection(second).is_some()) {
            let (first, second) = ((*first).clone(), (**second).clone());
            return Err(ReshardError::Overlap { name: name.to_owned(), first, second });
        }
    }
    Ok(())
}

/// Finds a source for every element wanted, each once.
///
/// Of replicas, that of the reader's own rank is taken, which is on its host if anything is; else
/// that of which least is read so far, and among those the next after the reader's rank, so that
/// readers do not all turn to the same one.
pub(crate) fn sources(
    shards: &[ShardEntry],
    wants: &[Want],
    reader: Rank,
) -> Result<Vec<Source>, ReshardError> {
    let pieces = pieces(shards);
    let mut read: HashMap<usize, u64> = HashMap::new();
    let mut sources = Vec::new();
    for (index, want) in wants.iter().enumerate() {
        let name = want.name.clone();
        let Some(places) = pieces.get(name.as_str()) else {
            return Err(ReshardError::Missing { name });
        };
        for (shard, tensor) in places.values().flatten() {
            agree(&shards[*shard].tensors[*tensor], &want.shape, want.dtype)?;
        }
        if !want.slice.fits(&want.shape) {
            let (slice, shape) = (want.slice.clone(), want.shape.clone());
            return Err(ReshardError::Outside { name, slice, shape });
        }
        let mut left = Vec::from_iter((!want.slice.is_empty()).then(|| want.slice.clone()));
        for (place, replicas) in places {
            let Some(common) = place.intersection(&want.slice) else { continue };
            let held = left.iter().filter_map(|rest| rest.intersection(&common));
            if held.map(|part| part.elements()).sum::<u64>() < common.elements() {
                let first = places
                    .keys()
                    .find(|other| *other != place && other.intersection(&common).is_some());
                let first = first.unwrap_or(place).clone();
                return Err(ReshardError::Overlap { name, first, second: place.clone() });
            }
            left = left.iter().flat_map(|rest| rest.without(&common)).collect();
            let preference = |(shard, _): &&(usize, usize)| {
                let count = shards.len() as u64;
                let distance = (*shard as u64 + count - u64::from(reader.0) % count) % count;
                (shards[*shard].rank != reader, read.get(shard).copied().unwrap_or(0), distance)
            };
            let Some((shard, tensor)) = replicas.iter().min_by_key(preference).copied() else {
                continue;
            };
            *read.entry(shard).or_default() += common.elements() * want.dtype.bytes();
            sources.push(Source { want: index, shard, tensor, slice: common });
        }
        if let Some(slice) = left.into_iter().next() {
            return Err(ReshardError::Hole { name, slice });
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use api::job::Compression;

    use super::*;

    /// A shard that holds these rows of a tensor of 8 rows.
    fn shard(rank: u32, rows: std::ops::Range<u64>) -> ShardEntry {
        let slice = Some(Slice::cut(&[8, 2], 0, rows));
        ShardEntry {
            rank: Rank(rank),
            key: rank.to_string(),
            bytes: 0,
            stored_bytes: 0,
            blake3: String::new(),
            compression: Compression::None,
            used: None,
            former: Vec::new(),
            tensors: vec![TensorEntry::new("w", Dtype::F32, &[8, 2], slice)],
        }
    }

    fn want(rows: std::ops::Range<u64>) -> Want {
        let slice = Slice::cut(&[8, 2], 0, rows);
        Want { name: "w".into(), dtype: Dtype::F32, shape: vec![8, 2], slice }
    }

    #[test]
    fn of_replicas_one_is_read_its_own_first_and_not_always_the_same() {
        let shards = [0..4, 0..4, 0..4, 4..8].into_iter().enumerate();
        let shards: Vec<ShardEntry> = shards.map(|(r, rows)| shard(r as u32, rows)).collect();
        for (reader, expected) in [(0, [0, 3]), (1, [1, 3]), (2, [2, 3]), (3, [0, 3])] {
            let sources = sources(&shards, &[want(2..6)], Rank(reader)).expect("all is there");
            assert_eq!(sources.iter().map(|s| s.shard).collect::<Vec<_>>(), expected);
            assert_eq!(sources.iter().map(|s| s.slice.elements()).sum::<u64>(), 8);
        }
        // A reader that is none of the writers spreads what it reads over them.
        let wants = [want(0..1), want(1..2), want(2..3)];
        let sources = sources(&shards[..3], &wants, Rank(4)).expect("all is there");
        assert_eq!(sources.iter().map(|s| s.shard).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(check_whole(&shards), Ok(()));
    }

    #[test]
    fn holes_and_overlaps_name_the_tensor_and_the_part() {
        let read = |shards: &[ShardEntry], rows| {
            let error = sources(shards, &[want(rows)], Rank(0)).expect_err("refused");
            assert!(check_whole(shards).is_err());
            error.to_string()
        };
        let text = read(&[shard(0, 0..3), shard(1, 5..8)], 2..6);
        assert_eq!(text, "[3:5,0:2] of tensor `w` is in no shard");
        let text = read(&[shard(0, 0..5), shard(1, 4..8)], 2..6);
        assert_eq!(text, "[0:5,0:2] and [4:8,0:2] of tensor `w` overlap");
        let nothing = sources(&[], &[want(0..0)], Rank(0));
        assert_eq!(nothing, Err(ReshardError::Missing { name: "w".into() }));
    }
}
