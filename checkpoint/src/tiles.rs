//! Checksums of small boxes of a stored piece, so that a reader of any part of it can tell that
//! what it read is what was written. Pure.
//!
//! A piece is divided into equal boxes, *tiles*, each with a CRC32C over its elements in row-major
//! order; and not in one way but in several: into tiles of the piece's own proportions, and for each
//! dimension into tiles that are one element thin along it. A reader takes the way that makes it
//! read least. So a cut along any one dimension costs nothing, wherever it is, and one along several
//! a tile's width each. Blocks of consecutive bytes would serve a reader of rows only: whoever wants
//! a few columns of every row would have to read whole blocks around each.

use crate::crc;
use crate::slice::Slice;

/// Smallest tile: its checksum is an eighth of it, which only the smallest tensors pay.
const TILE_BYTES_MIN: u64 = 32;
/// Tile of a piece of [`PIECE_BYTES`]: the checksums of one way to divide it are 1/128 of it.
const TILE_BYTES: u64 = 512;
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes of one checksum.
pub(crate) const CHECKSUM_BYTES: u64 = 4;

/// The ways to divide a piece with so many elements along each dimension, each of so many bytes.
///
/// What is read in vain grows with a tile's width, what is stored and read of checksums shrinks
/// with its size. Over pieces of all sizes the sum is least when a tile's bytes grow as the cube
/// root of the piece's: 128 B for 16 KiB, 512 B for 1 MiB, 2 KiB for 64 MiB, 5 KiB for 1 GiB, of
/// which one way's checksums are 0.08 %.
pub(crate) fn ways(length: &[u64], element_bytes: u64) -> Vec<Vec<u64>> {
    let elements: u64 = length.iter().product();
    let piece = (elements * element_bytes) as f64 / PIECE_BYTES as f64;
    let bytes = (TILE_BYTES as f64 * piece.cbrt()).max(TILE_BYTES_MIN as f64);
    let wanted = (bytes / element_bytes as f64).max(1.0);
    let long: Vec<usize> = (0..length.len()).filter(|dim| length[*dim] > 1).collect();
    let mut ways = vec![tile(length, wanted)];
    // Along a single dimension one element would be a tile.
    for dim in long.iter().filter(|_| long.len() > 1) {
        let mut others = length.to_vec();
        others[*dim] = 1;
        let thin = tile(&others, wanted);
        if !ways.contains(&thin) {
            ways.push(thin);
        }
    }
    ways
}

/// A tile of about so many elements, along each dimension the same fraction of the piece.
fn tile(length: &[u64], mut wanted: f64) -> Vec<u64> {
    let mut tile = vec![1; length.len()];
    // The shortest dimensions first: what they cannot take up is shared by the others.
    let mut order: Vec<usize> = (0..length.len()).collect();
    order.sort_by_key(|dim| length[*dim]);
    let mut elements = length.iter().product::<u64>() as f64;
    for (place, dim) in order.iter().enumerate() {
        let left = (length.len() - place) as f64;
        let fraction = (wanted / elements.max(1.0)).min(1.0).powf(1.0 / left);
        let extent = length[*dim].max(1);
        tile[*dim] = ((extent as f64 * fraction).round() as u64).clamp(1, extent);
        wanted /= tile[*dim] as f64;
        elements /= extent as f64;
    }
    tile
}

/// Tiles along each dimension.
fn grid(length: &[u64], tile: &[u64]) -> Vec<u64> {
    length.iter().zip(tile).map(|(length, tile)| length.div_ceil((*tile).max(1))).collect()
}

/// Tiles of a piece, when they can be counted at all.
pub(crate) fn count(length: &[u64], tile: &[u64]) -> Option<u64> {
    grid(length, tile).iter().try_fold(1u64, |product, count| product.checked_mul(*count))
}

/// The smallest box of whole tiles of `piece` around `slice`, which lies in it.
pub(crate) fn cover(slice: &Slice, piece: &Slice, tile: &[u64]) -> Slice {
    let mut cover = slice.clone();
    for (dim, range) in slice.ranges().enumerate() {
        let (origin, tile) = (piece.offset[dim], tile[dim]);
        let start = (range.start - origin) / tile * tile;
        let end = ((range.end - origin).div_ceil(tile) * tile).min(piece.length[dim]);
        (cover.offset[dim], cover.length[dim]) = (origin + start, end - start);
    }
    cover
}

/// The box of tiles, counted in tiles, that `cover` (made of whole tiles) is of `piece`, and all
/// tiles of the piece: how the checksums of the one lie in those of the other.
pub(crate) fn in_tiles(cover: &Slice, piece: &Slice, tile: &[u64]) -> (Slice, Slice) {
    let offset = (0..tile.len()).map(|dim| (cover.offset[dim] - piece.offset[dim]) / tile[dim]);
    let part = Slice { offset: offset.collect(), length: grid(&cover.length, tile) };
    (part, Slice::whole(&grid(&piece.length, tile)))
}

/// Computes the checksums of all tiles of a box from its bytes, which come in row-major order in
/// runs of any length.
pub(crate) struct TileSums {
    /// Dimensions and tile, the last in bytes; trailing dimensions that tiles do not cut are one.
    length: Vec<u64>,
    tile: Vec<u64>,
    /// Bytes taken of the current row, and the first tile of that row.
    within: u64,
    row: u64,
    row_tile: usize,
    sums: Vec<u32>,
}

