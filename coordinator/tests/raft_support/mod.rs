//! Raft nodes in this process, talking over real loopback gRPC. Shared by the tests of the log.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::config::{Member, TlsSection};
use api::{NodeId, Secret};
use coordinator::{ProposeError, RaftHandle, RaftNode, RaftOptions, RaftStatus, StartError};
use coordinator_core::{Outcome, Precondition, RecordKey, Transaction, Write};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

/// Nothing here takes long; this is for machines that are busy with other work.
pub const HANG: Duration = Duration::from_secs(60);

/// Fails the test if a wait does not end.
pub async fn guard<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(HANG, wait).await {
        Ok(value) => value,
        Err(_) => panic!("hanging: {what}"),
    }
}

/// A transaction that creates counter `number`, under a request id of the same number.
pub fn counter(number: u64) -> Transaction {
    let key = counter_key(number);
    Transaction {
        request_id: format!("request-{number}"),
        preconditions: vec![Precondition::Absent(key.clone())],
        writes: vec![Write::Put { key, json: number.to_string().into_bytes() }],
    }
}

pub fn counter_key(number: u64) -> RecordKey {
    RecordKey { kind: "counter".into(), id: format!("{number:08}") }
}

/// The counters in a node's records.
pub fn counters(handle: &RaftHandle) -> Vec<u64> {
    let number = |id: &str| id.parse().expect("a counter's id is a number");
    handle.records().list("counter", "").map(|(key, _)| number(&key.id)).collect()
}

/// Options of a lone node in `dir`.
pub fn lone_options(dir: &Path) -> RaftOptions {
    let address = "127.0.0.1:1".parse().expect("an address");
    RaftOptions {
        node: NodeId(1),
        members: vec![Member { node: NodeId(1), address }],
        dir: dir.to_owned(),
        cluster_id: "test".into(),
        election_timeout: Duration::from_millis(500),
        heartbeat_interval: Duration::from_millis(50),
        snapshot_entries: 16,
        seed: 7,
        tls: TlsSection::default(),
        token: Secret::new("right-token"),
    }
}

/// Waits for a state of one node.
pub async fn status_is(
    handle: &RaftHandle,
    what: &str,
    wanted: impl FnMut(&RaftStatus) -> bool,
) -> RaftStatus {
    let mut status = handle.watch_status();
    guard(what, status.wait_for(wanted)).await.expect("the handle lives").clone()
}

/// Waits until a node has applied an entry.
pub async fn applied(handle: &RaftHandle, index: u64) {
    let mut watch = handle.watch_applied();
    guard("apply", watch.wait_for(|applied| *applied >= index)).await.expect("the handle lives");
}

/// One running node with its server.
pub struct Running {
    pub handle: RaftHandle,
    shutdown: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

/// A raft group whose nodes can be stopped and started.
pub struct Group {
    root: tempfile::TempDir,
    pub members: Vec<Member>,
    pub nodes: Vec<Option<Running>>,
    pub snapshot_entries: u64,
}

impl Group {
    /// Starts `count` nodes on free ports.
    pub async fn start(count: usize, snapshot_entries: u64) -> Self {
        Self::start_some(count, &(0..count).collect::<Vec<_>>(), snapshot_entries).await
    }

    /// Starts only some of `count` nodes; the others never ran.
    pub async fn start_some(count: usize, started: &[usize], snapshot_entries: u64) -> Self {
        let root = tempfile::tempdir().expect("a folder");
        let mut listeners = Vec::new();
        let mut members = Vec::new();
        for index in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("bound");
            members.push(Member { node: NodeId(index as u64 + 1), address });
            listeners.push(listener);
        }
        let nodes = (0..count).map(|_| None).collect();
        let mut group = Self { root, members, nodes, snapshot_entries };
        let listeners = listeners.into_iter().enumerate();
        for (index, listener) in listeners.filter(|(index, _)| started.contains(index)) {
            group.start_on(index, listener).expect("starts");
        }
        group
    }

    pub fn dir(&self, index: usize) -> PathBuf {
        self.root.path().join(format!("n{}", index + 1))
    }

    pub fn options(&self, index: usize) -> RaftOptions {
        RaftOptions {
            node: self.members[index].node,
            members: self.members.clone(),
            snapshot_entries: self.snapshot_entries,
            ..lone_options(&self.dir(index))
        }
    }

    fn start_on(&mut self, index: usize, listener: TcpListener) -> Result<(), StartError> {
        let (handle, service) = RaftNode::start(self.options(index))?;
        let (shutdown, asked) = oneshot::channel::<()>();
        let server = tonic::transport::Server::builder()
            .add_service(service.into_server())
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                let _ = asked.await;
            });
        let server =
            tokio::spawn(async { server.await.expect("serves until it is asked to stop") });
        self.nodes[index] = Some(Running { handle, shutdown, server });
        Ok(())
    }

    /// Starts a stopped node on its old address and folder.
    pub async fn restart(&mut self, index: usize) {
        let address: SocketAddr = self.members[index].address;
        let listener = TcpListener::bind(address).await.expect("its port is free again");
        self.start_on(index, listener).expect("starts again");
    }

    /// Stops a node; its folder and port are free afterwards.
    pub async fn stop(&mut self, index: usize) {
        let running = self.nodes[index].take().expect("it runs");
        guard("stop", running.handle.stop()).await;
        let _ = running.shutdown.send(());
        guard("server stop", running.server).await.expect("the server ends well");
    }

    pub fn handle(&self, index: usize) -> &RaftHandle {
        &self.nodes[index].as_ref().expect("it runs").handle
    }

    pub fn running(&self) -> impl Iterator<Item = (usize, &RaftHandle)> {
        let running = self.nodes.iter().enumerate();
        running.filter_map(|(index, node)| node.as_ref().map(|node| (index, &node.handle)))
    }

    /// Waits until one of the running nodes leads; returns its index.
    pub async fn leader(&self) -> usize {
        let wait = self.running().map(|(index, handle)| {
            let mut status = handle.watch_status();
            Box::pin(async move {
                status.wait_for(|status| status.is_leader).await.expect("the handle lives");
                index
            })
        });
        guard("an election", futures::future::select_all(wait)).await.0
    }

    /// Proposes on whoever leads, again and again under one request id, until it has an outcome.
    pub async fn commit(&self, transaction: Transaction) -> Outcome {
        guard("a commit", async {
            loop {
                let leader = self.leader().await;
                let deadline = Duration::from_secs(5);
                match self.handle(leader).propose(transaction.clone(), deadline).await {
                    Ok(outcome) => return outcome,
                    Err(ProposeError::NotLeader { .. } | ProposeError::Timeout) => {
                        tokio::task::yield_now().await;
                    }
                    Err(error) => panic!("unexpected: {error}"),
                }
            }
        })
        .await
    }

    /// Waits until every running node has applied what the leader has committed, and compares.
    pub async fn converged(&self) -> Vec<u64> {
        let leader = self.leader().await;
        let index = self.handle(leader).status().commit_index;
        for (_, handle) in self.running() {
            applied(handle, index).await;
        }
        let expected = self.handle(leader).records();
        for (node, handle) in self.running() {
            assert_eq!(handle.records().snapshot(), expected.snapshot(), "node {node} differs");
        }
        counters(self.handle(leader))
    }

    /// Stops everything.
    pub async fn finish(mut self) {
        for index in 0..self.nodes.len() {
            if self.nodes[index].is_some() {
                self.stop(index).await;
            }
        }
    }
}
