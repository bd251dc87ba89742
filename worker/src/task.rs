//! One task from start to end: its process, its control socket, its output, and the one exit event
//! that it always makes.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use api::config::{ServeSection, StoreSection};
use api::data_plane::DataPlane;
use api::environment::{SCRATCH_VARIABLE, TaskPlace, task_environment};
use api::flight::{FLIGHT_ENTRIES_MAX, FlightLog};
use api::session::{
    Assignment, ExitCause, FLIGHT_LAST, MESSAGE_BYTES_MAX, RankLine, RankOrder, RankReport,
    WorkerMessage,
};
use api::stacks::StackDump;
use api::{Generation, Name, Rank, Step, TaskId};
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::archive::Archive;
use crate::capture::Capture;
use crate::flight::FlightKeeper;
use crate::ledger::Ledger;
use crate::process::{Launch, Spawner, Started};
use crate::spool::Spooler;
use crate::stacks::{self, Answer, Subject};
use crate::stopped::StopWatch;
use crate::strays::{RankRecord, is_stopped};

/// Orders that a rank may leave unread; a rank that reads none of this many hangs.
pub(crate) const ORDER_QUEUE: usize = 1_024;
/// Longest report: it must fit a session frame together with its envelope.
const REPORT_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (64 << 10);
/// After a rank's end its pipes and its socket end too, unless a process that left its group holds
/// them open; that one is not waited for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// A rank that is to be killed gets this long to say what it was doing: its control thread answers at
/// once unless the process is stopped.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest message of an exit cause; it is recorded in the transaction log.
const MESSAGE_CHARS_MAX: usize = 1_024;
/// Credentials of the worker's environment that go to the rank by the socket only.
const SECRET_VARIABLES: [&str; 2] = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

/// Longest time that the leader has to hand a leaving rank's work over before the rank is asked to save
/// its state.
const HAND_OVER_MAX: Duration = Duration::from_secs(15);
/// Why a task is killed that was asked to leave.
pub(crate) const OVERSTAYED: &str = "it did not leave in time when asked to";

/// What all tasks of a worker share.
pub(crate) struct Surroundings {
    pub(crate) program: PathBuf,
    /// Time a task gets between being asked to leave and being killed.
    pub(crate) stop_timeout: Duration,
    /// Time after which a task whose process is stopped is killed; zero: never.
    pub(crate) stopped_timeout: Duration,
    /// Folder for data that ranks fetch.
    pub(crate) scratch: PathBuf,
    /// How ranks reach each other.
    pub(crate) data: DataPlane,
    pub(crate) store: StoreSection,
    pub(crate) serve: ServeSection,
    pub(crate) spawner: Spawner,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) spooler: Spooler,
    pub(crate) archive: Archive,
    pub(crate) flights: FlightKeeper,
}

/// What a process was last told to be; not always what it was started as.
struct PlaceNow {
    generation: AtomicU64,
    rank: AtomicU32,
}

impl PlaceNow {
    fn get(&self) -> (Generation, Rank) {
        let (generation, rank) = (&self.generation, &self.rank);
        (Generation(generation.load(Ordering::Relaxed)), Rank(rank.load(Ordering::Relaxed)))
    }

    fn subject(&self, pid: u32) -> Subject {
        let (generation, rank) = self.get();
        Subject { pid, generation, rank }
    }
}

/// How the agent reaches a running task.
pub(crate) struct TaskHandle {
    orders: mpsc::Sender<RankOrder>,
    kill: watch::Sender<Option<String>>,
    stop_timeout: Duration,
    /// 0 until its process runs.
    pid: Arc<AtomicU32>,
    place: Arc<PlaceNow>,
    stacks: Answer,
    /// Why this worker itself has told it to leave, once it has: that holds in every generation.
    sent_away: Arc<OnceLock<String>>,
    /// It waits beside its gang for a place in it, whatever generation that is in.
    is_spare: AtomicBool,
    is_rank: bool,
}

impl TaskHandle {
    /// The generation it was last told to be in: a process may outlive the one it was started in.
    pub(crate) fn generation(&self) -> Generation {
        self.place.get().0
    }

