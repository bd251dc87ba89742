//! A reduction whose pieces are received, reduced and sent on at the same time.
//!
//! Each segment of this rank's chunk is reduced as soon as the last partial of it has come, while
//! it is in the cache, and goes out while later ones come in. The order of pieces is `schedule`'s;
//! the order of the sum is the tree's, whatever comes first.

use std::ops::Range;

use crate::combination::Combination;
use crate::communicator::ReduceOp;
use crate::element::Element;
use crate::payload::{Length, Payload, Slices};
use crate::schedule::{LEAD, Piece, Place, Schedule};

/// Segments for which partials are kept: a peer is at most [`LEAD`] ahead of what it got from this
/// rank, and one may just be coming.
const SLOTS: usize = LEAD + 1;

/// Where this rank's partials are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a, T> {
    /// There is one, and it is the output itself. A peer sends a result only after it has this
    /// rank's partial of it, so the place is free when the result comes.
    InPlace,
    /// Elsewhere.
    Partials(&'a [&'a [T]]),
}

/// A reduction under way.
pub(crate) struct Pipeline<'a, T> {
    own: usize,
    schedule: Schedule<'a>,
    combination: &'a Combination,
    op: ReduceOp,
    /// What an average is divided by.
    count: u32,
    input: Input<'a, T>,
    /// The whole buffer, or this rank's chunk of it.
    output: &'a mut [T],
    /// Elements of the buffer before `output`.
    base: usize,
    /// [`SLOTS`] times the partials of a segment of all other ranks.
    scratch: &'a mut [T],
    /// Bytes of partials that came for the segment in each slot.
    came: [usize; SLOTS],
    /// Segments of this rank's chunk that are reduced.
    reduced: usize,
}

/// Elements of scratch memory that a reduction needs.
pub(crate) fn scratch_elements(schedule: &Schedule<'_>, combination: &Combination) -> usize {
    SLOTS * combination.foreign * schedule.segment
}

impl<'a, T: Element> Pipeline<'a, T> {
    pub(crate) fn new(
        own: usize,
        schedule: Schedule<'a>,
        combination: &'a Combination,
        (op, count): (ReduceOp, u32),
        input: Input<'a, T>,
        (output, base): (&'a mut [T], usize),
        scratch: &'a mut [T],
    ) -> Self {
        let mut pipeline = Self {
            own,
            schedule,
            combination,
            op,
            count,
            input,
            output,
            base,
            scratch,
            came: [0; SLOTS],
            reduced: 0,
        };
        // Segments of nothing, and those of a group of one, need no partial of a peer.
        pipeline.advance();
        pipeline
    }

    fn counts(&self) -> &'a [usize] {
        &self.combination.counts
    }

    fn partial(&self, index: usize) -> &[T] {
        match self.input {
            Input::InPlace => self.output,
            Input::Partials(partials) => partials[index],
        }
    }

    /// Where the partials of a peer for a segment of this rank are kept, in elements.
    fn slot(&self, peer: usize, segment: usize) -> Range<usize> {
        let slot = segment % SLOTS * self.combination.foreign + self.combination.before[peer];
        let start = slot * self.schedule.segment;
        start..start + self.counts()[peer] * self.schedule.segment_of(self.own, segment).len()
    }

    /// Reduces the segments of which all partials are here; whether there was one.
    fn advance(&mut self) -> bool {
        let before = self.reduced;
        while self.reduced < self.schedule.segments {
            let segment = self.schedule.segment_of(self.own, self.reduced);
            let expected = self.combination.foreign * segment.len() * size_of::<T>();
            let came = &mut self.came[self.reduced % SLOTS];
            if *came < expected {
                break;
            }
            *came = 0;
            self.reduce(segment);
            self.reduced += 1;
        }
        self.reduced > before
    }

    fn reduce(&mut self, segment: Range<usize>) {
        let len = segment.len();
        if len == 0 {
            return;
        }
        let slot = self.reduced % SLOTS * self.combination.foreign * self.schedule.segment;
        // Only a whole chunk's last segment is shorter: its partials lie at the slots' beginnings.
        let (stride, foreign) = (self.schedule.segment, self.combination.foreign);
        if len < stride {
            for peer in (0..self.counts().len()).filter(|peer| *peer != self.own) {
                let from = self.slot(peer, self.reduced);
                let to = slot + self.combination.before[peer] * len;
                self.scratch.copy_within(from, to);
            }
        }
        let others = &self.scratch[slot..slot + foreign * len];
        let (op, count) = (self.op, self.count);
        let output = &mut self.output[segment.start - self.base..segment.end - self.base];
        match self.input {
            Input::InPlace => self.combination.run_in_place(others, output, op, count),
            Input::Partials(partials) => {
                let own: Vec<&[T]> = partials.iter().map(|part| &part[segment.clone()]).collect();
                self.combination.run(&own, others, output, op, count);
            }
        }
    }

    /// Memory that is sent from a place on; none if it is not ready.
    fn bytes_at(&self, peer: usize, place: Place) -> Option<&[u8]> {
        match place.piece {
            Piece::Partials(segment) => {
                let segment = self.schedule.segment_of(peer, segment);
                let each = segment.len() * size_of::<T>();
                let part: &[u8] = bytemuck::cast_slice(&self.partial(place.at / each)[segment]);
                Some(&part[place.at % each..])
            }
            Piece::Result(segment) if segment < self.reduced => {
                let segment = self.schedule.segment_of(self.own, segment);
                let range = segment.start - self.base..segment.end - self.base;
                let result: &[u8] = bytemuck::cast_slice(&self.output[range]);
                Some(&result[place.at..])
            }
            Piece::Result(_) => None,
        }
    }
}

impl<T: Element> Payload for Pipeline<'_, T> {
    fn outgoing(&self, peer: usize) -> Option<usize> {
        (peer != self.own).then(|| self.schedule.total(self.own, peer))
    }

    fn incoming(&self, peer: usize) -> Option<Length> {
        (peer != self.own).then(|| Length::Exactly(self.schedule.total(peer, self.own)))
    }

    fn ready<'b>(&'b self, peer: usize, mut range: Range<usize>, slices: &mut Slices<'b>) {
        while !range.is_empty() {
            let place = self.schedule.place(self.own, peer, range.start);
            let Some(bytes) = self.bytes_at(peer, place) else { return };
            let bytes = &bytes[..bytes.len().min(range.len())];
            if !slices.push(bytes) {
                return;
            }
            range.start += bytes.len();
        }
    }

    fn room(&mut self, peer: usize, range: Range<usize>) -> &mut [u8] {
        let Place { piece, at, bytes } = self.schedule.place(peer, self.own, range.start);
        let end = bytes.min(at + range.len());
        match piece {
            Piece::Partials(segment) if segment < self.reduced + SLOTS => {
                let slot = self.slot(peer, segment);
                &mut bytemuck::cast_slice_mut(&mut self.scratch[slot])[at..end]
            }
            // A peer that far ahead has to wait.
            Piece::Partials(_) => &mut [],
            Piece::Result(segment) => {
                let segment = self.schedule.segment_of(peer, segment);
                let range = segment.start - self.base..segment.end - self.base;
                &mut bytemuck::cast_slice_mut(&mut self.output[range])[at..end]
            }
        }
    }

    fn arrived(&mut self, peer: usize, range: Range<usize>) -> bool {
        let place = self.schedule.place(peer, self.own, range.start);
        let Piece::Partials(segment) = place.piece else { return false };
        self.came[segment % SLOTS] += range.len();
        self.advance()
    }
}
