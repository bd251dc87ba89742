//! Data parallelism in lanes: which microbatches a rank computes, and how their sums become one.
//!
//! Microbatches are grouped into L fixed lanes. Within a lane they are added one after another;
//! over lanes the sum is one fixed binary tree. A rank owns a contiguous run of whole lanes, or none,
//! so the bits do not depend on how many ranks there are.

use std::ops::Range;

use api::Rank;
use api::job::Batch;
use collective::{
    Buffer, BufferMut, CollectiveError, Communicator, LaneElement, LaneFold, LaneTree, Partial,
};

/// The lanes of a job and this rank's share of them.
#[derive(Debug)]
pub struct Lanes {
    tree: LaneTree,
    own: Range<u32>,
    microbatches_per_lane: u32,
    microbatch_size: u32,
}

impl Lanes {
    /// This rank's share, where all ranks but those of `idle` have one.
    pub fn new(batch: &Batch, rank: u32, world_size: u32, idle: &[Rank]) -> Self {
        let tree = LaneTree::new(batch.lanes.get()).without(idle.iter().copied());
        let own = tree.lanes_of(rank, world_size);
        Self {
            tree,
            own,
            microbatches_per_lane: batch.microbatches_per_lane(),
            microbatch_size: batch.microbatch_size(),
        }
    }

    /// The fixed tree over all lanes.
    pub fn tree(&self) -> &LaneTree {
        &self.tree
    }

    /// The lanes this rank owns.
    pub fn own(&self) -> Range<u32> {
        self.own.clone()
    }

    /// The microbatches of a lane, numbered over the whole step.
    pub fn microbatches(&self, lane: u32) -> Range<u64> {
        let per_lane = u64::from(self.microbatches_per_lane);
        u64::from(lane) * per_lane..(u64::from(lane) + 1) * per_lane
    }

    /// The samples of a microbatch: (offset from the step's first sample, count).
    pub fn samples(&self, microbatch: u64) -> (u64, u64) {
        let size = u64::from(self.microbatch_size);
        (microbatch * size, size)
    }

    /// `total` items dealt to lanes in contiguous runs: the items of one lane.
    pub fn deal(&self, lane: u32, lanes: u32, total: u64) -> Range<u64> {
        let edge = |l: u32| u64::from(l) * total / u64::from(lanes);
        edge(lane)..edge(lane + 1)
    }

    /// Sums what the ranks folded, in tree order; every rank gets the result.
    pub fn reduce<T: LaneElement>(
        &self,
        communicator: &mut dyn Communicator,
        fold: &mut LaneFold<T>,
        output: &mut [T],
    ) -> Result<(), CollectiveError>
    where
        for<'a> &'a [T]: Into<Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        let parts = fold.finish();
        let partials: Vec<Partial<'_>> = parts
            .iter()
            .map(|(subtree, data)| Partial { subtree: *subtree, data: data.as_slice().into() })
            .collect();
        communicator.reduce_lanes(&self.tree, &partials, output.into())?;
        drop(partials);
        for (_, buffer) in parts {
            fold.recycle(buffer);
        }
        Ok(())
    }

    /// A fold over this job's tree.
    pub fn fold<T: LaneElement>(&self) -> LaneFold<T> {
        LaneFold::new(self.tree.clone())
    }
}
