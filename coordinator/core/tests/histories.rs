//! Random histories: one seed gives jobs, workers, faults and their order; what must hold is checked
//! after every step (here and in `support`), then the faults end and everything must come to rest.
//!
//! Workers are modelled as the real ones behave: facts are kept until acknowledged and repeated
//! after a reconnect, a task stays in the inventory until its exit is acknowledged, orders arrive in
//! their order or not at all. Ranks form a group when all of them are there, take the newest state that
//! one of them holds, and hold it only once they have it whole; some hang, until they are killed; on
//! one host they may compute otherwise. To repeat a failing history, with a trace:
//! `COHORT_SEED=<seed>`; for more of them than usual: `COHORT_HISTORIES=<how many>`.

mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

use api::events::{CheckpointFact, ModelFact, StepMetrics, StepTime};
use api::ids::{Generation, Name, Rank, Secret, Step as TrainStep, TaskId};
use api::job::JobSpec;
use api::price::HostPrice;
use api::records::{
    CheckpointRecord, EndpointSpec, KIND_CHECKPOINT, KIND_ENDPOINT, KIND_JOB, KIND_MODEL, Moment,
    Phase,
};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, LeaveScope, RankOrder, RankReport, Regroup,
    StopCause, TaskEvent, TaskView, WorkerHello, WorkerMessage,
};
use coordinator_core::{Effect, Input, Millis, Records, Retention, SessionId, Transaction};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use support::{LEASE_MS, Shell, metrics};

const HISTORIES: u64 = 100;
const STEPS: usize = 400;
const JOBS: [&str; 4] = ["a", "b", "c", "d"];
/// One shares its name with a job.
const ENDPOINTS: [&str; 2] = ["a", "e"];
/// Rounds of the end after which a model is deployed, and after which endpoints are stopped.
const DEPLOY_ROUND: u32 = 20;
const STOP_ROUND: u32 = 40;
/// The stage of a rank in a group that has formed: the state is on its way.
const RECEIVES: u8 = 2;
/// The stage of one that makes steps.
const RUNS: u8 = 3;
/// The stage of a spare that is ready.
const IDLE: u8 = 9;

#[test]
#[expect(clippy::disallowed_methods, reason = "the seed to repeat comes from the environment")]
fn random_histories_keep_the_invariants_and_come_to_rest() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let given = number("COHORT_SEED");
    let all = number("COHORT_HISTORIES").unwrap_or(HISTORIES);
    let seeds = given.map_or(0..all, |seed: u64| seed..seed + 1);
    let mut seen = Seen::default();
    for seed in seeds {
        println!("COHORT_SEED={seed}");
        let history = play(seed);
        seen.add(&history);
        check_log(seed, &history.shell.log, &history.shell.records);
    }
    println!("{seen:?}");
    // A generator that no longer reaches these cases tests nothing.
    if given.is_none() {
        assert!(seen.succeeded > 0 && seen.failed > 0 && seen.stopped > 0, "{seen:?}");
        assert!(seen.restarts > HISTORIES / 2 && seen.checkpoints > HISTORIES, "{seen:?}");
        assert!(seen.regroups > HISTORIES / 2, "{seen:?}");
        assert!(seen.leaders > HISTORIES && seen.endpoints > HISTORIES / 4, "{seen:?}");
        assert!(seen.swept > HISTORIES, "{seen:?}");
        assert!(seen.leaves > HISTORIES / 2 && seen.drains > HISTORIES / 4, "{seen:?}");
        assert!(seen.checks > HISTORIES / 2 && seen.unheard > HISTORIES / 2, "{seen:?}");
        assert!(seen.cut_short > 0 && seen.received > HISTORIES / 4, "{seen:?}");
        assert!(seen.joined > 0 && seen.went_back > 0, "{seen:?}");
        assert!(seen.hangs > HISTORIES / 10 && seen.diagnoses > HISTORIES / 4, "{seen:?}");
    }
}

#[test]
fn one_seed_gives_the_same_log_twice() {
    let bytes =
        |seed| -> Vec<Vec<u8>> { play(seed).shell.log.iter().map(Transaction::encode).collect() };
    for seed in [3, 14, 15] {
        assert_eq!(bytes(seed), bytes(seed), "COHORT_SEED={seed}");
    }
}

/// How much of the interesting has happened.
#[derive(Debug, Default)]
struct Seen {
    succeeded: u64,
    failed: u64,
    stopped: u64,
    restarts: u64,
    regroups: u64,
    checkpoints: u64,
    leaders: u64,
    leaves: u64,
    drains: u64,
    checks: u64,
    unheard: u64,
    received: u64,
    joined: u64,
    cut_short: u64,
    hangs: u64,
    diagnoses: u64,
    went_back: usize,
    endpoints: u64,
    swept: u64,
}

impl Seen {
    fn add(&mut self, history: &History) {
        for job in history.shell.jobs() {
            match job.status.phase {
                Phase::Succeeded => self.succeeded += 1,
                Phase::Failed => self.failed += 1,
                Phase::Stopped => self.stopped += 1,
                other => panic!("at rest, a job is {other}: {:?}", job.status),
            }
            self.restarts += job.status.restarts - job.status.regroups;
            self.regroups += job.status.regroups;
            let went_back = |moment: &&Moment| moment.text.contains("going back to the checkpoint");
            self.went_back += job.status.history.iter().filter(went_back).count();
        }
        self.checkpoints += history.checkpoints;
        self.leaders += history.leaders;
        self.leaves += history.leaves;
        self.drains += history.drains;
        self.checks += history.checks;
        self.unheard += history.unheard;
        self.received += history.received;
        self.joined += history.joined;
        self.cut_short += history.cut_short;
        self.hangs += history.hangs;
        self.diagnoses += history.diagnosed;
        self.endpoints += history.shell.endpoints().len() as u64;
        self.swept += history.swept;
    }
}

