//! What worker and coordinator, and worker and rank, tell each other.
//!
//! A rank's standard input is one end of a socket pair: the worker writes [`RankOrder`]s to it and
//! the rank writes [`RankReport`]s back, one JSON document a line. The first order is always
//! [`RankOrder::Assignment`]; secrets reach a rank on this socket only, never in argv or the
//! environment. End of file on it means that the worker is gone: the rank leaves at once. Standard
//! output and error stay free for logs.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::config::{ServeSection, StoreSection};
use crate::data_plane::DataPlane;
use crate::events::{CheckpointFact, Evaluation, ModelFact, StepMetrics};
use crate::flight::FlightLog;
use crate::ids::{Generation, Name, NodeId, Rank, Secret, Step, TaskId};
use crate::job::JobSpec;
use crate::price::HostPrice;
use crate::stacks::{StackDump, StackFrame};
use crate::units::Span;

/// Longest line on a rank's control socket and largest session frame, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The number of a [`RankReport::Flight`] that no coordinator asked for: the rank's last words. The
/// worker keeps it in the object store.
pub const FLIGHT_LAST: u64 = 0;

/// From a worker to the leading coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum WorkerMessage {
    /// Always first: who it is, what it offers, what it still runs.
    Hello(Box<WorkerHello>),
    /// Renews the lease.
    Heartbeat,
    /// Something happened to a task.
    Task {
        /// Which one.
        task: TaskId,
        /// What happened.
        event: TaskEvent,
    },
    /// Captured output.
    Logs {
        /// Whose.
        task: TaskId,
        /// Lines in order.
        lines: Vec<LogLine>,
    },
    /// It is leaving, or is about to: nothing more is to be placed on it. Said before anything that
    /// follows from it, and again in each later session; the worker of a new incarnation has come to
    /// stay.
    Leaving {
        /// Milliseconds that are left until its host is gone, at the time of saying; absent: nobody
        /// said when.
        #[serde(default)]
        deadline_ms: Option<u64>,
        /// Why, to stand behind "`w2` is leaving: ".
        #[serde(default)]
        cause: String,
        /// What becomes of its tasks and of itself.
        #[serde(default)]
        scope: LeaveScope,
    },
    /// What it said of leaving does not hold any more. Said again in each later session.
    Staying,
    /// Answers a [`CoordinatorMessage::Check`]. Sent once and never again: a leader that does not
    /// get it asks anew.
    Checked {
        /// The order's number.
        request: u64,
        /// What failed, a text each; empty: the host is fit.
        failed: Vec<String>,
    },
    /// Answers a [`RankOrder::Flight`]. Sent once and never again: an answer that is lost is lost.
    Flight {
        /// The order's number.
        request: u64,
        /// Whose log.
        task: TaskId,
        /// The log; absent when there is none.
        log: Option<Box<FlightLog>>,
        /// Why there is none, where that is known.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        why: String,
    },
    /// Answers a [`CoordinatorMessage::Stacks`]. Sent once and never again, too.
    Stacks {
        /// The question's number.
        request: u64,
        /// Whose threads.
        task: TaskId,
        /// The dump; absent when there is none.
        dump: Option<Box<StackDump>>,
        /// Why there is none, where that is known.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        why: String,
    },
}

/// What becomes of a worker that leaves, and of its tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaveScope {
    /// Its tasks are being asked to write a checkpoint and leave, and it starts nothing more; then
    /// it ends.
    #[default]
    Ends,
    /// The same, but it stays attached and takes tasks again once it is [`WorkerMessage::Staying`].
    Drains,
    /// Its host may go before long: nothing more should be placed on it, its tasks go on.
    Avoided,
}

/// How a worker introduces itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerHello {
    /// Must equal the coordinator's cluster id.
    pub cluster_id: String,
    /// Must equal the coordinator's cluster token.
    pub token: Secret,
    /// The worker's name, unique in the cluster.
    pub name: Name,
    /// Its host's name.
    pub host: String,
    /// Ranks it may run at once.
    pub slots: u32,
    /// Its host's market and prices.
    #[serde(default)]
    pub price: HostPrice,
    /// Why its host is to be checked before it gets work: what its last check found, or that it is
    /// not done. Absent: it knows of nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy: Option<String>,
    /// Drawn anew at each start: a changed one tells that its former tasks are gone.
    pub incarnation: u64,
    /// The version of its binary.
    pub version: String,
    /// What it runs now.
    pub tasks: Vec<TaskView>,
}

/// What earlier versions meant without a word.
const fn is_so() -> bool {
    true
}

