//! What the rest of the coordinator holds of the raft node: propose, read, watch, stop. And what it
//! shares with the raft thread.
//!
//! Invariant: nothing here makes the raft thread wait, and no caller waits longer than it said.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use api::NodeId;
use coordinator_core::transaction::TRANSACTION_BYTES_MAX;
use coordinator_core::{Outcome, Records, Transaction};
use raft::eraftpb::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// Proposals under way at once. The leader decides one input at a time, so this is room for every
/// other kind of caller.
pub(super) const PROPOSALS_MAX: usize = 256;
/// Room for received messages, in units of [`MESSAGE_UNIT_BYTES`]: two frames of the largest size,
/// or some thousand ordinary messages.
pub(super) const MESSAGE_UNITS: u32 = 2 * 4160;
/// What a message costs at least.
pub(super) const MESSAGE_UNIT_BYTES: usize = 16 << 10;
/// The channel into the raft thread holds everything that was let in by the two bounds above, and
/// wake-ups, so sending never waits.
pub(super) const INPUTS_MAX: usize = PROPOSALS_MAX + MESSAGE_UNITS as usize + 16;

/// A stop has to wait for one durable write at most; after this the disk is hanging.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What wakes the raft thread.
pub(super) enum Input {
    /// A peer's message, checked by [`super::service`].
    Message {
        /// Of the sender's folder.
        identity: u64,
        /// raft's message.
        message: Box<Message>,
        /// Given back when the message has been handled.
        _room: OwnedSemaphorePermit,
    },
    /// A transaction to commit.
    Propose(Proposal),
    /// Look at `stopping`.
    Wake,
}

/// A transaction on its way into the log.
pub(super) struct Proposal {
    /// The encoded transaction.
    pub(super) data: Vec<u8>,
    /// Where the outcome goes; the caller may have given up.
    pub(super) reply: oneshot::Sender<Result<Outcome, ProposeError>>,
    /// Given back when the outcome is known.
    pub(super) _room: OwnedSemaphorePermit,
}

/// Why a transaction's outcome is not known, or why it has none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This node does not lead; nothing was written.
    #[error("this coordinator does not lead the raft group{}", leads(*leader))]
    NotLeader {
        /// The node that does, if known.
        leader: Option<NodeId>,
    },
    /// The outcome is unknown: retry with the same request id.
    #[error("no majority of coordinators confirmed the transaction in time; it may still commit")]
    Timeout,
    /// This node has stopped; what was under way may still commit.
    #[error("this coordinator's raft node has stopped")]
    Stopped,
    /// Nothing was written.
    #[error("the transaction has {found} bytes, expected at most {TRANSACTION_BYTES_MAX}")]
    TooLarge {
        /// Its encoded size.
        found: usize,
    },
}

fn leads(leader: Option<NodeId>) -> String {
    leader.map(|leader| format!(", {leader} does")).unwrap_or_default()
}

impl ProposeError {
    /// Whether the same request id may be proposed again, here or elsewhere.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::TooLarge { .. })
    }

    /// Whether it is certain that nothing was written.
    pub fn has_no_side_effects(&self) -> bool {
        matches!(self, Self::NotLeader { .. } | Self::TooLarge { .. })
    }
}

/// The raft group as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftStatus {
    /// This node.
    pub node: NodeId,
    /// The leader of `term`, if known.
    pub leader: Option<NodeId>,
    /// raft's term.
    pub term: u64,
    /// This node leads and has applied an entry of its own term, so its records are current.
    pub is_leader: bool,
    /// The last entry known to be on a majority's disks.
    pub commit_index: u64,
    /// The last entry that the records contain.
    pub applied_index: u64,
    /// The oldest entry still in the log; what is older is in the snapshot.
    pub first_index: u64,
}

/// Why the raft thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// [`RaftHandle::stop`].
    Requested,
    /// The node cannot go on: the process has to end with an error.
    Failed(String),
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => f.write_str("stopped on request"),
            Self::Failed(cause) => write!(f, "failed: {cause}"),
        }
    }
}

/// What the handles, the service and the raft thread share.
pub(super) struct Shared {
    /// The newest records. The thread holds the lock while it applies a batch, so readers never see
    /// half of one; it copies them only if a reader still holds the last ones.
    pub(super) records: RwLock<Arc<Records>>,
    /// See [`RaftHandle::watch_status`].
    pub(super) status: watch::Sender<RaftStatus>,
    /// See [`RaftHandle::watch_applied`].
    pub(super) applied: watch::Sender<u64>,
    /// Asks the thread to end.
    pub(super) stopping: AtomicBool,
    /// Why it did.
    pub(super) stopped: watch::Sender<Option<StopReason>>,
    /// The folder identities of peers, as stored.
    pub(super) identities: Mutex<BTreeMap<u64, u64>>,
    /// Into the raft thread.
    pub(super) inputs: SyncSender<Input>,
    /// Bounds proposals.
    pub(super) proposal_room: Arc<Semaphore>,
    /// Bounds received messages, by size.
    pub(super) message_room: Arc<Semaphore>,
}

