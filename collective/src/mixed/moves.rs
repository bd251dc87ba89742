//! Calls that move data and compute nothing, up and down the hosts.

use std::ops::Range;
use std::time::Duration;

use super::Mixed;
use crate::call::CallSite;
use crate::chunk::chunk_range;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::exchange::Exchange;
use crate::payload::{Length, Payload, Sink, Slices, Transfers};
use crate::peers::{Parts, Peers};
use crate::shared::Shared;

impl Mixed {
    /// Returns when every rank is here: those of a host, then a rank of each, then those of a host.
    pub(crate) fn barrier(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
    ) -> Result<(), CollectiveError> {
        self.shared.meet(peers, site)?;
        if self.hosts.rail() == Some(0) {
            let mut transfers = Transfers::none(peers.world);
            for rank in (0..self.rail.len()).filter(|rank| self.rail[*rank].is_some()) {
                transfers.send[rank] = Some(&[]);
                transfers.receive[rank] = Some(Sink::Exact(&mut []));
            }
            Exchange::run(peers, site, 0, &mut transfers)?;
        }
        self.shared.meet(peers, site)?;
        self.shared.end_call(site);
        Ok(())
    }

    /// Copies the root's buffer to every rank: each rank of its host sends a share to every other.
    pub(crate) fn broadcast<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        buffer: &mut [T],
        root: u32,
    ) -> Result<(), CollectiveError> {
        let here = self.hosts.here();
        let at_root = here.contains(&root);
        let shares = self.hosts.shares(buffer.len());
        if at_root {
            let root = (root - here.start) as usize;
            self.shared.copy_from(peers, site, bytemuck::cast_slice_mut(buffer), root)?;
        }
        if self.hosts.rail().is_some() {
            let share = &mut buffer[shares[self.hosts.local as usize].clone()];
            let mut transfers = Transfers::none(peers.world);
            if at_root {
                let share: &[u8] = bytemuck::cast_slice(share);
                for rank in (0..self.rail.len()).filter(|rank| self.rail[*rank].is_some()) {
                    transfers.send[rank] = Some(share);
                }
            } else if let Some(from) = self.on_rail_of(root) {
                let share = Sink::Exact(bytemuck::cast_slice_mut(share));
                transfers.receive[from] = Some(share);
            }
            Exchange::run(peers, site, 0, &mut transfers)?;
        }
        if !at_root {
            self.shared.spread(peers, site, buffer, &shares)?;
        }
        self.shared.end_call(site);
        Ok(())
    }

    /// Every rank's chunk of `output` to all.
    pub(crate) fn all_gather<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let len = output.len();
        let chunks: Vec<_> =
            self.hosts.here().map(|rank| chunk_range(len, peers.world, rank)).collect();
        self.shared.spread(peers, site, output, &chunks)?;
        let hosts = self.hosts.runs.len();
        if self.hosts.rail().is_some() {
            let mut transfers = Transfers::none(peers.world);
            let mut own: &[T] = &[];
            let mut rest = &mut *output;
            for host in 0..hosts {
                let region = self.hosts.region(host, len);
                let (region, tail) = std::mem::take(&mut rest).split_at_mut(region.len());
                rest = tail;
                let share = self.hosts.shares(region.len())[self.hosts.local as usize].clone();
                let share = &mut region[share];
                match self.rail.iter().position(|member| *member == Some(host)) {
                    Some(from) => {
                        let share = Sink::Exact(bytemuck::cast_slice_mut(share));
                        transfers.receive[from] = Some(share);
                    }
                    None => own = share,
                }
            }
            for rank in (0..self.rail.len()).filter(|rank| self.rail[*rank].is_some()) {
                transfers.send[rank] = Some(bytemuck::cast_slice(own));
            }
            Exchange::run(peers, site, 0, &mut transfers)?;
        }
        for host in (0..hosts).filter(|host| *host != self.hosts.own) {
            let region = self.hosts.region(host, len);
            let shares = self.hosts.shares(region.len());
            self.shared.spread(peers, site, &mut output[region], &shares)?;
        }
        self.shared.end_call(site);
        Ok(())
    }

    /// Every rank's bytes on every rank, over the connections: they are few. The ranks of a host
    /// meet first: a call that differs, or a message that nobody received, is found there.
    pub(crate) fn gather_bytes(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        mine: &[u8],
        most: usize,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.shared.meet(peers, site)?;
        let all = peers.gather_bytes(site, mine, most)?;
        self.shared.end_call(site);
        Ok(all)
    }

    /// One part to and one from each rank, over the connections, when the ranks of a host have met.
    pub(crate) fn exchange_parts(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        parts: Parts<'_>,
    ) -> Result<(), CollectiveError> {
        self.shared.meet(peers, site)?;
        peers.exchange_parts(site, parts)?;
        self.shared.end_call(site);
        Ok(())
    }

    /// A message to a rank.
    pub(crate) fn send(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        bytes: &[u8],
        to: u32,
    ) -> Result<(), CollectiveError> {
        if self.hosts.here().contains(&to) {
            return self.shared.send(peers, site, bytes, to);
        }
        peers.send_payload(site, &mut Sending { to: to as usize, bytes, shared: &mut self.shared })
    }

    /// A message from a rank.
    pub(crate) fn recv(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        bytes: &mut [u8],
        from: u32,
    ) -> Result<(), CollectiveError> {
        if self.hosts.here().contains(&from) {
            return self.shared.recv(peers, site, bytes, from);
        }
        peers.recv(site, bytes, from)
    }

    /// The rank of this rank's rail that is on the host of another rank.
    fn on_rail_of(&self, rank: u32) -> Option<usize> {
        let host = self.hosts.runs.iter().position(|run| run.contains(&rank))?;
        self.rail.iter().position(|member| *member == Some(host))
    }
}

/// How often a rank that is blocked in a send to another host looks into its mailboxes.
const MAILBOX_AGAIN: Duration = Duration::from_millis(1);

/// A message to a rank of another host. While it waits, the ranks of this host that send to this one
/// go on: else each might wait for the other.
struct Sending<'a> {
    to: usize,
    bytes: &'a [u8],
    shared: &'a mut Shared,
}

impl Payload for Sending<'_> {
    fn outgoing(&self, peer: usize) -> Option<usize> {
        (peer == self.to).then_some(self.bytes.len())
    }

    fn incoming(&self, _: usize) -> Option<Length> {
        None
    }

    fn ready<'b>(&'b self, _: usize, range: Range<usize>, slices: &mut Slices<'b>) {
        slices.push(&self.bytes[range]);
    }

    fn room(&mut self, _: usize, _: Range<usize>) -> &mut [u8] {
        &mut []
    }

    fn beside(&mut self, peers: &Peers) -> Result<Option<Duration>, CollectiveError> {
        self.shared.take_early(peers)?;
        Ok(Some(MAILBOX_AGAIN))
    }
}
