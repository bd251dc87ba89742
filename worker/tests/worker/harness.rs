//! A coordinator that does what the test says, ranks that are shell scripts, and a worker between.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::config::ClusterConfig;
use api::connect::{LEADER_KEY, TOKEN_KEY};
use api::job::JobSpec;
use api::pb::worker_session_server::{WorkerSession, WorkerSessionServer};
use api::pb::{CoordinatorFrame, WorkerFrame};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, LogLine, RankOrder, RankReport, TaskEvent,
    TrainAssignment, WorkerHello, WorkerMessage,
};
use api::units::Span;
use api::{Generation, NodeId, Rank, Secret, TaskId};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use worker::{Worker, WorkerError, WorkerOptions};

pub const TOKEN: &str = "a-cluster-token";
pub const GANG_SECRET: &str = "a-gang-secret";

/// Far beyond what any wait here needs on a loaded machine.
const GUARD: Duration = Duration::from_secs(60);

pub async fn guarded<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(GUARD, wait).await {
        Ok(value) => value,
        Err(_) => panic!("nothing within {} s: {what}", GUARD.as_secs()),
    }
}

/// A coordinator on a free port of loopback.
pub struct Coordinator {
    pub address: SocketAddr,
    attachments: mpsc::Receiver<Attachment>,
    server: JoinHandle<()>,
}

struct Service {
    attachments: mpsc::Sender<Attachment>,
    /// Set: not the leader, that one is.
    leader: Option<SocketAddr>,
}

#[tonic::async_trait]
impl WorkerSession for Service {
    type AttachStream = ReceiverStream<Result<CoordinatorFrame, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<WorkerFrame>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let token = request.metadata().get(TOKEN_KEY).cloned();
        let mut frames = request.into_inner();
        let first = frames.message().await?.ok_or_else(|| Status::cancelled("no hello"))?;
        assert_eq!(first.sequence, 1, "sequences begin at 1 in each session");
        let WorkerMessage::Hello(hello) = parse(&first) else { panic!("expected a hello") };
        if token.is_none_or(|t| t != TOKEN) || hello.token.reveal() != TOKEN {
            return Err(Status::unauthenticated("the cluster token is not ours"));
        }
        if let Some(leader) = self.leader {
            let mut status = Status::failed_precondition("not the leader");
            let value = leader.to_string().parse().expect("an address is ASCII");
            status.metadata_mut().insert(LEADER_KEY, value);
            return Err(status);
        }
        let (orders, outbound) = mpsc::channel(64);
        let attachment = Attachment { hello: *hello, frames, orders, last: 1 };
        self.attachments.send(attachment).await.map_err(|_| Status::unavailable("test over"))?;
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

fn parse(frame: &WorkerFrame) -> WorkerMessage {
    serde_json::from_slice(&frame.json).expect("a worker's message parses")
}

impl Coordinator {
    pub async fn leader() -> Self {
        Self::start(None).await
    }

    pub async fn follower(leader: SocketAddr) -> Self {
        Self::start(Some(leader)).await
    }

