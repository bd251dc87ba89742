//! A whole cluster in this process: coordinators, workers, and a folder as object store, with the
//! very same code and protocols as one spread over hosts. Ranks are processes of their own.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::config::{ClusterConfig, Member, TlsSection};
use api::data_plane::DataPlane;
use api::{ExitClass, JobSpec, Name, NodeId};
use coordinator::{Coordinator, CoordinatorOptions};
use nix::fcntl::{Flock, FlockArg};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::{Worker, WorkerOptions};

use crate::certificates::{Authority, ensure_token, make_private_folder, write_private};
use crate::context::{Access, CLIENT_FILE};
use crate::error::{CliError, Result};

/// Held by the process that runs the folder's cluster.
const LOCK_FILE: &str = "cluster.lock";

/// Time to stop beyond what ranks may take to leave: to kill those that do not, and to pass on the
/// last facts and lines.
const STOP_MARGIN: Duration = Duration::from_secs(30);

/// What to run.
pub struct EmbeddedOptions {
    /// The cluster's folder: raft logs, certificates, token, store.
    pub dir: PathBuf,
    /// Settings; addresses, certificates and folders in it are replaced.
    pub config: ClusterConfig,
    /// The file they came from, if any.
    pub config_file: Option<PathBuf>,
    /// Coordinators: 1, 3 or 5.
    pub coordinators: u32,
    /// Workers.
    pub workers: u32,
    /// Ranks each worker may run at once.
    pub slots: u32,
    /// Port of the first coordinator; 0: any free ones.
    pub port: u16,
}

/// A running cluster; stops when told to or when a part of it fails.
pub struct Embedded {
    /// How clients reach it.
    pub access: Access,
    /// Its settings.
    pub config: ClusterConfig,
    workers: Parts,
    coordinators: Parts,
    _lock: Flock<File>,
}

/// Parts of one kind, which stop together.
struct Parts {
    running: JoinSet<Result<()>>,
    shutdown: CancellationToken,
}

impl Parts {
    fn new() -> Self {
        Self { running: JoinSet::new(), shutdown: CancellationToken::new() }
    }

    /// Waits until one fails; one that ends well is no failure.
    async fn failed(&mut self) -> CliError {
        loop {
            match self.running.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => return error,
                Some(Err(panic)) => return CliError::internal(format!("a part failed: {panic}")),
                None => std::future::pending().await,
            }
        }
    }

    /// Tells all to stop and waits for them; gives the first error.
    async fn stop(mut self, what: &str, limit: Duration) -> Result<()> {
        self.shutdown.cancel();
        let mut first = Ok(());
        let drained = tokio::time::timeout(limit, async {
            while let Some(ended) = self.running.join_next().await {
                if let (Ok(Err(error)), true) = (ended, first.is_ok()) {
                    first = Err(error);
                }
            }
        });
        if drained.await.is_err() {
            return Err(CliError::internal(format!("{what} did not stop within {limit:?}")));
        }
        first
    }
}

impl Embedded {
    /// Starts everything. Nothing is written before the ports are bound and the folder is locked, so
    /// that a refused start leaves no trace and disturbs no cluster that runs there.
    pub async fn start(options: EmbeddedOptions) -> Result<Self> {
        let dir = absolute(&options.dir)?;
        let listeners = bind(options.coordinators, options.port)?;
        make_private_folder(&dir)?;
        let lock = lock(&dir)?;
        let mut config = options.config;
        config.cluster.dir = dir.clone();
        config.cluster.token_file = dir.join("token");
        ensure_token(&config.cluster.token_file)?;
        let authority = Authority::open(&dir.join("tls"))?;
        config.tls = authority.issue("host")?;
        config.store.uri = config.store_uri();
        probe_store(&config).await?;
        probe_data_plane(&config)?;

        config.coordinator.members = members(&listeners)?;
        let access = Access {
            coordinators: config.coordinator.members.iter().map(|m| m.address).collect(),
            tls: client_tls(&authority)?,
            token_file: config.cluster.token_file.clone(),
            store_uri: config.store.uri.clone(),
            config: options.config_file.as_deref().map(absolute).transpose()?,
            pid: std::process::id(),
        };
        let mut embedded =
            Self { access, config, workers: Parts::new(), coordinators: Parts::new(), _lock: lock };
        embedded.start_coordinators(listeners)?;
        embedded.start_workers(options.workers, options.slots)?;
        let document = serde_json::to_vec_pretty(&embedded.access)
            .map_err(|e| CliError::internal(e.to_string()))?;
        write_private(&dir.join(CLIENT_FILE), &document)?;
        Ok(embedded)
    }

    fn start_coordinators(&mut self, listeners: Vec<TcpListener>) -> Result<()> {
        let token = self.access.token()?;
        for (index, listener) in listeners.into_iter().enumerate() {
            let mut config = self.config.clone();
            config.coordinator.node = NodeId(index as u64 + 1);
            let options = CoordinatorOptions {
                config,
                token: token.clone(),
                validate: Arc::new(validate_job),
                listener: Some(listener),
            };
            let shutdown = self.coordinators.shutdown.clone();
            let run = async move { Ok(Coordinator::run(options, shutdown).await?) };
            self.coordinators.running.spawn(run);
        }
        Ok(())
    }

