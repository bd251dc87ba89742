//! The documents that the transaction log holds: kind, id, version, immutable spec, status, reason.
//!
//! They are JSON inside the log, so that a field added later neither breaks an older reader nor is
//! lost by it; every status field therefore has a default.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::cost::Cost;
use crate::events::{CheckpointFact, ModelFact};
use crate::ids::{Generation, Name, Rank, Step, TaskId};
use crate::job::JobSpec;
use crate::price::{HostPrice, SlotRate};
use crate::session::ExitCause;

/// Kind of [`JobRecord`]s; the id is the job's name.
pub const KIND_JOB: &str = "job";
/// Kind of [`CheckpointRecord`]s; the id is `<job>/<step, 12 digits>`.
pub const KIND_CHECKPOINT: &str = "checkpoint";
/// Kind of [`ModelRecord`]s; the id is the model's name.
pub const KIND_MODEL: &str = "model";
/// Kind of [`EndpointRecord`]s; the id is the endpoint's name.
pub const KIND_ENDPOINT: &str = "endpoint";
/// Kind of [`DrainRecord`]s; the id is the worker's name.
pub const KIND_DRAIN: &str = "drain";

/// Where a workload is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for enough free slots.
    #[default]
    Queued,
    /// Placed; ranks are being started and form their group.
    Starting,
    /// Every rank runs.
    Running,
    /// Asked to stop; ranks write a checkpoint and leave.
    Stopping,
    /// Stopped by a person or a stop condition, resumable.
    Stopped,
    /// Ran to its end.
    Succeeded,
    /// Gave up; `reason` and `first_cause` say why.
    Failed,
}

impl Phase {
    /// Whether nothing more happens without a person.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Stopped | Self::Succeeded | Self::Failed)
    }

    /// Whether tasks of the current generation should exist.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Stopping)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        })
    }
}

/// Which worker runs which rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The rank (train) or replica (serve).
    pub rank: Rank,
    /// The worker that runs it.
    pub worker: Name,
    /// As what its process was started; absent: as this rank of this generation. A process that
    /// outlives a generation keeps its task, whatever rank it has in the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_as: Option<StartedAs>,
    /// Its place among the processes of this gang on its worker, which says what device it uses; it
    /// keeps it for life.
    #[serde(default)]
    pub local_rank: u32,
}

/// The generation and rank that a process was started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedAs {
    /// The generation.
    pub generation: Generation,
    /// The rank in it.
    pub rank: Rank,
}

impl Placement {
    /// The task of the process, for a gang of `generation` of `workload`.
    pub fn task(&self, workload: &Name, generation: Generation) -> TaskId {
        let StartedAs { generation, rank } =
            self.started_as.unwrap_or(StartedAs { generation, rank: self.rank });
        TaskId { workload: workload.clone(), generation, rank }
    }
}

/// The first thing that went wrong in a generation, not the victims that followed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The generation it ended.
    pub generation: Generation,
    /// The rank that failed first; absent when a worker vanished with several.
    pub rank: Option<Rank>,
    /// The worker it ran on.
    pub worker: Name,
    /// What happened.
    pub cause: ExitCause,
    /// Milliseconds since the Unix epoch, by the leader's clock.
    pub time_ms: u64,
}

/// A train workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// What was asked, immutable.
    pub spec: JobSpec,
    /// What became of it.
    pub status: JobStatus,
}

