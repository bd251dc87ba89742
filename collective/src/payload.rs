//! What the frames of one exchange carry: bytes addressed by their place in a peer's payload.
//!
//! An exchange moves bytes and knows no elements; a payload knows where they come from, where they
//! go, and which of them may not leave yet because they are still being computed.

use std::io::IoSlice;
use std::ops::Range;
use std::time::Duration;

use crate::error::CollectiveError;
use crate::peers::Peers;

/// Memory ranges handed to the kernel in one call, well below its limit of 1,024.
const WRITE_SLICES: usize = 64;

/// Memory that is sent in one call.
#[derive(Debug)]
pub(crate) struct Slices<'b> {
    slices: [IoSlice<'b>; WRITE_SLICES],
    used: usize,
    bytes: usize,
}

impl<'b> Slices<'b> {
    pub(crate) fn new() -> Self {
        Self { slices: [IoSlice::new(&[]); WRITE_SLICES], used: 0, bytes: 0 }
    }

    /// Adds memory; false if there is no place for it.
    pub(crate) fn push(&mut self, bytes: &'b [u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let Some(slot) = self.slices.get_mut(self.used) else { return false };
        *slot = IoSlice::new(bytes);
        self.used += 1;
        self.bytes += bytes.len();
        true
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn as_slice(&self) -> &[IoSlice<'b>] {
        &self.slices[..self.used]
    }
}

/// How long a payload that is waited for may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// No other length.
    Exactly(usize),
    /// Any up to this.
    AtMost(usize),
}

/// What one exchange sends to and receives from every peer.
pub(crate) trait Payload {
    /// Bytes for a peer; none if no frame goes to it.
    fn outgoing(&self, peer: usize) -> Option<usize>;

    /// What is waited for from a peer; none if nothing is.
    fn incoming(&self, peer: usize) -> Option<Length>;

    /// A frame of that many bytes comes, as [`Payload::incoming`] allows.
    fn announce(&mut self, _peer: usize, _bytes: usize) {}

    /// Collects what may be sent now of a range of the bytes for a peer, from its start on.
    fn ready<'b>(&'b self, peer: usize, range: Range<usize>, slices: &mut Slices<'b>);

    /// Memory for a range of the bytes from a peer, from its start on; empty if there is none yet.
    fn room(&mut self, peer: usize, range: Range<usize>) -> &mut [u8];

    /// Called before each wait: does what has to go on beside the connections, and says how soon it
    /// wants to be called again.
    fn beside(&mut self, _peers: &Peers) -> Result<Option<Duration>, CollectiveError> {
        Ok(None)
    }

    /// Bytes are now in that memory. Whether more may be sent or received than before.
    fn arrived(&mut self, _peer: usize, _range: Range<usize>) -> bool {
        false
    }
}

/// Where a payload goes.
#[derive(Debug)]
pub(crate) enum Sink<'a> {
    /// Memory of exactly the payload's length.
    Exact(&'a mut [u8]),
    /// A vector that takes the payload's length, up to a bound.
    Bounded(&'a mut Vec<u8>, usize),
}

/// Memory for and from each rank, all of it there from the beginning.
#[derive(Debug)]
pub(crate) struct Transfers<'a> {
    /// By rank; none at this rank's place and where no frame goes.
    pub send: Vec<Option<&'a [u8]>>,
    /// By rank; none at this rank's place and where nothing is waited for.
    pub receive: Vec<Option<Sink<'a>>>,
}

impl Transfers<'_> {
    /// Nothing to and from that many ranks.
    pub(crate) fn none(world: u32) -> Self {
        Self { send: vec![None; world as usize], receive: (0..world).map(|_| None).collect() }
    }
}

impl Payload for Transfers<'_> {
    fn outgoing(&self, peer: usize) -> Option<usize> {
        self.send[peer].map(<[u8]>::len)
    }

    fn incoming(&self, peer: usize) -> Option<Length> {
        self.receive[peer].as_ref().map(|sink| match sink {
            Sink::Exact(memory) => Length::Exactly(memory.len()),
            Sink::Bounded(_, most) => Length::AtMost(*most),
        })
    }

    fn announce(&mut self, peer: usize, bytes: usize) {
        if let Some(Sink::Bounded(vector, _)) = &mut self.receive[peer] {
            vector.resize(bytes, 0);
        }
    }

    fn ready<'b>(&'b self, peer: usize, range: Range<usize>, slices: &mut Slices<'b>) {
        if let Some(bytes) = self.send[peer] {
            slices.push(&bytes[range]);
        }
    }

    fn room(&mut self, peer: usize, range: Range<usize>) -> &mut [u8] {
        match &mut self.receive[peer] {
            Some(Sink::Exact(memory)) => &mut memory[range],
            Some(Sink::Bounded(vector, _)) => &mut vector[range],
            None => &mut [],
        }
    }
}

/// No frame to or from anybody.
pub(crate) struct Nothing;

impl Payload for Nothing {
    fn outgoing(&self, _: usize) -> Option<usize> {
        None
    }

    fn incoming(&self, _: usize) -> Option<Length> {
        None
    }

    fn ready<'b>(&'b self, _: usize, _: Range<usize>, _: &mut Slices<'b>) {}

    fn room(&mut self, _: usize, _: Range<usize>) -> &mut [u8] {
        &mut []
    }
}
