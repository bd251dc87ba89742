//! Reductions over shared memory: each rank folds its share of the elements, in tree order, straight
//! from the windows of the others and its own buffer.
//!
//! Small ones: everyone stages all it has and folds all of it alone; one wait. Large ones go piece by
//! piece: a rank stages the others' shares, folds its own share into its result window, and copies
//! the others' results, always one piece behind, so that it seldom waits. Private buffers only: a
//! byte is copied into a window and out of one, both of which stay in the caches.

#![allow(unsafe_code, reason = "views of memory that other processes share")]

use std::ops::Range;

use super::Shared;
use super::segment::Progress;
use crate::call::CallSite;
use crate::chunk::chunk_range;
use crate::combine::Plan;
use crate::communicator::ReduceOp;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};
use crate::peers::Peers;

/// Bytes of all partials of a rank up to which everyone folds everything.
const DIRECT_BYTES: usize = 32 << 10;
/// Pieces begin on cache lines.
const LINE: usize = 64;

/// The sums that the ranks of a host make of their partials.
#[derive(Debug)]
pub(crate) struct Sums {
    /// Partials of each rank, and the most that any has.
    counts: Vec<usize>,
    most: usize,
    /// Of each sum: which partials, counted over all ranks, and how they combine.
    plans: Vec<(Range<usize>, Plan)>,
}

impl Sums {
    /// The sums of some nodes of a tree, which the partials of all ranks tile in lane order.
    pub(crate) fn new(nodes: &[Vec<Subtree>], wanted: &[Subtree]) -> Self {
        let counts: Vec<usize> = nodes.iter().map(Vec::len).collect();
        let most = counts.iter().copied().max().unwrap_or(1).max(1);
        let (nodes, mut at) = (nodes.concat(), 0);
        let plans = wanted
            .iter()
            .map(|node| {
                let parts = nodes[at..].iter().take_while(|part| part.start < node.end()).count();
                let range = at..at + parts;
                at = range.end;
                let plan = Plan::of(*node, &nodes[range.clone()]);
                (range, plan.expect("runs of lanes in rank order tile the tree"))
            })
            .collect();
        Self { counts, most, plans }
    }
}

/// A reduction over the ranks of a host.
#[derive(Debug)]
pub(crate) struct Reducing<'a> {
    pub site: CallSite,
    pub op: ReduceOp,
    /// What an average is divided by.
    pub count: u32,
    pub sums: &'a Sums,
    /// The elements that each rank reduces; together all.
    pub shares: &'a [Range<usize>],
}

/// What a rank brings and gets. Pointers, because the caller's buffer may be both.
struct Operands<T> {
    /// Each `len` elements.
    partials: Vec<*const T>,
    len: usize,
    /// Where each sum goes: `len` elements, or this rank's share of them.
    outputs: Vec<*mut T>,
    /// Only this rank's share goes to an output, at its beginning.
    scatter: bool,
}