/// A task that a worker runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskView {
    /// Which one.
    pub task: TaskId,
    /// The address it last reported.
    pub address: Option<SocketAddr>,
    /// Whether it has been given its peers.
    pub has_peers: bool,
    /// The generation it was last told to be in, which address and peers are of. Absent: the one
    /// it was started in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Whether it has run as a rank, so that it holds a state to go on from.
    #[serde(default)]
    pub holds_state: bool,
    /// Whether its group is broken or paused, and it waits for the next generation.
    #[serde(default)]
    pub waits: bool,
}

impl TaskView {
    /// The generation it was last told to be in.
    pub fn generation(&self) -> Generation {
        self.generation.unwrap_or(self.task.generation)
    }
}

/// Something that happened to a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum TaskEvent {
    /// Its process runs.
    Started {
        /// Process id on the worker's host.
        pid: u32,
    },
    /// The rank or replica said something.
    Report {
        /// The generation it was in when it said it.
        generation: Generation,
        /// What it said.
        report: RankReport,
    },
    /// Its process is gone.
    Exited {
        /// How.
        cause: ExitCause,
    },
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "kebab-case")]
pub enum ExitCause {
    /// It ended by itself with code 0.
    Completed,
    /// It ended by itself with another code.
    Code {
        /// The exit code.
        code: i32,
        /// What it reported before, or its last line on standard error.
        message: String,
        /// False when trying again would end the same way (a user's mistake).
        retryable: bool,
        /// The checkpoint that it reported before that it cannot restore (see
        /// [`RankReport::Failed`]).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        damaged: Option<Step>,
    },
    /// A signal ended it.
    Signal {
        /// The signal's number.
        signal: i32,
        /// Its last line on standard error, if any.
        message: String,
    },
    /// The worker ended it because it was told to.
    Killed {
        /// Why.
        reason: String,
    },
    /// Its worker is gone.
    WorkerLost {
        /// What is known.
        reason: String,
    },
    /// The process could not be started.
    NotStarted {
        /// Why.
        reason: String,
    },
    /// It lives, but its group is broken and nobody of the group has ended.
    GroupBroken {
        /// What it said.
        message: String,
    },
}

impl ExitCause {
    /// Whether starting again can help.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::Code { retryable: false, .. })
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = |message: &str| match message {
            "" => String::new(),
            text => format!(": {text}"),
        };
        match self {
            Self::Completed => write!(f, "completed"),
            Self::Code { code, message, .. } => {
                write!(f, "exited with code {code}{}", tail(message))
            }
            Self::Signal { signal, message } => {
                let name = match signal {
                    6 => " (SIGABRT)",
                    7 => " (SIGBUS)",
                    9 => " (SIGKILL)",
                    11 => " (SIGSEGV)",
                    15 => " (SIGTERM)",
                    _ => "",
                };
                write!(f, "killed by signal {signal}{name}{}", tail(message))
            }
            Self::Killed { reason } => write!(f, "stopped by its worker: {reason}"),
            Self::WorkerLost { reason } => write!(f, "worker lost: {reason}"),
            Self::NotStarted { reason } => write!(f, "could not be started: {reason}"),
            Self::GroupBroken { message } => write!(f, "lost its group{}", tail(message)),
        }
    }
}

/// One captured line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Position within the task's output, from 0.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch, by the worker's clock.
    pub time_ms: u64,
    /// Where it came from.
    pub stream: LogStream,
    /// The line without its end; at most [`LOG_LINE_BYTES_MAX`] bytes.
    pub text: String,
}

/// Longest captured line; a longer one is cut and marked.
pub const LOG_LINE_BYTES_MAX: usize = 8 << 10;

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Not a line: lines are missing here, the text says how many and why.
    Gap,
}

/// From the leading coordinator to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum CoordinatorMessage {
    /// Answers the hello.
    Welcome {
        /// The leader.
        node: NodeId,
        /// Send something at least this often; three missed ones end the lease.
        heartbeat: Span,
    },
    /// Start a task's process.
    Start {
        /// Which one.
        task: TaskId,
        /// What it is to do.
        assignment: Box<Assignment>,
    },
    /// Pass an order to a running task.
    Deliver {
        /// Which one.
        task: TaskId,
        /// The order.
        order: RankOrder,
    },
    /// Ask every task to write a checkpoint and leave, and start nothing more, until told otherwise.
    /// A worker that drains already takes the new deadline.
    Drain {
        /// Time the tasks get before they are killed; absent: `worker.stop_timeout`.
        #[serde(default)]
        deadline: Option<Span>,
        /// Why.
        reason: String,
    },
    /// Takes a drain back. A worker that does not drain says that it stays.
    Undrain,
    /// Say what the threads of a task's process are in.
    Stacks {
        /// Comes back with the answer.
        request: u64,
        /// Which one.
        task: TaskId,
        /// Whether the answer is kept beside the flight logs: the process is to be killed.
        keep: bool,
    },
    /// Check the host, and answer with a [`WorkerMessage::Checked`].
    Check {
        /// Comes back with the answer.
        request: u64,
        /// Why.
        reason: String,
    },
    /// End a task's process group now; it answers with an exit event. Unknown tasks are ignored.
    Kill {
        /// Which one.
        task: TaskId,
        /// Why.
        reason: String,
    },
}

