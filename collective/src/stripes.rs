//! How a payload is shared by the streams of a peer.
//!
//! Pure. A large payload goes over all streams in blocks, one after another: stream `s` of `n`
//! carries the blocks `s, s + n, s + 2n …`. So every stream is busy from the first byte to the last,
//! also where the end of a payload depends on its beginning.

use std::ops::Range;

/// Payloads shorter than this go over the first stream alone: a second costs more than it brings.
pub(crate) const STRIPED_BYTES_MIN: usize = 1 << 20;
/// Bytes of a block: as much as one write takes.
const BLOCK_BYTES: usize = 256 << 10;

/// The parts of one payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stripes {
    total: usize,
    streams: usize,
}

impl Stripes {
    /// A payload of that many bytes over as many streams as it is worth.
    pub(crate) fn new(total: usize, streams: usize) -> Self {
        Self { total, streams: if total < STRIPED_BYTES_MIN { 1 } else { streams } }
    }

    /// Streams that carry something.
    pub(crate) fn used(self) -> usize {
        self.streams
    }

    /// Bytes on a stream.
    pub(crate) fn part(self, stream: usize) -> usize {
        if self.streams == 1 {
            return if stream == 0 { self.total } else { 0 };
        }
        let (whole, rest) = (self.total / BLOCK_BYTES, self.total % BLOCK_BYTES);
        let (rounds, last) = (whole / self.streams, whole % self.streams);
        let blocks = rounds + usize::from(stream < last);
        blocks * BLOCK_BYTES + if stream == last { rest } else { 0 }
    }

    /// Where in the payload the bytes of a stream from a position on belong, up to the next jump.
    pub(crate) fn locate(self, stream: usize, position: usize) -> Range<usize> {
        if self.streams == 1 {
            return position..self.total;
        }
        let (block, inside) = (position / BLOCK_BYTES, position % BLOCK_BYTES);
        let start = (block * self.streams + stream) * BLOCK_BYTES;
        start + inside..(start + BLOCK_BYTES).min(self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_streams_carry_every_byte_once_and_in_order() {
        for total in [
            STRIPED_BYTES_MIN,
            STRIPED_BYTES_MIN + 1,
            5 * BLOCK_BYTES - 1,
            6 * BLOCK_BYTES,
            7 * BLOCK_BYTES + 13,
        ] {
            for streams in 1..=8 {
                let stripes = Stripes::new(total, streams);
                let mut ranges = Vec::new();
                for stream in 0..streams {
                    let mut position = 0;
                    while position < stripes.part(stream) {
                        let range = stripes.locate(stream, position);
                        assert!(!range.is_empty() && range.end <= total);
                        position += range.len();
                        ranges.push(range);
                    }
                    assert_eq!(position, stripes.part(stream), "{total} over {streams}");
                }
                ranges.sort_by_key(|range| range.start);
                let mut next = 0;
                for range in ranges {
                    assert_eq!(range.start, next, "{total} over {streams}");
                    next = range.end;
                }
                assert_eq!(next, total);
            }
        }
    }

    #[test]
    fn a_small_payload_uses_one_stream() {
        let stripes = Stripes::new(STRIPED_BYTES_MIN - 1, 4);
        assert_eq!((stripes.used(), stripes.part(0), stripes.part(1)), (1, (1 << 20) - 1, 0));
        assert_eq!(stripes.locate(0, 5), 5..(1 << 20) - 1);
    }
}