    /// It is told to be in another generation, perhaps as another rank.
    pub(crate) fn joins(&self, generation: Generation, rank: Rank) {
        self.place.generation.store(generation.0, Ordering::Relaxed);
        self.place.rank.store(rank.0, Ordering::Relaxed);
        self.is_spare.store(false, Ordering::Relaxed);
    }

    /// Whether it is part of a generation before this one.
    pub(crate) fn is_older(&self, generation: Generation) -> bool {
        self.generation() < generation && !self.is_spare.load(Ordering::Relaxed)
    }

    /// Passes an order on; a rank that does not read its orders, or does not leave in time when it
    /// is asked to, is killed. An order to leave is of the generation that it was given in: one to be
    /// part of another takes it back.
    pub(crate) fn deliver(&self, order: RankOrder) {
        if matches!(order, RankOrder::Stop { .. }) {
            self.kill_later(self.stop_timeout, Some(self.generation()));
        }
        let joins = matches!(order, RankOrder::Regroup(_));
        self.send(order);
        if let Some(reason) = self.sent_away.get().filter(|_| joins) {
            self.send(RankOrder::Stop { reason: reason.clone() });
        }
    }

    /// Has it leave, and ends it when it is still there after `limit`. A rank is first left to the
    /// leader, which may hand its work over without a pause; when nothing has come of that after a
    /// part of the time, it is asked to save its state and leave.
    pub(crate) fn stop(&self, reason: &str, limit: Duration) {
        self.kill_later(limit, None);
        let order = RankOrder::Stop { reason: reason.to_owned() };
        if !self.is_rank {
            return self.send(order);
        }
        let (kill, orders) = (self.kill.clone(), self.orders.clone());
        let (sent_away, reason) = (Arc::clone(&self.sent_away), reason.to_owned());
        let patience = (limit / 2).min(HAND_OVER_MAX);
        tokio::spawn(async move {
            if timeout(patience, kill.closed()).await.is_err() {
                // Noted first: an order to regroup that takes this one back has it said again.
                sent_away.get_or_init(|| reason);
                // A full queue: it reads nothing, and is killed when its time is up.
                let _ = orders.try_send(order);
            }
        });
    }

    /// Tells, from a task of its own, what its threads are in. `keep`: where that is kept too, with
    /// whose it is.
    pub(crate) fn tell_stacks(
        &self,
        keep: Option<(FlightKeeper, Name)>,
        told: impl FnOnce(Result<StackDump, String>) + Send + 'static,
    ) {
        let subject = self.place.subject(self.pid.load(Ordering::Relaxed));
        let (answer, orders, is_rank) = (self.stacks.clone(), self.orders.clone(), self.is_rank);
        tokio::spawn(async move {
            let ask = || is_rank && orders.try_send(RankOrder::Stacks).is_ok();
            let dump = match subject.pid {
                0 => Err("it is being started".to_owned()),
                _ => stacks::dump(subject, &answer, ask).await,
            };
            if let (Some((keeper, job)), Ok(dump)) = (&keep, &dump) {
                keeper.keep_stacks(job, dump);
            }
            told(dump);
        });
    }

    fn send(&self, order: RankOrder) {
        // A question must not be what ends a rank that reads no orders for a while.
        if matches!(order, RankOrder::Flight { .. }) && self.orders.capacity() < ORDER_QUEUE / 2 {
            return;
        }
        if let Err(mpsc::error::TrySendError::Full(_)) = self.orders.try_send(order) {
            self.kill(&format!("it left its last {ORDER_QUEUE} orders unread"));
        }
    }

    /// Ends it now; the first reason counts.
    pub(crate) fn kill(&self, reason: &str) {
        kill(&self.kill, reason);
    }

    /// Ends it when it is still there after `limit` and, where that is said, still part of the
    /// generation `of`.
    fn kill_later(&self, limit: Duration, of: Option<Generation>) {
        let (sender, place) = (self.kill.clone(), Arc::clone(&self.place));
        tokio::spawn(async move {
            let stays = timeout(limit, sender.closed()).await.is_err();
            if stays && of.is_none_or(|of| place.get().0 == of) {
                kill(&sender, OVERSTAYED);
            }
        });
    }

