//! One coordinator: binds, starts raft, serves, leads while it is leader, stops.

use std::fmt;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use api::config::{ClusterConfig, ConfigError};
use api::units::Span;
use api::{JobSpec, Secret};
use checkpoint::Store;
use coordinator_core::LeaderOptions;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::coordinator_error::CoordinatorError;
use crate::flight::FlightDesk;
use crate::leader_loop::LeaderLoop;
use crate::leadership::Leaderships;
use crate::log_stream::LogSources;
use crate::peers::Peers;
use crate::raft_node::{RaftHandle, RaftNode, RaftOptions, RaftService, RaftStatus};
use crate::random::random_u64;
use crate::server::{ServerTask, Services};
use crate::sweep::Sweeper;
use crate::token::TokenCheck;

/// Heartbeats of a worker per lease: two may be lost and the third is in time.
const HEARTBEATS_PER_LEASE: u32 = 3;
/// Open connections get this long to end by themselves when the coordinator stops.
const DRAIN_WAIT: Duration = Duration::from_secs(2);
/// Deletions of old checkpoints get this long: some requests to the store, or one that hangs.
const SWEEP_WAIT: Duration = Duration::from_secs(10);

/// Checks a job beyond what this crate knows; the error is for the person who submitted it.
pub type Validate = Arc<dyn Fn(&JobSpec) -> Result<(), String> + Send + Sync>;

/// What a coordinator needs to start.
pub struct CoordinatorOptions {
    /// The cluster, and which of its coordinators this is.
    pub config: ClusterConfig,
    /// What every caller must show.
    pub token: Secret,
    /// Checks a job against its algorithm's schema, which this crate does not know.
    pub validate: Validate,
    /// A listener that is already bound; absent: this node's address in the configuration.
    pub listener: Option<TcpListener>,
}

impl fmt::Debug for CoordinatorOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoordinatorOptions")
            .field("node", &self.config.coordinator.node)
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// One coordinator of a cluster.
#[derive(Debug)]
pub struct Coordinator;

impl Coordinator {
    /// Runs a coordinator until `shutdown`.
    ///
    /// # Errors
    /// When it cannot start, or raft or the server end by themselves.
    pub async fn run(
        options: CoordinatorOptions,
        shutdown: CancellationToken,
    ) -> Result<(), CoordinatorError> {
        let mut handle = Self::start(options)?;
        tokio::select! {
            () = shutdown.cancelled() => handle.stop().await,
            ended = handle.ended() => ended,
        }
    }

    /// Starts a coordinator in the background: when this returns it listens. Call it inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the configuration, the address, the store's settings or raft's folder cannot be used.
    pub fn start(options: CoordinatorOptions) -> Result<CoordinatorHandle, CoordinatorError> {
        let CoordinatorOptions { config, token, validate, listener } = options;
        config.validate()?;
        if token.reveal().is_empty() || api::connect::token_metadata(&token).is_none() {
            return Err(CoordinatorError::Token);
        }
        // Ok when this process chose a provider before: tonic takes either.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (listener, address) = bind(&config, listener)?;
        let uri = config.store_uri();
        let store = Store::open(&config.store, &uri).map_err(|error| CoordinatorError::Store {
            uri: uri.clone(),
            source: Box::new(error),
        })?;
        let (raft, raft_service) = start_raft(&config, &token)?;
        let shutdown = CancellationToken::new();
        let (leaderships_sender, leaderships) = watch::channel(None);
        let node = config.coordinator.node;
        let sweeper = {
            let raft = raft.clone();
            Sweeper::new(store.clone(), move || raft.records())
        };
        let desk = Arc::new(FlightDesk { store: store.clone(), questions: Arc::default() });
        let leader_loop = LeaderLoop {
            options: leader_options(&config),
            node,
            raft: raft.clone(),
            store: store.clone(),
            sweeper: sweeper.clone(),
            desk: Arc::clone(&desk),
            leaderships: leaderships_sender,
        };
        let members = config.coordinator.members.clone();
        let peers = Peers::new(node, members, config.tls.clone(), &token, raft.clone())
            .ok_or(CoordinatorError::Token)?;
        let services = Services {
            cluster_id: config.cluster.id.clone(),
            token: TokenCheck::new(token),
            validate,
            leaderships: leaderships.clone(),
            peers: Arc::new(peers),
            logs: LogSources { store, window: Arc::default(), raft: raft.clone() },
            desk,
            raft: raft_service,
        };
        let server = services.serve(&config, listener, shutdown.clone())?;
        info!(%node, %address, "coordinator listens");
        let parts = Parts {
            leading: tokio::spawn(leader_loop.run(shutdown.clone())),
            sweeper,
            server,
            raft: raft.clone(),
            shutdown: shutdown.clone(),
        };
        let main = Some(tokio::spawn(parts.supervise()));
        Ok(CoordinatorHandle { address, raft, leaderships, shutdown, main })
    }
}

/// A running coordinator. Dropping it stops the coordinator without waiting.
pub struct CoordinatorHandle {
    address: SocketAddr,
    raft: RaftHandle,
    leaderships: Leaderships,
    shutdown: CancellationToken,
    /// Absent once its end was waited for.
    main: Option<Main>,
}

/// The task that runs everything.
type Main = JoinHandle<Result<(), CoordinatorError>>;