impl Shared {
    /// Reduces `buffer` over ranks, in place on every rank.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        let tree = LaneTree::new(self.ranks as u32);
        let output = buffer.as_mut_ptr();
        let operands = Operands {
            partials: vec![output.cast_const()],
            len: buffer.len(),
            outputs: vec![output],
            scatter: false,
        };
        self.reduce(peers, site, op, &tree, &operands)
    }

    /// Reduces `input` over ranks into this rank's chunk.
    pub(crate) fn reduce_scatter<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        op: ReduceOp,
        input: &[T],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let own = chunk_range(input.len(), self.ranks as u32, self.rank as u32);
        assert_eq!(own.len(), output.len(), "the output is this rank's chunk");
        let tree = LaneTree::new(self.ranks as u32);
        let (partials, outputs) = (vec![input.as_ptr()], vec![output.as_mut_ptr()]);
        let operands = Operands { partials, len: input.len(), outputs, scatter: true };
        self.reduce(peers, site, op, &tree, &operands)
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
        let len = output.len();
        assert!(partials.iter().all(|part| part.len() == len), "partials are as long as their sum");
        let partials = partials.iter().map(|part| part.as_ptr()).collect();
        let outputs = vec![output.as_mut_ptr()];
        let operands = Operands { partials, len, outputs, scatter: false };
        self.reduce(peers, site, ReduceOp::Sum, tree, &operands)
    }

    /// One part of a call over several hosts: this rank's share of each sum, each to an output.
    pub(crate) fn reduce_shares<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_>,
        partials: &[&[T]],
        outputs: &mut [&mut [T]],
    ) -> Result<(), CollectiveError> {
        let Reducing { sums, shares, .. } = reducing;
        let len = shares.iter().map(|share| share.end).max().unwrap_or(0);
        let own = shares[self.rank].len();
        assert!(partials.iter().all(|part| part.len() == len), "shares are of the partials");
        assert!(outputs.iter().all(|output| output.len() == own), "outputs are as long as a share");
        assert_eq!(outputs.len(), sums.plans.len(), "an output for every sum");
        let partials = partials.iter().map(|part| part.as_ptr()).collect();
        let outputs = outputs.iter_mut().map(|output| output.as_mut_ptr()).collect();
        self.run(peers, reducing, &Operands { partials, len, outputs, scatter: true })
    }

    fn reduce<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        op: ReduceOp,
        tree: &LaneTree,
        operands: &Operands<T>,
    ) -> Result<(), CollectiveError> {
        let ranks = self.ranks as u32;
        let nodes: Vec<Vec<Subtree>> =
            (0..ranks).map(|rank| tree.owned_subtrees(tree.lanes_of(rank, ranks))).collect();
        let sums = Sums::new(&nodes, &[tree.root()]);
        let shares: Vec<_> =
            (0..ranks).map(|rank| chunk_range(operands.len, ranks, rank)).collect();
        let reducing = Reducing { site, op, count: ranks, sums: &sums, shares: &shares };
        self.run(peers, &reducing, operands)?;
        self.end_call(site);
        Ok(())
    }

    fn run<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_>,
        operands: &Operands<T>,
    ) -> Result<(), CollectiveError> {
        let Sums { counts, most, .. } = reducing.sums;
        assert_eq!(counts[self.rank], operands.partials.len(), "a partial per owned subtree");
        let bytes = operands.len * size_of::<T>() * most;
        if self.ranks > 1 && bytes > DIRECT_BYTES.min(self.segment.window()) {
            self.pieces(peers, reducing, operands)
        } else {
            self.direct(peers, reducing, operands)
        }
    }

    /// Everyone stages all it has and folds what it wants; a rank alone stages nothing.
    fn direct<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_>,
        operands: &Operands<T>,
    ) -> Result<(), CollectiveError> {
        let Reducing { site, op, count, sums, shares } = *reducing;
        let len = operands.len;
        let alone = self.ranks == 1;
        self.begin(peers, site)?;
        for (index, partial) in operands.partials.iter().enumerate().filter(|_| !alone) {
            // SAFETY: `len` elements of the caller's, which nothing writes to meanwhile.
            let partial = unsafe { std::slice::from_raw_parts(*partial, len) };
            self.stage(index * len * size_of::<T>(), bytemuck::cast_slice(partial));
        }
        self.publish(site, 1);
        self.await_all_staged(peers, site)?;
        let wanted = if operands.scatter { shares[self.rank].clone() } else { 0..len };
        let half = self.half();
        let mut parts: Vec<&[T]> = Vec::with_capacity(sums.counts.iter().sum());
        for (rank, count) in sums.counts.iter().enumerate() {
            let window = self.segment.stage(rank, half).cast::<T>();
            for index in 0..*count {
                // SAFETY: the caller's partials, if this rank is alone; else inside the window of a
                // rank that has staged this round and does not write to it before all have folded.
                // Windows are aligned to pages.
                parts.push(unsafe {
                    if alone {
                        view(operands.partials[index], &wanted)
                    } else {
                        let first = window.as_ptr().cast_const().add(index * len);
                        view(first, &wanted)
                    }
                });
            }
        }
        for ((range, plan), output) in sums.plans.iter().zip(&operands.outputs) {
            // SAFETY: the caller's output of that length; no other view of it is alive, for the
            // partials are read from the windows, or are apart from it where this rank is alone:
            // groups of one rank reduce nothing here but shares.
            let output = unsafe { std::slice::from_raw_parts_mut(*output, wanted.len()) };
            plan.run(&parts[range.clone()], output, op, count);
        }
        self.end_round();
        Ok(())
    }

    /// Piece by piece; every rank folds its own share.
    fn pieces<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_>,
        operands: &Operands<T>,
    ) -> Result<(), CollectiveError> {
        let Reducing { site, op, count, sums, shares } = *reducing;
        let Sums { counts, most, plans } = sums;
        let ranks = self.ranks;
        let slots = (ranks - 1) * most;
        let piece = self.segment.window() / slots / LINE * LINE / size_of::<T>();
        if piece == 0 {
            // The same on all ranks: it follows from the call alone.
            let message = format!(
                "{ranks} ranks with {most} partials each do not fit shared memory: expected fewer \
                 lanes, or a transport of TCP"
            );
            return Err(CollectiveError::InvalidCall { call: site, message });
        }
        let part = |rank: usize, round: usize| {
            let share = &shares[rank];
            let from = (share.start + round * piece).min(share.end);
            from..(from + piece).min(share.end)
        };
        // In the window of a rank, the slots for every other rank, one per partial.
        let slot = |window_of: usize, reader: usize, index: usize| {
            ((reader - usize::from(reader > window_of)) * most + index) * piece
        };
        let longest = shares.iter().map(Range::len).max().unwrap_or(0);
        let rounds = longest.div_ceil(piece).max(1);
        let own_start = shares[self.rank].start;
        for round in 0..rounds {
            self.begin(peers, site)?;
            for reader in self.others() {
                let range = part(reader, round);
                for (index, partial) in operands.partials.iter().enumerate() {
                    // SAFETY: a range of the caller's partial; `copy_results` writes to earlier
                    // pieces only, and not during this borrow.
                    let from = unsafe { view(*partial, &range) };
                    let at = slot(self.rank, reader, index) * size_of::<T>();
                    self.stage(at, bytemuck::cast_slice(from));
                }
            }
            self.publish(site, rounds as u64);
            self.await_all_staged(peers, site)?;
            let own = part(self.rank, round);
            let half = self.half();
            let mut parts: Vec<&[T]> = Vec::with_capacity(counts.iter().sum());
            for (rank, count) in counts.iter().enumerate() {
                for index in 0..*count {
                    // SAFETY: this rank's own piece, which nothing has written yet, or the slot for
                    // this rank in a window that its owner leaves alone until this rank has folded.
                    parts.push(unsafe {
                        if rank == self.rank {
                            view(operands.partials[index], &own)
                        } else {
                            let window = self.segment.stage(rank, half).cast::<T>();
                            let at = slot(rank, self.rank, index);
                            view(window.as_ptr().cast_const(), &(at..at + own.len()))
                        }
                    });
                }
            }
            if operands.scatter {
                for ((range, plan), output) in plans.iter().zip(&operands.outputs) {
                    // SAFETY: the caller's output, apart from its input.
                    let output = unsafe {
                        let from = output.add(own.start - own_start);
                        std::slice::from_raw_parts_mut(from, own.len())
                    };
                    plan.run(&parts[range.clone()], output, op, count);
                }
                peers.meter.count(own.len() * size_of::<T>());
                self.end_round();
                continue;
            }
            let ([(_, plan)], [output]) = (plans.as_slice(), operands.outputs.as_slice()) else {
                unreachable!("a sum for all is the sum of all");
            };
            self.wait_all(peers, site, Progress::Copied, self.round.wrapping_sub(1))?;
            let window = self.segment.result(self.rank, half).cast::<T>();
            // SAFETY: this rank's own result window, which all have copied the last time it was used.
            let result = unsafe { std::slice::from_raw_parts_mut(window.as_ptr(), own.len()) };
            plan.run(&parts, result, op, count);
            drop(parts);
            peers.meter.count(size_of_val(result));
            self.folded();
            // SAFETY: this rank's piece of the output; the views of its input are gone.
            unsafe {
                output.add(own.start).copy_from_nonoverlapping(result.as_ptr(), own.len());
            }
            self.round = self.round.wrapping_add(1);
            if round > 0 {
                let range = |rank| part(rank, round - 1);
                self.copy_results(peers, site, self.round.wrapping_sub(1), *output, range)?;
            }
        }
        if let ([output], false) = (operands.outputs.as_slice(), operands.scatter) {
            let range = |rank| part(rank, rounds - 1);
            self.copy_results(peers, site, self.round, *output, range)?;
        }
        Ok(())
    }

    /// Copies the others' results of the round before `upto`.
    fn copy_results<T: Element>(
        &mut self,
        peers: &mut Peers,
        site: CallSite,
        upto: u32,
        output: *mut T,
        range: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), CollectiveError> {
        for rank in self.others() {
            self.wait(peers, site, rank, Progress::Folded, upto)?;
            let half = upto.wrapping_sub(1) as usize % 2;
            let (window, range) = (self.segment.result(rank, half).cast::<T>(), range(rank));
            // SAFETY: a result that its owner has published and does not write to before all have
            // copied it, into a piece of the caller's buffer of which no view is alive.
            unsafe {
                output.add(range.start).copy_from_nonoverlapping(window.as_ptr(), range.len());
            }
        }
        self.count(Progress::Copied, upto);
        Ok(())
    }
}

/// A range of a buffer.
///
/// # Safety
/// The range lies in the buffer, which nothing writes to while the view is used.
unsafe fn view<'a, T>(buffer: *const T, range: &Range<usize>) -> &'a [T] {
    // SAFETY: as the caller promises.
    unsafe { std::slice::from_raw_parts(buffer.add(range.start), range.len()) }
}
