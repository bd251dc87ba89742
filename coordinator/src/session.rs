//! Worker sessions: one bidirectional stream per worker, with the leader only.
//!
//! A frame is acknowledged only after the facts it carries are committed. Neither side can fill the
//! other's memory: inbound frames wait for the leader's bounded queue, and a worker that does not
//! take its orders in time loses its session (it reconnects and says what it still runs).

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use api::Secret;
use api::pb::worker_session_server::WorkerSession;
use api::pb::{CoordinatorFrame, WorkerFrame};
use api::session::{CoordinatorMessage, WorkerHello, WorkerMessage};
use coordinator_core::SessionId;
use futures::stream::{self, Stream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use crate::flight::{Answer, Questions};
use crate::leadership::{LeaderInput, Leadership, Leaderships};
use crate::logs::LogWindow;
use crate::peers::Peers;
use crate::status::{leadership_lost, not_leading};
use crate::token::{TokenCheck, refused};

/// Orders that may wait for a slow worker: several gangs' worth.
const OUTBOX_MAX: usize = 256;
/// A worker introduces itself within this time.
const HELLO_WAIT: Duration = Duration::from_secs(10);

/// Why a session ended, told to the worker once.
#[derive(Clone)]
struct Closing {
    token: CancellationToken,
    status: Arc<OnceLock<Status>>,
}

impl Closing {
    fn new(over: &CancellationToken) -> Self {
        Self { token: over.child_token(), status: Arc::default() }
    }

    fn close(&self, status: Status) {
        // The first reason is the one that counts.
        let _ = self.status.set(status);
        self.token.cancel();
    }

    fn status(&self) -> Status {
        self.status.get().cloned().unwrap_or_else(leadership_lost)
    }
}

/// How far a session's frames have been acted on.
#[derive(Default)]
struct Progress {
    /// The last frame that went to the leader.
    forwarded: u64,
    /// The last frame whose facts are committed.
    committed: u64,
    /// The last frame of log lines, which are acted on at once.
    logged: u64,
}

/// What a session's worker may forget: every frame up to some sequence. Log lines are acted on at
/// once but acknowledged only when no fact before them still waits for its commit.
struct Acknowledgements {
    progress: Mutex<Progress>,
    acknowledged: watch::Sender<u64>,
}

impl Acknowledgements {
    fn new() -> (Arc<Self>, watch::Receiver<u64>) {
        let (acknowledged, receiver) = watch::channel(0);
        (Arc::new(Self { progress: Mutex::default(), acknowledged }), receiver)
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        // Three numbers that are whole after every statement: a panic elsewhere spoils nothing.
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut progress);
        let is_idle = progress.committed >= progress.forwarded;
        let logged = if is_idle { progress.logged } else { 0 };
        let sequence = progress.committed.max(logged);
        self.acknowledged.send_if_modified(|value| {
            let is_newer = sequence > *value;
            *value = sequence.max(*value);
            is_newer
        });
    }

    fn forwarded(&self, sequence: u64) {
        self.update(|progress| progress.forwarded = sequence);
    }

    fn committed(&self, sequence: u64) {
        self.update(|progress| progress.committed = progress.committed.max(sequence));
    }

    fn logged(&self, sequence: u64) {
        self.update(|progress| progress.logged = sequence);
    }
}

/// The leader's end of a session.
pub(crate) struct SessionHandle {
    outbox: mpsc::Sender<CoordinatorMessage>,
    acknowledgements: Arc<Acknowledgements>,
    closing: Closing,
}

impl SessionHandle {
    /// Queues an order; a worker that has too many waiting loses its session.
    pub(crate) fn send(&self, message: CoordinatorMessage) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outbox.try_send(message) {
            self.close(Status::resource_exhausted(format!(
                "the worker left {OUTBOX_MAX} orders waiting: reconnect"
            )));
        }
    }

    /// The facts of every frame up to `sequence` are committed.
    pub(crate) fn acknowledge(&self, sequence: u64) {
        self.acknowledgements.committed(sequence);
    }

    /// Ends the session and says why.
    pub(crate) fn close(&self, status: Status) {
        self.closing.close(status);
    }
}