/// What a task is to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Assignment {
    /// Be one rank of a train gang.
    Train(TrainAssignment),
    /// Serve a model.
    Serve(ServeAssignment),
}

impl Assignment {
    /// The generation in which the task begins.
    pub fn generation(&self) -> Generation {
        match self {
            Self::Train(train) => train.generation,
            Self::Serve(serve) => serve.generation,
        }
    }

    /// Whether it begins as a warm spare.
    pub fn is_spare(&self) -> bool {
        matches!(self, Self::Train(train) if train.spare)
    }
}

impl TrainAssignment {
    /// The same process for a newer generation, before it has begun.
    pub fn joins(&mut self, regroup: &Regroup) {
        self.generation = regroup.generation;
        self.rank = regroup.rank;
        self.world_size = regroup.world_size;
        self.restore = regroup.restore.clone();
        self.secret = regroup.secret.clone();
        self.elapsed = regroup.elapsed;
        self.spare = false;
    }
}

/// One rank's part in a gang.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainAssignment {
    /// The job.
    pub spec: JobSpec,
    /// The gang's incarnation.
    pub generation: Generation,
    /// This process's rank.
    pub rank: Rank,
    /// Ranks in the gang.
    pub world_size: u32,
    /// Ranks before this one on the same worker.
    pub local_rank: u32,
    /// Ranks of the gang on the same worker.
    pub local_world_size: u32,
    /// Where to restore from; absent: begin at step 0.
    pub restore: Option<CheckpointFact>,
    /// What the ranks of this generation prove to one another.
    pub secret: Secret,
    /// Running time of earlier generations since the job was submitted or resumed, counted towards
    /// `stop.max_time`.
    pub elapsed: Span,
    /// Read data and build the model, say [`RankReport::Ready`], and wait for a
    /// [`RankOrder::Regroup`]: a warm spare is no rank yet, and `rank` and `world_size` are not its.
    #[serde(default)]
    pub spare: bool,
}

/// A running process's part in the next generation of its gang.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Regroup {
    /// The next generation.
    pub generation: Generation,
    /// Its rank in it.
    pub rank: Rank,
    /// Ranks in the gang.
    pub world_size: u32,
    /// The checkpoint to go on from where no member holds a newer state.
    pub restore: Option<CheckpointFact>,
    /// What the ranks of the next generation prove to one another.
    pub secret: Secret,
    /// As in [`TrainAssignment`].
    pub elapsed: Span,
    /// Why, for logs.
    pub reason: String,
}

/// One replica's part in an endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServeAssignment {
    /// The endpoint.
    pub endpoint: Name,
    /// The incarnation.
    pub generation: Generation,
    /// The model to serve.
    pub model: ModelFact,
    /// Where to listen; port 0: any free one.
    pub listen: SocketAddr,
}

/// From a worker to its rank or replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum RankOrder {
    /// Always first.
    Assignment {
        /// What to do.
        assignment: Box<Assignment>,
        /// How to reach the object store, with the worker's credentials.
        store: StoreSection,
        /// How to reach the other ranks.
        data: DataPlane,
        /// Settings of model servers.
        serve: ServeSection,
    },
    /// Every rank listens: form the group. Addresses in rank order.
    Peers {
        /// Of which generation; of another one they are not for this process (any more).
        generation: Generation,
        /// Where each rank listens.
        addresses: Vec<SocketAddr>,
    },
    /// The leader has recorded a checkpoint: it may be resumed from.
    Committed {
        /// Its step.
        step: Step,
    },
    /// Break the group off if it is not broken already, keep process, model and state, and be part
    /// of the gang's next generation.
    Regroup(Box<Regroup>),
    /// Finish the step, leave the group together with all other ranks, say [`RankReport::Paused`]
    /// and wait for a [`RankOrder::Regroup`].
    Pause {
        /// Why.
        reason: String,
    },
    /// Finish the current step, write a checkpoint and leave with code 0. A [`RankOrder::Regroup`]
    /// that follows takes it back.
    Stop {
        /// Why.
        reason: String,
    },
    /// A peer is gone: break off the collective now and leave.
    Abort {
        /// Why.
        reason: String,
    },
    /// Answer at once with a [`RankReport::Flight`], whatever the step loop is doing.
    Flight {
        /// Comes back with the answer.
        request: u64,
        /// Operations wanted at most, the last ones.
        entries: u32,
    },
    /// Answer at once with a [`RankReport::Stacks`], whatever the step loop is doing.
    Stacks,
}

