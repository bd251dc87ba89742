//! The worker as a whole: what it needs, its start in safe order, its loop and its polite end.

use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::config::ClusterConfig;
use api::data_plane::DataPlane;
use api::session::{CoordinatorMessage, LeaveScope, WorkerHello};
use api::{Name, Secret};
use checkpoint::Store;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::agent::Agent;
use crate::archive::Archive;
use crate::error::WorkerError;
use crate::flight::FlightKeeper;
use crate::folder::Folder;
use crate::health::{Checks, HostCheck};
use crate::leave::{Leave, Leaves, task_limit};
use crate::ledger::Ledger;
use crate::notice::{Notice, Notices, Urgency};
use crate::process::Spawner;
use crate::session::{Session, SessionOptions};
use crate::spool::Spooler;
use crate::strays;
use crate::task::{OVERSTAYED, Surroundings, store_for_ranks};

/// Orders that wait for the agent, which takes each without waiting for anything.
const ORDER_QUEUE: usize = 256;
/// At the end, time for the leader to take the last facts; the next leader learns of lost ones by
/// the end of the lease.
const FACTS_TIMEOUT: Duration = Duration::from_secs(5);
/// At the end, time for the store to take the last lines; what it does not take, the next
/// incarnation uploads.
const LOGS_TIMEOUT: Duration = Duration::from_secs(10);
/// A process that is being killed is looked after this often.
const KILL_INTERVAL: Duration = Duration::from_secs(1);
/// Kills after which the worker ends without the task: it hangs in the kernel. Its record stays, so
/// the next incarnation refuses to start beside it.
const KILLS_MAX: u32 = 10;
/// Why tasks end when the worker does.
const STOP_REASON: &str = "the worker is shutting down";
/// Why a worker leaves that had a signal, to stand behind "`w2` is leaving: ".
const TOLD_TO_END: &str = "its process was told to end";

/// What a worker needs.
pub struct WorkerOptions {
    /// The whole cluster.toml.
    pub config: ClusterConfig,
    /// The worker's name, unique in the cluster.
    pub name: Name,
    /// Ranks it may run at once; at least 1.
    pub slots: u32,
    /// Coordinators to try in turn; whichever answers names the leader.
    pub coordinators: Vec<SocketAddr>,
    /// The cluster token.
    pub token: Secret,
    /// The cluster binary, started as `rank` and `replica`.
    pub program: PathBuf,
    /// This worker's folder; one worker at a time.
    pub dir: PathBuf,
}

/// The agent of one host.
pub struct Worker;

impl Worker {
    /// Runs until `shutdown` or a notice that the host is to be reclaimed, then stops its tasks politely
    /// and returns. Else only a refusal by the cluster ends it; tasks do not outlive it.
    pub async fn run(
        options: WorkerOptions,
        shutdown: CancellationToken,
    ) -> Result<(), WorkerError> {
        if options.coordinators.is_empty() {
            return Err(WorkerError::Options("no coordinator's address is given".into()));
        }
        if options.slots == 0 {
            return Err(WorkerError::Options("a worker needs at least 1 slot, found 0".into()));
        }
        // Certificates that cannot be read now would only look like an unreachable cluster later.
        for address in &options.coordinators {
            api::connect::endpoint(*address, &options.config.tls)?;
        }
        let config = &options.config;
        let folder = open_folder(options.dir.clone()).await?;
        let uri = config.store_uri();
        let store = Store::open(&config.store, &uri)?;
        let thread = |source| WorkerError::io("start a thread for", &options.dir, source);
        let spooler = Spooler::start(folder.logs(), config.worker.log_bytes.0).map_err(thread)?;
        let flights = FlightKeeper::new(store.clone());
        let archive = Archive::start(store, folder.logs(), spooler.grown.clone());
        let ledger = Arc::new(Ledger::new());
        let shared = Arc::new(Surroundings {
            stop_timeout: config.worker.stop_timeout.0,
            stopped_timeout: config.worker.stopped_rank_timeout.0,
            scratch: options.dir.join("scratch"),
            program: options.program.clone(),
            data: DataPlane::of(config),
            store: store_for_ranks(config.store.clone(), uri),
            serve: config.serve.clone(),
            spawner: Spawner::start().map_err(thread)?,
            ledger: ledger.clone(),
            spooler,
            archive: archive.clone(),
            flights: flights.clone(),
        });
        let agent = Agent::new(folder, options.slots, shared);
        let (orders, inbox) = mpsc::channel(ORDER_QUEUE);
        let session = Session::new(session_options(&options)?, ledger.clone(), orders);
        let stop_timeout = config.worker.stop_timeout.0;
        let notices = Notices::start(&config.worker.notices);
        info!(worker = %options.name, slots = options.slots, "worker starts");
        let leaves = Leaves::default();
        let address = config.worker.data_address;
        let check = HostCheck::new(options.dir.clone(), address, options.program.clone());
        let checks = Checks::new(check, ledger.clone());
        let running = Running {
            agent,
            inbox,
            ledger,
            archive,
            flights,
            notices,
            leaves,
            checks,
            stop_timeout,
        };
        running.run(session, shutdown).await
    }
}

