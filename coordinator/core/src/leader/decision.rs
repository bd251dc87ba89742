//! What goes into a decision and what comes out of it. No behaviour: see `leader.rs`.

use std::fmt;

use api::events::{CheckpointFact, JobEvent};
use api::ids::{Generation, Name, Rank, Step};
use api::job::JobSpec;
use api::records::EndpointSpec;
use api::session::{CoordinatorMessage, WorkerHello, WorkerMessage};
use api::units::Span;

use super::reason::Reason;
use crate::transaction::{RecordKey, Transaction};

/// Milliseconds since the Unix epoch, on the leader's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    /// This much later.
    pub fn plus(self, milliseconds: u64) -> Self {
        Self(self.0.saturating_add(milliseconds))
    }

    /// Milliseconds since `earlier`; 0 when the clock went backwards.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One worker's session stream, numbered by the shell; never used twice by one leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What a leader needs to know besides the records.
#[derive(Clone, Debug)]
pub struct LeaderOptions {
    /// Time without a word from a worker after which its tasks are counted as lost.
    pub lease_ms: u64,
    /// Time a new leader waits for the workers it only knows from records.
    pub grace_ms: u64,
    /// Workers of another cluster are refused.
    pub cluster_id: String,
    /// How often a worker is asked to send something.
    pub heartbeat: Span,
}

/// Something the leader has to react to.
#[derive(Clone, Debug)]
pub enum Input {
    /// The leader looked at nothing for so long: a commit took its time, or the process stood still.
    /// What workers said meanwhile comes after this.
    WasAway {
        /// Milliseconds.
        milliseconds: u64,
    },
    /// A client wants a job to run.
    Submit {
        /// What is to run.
        spec: JobSpec,
    },
    /// A client wants a job or endpoint to end.
    Stop {
        /// `api::records::KIND_JOB` or `KIND_ENDPOINT`.
        kind: String,
        /// Which one.
        name: Name,
    },
    /// A client wants a stopped or failed job to go on.
    Resume {
        /// Which one.
        name: Name,
    },
    /// A client wants a model to be served.
    Deploy {
        /// What is to be served.
        spec: EndpointSpec,
    },
    /// A client wants the tasks of a worker to go on elsewhere, and no more to be placed on it.
    Drain {
        /// Which one.
        worker: Name,
        /// Milliseconds its tasks get; absent: the worker's own limit.
        deadline_ms: Option<u64>,
    },
    /// A client wants a drained worker to take tasks again.
    Undrain {
        /// Which one.
        worker: Name,
    },
    /// A worker opened a session; the shell has checked its token.
    WorkerHello {
        /// The new session.
        session: SessionId,
        /// Who it is and what it runs.
        hello: WorkerHello,
    },
    /// A worker said something on its session.
    WorkerMessage {
        /// Its session.
        session: SessionId,
        /// What it said.
        message: WorkerMessage,
    },
    /// A session ended.
    WorkerDetached {
        /// Which one.
        session: SessionId,
    },
    /// Answers [`Effect::Adopt`].
    Adopted {
        /// The job.
        job: Name,
        /// The generation that was looked for.
        generation: Generation,
        /// The complete manifests of that generation found in the store; none when the store could
        /// not be read.
        facts: Vec<CheckpointFact>,
    },
    /// Answers [`Effect::Diagnose`].
    Diagnosed {
        /// The job.
        job: Name,
        /// The generation that was looked at.
        generation: Generation,
        /// Who holds the others up, if anybody.
        suspect: Option<Rank>,
        /// What the flight logs say, in words.
        text: String,
    },
    /// Time went by, or a transaction was committed.
    Tick,
}

/// What is to be done about one input.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// To be committed. Its request id is empty: the shell fills in the client's, or a fresh one.
    pub transaction: Option<Transaction>,
    /// To be run in order once the transaction has been committed, or at once when there is none.
    /// When it could not be committed, they are dropped and so is the [`super::Leader`].
    pub effects: Vec<Effect>,
    /// For a client's input: the record to answer with after the commit, or why not. Workers are in
    /// no record of their own: after a drain or undrain the key only names the worker.
    pub reply: Option<Result<RecordKey, Refusal>>,
    /// Why this and nothing else; to be logged when it changes.
    pub reason: Option<Reason>,
}

/// A client's request that is not carried out. The text says what was found, what was expected and
/// what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such job, model or endpoint.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken or the state does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
}

/// Something for the shell to do outside the records.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send to a worker. `Assignment::Train` carries an empty secret: the shell puts in the one it
    /// keeps in memory for (job, generation), drawing it at first use.
    Send {
        /// The worker's session.
        session: SessionId,
        /// What to send.
        message: CoordinatorMessage,
    },
    /// End a session.
    CloseSession {
        /// Which one.
        session: SessionId,
        /// Why, for the worker's log.
        reason: String,
    },
    /// Tell whoever watches the job.
    Publish {
        /// The job.
        job: Name,
        /// What happened.
        event: JobEvent,
    },
    /// List the complete manifests this generation left in the store, and answer with
    /// [`Input::Adopted`].
    Adopt {
        /// The job.
        job: Name,
        /// The generation that ended.
        generation: Generation,
        /// Only those after this step are of interest.
        after: Option<Step>,
    },
    /// Lay the flight logs of a gang that hangs side by side, and answer with
    /// [`Input::Diagnosed`].
    Diagnose {
        /// The job.
        job: Name,
        /// The generation that hangs.
        generation: Generation,
    },
    /// List the job's checkpoints in the store and delete those that may go by
    /// [`crate::Retention`], read after the commit. May be done late, twice, or in part.
    Sweep {
        /// The job.
        job: Name,
        /// A generation of which no rank runs any more: what it broke off may go.
        ended: Option<Generation>,
    },
    /// The generation is over; its secret is of no more use.
    ForgetSecret {
        /// The job.
        job: Name,
        /// The generation that ended.
        generation: Generation,
    },
}