/// The service.
pub(crate) struct SessionService {
    pub(crate) cluster_id: String,
    pub(crate) token: TokenCheck,
    pub(crate) leaderships: Leaderships,
    pub(crate) peers: Arc<Peers>,
    pub(crate) window: Arc<LogWindow>,
    pub(crate) questions: Arc<Questions>,
    pub(crate) next_session: AtomicU64,
}

type Frames = Pin<Box<dyn Stream<Item = Result<CoordinatorFrame, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerSession for SessionService {
    type AttachStream = Frames;

    async fn attach(
        &self,
        request: Request<Streaming<WorkerFrame>>,
    ) -> Result<Response<Frames>, Status> {
        let leadership = self.leaderships.borrow().clone();
        let Some(leadership) = leadership else {
            return Err(not_leading(self.peers.leader_address()));
        };
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let (acknowledgements, acknowledged) = Acknowledgements::new();
        let closing = Closing::new(&leadership.over);
        let reader = Reader {
            session: SessionId(self.next_session.fetch_add(1, Ordering::Relaxed)),
            cluster_id: self.cluster_id.clone(),
            token: self.token.clone(),
            window: Arc::clone(&self.window),
            questions: Arc::clone(&self.questions),
            leadership,
            outbox,
            acknowledgements,
            closing: closing.clone(),
        };
        tokio::spawn(reader.run(request.into_inner()));
        let writer = Writer {
            messages,
            acknowledged,
            ended: false,
            _guard: closing.token.clone().drop_guard(),
            closing,
        };
        Ok(Response::new(Box::pin(stream::unfold(writer, Writer::next))))
    }
}

/// Turns orders and acknowledgements into frames.
struct Writer {
    messages: mpsc::Receiver<CoordinatorMessage>,
    acknowledged: watch::Receiver<u64>,
    closing: Closing,
    ended: bool,
    /// The reader ends when the connection drops the response stream.
    _guard: DropGuard,
}

impl Writer {
    async fn next(mut self) -> Option<(Result<CoordinatorFrame, Status>, Self)> {
        if self.ended {
            return None;
        }
        let json = tokio::select! {
            biased;
            // Orders that were queued before the session was closed still go out.
            Some(message) = self.messages.recv() => Some(serde_json::to_vec(&message)),
            () = self.closing.token.cancelled() => None,
            Ok(()) = self.acknowledged.changed() => Some(Ok(Vec::new())),
            else => None,
        };
        let frame = match json {
            Some(Ok(json)) => {
                let acknowledged = *self.acknowledged.borrow_and_update();
                Ok(CoordinatorFrame { acknowledged, json })
            }
            Some(Err(error)) => Err(Status::internal(format!("an order is not JSON: {error}"))),
            None => Err(self.closing.status()),
        };
        self.ended = frame.is_err();
        Some((frame, self))
    }
}

/// Reads a worker's frames, in order, and hands them to the leader.
struct Reader {
    session: SessionId,
    cluster_id: String,
    token: TokenCheck,
    window: Arc<LogWindow>,
    questions: Arc<Questions>,
    leadership: Leadership,
    outbox: mpsc::Sender<CoordinatorMessage>,
    acknowledgements: Arc<Acknowledgements>,
    closing: Closing,
}

impl Reader {
    async fn run(self, mut frames: Streaming<WorkerFrame>) {
        match self.attach(&mut frames).await {
            Ok((worker, hello)) => {
                let ended = self.read(&mut frames, hello).await;
                let why = ended.as_ref().err().map_or("ended by the worker", Status::message);
                info!(session = self.session.0, %worker, why, "worker session ended");
                self.closing.close(ended.err().unwrap_or_else(|| Status::cancelled("closed")));
                let detached = LeaderInput::Detached { session: self.session };
                // An error means that the leader is gone and its sessions with it.
                let _ = self.leadership.inputs.send(detached).await;
            }
            Err(status) => {
                warn!(session = self.session.0, why = status.message(), "worker refused");
                self.closing.close(status);
            }
        }
    }

