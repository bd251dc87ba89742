//! What a group is told to do, and what it answers: the messages between a handle and its owner
//! thread.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use crate::error::CollectiveError;
use crate::nccl::calls::NcclCall;
use crate::nccl::comm::Comm;
use crate::nccl::memory::{DeviceBuffer, PinnedMemory};
use crate::nccl::stream::Compute;

/// One thing to enqueue on the group's stream.
#[derive(Debug)]
pub(super) enum Step {
    /// Calls of NCCL, as one group.
    Nccl(Vec<NcclCall>),
    /// A copy on the device.
    Copy { from: DeviceBuffer, to: DeviceBuffer },
    /// A copy from the stage, from a byte on.
    ToDevice { offset: usize, to: DeviceBuffer },
    /// A copy to the stage.
    ToHost { from: DeviceBuffer, offset: usize },
    /// `into = left + right`
    Sum { into: DeviceBuffer, left: DeviceBuffer, right: DeviceBuffer },
    /// `buffer = buffer / by`
    Divide { buffer: DeviceBuffer, by: u32 },
}

impl Step {
    /// Whether it does nothing: the driver refuses some of these.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Nccl(calls) => calls.is_empty(),
            Self::Copy { from: buffer, .. }
            | Self::ToDevice { to: buffer, .. }
            | Self::ToHost { from: buffer, .. }
            | Self::Sum { into: buffer, .. }
            | Self::Divide { buffer, .. } => buffer.is_empty(),
        }
    }
}

/// Steps that run one after another and finish as one.
#[derive(Debug)]
pub(super) struct Batch {
    /// For errors.
    pub name: &'static str,
    pub steps: Vec<Step>,
    /// Host memory that the steps copy from and to; it comes back with the result.
    pub stage: Option<PinnedMemory>,
}

/// Where an answer goes; it has room for the one answer, so the owner never waits for its asker.
pub(super) type Reply<R> = SyncSender<Result<R, CollectiveError>>;

/// A request to the owner thread.
pub(super) enum Command {
    /// Enqueue; answered when it has finished on the GPU.
    Run { batch: Batch, done: Reply<Option<PinnedMemory>> },
    /// Order against compute work: before what comes, or after what was; answered when enqueued.
    Order { compute: Compute, release: bool, done: Reply<()> },
    /// Make a group of the ranks with the same color.
    Split { color: Option<u32>, key: u32, done: Reply<Option<Comm>> },
    /// Make a group without some ranks.
    Shrink { excluded: Vec<u32>, after_failure: bool, done: Reply<Option<Comm>> },
    /// Stop what runs and keep the communicator for a split or a shrink.
    Revoke { done: Reply<()> },
    /// Register memory; answered with the number of the registration.
    Register { buffer: DeviceBuffer, done: Reply<u64> },
    /// End a registration.
    Deregister { number: u64 },
    /// Leave the group.
    Close,
}

/// An operation that was begun: it finishes on its own, also when this is dropped.
#[derive(Debug)]
#[must_use = "an error of the operation is found by `wait`"]
pub struct Pending {
    done: Receiver<Result<Option<PinnedMemory>, CollectiveError>>,
    group: String,
}

impl Pending {
    pub(super) fn new(group: &str) -> (Reply<Option<PinnedMemory>>, Self) {
        let (reply, done) = sync_channel(1);
        (reply, Self { done, group: group.to_owned() })
    }

    /// Returns when it has finished on the GPU.
    ///
    /// # Errors
    /// What broke the group, within a second of an abort.
    pub fn wait(self) -> Result<(), CollectiveError> {
        self.wait_stage().map(|_| ())
    }

    pub(super) fn wait_stage(self) -> Result<Option<PinnedMemory>, CollectiveError> {
        self.done.recv().unwrap_or_else(|_| Err(owner_gone(&self.group)))
    }

    /// Its result, if it has finished or failed by then.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<(), CollectiveError>> {
        match self.done.recv_timeout(timeout) {
            Ok(result) => Some(result.map(|_| ())),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(owner_gone(&self.group))),
        }
    }

    /// Its result, if it has finished or failed.
    pub fn poll(&self) -> Option<Result<(), CollectiveError>> {
        self.poll_stage().map(|result| result.map(|_| ()))
    }

    pub(super) fn poll_stage(&self) -> Option<Result<Option<PinnedMemory>, CollectiveError>> {
        match self.done.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(owner_gone(&self.group))),
        }
    }
}

/// The owner thread ended without an answer: it panicked, or the group was left.
pub(super) fn owner_gone(group: &str) -> CollectiveError {
    CollectiveError::unavailable(format!("NCCL group `{group}`"), "its owner thread has ended")
}