impl CoordinatorHandle {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its view of the raft group.
    pub fn status(&self) -> RaftStatus {
        self.raft.status()
    }

    /// Whether it leads and takes requests itself.
    pub fn is_leading(&self) -> bool {
        self.leaderships.borrow().is_some()
    }

    /// Waits until requests are answered: by this coordinator, or by a leader that it knows.
    ///
    /// # Errors
    /// When it stops before.
    pub async fn ready(&mut self) -> Result<(), CoordinatorError> {
        let (mut status, mut leaderships) = (self.raft.watch_status(), self.leaderships.clone());
        loop {
            let leads = leaderships.borrow_and_update().is_some();
            let (leader, node) = {
                let status = status.borrow_and_update();
                (status.leader, status.node)
            };
            if leads || leader.is_some_and(|leader| leader != node) {
                return Ok(());
            }
            tokio::select! {
                _ = status.changed() => {}
                Ok(()) = leaderships.changed() => {}
                ended = joined(&mut self.main) => {
                    ended?;
                    return Err(CoordinatorError::Serve("it was stopped".into()));
                }
            }
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// Why it ended.
    pub async fn ended(&mut self) -> Result<(), CoordinatorError> {
        joined(&mut self.main).await
    }

    /// Stops it: worker sessions and streams are told to go elsewhere, raft's folder is closed.
    ///
    /// # Errors
    /// When it had already ended by itself with an error.
    pub async fn stop(&mut self) -> Result<(), CoordinatorError> {
        self.shutdown.cancel();
        joined(&mut self.main).await
    }
}

impl Drop for CoordinatorHandle {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl fmt::Debug for CoordinatorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoordinatorHandle").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Waits for the task's end; at once when that was done before.
async fn joined(main: &mut Option<Main>) -> Result<(), CoordinatorError> {
    let Some(task) = main else { return Ok(()) };
    let ended = task.await;
    *main = None;
    ended.unwrap_or_else(|panic| Err(CoordinatorError::Serve(panic.to_string())))
}

/// The running tasks of a coordinator.
struct Parts {
    leading: JoinHandle<()>,
    sweeper: Sweeper,
    server: ServerTask,
    raft: RaftHandle,
    shutdown: CancellationToken,
}

impl Parts {
    /// Waits for the end of any, then ends the others in order.
    async fn supervise(mut self) -> Result<(), CoordinatorError> {
        let mut server_ended = false;
        let result = tokio::select! {
            biased;
            // First: the server ends on shutdown too, and that is no failure.
            () = self.shutdown.cancelled() => Ok(()),
            ended = &mut self.server => {
                server_ended = true;
                Err(CoordinatorError::Serve(match ended {
                    Ok(Ok(())) => "nobody asked it to".into(),
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => panic.to_string(),
                }))
            }
            reason = self.raft.stopped() => {
                let node = self.raft.status().node;
                Err(CoordinatorError::RaftStopped { node, reason: reason.to_string() })
            }
        };
        self.shutdown.cancel();
        // The term of office first: sessions and streams are told before connections close.
        if self.leading.await.is_err() {
            warn!("the leader loop ended with a panic");
        }
        // Then raft, so that the others have a leader soon: sweeps only read its last records.
        tokio::join!(self.raft.stop(), self.sweeper.finish(SWEEP_WAIT));
        if !server_ended && tokio::time::timeout(DRAIN_WAIT, &mut self.server).await.is_err() {
            self.server.abort();
        }
        result
    }
}

fn bind(
    config: &ClusterConfig,
    listener: Option<TcpListener>,
) -> Result<(TcpListener, SocketAddr), CoordinatorError> {
    // validate() has checked that this node is a member.
    let configured = config.own_address().ok_or_else(|| {
        ConfigError::Disagreement("coordinator.node is not among coordinator.members".into())
    })?;
    let failed = |source: std::io::Error| match source.kind() {
        ErrorKind::AddrInUse => CoordinatorError::PortInUse { address: configured },
        _ => CoordinatorError::Listen { address: configured, source },
    };
    let listener = match listener {
        Some(listener) => listener,
        None => TcpListener::bind(configured).map_err(failed)?,
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    config.check_listener("coordinator.members", address.ip())?;
    Ok((listener, address))
}

fn start_raft(
    config: &ClusterConfig,
    token: &Secret,
) -> Result<(RaftHandle, RaftService), CoordinatorError> {
    let section = &config.coordinator;
    let dir = config.cluster.dir.join("raft").join(section.node.to_string());
    let options = RaftOptions {
        node: section.node,
        members: section.members.clone(),
        dir: dir.clone(),
        cluster_id: config.cluster.id.clone(),
        election_timeout: section.election_timeout.0,
        heartbeat_interval: section.heartbeat_interval.0,
        snapshot_entries: section.snapshot_entries,
        seed: random_u64()?,
        tls: config.tls.clone(),
        token: token.clone(),
    };
    RaftNode::start(options)
        .map_err(|error| CoordinatorError::Raft { dir, source: Box::new(error) })
}

fn leader_options(config: &ClusterConfig) -> LeaderOptions {
    let lease = config.coordinator.worker_lease.0;
    LeaderOptions {
        lease_ms: lease.as_millis() as u64,
        grace_ms: config.coordinator.grace_period.0.as_millis() as u64,
        cluster_id: config.cluster.id.clone(),
        heartbeat: Span(lease / HEARTBEATS_PER_LEASE),
    }
}
