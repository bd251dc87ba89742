//! Messages between two ranks of a host, piece by piece through a mailbox of two slots.
//!
//! Each ordered pair of ranks has one. A sender that finds it full takes what others have sent to it
//! meanwhile, so that two ranks may send to each other at the same time. Every piece carries its
//! call; a rank that waits for a message of a peer that is in another call, or that comes to a
//! collective with a message unread, has called something else than its peer.

#![allow(unsafe_code, reason = "copies to and from memory that other processes share")]

use std::collections::VecDeque;
use std::time::Instant;

use super::Shared;
use super::rounds::{SLEEP_FIRST, SLEEP_MOST};
use super::segment::{HEADER_BYTES, Mail, Progress};
use crate::call::{CALL_BYTES, Call, CallSite, Operation};
use crate::error::CollectiveError;
use crate::exchange::WAITING_AFTER;
use crate::link::AHEAD_MESSAGE_BYTES_MAX;
use crate::peers::Peers;

/// What the sender says of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PieceHeader {
    site: CallSite,
    /// Collectives that the sender had called before.
    collectives: u64,
    /// Bytes of the whole message.
    total: u64,
}

/// A message that was taken before its `recv`, as far as it has come.
#[derive(Debug)]
struct Early {
    header: PieceHeader,
    bytes: Vec<u8>,
}

/// What this rank has sent to and taken from each rank of the host.
#[derive(Debug, Default)]
pub(super) struct Post {
    /// Pieces, by rank.
    sent: Vec<u32>,
    taken: Vec<u32>,
    /// Messages, by rank.
    early: Vec<VecDeque<Early>>,
    early_bytes: usize,
}

impl Post {
    pub(super) fn new(ranks: usize) -> Self {
        let early = (0..ranks).map(|_| VecDeque::new()).collect();
        Self { sent: vec![0; ranks], taken: vec![0; ranks], early, early_bytes: 0 }
    }
}

impl PieceHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..CALL_BYTES].copy_from_slice(&self.site.call.encode());
        let numbers = [self.site.number, self.collectives, self.total];
        for (place, number) in bytes[CALL_BYTES..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (call, rest) = bytes.split_first_chunk()?;
        let number = |at: usize| Some(u64::from_le_bytes(rest[at..].first_chunk().copied()?));
        let site = CallSite { call: Call::decode(call)?, number: number(0)? };
        Some(Self { site, collectives: number(8)?, total: number(16)? })
    }
}

impl Shared {
    /// A message to a rank of this host; returns when all of it is in the mailbox or taken from it.
    pub(crate) fn send(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        bytes: &[u8],
        to: u32,
    ) -> Result<(), CollectiveError> {
        let (slot, to) = (self.segment.slot(), to as usize - self.first);
        if slot == 0 {
            return peers.send(site, bytes, (self.first + to) as u32);
        }
        let header =
            PieceHeader { site, collectives: peers.collectives(), total: bytes.len() as u64 };
        // From here on the peer does not wait for a message that this rank has yet to send.
        peers.links[self.first + to].iter_mut().for_each(|link| link.frames_sent += 1);
        let mut at = 0;
        loop {
            let end = (at + slot).min(bytes.len());
            self.put_piece(peers, to, &header, &bytes[at..end])?;
            at = end;
            if at == bytes.len() {
                return Ok(());
            }
        }
    }

    /// Puts the next piece of a message into its slot, when that is free.
    fn put_piece(
        &mut self,
        peers: &mut Peers,
        to: usize,
        header: &PieceHeader,
        bytes: &[u8],
    ) -> Result<(), CollectiveError> {
        let piece = self.post.sent[to];
        self.wait_mail(peers, header.site, to, Mail::Taken, piece.wrapping_sub(1))?;
        assert!(bytes.len() <= self.segment.slot(), "a slot holds a piece");
        let place = self.segment.mail(self.rank, to, piece as usize);
        // SAFETY: inside the slot (just asserted), and the receiver has taken the piece before the
        // last.
        unsafe {
            place.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            self.segment.write_mail_header((self.rank, to), piece as usize, &header.encode());
        }
        let sent = piece.wrapping_add(1);
        self.post.sent[to] = sent;
        self.segment.mail_counter(self.rank, to, Mail::Sent).advance(sent);
        Ok(())
    }

