//! The contract of a process group.
//!
//! Blocking calls, made in the same order on every rank by one thread each. What differs between
//! ranks, dies or is aborted is an error; after an error of a call the group is finished and every
//! later call returns that error again: a new group (a new generation) replaces it.

use std::time::Duration;

use api::{Generation, Name, Rank, Secret};

use crate::abort::AbortHandle;
use crate::buffer::{Buffer, BufferMut};
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};

/// How values of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReduceOp {
    /// The sum, in the fixed tree order; integers wrap.
    Sum = 1,
    /// The largest; NaN if any is NaN.
    Max = 2,
    /// The smallest; NaN if any is NaN.
    Min = 3,
    /// The sum divided by the world size; floats only.
    Avg = 4,
}

/// What a rank must know to join a group.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// The job.
    pub job: Name,
    /// Which of the job's groups: `world`, `data`, `pipeline` …
    pub group: String,
    /// The gang's incarnation; a peer of another one is refused.
    pub generation: Generation,
    /// This process.
    pub rank: Rank,
    /// Number of processes.
    pub world_size: u32,
    /// Known to the ranks of this generation only; proves to each that the other belongs here.
    pub secret: Secret,
    /// How long to wait until every peer is there.
    pub connect_timeout: Duration,
}

/// The sum of one maximal subtree of lanes that a rank owns.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// Which lanes.
    pub subtree: Subtree,
    /// Their sum, as long as the result.
    pub data: Buffer<'a>,
}

/// A process group.
pub trait Communicator: Send {
    /// This process.
    fn rank(&self) -> Rank;

    /// Number of processes.
    fn world_size(&self) -> u32;

    /// The gang's incarnation.
    fn generation(&self) -> Generation;

    /// Reduces `buffer` over all ranks, in place; the result has the same bits on every rank.
    ///
    /// # Errors
    /// See [`CollectiveError`]; this holds for every method below.
    fn all_reduce(&mut self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CollectiveError>;

    /// Reduces `input` over all ranks; each gets its own chunk of the result.
    ///
    /// `output` is as long as [`crate::chunk_range`] of `input`'s length says for this rank.
    fn reduce_scatter(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CollectiveError>;

    /// Puts every rank's chunk into `output`, on every rank.
    ///
    /// `input` is as long as [`crate::chunk_range`] of `output`'s length says for this rank.
    fn all_gather(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
    ) -> Result<(), CollectiveError>;

    /// Copies `root`'s buffer to every rank.
    fn broadcast(&mut self, buffer: BufferMut<'_>, root: Rank) -> Result<(), CollectiveError>;

    /// Sends to one rank, which must call [`Communicator::recv`] with the same type and length.
    ///
    /// Returns when the buffer may be reused, which can be before the peer has it. Two ranks may
    /// send to each other at the same time.
    fn send(&mut self, buffer: Buffer<'_>, to: Rank) -> Result<(), CollectiveError>;

    /// Receives what `from` sends to this rank.
    fn recv(&mut self, buffer: BufferMut<'_>, from: Rank) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Gathers small control data of different lengths: every rank gets all, in rank order.
    ///
    /// At most 4 MiB per rank, and 256 MiB divided by the world size.
    fn gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Sums over all lanes in the order of `tree`; the result is on every rank and has the same
    /// bits for every number of ranks from 1 to the number of lanes.
    ///
    /// `partials` are this rank's [`LaneTree::owned_subtrees`] of its [`LaneTree::lanes_of`], in
    /// lane order, each as long as `output`. A rank sends one chunk per partial to each owner of a
    /// chunk (at most 2·log2 of the lanes), then its own summed chunk to all.
    fn reduce_lanes(
        &mut self,
        tree: &LaneTree,
        partials: &[Partial<'_>],
        output: BufferMut<'_>,
    ) -> Result<(), CollectiveError>;

    /// Breaks off whatever blocks, from any thread.
    fn abort_handle(&self) -> AbortHandle;
}
