//! Which rank writes which tensors, or pieces of them, that several ranks hold. Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use api::Rank;

use crate::slice::Slice;

/// Cuts a list of tensors, given by their lengths, into one contiguous run per rank such that the
/// largest run is as small as contiguous runs allow. Ranks at the end may get none.
///
/// Linear partitioning: binary search for the smallest capacity into which first-fit packs.
pub fn share_tensors(lengths: &[usize], world_size: u32) -> Vec<Range<usize>> {
    let runs = world_size.max(1) as usize;
    let largest = lengths.iter().copied().max().unwrap_or(0) as u128;
    let total: u128 = lengths.iter().map(|l| *l as u128).sum();
    let (mut low, mut high) = (largest, total.max(largest));
    while low < high {
        let middle = low + (high - low) / 2;
        if pack(lengths, middle).len() <= runs {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut shares = pack(lengths, low);
    shares.resize(runs, lengths.len()..lengths.len());
    shares
}

/// First-fit runs of at most `capacity` each; every single length must fit.
fn pack(lengths: &[usize], capacity: u128) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut filled) = (0, 0u128);
    for (index, length) in lengths.iter().enumerate() {
        if filled + *length as u128 > capacity && index > start {
            runs.push(start..index);
            (start, filled) = (index, 0);
        }
        filled += *length as u128;
    }
    if start < lengths.len() {
        runs.push(start..lengths.len());
    }
    runs
}

/// What the ranks of a mesh hold of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldTensor {
    /// Bytes of one of its elements.
    pub element_bytes: u64,
    /// Every rank's pieces of it, in any order; they may be the same, or overlap.
    pub pieces: Vec<(Rank, Slice)>,
}

/// Chooses one writer for every element that several ranks hold, such that ranks write about as much
/// as one another: for each tensor, disjoint parts of held pieces and who writes them. A function of
/// its arguments alone: every rank that knows the mesh comes to the same choice by itself.
///
/// The largest pieces first, each to the holder that has least to write; of a piece that overlaps
/// earlier ones, what they leave.
pub fn share_replicas(tensors: &[HeldTensor]) -> Vec<Vec<(Rank, Slice)>> {
    let mut pieces: Vec<(u64, usize, Slice, Vec<Rank>)> = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let mut holders: BTreeMap<&Slice, Vec<Rank>> = BTreeMap::new();
        for (rank, slice) in &tensor.pieces {
            holders.entry(slice).or_default().push(*rank);
        }
        pieces.extend(holders.into_iter().map(|(slice, ranks)| {
            (slice.elements() * tensor.element_bytes, index, slice.clone(), ranks)
        }));
    }
    pieces.sort_by_key(|(bytes, ..)| Reverse(*bytes));
    let mut loads: BTreeMap<Rank, u64> = BTreeMap::new();
    let mut shares: Vec<Vec<(Rank, Slice)>> = vec![Vec::new(); tensors.len()];
    for (_, index, slice, holders) in pieces {
        let load = |rank: &Rank| (loads.get(rank).copied().unwrap_or(0), *rank);
        let Some(writer) = holders.into_iter().min_by_key(load) else { continue };
        let share = &mut shares[index];
        // Of a tensor without elements somebody writes that it is there.
        if slice.is_empty() && share.is_empty() {
            share.push((writer, slice));
            continue;
        }
        let mut left = vec![slice];
        for (_, written) in share.iter() {
            left = left.iter().flat_map(|rest| rest.without(written)).collect();
        }
        let bytes: u64 =
            left.iter().map(Slice::elements).sum::<u64>() * tensors[index].element_bytes;
        *loads.entry(writer).or_default() += bytes;
        share.extend(left.into_iter().map(|part| (writer, part)));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_has_one_writer_and_the_largest_share_is_least() {
        let cases: [(&[usize], u32, usize); 7] = [
            (&[], 3, 0),
            (&[5], 1, 5),
            (&[5], 4, 5),
            (&[1, 1, 1, 1], 2, 2),
            (&[10, 1, 1, 1, 10], 3, 10),
            (&[4, 4, 4, 4, 4, 4], 4, 8),
            (&[0, 0, 7, 0], 2, 7),
        ];
        for (lengths, world_size, least) in cases {
            let shares = share_tensors(lengths, world_size);
            assert_eq!(shares.len(), world_size as usize, "{lengths:?}");
            let covered: Vec<usize> = shares.iter().cloned().flatten().collect();
            assert_eq!(covered, (0..lengths.len()).collect::<Vec<_>>(), "{lengths:?}");
            let sum = |share: &Range<usize>| lengths[share.clone()].iter().sum::<usize>();
            let largest = shares.iter().map(sum).max().expect("one share at least");
            assert_eq!(largest, least, "{lengths:?} over {world_size}");
        }
    }

    #[test]
    fn every_element_has_one_writer_among_its_holders_and_work_is_spread() {
        let all = |shape: &[u64]| (0..4).map(|rank| (Rank(rank), Slice::whole(shape))).collect();
        let tensors: Vec<HeldTensor> =
            (0..8).map(|_| HeldTensor { element_bytes: 4, pieces: all(&[5, 2]) }).collect();
        let shares = share_replicas(&tensors);
        for rank in (0..4).map(Rank) {
            let own = shares.iter().flatten().filter(|(writer, _)| *writer == rank);
            assert_eq!(own.count(), 2, "{rank}");
        }
        let cut = |range| Slice::cut(&[9], 0, range);
        let pieces = vec![(Rank(0), cut(0..6)), (Rank(1), cut(4..9)), (Rank(2), cut(5..6))];
        let shares = share_replicas(&[HeldTensor { element_bytes: 1, pieces }]);
        assert_eq!(shares, [[(Rank(0), cut(0..6)), (Rank(1), cut(6..9))]]);
        let shares = share_replicas(&[HeldTensor { element_bytes: 1, pieces: all(&[0, 3]) }]);
        assert_eq!(shares, [[(Rank(0), Slice::whole(&[0, 3]))]]);
    }
}