/// Takes the folder and clears what a former incarnation left, before anything else may happen.
async fn open_folder(dir: PathBuf) -> Result<Folder, WorkerError> {
    let path = dir.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let folder = Folder::open(&dir)?;
        strays::clear(&folder)?;
        Ok(folder)
    });
    let failed = |error| WorkerError::io("open", path, std::io::Error::other(error));
    opened.await.map_err(failed)?
}

fn session_options(options: &WorkerOptions) -> Result<SessionOptions, WorkerError> {
    let random = PathBuf::from("/dev/urandom");
    let mut drawn = [0; 8];
    fs::File::open(&random)
        .and_then(|mut file| file.read_exact(&mut drawn))
        .map_err(|source| WorkerError::io("read", random, source))?;
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let hello = WorkerHello {
        cluster_id: options.config.cluster.id.clone(),
        token: options.token.clone(),
        name: options.name.clone(),
        host: host.trim().to_owned(),
        slots: options.slots,
        price: options.config.worker.host_price(),
        unhealthy: None,
        incarnation: u64::from_le_bytes(drawn),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tasks: Vec::new(),
    };
    let (coordinators, tls) = (options.coordinators.clone(), options.config.tls.clone());
    Ok(SessionOptions { hello, coordinators, tls })
}

/// A started worker.
struct Running {
    agent: Agent,
    inbox: mpsc::Receiver<CoordinatorMessage>,
    ledger: Arc<Ledger>,
    archive: Archive,
    flights: FlightKeeper,
    notices: Notices,
    leaves: Leaves,
    checks: Checks,
    stop_timeout: Duration,
}

impl Running {
    async fn run(
        mut self,
        session: Session,
        shutdown: CancellationToken,
    ) -> Result<(), WorkerError> {
        // Cancelled when this returns or is dropped, so that no session outlives the worker.
        let stop_session = CancellationToken::new();
        let _guard = stop_session.clone().drop_guard();
        let mut session = tokio::spawn(session.run(stop_session.clone()));
        let (mut deadline, mut kills) = (None, 0);
        let mut result = Ok(());
        loop {
            if deadline.is_some() && self.agent.is_idle() {
                break;
            }
            if kills > KILLS_MAX {
                error!("a rank does not end although it was killed: it hangs in the kernel");
                break;
            }
            let killing = deadline.unwrap_or_else(Instant::now);
            tokio::select! {
                Some(order) = self.inbox.recv() => self.order(order),
                () = self.agent.task_ended() => {}
                () = shutdown.cancelled(), if deadline.is_none() => {
                    info!("worker stops");
                    deadline = Some(self.end(TOLD_TO_END, STOP_REASON, None));
                }
                notice = self.notices.changed(), if deadline.is_none() => {
                    deadline = self.heed(notice);
                }
                () = sleep_until(killing), if deadline.is_some() => {
                    self.agent.kill_all(OVERSTAYED);
                    kills += 1;
                    deadline = Some(Instant::now() + KILL_INTERVAL);
                }
                ended = &mut session, if result.is_ok() => {
                    // Only a refusal ends a session that nobody stopped, and only before the first
                    // welcome, so no task runs.
                    result = match ended {
                        Ok(Err(error)) => Err(error),
                        Ok(Ok(())) => Err(WorkerError::Bug("its session ended".into())),
                        Err(panic) => Err(WorkerError::Bug(panic.to_string())),
                    };
                    self.agent.kill_all("its worker was refused by the cluster");
                    self.agent.stop(STOP_REASON, self.stop_timeout);
                    deadline = Some(Instant::now() + self.stop_timeout);
                }
            }
        }
        let (archive, flights) = (self.archive.clone(), self.flights.clone());
        let flush_logs = async move {
            let all = async { tokio::join!(archive.flush(), flights.finish()) };
            if timeout(LOGS_TIMEOUT, all).await.is_err() {
                warn!("the object store did not take the last output; it waits on disk");
            }
        };
        if result.is_ok() {
            tokio::join!(self.last_facts(), flush_logs);
        } else {
            flush_logs.await;
        }
        stop_session.cancel();
        if result.is_ok() {
            // It ends at once when told to.
            let _ = session.await;
            self.notices.has_left().await;
        }
        result
    }