impl TileSums {
    pub fn new(length: &[u64], tile: &[u64], element_bytes: u64) -> Self {
        let sums = vec![0; count(length, tile).unwrap_or(0) as usize];
        let (mut length, mut tile) = (length.to_vec(), tile.to_vec());
        length.push(element_bytes);
        tile.push(element_bytes);
        while let [.., outer, inner] = &length[..]
            && tile.last() == Some(inner)
        {
            let (outer, inner) = (*outer, *inner);
            length.truncate(length.len() - 2);
            length.push(outer * inner);
            let outer_tile = tile[tile.len() - 2];
            tile.truncate(tile.len() - 2);
            tile.push(outer_tile * inner);
        }
        Self { length, tile, within: 0, row: 0, row_tile: 0, sums }
    }

    /// Takes the next bytes; more than the box has are ignored.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let (Some(row_bytes), Some(tile_bytes)) = (self.length.last(), self.tile.last()) else {
            return;
        };
        let (row_bytes, tile_bytes) = (*row_bytes, (*tile_bytes).max(1));
        while !bytes.is_empty() {
            let left = (row_bytes - self.within).min(bytes.len() as u64);
            let column = self.within / tile_bytes;
            let first = self.row_tile + column as usize;
            let begun = self.within - column * tile_bytes;
            let taken =
                if tile_bytes <= crc::SHORT_BYTES_MAX as u64 && begun == 0 && left > tile_bytes {
                    let count = left / tile_bytes;
                    let tiles = first..first + count as usize;
                    let Some(sums) = self.sums.get_mut(tiles) else { return };
                    crc::append_each(
                        sums,
                        &bytes[..(count * tile_bytes) as usize],
                        tile_bytes as usize,
                    );
                    count * tile_bytes
                } else {
                    let taken = left.min(tile_bytes - begun);
                    let Some(sum) = self.sums.get_mut(first) else { return };
                    *sum = crc::append(*sum, &bytes[..taken as usize]);
                    taken
                };
            bytes = &bytes[taken as usize..];
            self.within += taken;
            if self.within == row_bytes {
                self.within = 0;
                self.row += 1;
                self.row_tile = self.first_tile_of_row();
            }
        }
    }

    fn first_tile_of_row(&self) -> usize {
        let last = self.length.len() - 1;
        let mut stride = self.length[last].div_ceil(self.tile[last]);
        let (mut row, mut tile) = (self.row, 0);
        for dim in (0..last).rev() {
            tile += row % self.length[dim] / self.tile[dim] * stride;
            row /= self.length[dim];
            stride *= self.length[dim].div_ceil(self.tile[dim]);
        }
        // Beyond the last row there is no tile.
        if row > 0 { self.sums.len() } else { tile as usize }
    }

    pub fn finish(self) -> Vec<u32> {
        self.sums
    }
}

/// Checksums as they are stored.
pub(crate) fn to_bytes(sums: &[u32]) -> Vec<u8> {
    sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slice::Runs;

    #[test]
    fn tiles_are_small_and_thin_along_every_dimension() {
        assert_eq!(ways(&[], 4), [[0u64; 0]; 1]);
        assert_eq!(ways(&[0, 4], 4).len(), 1);
        assert_eq!(ways(&[1, 1], 4), [[1, 1]]);
        assert_eq!(ways(&[4096], 4), [[32]]);
        assert_eq!(ways(&[512, 512], 4), [[11, 12], [1, 128], [128, 1]]);
        assert_eq!(ways(&[4096, 4096], 4), [[23, 22], [1, 512], [512, 1]]);
        for length in [&[3, 5][..], &[1000, 7, 2], &[64, 64, 64], &[1, 1, 1, 9], &[5000, 4]] {
            let elements: u64 = length.iter().product();
            for tile in ways(length, 4) {
                let count = count(length, &tile).expect("few");
                assert!(count <= elements && elements <= count * 200, "{length:?}: {tile:?}");
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_how_the_bytes_come_and_parts_have_those_of_the_whole() {
        for (length, tile) in [
            (&[5, 7, 6][..], &[2, 3, 4][..]),
            (&[5, 6], &[2, 6]),
            (&[5, 6], &[1, 4]),
            (&[9], &[4]),
            (&[], &[]),
            (&[4, 3, 2], &[3, 3, 2]),
        ] {
            let piece = Slice::whole(length);
            let bytes: Vec<u8> = (0..piece.elements() * 4).map(|i| (i * 37 % 251) as u8).collect();
            let sums = |slice: &Slice, step: usize| {
                let runs = Runs::between(slice, &piece, slice);
                let taken: Vec<u8> = runs
                    .iter()
                    .flat_map(|(at, _)| bytes[at as usize * 4..][..runs.length as usize * 4].iter())
                    .copied()
                    .collect();
                let mut sums = TileSums::new(&slice.length, tile, 4);
                taken.chunks(step).for_each(|chunk| sums.update(chunk));
                sums.update(b"more than there is");
                sums.finish()
            };
            let whole = sums(&piece, 1000);
            for step in [1, 3, 16] {
                assert_eq!(sums(&piece, step), whole, "{length:?} by {step}");
            }
            // By definition: every tile's bytes, in order.
            let (_, tiles) = in_tiles(&piece, &piece, tile);
            assert_eq!(whole.len() as u64, tiles.elements());
            for dim in 0..length.len() {
                let slice = Slice::cut(length, dim, 1..length[dim] - 1);
                let cover = cover(&slice, &piece, tile);
                let (part, tiles) = in_tiles(&cover, &piece, tile);
                let runs = Runs::between(&part, &tiles, &part);
                let expected: Vec<u32> = runs
                    .iter()
                    .flat_map(|(at, _)| whole[at as usize..][..runs.length as usize].iter())
                    .copied()
                    .collect();
                assert_eq!(sums(&cover, 5), expected, "{slice} of {length:?}");
            }
        }
        let mut sums = TileSums::new(&[2, 2], &[2, 1], 1);
        sums.update(b"abcd");
        assert_eq!(sums.finish(), [crc32c::crc32c(b"ac"), crc32c::crc32c(b"bd")]);
    }
}
