//! In which order the pieces of a pipelined reduction go from rank to rank.
//!
//! Pure arithmetic. Every rank owns a chunk of the buffer and reduces it segment by segment. What a
//! rank sends to a peer is one payload: its partials of the peer's segments, and between them its
//! own segments as they are finished:
//!
//! ```text
//! partials 0, partials 1, partials 2, result 0, partials 3, result 1, …
//! ```
//! A result stands [`LEAD`] segments behind the partials it is made of, so that it is ready when
//! its turn comes. Nothing ever waits for what stands behind it, so nothing can wait for ever: a
//! result needs the partials of its segment, which stand before it in every rank's payload.

use std::ops::Range;

/// Segments that a rank's partials are ahead of its results.
pub(crate) const LEAD: usize = 2;
/// Most bytes of one partial of a segment: it is still in the second-level cache when the last of
/// its peers' partials has come …
const SEGMENT_BYTES_MAX: usize = 256 << 10;
/// … together with those of this many bytes …
const SEGMENTS_BYTES: usize = 512 << 10;
/// … but so many that a read is worth its call.
const SEGMENT_BYTES_MIN: usize = 32 << 10;

/// A part of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// The sender's partials of a segment of the receiver's chunk.
    Partials(usize),
    /// A segment of the sender's chunk, reduced.
    Result(usize),
}

/// A piece, and which of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub piece: Piece,
    /// Bytes of the piece before this place.
    pub at: usize,
    /// Bytes of the piece.
    pub bytes: usize,
}

/// The pieces of one call.
#[derive(Debug)]
pub(crate) struct Schedule<'a> {
    /// By rank, in elements.
    chunks: Vec<Range<usize>>,
    /// Partials of each rank.
    counts: &'a [usize],
    /// Elements of a segment; the last of a chunk may be shorter or empty.
    pub segment: usize,
    /// Segments of every chunk.
    pub segments: usize,
    /// Whether results are sent at all.
    gathers: bool,
    /// Bytes of an element.
    size: usize,
}

impl<'a> Schedule<'a> {
    pub(crate) fn new(
        chunks: Vec<Range<usize>>,
        counts: &'a [usize],
        gathers: bool,
        size: usize,
    ) -> Self {
        let longest = chunks.iter().map(Range::len).max().unwrap_or(0);
        let parts: usize = counts.iter().sum();
        let bytes = (SEGMENTS_BYTES / parts.max(1)).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
        let segment = (bytes / size).min(longest).max(1);
        let segments = longest.div_ceil(segment);
        Self { chunks, counts, segment, segments, gathers, size }
    }

    /// A segment of a rank's chunk.
    pub(crate) fn segment_of(&self, rank: usize, segment: usize) -> Range<usize> {
        let Range { start, end } = self.chunks[rank];
        let edge = |segment: usize| (start + segment * self.segment).min(end);
        edge(segment)..edge(segment + 1)
    }

    /// Bytes from one rank to another.
    pub(crate) fn total(&self, from: usize, to: usize) -> usize {
        self.start(from, to, self.segments + LEAD)
    }

    /// Bytes before the partials of a segment.
    fn start(&self, from: usize, to: usize, segment: usize) -> usize {
        let before = |rank: usize, segments: usize| {
            (segments * self.segment).min(self.chunks[rank].len()) * self.size
        };
        let results = if self.gathers { before(from, segment.saturating_sub(LEAD)) } else { 0 };
        self.counts[from] * before(to, segment) + results
    }

    /// What is at an offset of the payload from one rank to another, below its end.
    pub(crate) fn place(&self, from: usize, to: usize, offset: usize) -> Place {
        let (mut low, mut high) = (0, self.segments + LEAD);
        while high - low > 1 {
            let middle = low.midpoint(high);
            if self.start(from, to, middle) <= offset { low = middle } else { high = middle }
        }
        let at = offset - self.start(from, to, low);
        let partials = self.counts[from] * self.segment_of(to, low).len() * self.size;
        if at < partials {
            return Place { piece: Piece::Partials(low), at, bytes: partials };
        }
        let result = low - LEAD;
        let bytes = self.segment_of(from, result).len() * self.size;
        Place { piece: Piece::Result(result), at: at - partials, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::chunk_range;

    #[test]
    fn a_payload_is_its_pieces_in_order_and_both_ends_agree() {
        for len in [0, 1, 5, 20_000, 300_000, 1_000_003] {
            for (gathers, counts) in [(false, [1, 3, 2]), (true, [1, 3, 2]), (true, [0, 3, 0])] {
                let chunks = (0..3).map(|rank| chunk_range(len, 3, rank)).collect();
                let schedule = Schedule::new(chunks, &counts, gathers, 4);
                for (from, to) in [(0, 1), (1, 0), (2, 1)] {
                    let (mut offset, mut pieces) = (0, Vec::new());
                    while offset < schedule.total(from, to) {
                        let place = schedule.place(from, to, offset);
                        assert_eq!((place.at, place.bytes > 0), (0, true));
                        let last = offset + place.bytes - 1;
                        let inside = Place { at: place.bytes - 1, ..place };
                        assert_eq!(schedule.place(from, to, last), inside);
                        pieces.push(place);
                        offset += place.bytes;
                    }
                    assert_eq!(offset, schedule.total(from, to));
                    let sum = |partials: bool| {
                        let matches =
                            |place: &&Place| matches!(place.piece, Piece::Partials(_)) == partials;
                        pieces.iter().filter(matches).map(|place| place.bytes).sum::<usize>()
                    };
                    let len_of = |rank| chunk_range(len, 3, rank as u32).len() * 4;
                    assert_eq!(sum(true), counts[from] * len_of(to));
                    assert_eq!(sum(false), if gathers { len_of(from) } else { 0 });
                    // No result before the partials of its segment.
                    for (index, place) in pieces.iter().enumerate() {
                        let Piece::Result(result) = place.piece else { continue };
                        let later = pieces[index..].iter().any(
                            |p| matches!(p.piece, Piece::Partials(segment) if segment <= result),
                        );
                        assert!(!later, "{pieces:?}");
                    }
                }
            }
        }
    }
}