/// What became of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it is there, one sentence.
    pub reason: String,
    /// The current or last gang's incarnation; 0 before the first.
    pub generation: Generation,
    /// The current gang. While queued or after the end: the last one, until it is certain that none
    /// of its tasks is left and nothing it wrote is unrecorded.
    pub gang: Vec<Placement>,
    /// Ranks of the current gang that have ended well, while others still run.
    pub completed: Vec<Rank>,
    /// Failures since the job last made progress: a newly committed checkpoint, or steps that the
    /// survivors of a failure had gained over those of the one before.
    pub failures: u32,
    /// A person asked it to stop while its ranks were apart: they meet once more, to save what they
    /// hold.
    #[serde(default)]
    pub stop_asked: bool,
    /// Why the job fails once its ranks have met and saved what they hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fails_with: Option<String>,
    /// Generations started beyond the first.
    pub restarts: u64,
    /// How many of these went on from what the members of the former one held in memory.
    pub regroups: u64,
    /// Spares that were started beside the current generation: no two may share a name, whoever
    /// leads.
    pub spares_started: u32,
    /// Most spares that were started beside one generation: their tasks are numbered above the
    /// ranks, and so are their logs.
    pub spares_most: u32,
    /// The furthest step at which a generation began to run.
    pub furthest: Step,
    /// The last step that was reported when the record was written.
    pub reported: Step,
    /// Where its time went.
    pub goodput: Goodput,
    /// What its ranks' time cost.
    pub cost: Cost,
    /// What a slot of the workers of the current gang costs.
    pub rates: BTreeMap<Name, SlotRate>,
    /// Up to when, in milliseconds since the Unix epoch.
    pub accounted_ms: Option<u64>,
    /// What became of it, the newest moments.
    pub history: Vec<Moment>,
    /// Numeric fingerprint of the first gang; a different one may not continue a strict job.
    pub fingerprint: Option<String>,
    /// The newest committed checkpoint.
    pub checkpoint: Option<CheckpointFact>,
    /// The finished model.
    pub model: Option<ModelFact>,
    /// What failed first in the last failed generation.
    pub first_cause: Option<Failure>,
    /// Milliseconds since the Unix epoch.
    pub submitted_ms: u64,
    /// When the first gang ran.
    pub started_ms: Option<u64>,
    /// When the current gang began to run; absent while none does.
    pub running_since_ms: Option<u64>,
    /// Milliseconds that earlier gangs ran.
    pub elapsed_ms: u64,
    /// What `elapsed_ms` was when a person last resumed the job: only what came after it counts
    /// towards `stop.max_time`.
    pub elapsed_at_resume_ms: u64,
    /// What `goodput.queued_ms` was then: only what came after it counts towards `stop.max_wait`.
    pub queued_at_resume_ms: u64,
    /// When it reached a terminal phase.
    pub ended_ms: Option<u64>,
}

/// What a person asked of a worker, for as long as no leader has heard it say that it does so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrainRecord {
    /// The life of the worker that it was asked of: one that is started anew has come to stay.
    pub incarnation: u64,
    /// Its tasks are to go on elsewhere; else it is to take tasks again.
    pub drains: bool,
    /// Until when they may stay, in milliseconds since the Unix epoch; absent: the worker's own limit.
    pub until_ms: Option<u64>,
}

/// Where a job's time went, in rank-milliseconds: one rank for one millisecond. Up to the last write
/// of its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Goodput {
    /// Steps that were reported, those computed again among them.
    pub steps: u64,
    /// Steps that were computed again.
    pub steps_redone: u64,
    /// Fetching samples, forward, backward and optimiser, of steps that count.
    pub useful_ms: u64,
    /// Waiting for and exchanging with other ranks, as far as nothing was computed meanwhile.
    pub communication_ms: u64,
    /// What the step loop paid for checkpoints.
    pub checkpoint_ms: u64,
    /// From the placement of the first gang until it ran.
    pub starting_ms: u64,
    /// From the decision about a failure or a change until the next generation ran.
    pub recovery_ms: u64,
    /// Work that was thrown away: steps computed again, and the step under way when a gang broke,
    /// with the time until that was known.
    pub lost_ms: u64,
    /// Between steps: validation, agreement, the last save; and what a leader that died had not
    /// written down.
    pub other_ms: u64,
    /// Milliseconds in the queue, without ranks.
    pub queued_ms: u64,
}

