//! Which contiguous part of a flat buffer belongs to which rank.
//!
//! Not a plan of tensors: a cut of `0..len` that every rank computes alike.

use std::ops::Range;

/// Elements of a block that a cut never divides (where the buffer is long enough).
///
/// Norms are sums over blocks of this length; a shard that ends inside one would change their bits.
pub const CHUNK_ALIGNMENT: usize = 4096;

/// The chunk of `rank` when `len` elements are shared by `world_size` ranks.
///
/// Chunks are contiguous, in rank order, near-equal, and tile `0..len`. With at least one block of
/// [`CHUNK_ALIGNMENT`] elements (the last may be short) for every rank they are cut only at block
/// edges; a shorter buffer is cut between elements. The first ranks get what does not divide.
///
/// # Panics
/// If `rank` is not below `world_size`.
pub fn chunk_range(len: usize, world_size: u32, rank: u32) -> Range<usize> {
    assert!(rank < world_size, "a chunk belongs to a rank below the world size");
    let (rank, world) = (rank as usize, world_size as usize);
    let blocks = len.div_ceil(CHUNK_ALIGNMENT);
    let (units, unit) = if blocks >= world { (blocks, CHUNK_ALIGNMENT) } else { (len, 1) };
    let edge = |rank: usize| {
        (units / world * rank + (units % world).min(rank)).saturating_mul(unit).min(len)
    };
    edge(rank)..edge(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_the_buffer_and_are_cut_at_blocks_where_it_is_long_enough() {
        for len in [0usize, 1, 2, 7, 4095, 4096, 4097, 8192, 20_000, 65_536, 100_001] {
            for world in [1u32, 2, 3, 4, 5, 7, 8, 13] {
                let mut next = 0;
                let aligned = len.div_ceil(CHUNK_ALIGNMENT) >= world as usize;
                let unit = if aligned { CHUNK_ALIGNMENT } else { 1 };
                let mut sizes = Vec::new();
                for rank in 0..world {
                    let chunk = chunk_range(len, world, rank);
                    assert_eq!(chunk.start, next, "len {len}, world {world}, rank {rank}");
                    assert!(chunk.start == len || chunk.start.is_multiple_of(unit));
                    sizes.push(chunk.len().div_ceil(unit));
                    next = chunk.end;
                }
                assert_eq!(next, len);
                let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
                assert!(most - least <= 1, "len {len}, world {world}: {sizes:?}");
            }
        }
    }
}