    /// The first frame: a hello with the right cluster id and token. Returns the worker's name and
    /// the frame's sequence.
    async fn attach(&self, frames: &mut Streaming<WorkerFrame>) -> Result<(String, u64), Status> {
        let first = tokio::select! {
            first = tokio::time::timeout(HELLO_WAIT, frames.message()) => first,
            () = self.closing.token.cancelled() => return Err(self.closing.status()),
        };
        let first = first.map_err(|_| {
            let wait = HELLO_WAIT.as_secs();
            Status::deadline_exceeded(format!("no hello came within {wait} s"))
        })??;
        let frame = first.ok_or_else(|| Status::invalid_argument("the session has no hello"))?;
        let (sequence, message) = self.parse(frame)?;
        let WorkerMessage::Hello(mut hello) = message else {
            return Err(Status::invalid_argument("the first message of a session must be a hello"));
        };
        self.check(&hello)?;
        // The leader's decisions never hold a secret.
        hello.token = Secret::new("");
        let (worker, tasks) = (hello.name.to_string(), hello.tasks.len());
        info!(session = self.session.0, %worker, tasks, "worker attached");
        let handle = SessionHandle {
            outbox: self.outbox.clone(),
            acknowledgements: Arc::clone(&self.acknowledgements),
            closing: self.closing.clone(),
        };
        self.acknowledgements.forwarded(sequence);
        let session = self.session;
        self.hand_over(LeaderInput::Attach { session, hello, sequence, handle }).await?;
        Ok((worker, sequence))
    }

    fn check(&self, hello: &WorkerHello) -> Result<(), Status> {
        // Revealed for the comparison only.
        if !self.token.accepts(hello.token.reveal().as_bytes()) {
            return Err(refused("the cluster token in the worker's hello is not this cluster's"));
        }
        if hello.cluster_id != self.cluster_id {
            return Err(Status::permission_denied(format!(
                "the worker belongs to cluster `{}`, expected `{}`: check `cluster.id`",
                hello.cluster_id.chars().take(80).collect::<String>(),
                self.cluster_id
            )));
        }
        Ok(())
    }

    async fn read(&self, frames: &mut Streaming<WorkerFrame>, hello: u64) -> Result<(), Status> {
        let mut last = hello;
        loop {
            let frame = tokio::select! {
                frame = frames.message() => frame?,
                () = self.closing.token.cancelled() => return Err(self.closing.status()),
            };
            let Some(frame) = frame else { return Ok(()) };
            let (sequence, message) = self.parse(frame)?;
            if sequence <= last {
                return Err(Status::invalid_argument(format!(
                    "frame {sequence} came after frame {last}: sequences must grow"
                )));
            }
            last = sequence;
            self.act(sequence, message).await?;
        }
    }

    async fn act(&self, sequence: u64, message: WorkerMessage) -> Result<(), Status> {
        match message {
            WorkerMessage::Logs { task, lines } => {
                debug!(%task, lines = lines.len(), "log lines");
                self.window.push(&task, lines);
                self.acknowledgements.logged(sequence);
                Ok(())
            }
            WorkerMessage::Flight { request, task, log, why } => {
                // No fact: nobody waits for its acknowledgement.
                self.questions.answer(request, &task, log.map(Answer::Flight).ok_or(why));
                Ok(())
            }
            WorkerMessage::Stacks { request, task, dump, why } => {
                self.questions.answer(request, &task, dump.map(Answer::Stacks).ok_or(why));
                Ok(())
            }
            WorkerMessage::Hello(_) => {
                Err(Status::invalid_argument("a second hello in one session: open another session"))
            }
            message => {
                self.acknowledgements.forwarded(sequence);
                let (session, message) = (self.session, Box::new(message));
                self.hand_over(LeaderInput::Message { session, sequence, message }).await
            }
        }
    }

