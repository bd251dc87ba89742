//! Which bytes of which shards a reader fetches, in which requests. Pure.
//!
//! What is fetched is whole tiles, so that every byte can be checked, and their checksums; by default
//! at most a tenth more than what is needed, as far as tiles allow. That tenth buys fewer requests:
//! the bytes between two wanted ranges are fetched with them, smallest gaps first, until it is
//! spent. So no plan within the bound has fewer requests, except by joining across batches. A cut
//! along a tensor's last dimension still costs a request per row where rows are far apart: that is
//! the price of not reading the rest of each row, and its bound is `requests_max`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::format::TensorEntry;
use crate::manifest::ShardEntry;
use crate::read::ReadOptions;
use crate::reshard::Source;
use crate::slice::{Runs, Slice};
use crate::tiles;

/// Bytes fetched, checked and copied together; with their gaps, the memory of one batch.
const BATCH_BYTES: u64 = 8 << 20;
/// Checksums further apart than this are fetched by different requests.
const CHECKS_GAP_MAX: u64 = 4 << 10;
/// Gaps above this are not worth fetching even within the bound: a request costs less.
const GAP_BYTES_MAX: u64 = 1 << 20;

/// What a reader does with the shards.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Shards that are read from end to end, and what is taken from them.
    pub whole: Vec<(usize, Vec<Source>)>,
    /// Checksums of what is read of the others, one request each.
    pub checks: Vec<CheckGroup>,
    /// What is read of the others.
    pub batches: Vec<Batch>,
    /// Bytes wanted.
    pub needed: u64,
}

/// Which checksums, by tensor and way of dividing it, and where in the shard they lie.
pub(crate) type CheckPlace = ((usize, usize), Range<u64>);

/// Checksums of one shard that lie near one another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CheckGroup {
    /// Index of the shard.
    pub shard: usize,
    pub places: Vec<CheckPlace>,
}

impl CheckGroup {
    /// Bytes from the first to the last.
    pub fn bytes(&self) -> u64 {
        let ends = (self.places.first(), self.places.last());
        ends.0.zip(ends.1).map_or(0, |((_, first), (_, last))| last.end - first.start)
    }
}

/// Some of the parts of one shard.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Batch {
    /// Index of the shard.
    pub shard: usize,
    pub parts: Vec<Part>,
    /// Bytes to fetch, one request each, in ascending order.
    pub ranges: Vec<Range<u64>>,
}

/// Whole tiles of one stored piece, and what is taken from them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// Index of the tensor in the shard, and of the way it is divided into tiles.
    pub tensor: usize,
    pub way: usize,
    pub cover: Slice,
    /// Index of the want, and what it gets.
    pub copies: Vec<(usize, Slice)>,
}

/// Plans the reading of all sources. With `all`, shards are read from end to end; of a former shard
/// what is used, since the rest may be most of it.
pub(crate) fn plan(
    shards: &[ShardEntry],
    sources: Vec<Source>,
    options: &ReadOptions,
    all: bool,
) -> Plan {
    let mut by_shard: BTreeMap<usize, Vec<Source>> = BTreeMap::new();
    let mut plan = Plan::default();
    for source in sources {
        by_shard.entry(source.shard).or_default().push(source);
    }
    let bound =
        |bytes: u64| bytes.saturating_add(bytes.saturating_mul(options.extra_percent) / 100);
    let (mut needed, mut fetched) = (0, 0);
    for (shard, sources) in by_shard {
        let entry = &shards[shard];
        let wanted: u64 = sources.iter().map(|source| bytes_of(entry, source)).sum();
        plan.needed += wanted;
        let can_be_cut = sources.iter().all(|s| !entry.tensors[s.tensor].checks.is_empty());
        let is_whole = all && entry.used.is_none();
        if is_whole || entry.stored_bytes <= bound(wanted) || !can_be_cut {
            plan.whole.push((shard, sources));
            continue;
        }
        let parts = parts(entry, sources);
        let checks = check_groups(shard, entry, &parts);
        needed += wanted;
        fetched += parts.iter().map(|part| cover_bytes(entry, part)).sum::<u64>();
        fetched += checks.iter().map(CheckGroup::bytes).sum::<u64>();
        plan.checks.extend(checks);
        plan.batches.extend(batches(shard, entry, parts));
    }
    close_gaps(&mut plan.batches, bound(needed).saturating_sub(fetched), options.requests_max);
    plan
}

fn bytes_of(entry: &ShardEntry, source: &Source) -> u64 {
    source.slice.elements() * entry.tensors[source.tensor].dtype.bytes()
}

fn cover_bytes(entry: &ShardEntry, part: &Part) -> u64 {
    part.cover.elements() * entry.tensors[part.tensor].dtype.bytes()
}

fn way_bytes(entry: &ShardEntry, tensor: usize, way: usize) -> u64 {
    let piece = &entry.tensors[tensor];
    piece.checks[way].bytes(&piece.place().length)
}