    /// Its process, when that is stopped and can do nothing.
    pub(crate) fn stopped(&self) -> Option<u32> {
        let pid = self.pid.load(Ordering::Relaxed);
        (pid > 0 && is_stopped(pid)).then_some(pid)
    }

    /// Whether nobody runs the task any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.kill.is_closed()
    }

    pub(crate) fn is_dying(&self) -> bool {
        self.kill.borrow().is_some()
    }
}

fn kill(sender: &watch::Sender<Option<String>>, reason: &str) {
    sender.send_if_modified(|held| {
        let is_first = held.is_none();
        held.get_or_insert_with(|| reason.to_owned());
        is_first
    });
}

/// A task to be run.
pub(crate) struct Task {
    id: TaskId,
    assignment: Box<Assignment>,
    record: PathBuf,
    shared: Arc<Surroundings>,
    orders: mpsc::Receiver<RankOrder>,
    /// For what this worker itself wants of the rank.
    own_orders: mpsc::Sender<RankOrder>,
    kill: watch::Receiver<Option<String>>,
    pid: Arc<AtomicU32>,
    place: Arc<PlaceNow>,
    stacks: Answer,
}

/// The credentials that a rank needs, out of the worker's environment where the file has none.
pub(crate) fn store_for_ranks(mut store: StoreSection, uri: String) -> StoreSection {
    store.uri = uri;
    // A rank may run in another folder.
    let key_file = &mut store.encryption.key_file;
    if let Ok(absolute) = std::path::absolute(&*key_file) {
        *key_file = absolute;
    }
    let from_environment = |name: &str| std::env::var(name).ok().map(api::Secret::new);
    let s3 = &mut store.s3;
    if s3.access_key_id.is_empty() {
        s3.access_key_id = std::env::var("AWS_ACCESS_KEY_ID").unwrap_or_default();
    }
    if s3.secret_access_key.is_none() {
        s3.secret_access_key = from_environment(SECRET_VARIABLES[0]);
        if s3.session_token.is_none() {
            s3.session_token = from_environment(SECRET_VARIABLES[1]);
        }
    }
    store
}

impl Task {
    pub(crate) fn new(
        id: TaskId,
        assignment: Box<Assignment>,
        record: PathBuf,
        shared: Arc<Surroundings>,
    ) -> (Self, TaskHandle) {
        let (orders_sender, orders) = mpsc::channel(ORDER_QUEUE);
        let (kill_sender, kill) = watch::channel(None);
        let stop_timeout = shared.stop_timeout;
        let own_orders = orders_sender.clone();
        let pid = Arc::new(AtomicU32::new(0));
        // One that waited for room may begin as another rank of a later generation than its name says.
        let rank = match &*assignment {
            Assignment::Train(train) => train.rank,
            Assignment::Serve(_) => id.rank,
        };
        let place = Arc::new(PlaceNow {
            generation: AtomicU64::new(assignment.generation().0),
            rank: AtomicU32::new(rank.0),
        });
        let stacks = Answer::default();
        let handle = TaskHandle {
            orders: orders_sender,
            kill: kill_sender,
            stop_timeout,
            pid: pid.clone(),
            place: Arc::clone(&place),
            stacks: stacks.clone(),
            sent_away: Arc::default(),
            is_spare: AtomicBool::new(assignment.is_spare()),
            is_rank: matches!(*assignment, Assignment::Train(_)),
        };
        let task =
            Self { id, assignment, record, shared, orders, own_orders, kill, pid, place, stacks };
        (task, handle)
    }

    /// Runs it to its end, which is in the ledger when this returns.
    pub(crate) async fn run(self) -> TaskId {
        let (id, ledger) = (self.id.clone(), self.shared.ledger.clone());
        let cause = match self.live().await {
            Ok(cause) => cause,
            Err(error) => ExitCause::NotStarted { reason: clip(&error.to_string()) },
        };
        info!(task = %id, %cause, "task ended");
        ledger.exited(&id, cause);
        id
    }