    /// A message from a rank of this host.
    pub(crate) fn recv(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        bytes: &mut [u8],
        from: u32,
    ) -> Result<(), CollectiveError> {
        let (slot, from) = (self.segment.slot(), from as usize - self.first);
        if slot == 0 {
            return peers.recv(site, bytes, (self.first + from) as u32);
        }
        let (mut at, mut whole) = (0, false);
        if let Some(early) = self.post.early[from].pop_front() {
            self.check_mail(peers, site, from, &early.header, bytes.len())?;
            self.post.early_bytes -= early.bytes.len();
            at = early.bytes.len();
            bytes[..at].copy_from_slice(&early.bytes);
            whole = at == bytes.len();
        }
        while !whole {
            let piece = self.post.taken[from];
            self.wait_mail(peers, site, from, Mail::Sent, piece.wrapping_add(1))?;
            let header = self.mail_header(peers, from, piece)?;
            self.check_mail(peers, site, from, &header, bytes.len())?;
            let end = (at + slot).min(bytes.len());
            self.take_piece(from, &mut bytes[at..end]);
            peers.meter.count(end - at);
            at = end;
            whole = at == bytes.len();
        }
        // Not before: a rank that waits for the rest of a message waits for nothing that its peer
        // has yet to begin.
        peers.links[self.first + from].iter_mut().for_each(|link| link.frames_received += 1);
        Ok(())
    }

    /// A message that a peer sent before it came to the collective that this rank is in: this rank
    /// should have received it, and the peer may not even be able to finish it.
    pub(super) fn find_unread(
        &self,
        peers: &Peers,
        site: CallSite,
        from: usize,
    ) -> Result<(), CollectiveError> {
        if self.segment.slot() == 0 {
            return Ok(());
        }
        let taken = self.post.taken[from];
        let counter = self.segment.mail_counter(from, self.rank, Mail::Sent);
        let header = match self.post.early[from].front() {
            Some(early) => early.header,
            None if counter.has_reached(taken.wrapping_add(1)) => {
                self.mail_header(peers, from, taken)?
            }
            None => return Ok(()),
        };
        if header.collectives <= site.number {
            return Err(self.mail_mismatch(peers, site, from, header.site));
        }
        Ok(())
    }

    fn mail_header(
        &self,
        peers: &Peers,
        from: usize,
        piece: u32,
    ) -> Result<PieceHeader, CollectiveError> {
        // SAFETY: the sender has been seen to have published the piece, and it is not yet taken.
        let bytes = unsafe { self.segment.mail_header((from, self.rank), piece as usize) };
        PieceHeader::decode(&bytes).ok_or_else(|| {
            let (rank, address) = peers.peer(self.first + from);
            let message = "its message in shared memory names no known call".to_owned();
            CollectiveError::Protocol { rank, address, message }
        })
    }

    /// Whether a message is the one that a `recv` waits for.
    fn check_mail(
        &self,
        peers: &Peers,
        site: CallSite,
        from: usize,
        header: &PieceHeader,
        len: usize,
    ) -> Result<(), CollectiveError> {
        let call = Call { operation: Operation::Send, detail: peers.rank, ..site.call };
        if header.site == (CallSite { call, ..site }) && header.total == len as u64 {
            return Ok(());
        }
        Err(self.mail_mismatch(peers, site, from, header.site))
    }

    fn mail_mismatch(
        &self,
        peers: &Peers,
        site: CallSite,
        from: usize,
        theirs: CallSite,
    ) -> CollectiveError {
        let (rank, address) = peers.peer(self.first + from);
        let (own, ours) = (api::Rank(peers.rank), peers.counterpart(site, theirs));
        CollectiveError::Mismatch { own, rank, address, ours, theirs }
    }

