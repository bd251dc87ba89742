//! Rounds: the one pattern of which every call over shared memory is made.
//!
//! In a round each rank stages data in its window and says so (`staged`), reads what the others
//! staged (`folded`), and, where a call has results for all, reads those (`copied`). Windows have two
//! halves, used in turn: a rank may begin a round when all have folded the one before the last, and
//! may write a result when all have copied it. So ranks are at most one round apart and nobody waits
//! for a slot while data are there. All ranks count the same rounds; the counters never go back.
//!
//! Every round carries its call. A rank compares it before it uses a byte: calls that differ are an
//! error on both at once.

use std::time::{Duration, Instant};

use super::Shared;
use super::segment::{HEADER_BYTES, Progress};
use crate::call::{CALL_BYTES, Call, CallSite};
use crate::error::CollectiveError;
use crate::peers::Peers;

/// First and longest sleep between two looks at the connections.
pub(super) const SLEEP_FIRST: Duration = Duration::from_millis(1);
pub(super) const SLEEP_MOST: Duration = Duration::from_millis(20);

/// What a rank says of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundHeader {
    pub site: CallSite,
    /// The call before this one.
    pub last: CallSite,
    /// A digest of all calls before.
    pub history: u64,
    /// Rounds that this rank needs for the call, where ranks cannot know it of each other.
    pub rounds: u64,
}

impl RoundHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (at, site) in [(0, &self.site), (24, &self.last)] {
            bytes[at..at + CALL_BYTES].copy_from_slice(&site.call.encode());
            bytes[at + CALL_BYTES..at + 24].copy_from_slice(&site.number.to_le_bytes());
        }
        bytes[48..56].copy_from_slice(&self.history.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.rounds.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        let site = |at: usize| {
            let call = bytes[at..at + CALL_BYTES].try_into().ok()?;
            Some(CallSite { call: Call::decode(call)?, number: number(at + CALL_BYTES) })
        };
        Some(Self { site: site(0)?, last: site(24)?, history: number(48), rounds: number(56) })
    }
}

impl Shared {
    /// The half of the windows that this round uses.
    pub(super) fn half(&self) -> usize {
        self.round as usize % 2
    }

    /// The other ranks.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.ranks).filter(move |rank| *rank != own)
    }

    /// Waits until this rank may stage: all have folded the round before the last.
    pub(super) fn begin(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
    ) -> Result<(), CollectiveError> {
        self.wait_all(peers, site, Progress::Folded, self.round.wrapping_sub(1))
    }

    /// Says that this rank's data of the round are staged.
    pub(super) fn publish(&self, site: CallSite, rounds: u64) {
        let header = RoundHeader { site, last: self.last, history: self.history, rounds };
        #[allow(unsafe_code, reason = "shared memory")]
        // SAFETY: `begin` has seen that all have folded the round before the last.
        unsafe {
            self.segment.write_header(self.rank, self.half(), &header.encode());
        }
        self.count(Progress::Staged, self.round.wrapping_add(1));
    }

    /// Waits until a rank has staged its data, and compares its call with this one.
    pub(super) fn await_staged(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        rank: usize,
    ) -> Result<RoundHeader, CollectiveError> {
        self.wait(peers, site, rank, Progress::Staged, self.round.wrapping_add(1))?;
        let header = self.staged_header(peers, rank)?;
        for (theirs, ours) in [(header.last, self.last), (header.site, site)] {
            if theirs != ours {
                let (rank, address) = peers.peer(self.first + rank);
                let own = api::Rank(peers.rank);
                let ours = peers.counterpart(ours, theirs);
                return Err(CollectiveError::Mismatch { own, rank, address, ours, theirs });
            }
        }
        if header.history != self.history {
            let message = "its calls before the last differ from this rank's".to_owned();
            let (rank, address) = peers.peer(self.first + rank);
            return Err(CollectiveError::Protocol { rank, address, message });
        }
        self.find_unread(peers, site, rank)?;
        Ok(header)
    }

    /// What a rank says of the round that this rank is in or comes to, once it has published it.
    pub(super) fn staged_header(
        &self,
        peers: &Peers,
        rank: usize,
    ) -> Result<RoundHeader, CollectiveError> {
        #[allow(unsafe_code, reason = "shared memory")]
        // SAFETY: the rank has been seen to have published, and this one has not folded.
        let bytes = unsafe { self.segment.header(rank, self.half()) };
        RoundHeader::decode(&bytes).ok_or_else(|| {
            let (rank, address) = peers.peer(self.first + rank);
            let message = "its round in shared memory names no known call".to_owned();
            CollectiveError::Protocol { rank, address, message }
        })
    }

    /// Waits until all other ranks have staged.
    pub(super) fn await_all_staged(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
    ) -> Result<(), CollectiveError> {
        self.others().try_for_each(|rank| self.await_staged(peers, site, rank).map(|_| ()))
    }

    /// Says that this rank has read what the others staged, and published its result.
    pub(super) fn folded(&self) {
        self.count(Progress::Folded, self.round.wrapping_add(1));
    }

    /// Ends a round that has no results to copy.
    pub(super) fn end_round(&mut self) {
        self.folded();
        self.round = self.round.wrapping_add(1);
        self.count(Progress::Copied, self.round);
    }

    /// Counts one of this rank's counters up to a round.
    pub(super) fn count(&self, progress: Progress, round: u32) {
        self.segment.counter(self.rank, progress).advance(round);
    }

    /// Remembers a call that is over.
    pub(crate) fn end_call(&mut self, site: CallSite) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.history.to_le_bytes());
        hasher.update(&self.last.call.encode());
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        self.history = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        self.last = site;
    }

    /// Waits until all other ranks have reached a round.
    pub(super) fn wait_all(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        progress: Progress,
        round: u32,
    ) -> Result<(), CollectiveError> {
        self.others().try_for_each(|rank| self.wait(peers, site, rank, progress, round))
    }

    /// Waits until a rank has reached a round: spins, then sleeps and looks at the connections.
    pub(super) fn wait(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        rank: usize,
        progress: Progress,
        round: u32,
    ) -> Result<(), CollectiveError> {
        let counter = self.segment.counter(rank, progress);
        if counter.has_reached(round) || self.patience.spin(counter, round) {
            return Ok(());
        }
        let begin = Instant::now();
        let mut sleep = SLEEP_FIRST;
        loop {
            counter.sleep(round, sleep);
            if counter.has_reached(round) {
                return Ok(());
            }
            peers.glance(site)?;
            let seen = peers
                .find_blocked(site, self.first + rank, begin.elapsed())
                .and_then(|()| self.find_unread(peers, site, rank));
            match seen {
                // It came meanwhile, and what was seen of it belongs to what it did next.
                Err(CollectiveError::PeerLeft { .. } | CollectiveError::Mismatch { .. })
                    if counter.has_reached(round) =>
                {
                    return Ok(());
                }
                seen => seen?,
            }
            sleep = (sleep * 2).min(SLEEP_MOST);
        }
    }
}