    /// Begins to end: when the tasks have to be gone. `left`: until the host is.
    fn end(&mut self, cause: &str, reason: &str, left: Option<Duration>) -> Instant {
        let limit = task_limit(self.stop_timeout, left);
        let deadline = left.map(|left| Instant::now() + left);
        self.leaves.end =
            Some(Leave { scope: LeaveScope::Ends, cause: cause.to_owned(), deadline });
        // First of all: what follows is then nobody's failure.
        self.ledger.leave(self.leaves.word());
        self.agent.stop(reason, limit);
        Instant::now() + limit
    }

    /// Acts on what is announced to this host now; none: nothing is any more. When the tasks have to
    /// be gone, if they have to.
    fn heed(&mut self, notice: Option<Notice>) -> Option<Instant> {
        match notice {
            Some(notice) if notice.urgency == Urgency::Leave => {
                info!(cause = notice.cause, "worker leaves");
                let reason = format!("the worker is leaving: {}", notice.cause);
                return Some(self.end(&notice.cause, &reason, notice.left()));
            }
            notice => {
                self.leaves.avoid = notice.map(|notice| Leave {
                    scope: LeaveScope::Avoided,
                    deadline: notice.left().map(|left| Instant::now() + left),
                    cause: notice.cause,
                });
                self.ledger.leave(self.leaves.word());
            }
        }
        None
    }

    fn order(&mut self, order: CoordinatorMessage) {
        match order {
            // It does more than that already.
            CoordinatorMessage::Drain { .. } | CoordinatorMessage::Undrain
                if self.leaves.end.is_some() =>
            {
                self.ledger.leave_again();
            }
            CoordinatorMessage::Drain { deadline, reason } => {
                info!(reason, "worker drains");
                let limit = task_limit(self.stop_timeout, deadline.map(|span| span.0));
                let deadline = deadline.map(|span| Instant::now() + span.0);
                let cause = reason.clone();
                self.leaves.drain = Some(Leave { scope: LeaveScope::Drains, cause, deadline });
                self.ledger.leave(self.leaves.word());
                self.ledger.leave_again();
                self.agent.stop(&reason, limit);
            }
            CoordinatorMessage::Undrain => {
                info!("worker takes tasks again");
                self.leaves.drain = None;
                self.ledger.leave(self.leaves.word());
                self.ledger.leave_again();
                self.agent.reopen();
            }
            CoordinatorMessage::Check { request, reason } => self.checks.begin(request, &reason),
            order => self.agent.order(order),
        }
    }

    /// Returns when the leader has acknowledged every fact and the leave, or time is up. What it
    /// still orders is answered.
    async fn last_facts(&mut self) {
        let mut changes = self.ledger.subscribe();
        let deadline = Instant::now() + FACTS_TIMEOUT;
        while self.ledger.facts_left() > 0 || self.ledger.leave_is_unknown() {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    return;
                },
                Some(order) = self.inbox.recv() => self.order(order),
                () = sleep_until(deadline) => {
                    let facts = self.ledger.facts_left();
                    return warn!(facts, "no coordinator took the last facts");
                }
            }
        }
    }
}