    fn start_workers(&mut self, workers: u32, slots: u32) -> Result<()> {
        let program = std::env::current_exe()
            .map_err(|e| CliError::internal(format!("cannot find this program's file: {e}")))?;
        for index in 1..=workers {
            let name: Name = format!("w{index}").parse()?;
            let options = WorkerOptions {
                config: self.config.clone(),
                dir: self.config.cluster.dir.join(format!("worker-{name}")),
                name,
                slots,
                coordinators: self.access.coordinators.clone(),
                token: self.access.token()?,
                program: program.clone(),
            };
            let shutdown = self.workers.shutdown.clone();
            let run = async move { Ok(Worker::run(options, shutdown).await?) };
            self.workers.running.spawn(run);
        }
        Ok(())
    }

    /// Waits until a part of it fails; only errors end it by themselves.
    pub async fn failed(&mut self) -> CliError {
        tokio::select! {
            error = self.workers.failed() => error,
            error = self.coordinators.failed() => error,
        }
    }

    /// Stops it politely; gives the first error. Workers first, while a coordinator takes what they
    /// and their ranks have to say: a job then goes on from there when the cluster comes back.
    pub async fn stop(self) -> Result<()> {
        let limit = self.config.worker.stop_timeout.0 + STOP_MARGIN;
        let workers = self.workers.stop("the workers", limit).await;
        let coordinators = self.coordinators.stop("the coordinators", STOP_MARGIN).await;
        workers.and(coordinators)
    }
}

/// Holds a cluster's folder for this process; the kernel lets go of it whatever ends the process.
fn lock(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join(LOCK_FILE);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file =
        file.map_err(|e| CliError::usage(format!("cannot open `{}`: {e}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        if error != nix::errno::Errno::EWOULDBLOCK {
            return CliError::internal(format!("cannot lock `{}`: {error}", path.display()));
        }
        let holder = Access::read(dir).map_or(String::new(), |a| format!(" (process {})", a.pid));
        let text = format!("a cluster runs in `{}` already{holder}", dir.display());
        CliError::new(ExitClass::Conflict, text)
            .with_hint("talk to it without --local, or choose another folder with --dir")
    })
}

/// Checks a job against its algorithm's schema, for the coordinator, which knows no tensors.
pub fn validate_job(spec: &JobSpec) -> std::result::Result<(), String> {
    let schema = algorithms::algorithm(&spec.algorithm).map_err(|e| e.to_string())?.schema();
    schema.resolve(&spec.hyperparameters).map_err(|e| e.to_string())?;
    schema.check_channels(&spec.channels).map_err(|e| e.to_string())
}

/// Refuses a store that cannot fence writers, before anything runs.
pub async fn probe_store(config: &ClusterConfig) -> Result<()> {
    let store = checkpoint::Store::open(&config.store, &config.store_uri())?;
    store.probe().await?;
    Ok(())
}

/// Refuses files that ranks could not use, before a worker runs.
pub fn probe_data_plane(config: &ClusterConfig) -> Result<()> {
    trainer::tcp_options(&DataPlane::of(config))?;
    Ok(())
}

fn client_tls(authority: &Authority) -> Result<TlsSection> {
    authority.issue("client")
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| CliError::usage(format!("cannot use the folder `{}`: {e}", path.display())))
}

fn bind(coordinators: u32, port: u16) -> Result<Vec<TcpListener>> {
    if ![1, 3, 5].contains(&coordinators) {
        return Err(CliError::usage(format!(
            "--coordinators {coordinators}: expected 1, 3 or 5; an even number tolerates no more \
             failures"
        )));
    }
    (0..coordinators)
        .map(|index| {
            let wanted = if port == 0 { Some(0) } else { port.checked_add(index as u16) };
            let wanted = wanted.ok_or_else(|| {
                CliError::usage(format!(
                    "--port {port} leaves no room for {coordinators} coordinators: ports end at \
                     65535"
                ))
            })?;
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, wanted));
            let listener = TcpListener::bind(address).map_err(|error| {
                let text = format!("cannot listen on {address}: {error}");
                CliError::new(ExitClass::Unavailable, text).with_hint(
                    "another cluster may be running: stop it, or choose other ports with --port",
                )
            })?;
            listener
                .set_nonblocking(true)
                .map_err(|e| CliError::internal(format!("cannot use {address}: {e}")))?;
            Ok(listener)
        })
        .collect()
}

fn members(listeners: &[TcpListener]) -> Result<Vec<Member>> {
    listeners
        .iter()
        .enumerate()
        .map(|(index, listener)| {
            let address = listener
                .local_addr()
                .map_err(|e| CliError::internal(format!("a listener has no address: {e}")))?;
            Ok(Member { node: NodeId(index as u64 + 1), address })
        })
        .collect()
}