    /// Reads the next piece, which is there, and frees its slot.
    fn take_piece(&mut self, from: usize, bytes: &mut [u8]) {
        let piece = self.post.taken[from];
        assert!(bytes.len() <= self.segment.slot(), "a slot holds what is read");
        let place = self.segment.mail(from, self.rank, piece as usize);
        // SAFETY: inside the slot (just asserted), which its sender leaves alone until it is taken.
        unsafe {
            place.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
        let taken = piece.wrapping_add(1);
        self.post.taken[from] = taken;
        self.segment.mail_counter(from, self.rank, Mail::Taken).advance(taken);
    }

    /// Takes whatever has come, so that its senders can go on.
    pub(crate) fn take_early(&mut self, peers: &Peers) -> Result<(), CollectiveError> {
        if self.segment.slot() == 0 {
            return Ok(());
        }
        for from in self.others() {
            loop {
                let piece = self.post.taken[from];
                let counter = self.segment.mail_counter(from, self.rank, Mail::Sent);
                if !counter.has_reached(piece.wrapping_add(1)) {
                    break;
                }
                let header = self.mail_header(peers, from, piece)?;
                let open = self.post.early[from]
                    .back()
                    .is_some_and(|early| (early.bytes.len() as u64) < early.header.total);
                let total = usize::try_from(header.total).unwrap_or(usize::MAX);
                if !open {
                    if total > AHEAD_MESSAGE_BYTES_MAX.saturating_sub(self.post.early_bytes) {
                        break;
                    }
                    self.post.early[from].push_back(Early { header, bytes: Vec::new() });
                }
                let Some(mut early) = self.post.early[from].pop_back() else { break };
                let at = early.bytes.len();
                let end = (at + self.segment.slot()).min(total);
                early.bytes.resize(end, 0);
                self.take_piece(from, &mut early.bytes[at..]);
                self.post.early_bytes += end - at;
                self.post.early[from].push_back(early);
            }
        }
        Ok(())
    }

    /// Waits until a peer has sent, or taken, a piece: spins, then sleeps and looks for trouble.
    fn wait_mail(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        peer: usize,
        mail: Mail,
        piece: u32,
    ) -> Result<(), CollectiveError> {
        let sending = mail == Mail::Taken;
        let (from, to) = if sending { (self.rank, peer) } else { (peer, self.rank) };
        let counter = self.segment.mail_counter(from, to, mail);
        if counter.has_reached(piece) || self.patience.spin(counter, piece) {
            return Ok(());
        }
        let begin = Instant::now();
        let (mut sleep, mut told) = (SLEEP_FIRST, false);
        loop {
            if sending {
                self.take_early(peers)?;
            }
            let counter = self.segment.mail_counter(from, to, mail);
            counter.sleep(piece, sleep);
            if counter.has_reached(piece) {
                return Ok(());
            }
            peers.glance(site)?;
            let seen = self.look(peers, site, peer, sending, begin, &mut told);
            match seen {
                // It came meanwhile, and what was seen of it belongs to what it did next.
                Err(CollectiveError::PeerLeft { .. } | CollectiveError::Mismatch { .. })
                    if counter.has_reached(piece) =>
                {
                    return Ok(());
                }
                seen => seen?,
            }
            sleep = (sleep * 2).min(SLEEP_MOST);
        }
    }

    /// Looks for trouble while this rank waits for a peer's message, or for room for its own.
    fn look(
        &self,
        peers: &mut Peers,
        site: CallSite,
        peer: usize,
        sending: bool,
        begin: Instant,
        told: &mut bool,
    ) -> Result<(), CollectiveError> {
        peers.find_blocked(site, self.first + peer, begin.elapsed())?;
        if sending {
            return Ok(());
        }
        let round = self.round.wrapping_add(1);
        if self.segment.counter(peer, Progress::Staged).has_reached(round) {
            // It is in a collective, which cannot end before this rank comes to it.
            let theirs = self.staged_header(peers, peer)?.site;
            return Err(self.mail_mismatch(peers, site, peer, theirs));
        }
        if begin.elapsed() >= WAITING_AFTER && !std::mem::replace(told, true) {
            // Why a connection broke is seen on the next look at it.
            let _ = peers.say_waiting(site, self.first + peer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::thread;

    use api::Rank;

    use super::*;
    use crate::carrier::Carrier;
    use crate::tests::{HANG, TRANSPORT, group};
    use crate::{Communicator, ElementType, ProcessGroup, ReduceOp, Transport};

    fn memory(communicator: &mut ProcessGroup) -> (&mut Peers, &mut Shared) {
        match communicator.parts() {
            (peers, Carrier::Memory(shared)) => (peers, shared),
            (_, other) => panic!("expected shared memory, found {}", other.name()),
        }
    }

    #[test]
    fn a_rank_that_once_waited_for_the_rest_of_a_message_is_waited_for() {
        TRANSPORT.set(Transport::Shared);
        group(2, |rank, communicator| {
            let len = 2 * memory(communicator).1.segment.slot();
            let message = vec![7u8; len];
            if rank == 0 {
                // A sender that is held up between two pieces until its peer says that it waits.
                let (peers, shared) = memory(communicator);
                let call = Call::over(Operation::Send, ElementType::U8, len).with_detail(1);
                let site = CallSite { call, number: 0 };
                let header = PieceHeader { site, collectives: 0, total: len as u64 };
                peers.links[1].iter_mut().for_each(|link| link.frames_sent += 1);
                let (first, second) = message.split_at(len / 2);
                shared.put_piece(peers, 1, &header, first).unwrap();
                let begun = Instant::now();
                while peers.links[1].as_ref().is_some_and(|link| link.waiting.is_none()) {
                    assert!(begun.elapsed() < HANG, "the receiver does not say that it waits");
                    peers.glance(site).unwrap();
                    thread::yield_now();
                }
                shared.put_piece(peers, 1, &header, second).unwrap();
                // The receiver computes, and this rank has waited for it long enough to judge.
                let barrier = CallSite { call: Call::plain(Operation::Barrier), number: 0 };
                peers.find_blocked(barrier, 1, WAITING_AFTER).unwrap();
            } else {
                let mut buffer = vec![0u8; len];
                communicator.recv((&mut buffer).into(), Rank(0)).unwrap();
                assert_eq!(buffer, message);
            }
            communicator.barrier().unwrap();
        });
    }

    #[test]
    fn counters_wrap() {
        const BEFORE: u32 = u32::MAX - 2;
        TRANSPORT.set(Transport::Shared);
        let set = Arc::new(Barrier::new(2));
        group(2, move |rank, communicator| {
            let (_, shared) = memory(communicator);
            let (own, other, segment) = (shared.rank, 1 - shared.rank, &shared.segment);
            for progress in [Progress::Staged, Progress::Folded, Progress::Copied] {
                segment.counter(own, progress).advance(BEFORE);
            }
            segment.mail_counter(own, other, Mail::Sent).advance(BEFORE);
            segment.mail_counter(other, own, Mail::Taken).advance(BEFORE);
            shared.round = BEFORE;
            (shared.post.sent[other], shared.post.taken[other]) = (BEFORE, BEFORE);
            let (slot, window) = (segment.slot(), segment.window());
            set.wait();
            for round in 0..4u8 {
                let mut sum = vec![1i32; window];
                communicator.all_reduce((&mut sum).into(), ReduceOp::Sum).unwrap();
                assert!(sum.iter().all(|value| *value == 2));
                let message = vec![round + rank as u8; 2 * slot + 1];
                let mut buffer = vec![0u8; message.len()];
                communicator.send((&message).into(), Rank(1 - rank)).unwrap();
                communicator.recv((&mut buffer).into(), Rank(1 - rank)).unwrap();
                assert!(buffer.iter().all(|byte| *byte == round + 1 - rank as u8));
            }
        });
    }
}