    async fn live(mut self) -> io::Result<ExitCause> {
        let (id, shared) = (self.id.clone(), self.shared.clone());
        let started = shared.spawner.spawn(self.launch()).await?;
        let Started { pid, guard, control, stdout, stderr, mut ended } = started;

        // Recorded before it is told anything, so that no rank computes unrecorded. Should this
        // fail, dropping the guard kills it.
        let (task, path) = (id.clone(), self.record.clone());
        let recorded = tokio::task::spawn_blocking(move || {
            RankRecord::of(&task, pid).and_then(|record| record.write(&path))
        });
        let recorded = recorded.await.map_err(io::Error::other).and_then(|written| written);
        recorded.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot write {}: {error}", self.record.display()))
        })?;
        info!(task = %id, pid, "task started");
        self.pid.store(pid, Ordering::Relaxed);
        shared.ledger.started(&id, pid);

        let give_up = CancellationToken::new();
        let capture = Capture::new(id.clone(), shared.ledger.clone(), shared.spooler.clone());
        let mut capture = tokio::spawn(capture.run(stdout, stderr, give_up.clone()));
        let (read, write) = UnixStream::from_std(control)?.into_split();
        let failed = Arc::new(Mutex::new(None));
        let said_last = Arc::new(Notify::new());
        let reader = Reader {
            id: id.clone(),
            ledger: shared.ledger.clone(),
            flights: shared.flights.clone(),
            kill: self.kill.clone(),
            failed: failed.clone(),
            said_last: said_last.clone(),
            stacks: self.stacks.clone(),
        };
        let mut reports = tokio::spawn(reader.run(read));
        let (_, nothing) = mpsc::channel(1);
        let first = self.assignment_order();
        let orders = std::mem::replace(&mut self.orders, nothing);
        let writer: JoinHandle<()> = tokio::spawn(write_orders(write, first, orders));
        shared.archive.follow(&id).await;

        let mut broken = None;
        let mut listening = true;
        // Until when a rank that is to be killed may say its last words.
        let mut dying: Option<Instant> = None;
        let mut stop_watch = StopWatch::new(pid, shared.stopped_timeout);
        let mut is_watched = true;
        let mut halted = None;
        let status = loop {
            tokio::select! {
                status = &mut ended => break status.unwrap_or_else(|_| {
                    // The waiting thread always answers.
                    ExitStatus::from_raw(Signal::SIGKILL as i32)
                }),
                Ok(()) = self.kill.changed() => match self.ask_for_last_words() {
                    true => dying = Some(Instant::now() + LAST_WORDS_TIMEOUT),
                    false => guard.0.kill(),
                },
                reason = stop_watch.stopped(), if is_watched => {
                    is_watched = false;
                    warn!(task = %id, reason, "killing a task that can do nothing");
                    // It cannot say what it was in; the kernel can, at once.
                    if let Ok(dump) = stacks::from_kernel(self.place.subject(pid), &reason) {
                        shared.flights.keep_stacks(&id.workload, &dump);
                    }
                    halted = Some(reason);
                    guard.0.kill();
                }
                () = said_last.notified(), if dying.is_some() => {
                    dying = None;
                    guard.0.kill();
                }
                () = sleep_until(dying.unwrap_or_else(Instant::now)), if dying.is_some() => {
                    dying = None;
                    guard.0.kill();
                }
                finished = &mut reports, if listening => {
                    listening = false;
                    if let Ok(Err(reason)) = finished {
                        warn!(task = %id, reason, "killing a rank that breaks the protocol");
                        broken = Some(reason);
                        guard.0.kill();
                    }
                }
            }
        };
        if listening && timeout(DRAIN_TIMEOUT, &mut reports).await.is_err() {
            reports.abort();
        }
        writer.abort();
        let last_error = match timeout(DRAIN_TIMEOUT, &mut capture).await {
            Ok(finished) => finished,
            Err(_) => {
                give_up.cancel();
                capture.await
            }
        };
        let last_error = last_error.map_err(io::Error::other).and_then(|read| read);
        shared.spooler.close(&id).await;
        shared.archive.ended(&id).await;
        let record = self.record.clone();
        if let Err(error) = tokio::fs::remove_file(&record).await {
            // Harmless: the next incarnation finds no such process.
            warn!(file = %record.display(), %error, "a rank's record cannot be removed");
        }
        let ordered = self.kill.borrow().clone().or(halted).or(broken);
        let failed = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(exit_cause(status, ordered, failed, &last_error.unwrap_or_default()))
    }

    /// Asks a rank for its last flight log; false when it cannot be asked.
    fn ask_for_last_words(&self) -> bool {
        let order = RankOrder::Flight { request: FLIGHT_LAST, entries: FLIGHT_ENTRIES_MAX as u32 };
        let can_answer = matches!(*self.assignment, Assignment::Train(_))
            && !is_stopped(self.pid.load(Ordering::Relaxed));
        can_answer && self.own_orders.try_send(order).is_ok()
    }

    fn launch(&self) -> Launch {
        let task = &self.id;
        let alone =
            TaskPlace { task, world_size: 1, local_rank: 0, local_world_size: 1, threads: 1 };
        let (role, place) = match &*self.assignment {
            Assignment::Train(train) => {
                let place = TaskPlace {
                    task,
                    world_size: train.world_size,
                    local_rank: train.local_rank,
                    local_world_size: train.local_world_size,
                    threads: train.spec.resources.threads_per_rank.get(),
                };
                ("rank", place)
            }
            Assignment::Serve(_) => match self.shared.serve.threads {
                0 => {
                    let here = std::thread::available_parallelism();
                    let threads = here.map_or(1, |cores| cores.get() as u32);
                    ("replica", TaskPlace { threads, ..alone })
                }
                threads => ("replica", TaskPlace { threads, ..alone }),
            },
        };
        let mut environment = task_environment(&place);
        let scratch = self.shared.scratch.to_string_lossy().into_owned();
        environment.insert(SCRATCH_VARIABLE, scratch);
        let program = self.shared.program.clone();
        Launch { program, role, environment, without: &SECRET_VARIABLES }
    }

    fn assignment_order(&self) -> RankOrder {
        RankOrder::Assignment {
            assignment: self.assignment.clone(),
            store: self.shared.store.clone(),
            data: self.shared.data.clone(),
            serve: self.shared.serve.clone(),
        }
    }
}

