//! Starting a raft node: the folder, raft's configuration, the transport, the thread. What the thread
//! does is in `driver`.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, RwLock};

use api::NodeId;
use coordinator_core::Records;
use raft::RawNode;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::driver::{Driver, DriverParts};
use super::handle::{
    INPUTS_MAX, Input, MESSAGE_UNITS, PROPOSALS_MAX, RaftHandle, RaftStatus, Shared, StopReason,
};
use super::logger::logger;
use super::options::{RaftOptions, StartError};
use super::outbox::Outbox;
use super::service::RaftService;
use super::storage::LogStore;
use super::transport::Peer;

/// Largest append message that raft builds out of several entries; a larger entry goes alone.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Append messages on their way to one peer: fewer than an outbox holds.
const APPENDS_IN_FLIGHT: usize = 128;
/// Proposed bytes that a leader without a majority keeps before it drops proposals.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of entries applied in one turn of the loop, so that heartbeats go out in between.
const APPLY_BYTES_MAX: u64 = 16 << 20;

/// A member of the raft group.
#[derive(Debug)]
pub struct RaftNode;

impl RaftNode {
    /// Opens the folder and starts the raft thread and one task per peer.
    ///
    /// Blocks for as long as the disk takes to open the log. The records are those of the last
    /// snapshot at first; the entries after it are applied by the thread.
    ///
    /// # Errors
    /// When the options do not make a group, the folder is in use or was made for something else,
    /// or there is no tokio runtime.
    pub fn start(options: RaftOptions) -> Result<(RaftHandle, RaftService), StartError> {
        let election_ticks = options.validate()?;
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| StartError::NoRuntime)?;
        let (store, records) = LogStore::open(&options)?;
        let identity = store.identity();
        let (shared, inputs) = share(&options, &store, records);
        let raw = RawNode::new(&raft_config(&options, election_ticks, &store), store, &logger())?;

        let mut outboxes = BTreeMap::new();
        let mut senders = JoinSet::new();
        for member in options.members.iter().filter(|member| member.node != options.node) {
            let outbox = Arc::new(Outbox::default());
            outboxes.insert(member.node.0, Arc::clone(&outbox));
            let peer = Peer {
                from: options.node,
                to: member.node,
                endpoint: api::connect::endpoint(member.address, &options.tls)?,
                outbox,
                token: options.token.clone(),
                cluster_id: options.cluster_id.clone(),
                identity,
            };
            senders.spawn_on(peer.run(), &runtime);
        }
        let service = RaftService::new(Arc::clone(&shared), &options);
        let handle = RaftHandle::new(Arc::clone(&shared));
        let driver = Driver::new(DriverParts {
            options,
            raw,
            shared: Arc::clone(&shared),
            outboxes,
            inputs,
        });
        std::thread::Builder::new()
            .name("raft".into())
            .spawn(move || supervise(driver, &shared, senders))
            .map_err(StartError::Thread)?;
        Ok((handle, service))
    }
}

fn share(
    options: &RaftOptions,
    store: &LogStore,
    records: Records,
) -> (Arc<Shared>, Receiver<Input>) {
    let applied = store.snapshot_position();
    let status = RaftStatus {
        node: options.node,
        leader: None,
        term: 0,
        is_leader: false,
        commit_index: applied.index,
        applied_index: applied.index,
        first_index: store.first(),
    };
    let (sender, inputs) = sync_channel(INPUTS_MAX);
    let shared = Shared {
        records: RwLock::new(Arc::new(records)),
        status: watch::Sender::new(status),
        applied: watch::Sender::new(applied.index),
        stopping: AtomicBool::new(false),
        stopped: watch::Sender::new(None),
        identities: Mutex::new(store.peers().clone()),
        inputs: sender,
        proposal_room: Arc::new(Semaphore::new(PROPOSALS_MAX)),
        message_room: Arc::new(Semaphore::new(MESSAGE_UNITS as usize)),
    };
    (Arc::new(shared), inputs)
}

/// One tick is one heartbeat. `pre_vote`: a node that was cut off does not disturb the group when
/// it returns. `check_quorum`: a leader without a majority steps down.
fn raft_config(options: &RaftOptions, election_ticks: usize, store: &LogStore) -> raft::Config {
    raft::Config {
        id: options.node.0,
        election_tick: election_ticks,
        heartbeat_tick: 1,
        // The records are those of the snapshot; never the commit index, which is ahead of them.
        applied: store.snapshot_position().index,
        max_size_per_msg: APPEND_BYTES_MAX,
        max_inflight_msgs: APPENDS_IN_FLIGHT,
        check_quorum: true,
        pre_vote: true,
        max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
        max_committed_size_per_ready: APPLY_BYTES_MAX,
        ..raft::Config::default()
    }
}

/// Runs the driver to its end and says why it ended. raft-rs panics when what it is told cannot be;
/// that ends this node, not the process: the process decides, and says so.
fn supervise(driver: Driver, shared: &Shared, mut senders: JoinSet<()>) {
    let node = shared.status.borrow().node;
    // The driver is dropped inside, so the folder is free before anyone hears that we stopped.
    let ended = catch_unwind(AssertUnwindSafe(move || driver.run()));
    senders.abort_all();
    let reason = match ended {
        Ok(Ok(())) => StopReason::Requested,
        Ok(Err(fatal)) => StopReason::Failed(fatal.to_string()),
        Err(panic) => StopReason::Failed(panic_text(node, panic.as_ref())),
    };
    if let StopReason::Failed(cause) = &reason {
        tracing::error!(%node, %cause, "the raft node cannot go on");
    }
    shared.finish(reason);
}

fn panic_text(node: NodeId, panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    format!(
        "raft met a state that cannot be ({text}): if the folder of {node} was lost, replaced or \
         restored from a copy, it must not take part under its old id"
    )
}
