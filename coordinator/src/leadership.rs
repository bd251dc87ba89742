//! What the services see of the leader: the door to its queue, open while this coordinator leads.
//!
//! The queue belongs to one term of office. When the term ends the queue closes, and whoever still
//! waits for an answer learns that leadership was lost; nothing carries over to the next term.

use std::sync::Arc;
use std::time::Duration;

use api::events::CheckpointFact;
use api::records::WorkerView;
use api::session::{WorkerHello, WorkerMessage};
use api::{Generation, Name, Rank, pb};
use coordinator_core::{Input, SessionId, TaskPlace};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::session::SessionHandle;
use crate::status::leadership_lost;
use crate::watch::Feeds;

/// Inputs that may wait for the leader. Each session and client has at most one on its way at a
/// time beyond it, so a full queue slows the callers down and loses nothing.
pub(crate) const INPUTS_MAX: usize = 1024;
/// A client waits this long for its request to be decided and committed.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// One thing for the leader to act on.
pub(crate) enum LeaderInput {
    /// A client's request.
    Client(Box<ClientRequest>),
    /// A worker introduced itself; its token and cluster id are checked.
    Attach { session: SessionId, hello: Box<WorkerHello>, sequence: u64, handle: SessionHandle },
    /// A worker said something.
    Message { session: SessionId, sequence: u64, message: Box<WorkerMessage> },
    /// A session is gone.
    Detached { session: SessionId },
    /// What an adoption found.
    Adopted { job: Name, generation: Generation, facts: Vec<CheckpointFact> },
    /// What the flight logs of a gang that hangs say.
    Diagnosed { job: Name, generation: Generation, suspect: Option<Rank>, text: String },
    /// The workers that the leader holds leases for.
    Workers { reply: oneshot::Sender<Vec<WorkerView>> },
    /// A person drains a worker or takes that back; tells how the worker stands then.
    Drain { input: Input, worker: Name, reply: oneshot::Sender<Result<WorkerView, Status>> },
    /// Ask ranks of a job; tells where those run that are asked.
    Ranks {
        job: Name,
        generation: Generation,
        /// The question's number.
        request: u64,
        question: LeaderQuestion,
        reply: oneshot::Sender<Vec<TaskPlace>>,
    },
}

/// What the ranks of a job are asked. It is no fact: the answers come past the log.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LeaderQuestion {
    /// Their flight logs, with so many operations at most.
    Flight { entries: u32 },
    /// What their threads are in, or those of one rank only; whether their workers keep it.
    Stacks { only: Option<Rank>, keep: bool },
}

/// A client's request and where its answer goes.
pub(crate) struct ClientRequest {
    /// What is asked.
    pub(crate) input: Input,
    /// Kind and id of the record it is about: the answer to a repeated request.
    pub(crate) about: (&'static str, String),
    /// Makes a retry harmless.
    pub(crate) request_id: String,
    /// Receives the record after the commit.
    pub(crate) reply: oneshot::Sender<Result<pb::Record, Status>>,
}

/// One term of office of this coordinator.
#[derive(Clone)]
pub(crate) struct Leadership {
    pub(crate) inputs: mpsc::Sender<LeaderInput>,
    pub(crate) feeds: Arc<Feeds>,
    /// Cancelled when the term ends.
    pub(crate) over: CancellationToken,
}

/// The current term of office, if this coordinator leads.
pub(crate) type Leaderships = watch::Receiver<Option<Leadership>>;

impl Leadership {
    /// Has the leader decide on a request and returns the record after the commit.
    pub(crate) async fn request(
        &self,
        input: Input,
        about: (&'static str, String),
        request_id: String,
    ) -> Result<pb::Record, Status> {
        let (reply, answer) = oneshot::channel();
        let request = Box::new(ClientRequest { input, about, request_id, reply });
        self.ask(LeaderInput::Client(request), answer).await?
    }

    /// The workers that the leader holds leases for.
    pub(crate) async fn workers(&self) -> Result<Vec<WorkerView>, Status> {
        let (reply, answer) = oneshot::channel();
        self.ask(LeaderInput::Workers { reply }, answer).await
    }

    /// Has a worker drained or undrained.
    pub(crate) async fn drain(&self, input: Input, worker: Name) -> Result<WorkerView, Status> {
        let (reply, answer) = oneshot::channel();
        self.ask(LeaderInput::Drain { input, worker, reply }, answer).await?
    }

    /// Has ranks of a job asked; tells where those run that are.
    pub(crate) async fn ask_ranks(
        &self,
        job: Name,
        generation: Generation,
        request: u64,
        question: LeaderQuestion,
    ) -> Result<Vec<TaskPlace>, Status> {
        let (reply, answer) = oneshot::channel();
        self.ask(LeaderInput::Ranks { job, generation, request, question, reply }, answer).await
    }

    async fn ask<T>(&self, input: LeaderInput, answer: oneshot::Receiver<T>) -> Result<T, Status> {
        let asked = async {
            self.inputs.send(input).await.map_err(|_| leadership_lost())?;
            answer.await.map_err(|_| leadership_lost())
        };
        tokio::time::timeout(ANSWER_WAIT, asked).await.unwrap_or_else(|_| {
            let wait = ANSWER_WAIT.as_secs();
            Err(Status::unavailable(format!(
                "the leader could not commit within {wait} s: ask again with the same request id"
            )))
        })
    }
}