/// What a rank says of itself before it exits with a code.
struct Failed {
    message: String,
    retryable: bool,
    damaged: Option<Step>,
}

/// Reads reports into the ledger.
struct Reader {
    id: TaskId,
    ledger: Arc<Ledger>,
    flights: FlightKeeper,
    /// Why the task is to be killed, when it is.
    kill: watch::Receiver<Option<String>>,
    failed: Arc<Mutex<Option<Failed>>>,
    /// Wakes when the task's last flight log is here.
    said_last: Arc<Notify>,
    stacks: Answer,
}

impl Reader {
    /// Until the rank's end of the socket is closed; fails when it says something unintelligible.
    async fn run(self, socket: OwnedReadHalf) -> Result<(), String> {
        let mut socket = BufReader::new(socket);
        let mut line = Vec::new();
        loop {
            line.clear();
            let mut bounded = (&mut socket).take(REPORT_BYTES_MAX as u64 + 1);
            let read = bounded.read_until(b'\n', &mut line).await;
            if line.last() != Some(&b'\n') {
                if line.len() > REPORT_BYTES_MAX {
                    return Err(format!("it sent a report of more than {REPORT_BYTES_MAX} bytes"));
                }
                // Closed, perhaps in the middle of a line because it was killed.
                drop(read);
                return Ok(());
            }
            let line: RankLine = serde_json::from_slice(&line)
                .map_err(|error| format!("it sent what is not a report: {error}"))?;
            match line {
                RankLine { report: RankReport::Flight { request, log }, .. } => {
                    self.flight(request, log);
                }
                RankLine { report: RankReport::Stacks { threads, absent }, .. } => {
                    self.stacks.give((threads, absent));
                }
                line => {
                    if let RankReport::Failed { message, retryable, damaged, .. } = &line.report {
                        let (message, retryable) = (message.clone(), *retryable);
                        let failed = Failed { message, retryable, damaged: *damaged };
                        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(failed);
                    }
                    self.ledger.report(&self.id, line);
                }
            }
        }
    }