    async fn hand_over(&self, input: LeaderInput) -> Result<(), Status> {
        tokio::select! {
            sent = self.leadership.inputs.send(input) => sent.map_err(|_| leadership_lost()),
            () = self.closing.token.cancelled() => Err(self.closing.status()),
        }
    }

    fn parse(&self, frame: WorkerFrame) -> Result<(u64, WorkerMessage), Status> {
        let message = serde_json::from_slice(&frame.json).map_err(|error| {
            Status::invalid_argument(format!(
                "frame {} is not a message of this version: {error}",
                frame.sequence
            ))
        })?;
        Ok((frame.sequence, message))
    }
}

#[cfg(test)]
mod tests {
    use api::NodeId;
    use api::units::Span;

    use super::*;

    fn session() -> (SessionHandle, Writer) {
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let (acknowledgements, acknowledged) = Acknowledgements::new();
        let closing = Closing::new(&CancellationToken::new());
        let handle = SessionHandle { outbox, acknowledgements, closing: closing.clone() };
        let _guard = closing.token.clone().drop_guard();
        (handle, Writer { messages, acknowledged, ended: false, _guard, closing })
    }

    fn order(node: u64) -> CoordinatorMessage {
        CoordinatorMessage::Welcome { node: NodeId(node), heartbeat: Span::seconds(1) }
    }

    #[tokio::test]
    async fn orders_and_acknowledgements_become_frames_until_the_session_closes() {
        let (handle, writer) = session();
        handle.acknowledge(3);
        handle.send(order(1));
        let (frame, writer) = writer.next().await.expect("a frame");
        let frame = frame.expect("an order");
        assert_eq!(frame.acknowledged, 3);
        let parsed = serde_json::from_slice::<CoordinatorMessage>(&frame.json).expect("parses");
        assert_eq!(parsed, order(1));
        // An older acknowledgement is not one.
        handle.acknowledge(2);
        handle.acknowledge(5);
        let (frame, writer) = writer.next().await.expect("a frame");
        let frame = frame.expect("an acknowledgement");
        assert_eq!((frame.acknowledged, frame.json.len()), (5, 0));
        // What was ordered before the end still goes out; the first reason counts.
        handle.send(order(2));
        handle.close(Status::aborted("superseded"));
        handle.close(Status::aborted("later"));
        let (frame, writer) = writer.next().await.expect("a frame");
        assert!(frame.is_ok());
        let (frame, writer) = writer.next().await.expect("the reason");
        assert_eq!(frame.expect_err("closed").message(), "superseded");
        assert!(writer.next().await.is_none());
    }

    #[test]
    fn log_lines_are_acknowledged_with_the_facts_before_them() {
        let (acknowledgements, acknowledged) = Acknowledgements::new();
        let now = || *acknowledged.borrow();
        acknowledgements.forwarded(1);
        acknowledgements.logged(2);
        assert_eq!(now(), 0, "a fact before the lines is not committed yet");
        acknowledgements.committed(1);
        assert_eq!(now(), 2, "nothing waits any more");
        acknowledgements.logged(3);
        assert_eq!(now(), 3);
        acknowledgements.forwarded(4);
        acknowledgements.logged(5);
        acknowledgements.forwarded(6);
        acknowledgements.committed(4);
        assert_eq!(now(), 4, "frame 6 still waits");
        acknowledgements.committed(6);
        assert_eq!(now(), 6);
    }

    #[tokio::test]
    async fn a_worker_that_takes_no_orders_loses_its_session() {
        let (handle, mut writer) = session();
        for _ in 0..OUTBOX_MAX {
            handle.send(order(1));
        }
        assert!(!writer.closing.token.is_cancelled());
        handle.send(order(1));
        assert!(writer.closing.token.is_cancelled());
        for _ in 0..OUTBOX_MAX {
            let (frame, next) = writer.next().await.expect("a frame");
            assert!(frame.is_ok());
            writer = next;
        }
        let (frame, _) = writer.next().await.expect("the reason");
        assert_eq!(frame.expect_err("closed").code(), tonic::Code::ResourceExhausted);
    }
}