    async fn start(leader: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (sender, attachments) = mpsc::channel(16);
        let service = WorkerSessionServer::new(Service { attachments: sender, leader });
        let server = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let served = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming);
            served.await.expect("serves");
        });
        Self { address, attachments, server }
    }

    /// The next worker to say hello; it has not been welcomed.
    pub async fn attached(&mut self) -> Attachment {
        let attachment = guarded("no worker attaches", self.attachments.recv()).await;
        attachment.expect("the server runs")
    }

    /// The next worker, welcomed. The heartbeat is so slow that none disturbs a test.
    pub async fn welcomed(&mut self) -> Attachment {
        let mut attachment = self.attached().await;
        attachment.welcome(Span::seconds(3600)).await;
        attachment
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// One session, as the coordinator sees it. Dropping it cuts the connection.
pub struct Attachment {
    pub hello: WorkerHello,
    frames: Streaming<WorkerFrame>,
    orders: mpsc::Sender<Result<CoordinatorFrame, Status>>,
    /// Sequence of the last frame received.
    pub last: u64,
}

impl Attachment {
    pub async fn welcome(&mut self, heartbeat: Span) {
        self.order(CoordinatorMessage::Welcome { node: NodeId(1), heartbeat }).await;
    }

    pub async fn order(&self, message: CoordinatorMessage) {
        let json = serde_json::to_vec(&message).expect("serialises");
        let frame = CoordinatorFrame { acknowledged: 0, json };
        self.orders.send(Ok(frame)).await.expect("the session is open");
    }

    pub async fn start(&self, task: &TaskId) {
        self.order(CoordinatorMessage::Start { task: task.clone(), assignment: train(task) }).await;
    }

    pub async fn kill(&self, task: &TaskId, reason: &str) {
        let (task, reason) = (task.clone(), reason.to_owned());
        self.order(CoordinatorMessage::Kill { task, reason }).await;
    }

    pub async fn deliver(&self, task: &TaskId, order: RankOrder) {
        self.order(CoordinatorMessage::Deliver { task: task.clone(), order }).await;
    }

    /// Lets a scripted rank go on: it waits for any order.
    pub async fn nudge(&self, task: &TaskId) {
        self.deliver(task, RankOrder::Peers { generation: task.generation, addresses: Vec::new() })
            .await;
    }

    pub async fn acknowledge(&self, sequence: u64) {
        let frame = CoordinatorFrame { acknowledged: sequence, json: Vec::new() };
        self.orders.send(Ok(frame)).await.expect("the session is open");
    }

    /// The next message of any kind.
    pub async fn message(&mut self) -> WorkerMessage {
        let frame = guarded("no message from the worker", self.frames.message()).await;
        let frame = frame.expect("the session is open").expect("the session is open");
        assert_eq!(frame.sequence, self.last + 1, "sequences have no gaps");
        self.last = frame.sequence;
        parse(&frame)
    }

    /// The next message that is no heartbeat.
    pub async fn news(&mut self) -> WorkerMessage {
        loop {
            match self.message().await {
                WorkerMessage::Heartbeat => {}
                message => return message,
            }
        }
    }

    /// The next fact, over whatever output comes before it.
    pub async fn fact(&mut self) -> (TaskId, TaskEvent) {
        loop {
            if let WorkerMessage::Task { task, event } = self.message().await {
                return (task, event);
            }
        }
    }

    /// The next fact must be this task's start; its process id.
    pub async fn started(&mut self, task: &TaskId) -> i32 {
        match self.fact().await {
            (who, TaskEvent::Started { pid }) if who == *task => pid as i32,
            other => panic!("expected {task} to start, found {other:?}"),
        }
    }

    /// The next fact must be this task's exit; its cause.
    pub async fn exited(&mut self, task: &TaskId) -> ExitCause {
        match self.fact().await {
            (who, TaskEvent::Exited { cause }) if who == *task => cause,
            other => panic!("expected {task} to exit, found {other:?}"),
        }
    }

    /// The next fact must be that this task listens.
    pub async fn listening(&mut self, task: &TaskId) -> SocketAddr {
        match self.fact().await {
            (who, TaskEvent::Report { report: RankReport::Listening { address, .. }, .. })
                if who == *task =>
            {
                address
            }
            other => panic!("expected {task} to listen, found {other:?}"),
        }
    }

    /// Lines of output up to and including the first for which `last` holds.
    pub async fn lines_until(&mut self, last: impl Fn(&LogLine) -> bool) -> Vec<LogLine> {
        let mut all = Vec::new();
        loop {
            if let WorkerMessage::Logs { lines, .. } = self.message().await {
                all.extend(lines);
                if all.iter().any(&last) {
                    return all;
                }
            }
        }
    }
}

pub fn task(generation: u64, rank: u32) -> TaskId {
    TaskId {
        workload: "digits".parse().expect("a name"),
        generation: Generation(generation),
        rank: Rank(rank),
    }
}

pub fn train(task: &TaskId) -> Box<Assignment> {
    let text = "name = \"digits\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 1\n";
    let spec = JobSpec::parse(text, "job.toml", Path::new("/"), &[]).expect("a job");
    Box::new(Assignment::Train(TrainAssignment {
        spec,
        generation: task.generation,
        rank: task.rank,
        world_size: 2,
        local_rank: task.rank.0,
        local_world_size: 2,
        restore: None,
        secret: Secret::new(GANG_SECRET),
        elapsed: Span::seconds(0),
        spare: false,
    }))
}

/// A folder with the program of ranks, the worker's own folder and an object store.
pub struct Host {
    pub folder: TempDir,
}

/// What every scripted rank begins with: it waits for its assignment and can report.
const PRELUDE: &str = r#"#!/bin/sh
read -r assignment || exit 90
case "$assignment" in '{"order":"assignment"'*) ;; *) exit 91 ;; esac
say() { echo "{\"generation\":$COHORT_GENERATION,\"report\":$1}" >&0; }
listen() { say '{"report":"listening","address":"127.0.0.1:'"$1"'","fingerprint":"f"}'; }
"#;

impl Host {
    /// `script` is what a rank does after it has read its assignment.
    pub fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("program");
        fs::write(&program, format!("{PRELUDE}{script}")).expect("writes");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
        Self { folder }
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("worker")
    }

    pub fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub fn options(&self, coordinators: &[SocketAddr]) -> WorkerOptions {
        options(self.folder.path(), coordinators)
    }

    /// Starts a worker in this process.
    pub fn worker(&self, coordinators: &[SocketAddr]) -> Running {
        Running::start(self.options(coordinators))
    }
}

pub fn options(folder: &Path, coordinators: &[SocketAddr]) -> WorkerOptions {
    let mut config = ClusterConfig::default();
    let store = folder.join("store");
    fs::create_dir_all(&store).expect("creates");
    config.store.uri = format!("file://{}", store.display());
    config.worker.stop_timeout = Span::millis(300);
    // Tests that stop a rank look at it as it is.
    config.worker.stopped_rank_timeout = Span::millis(0);
    WorkerOptions {
        config,
        name: "w1".parse().expect("a name"),
        slots: 2,
        coordinators: coordinators.to_vec(),
        token: Secret::new(TOKEN),
        program: folder.join("program"),
        dir: folder.join("worker"),
    }
}

/// A worker in this process.
pub struct Running {
    shutdown: CancellationToken,
    worker: JoinHandle<Result<(), WorkerError>>,
}

impl Running {
    pub fn start(options: WorkerOptions) -> Self {
        let shutdown = CancellationToken::new();
        let worker = tokio::spawn(Worker::run(options, shutdown.clone()));
        Self { shutdown, worker }
    }

    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }

    pub async fn result(self) -> Result<(), WorkerError> {
        guarded("the worker does not end", self.worker).await.expect("the worker does not panic")
    }
}

/// Whether a process runs (a zombie does not).
pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

/// Waits for the end of a process that is not our child, which the kernel announces to nobody.
pub async fn gone(pid: i32) {
    guarded("a process does not end", async {
        while is_alive(pid) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

pub fn kill_9(pid: i32) {
    use nix::sys::signal::{Signal, kill};
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("the process is there");
}