impl Goodput {
    /// Rank-milliseconds in all.
    pub fn total_ms(&self) -> u64 {
        let parts = [
            self.useful_ms,
            self.communication_ms,
            self.checkpoint_ms,
            self.starting_ms,
            self.recovery_ms,
            self.lost_ms,
            self.other_ms,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// The part of all rank-time that went into steps that count, exchange among ranks included;
    /// none before there is any.
    pub fn fraction(&self) -> Option<f64> {
        let total = self.total_ms();
        let good = self.useful_ms.saturating_add(self.communication_ms);
        (total > 0).then(|| good as f64 / total as f64)
    }
}

/// A change of a job's phase or generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Milliseconds since the Unix epoch, by the leader's clock.
    pub time_ms: u64,
    /// The generation from then on.
    pub generation: Generation,
    /// The phase from then on.
    pub phase: Phase,
    /// Why.
    pub text: String,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The job it belongs to.
    pub job: Name,
    /// Where it is and what it holds.
    pub fact: CheckpointFact,
    /// When the leader recorded it.
    pub committed_ms: u64,
    /// Why it could not be restored when that was tried: the job went back to one before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

impl CheckpointRecord {
    /// The record's id.
    pub fn id(job: &Name, step: Step) -> String {
        format!("{job}/{:012}", step.0)
    }

    /// The step that an id names, if it is one.
    pub fn step_of(id: &str) -> Option<Step> {
        id.rsplit_once('/')?.1.parse().ok().map(Step)
    }
}

/// A finished model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// The model's name: that of the job that made it.
    pub name: Name,
    /// The job that made it.
    pub job: Name,
    /// Its algorithm.
    pub algorithm: String,
    /// Where it is and what it scored.
    pub fact: ModelFact,
    /// When the leader recorded it.
    pub created_ms: u64,
}

/// What to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSpec {
    /// The endpoint's name.
    pub name: Name,
    /// The registered model.
    pub model: Name,
    /// Where the replica listens on its worker's host; port 0: any free one.
    pub listen: SocketAddr,
}

/// A serve workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// What was asked, immutable.
    pub spec: EndpointSpec,
    /// What became of it.
    pub status: EndpointStatus,
}

/// What became of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it is there, one sentence.
    pub reason: String,
    /// Incarnation of the replica.
    pub generation: Generation,
    /// Where the replica runs.
    pub gang: Vec<Placement>,
    /// Failures in a row.
    pub failures: u32,
    /// Where the replica listens once it runs.
    pub address: Option<SocketAddr>,
    /// What failed first in the last failed generation.
    pub first_cause: Option<Failure>,
    /// Milliseconds since the Unix epoch.
    pub submitted_ms: u64,
}

/// Whether a worker takes tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerState {
    /// It takes tasks.
    #[default]
    Attached,
    /// Its session is down.
    Away,
    /// It ends as soon as its tasks have left.
    Leaving,
    /// Its tasks are leaving because a person drains it.
    Draining,
    /// Drained: it has no tasks and takes none until it is undrained.
    Drained,
    /// Its host may be reclaimed before long: its tasks go on, no others are placed on it.
    Avoided,
    /// Its host is suspected and being checked: its tasks go on, no others are placed on it.
    Checking,
    /// The check of its host failed; it is checked again.
    Unhealthy,
}

impl fmt::Display for WorkerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attached => "attached",
            Self::Away => "away",
            Self::Leaving => "leaving",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Avoided => "avoided",
            Self::Checking => "checking",
            Self::Unhealthy => "unhealthy",
        })
    }
}

/// A worker as the leader sees it; leases are not in the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its name.
    pub name: Name,
    /// Its host's name.
    pub host: String,
    /// Ranks it may run at once.
    pub slots: u32,
    /// Slots that tasks occupy.
    pub used: u32,
    /// Whether its session is up.
    pub attached: bool,
    /// Whether it takes tasks, and what keeps it from it.
    #[serde(default)]
    pub state: WorkerState,
    /// Why it is leaving, draining, avoided, checked or unhealthy; else empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Milliseconds until its lease runs out.
    pub lease_ms: u64,
    /// Its host's market and prices.
    #[serde(default)]
    pub price: HostPrice,
    /// The tasks on it.
    pub tasks: Vec<String>,
    /// Free labels for people and tools.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}
