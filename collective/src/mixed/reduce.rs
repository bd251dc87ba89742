//! Reductions up and down the hosts.

use std::ops::Range;

use api::Rank;

use super::Mixed;
use super::rail::Rail;
use crate::call::{CallSite, Operation};
use crate::chunk::chunk_range;
use crate::combination::Combination;
use crate::communicator::{ReduceOp, Reduction};
use crate::direct::Direct;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::exchange::Exchange;
use crate::lane_tree::{LaneTree, Subtree};
use crate::peers::Peers;
use crate::pipeline::{Input, Pipeline, scratch_elements};
use crate::schedule::Schedule;
use crate::selection::{Algorithm, Question, Selectable};
use crate::shared::{Reducing, Sums};

/// A reduction, as all its parts need it.
struct Call {
    site: CallSite,
    op: ReduceOp,
    /// Sums of this host's partials.
    sums: Sums,
    /// How many.
    own: usize,
    /// How those of all hosts combine.
    hosts: Combination,
}

impl Mixed {
    /// Reduces `buffer` over ranks, in place on every rank.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        let call = self.call(peers, site, op, &LaneTree::new(peers.world));
        let shares = self.hosts.shares(buffer.len());
        self.up(peers, &call, &[&*buffer], &shares)?;
        self.across(peers, &call, &mut buffer[shares[self.hosts.local as usize].clone()])?;
        self.shared.spread(peers, site, buffer, &shares)?;
        self.shared.end_call(site);
        Ok(())
    }

    /// Sums the partials of all ranks into `output`, on every rank.
    pub(crate) fn reduce_lanes<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        tree: &LaneTree,
        partials: &[&[T]],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let call = self.call(peers, site, ReduceOp::Sum, tree);
        let shares = self.hosts.shares(output.len());
        self.up(peers, &call, partials, &shares)?;
        self.across(peers, &call, &mut output[shares[self.hosts.local as usize].clone()])?;
        self.shared.spread(peers, site, output, &shares)?;
        self.shared.end_call(site);
        Ok(())
    }

    /// Reduces `input` over ranks into this rank's chunk: the chunks of each host's ranks go to that
    /// host, divided among its rails, and there each to its rank.
    pub(crate) fn reduce_scatter<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        op: ReduceOp,
        input: &[T],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let call = self.call(peers, site, op, &LaneTree::new(peers.world));
        let (local, own) = (self.hosts.local as usize, self.hosts.own);
        // For every host one share after another.
        let mut chunks: Vec<Range<usize>> = Vec::new();
        for host in 0..self.hosts.runs.len() {
            let from = chunks.last().map_or(0, |chunk| chunk.end);
            let shares = self.hosts.shares(self.hosts.region(host, input.len()).len());
            chunks.push(from..from + shares[local].len());
        }
        let len = chunks.last().map_or(0, |chunk| chunk.end);
        let mut scratch = std::mem::take(&mut self.sums);
        let sums = scratch.elements::<T>(call.own * len);
        for (host, chunk) in chunks.iter().enumerate() {
            let region = self.hosts.region(host, input.len());
            let shares = self.hosts.shares(region.len());
            let mut outputs = parts(sums, len, call.own);
            outputs.iter_mut().for_each(|sum| *sum = &mut std::mem::take(sum)[chunk.clone()]);
            let reducing = self.reducing(&call, &shares);
            self.shared.reduce_shares(peers, &reducing, &[&input[region]], &mut outputs)?;
        }
        let region = self.hosts.region(own, input.len());
        let shares = self.hosts.shares(region.len());
        let mut memory = std::mem::take(&mut self.region);
        let spread = memory.elements::<T>(region.len());
        if self.hosts.rail().is_some() {
            let partials: Vec<&[T]> = (0..call.own).map(|sum| &sums[sum * len..][..len]).collect();
            let (output, base) = (&mut spread[shares[local].clone()], chunks[own].start);
            let schedule = Schedule::new(chunks, &call.hosts.counts, false, size_of::<T>());
            self.pipeline(peers, &call, schedule, &partials, (output, base))?;
        }
        self.shared.spread(peers, site, spread, &shares)?;
        let chunk = chunk_range(input.len(), peers.world, peers.rank);
        output.copy_from_slice(&spread[chunk.start - region.start..chunk.end - region.start]);
        self.shared.end_call(site);
        (self.sums, self.region) = (scratch, memory);
        Ok(())
    }

    fn call(&self, peers: &Peers, site: CallSite, op: ReduceOp, tree: &LaneTree) -> Call {
        let lanes = |rank| tree.lanes_of(rank, peers.world);
        let of_host = |run: &Range<u32>| -> Vec<Subtree> {
            tree.owned_subtrees(lanes(run.start).start..lanes(run.end - 1).end)
        };
        let own = of_host(&self.hosts.here());
        let nodes: Vec<_> =
            self.hosts.here().map(|rank| tree.owned_subtrees(lanes(rank))).collect();
        let sums = Sums::new(&nodes, &own);
        let hosts = self.hosts.runs.iter().map(of_host).collect();
        let hosts = Combination::of(tree, Rank(self.hosts.own as u32), hosts);
        Call { site, op, sums, own: own.len(), hosts }
    }

    /// An average is divided once, when all is summed.
    fn reducing<'a>(&self, call: &'a Call, shares: &'a [Range<usize>]) -> Reducing<'a> {
        let op = if call.op == ReduceOp::Avg { ReduceOp::Sum } else { call.op };
        Reducing { site: call.site, op, count: 1, sums: &call.sums, shares }
    }

    /// This host's sums of this rank's share.
    fn up<T: Element>(
        &mut self,
        peers: &mut Peers,
        call: &Call,
        partials: &[&[T]],
        shares: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        let len = shares[self.hosts.local as usize].len();
        let mut scratch = std::mem::take(&mut self.sums);
        let mut outputs = parts(scratch.elements::<T>(call.own * len), len, call.own);
        let reducing = self.reducing(call, shares);
        self.shared.reduce_shares(peers, &reducing, partials, &mut outputs)?;
        self.sums = scratch;
        Ok(())
    }

    /// The sums of all hosts of this rank's share, on every rank of its rail.
    fn across<T: Element>(
        &mut self,
        peers: &mut Peers,
        call: &Call,
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        if self.hosts.rail().is_none() {
            return Ok(());
        }
        let len = output.len();
        let mut scratch = std::mem::take(&mut self.sums);
        let sums = scratch.elements::<T>(call.own * len);
        let partials: Vec<&[T]> = (0..call.own).map(|sum| &sums[sum * len..][..len]).collect();
        let hosts = self.hosts.runs.len();
        let algorithm = peers.selection().choose(Question {
            operation: match call.site.call.operation {
                Operation::ReduceLanes => Selectable::ReduceLanes,
                _ => Selectable::AllReduce,
            },
            world: hosts as u32,
            bytes: size_of_val(output),
            // What goes by pairs of ranks and in a ring is for single buffers of single ranks.
            pairs: false,
            reduction: Reduction::Deterministic,
        });
        if algorithm == Algorithm::Direct {
            let mut received = std::mem::take(&mut peers.received);
            let others = received.elements::<T>(call.hosts.foreign * len);
            let mut payload = Direct::new(self.hosts.own, &call.hosts, &partials, (others, len));
            let mut rail = Rail { inner: &mut payload, members: &self.rail };
            Exchange::run(peers, call.site, 0, &mut rail)?;
            call.hosts.run(&partials, others, output, call.op, peers.world);
            peers.received = received;
        } else {
            let chunk = |host| chunk_range(len, hosts as u32, host as u32);
            let chunks = (0..hosts).map(chunk).collect();
            let schedule = Schedule::new(chunks, &call.hosts.counts, true, size_of::<T>());
            self.pipeline(peers, call, schedule, &partials, (output, 0))?;
        }
        self.sums = scratch;
        Ok(())
    }

    fn pipeline<T: Element>(
        &self,
        peers: &mut Peers,
        call: &Call,
        schedule: Schedule<'_>,
        partials: &[&[T]],
        output: (&mut [T], usize),
    ) -> Result<(), CollectiveError> {
        let mut received = std::mem::take(&mut peers.received);
        let scratch = received.elements(scratch_elements(&schedule, &call.hosts));
        let (own, input) = (self.hosts.own, Input::Partials(partials));
        let op = (call.op, peers.world);
        let mut payload = Pipeline::new(own, schedule, &call.hosts, op, input, output, scratch);
        let mut rail = Rail { inner: &mut payload, members: &self.rail };
        Exchange::run(peers, call.site, 0, &mut rail)?;
        peers.received = received;
        Ok(())
    }
}

/// Memory in a number of equal parts, which may be empty.
fn parts<T>(mut memory: &mut [T], len: usize, count: usize) -> Vec<&mut [T]> {
    let mut parts = Vec::with_capacity(count);
    for _ in 0..count {
        let (part, rest) = std::mem::take(&mut memory).split_at_mut(len);
        parts.push(part);
        memory = rest;
    }
    parts
}
