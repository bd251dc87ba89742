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

/// A reduction under way.
struct Reducing<'a, T> {
    site: CallSite,
    op: ReduceOp,
    plan: Plan,
    /// Partials of each rank, and the most that any has.
    counts: Vec<usize>,
    most: usize,
    operands: &'a Operands<T>,
}

/// What a rank brings and gets. Pointers, because the caller's buffer may be both.
struct Operands<T> {
    /// Each `len` elements.
    partials: Vec<*const T>,
    len: usize,
    /// `len` elements, or a share of them.
    output: *mut T,
    /// Only this rank's share goes to `output`, at its beginning.
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
            output,
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
        let (partials, output) = (vec![input.as_ptr()], output.as_mut_ptr());
        let operands = Operands { partials, len: input.len(), output, scatter: true };
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
        let operands = Operands { partials, len, output: output.as_mut_ptr(), scatter: false };
        self.reduce(peers, site, ReduceOp::Sum, tree, &operands)
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
        assert_eq!(nodes[self.rank].len(), operands.partials.len(), "a partial per owned subtree");
        let counts: Vec<usize> = nodes.iter().map(Vec::len).collect();
        let most = counts.iter().copied().max().unwrap_or(1).max(1);
        let plan =
            Plan::new(tree, &nodes.concat()).expect("runs of lanes in rank order tile the tree");
        let bytes = operands.len * size_of::<T>() * most;
        let reducing = Reducing { site, op, plan, counts, most, operands };
        if bytes <= DIRECT_BYTES.min(self.segment.window()) {
            self.direct(peers, &reducing)?;
        } else {
            self.pieces(peers, &reducing)?;
        }
        self.end_call(site);
        Ok(())
    }

    /// Everyone stages all it has and folds what it wants.
    fn direct<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_, T>,
    ) -> Result<(), CollectiveError> {
        let Reducing { site, op, plan, counts, most: _, operands } = reducing;
        let (site, op) = (*site, *op);
        let len = operands.len;
        self.begin(peers, site)?;
        for (index, partial) in operands.partials.iter().enumerate() {
            // SAFETY: `len` elements of the caller's, which nothing writes to meanwhile.
            let partial = unsafe { std::slice::from_raw_parts(*partial, len) };
            self.stage(index * len * size_of::<T>(), bytemuck::cast_slice(partial));
        }
        self.publish(site, 1);
        self.await_all_staged(peers, site)?;
        let wanted = match operands.scatter {
            true => chunk_range(len, self.ranks as u32, self.rank as u32),
            false => 0..len,
        };
        let half = self.half();
        let mut parts: Vec<&[T]> = Vec::with_capacity(counts.iter().sum());
        for (rank, count) in counts.iter().enumerate() {
            let window = self.segment.stage(rank, half).cast::<T>();
            for index in 0..*count {
                // SAFETY: inside the window of a rank that has staged this round and does not write
                // to it before all have folded; windows are aligned to pages.
                parts.push(unsafe {
                    let from = window.as_ptr().add(index * len + wanted.start);
                    std::slice::from_raw_parts(from, wanted.len())
                });
            }
        }
        // SAFETY: the caller's output of that length; no other view of it is alive, for the partials
        // are read from the windows.
        let output = unsafe { std::slice::from_raw_parts_mut(operands.output, wanted.len()) };
        plan.run(&parts, output, op, self.ranks as u32);
        self.end_round();
        Ok(())
    }

    /// Piece by piece; every rank folds its own share.
    fn pieces<T: Element>(
        &mut self,
        peers: &mut Peers,
        reducing: &Reducing<'_, T>,
    ) -> Result<(), CollectiveError> {
        let Reducing { site, op, plan, counts, most, operands } = reducing;
        let (site, op) = (*site, *op);
        let (len, ranks) = (operands.len, self.ranks);
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
        let share = |rank: usize| chunk_range(len, ranks as u32, rank as u32);
        let part = |rank: usize, round: usize| {
            let share = share(rank);
            let from = (share.start + round * piece).min(share.end);
            from..(from + piece).min(share.end)
        };
        // In the window of a rank, the slots for every other rank, one per partial.
        let slot = |window_of: usize, reader: usize, index: usize| {
            ((reader - usize::from(reader > window_of)) * most + index) * piece
        };
        let longest = (0..ranks).map(|rank| share(rank).len()).max().unwrap_or(0);
        let rounds = longest.div_ceil(piece).max(1);
        let own_start = share(self.rank).start;
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
                // SAFETY: the caller's output, apart from its input.
                let output = unsafe {
                    std::slice::from_raw_parts_mut(
                        operands.output.add(own.start - own_start),
                        own.len(),
                    )
                };
                plan.run(&parts, output, op, ranks as u32);
                self.end_round();
                continue;
            }
            self.wait_all(peers, site, Progress::Copied, self.round.wrapping_sub(1))?;
            let window = self.segment.result(self.rank, half).cast::<T>();
            // SAFETY: this rank's own result window, which all have copied the last time it was used.
            let result = unsafe { std::slice::from_raw_parts_mut(window.as_ptr(), own.len()) };
            plan.run(&parts, result, op, ranks as u32);
            drop(parts);
            self.folded();
            // SAFETY: this rank's piece of the output; the views of its input are gone.
            unsafe {
                operands.output.add(own.start).copy_from_nonoverlapping(result.as_ptr(), own.len());
            }
            self.round = self.round.wrapping_add(1);
            if round > 0 {
                let range = |rank| part(rank, round - 1);
                self.copy_results(peers, site, self.round.wrapping_sub(1), operands.output, range)?;
            }
        }
        if !operands.scatter {
            let range = |rank| part(rank, rounds - 1);
            self.copy_results(peers, site, self.round, operands.output, range)?;
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
