//! Reductions over the connections: one function per algorithm.
//!
//! Which bits come out is decided here. All but the ring fold partials in tree order, whoever adds
//! them; the ring adds in the order of ranks, which no other number of ranks repeats.

use std::ops::Range;

use api::Rank;

use crate::call::{CallSite, Operation};
use crate::chunk::chunk_range;
use crate::combination::Combination;
use crate::communicator::ReduceOp;
use crate::direct::Direct;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::exchange::Exchange;
use crate::lane_tree::LaneTree;
use crate::payload::{Sink, Transfers};
use crate::peers::Peers;
use crate::pipeline::{Input, Pipeline, scratch_elements};
use crate::schedule::Schedule;
use crate::selection::{Algorithm, Question, Selectable};

impl Peers {
    /// Reduces `buffer` over ranks, in place on every rank.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        if self.world == 1 {
            return Ok(());
        }
        let combination = self.combination(&LaneTree::new(self.world));
        match self.algorithm(site, &combination, size_of_val(buffer)) {
            Algorithm::Direct => {
                let mut reduced = std::mem::take(&mut self.reduced);
                let output = reduced.elements(buffer.len());
                self.direct(site, op, &combination, &[buffer], output)?;
                buffer.copy_from_slice(output);
                self.reduced = reduced;
            }
            Algorithm::Scatter => {
                self.pipeline(site, op, &combination, Input::InPlace, (buffer, None))?;
            }
            Algorithm::RecursiveDoubling => self.recursive_doubling(site, op, buffer)?,
            Algorithm::HalvingDoubling => self.halving_doubling(site, op, buffer)?,
            Algorithm::Ring => self.ring(site, op, buffer)?,
        }
        self.combination = Some(combination);
        Ok(())
    }

    /// Reduces `input` over ranks into this rank's chunk.
    pub(crate) fn reduce_scatter<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        input: &[T],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let combination = self.combination(&LaneTree::new(self.world));
        let output = (output, Some(input.len()));
        self.pipeline(site, op, &combination, Input::Partials(&[input]), output)?;
        self.combination = Some(combination);
        Ok(())
    }

    /// Sums the partials of all ranks into `output`, on every rank.
    pub(crate) fn reduce_lanes<T: Element>(
        &mut self,
        site: CallSite,
        tree: &LaneTree,
        partials: &[&[T]],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let op = ReduceOp::Sum;
        let combination = self.combination(tree);
        match self.algorithm(site, &combination, size_of_val(output)) {
            Algorithm::Direct => self.direct(site, op, &combination, partials, output)?,
            Algorithm::RecursiveDoubling => {
                // By pairs, every rank has one.
                output.copy_from_slice(partials[0]);
                self.recursive_doubling(site, op, output)?;
            }
            Algorithm::HalvingDoubling => {
                output.copy_from_slice(partials[0]);
                self.halving_doubling(site, op, output)?;
            }
            Algorithm::Scatter | Algorithm::Ring => {
                let input = Input::Partials(partials);
                self.pipeline(site, op, &combination, input, (output, None))?;
            }
        }
        self.combination = Some(combination);
        Ok(())
    }

    fn algorithm(&self, site: CallSite, combination: &Combination, bytes: usize) -> Algorithm {
        let operation = match site.call.operation {
            Operation::ReduceLanes => Selectable::ReduceLanes,
            _ => Selectable::AllReduce,
        };
        self.selection().choose(Question {
            operation,
            world: self.world,
            bytes,
            pairs: combination.pairs,
            reduction: self.reduction,
        })
    }

    /// How the partials of a tree combine on these ranks: that of the last call, mostly.
    fn combination(&mut self, tree: &LaneTree) -> Combination {
        match self.combination.take() {
            Some(last) if last.is_of(tree) => last,
            _ => Combination::new(tree, Rank(self.rank), self.world),
        }
    }

    /// [`Algorithm::Direct`].
    fn direct<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        combination: &Combination,
        partials: &[&[T]],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let len = output.len();
        let mut scratch = std::mem::take(&mut self.received);
        let received = scratch.elements::<T>(combination.foreign * len);
        let own = self.rank as usize;
        let mut payload = Direct::new(own, combination, partials, (received, len));
        Exchange::run(self, site, 0, &mut payload)?;
        combination.run(partials, received, output, op, self.world);
        self.received = scratch;
        Ok(())
    }

    /// [`Algorithm::Scatter`]; or its first half, into this rank's chunk of a buffer of the given
    /// length.
    fn pipeline<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        combination: &Combination,
        input: Input<'_, T>,
        (output, chunk_of): (&mut [T], Option<usize>),
    ) -> Result<(), CollectiveError> {
        let len = chunk_of.unwrap_or(output.len());
        let chunks: Vec<_> =
            (0..self.world).map(|rank| chunk_range(len, self.world, rank)).collect();
        let base = chunk_of.map_or(0, |_| chunks[self.rank as usize].start);
        let gathers = chunk_of.is_none();
        let schedule = Schedule::new(chunks, &combination.counts, gathers, size_of::<T>());
        let mut received = std::mem::take(&mut self.received);
        let scratch = received.elements(scratch_elements(&schedule, combination));
        let (own, output) = (self.rank as usize, (output, base));
        let op = (op, self.world);
        let mut payload = Pipeline::new(own, schedule, combination, op, input, output, scratch);
        Exchange::run(self, site, 0, &mut payload)?;
        self.received = received;
        Ok(())
    }

    /// [`Algorithm::RecursiveDoubling`]: after the exchange at distance d every rank has the sum of
    /// its aligned group of 2d ranks.
    fn recursive_doubling<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        for step in 0..self.world.ilog2() {
            let (partner, op) = (self.rank ^ (1 << step), self.op_at(step, op));
            let mut scratch = std::mem::take(&mut self.received);
            let received = scratch.elements::<T>(buffer.len());
            self.swap(site, step, partner, buffer, received)?;
            self.add(partner, op, received, buffer);
            self.received = scratch;
        }
        Ok(())
    }

    /// [`Algorithm::HalvingDoubling`]: the same, of a part of the buffer that halves at each step;
    /// then the parts go back the same way.
    fn halving_doubling<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        let steps = self.world.ilog2();
        let whole = 0..buffer.len();
        let mut parts = Vec::from([whole]);
        for step in 0..steps {
            let (partner, op) = (self.rank ^ (1 << step), self.op_at(step, op));
            let part = parts[step as usize].clone();
            let middle = part.start.midpoint(part.end);
            let (low, high) = (part.start..middle, middle..part.end);
            let (keep, give) = if self.rank < partner { (low, high) } else { (high, low) };
            let mut scratch = std::mem::take(&mut self.received);
            let received = scratch.elements::<T>(keep.len());
            self.swap(site, step, partner, &buffer[give], received)?;
            self.add(partner, op, received, &mut buffer[keep.clone()]);
            self.received = scratch;
            parts.push(keep);
        }
        for step in (0..steps).rev() {
            let partner = self.rank ^ (1 << step);
            let part = &mut buffer[parts[step as usize].clone()];
            let kept = parts[step as usize + 1].len();
            let (low, high) = if self.rank < partner {
                part.split_at_mut(kept)
            } else {
                part.split_at_mut(part.len() - kept)
            };
            let (mine, theirs) = if self.rank < partner { (low, high) } else { (high, low) };
            self.swap(site, 2 * steps - 1 - step, partner, mine, theirs)?;
        }
        Ok(())
    }

    /// [`Algorithm::Ring`]: each chunk goes once round and is added to on every rank, then once more
    /// to be copied.
    fn ring<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        let (world, rank, len) = (self.world, self.rank, buffer.len());
        let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
        let chunk = |back: u32| chunk_range(len, world, (rank + 2 * world - back) % world);
        for step in 0..world - 1 {
            let (send, receive) = (chunk(step), chunk(step + 1));
            let mut scratch = std::mem::take(&mut self.received);
            let received = scratch.elements::<T>(receive.len());
            self.pass(site, step, (next, &buffer[send]), (before, received))?;
            // The last to add is the one that divides.
            let op = self.op_of(step == world - 2, op);
            Combination::of_two(Rank(1)).run_in_place(received, &mut buffer[receive], op, world);
            self.received = scratch;
        }
        for step in 0..world - 1 {
            // One ahead: the chunk that was finished here goes first.
            let (send, receive) = (chunk(step + world - 1), chunk(step));
            let (send, receive) = disjoint(buffer, send, receive);
            self.pass(site, world - 1 + step, (next, send), (before, receive))?;
        }
        Ok(())
    }

    /// The reduction at a step of the doublings: an average is a sum until the last.
    fn op_at(&self, step: u32, op: ReduceOp) -> ReduceOp {
        self.op_of(step + 1 == self.world.ilog2(), op)
    }

    fn op_of(&self, last: bool, op: ReduceOp) -> ReduceOp {
        if op == ReduceOp::Avg && !last { ReduceOp::Sum } else { op }
    }

    /// Reduces `buffer` with what the partner had of it, the lower rank's on the left.
    fn add<T: Element>(&self, partner: u32, op: ReduceOp, received: &[T], buffer: &mut [T]) {
        let own = Rank(u32::from(self.rank > partner));
        Combination::of_two(own).run_in_place(received, buffer, op, self.world);
    }

    /// One frame to a partner and one back.
    fn swap<T: Element>(
        &mut self,
        site: CallSite,
        step: u32,
        partner: u32,
        mine: &[T],
        theirs: &mut [T],
    ) -> Result<(), CollectiveError> {
        self.pass(site, step, (partner, mine), (partner, theirs))
    }

    /// One frame to a rank and one from a rank.
    fn pass<T: Element>(
        &mut self,
        site: CallSite,
        step: u32,
        (to, mine): (u32, &[T]),
        (from, theirs): (u32, &mut [T]),
    ) -> Result<(), CollectiveError> {
        let mut transfers = Transfers::none(self.world);
        transfers.send[to as usize] = Some(bytemuck::cast_slice(mine));
        transfers.receive[from as usize] = Some(Sink::Exact(bytemuck::cast_slice_mut(theirs)));
        Exchange::run(self, site, step as u16, &mut transfers)
    }
}

/// Two parts of a buffer that do not overlap, the second to be written.
fn disjoint<T>(buffer: &mut [T], read: Range<usize>, write: Range<usize>) -> (&[T], &mut [T]) {
    if read.start < write.start {
        let (low, high) = buffer.split_at_mut(write.start);
        (&low[read], &mut high[..write.len()])
    } else {
        let (low, high) = buffer.split_at_mut(read.start);
        (&high[..read.len()], &mut low[write])
    }
}