impl Shared {
    /// Hands an input to the thread; false when it has ended. There is always room: every sender
    /// holds a permit.
    pub(super) fn send(&self, input: Input) -> bool {
        self.inputs.try_send(input).is_ok()
    }

    /// Waits for room for a message of `bytes`; `None` once the thread has ended.
    pub(super) async fn message_room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(MESSAGE_UNIT_BYTES)).unwrap_or(u32::MAX);
        let units = units.clamp(1, MESSAGE_UNITS);
        Arc::clone(&self.message_room).acquire_many_owned(units).await.ok()
    }

    /// The folder identity that this node knows a peer by.
    pub(super) fn peer_identity(&self, peer: NodeId) -> Option<u64> {
        let identities = self.identities.lock().unwrap_or_else(PoisonError::into_inner);
        identities.get(&peer.0).copied()
    }

    /// Waits until the thread has ended.
    pub(super) async fn stopped(&self) -> StopReason {
        let mut stopped = self.stopped.subscribe();
        match stopped.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(StopReason::Requested),
            // The sender is a field of self: it cannot be gone.
            Err(_) => StopReason::Requested,
        }
    }

    /// Says that the thread has ended: nobody waits for it any more.
    pub(super) fn finish(&self, reason: StopReason) {
        self.status.send_modify(|status| {
            status.is_leader = false;
            status.leader = None;
        });
        self.proposal_room.close();
        self.message_room.close();
        self.stopped.send_replace(Some(reason));
    }
}

/// A cheap-to-clone handle of a running raft node.
#[derive(Clone)]
pub struct RaftHandle {
    shared: Arc<Shared>,
}

impl RaftHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Commits a transaction; returns once it has been applied on this node.
    ///
    /// A transaction whose request id was applied before changes nothing and gives the outcome of
    /// the first time. `deadline` counts from now.
    ///
    /// # Errors
    /// See [`ProposeError`]; after `Timeout` and `Stopped` the transaction may or may not commit.
    pub async fn propose(
        &self,
        transaction: Transaction,
        deadline: Duration,
    ) -> Result<Outcome, ProposeError> {
        let data = transaction.encode();
        if data.len() > TRANSACTION_BYTES_MAX {
            return Err(ProposeError::TooLarge { found: data.len() });
        }
        let proposed = async {
            let room = Arc::clone(&self.shared.proposal_room).acquire_owned().await;
            let room = room.map_err(|_| ProposeError::Stopped)?;
            let (reply, outcome) = oneshot::channel();
            if !self.shared.send(Input::Propose(Proposal { data, reply, _room: room })) {
                return Err(ProposeError::Stopped);
            }
            outcome.await.unwrap_or(Err(ProposeError::Stopped))
        };
        tokio::time::timeout(deadline, proposed).await.unwrap_or(Err(ProposeError::Timeout))
    }

    /// The newest applied records of this node. Current only on a leader (see
    /// [`RaftStatus::is_leader`]); a follower's may be older.
    pub fn records(&self) -> Arc<Records> {
        // A poisoned lock means that applying panicked: the node has stopped, what is here is old.
        Arc::clone(&self.shared.records.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The group as this node sees it now.
    pub fn status(&self) -> RaftStatus {
        self.shared.status.borrow().clone()
    }

    /// Follows [`RaftHandle::status`]; `is_leader` turns false when the node stops.
    pub fn watch_status(&self) -> watch::Receiver<RaftStatus> {
        self.shared.status.subscribe()
    }

    /// Follows the index of the last applied entry.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.shared.applied.subscribe()
    }

    /// Waits until the node has stopped, and says why. After a failure the process has to end with
    /// an error: this coordinator takes no part any more.
    pub async fn stopped(&self) -> StopReason {
        self.shared.stopped().await
    }

    /// Stops the node and waits until its folder is free again, or for as long as a hanging disk
    /// deserves.
    pub async fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.send(Input::Wake);
        if tokio::time::timeout(STOP_TIMEOUT, self.shared.stopped()).await.is_err() {
            tracing::warn!(
                "the raft thread did not stop within {STOP_TIMEOUT:?}: is the disk hanging?"
            );
        }
    }
}

impl fmt::Debug for RaftHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RaftHandle").field("status", &self.status()).finish_non_exhaustive()
    }
}