/// One line of a rank or replica to its worker: a report and the generation it was made in, so that
/// what a process says of a former group is never taken for a word about the present one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankLine {
    /// The generation that the process was in.
    pub generation: Generation,
    /// What it says.
    pub report: RankReport,
}

/// From a rank or replica to its worker, which passes it on to the leader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum RankReport {
    /// It listens for its peers (train) or for requests (serve).
    Listening {
        /// Where.
        address: SocketAddr,
        /// Numeric fingerprint of this process; empty for replicas.
        fingerprint: String,
    },
    /// A warm spare has read its data and built its model.
    Ready {
        /// Numeric fingerprint of this process.
        fingerprint: String,
    },
    /// Its group broke, or could not be formed. It keeps its state and waits for a
    /// [`RankOrder::Regroup`].
    Broken {
        /// Steps applied to the state it holds; absent: it holds none.
        step: Option<Step>,
        /// What happened, for people.
        message: String,
        /// The peer that is to blame.
        blames: Option<Rank>,
    },
    /// It has left its group between two steps as ordered, and waits for a
    /// [`RankOrder::Regroup`].
    Paused {
        /// Steps applied.
        step: Step,
    },
    /// The group is formed and all know where the state is; the next step to compute is `step`.
    Running {
        /// Steps already applied.
        step: Step,
        /// False of a newcomer that gets the state behind that step, and says so again when it has.
        #[serde(default = "is_so")]
        holds_state: bool,
    },
    /// A step finished (rank 0 only).
    Step(StepMetrics),
    /// It begins something between two steps that may take much longer than a step (rank 0 only).
    Busy {
        /// What: validation, the last save.
        what: String,
    },
    /// A validation finished (rank 0 only).
    Evaluation(Evaluation),
    /// A checkpoint is complete in the store (rank 0 only).
    Checkpoint(CheckpointFact),
    /// The model is written (rank 0 only).
    Finished(ModelFact),
    /// It leaves before the last step; its last checkpoint was reported before.
    Stopped {
        /// Steps applied.
        step: Step,
        /// Why.
        #[serde(default)]
        why: StopCause,
    },
    /// It cannot go on; it exits with a non-zero code right after.
    Failed {
        /// What happened, for people.
        message: String,
        /// False when trying again would end the same way (a user's mistake).
        retryable: bool,
        /// The peer that is to blame, when it is not this rank's own fault.
        blames: Option<Rank>,
        /// The checkpoint that it was to restore and that is damaged, or of which something is gone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        damaged: Option<Step>,
    },
    /// What it remembers of its collective operations. It stays with the worker, which answers
    /// whoever asked or keeps it; it is no fact and goes into no record.
    Flight {
        /// The number of the [`RankOrder::Flight`], or [`FLIGHT_LAST`].
        request: u64,
        /// The log; absent when it has none yet.
        log: Option<Box<FlightLog>>,
    },
    /// What its threads are in, by their numbers. It stays with the worker, too.
    Stacks {
        /// Each thread's stack, the innermost frame first.
        threads: Vec<(u32, Vec<StackFrame>)>,
        /// What is missing, and why; empty where nothing is.
        absent: String,
    },
}

/// Why ranks left before the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopCause {
    /// One of them had a [`RankOrder::Stop`]: of a user, or of a worker that ends.
    #[default]
    Order,
    /// `stop.max_time` is used up.
    MaxTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let task = TaskId {
            workload: "a".parse().expect("a name"),
            generation: Generation(2),
            rank: Rank(1),
        };
        let cause = ExitCause::Signal { signal: 9, message: String::new() };
        assert_eq!(cause.to_string(), "killed by signal 9 (SIGKILL)");
        let message = WorkerMessage::Task { task, event: TaskEvent::Exited { cause } };
        let json = serde_json::to_string(&message).expect("serialises");
        assert_eq!(serde_json::from_str::<WorkerMessage>(&json).expect("parses"), message);
        let stopped = RankReport::Stopped { step: Step(7), why: StopCause::MaxTime };
        let json = serde_json::to_string(&stopped).expect("serialises");
        assert_eq!(json, r#"{"report":"stopped","step":7,"why":"max-time"}"#);
        let older = r#"{"report":"stopped","step":7}"#;
        let older = serde_json::from_str::<RankReport>(older).expect("parses");
        assert_eq!(older, RankReport::Stopped { step: Step(7), why: StopCause::Order });
        let older = serde_json::from_str::<WorkerMessage>(r#"{"message":"leaving"}"#);
        let (deadline_ms, cause, scope) = (None, String::new(), LeaveScope::Ends);
        assert_eq!(older.expect("parses"), WorkerMessage::Leaving { deadline_ms, cause, scope });
    }
}