/// Applied twice, or cut anywhere and restored from a snapshot, the log gives the same records.
fn check_log(seed: u64, log: &[Transaction], records: &Records) {
    let mut first = Records::default();
    let mut second = Records::default();
    let cut = (seed as usize * 7) % (log.len() + 1);
    for (index, transaction) in log.iter().enumerate() {
        if index == cut {
            second = Records::restore(&second.snapshot()).expect("restores");
            assert_eq!(first, second, "COHORT_SEED={seed}: after a snapshot");
        }
        let index = index as u64 + 1;
        assert_eq!(first.apply(index, transaction), second.apply(index, transaction));
    }
    assert_eq!(first, second, "COHORT_SEED={seed}");
    assert_eq!(&first, records, "COHORT_SEED={seed}");
    assert_eq!(first.snapshot(), records.snapshot(), "COHORT_SEED={seed}");
}

/// A task as its worker knows it.
#[derive(Debug)]
struct Running {
    assignment: Assignment,
    /// The generation it is part of, and as what; none as a spare.
    generation: Generation,
    rank: Option<Rank>,
    world_size: u32,
    /// The step of the state that it holds whole.
    held: Option<u64>,
    /// The step of the checkpoint that the leader named for this generation.
    restore: Option<u64>,
    /// The step that its group has agreed on.
    origin: u64,
    /// It does nothing and hears nothing any more.
    hangs: bool,
    /// It is to leave its group at its next step, or has and waits.
    is_pausing: bool,
    waits: bool,
    address: Option<SocketAddr>,
    has_peers: bool,
    stage: u8,
    is_stopping: bool,
    /// It runs and waits for its state.
    is_joining: bool,
}

/// One worker: what runs on it, and what the leader has not acknowledged.
#[derive(Debug, Default)]
struct SimWorker {
    incarnation: u64,
    slots: u32,
    session: Option<SessionId>,
    is_frozen: bool,
    /// Told to end: it starts nothing more, and comes back as a new incarnation.
    is_leaving: bool,
    /// Told to drain: it starts nothing more until it is told otherwise.
    is_draining: bool,
    /// Told to drain, or to stay, while it was stopped: it hears that in this session when it goes on.
    late: Option<bool>,
    /// A client was told that it is to drain, and not since that it is not.
    asked_to_drain: bool,
    /// It was told to check its host, and the check has not passed.
    unhealthy: Option<String>,
    /// When a leader last had a word of it.
    heard: Option<Millis>,
    tasks: BTreeMap<TaskId, Running>,
    facts: VecDeque<(TaskId, TaskEvent)>,
    /// Delivered in this session; the acknowledgement may be lost with it.
    sent: Vec<(TaskId, TaskEvent)>,
}

impl SimWorker {
    fn exits(&self) -> impl Iterator<Item = &TaskId> {
        let is_exit = |(_, event): &&(TaskId, TaskEvent)| matches!(event, TaskEvent::Exited { .. });
        self.facts.iter().filter(is_exit).map(|(task, _)| task)
    }

    fn report(&mut self, task: &TaskId, report: RankReport) {
        let generation = self.tasks.get(task).map_or(task.generation, |task| task.generation);
        self.facts.push_back((task.clone(), TaskEvent::Report { generation, report }));
    }

    fn end(&mut self, task: &TaskId, cause: ExitCause) {
        self.tasks.remove(task);
        self.facts.push_back((task.clone(), TaskEvent::Exited { cause }));
    }
}

impl Running {
    /// It is part of another generation from now on, with the state it holds.
    fn join(&mut self, next: Regroup) {
        self.generation = next.generation;
        self.rank = Some(next.rank);
        self.world_size = next.world_size;
        (self.is_pausing, self.waits) = (false, false);
        self.restore = next.restore.map(|fact| fact.step.0);
        (self.stage, self.address, self.has_peers) = (0, None, false);
    }
}

struct History {
    shell: Shell,
    random: ChaCha8Rng,
    is_busy: bool,
    /// One of the hosts computes otherwise than the others.
    is_mixed: bool,
    /// No more faults.
    is_resting: bool,
    workers: BTreeMap<&'static str, SimWorker>,
    sessions: u64,
    searches: VecDeque<(Name, Generation, Option<TrainStep>)>,
    /// Gangs whose flight logs the leader wants to see.
    diagnoses: VecDeque<(Name, Generation)>,
    /// Sweeps of the store that were asked for, with the records of that time.
    sweeps: VecDeque<(Name, Option<Generation>, Records)>,
    /// In the store: job, generation, step, and whether it is complete.
    stored: Vec<(Name, Generation, u64, bool)>,
    swept: u64,
    checkpoints: u64,
    leaders: u64,
    leaves: u64,
    drains: u64,
    checks: u64,
    unheard: u64,
    received: u64,
    joined: u64,
    cut_short: u64,
    hangs: u64,
    diagnosed: u64,
}

fn play(seed: u64) -> History {
    let shell = Shell::new();
    let mut history = History {
        shell,
        random: ChaCha8Rng::seed_from_u64(seed),
        is_busy: !seed.is_multiple_of(2),
        is_mixed: seed.is_multiple_of(5),
        is_resting: false,
        workers: BTreeMap::new(),
        sessions: 0,
        searches: VecDeque::new(),
        diagnoses: VecDeque::new(),
        sweeps: VecDeque::new(),
        stored: Vec::new(),
        swept: 0,
        checkpoints: 0,
        leaders: 1,
        leaves: 0,
        drains: 0,
        checks: 0,
        unheard: 0,
        received: 0,
        joined: 0,
        cut_short: 0,
        hangs: 0,
        diagnosed: 0,
    };
    for (name, slots) in [("w1", 1), ("w2", 2), ("w3", 3)] {
        history.workers.insert(name, SimWorker { slots, incarnation: 1, ..SimWorker::default() });
    }
    for _ in 0..STEPS {
        history.step();
    }
    history.rest();
    history
}