/// The checksums that parts of one shard need, near ones together.
fn check_groups(shard: usize, entry: &ShardEntry, parts: &[Part]) -> Vec<CheckGroup> {
    let ways: BTreeSet<_> = parts.iter().map(|part| (part.tensor, part.way)).collect();
    let mut at = entry.tensors.last().map_or(0, |last| last.offset + last.bytes);
    let mut groups: Vec<CheckGroup> = Vec::new();
    for (tensor, piece) in entry.tensors.iter().enumerate() {
        let length = piece.place().length;
        for (way, checks) in piece.checks.iter().enumerate() {
            let place = ((tensor, way), at..at + checks.bytes(&length));
            at = place.1.end;
            if !ways.contains(&(tensor, way)) {
                continue;
            }
            let group = groups.last_mut().filter(|group| {
                let last = group.places.last();
                last.is_some_and(|(_, last)| place.1.start - last.end <= CHECKS_GAP_MAX)
            });
            match group {
                Some(group) => group.places.push(place),
                None => groups.push(CheckGroup { shard, places: vec![place] }),
            }
        }
    }
    groups
}

/// Disjoint boxes of whole tiles around the sources, none larger than a batch where tiles allow.
fn parts(entry: &ShardEntry, sources: Vec<Source>) -> Vec<Part> {
    let mut by_tensor: BTreeMap<usize, Vec<Source>> = BTreeMap::new();
    for source in sources {
        by_tensor.entry(source.tensor).or_default().push(source);
    }
    let mut parts = Vec::new();
    for (tensor, mut sources) in by_tensor {
        let piece = &entry.tensors[tensor];
        // The largest first: the others add slivers at most.
        sources.sort_by_key(|source| Reverse(source.slice.elements()));
        let way = (0..piece.checks.len()).map(|way| (way, covers(piece, way, &sources)));
        let cost = |(way, covers): &(usize, Vec<Slice>)| {
            let elements: u64 = covers.iter().map(Slice::elements).sum();
            elements * piece.dtype.bytes() + way_bytes(entry, tensor, *way)
        };
        let Some((way, covers)) = way.min_by_key(cost) else { continue };
        let tile = &piece.checks[way].tile;
        let elements_max = BATCH_BYTES / piece.dtype.bytes();
        let covers = covers.into_iter().flat_map(|cover| split(cover, tile, elements_max));
        parts.extend(covers.map(|cover| {
            let copy = |s: &Source| Some((s.want, s.slice.intersection(&cover)?));
            let copies = sources.iter().filter_map(copy).collect();
            Part { tensor, way, cover, copies }
        }));
    }
    parts
}

/// Disjoint boxes of one way's tiles that hold all sources, which are of one piece.
fn covers(piece: &TensorEntry, way: usize, sources: &[Source]) -> Vec<Slice> {
    let (place, tile) = (piece.place(), &piece.checks[way].tile);
    let mut covers: Vec<Slice> = Vec::new();
    for source in sources {
        let mut fresh = vec![tiles::cover(&source.slice, &place, tile)];
        for cover in &covers {
            fresh = fresh.iter().flat_map(|slice| slice.without(cover)).collect();
        }
        covers.extend(fresh);
    }
    covers
}

/// Cuts a box at tiles' edges, along the outermost dimension that has several.
fn split(cover: Slice, tile: &[u64], elements_max: u64) -> Vec<Slice> {
    let elements = cover.elements();
    let dim = (0..tile.len()).find(|dim| cover.length[*dim] > tile[*dim]);
    let (Some(dim), true) = (dim, elements > elements_max) else { return vec![cover] };
    let (length, tile_length) = (cover.length[dim], tile[dim]);
    let slab = elements / length * tile_length;
    let step = (elements_max / slab.max(1)).max(1) * tile_length;
    let cut = |start: u64| {
        let mut slice = cover.clone();
        slice.offset[dim] += start;
        slice.length[dim] = step.min(length - start);
        slice
    };
    let slices = (0..length.div_ceil(step)).map(|index| cut(index * step));
    // One tile's width may still be too much.
    slices
        .flat_map(|slice| {
            if slice.length[dim] < length { split(slice, tile, elements_max) } else { vec![slice] }
        })
        .collect()
}

/// Where a part's bytes lie in the shard, in row-major order of the part.
pub(crate) fn ranges<'a>(
    entry: &'a ShardEntry,
    part: &Part,
) -> impl Iterator<Item = Range<u64>> + use<'a> {
    let piece = &entry.tensors[part.tensor];
    let (offset, element) = (piece.offset, piece.dtype.bytes());
    let runs = Runs::between(&part.cover, &piece.place(), &part.cover);
    let length = runs.length * element;
    runs.iter().map(move |(at, _)| offset + at * element..offset + at * element + length)
}

