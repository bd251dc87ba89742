//! Coordinators in this process, and a scripted worker that speaks the real session protocol over
//! gRPC. The worker runs nothing: the test says what it says.

#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::config::{ClusterConfig, Member, TlsSection};
use api::connect::{LEADER_KEY, TOKEN_KEY, endpoint, token_metadata};
use api::events::{CheckpointFact, ModelFact, StepMetrics, StepTime};
use api::ids::{NodeId, Step};
use api::pb::worker_session_client::WorkerSessionClient;
use api::pb::{self, CoordinatorFrame, WorkerFrame};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, LogLine, LogStream, RankOrder, RankReport,
    TaskEvent, TaskView, TrainAssignment, WorkerHello, WorkerMessage,
};
use api::units::Span;
use api::{Generation, JobSpec, Name, Rank, Secret, TaskId};
use coordinator::{ClusterClient, Coordinator, CoordinatorHandle, CoordinatorOptions};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

pub const TOKEN: &str = "token-of-the-test-cluster";

/// Fails a test that would hang. Generous: it never decides whether a healthy run passes.
pub async fn guard<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(value) => value,
        Err(_) => panic!("timed out: {what}"),
    }
}

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

pub fn spec(job: &str, ranks: u32) -> JobSpec {
    let text = format!(
        "name = \"{job}\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 100\n\
         [resources]\nranks = {ranks}\n"
    );
    JobSpec::parse(&text, "job.toml", Path::new("/"), &[]).expect("a job")
}

/// A group of coordinators.
pub struct Group {
    pub dir: tempfile::TempDir,
    pub config: ClusterConfig,
    pub coordinators: BTreeMap<u64, CoordinatorHandle>,
}

impl Group {
    /// Starts that many and waits until requests are answered.
    pub async fn start(members: u64) -> Self {
        Self::start_with(members, |_| {}).await
    }

