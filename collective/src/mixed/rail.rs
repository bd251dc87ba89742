//! A payload between hosts, whose members are numbered by host, over connections that are numbered by
//! rank.

use std::ops::Range;

use crate::payload::{Length, Payload, Slices};

/// Passes a payload to the ranks of a rail only.
pub(crate) struct Rail<'a> {
    pub inner: &'a mut dyn Payload,
    /// By rank: its number in the payload; none for ranks that are not on the rail.
    pub members: &'a [Option<usize>],
}

impl Payload for Rail<'_> {
    fn outgoing(&self, peer: usize) -> Option<usize> {
        self.members[peer].and_then(|member| self.inner.outgoing(member))
    }

    fn incoming(&self, peer: usize) -> Option<Length> {
        self.members[peer].and_then(|member| self.inner.incoming(member))
    }

    fn announce(&mut self, peer: usize, bytes: usize) {
        if let Some(member) = self.members[peer] {
            self.inner.announce(member, bytes);
        }
    }

    fn ready<'b>(&'b self, peer: usize, range: Range<usize>, slices: &mut Slices<'b>) {
        if let Some(member) = self.members[peer] {
            self.inner.ready(member, range, slices);
        }
    }

    fn room(&mut self, peer: usize, range: Range<usize>) -> &mut [u8] {
        match self.members[peer] {
            Some(member) => self.inner.room(member, range),
            None => &mut [],
        }
    }

    fn arrived(&mut self, peer: usize, range: Range<usize>) -> bool {
        self.members[peer].is_some_and(|member| self.inner.arrived(member, range))
    }
}