/// Puts parts that lie beside one another into one batch.
fn batches(shard: usize, entry: &ShardEntry, parts: Vec<Part>) -> Vec<Batch> {
    let begin = |part: &Part| ranges(entry, part).next().map_or(0, |range| range.start);
    let mut parts: Vec<(u64, Part)> = parts.into_iter().map(|part| (begin(&part), part)).collect();
    parts.sort_by_key(|(begin, _)| *begin);
    let mut batches: Vec<Batch> = Vec::new();
    let mut filled = 0;
    for (_, part) in parts {
        let bytes = cover_bytes(entry, &part);
        filled += bytes;
        match batches.last_mut() {
            Some(batch) if filled <= BATCH_BYTES => batch.parts.push(part),
            _ => {
                filled = bytes;
                batches.push(Batch { shard, parts: vec![part], ranges: Vec::new() });
            }
        }
    }
    for batch in &mut batches {
        let all = batch.parts.iter().flat_map(|part| ranges(entry, part));
        batch.ranges = all.filter(|range| !range.is_empty()).collect();
        batch.ranges.sort_by_key(|range| range.start);
        join(&mut batch.ranges, |gap, _| gap == 0);
    }
    batches
}

/// Joins neighbours whose gap, given with the index of the later one, is to be fetched too.
fn join(ranges: &mut Vec<Range<u64>>, mut fetch_gap: impl FnMut(u64, usize) -> bool) {
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for (index, range) in ranges.drain(..).enumerate() {
        match joined.last_mut() {
            Some(last) if fetch_gap(range.start - last.end, index) => last.end = range.end,
            _ => joined.push(range),
        }
    }
    *ranges = joined;
}

/// Spends so many bytes on gaps, the smallest first; then whatever it takes to have so few requests.
fn close_gaps(batches: &mut [Batch], mut bytes: u64, requests_max: usize) {
    let mut gaps: Vec<(u64, usize, usize)> = Vec::new();
    let mut requests = 0;
    for (batch, Batch { ranges, .. }) in batches.iter().enumerate() {
        let pairs = ranges.windows(2).enumerate();
        gaps.extend(pairs.map(|(index, pair)| (pair[1].start - pair[0].end, batch, index + 1)));
        requests += ranges.len();
    }
    gaps.sort_unstable();
    let closing = gaps.iter().take_while(|(gap, ..)| {
        let is_worth_it = requests > requests_max || (*gap <= bytes && *gap <= GAP_BYTES_MAX);
        bytes = bytes.saturating_sub(*gap);
        requests -= usize::from(is_worth_it);
        is_worth_it
    });
    let mut closed: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (_, batch, index) in closing {
        closed.entry(*batch).or_default().push(*index);
    }
    for (batch, mut indices) in closed {
        indices.sort_unstable();
        join(&mut batches[batch].ranges, |_, index| indices.binary_search(&index).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(starts: &[u64]) -> Batch {
        let ranges = starts.iter().map(|start| *start..start + 10).collect();
        Batch { shard: 0, parts: Vec::new(), ranges }
    }

    #[test]
    fn the_smallest_gaps_are_fetched_until_the_bound_and_more_only_for_too_many_requests() {
        // Gaps of 5, 40 and 20; 5 and 7; none that can be joined.
        let all = [batch(&[0, 15, 65, 95]), batch(&[200, 215, 232]), batch(&[900])];
        let left = |bytes, requests_max| {
            let mut batches = all.clone();
            close_gaps(&mut batches, bytes, requests_max);
            batches.map(|batch| batch.ranges.len())
        };
        assert_eq!(left(0, 100), [4, 3, 1]);
        assert_eq!(left(9, 100), [3, 3, 1]);
        assert_eq!(left(17, 100), [3, 1, 1]);
        assert_eq!(left(37, 100), [2, 1, 1]);
        assert_eq!(left(1000, 100), [1, 1, 1]);
        assert_eq!(left(0, 4), [2, 1, 1]);
        assert_eq!(left(0, 1), [1, 1, 1], "batches are not joined");
    }

    #[test]
    fn a_large_box_is_cut_at_tiles_edges() {
        let cover = Slice { offset: vec![8, 0], length: vec![30, 100] };
        let parts = split(cover.clone(), &[4, 10], 900);
        assert_eq!(parts.len(), 4);
        assert!(parts.iter().all(|part| part.elements() <= 900 && part.offset[0] % 4 == 0));
        assert_eq!(parts.iter().map(Slice::elements).sum::<u64>(), cover.elements());
        // One tile's height is too much: cut along the next dimension too.
        let parts = split(cover.clone(), &[4, 10], 100);
        assert!(parts.iter().all(|part| part.elements() <= 100 && part.offset[1] % 10 == 0));
        assert_eq!(parts.iter().map(Slice::elements).sum::<u64>(), cover.elements());
        assert_eq!(split(cover.clone(), &[40, 100], 100), [cover], "one tile");
    }
}
