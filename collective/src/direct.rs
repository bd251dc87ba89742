//! Everything from every rank to every rank: the payload of the small path.

use std::ops::Range;

use crate::combination::Combination;
use crate::element::Element;
use crate::payload::{Length, Payload, Slices};

/// All partials of this rank to each peer, all of each peer to this rank.
pub(crate) struct Direct<'a, T> {
    own: usize,
    combination: &'a Combination,
    partials: &'a [&'a [T]],
    /// The partials of the other ranks, one after another in rank order.
    received: &'a mut [T],
    /// Elements of a partial.
    len: usize,
}

impl<'a, T: Element> Direct<'a, T> {
    pub(crate) fn new(
        own: usize,
        combination: &'a Combination,
        partials: &'a [&'a [T]],
        (received, len): (&'a mut [T], usize),
    ) -> Self {
        Self { own, combination, partials, received, len }
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Element> Payload for Direct<'_, T> {
    fn outgoing(&self, peer: usize) -> Option<usize> {
        (peer != self.own).then(|| self.partials.len() * self.bytes())
    }

    fn incoming(&self, peer: usize) -> Option<Length> {
        let bytes = self.combination.counts[peer] * self.bytes();
        (peer != self.own).then_some(Length::Exactly(bytes))
    }

    fn ready<'b>(&'b self, _: usize, range: Range<usize>, slices: &mut Slices<'b>) {
        let mut at = range.start;
        while at < range.end {
            let (part, inside) = (at / self.bytes(), at % self.bytes());
            let part: &[u8] = bytemuck::cast_slice(self.partials[part]);
            let part = &part[inside..part.len().min(inside + range.end - at)];
            if !slices.push(part) {
                return;
            }
            at += part.len();
        }
    }

    fn room(&mut self, peer: usize, range: Range<usize>) -> &mut [u8] {
        let before = self.combination.before[peer] * self.bytes();
        let received: &mut [u8] = bytemuck::cast_slice_mut(self.received);
        &mut received[before + range.start..before + range.end]
    }
}
