//! Calls that move data and compute nothing: barrier, broadcast, all-gather, and parts of any length
//! between any two ranks.

#![allow(unsafe_code, reason = "copies to and from memory that other processes share")]

use std::ops::Range;

use super::Shared;
use crate::call::CallSite;
use crate::chunk::chunk_range;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::peers::{Parts, Peers};

/// In front of a part in its slot: the length of the whole part in bytes.
const PART_HEAD: usize = 16;

impl Shared {
    /// Returns when every rank is here.
    pub(crate) fn barrier(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
    ) -> Result<(), CollectiveError> {
        self.meet(peers, site)?;
        self.end_call(site);
        Ok(())
    }

    /// One round of nothing.
    pub(crate) fn meet(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
    ) -> Result<(), CollectiveError> {
        self.begin(peers, site)?;
        self.publish(site, 1);
        self.await_all_staged(peers, site)?;
        self.end_round();
        Ok(())
    }

    /// Copies the root's buffer to every rank.
    pub(crate) fn broadcast<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        buffer: &mut [T],
        root: u32,
    ) -> Result<(), CollectiveError> {
        self.copy_from(peers, site, bytemuck::cast_slice_mut(buffer), root as usize)?;
        self.end_call(site);
        Ok(())
    }

    /// The same as a part of a call.
    pub(crate) fn copy_from(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        bytes: &mut [u8],
        root: usize,
    ) -> Result<(), CollectiveError> {
        let window = self.segment.window();
        let rounds = bytes.len().div_ceil(window).max(1);
        for round in 0..rounds {
            let from = round * window;
            let to = (from + window).min(bytes.len());
            self.begin(peers, site)?;
            if self.rank == root {
                self.stage(0, &bytes[from..to]);
            }
            self.publish(site, rounds as u64);
            if self.rank != root {
                self.await_staged(peers, site, root)?;
                self.read(root, 0, &mut bytes[from..to]);
                peers.meter.count(to - from);
            }
            self.end_round();
        }
        Ok(())
    }

    /// Every rank's chunk of `output` to all.
    pub(crate) fn all_gather<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let (len, ranks) = (output.len(), self.ranks as u32);
        let chunks: Vec<_> = (0..ranks).map(|rank| chunk_range(len, ranks, rank)).collect();
        self.spread(peers, site, output, &chunks)?;
        self.end_call(site);
        Ok(())
    }

    /// A part of a call: of a buffer in which each rank has one range, all ranges to all.
    pub(crate) fn spread<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        output: &mut [T],
        ranges: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        let piece = self.segment.window() / size_of::<T>();
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let rounds = longest.div_ceil(piece).max(1);
        let part = |rank: usize, round: usize| {
            let chunk = &ranges[rank];
            let from = (chunk.start + round * piece).min(chunk.end);
            from..(from + piece).min(chunk.end)
        };
        for round in 0..rounds {
            self.begin(peers, site)?;
            self.stage(0, bytemuck::cast_slice(&output[part(self.rank, round)]));
            self.publish(site, rounds as u64);
            for rank in self.others() {
                self.await_staged(peers, site, rank)?;
                let part = bytemuck::cast_slice_mut(&mut output[part(rank, round)]);
                self.read(rank, 0, part);
                peers.meter.count(part.len());
            }
            self.end_round();
        }
        Ok(())
    }

    /// One part to and one from each rank, as far as there are any. Ranks know the lengths of their
    /// own parts only: the first round tells how many rounds the longest needs.
    pub(crate) fn exchange_parts(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        mut parts: Parts<'_>,
    ) -> Result<(), CollectiveError> {
        let own = self.rank;
        if let (Some(send), Some(receive)) = (&parts.send[own], &mut parts.receive[own]) {
            receive.copy_from_slice(send);
        }
        let slot = self.segment.window() / self.ranks / PART_HEAD * PART_HEAD;
        let piece = slot - PART_HEAD;
        let longest = self.others().filter_map(|rank| Some(parts.send[rank]?.len())).max();
        let mut rounds = longest.unwrap_or(0).div_ceil(piece).max(1) as u64;
        let part = |len: usize, round: u64| {
            let from = (round as usize).saturating_mul(piece).min(len);
            from..(from + piece).min(len)
        };
        let mut round = 0;
        while round < rounds {
            self.begin(peers, site)?;
            for rank in self.others() {
                let send = parts.send[rank].unwrap_or_default();
                self.stage(rank * slot, &(send.len() as u64).to_le_bytes());
                self.stage(rank * slot + PART_HEAD, &send[part(send.len(), round)]);
            }
            self.publish(site, rounds);
            let mut most = rounds;
            for rank in self.others() {
                most = most.max(self.await_staged(peers, site, rank)?.rounds);
                let mut head = [0; 8];
                self.read(rank, own * slot, &mut head);
                let found = u64::from_le_bytes(head);
                let receive = parts.receive[rank].as_deref_mut().unwrap_or_default();
                if found != receive.len() as u64 {
                    let (rank, address) = peers.peer(self.first + rank);
                    let expected = receive.len();
                    let message = format!(
                        "`{site}` came with a payload of {found} bytes, expected {expected}"
                    );
                    return Err(CollectiveError::Protocol { rank, address, message });
                }
                let range = part(receive.len(), round);
                peers.meter.count(range.len());
                self.read(rank, own * slot + PART_HEAD, &mut receive[range]);
            }
            rounds = most;
            round += 1;
            self.end_round();
        }
        self.end_call(site);
        Ok(())
    }

    /// Every rank's bytes on every rank, of whatever length up to a bound.
    pub(crate) fn gather_bytes(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        mine: &[u8],
        most: usize,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let piece = self.segment.window() - PART_HEAD;
        let mut all = vec![Vec::new(); self.ranks];
        all[self.rank] = mine.to_vec();
        let part = |len: usize, round: u64| {
            let from = (round as usize).saturating_mul(piece).min(len);
            from..(from + piece).min(len)
        };
        let mut rounds = mine.len().div_ceil(piece).max(1) as u64;
        let mut round = 0;
        while round < rounds {
            self.begin(peers, site)?;
            self.stage(0, &(mine.len() as u64).to_le_bytes());
            self.stage(PART_HEAD, &mine[part(mine.len(), round)]);
            self.publish(site, rounds);
            let mut longest = rounds;
            for rank in self.others() {
                longest = longest.max(self.await_staged(peers, site, rank)?.rounds);
                let mut head = [0; 8];
                self.read(rank, 0, &mut head);
                let found = usize::try_from(u64::from_le_bytes(head)).unwrap_or(usize::MAX);
                if found > most {
                    let (rank, address) = peers.peer(self.first + rank);
                    let message = format!(
                        "`{site}` came with a payload of {found} bytes, at most {most} are allowed"
                    );
                    return Err(CollectiveError::Protocol { rank, address, message });
                }
                let bytes = &mut all[rank];
                bytes.resize(found, 0);
                self.read(rank, PART_HEAD, &mut bytes[part(found, round)]);
            }
            rounds = longest;
            round += 1;
            self.end_round();
        }
        self.end_call(site);
        Ok(all)
    }

    /// Copies bytes into this rank's window of the round, between `begin` and `publish`.
    pub(super) fn stage(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.segment.window(), "a window holds what is staged");
        let window = self.segment.stage(self.rank, self.half());
        // SAFETY: inside the window (just asserted), which nobody reads: `begin` has seen that all
        // have folded the round that used this half before.
        unsafe {
            window.as_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Copies bytes that another rank staged in this round, between `await_staged` and `folded`.
    fn read(&self, rank: usize, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.segment.window(), "a window holds what is read");
        let window = self.segment.stage(rank, self.half());
        // SAFETY: inside the window (just asserted), which its owner does not write to before this
        // rank has folded the round.
        unsafe {
            window.as_ptr().add(at).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
    }
}