    pub async fn start_with(members: u64, change: impl FnOnce(&mut ClusterConfig)) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let listeners: Vec<TcpListener> =
            (0..members).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
        let mut config = ClusterConfig::default();
        config.cluster.dir = dir.path().to_owned();
        config.coordinator.members = listeners
            .iter()
            .zip(1..)
            .map(|(listener, node)| Member {
                node: NodeId(node),
                address: listener.local_addr().expect("bound"),
            })
            .collect();
        config.coordinator.election_timeout = Span::millis(400);
        config.coordinator.heartbeat_interval = Span::millis(40);
        // Long leases: no test here is about a worker that falls silent.
        config.coordinator.worker_lease = Span::seconds(60);
        config.coordinator.grace_period = Span::seconds(60);
        change(&mut config);
        let mut group = Self { dir, config, coordinators: BTreeMap::new() };
        for (listener, node) in listeners.into_iter().zip(1..) {
            let options = group.options(node, Some(listener));
            let handle = Coordinator::start(options).expect("starts");
            group.coordinators.insert(node, handle);
        }
        for handle in group.coordinators.values_mut() {
            guard("ready", handle.ready()).await.expect("ready");
        }
        group
    }

    pub fn options(&self, node: u64, listener: Option<TcpListener>) -> CoordinatorOptions {
        let mut config = self.config.clone();
        config.coordinator.node = NodeId(node);
        CoordinatorOptions {
            config,
            token: Secret::new(TOKEN),
            validate: Arc::new(|spec: &JobSpec| match spec.algorithm.as_str() {
                "transformer" => Ok(()),
                other => Err(format!("unknown algorithm `{other}`")),
            }),
            listener,
        }
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.config.coordinator.members.iter().map(|member| member.address).collect()
    }

    /// The node that leads; waits for one.
    pub async fn leader(&self) -> u64 {
        guard("a leader", async {
            loop {
                let leading = self.coordinators.iter().find(|(_, handle)| handle.is_leading());
                if let Some((node, _)) = leading {
                    return *node;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }

    pub fn address(&self, node: u64) -> SocketAddr {
        self.coordinators[&node].address()
    }

    pub async fn client(&self) -> ClusterClient {
        self.client_of(&self.addresses()).await
    }

    pub async fn client_of(&self, addresses: &[SocketAddr]) -> ClusterClient {
        let connected = ClusterClient::connect(addresses, &self.config.tls, Secret::new(TOKEN));
        guard("connect", connected).await.expect("connects")
    }

    /// Stops one and forgets it.
    pub async fn stop(&mut self, node: u64) {
        let mut handle = self.coordinators.remove(&node).expect("it runs");
        guard("stop", handle.stop()).await.expect("stops");
    }

    /// Starts one again, at its address and on its folder.
    pub async fn restart(&mut self, node: u64) {
        let mut handle = Coordinator::start(self.options(node, None)).expect("starts again");
        guard("ready", handle.ready()).await.expect("ready");
        self.coordinators.insert(node, handle);
    }

    pub async fn stop_all(&mut self) {
        let nodes: Vec<u64> = self.coordinators.keys().copied().collect();
        for node in nodes {
            self.stop(node).await;
        }
    }
}

pub fn hello(worker: &str, slots: u32, tasks: Vec<TaskView>) -> WorkerHello {
    WorkerHello {
        cluster_id: "cohort".into(),
        token: Secret::new(TOKEN),
        name: name(worker),
        host: "test-host".into(),
        slots,
        price: Default::default(),
        unhealthy: None,
        incarnation: 7,
        version: "0.1.0".into(),
        tasks,
    }
}

/// The worker's end of a session.
pub struct FakeWorker {
    frames: mpsc::Sender<WorkerFrame>,
    inbound: Streaming<CoordinatorFrame>,
    sequence: u64,
    acknowledged: u64,
    /// Orders that came while an acknowledgement was waited for.
    early: Vec<CoordinatorMessage>,
}

impl FakeWorker {
    /// Attaches to one coordinator and waits for the welcome.
    pub async fn attach(address: SocketAddr, hello: WorkerHello) -> Result<Self, Status> {
        Self::attach_with(address, TOKEN, hello, &ClusterConfig::default()).await
    }

    pub async fn attach_with(
        address: SocketAddr,
        token: &str,
        hello: WorkerHello,
        config: &ClusterConfig,
    ) -> Result<Self, Status> {
        let endpoint = endpoint(address, &config.tls).expect("an endpoint");
        let channel =
            endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let (frames, outbound) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(outbound));
        let token = token_metadata(&Secret::new(token)).expect("a token");
        request.metadata_mut().insert(TOKEN_KEY, token);
        let inbound = WorkerSessionClient::new(channel).attach(request).await?.into_inner();
        let mut worker = Self { frames, inbound, sequence: 0, acknowledged: 0, early: Vec::new() };
        worker.say(WorkerMessage::Hello(Box::new(hello))).await;
        match worker.order().await? {
            CoordinatorMessage::Welcome { .. } => Ok(worker),
            other => panic!("expected a welcome, got {other:?}"),
        }
    }

    /// Attaches to whoever leads, as a worker does: asks in turn, follows the hint.
    pub async fn attach_anywhere(addresses: &[SocketAddr], hello: WorkerHello) -> Self {
        guard("attach", async {
            loop {
                for address in addresses {
                    match Self::attach(*address, hello.clone()).await {
                        Ok(worker) => return worker,
                        Err(status) => {
                            let hint = status.metadata().get(LEADER_KEY);
                            let hint = hint.map(|hint| hint.to_str().expect("an address"));
                            if let Some(hint) = hint
                                && let Ok(worker) =
                                    Self::attach(hint.parse().expect("an address"), hello.clone())
                                        .await
                            {
                                return worker;
                            }
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    /// Sends a message and returns its sequence.
    pub async fn say(&mut self, message: WorkerMessage) -> u64 {
        let json = serde_json::to_vec(&message).expect("serialises");
        self.say_raw(json).await
    }

    pub async fn say_raw(&mut self, json: Vec<u8>) -> u64 {
        self.sequence += 1;
        let frame = WorkerFrame { sequence: self.sequence, json };
        // A session that was closed shows when it is read from.
        let _ = self.frames.send(frame).await;
        self.sequence
    }

    pub async fn report(&mut self, task: &TaskId, report: RankReport) -> u64 {
        let event = TaskEvent::Report { generation: task.generation, report };
        self.say(WorkerMessage::Task { task: task.clone(), event }).await
    }

    pub async fn exited(&mut self, task: &TaskId, cause: ExitCause) -> u64 {
        let event = TaskEvent::Exited { cause };
        self.say(WorkerMessage::Task { task: task.clone(), event }).await
    }

    pub async fn log(&mut self, task: &TaskId, first: u64, texts: &[&str]) -> u64 {
        let line = |(sequence, text): (u64, &&str)| LogLine {
            sequence,
            time_ms: 1_000 + sequence,
            stream: LogStream::Stdout,
            text: (*text).to_owned(),
        };
        let lines = (first..).zip(texts).map(line).collect();
        self.say(WorkerMessage::Logs { task: task.clone(), lines }).await
    }

    async fn frame(&mut self) -> Result<Option<CoordinatorMessage>, Status> {
        let frame = guard("a frame", self.inbound.message()).await?;
        let frame = frame.ok_or_else(|| Status::cancelled("the session ended"))?;
        assert!(frame.acknowledged >= self.acknowledged, "acknowledgements went back");
        assert!(frame.acknowledged <= self.sequence, "acknowledged what was never said");
        self.acknowledged = frame.acknowledged;
        if frame.json.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&frame.json).expect("a message")))
    }

    /// The next order.
    pub async fn order(&mut self) -> Result<CoordinatorMessage, Status> {
        if !self.early.is_empty() {
            return Ok(self.early.remove(0));
        }
        loop {
            if let Some(message) = self.frame().await? {
                return Ok(message);
            }
        }
    }

    /// Waits until everything up to `sequence` is acknowledged.
    pub async fn acknowledged(&mut self, sequence: u64) {
        while self.acknowledged < sequence {
            if let Some(message) = self.frame().await.expect("the session lives") {
                self.early.push(message);
            }
        }
    }

    /// Orders that have come so far.
    pub fn early(&self) -> &[CoordinatorMessage] {
        &self.early
    }

    /// The next order, which must be to start a rank.
    pub async fn start(&mut self) -> (TaskId, TrainAssignment) {
        match self.order().await.expect("an order") {
            CoordinatorMessage::Start { task, assignment } => match *assignment {
                Assignment::Train(assignment) => (task, assignment),
                other => panic!("expected a train task, got {other:?}"),
            },
            other => panic!("expected a start, got {other:?}"),
        }
    }

    /// The next order, which must be for a running task.
    pub async fn deliver(&mut self) -> (TaskId, RankOrder) {
        match self.order().await.expect("an order") {
            CoordinatorMessage::Deliver { task, order } => (task, order),
            other => panic!("expected a delivery, got {other:?}"),
        }
    }

    /// Brings a gang whose ranks all run here from its start orders to running. Returns the tasks
    /// in rank order and the gang's secret.
    pub async fn run_gang(&mut self, ranks: u32) -> (Vec<TaskId>, String) {
        let mut tasks = BTreeMap::new();
        let mut secrets = Vec::new();
        for _ in 0..ranks {
            let (task, assignment) = self.start().await;
            assert_eq!(assignment.world_size, ranks);
            assert_eq!(assignment.rank, task.rank);
            secrets.push(assignment.secret.reveal().to_owned());
            tasks.insert(task.rank, task);
        }
        secrets.dedup();
        assert_eq!(secrets.len(), 1, "the ranks of a gang got different secrets");
        let tasks: Vec<TaskId> = tasks.into_values().collect();
        for task in &tasks {
            let event = TaskEvent::Started { pid: 1_000 + task.rank.0 };
            self.say(WorkerMessage::Task { task: task.clone(), event }).await;
            let fingerprint = "cpu/test".to_owned();
            let address = rank_address(task.rank);
            self.report(task, RankReport::Listening { address, fingerprint }).await;
        }
        for _ in &tasks {
            let (task, order) = self.deliver().await;
            let RankOrder::Peers { addresses, .. } = order else {
                panic!("expected peers for {task}, got {order:?}")
            };
            let expected: Vec<_> = (0..ranks).map(|rank| rank_address(Rank(rank))).collect();
            assert_eq!(addresses, expected);
        }
        for task in &tasks {
            self.report(task, RankReport::Running { step: Step(0), holds_state: true }).await;
        }
        (tasks, secrets.remove(0))
    }

    /// The model is written and every rank leaves.
    pub async fn finish(&mut self, tasks: &[TaskId]) {
        self.report(&tasks[0], RankReport::Finished(model(&tasks[0]))).await;
        let mut last = 0;
        for task in tasks {
            last = self.exited(task, ExitCause::Completed).await;
        }
        self.acknowledged(last).await;
    }
}

pub fn rank_address(rank: Rank) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 40_000 + rank.0 as u16))
}

pub fn metrics(step: u64) -> StepMetrics {
    StepMetrics {
        step: Step(step),
        last_step: Step(100),
        epoch: 0.5,
        loss: 1.0 / step as f64,
        learning_rate: 0.1,
        gradient_norm: 1.0,
        samples_per_second: 100.0,
        tokens_per_second: 0.0,
        time: StepTime::default(),
        memory_bytes: 1 << 20,
        slowest: None,
    }
}

pub fn checkpoint(task: &TaskId, step: u64) -> CheckpointFact {
    CheckpointFact {
        step: Step(step),
        generation: task.generation,
        manifest_key: checkpoint::keys::manifest(&task.workload, Step(step), task.generation),
        manifest_digest: "ab".repeat(32),
        bytes: 1 << 20,
        ..CheckpointFact::default()
    }
}

fn model(task: &TaskId) -> ModelFact {
    ModelFact {
        key: checkpoint::keys::model(&task.workload, task.generation),
        sha256: "cd".repeat(32),
        bytes: 1 << 20,
        step: Step(100),
        metrics: BTreeMap::new(),
        samples: None,
    }
}

pub fn inventory(tasks: &[TaskId]) -> Vec<TaskView> {
    let view = |task: &TaskId| TaskView {
        task: task.clone(),
        address: Some(rank_address(task.rank)),
        has_peers: true,
        generation: None,
        holds_state: false,
        waits: false,
    };
    tasks.iter().map(view).collect()
}

/// Whether any file below `folder` holds `needle`.
pub fn folder_holds(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).expect("a folder").any(|entry| {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            return folder_holds(&path, needle);
        }
        let bytes = std::fs::read(&path).expect("a file");
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}

pub const GENERATION: Generation = Generation(1);

pub type Rpc = pb::cluster_client::ClusterClient<tonic::transport::Channel>;

/// The service itself, without the client's retries.
pub async fn rpc(address: SocketAddr) -> Rpc {
    let endpoint = endpoint(address, &TlsSection::default());
    let channel = endpoint.expect("an endpoint").connect().await.expect("connects");
    pb::cluster_client::ClusterClient::new(channel)
}

pub fn with_token<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let token = token_metadata(&Secret::new(TOKEN)).expect("a token");
    request.metadata_mut().insert(TOKEN_KEY, token);
    request
}