impl History {
    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn pick(&mut self) -> &'static str {
        ["w1", "w2", "w3"][self.below(3) as usize]
    }

    fn step(&mut self) {
        // In every second history ranks come to run, and then die: gangs regroup.
        if self.is_busy && self.below(100) >= 8 {
            match self.below(100) {
                0..4 => self.accident(),
                4..10 => self.pass(),
                10..13 => self.submit(),
                13..14 => self.new_leader(),
                14..60 => self.progress(),
                _ => {
                    for name in ["w1", "w2", "w3"] {
                        if self.workers[name].session.is_none() {
                            self.attach(name);
                        }
                        self.deliver_one(name);
                    }
                }
            }
            return;
        }
        match self.below(100) {
            0..4 => self.submit(),
            4..6 => self.client_stop(),
            6..8 => self.client_resume(),
            8..10 => self.deploy(),
            10..25 => self.pass(),
            25..33 => {
                let worker = self.pick();
                self.attach(worker);
            }
            33..35 => {
                let worker = self.pick();
                self.detach(worker);
            }
            35..36 => {
                let worker = self.pick();
                self.restart(worker);
            }
            36..38 => {
                let worker = self.pick();
                match self.below(3) {
                    0 => self.leave(worker),
                    1 => self.client_drain(worker),
                    _ => self.client_undrain(worker),
                }
            }
            38..39 => {
                let worker = self.pick();
                let state = self.workers.get_mut(worker).expect("a worker");
                match state.is_frozen {
                    true => self.thaw(worker),
                    false => state.is_frozen = true,
                }
            }
            39..40 => self.new_leader(),
            40..43 => self.accident(),
            43..45 => self.search_answers(),
            45..46 => self.diagnosis(),
            46..50 => self.sweep(),
            50..70 => self.progress(),
            _ => {
                let worker = self.pick();
                self.deliver_one(worker);
            }
        }
    }

    // ---- clients ----------------------------------------------------------------------------

    fn submit(&mut self) {
        let name = JOBS[self.below(4) as usize];
        let most = 1 + self.below(5);
        let ranks = match self.below(2) {
            0 => most.to_string(),
            _ => format!("{{ min = {}, max = {most} }}", 1 + self.below(most)),
        };
        let best = match self.below(3) {
            0 => {
                "keep_best = { metric = \"validation:loss\", mode = \"min\", count = 2 }\n\
                 [evaluate]\nevery_steps = 1\n"
            }
            _ => "",
        };
        let text = format!(
            "name = \"{name}\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 30\n\
             [resources]\nranks = {ranks}\n[checkpoint]\nevery_steps = 1\nkeep = {}\nkeep_every_steps = {}\n{best}\
             [recovery]\nmax_failures = {}\nspares = {}\nwait_for_replacement = \"{}s\"\n\
             hang_min = \"1s\"\n",
            1 + self.below(2),
            self.below(4),
            self.below(3),
            self.below(2),
            self.below(2)
        );
        let folder = std::path::Path::new("/data");
        let spec = JobSpec::parse(&text, "job.toml", folder, &[]).expect("a job");
        self.feed(Input::Submit { spec });
    }

    fn client_stop(&mut self) {
        let is_job = self.below(4) > 0;
        let name = if is_job { JOBS[self.below(4) as usize] } else { self.some_endpoint() };
        let kind = if is_job { KIND_JOB } else { KIND_ENDPOINT };
        self.feed(Input::Stop { kind: kind.into(), name: name.parse().expect("a name") });
    }

    fn client_resume(&mut self) {
        let name = JOBS[self.below(4) as usize].parse().expect("a name");
        self.feed(Input::Resume { name });
    }

    fn client_drain(&mut self, name: &'static str) {
        self.feed(Input::Drain { worker: name.parse().expect("a name"), deadline_ms: None });
    }

    fn client_undrain(&mut self, name: &'static str) {
        self.feed(Input::Undrain { worker: name.parse().expect("a name") });
    }

    /// What a client was told of a worker holds for as long as that worker lives.
    fn note_asked(&mut self, input: &Input) {
        let (worker, drains) = match input {
            Input::Drain { worker, .. } => (worker, true),
            Input::Undrain { worker } => (worker, false),
            _ => return,
        };
        let state = self.workers.iter_mut().find(|(name, _)| **name == worker.as_str());
        state.expect("a worker").1.asked_to_drain = drains;
    }

    fn some_endpoint(&mut self) -> &'static str {
        ENDPOINTS[self.below(2) as usize]
    }

    fn deploy(&mut self) {
        let models: Vec<String> =
            self.shell.records.list(KIND_MODEL, "").map(|(key, _)| key.id.clone()).collect();
        let Some(model) = models.first() else { return };
        let spec = EndpointSpec {
            name: self.some_endpoint().parse().expect("a name"),
            model: model.parse().expect("a name"),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        self.feed(Input::Deploy { spec });
    }

    // ---- faults -----------------------------------------------------------------------------

    /// Time goes by, and whoever can sends a heartbeat.
    fn pass(&mut self) {
        self.shell.now = self.shell.now.plus(self.below(2_000));
        for name in ["w1", "w2", "w3"] {
            let worker = &self.workers[name];
            if let Some(session) = worker.session.filter(|_| !worker.is_frozen) {
                self.say(name, session, WorkerMessage::Heartbeat);
            }
        }
        self.feed(Input::Tick);
    }

    fn attach(&mut self, name: &'static str) {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let now = self.shell.now;
        let worker = self.workers.get_mut(name).expect("a worker");
        if worker.is_frozen {
            return;
        }
        if worker.session.take().is_some() {
            Self::lose_acknowledgements(worker, &mut self.random);
        }
        worker.session = Some(session);
        worker.heard = Some(now);
        let dead = worker.exits().cloned().map(|task| TaskView {
            task,
            address: None,
            has_peers: false,
            generation: None,
            holds_state: false,
            waits: false,
        });
        let mut tasks: Vec<TaskView> = dead.collect();
        for (task, running) in &worker.tasks {
            tasks.push(TaskView {
                task: task.clone(),
                address: running.address,
                has_peers: running.has_peers,
                generation: Some(running.generation),
                holds_state: running.held.is_some(),
                waits: running.waits,
            });
        }
        let hello = WorkerHello {
            cluster_id: "cohort".into(),
            token: Secret::new(""),
            name: name.parse().expect("a name"),
            host: name.into(),
            slots: worker.slots,
            price: HostPrice::default(),
            unhealthy: worker.unhealthy.clone(),
            incarnation: worker.incarnation,
            version: "0.1.0".into(),
            tasks,
        };
        self.feed(Input::WorkerHello { session, hello });
        let worker = &self.workers[name];
        if worker.session == Some(session) && (worker.is_leaving || worker.is_draining) {
            let scope = if worker.is_leaving { LeaveScope::Ends } else { LeaveScope::Drains };
            self.say(name, session, leaving(scope));
        }
    }

    /// What was delivered but perhaps not acknowledged will be said again.
    fn lose_acknowledgements(worker: &mut SimWorker, random: &mut ChaCha8Rng) {
        worker.late = None;
        let kept = (random.next_u64() % (worker.sent.len() as u64 + 1)) as usize;
        for fact in worker.sent.drain(..).skip(kept).collect::<Vec<_>>().into_iter().rev() {
            worker.facts.push_front(fact);
        }
    }

    fn detach(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        if let Some(session) = worker.session.take() {
            Self::lose_acknowledgements(worker, &mut self.random);
            self.feed(Input::WorkerDetached { session });
        }
    }

    /// The worker dies and comes back; its tasks die with it.
    fn restart(&mut self, name: &'static str) {
        self.detach(name);
        let worker = self.workers.get_mut(name).expect("a worker");
        worker.incarnation += 1;
        worker.tasks.clear();
        worker.facts.clear();
        worker.sent.clear();
        (worker.is_frozen, worker.is_leaving, worker.is_draining) = (false, false, false);
        (worker.asked_to_drain, worker.late) = (false, None);
        self.attach(name);
    }

    /// The worker is told to end: it says so, and its ranks leave at the next step with all others
    /// of their gangs.
    fn leave(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        if worker.is_frozen || worker.is_leaving {
            return;
        }
        worker.is_leaving = true;
        self.leaves += 1;
        self.ask_to_leave(name);
        if let Some(session) = self.workers[name].session {
            self.say(name, session, leaving(LeaveScope::Ends));
        }
    }

    /// The worker goes on, and hears what it was told meanwhile.
    fn thaw(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        worker.is_frozen = false;
        match worker.late.take() {
            Some(true) => self.drain(name),
            Some(false) => self.undrain(name),
            None => {}
        }
    }

    /// The worker is told to drain.
    fn drain(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        if worker.is_frozen || worker.is_leaving {
            worker.late = worker.is_frozen.then_some(true);
            return;
        }
        worker.is_draining = true;
        self.drains += 1;
        self.ask_to_leave(name);
        if let Some(session) = self.workers[name].session {
            self.say(name, session, leaving(LeaveScope::Drains));
        }
    }

    /// The worker checks its host; one in four is unfit until the faults end.
    fn check_host(&mut self, name: &'static str, request: u64) {
        let is_fit = self.is_resting || self.below(4) > 0;
        self.checks += 1;
        let worker = self.workers.get_mut(name).expect("a worker");
        worker.unhealthy = (!is_fit).then(|| "it failed its last check".to_owned());
        let Some(session) = worker.session.filter(|_| !worker.is_frozen) else { return };
        let failed = worker.unhealthy.clone().into_iter().collect();
        self.say(name, session, WorkerMessage::Checked { request, failed });
    }

    fn undrain(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        if worker.is_frozen || worker.is_leaving {
            worker.late = worker.is_frozen.then_some(false);
            return;
        }
        worker.is_draining = false;
        if let Some(session) = worker.session {
            self.say(name, session, WorkerMessage::Staying);
        }
    }

    /// The ranks of a worker leave with all others of their gangs.
    fn ask_to_leave(&mut self, name: &'static str) {
        let own = self.workers[name].tasks.keys();
        let gangs: Vec<(Name, Generation)> =
            own.map(|task| (task.workload.clone(), task.generation)).collect();
        for (task, running) in self.workers.values_mut().flat_map(|w| &mut w.tasks) {
            running.is_stopping |= gangs.contains(&(task.workload.clone(), task.generation));
        }
    }

    fn new_leader(&mut self) {
        self.shell.new_leader();
        self.leaders += 1;
        self.searches.clear();
        self.diagnoses.clear();
        for worker in self.workers.values_mut() {
            if worker.session.take().is_some() {
                Self::lose_acknowledgements(worker, &mut self.random);
            }
        }
        self.feed(Input::Tick);
    }

    /// A task dies, or gives up.
    fn accident(&mut self) {
        let Some((name, task)) = self.some_task() else { return };
        let (kind, other) = (self.below(8), self.below(4) as u32);
        let worker = self.workers.get_mut(name).expect("a worker");
        let running = worker.tasks.get_mut(&task).expect("a task");
        if let Some(step) = running.held.filter(|_| running.stage == RUNS) {
            self.stored.push((task.workload.clone(), running.generation, step + 5, false));
            if kind >= 6 {
                self.hangs += u64::from(!running.hangs);
                running.hangs = true;
                return;
            }
        }
        let step = running.held.map(TrainStep);
        let damaged = running.restore.filter(|_| step.is_none()).map(TrainStep);
        let words = |retryable, blames| RankReport::Failed {
            message: "oh".into(),
            retryable,
            blames,
            damaged: damaged.filter(|_| !retryable),
        };
        let code = |retryable: bool| {
            let damaged = damaged.filter(|_| !retryable);
            ExitCause::Code { code: 1, message: String::new(), retryable, damaged }
        };
        match kind {
            _ if damaged.is_some() && other > 0 => {
                worker.report(&task, words(false, None));
                worker.end(&task, code(false));
            }
            3 => {
                let blames = Some(Rank(other));
                worker.tasks.get_mut(&task).expect("a task").waits = true;
                worker.report(&task, RankReport::Broken { step, message: "oh".into(), blames });
            }
            0 => worker.report(&task, words(true, Some(Rank(other)))),
            1 => {
                worker.report(&task, words(true, Some(Rank(other))));
                worker.end(&task, code(true));
            }
            2 if other == 0 => {
                worker.report(&task, words(false, None));
                worker.end(&task, code(false));
            }
            _ => worker.end(&task, ExitCause::Signal { signal: 9, message: String::new() }),
        }
    }

    /// What the flight logs of a gang that does not move tell: who hangs, nobody, or anybody.
    fn diagnosis(&mut self) {
        let Some((job, generation)) = self.diagnoses.pop_front() else { return };
        let members = self.members(&job, generation);
        let hung = members.iter().find(|(_, state)| state.hangs).and_then(|(_, state)| state.rank);
        let suspect = match self.below(4) {
            0 => Some(Rank(self.below(6) as u32)),
            _ => hung,
        };
        self.diagnosed += 1;
        self.feed(Input::Diagnosed { job, generation, suspect, text: "it does not move".into() });
    }

    /// The ranks of a job that are in a generation, with their workers.
    fn members(&self, job: &Name, generation: Generation) -> Vec<(&'static str, &Running)> {
        let is_member = |task: &TaskId, state: &Running| {
            task.workload == *job && state.generation == generation && state.rank.is_some()
        };
        let of = |(name, worker): (&&'static str, &'_ SimWorker)| -> Vec<(&'static str, TaskId)> {
            let own = worker.tasks.iter().filter(|(task, state)| is_member(task, state));
            own.map(|(task, _)| (*name, task.clone())).collect()
        };
        let all: Vec<_> = self.workers.iter().flat_map(of).collect();
        all.into_iter().map(|(name, task)| (name, &self.workers[name].tasks[&task])).collect()
    }

    /// How the ranks of a worker compute.
    fn fingerprint(&self, name: &str) -> String {
        let is_other = self.is_mixed && name == "w3";
        if is_other { "other".into() } else { "same".into() }
    }

    fn some_task(&mut self) -> Option<(&'static str, TaskId)> {
        let all: Vec<(&'static str, TaskId)> = self
            .workers
            .iter()
            .filter(|(_, worker)| !worker.is_frozen)
            .flat_map(|(name, worker)| worker.tasks.keys().map(|task| (*name, task.clone())))
            .collect();
        (!all.is_empty()).then(|| all[self.below(all.len() as u64) as usize].clone())
    }

    fn search_answers(&mut self) {
        let Some((job, generation, after)) = self.searches.pop_front() else { return };
        let facts = self.stored.iter().filter(|(name, written, step, is_complete)| {
            let is_new = after.is_none_or(|after| *step > after.0);
            *is_complete && *name == job && *written == generation && is_new
        });
        let facts = facts.map(|(name, written, step, _)| fact(name, *written, *step)).collect();
        self.feed(Input::Adopted { job, generation, facts });
    }

    /// A sweep of the store, by the records of now or, of a leader that was cut off, by old ones.
    /// What is recorded must be there whatever was swept.
    fn sweep(&mut self) {
        let Some((job, ended, old)) = self.sweeps.pop_front() else { return };
        let records = if self.below(2) == 0 { &old } else { &self.shell.records };
        let retention = Retention::of(records, &job).expect("readable").expect("a job");
        let before = self.stored.len();
        self.stored.retain(|(name, generation, step, is_complete)| {
            *name != job || !retention.may_go(TrainStep(*step), *generation, *is_complete, ended)
        });
        self.swept += (before - self.stored.len()) as u64;
        for (key, _) in self.shell.records.list(KIND_CHECKPOINT, "") {
            let record = self.shell.records.read::<CheckpointRecord>(KIND_CHECKPOINT, &key.id);
            let CheckpointRecord { job, fact, .. } = record.expect("readable").expect("a record").1;
            assert!(self.is_stored(&job, &fact), "{key} was swept away");
        }
    }

    fn is_stored(&self, job: &Name, fact: &CheckpointFact) -> bool {
        self.stored.contains(&(job.clone(), fact.generation, fact.step.0, true))
    }

    // ---- tasks ------------------------------------------------------------------------------

    /// One task goes one stage further.
    fn progress(&mut self) {
        let Some((name, task)) = self.some_task() else { return };
        let fingerprint = self.fingerprint(name);
        let worker = self.workers.get_mut(name).expect("a worker");
        let is_going = worker.is_leaving || worker.is_draining;
        let running = worker.tasks.get_mut(&task).expect("a task");
        if running.waits || running.hangs {
            return;
        }
        let is_train = matches!(running.assignment, Assignment::Train(_));
        match running.stage {
            0 if is_train && running.rank.is_none() => {
                running.stage = IDLE;
                worker.report(&task, RankReport::Ready { fingerprint });
            }
            0 => {
                running.stage = 1;
                let address = SocketAddr::from(([127, 0, 0, 1], 4_000 + task.rank.0 as u16));
                running.address = Some(address);
                worker.report(&task, RankReport::Listening { address, fingerprint });
            }
            1 if is_train && running.has_peers => self.meet(&task),
            // It heeds no order to leave before it runs, and overstays.
            1 if is_train && running.is_stopping && is_going => {
                let reason = "it did not leave in time".to_owned();
                worker.end(&task, ExitCause::Killed { reason });
            }
            1 if is_train => {}
            RECEIVES => self.receive(name, &task),
            IDLE if !running.is_stopping => {}
            RUNS => self.run(name, &task),
            _ if running.is_stopping => worker.end(&task, ExitCause::Completed),
            _ => {}
        }
    }

    /// The ranks of a generation form their group, when all of them are there, and agree on the
    /// newest state that one of them or the store holds.
    fn meet(&mut self, task: &TaskId) {
        let host = |worker: &&SimWorker| worker.tasks.contains_key(task);
        let state = &self.workers.values().find(host).expect("its worker").tasks[task];
        let (generation, size) = (state.generation, state.world_size as usize);
        let (restore, job) = (state.restore, task.workload.clone());
        let members = self.members(&job, generation);
        let is_there = |state: &Running| state.stage == 1 && state.has_peers && !state.waits;
        if members.len() != size || !members.iter().all(|(_, state)| is_there(state)) {
            return;
        }
        let kinds: BTreeSet<String> =
            members.iter().map(|(name, _)| self.fingerprint(name)).collect();
        assert_eq!(kinds.len(), 1, "{job} {generation}: ranks that compute otherwise meet");
        assert!(members.iter().all(|(_, state)| state.restore == restore), "{job} {generation}");
        let newest = members.iter().filter_map(|(_, state)| state.held).max();
        // A generation out of the one before is begun for the sake of what its members hold.
        let record = self.shell.job(job.as_str()).expect("a job").status;
        let goes_on = record.gang.iter().any(|place| place.started_as.is_some());
        assert!(
            newest.is_some() || record.generation != generation || !goes_on,
            "{job} {generation}: nobody holds a state"
        );
        let origin = newest.max(restore).unwrap_or_default();
        for (other, state) in self.workers.values_mut().flat_map(|worker| &mut worker.tasks) {
            let is_member = other.workload == job && state.rank.is_some();
            if is_member && state.generation == generation {
                (state.stage, state.origin) = (RECEIVES, origin);
            }
        }
    }

    /// The state is there, or the group breaks first: what came in part is no state.
    fn receive(&mut self, name: &'static str, task: &TaskId) {
        let state = &self.workers[name].tasks[task];
        let size = state.world_size as usize;
        let members = self.members(&task.workload, state.generation);
        let is_there = |state: &Running| state.stage >= RECEIVES && !state.waits;
        let is_whole = members.len() == size && members.iter().all(|(_, state)| is_there(state));
        // A newcomer gets it behind a step of the others, if they hold it.
        let is_held = members.iter().any(|(_, other)| other.held == Some(state.origin));
        let may_join = is_whole && is_held && state.held.is_none() && !state.is_joining;
        if may_join && self.below(2) == 0 {
            let worker = self.workers.get_mut(name).expect("a worker");
            let state = worker.tasks.get_mut(task).expect("a task");
            state.is_joining = true;
            self.joined += 1;
            let step = TrainStep(state.origin);
            return worker.report(task, RankReport::Running { step, holds_state: false });
        }
        let worker = self.workers.get_mut(name).expect("a worker");
        let state = worker.tasks.get_mut(task).expect("a task");
        state.is_joining = false;
        if is_whole {
            self.received += u64::from(state.held != Some(state.origin));
            (state.stage, state.held) = (RUNS, Some(state.origin));
            let step = TrainStep(state.origin);
            return worker.report(task, RankReport::Running { step, holds_state: true });
        }
        self.cut_short += u64::from(state.held != Some(state.origin));
        state.waits = true;
        let step = state.held.map(TrainStep);
        let message = "a peer is gone".to_owned();
        worker.report(task, RankReport::Broken { step, message, blames: None });
    }

    /// A rank makes a step, or leaves its group with all others.
    fn run(&mut self, name: &'static str, task: &TaskId) {
        let state = &self.workers[name].tasks[task];
        let (generation, job) = (state.generation, task.workload.clone());
        let size = state.world_size as usize;
        let members = self.members(&job, generation);
        // Steps are made together.
        if members.iter().any(|(_, state)| state.stage == RECEIVES || state.hangs) {
            return;
        }
        if state.is_pausing && self.pause_together(&job, generation, size) {
            return;
        }
        let by = if self.is_busy { 1 } else { 5 };
        let worker = self.workers.get_mut(name).expect("a worker");
        let state = worker.tasks.get_mut(task).expect("a task");
        let is_first = state.rank == Some(Rank(0));
        let held = state.held.as_mut().expect("a rank that runs holds a state");
        if state.is_stopping {
            let step = TrainStep(*held);
            worker.report(task, RankReport::Stopped { step, why: StopCause::Order });
            return worker.end(task, ExitCause::Completed);
        }
        *held += by;
        let step = *held;
        if step >= 30 {
            if is_first {
                let model = ModelFact {
                    key: format!("models/{job}"),
                    sha256: "ab".into(),
                    bytes: 1,
                    step: TrainStep(30),
                    metrics: BTreeMap::new(),
                    samples: None,
                };
                worker.report(task, RankReport::Finished(model));
            }
            return worker.end(task, ExitCause::Completed);
        }
        if is_first {
            worker.report(task, RankReport::Checkpoint(fact(&job, generation, step)));
            self.stored.push((job, generation, step, true));
            self.checkpoints += 1;
            // What a step took is no fact: it is said if somebody hears it.
            if let Some(session) = worker.session.filter(|_| !worker.is_frozen) {
                let time = StepTime { compute: 0.5, ..StepTime::default() };
                let report = RankReport::Step(StepMetrics { time, ..metrics(TrainStep(step)) });
                let event = TaskEvent::Report { generation, report };
                let task = task.clone();
                self.say(name, session, WorkerMessage::Task { task, event });
            }
        }
    }

    /// The ranks of a gang leave it if all of them are there and all have been asked to.
    fn pause_together(&mut self, job: &Name, generation: Generation, world_size: usize) -> bool {
        let is_member = |task: &TaskId, state: &Running| {
            task.workload == *job && state.generation == generation && state.rank.is_some()
        };
        let all = self.workers.values().flat_map(|worker| &worker.tasks);
        let members: Vec<&Running> =
            all.filter(|(task, state)| is_member(task, state)).map(|(_, state)| state).collect();
        let agree = |state: &&Running| state.stage == RUNS && state.is_pausing && !state.waits;
        if members.len() != world_size || !members.iter().all(agree) {
            return false;
        }
        for worker in self.workers.values_mut() {
            let mut paused = Vec::new();
            for (task, state) in worker.tasks.iter_mut().filter(|(task, s)| is_member(task, s)) {
                state.waits = true;
                paused.push((task.clone(), TrainStep(state.held.unwrap_or_default())));
            }
            for (task, step) in paused {
                worker.report(&task, RankReport::Paused { step });
            }
        }
        true
    }

    fn deliver_one(&mut self, name: &'static str) {
        let worker = self.workers.get_mut(name).expect("a worker");
        let Some(session) = worker.session.filter(|_| !worker.is_frozen) else { return };
        let Some((task, event)) = worker.facts.pop_front() else { return };
        worker.sent.push((task.clone(), event.clone()));
        self.say(name, session, WorkerMessage::Task { task, event });
    }

    fn say(&mut self, name: &'static str, session: SessionId, message: WorkerMessage) {
        self.workers.get_mut(name).expect("a worker").heard = Some(self.shell.now);
        self.feed(Input::WorkerMessage { session, message });
    }

    // ---- orders -----------------------------------------------------------------------------

    fn feed(&mut self, input: Input) {
        let is_traced = std::env::var_os("COHORT_SEED").is_some();
        if is_traced {
            println!("{} {input:?}", self.shell.now.0);
        }
        let asked = input.clone();
        let steps = self.shell.feed(input, None);
        if matches!(steps[0].decision.reply, Some(Ok(_))) {
            self.note_asked(&asked);
        }
        if is_traced {
            let reasons = steps.iter().filter_map(|step| step.decision.reason.as_ref());
            reasons.for_each(|reason| println!("    {reason}"));
        }
        let has_written = steps.iter().any(|step| step.decision.transaction.is_some());
        if has_written && !self.is_resting && self.below(20) == 0 {
            // The leader is deposed between the commit and its effects: nobody hears of it.
            self.unheard += 1;
            return self.new_leader();
        }
        for effect in steps.into_iter().flat_map(|step| step.decision.effects) {
            match effect {
                Effect::Send { session, message } => self.obey(session, message),
                Effect::CloseSession { session, .. } => {
                    let closed = self.workers.values_mut().find(|w| w.session == Some(session));
                    if let Some(worker) = closed {
                        worker.session = None;
                        Self::lose_acknowledgements(worker, &mut self.random);
                    }
                }
                Effect::Adopt { job, generation, after } => {
                    self.searches.push_back((job, generation, after));
                }
                Effect::Sweep { job, ended } => {
                    self.sweeps.push_back((job, ended, self.shell.records.clone()));
                }
                Effect::Diagnose { job, generation } => {
                    self.diagnoses.push_back((job, generation));
                }
                Effect::Publish { .. } | Effect::ForgetSecret { .. } => {}
            }
        }
    }

    fn obey(&mut self, session: SessionId, message: CoordinatorMessage) {
        let owner = self.workers.iter().find(|(_, worker)| worker.session == Some(session));
        let Some((&name, _)) = owner else { return };
        if let CoordinatorMessage::Start { task, assignment } = &message {
            self.check_start(name, task);
            if let Assignment::Train(train) = assignment.as_ref() {
                let job = self.shell.job(task.workload.as_str()).expect("a job");
                if !train.spare {
                    assert_eq!(train.restore, job.status.checkpoint, "{task}: not the newest");
                    assert_eq!(train.generation, job.status.generation, "{task}");
                }
                if let Some(fact) = &train.restore {
                    assert!(self.is_stored(&task.workload, fact), "{task}: its state is gone");
                }
            }
        }
        let worker = self.workers.get_mut(name).expect("a worker");
        match message {
            CoordinatorMessage::Welcome { .. } => {}
            CoordinatorMessage::Start { task, assignment } => {
                let is_known =
                    worker.tasks.contains_key(&task) || worker.exits().any(|t| *t == task);
                if is_known {
                    return;
                }
                if worker.is_leaving || worker.is_draining {
                    let reason = "the worker is leaving".to_owned();
                    worker.facts.push_back((
                        task,
                        TaskEvent::Exited { cause: ExitCause::NotStarted { reason } },
                    ));
                    return;
                }
                let is_older = |(other, running): (&TaskId, &Running)| {
                    let is_spare = running.stage == IDLE || running.rank.is_none();
                    let is_older = running.generation < assignment.generation() && !is_spare;
                    (other.workload == task.workload && is_older).then(|| other.clone())
                };
                let older: Vec<TaskId> = worker.tasks.iter().filter_map(is_older).collect();
                for other in older {
                    assert!(
                        worker.tasks[&other].held.is_none() || !self.shell.is_member(name, &other),
                        "{task} is started before {other} hears that it goes on"
                    );
                    let reason = format!("superseded by {}", task.generation);
                    worker.end(&other, ExitCause::Killed { reason });
                }
                let restore = match assignment.as_ref() {
                    Assignment::Train(train) => train.restore.as_ref().map(|fact| fact.step.0),
                    Assignment::Serve(_) => None,
                };
                let (rank, world_size) = match assignment.as_ref() {
                    Assignment::Train(train) if train.spare => (None, 0),
                    Assignment::Train(train) => (Some(train.rank), train.world_size),
                    Assignment::Serve(_) => (None, 1),
                };
                let running = Running {
                    generation: assignment.generation(),
                    assignment: *assignment,
                    rank,
                    world_size,
                    held: None,
                    restore,
                    origin: 0,
                    hangs: false,
                    is_pausing: false,
                    waits: false,
                    address: None,
                    has_peers: false,
                    stage: 0,
                    is_stopping: false,
                    is_joining: false,
                };
                worker.tasks.insert(task.clone(), running);
                worker.facts.push_back((task, TaskEvent::Started { pid: 1 }));
            }
            CoordinatorMessage::Deliver { task, order } => {
                let Some(running) = worker.tasks.get_mut(&task) else { return };
                match order {
                    RankOrder::Peers { generation, addresses } => {
                        assert!(running.rank.is_some(), "peers for a replica or a spare");
                        assert_eq!(generation, running.generation, "{task}");
                        assert_eq!(addresses.len(), running.world_size as usize);
                        running.has_peers = true;
                    }
                    RankOrder::Regroup(next) => {
                        assert!(next.generation > running.generation, "{task} goes back");
                        running.join(*next);
                        // An order to leave was for the group of before; a worker that ends itself
                        // says it again.
                        running.is_stopping = worker.is_leaving || worker.is_draining;
                    }
                    RankOrder::Pause { .. } => running.is_pausing = true,
                    RankOrder::Stop { .. } => running.is_stopping = true,
                    _ => {}
                }
            }
            // Asked past the leader's decisions.
            CoordinatorMessage::Stacks { .. } => {}
            CoordinatorMessage::Drain { .. } => self.drain(name),
            CoordinatorMessage::Undrain => self.undrain(name),
            CoordinatorMessage::Check { request, .. } => self.check_host(name, request),
            CoordinatorMessage::Kill { task, reason } => {
                if worker.tasks.contains_key(&task) {
                    worker.end(&task, ExitCause::Killed { reason });
                } else if !worker.exits().any(|exited| *exited == task) {
                    worker.facts.push_back((
                        task,
                        TaskEvent::Exited { cause: ExitCause::Killed { reason } },
                    ));
                }
            }
        }
    }

    /// What must hold when a task is started, in the world and not only in the leader's books.
    fn check_start(&self, name: &str, task: &TaskId) {
        let worker = &self.workers[name];
        assert_eq!(worker.unhealthy, None, "{task} starts on {name}");
        let others = worker.tasks.keys().filter(|other| *other != task).count();
        assert!(others < worker.slots as usize, "{task} on {name}: {:?}", worker.tasks.keys());
        // Where survivors go on, what is not one of them is fenced off by its generation and dies.
        let job = self.shell.job(task.workload.as_str());
        if job.is_some_and(|job| job.status.gang.iter().any(|place| place.started_as.is_some())) {
            return;
        }
        for (other, state) in &self.workers {
            let is_guarded =
                state.heard.is_some_and(|heard| self.shell.now.since(heard) <= LEASE_MS);
            for older in state.tasks.keys().filter(|_| is_guarded) {
                assert!(
                    older.workload != task.workload || older.generation >= task.generation,
                    "{task} starts while {older} still runs on {other}"
                );
            }
        }
    }

    // ---- the end ----------------------------------------------------------------------------

    /// No more faults: every worker is there, every rank does its work, nobody asks for anything but
    /// the end of the endpoint. Every job must come to its end.
    fn rest(&mut self) {
        self.is_resting = true;
        for name in ["w1", "w2", "w3"] {
            self.thaw(name);
        }
        for round in 0..2_000 {
            for name in ["w1", "w2", "w3"] {
                if self.workers[name].is_leaving {
                    self.restart(name);
                }
                if self.workers[name].session.is_none() {
                    self.attach(name);
                }
                let SimWorker { asked_to_drain, is_draining, .. } = self.workers[name];
                // One whose session was closed just now hears it in the next round.
                let is_told =
                    is_draining || !asked_to_drain || self.workers[name].session.is_none();
                assert!(is_told, "{name} does not hear that it is to drain");
                if is_draining {
                    self.client_undrain(name);
                }
                while !self.workers[name].facts.is_empty() && self.workers[name].session.is_some() {
                    self.deliver_one(name);
                }
            }
            self.search_answers();
            self.diagnosis();
            self.sweep();
            for _ in 0..10 {
                self.progress();
            }
            self.pass();
            if round == DEPLOY_ROUND {
                self.deploy();
            }
            // Large jobs wait for slots that endpoints hold.
            for name in ENDPOINTS.iter().filter(|_| round == STOP_ROUND) {
                let name = name.parse().expect("a name");
                self.feed(Input::Stop { kind: KIND_ENDPOINT.into(), name });
            }
            let jobs = self.shell.jobs();
            let endpoints = self.shell.endpoints();
            let is_idle = self.workers.values().all(|w| w.tasks.is_empty() && w.facts.is_empty());
            if round > STOP_ROUND
                && is_idle
                && jobs.iter().all(|job| job.status.phase.is_terminal())
                && endpoints.iter().all(|endpoint| endpoint.status.phase.is_terminal())
            {
                let used: u32 =
                    self.shell.leader.workers(self.shell.now).iter().map(|w| w.used).sum();
                assert_eq!(used, 0, "slots are left taken");
                return;
            }
        }
        let states: Vec<String> = self
            .shell
            .jobs()
            .iter()
            .map(|job| format!("{}: {:?}", job.spec.name, job.status))
            .collect();
        let left: Vec<String> = self
            .workers
            .values()
            .flat_map(|worker| &worker.tasks)
            .map(|(task, t)| {
                let (of, rank, stage) = (t.generation, t.rank, t.stage);
                format!(
                    "{task} as {rank:?} of {of}: stage {stage}, holds {:?}, waits {}, hangs {}",
                    t.held, t.waits, t.hangs
                )
            })
            .collect();
        panic!("never came to rest: {}\n{}", states.join("\n"), left.join("\n"));
    }
}

fn leaving(scope: LeaveScope) -> WorkerMessage {
    WorkerMessage::Leaving { deadline_ms: None, cause: String::new(), scope }
}

fn fact(job: &Name, generation: Generation, step: u64) -> CheckpointFact {
    CheckpointFact {
        step: TrainStep(step),
        generation,
        manifest_key: format!("{job}/{step}-{generation}"),
        manifest_digest: "aa".into(),
        bytes: 1,
        metrics: BTreeMap::from([("validation:loss".into(), (step * 7 % 5) as f64)]),
    }
}
