//! The contract of a process group.
//!
//! Blocking calls, made in the same order on every rank by one thread each. Messages have a place in
//! that order: a rank that comes to a collective while a peer is in, or has sent, a message that
//! stands before it has called something else. Where a call needs nothing of the ranks that differ,
//! that may pass; no program may count on it. What differs between ranks, dies or is aborted is an
//! error; after an error of a call the group is finished and every later call returns that error
//! again: a new group (a new generation) replaces it.

use std::time::Duration;

use api::{Generation, Name, Rank, Secret};

use crate::abort::AbortHandle;
use crate::axes::Group;
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

impl ReduceOp {
    /// Every reduction, in the order of their numbers on the wire.
    pub const ALL: [Self; 4] = [Self::Sum, Self::Max, Self::Min, Self::Avg];

    /// Its name, as in a call's text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
            Self::Avg => "average",
        }
    }
}

/// Whether sums keep the order of the fixed tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// The fixed tree over lanes or ranks: the same bits on every transport.
    #[default]
    Deterministic,
    /// Whatever order is fastest for the number of ranks and bytes.
    Fast,
}

/// How ranks on one host reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory where it can be had, TCP where not.
    #[default]
    Auto,
    /// Shared memory only: a group that spans hosts, or may not share memory, is refused.
    Shared,
    /// TCP only, also on one host.
    Tcp,
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
    /// Order of sums.
    pub reduction: Reduction,
    /// How ranks on one host reach each other.
    pub transport: Transport,
    /// What tells hosts apart; absent: the kernel's boot id and process namespace. Ranks that name
    /// the same host try to share memory.
    pub host: Option<String>,
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
    /// This process, in this group.
    fn rank(&self) -> Rank;

    /// Number of processes.
    fn world_size(&self) -> u32;

    /// The gang's incarnation.
    fn generation(&self) -> Generation;

    /// Which of the job's groups.
    fn name(&self) -> &str;

    /// Reduces `buffer` over all ranks, in place; the result has the same bits on every rank.
    ///
    /// # Errors
    /// See [`CollectiveError`]; this holds for every method below.
    fn all_reduce(&mut self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CollectiveError>;

    /// Reduces `input` over all ranks into `output`, which is as long.
    fn all_reduce_into(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CollectiveError>;

    /// Reduces several buffers of one type as one call: small tensors cost one latency together.
    /// Each has the same length on every rank.
    fn all_reduce_many(
        &mut self,
        buffers: &mut [BufferMut<'_>],
        op: ReduceOp,
    ) -> Result<(), CollectiveError>;

    /// Reduces `input` over all ranks; each gets its own chunk of the result.
    ///
    /// `output` is as long as [`crate::chunk_range`] of `input`'s length says for this rank.
    fn reduce_scatter(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CollectiveError>;

    /// The same in place: this rank's chunk of `buffer` becomes that chunk of the result; the rest
    /// is as before.
    fn reduce_scatter_in_place(
        &mut self,
        buffer: BufferMut<'_>,
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

    /// The same in place: this rank brings its own chunk of `buffer`.
    fn all_gather_in_place(&mut self, buffer: BufferMut<'_>) -> Result<(), CollectiveError>;

    /// Sends the p-th equal part of `input` to rank p and puts what rank p sends at the p-th part
    /// of `output`. Both are as long, and the world size divides it.
    fn all_to_all(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
    ) -> Result<(), CollectiveError>;

    /// The same with parts of given lengths in elements, one after another; what a rank sends to
    /// another must be what that one receives.
    fn all_to_all_v(
        &mut self,
        input: Buffer<'_>,
        send: &[usize],
        output: BufferMut<'_>,
        receive: &[usize],
    ) -> Result<(), CollectiveError>;

    /// Puts every rank's `input` into `output` on `root`, in rank order; equal lengths. Only the
    /// root gives an output.
    fn gather(
        &mut self,
        input: Buffer<'_>,
        output: Option<BufferMut<'_>>,
        root: Rank,
    ) -> Result<(), CollectiveError>;

    /// Gives every rank its equal part of the root's `input`. Only the root gives an input.
    fn scatter(
        &mut self,
        input: Option<Buffer<'_>>,
        output: BufferMut<'_>,
        root: Rank,
    ) -> Result<(), CollectiveError>;

    /// Copies `root`'s buffer to every rank.
    fn broadcast(&mut self, buffer: BufferMut<'_>, root: Rank) -> Result<(), CollectiveError>;

    /// Sends to one rank, which must call [`Communicator::recv`] with the same type and length.
    ///
    /// Returns when the buffer may be reused, which can be before the peer has it. Two ranks may
    /// send to each other at the same time, up to 256 MiB: a rank that is blocked in a send keeps
    /// what comes in its memory.
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
    /// bits for every number of ranks from 1 to the number of lanes, and whichever of more ranks
    /// the tree leaves without lanes ([`LaneTree::without`]; those bring no partials).
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

    /// Forms the groups of a split with connections of their own; called by all ranks, each with
    /// the group that it belongs to (ranks of this group, in order). A group's failure does not
    /// fail this one. Aborting this group does not abort it: keep its handle too.
    fn subgroup(&mut self, group: &Group) -> Result<Box<dyn Communicator>, CollectiveError>;

    /// Breaks off whatever blocks, from any thread.
    fn abort_handle(&self) -> AbortHandle;
}