    /// A flight log is no fact: it goes to whoever asked, and the last one to the store.
    fn flight(&self, request: u64, log: Option<Box<FlightLog>>) {
        if request != FLIGHT_LAST {
            let task = self.id.clone();
            let why = match log {
                Some(_) => String::new(),
                None => "it has just been started".to_owned(),
            };
            return self.ledger.answer(&WorkerMessage::Flight { request, task, log, why });
        }
        if let Some(mut log) = log {
            let killed = || self.kill.borrow().as_ref().map(|why| format!("killed: {why}"));
            log.ending = log.ending.take().or_else(killed);
            self.flights.keep(&self.id, &log);
        }
        self.said_last.notify_one();
    }
}

/// Writes orders until the rank closes its end. The agent's queue to it is bounded, so this may
/// wait for a rank that reads slowly.
async fn write_orders(
    mut socket: OwnedWriteHalf,
    first: RankOrder,
    mut orders: mpsc::Receiver<RankOrder>,
) {
    let mut next = Some(first);
    while let Some(order) = next {
        // An order of ours always serialises: its maps have text keys.
        let Ok(mut line) = serde_json::to_vec(&order) else { return };
        line.push(b'\n');
        if socket.write_all(&line).await.is_err() {
            break;
        }
        next = orders.recv().await;
    }
    // What comes now cannot reach it any more; the agent must not see a full queue.
    while orders.recv().await.is_some() {}
    drop(socket);
}

fn clip(text: &str) -> String {
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}

fn exit_cause(
    status: ExitStatus,
    ordered: Option<String>,
    failed: Option<Failed>,
    last_error: &str,
) -> ExitCause {
    match (status.code(), status.signal(), ordered) {
        (_, Some(signal), Some(reason)) if signal == Signal::SIGKILL as i32 => {
            ExitCause::Killed { reason: clip(&reason) }
        }
        (Some(0), ..) => ExitCause::Completed,
        (Some(code), ..) => {
            let (message, retryable, damaged) = failed
                .map_or((last_error.to_owned(), true, None), |f| {
                    (f.message, f.retryable, f.damaged)
                });
            ExitCause::Code { code, message: clip(&message), retryable, damaged }
        }
        (None, signal, _) => {
            let message = failed.map_or_else(|| last_error.to_owned(), |failed| failed.message);
            ExitCause::Signal { signal: signal.unwrap_or(0), message: clip(&message) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_end_has_its_cause() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        let signalled = ExitStatus::from_raw;
        let order = || Some("superseded".to_owned());
        let said =
            |retryable| Some(Failed { message: "said".into(), retryable, damaged: Some(Step(7)) });
        let table = [
            (exit_cause(exited(0), None, None, "x"), "completed"),
            // It was already gone when the order came.
            (exit_cause(exited(0), order(), None, "x"), "completed"),
            (exit_cause(exited(3), order(), None, "x"), "exited with code 3: x"),
            (exit_cause(exited(2), None, said(false), "x"), "exited with code 2: said"),
            (exit_cause(signalled(9), None, None, "x"), "killed by signal 9 (SIGKILL): x"),
            (exit_cause(signalled(9), order(), None, "x"), "stopped by its worker: superseded"),
            // A crash is a crash, whatever was ordered meanwhile.
            (exit_cause(signalled(11), order(), None, ""), "killed by signal 11 (SIGSEGV)"),
        ];
        for (cause, text) in table {
            assert_eq!(cause.to_string(), text);
        }
        assert!(!exit_cause(exited(2), None, said(false), "").is_retryable());
        assert!(exit_cause(exited(2), None, None, "").is_retryable());
        let told = exit_cause(exited(2), None, said(false), "");
        assert!(matches!(told, ExitCause::Code { damaged: Some(Step(7)), .. }), "{told:?}");
    }
}
