//! What a raft node needs to start, and why it may refuse to.

use std::path::PathBuf;
use std::time::Duration;

use api::config::{Member, TlsSection};
use api::{NodeId, Secret};

use super::folder::FolderError;

/// Fewer entries than this between snapshots would spend more on snapshots than on entries.
const SNAPSHOT_ENTRIES_MIN: u64 = 2;
/// An election timeout of fewer ticks than this would fire on one lost heartbeat.
const ELECTION_TICKS_MIN: usize = 2;
/// Longer than any sane configuration; keeps tick arithmetic far from overflow.
const ELECTION_TICKS_MAX: u128 = 1 << 20;

/// How one coordinator takes part in the raft group.
#[derive(Clone, Debug)]
pub struct RaftOptions {
    /// This node; one of `members`.
    pub node: NodeId,
    /// The whole group. Its ids are fixed at the first start; addresses may change.
    pub members: Vec<Member>,
    /// Folder of the log; made when absent. Only one process may use it.
    pub dir: PathBuf,
    /// Peers of another cluster are refused.
    pub cluster_id: String,
    /// Time without a heartbeat after which a follower asks for an election; each waits one to two
    /// of these, so that two rarely ask at once.
    pub election_timeout: Duration,
    /// Interval of the leader's heartbeats, and raft's tick.
    pub heartbeat_interval: Duration,
    /// Applied entries in the log after which a snapshot replaces the older half.
    pub snapshot_entries: u64,
    /// Seed of the election timeouts: the same seed gives the same timeouts, per node and term.
    pub seed: u64,
    /// Certificates for reaching peers.
    pub tls: TlsSection,
    /// The cluster token, shown to peers and demanded from them.
    pub token: Secret,
}

/// Why a raft node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The options do not make a raft group.
    #[error("{0}")]
    Options(String),
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Peers cannot be reached with these certificates.
    #[error(transparent)]
    Connect(#[from] api::connect::ConnectError),
    /// raft refuses what is on disk.
    #[error("raft refuses the stored state: {0}")]
    Raft(#[from] raft::Error),
    /// The operating system gave no thread.
    #[error("cannot start the raft thread: {0}")]
    Thread(std::io::Error),
    /// Started outside a tokio runtime, which the transport needs.
    #[error("a raft node must be started inside a tokio runtime")]
    NoRuntime,
}

impl RaftOptions {
    /// Checks what raft-rs would otherwise assert; returns the election timeout in ticks.
    pub(super) fn validate(&self) -> Result<usize, StartError> {
        let fail = |message: String| Err(StartError::Options(message));
        let voters = self.voters();
        if voters.len() != self.members.len() || voters.first().is_none_or(|id| *id == 0) {
            return fail("coordinator.members: expected distinct ids, none of them 0".into());
        }
        if !voters.contains(&self.node.0) {
            return fail(format!("node {} is not among coordinator.members", self.node));
        }
        let (heartbeat, election) = (self.heartbeat_interval, self.election_timeout);
        let ticks = if heartbeat.is_zero() { None } else { self.election_ticks() };
        let Some(ticks) = ticks else {
            return fail(format!(
                "coordinator.election_timeout = {election:?} must be at least \
                 {ELECTION_TICKS_MIN} times coordinator.heartbeat_interval = {heartbeat:?}"
            ));
        };
        if self.snapshot_entries < SNAPSHOT_ENTRIES_MIN {
            return fail(format!(
                "coordinator.snapshot_entries = {} must be at least {SNAPSHOT_ENTRIES_MIN}",
                self.snapshot_entries
            ));
        }
        if api::connect::token_metadata(&self.token).is_none() || self.token.reveal().is_empty() {
            return fail("the cluster token is not one line of printable ASCII".into());
        }
        Ok(ticks)
    }

    /// The members' ids, sorted.
    pub(super) fn voters(&self) -> Vec<u64> {
        let mut voters: Vec<u64> = self.members.iter().map(|member| member.node.0).collect();
        voters.sort_unstable();
        voters.dedup();
        voters
    }

    /// The election timeout in heartbeats, rounded up; `None` when there are too few or too many.
    fn election_ticks(&self) -> Option<usize> {
        let heartbeat = self.heartbeat_interval.as_nanos().max(1);
        let ticks = self.election_timeout.as_nanos().div_ceil(heartbeat);
        let ticks = usize::try_from(ticks.min(ELECTION_TICKS_MAX)).ok()?;
        (ticks >= ELECTION_TICKS_MIN).then_some(ticks)
    }
}
