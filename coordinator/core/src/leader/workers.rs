//! Workers: sessions, leases and what each of them runs. All of it volatile; heartbeats and leases
//! never touch the log.
//!
//! A worker's inventory (its hello) is the truth about what runs on it. A worker without a word for
//! a lease is lost: its tasks count as ended, and when it comes back with them they are killed.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use api::ids::{Generation, Name, Rank, Step, TaskId};
use api::price::{HostPrice, SlotRate};
use api::records::{KIND_JOB, WorkerView};
use api::session::{CoordinatorMessage, ExitCause, LeaveScope, RankOrder, TaskView, WorkerHello};

use super::Leader;
use super::decision::{Effect, Millis, SessionId};
use super::draft::Draft;
use super::gang::LastWords;
use super::health::Health;
use super::index::Workload;
use super::leave::Leave;
use super::reason::{Reason, count};
use crate::records::Records;

/// Workers known at once; each keeps a stream open. More is a mistake or an attack.
pub(super) const WORKERS_MAX: usize = 4_096;
/// Heartbeats within which a worker's word shows that its session lives: one may be late.
const HEARTBEATS_FRESH: u64 = 2;
/// So often in a row a worker's silence is put down to a leader that was away.
const EXCUSES_MAX: u32 = 16;
/// How long a lost worker stays in the list, for people who wonder where it went.
const LOST_SHOWN_MS: u64 = 600_000;

/// How far a task has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Its worker was told to start it.
    Told,
    /// Its process runs.
    Started,
    /// It listens for its peers or for requests.
    Listening,
    /// Its group is formed and its state restored.
    Running,
}

/// A task on a worker.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub(super) stage: Stage,
    pub(super) address: Option<SocketAddr>,
    pub(super) fingerprint: Option<String>,
    pub(super) has_peers: bool,
    /// The generation it was last told to be in; stage, address and peers are of that one.
    pub(super) generation: Generation,
    /// It has run as a rank, so that it holds a state to go on from.
    pub(super) holds_state: bool,
    /// The step at which it last began to run.
    pub(super) step: Option<Step>,
    /// It has left its group between two steps, as ordered.
    pub(super) is_paused: bool,
    pub(super) pause_told: bool,
    pub(super) stop_told: bool,
    pub(super) kill_told: bool,
}

impl Task {
    pub(super) fn new(stage: Stage, generation: Generation) -> Self {
        Self {
            stage,
            address: None,
            fingerprint: None,
            has_peers: false,
            generation,
            holds_state: false,
            step: None,
            is_paused: false,
            pause_told: false,
            stop_told: false,
            kill_told: false,
        }
    }

    /// It is told to be part of another generation.
    pub(super) fn joins(&mut self, generation: Generation) {
        // One that is not heard to run yet is still to be started.
        self.stage = self.stage.min(Stage::Started);
        self.address = None;
        self.has_peers = false;
        self.is_paused = false;
        self.pause_told = false;
        // The order to regroup takes an order to leave back.
        self.stop_told = false;
        self.generation = generation;
    }

    /// What a hello tells of it, over what was known before. Orders may have been lost with the
    /// former session, so they count as not given.
    fn from_view(view: &TaskView, known: Option<Self>) -> Self {
        let generation = view.generation();
        let mut known = known.unwrap_or_else(|| Self::new(Stage::Started, generation));
        if known.generation != generation {
            known.joins(generation);
        }
        let address = view.address.or(known.address);
        let heard = if address.is_some() { Stage::Listening } else { Stage::Started };
        Self {
            stage: known.stage.max(heard),
            address,
            has_peers: view.has_peers,
            holds_state: view.holds_state || known.holds_state,
            stop_told: false,
            pause_told: false,
            kill_told: false,
            ..known
        }
    }
}

/// Where a task runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskPlace {
    /// The rank or replica.
    pub rank: Rank,
    /// Its task.
    pub task: TaskId,
    /// Its worker.
    pub worker: Name,
    /// The worker's host.
    pub host: String,
    /// The worker's session, while there is one.
    pub session: Option<SessionId>,
}

/// A worker that this leader has heard of.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    host: String,
    pub(super) slots: u32,
    price: HostPrice,
    pub(super) incarnation: u64,
    pub(super) session: Option<SessionId>,
    heard: Millis,
    /// How often since then this leader was away.
    excused: u32,
    /// Its lease ran out, or it left with nothing on it; nothing on it counts any more.
    pub(super) is_lost: bool,
    /// It said that it is leaving: nothing is placed on it.
    pub(super) is_leaving: bool,
    /// How and why.
    pub(super) leave: Leave,
    /// Whether its host may be given work.
    pub(super) health: Health,
    pub(super) tasks: BTreeMap<TaskId, Task>,
}

impl Worker {
    /// What one of its slots costs.
    pub(super) fn rate(&self) -> SlotRate {
        self.price.per_slot(self.slots)
    }
}

impl Leader {
    pub(super) fn hello(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        session: SessionId,
        hello: WorkerHello,
    ) {
        if let Err(reason) = self.admit(now, &hello) {
            draft.because(Reason::Remark(format!("refused worker `{}`: {reason}", hello.name)));
            return draft.effect(Effect::CloseSession { session, reason });
        }
        let WorkerHello { name, host, slots, price, unhealthy, incarnation, tasks: views, .. } =
            hello;
        let former = self.workers.remove(&name);
        if let Some(replaced) = former.as_ref().and_then(|worker| worker.session) {
            self.sessions.remove(&replaced);
            let reason = format!("worker `{name}` opened a newer session");
            draft.effect(Effect::CloseSession { session: replaced, reason });
        }
        let mut known = BTreeMap::new();
        let is_known = former.as_ref().is_some_and(|former| former.incarnation == incarnation);
        let (mut is_leaving, mut leave) = (false, Leave::default());
        if !is_known {
            leave = Self::recall(draft, records, &name, incarnation);
            // One that is to take tasks again may still drain until it says so.
            is_leaving = leave.is_asked();
        }
        let mut health = Health::default();
        if let Some(former) = former {
            // A worker that was started anew is on the same host.
            health = former.health;
            health.ask_again();
            if is_known {
                (is_leaving, leave) = (former.is_leaving, former.leave);
                known = former.tasks;
            } else {
                let reason = format!("`{name}` was started anew");
                for (task, state) in former.tasks {
                    self.lost(draft, &name, &task, &state, &reason, now);
                }
            }
        }
        let tasks = views.iter().map(|view| {
            let known = known.remove(&view.task);
            (view.task.clone(), Task::from_view(view, known))
        });
        let tasks: BTreeMap<TaskId, Task> = tasks.collect();
        for (task, state) in known {
            // A start that was lost with the session is simply sent again.
            if state.stage > Stage::Told {
                let reason = format!("`{name}` came back without it");
                self.lost(draft, &name, &task, &state, &reason, now);
            } else if let Some(rank) = self.rank_of(&name, &task)
                && let Some(gang) = self.gangs.get_mut(&task.workload)
            {
                gang.never_started(rank);
            }
        }
        if self.lost.remove(&name) {
            health.suspect("it was lost and is back", std::iter::empty(), now);
        }
        if let Some(why) = unhealthy {
            let jobs = views.iter().map(|view| view.task.workload.clone());
            health.suspect(&why, jobs, now);
        }
        let node = self.node;
        let heartbeat = self.options.heartbeat;
        draft.send(session, CoordinatorMessage::Welcome { node, heartbeat });
        self.repeat_commits(draft, session, &tasks);
        let tail = format!("{}, {}", count(slots as usize, "slot"), count(tasks.len(), "task"));
        draft.because(Reason::Remark(format!("worker `{name}` attached: {tail}")));
        self.sessions.insert(session, name.clone());
        let worker = Worker {
            host,
            slots,
            price,
            incarnation,
            session: Some(session),
            heard: now,
            excused: 0,
            is_lost: false,
            is_leaving,
            leave,
            health,
            tasks,
        };
        // A rank that was lost with its worker lives: it goes on from what it holds.
        for task in worker.tasks.keys() {
            if let Some(rank) = self.rank_of(&name, task)
                && let Some(gang) = self.gangs.get_mut(&task.workload)
            {
                gang.is_back(rank);
            }
        }
        // Who waits for the next generation has said so to a leader that did not live to begin it.
        let waiting: Vec<TaskId> = views
            .into_iter()
            .filter(|view| view.waits && !worker.tasks[&view.task].is_paused)
            .map(|view| view.task)
            .collect();
        self.workers.insert(name.clone(), worker);
        for task in waiting {
            let current = self.index.get(&task.workload).map(|e| e.workload.generation());
            let told = self.workers[&name].tasks[&task].generation;
            if let Some(rank) = self.rank_of(&name, &task).filter(|_| current == Some(told))
                && let Some(gang) = self.gangs.get_mut(&task.workload)
            {
                let message = "it waits for the next generation".to_owned();
                let words = LastWords {
                    message,
                    retryable: true,
                    blames: None,
                    stays: true,
                    damaged: None,
                    is_hearsay: true,
                };
                gang.failed(rank, &name, words, now);
            }
        }
        self.repeat_asked(draft, &name, now);
    }

    /// Why a worker may not attach.
    fn admit(&self, now: Millis, hello: &WorkerHello) -> Result<(), String> {
        let (found, expected) = (&hello.cluster_id, &self.options.cluster_id);
        if found != expected {
            return Err(format!(
                "it belongs to cluster `{found}`, this is `{expected}`: check cluster.id in its \
                 cluster.toml"
            ));
        }
        let Some(former) = self.workers.get(&hello.name) else {
            if self.workers.len() >= WORKERS_MAX {
                return Err(format!("{WORKERS_MAX} workers are attached, no more are served"));
            }
            return Ok(());
        };
        let silence = now.since(former.heard);
        let is_here = former.session.is_some() && silence <= self.options.lease_ms;
        if is_here && former.host != hello.host {
            return Err(format!(
                "a worker named `{}` is attached from host `{}`: give each its own worker.name",
                hello.name, former.host
            ));
        }
        // One that was restarted has lost its former session with its former process: who is heard
        // on one still is another. Taken in, each would end the other's tasks, in turn, for ever.
        let heartbeat = u64::try_from(self.options.heartbeat.0.as_millis()).unwrap_or(u64::MAX);
        let is_fresh = silence <= heartbeat.saturating_mul(HEARTBEATS_FRESH);
        if is_here && is_fresh && former.incarnation != hello.incarnation {
            return Err(format!(
                "two workers are named `{}` on host `{}`: incarnation {:016x} is attached and was \
                 heard of {silence} ms ago, incarnation {:016x} asks to attach: give each its own \
                 worker.name, or end one; a restarted worker gets in as soon as the former session \
                 ends",
                hello.name, hello.host, former.incarnation, hello.incarnation
            ));
        }
        Ok(())
    }

    /// A worker says that it is leaving: its ranks' ends are nobody's failure from here on, unless it
    /// is only to be avoided.
    pub(super) fn leaving(
        &mut self,
        draft: &mut Draft,
        worker: &Name,
        scope: LeaveScope,
        cause: &str,
    ) {
        let Some(state) = self.workers.get_mut(worker) else { return };
        let (is_new, is_done) = state.hear_leaving(scope, cause);
        let leaves = state.leaves();
        if is_done {
            Self::settle_asked(draft, worker);
        }
        if is_new {
            let tasks = count(state.tasks.len(), "task");
            draft.because(Reason::Remark(format!("worker `{worker}` with {tasks} {leaves}")));
        }
        if scope == LeaveScope::Avoided {
            return;
        }
        for (name, entry) in self.index.live().filter(|(_, e)| e.workload.phase().is_active()) {
            let Some(gang) = self.gangs.get_mut(name) else { continue };
            let ranks = entry.workload.gang().iter().filter(|place| place.worker == *worker);
            for place in ranks {
                let text = format!("{} is asked to leave: `{worker}` {leaves}", place.rank);
                if gang.departs(place.rank, worker) && entry.workload.kind() == KIND_JOB {
                    draft.note(name, gang.generation, Some(place.rank), text);
                }
            }
        }
    }

    /// What the leader has recorded may not have reached the ranks before the session broke.
    fn repeat_commits(
        &self,
        draft: &mut Draft,
        session: SessionId,
        tasks: &BTreeMap<TaskId, Task>,
    ) {
        for task in tasks.keys() {
            if let Some(entry) = self.index.get(&task.workload)
                && let Workload::Job(job) = &entry.workload
                && let Some(fact) = &job.status.checkpoint
                && job.status.generation == fact.generation
                && tasks[task].generation == fact.generation
            {
                draft.deliver(session, task, RankOrder::Committed { step: fact.step });
            }
        }
    }

    /// The session is gone; its worker keeps its lease.
    pub(super) fn detached(&mut self, draft: &mut Draft, session: SessionId) {
        let Some(name) = self.sessions.remove(&session) else { return };
        if let Some(worker) = self.workers.get_mut(&name)
            && worker.session == Some(session)
        {
            worker.session = None;
            let lease = self.options.lease_ms;
            // With nothing left on it there is nothing to wait for.
            worker.is_lost = worker.leave.is_end() && worker.tasks.is_empty();
            let text = match worker.is_lost {
                true => format!("worker `{name}` has left"),
                false => format!("worker `{name}` detached: its lease of {lease} ms runs"),
            };
            draft.because(Reason::Remark(text));
        }
    }

    /// Any word renews the lease. The worker's name, if the session is known.
    pub(super) fn heard(&mut self, session: SessionId, now: Millis) -> Option<Name> {
        let name = self.sessions.get(&session)?.clone();
        let worker = self.workers.get_mut(&name)?;
        (worker.heard, worker.excused) = (now, 0);
        Some(name)
    }

    /// A time that does not count as anybody's silence: words and answers lie where nobody has read
    /// them. Of a leader that is away again and again it counts all the same in the end.
    pub(super) fn was_away(&mut self, milliseconds: u64) {
        let now = self.now;
        let shift = |then: &mut Millis| *then = then.plus(milliseconds).min(now);
        for worker in self.workers.values_mut().filter(|worker| !worker.is_lost) {
            if worker.excused < EXCUSES_MAX {
                worker.excused += 1;
                shift(&mut worker.heard);
            }
            worker.health.asked().into_iter().for_each(shift);
        }
        for gang in self.gangs.values_mut() {
            if gang.pace.is_excused(EXCUSES_MAX) {
                gang.times().for_each(shift);
            }
        }
        shift(&mut self.since);
    }

    /// Loses workers whose lease ran out.
    pub(super) fn expire(&mut self, draft: &mut Draft, now: Millis) {
        let lease = self.options.lease_ms;
        let is_over = |w: &Worker| w.is_lost && now.since(w.heard) > LOST_SHOWN_MS;
        for (name, worker) in self.workers.extract_if(.., |_, w| is_over(w)).collect::<Vec<_>>() {
            if !worker.health.is_fit() {
                self.remember_lost(name);
            }
        }
        let is_silent = |w: &Worker| !w.is_lost && now.since(w.heard) > lease;
        let silent: Vec<Name> = self
            .workers
            .iter()
            .filter(|(_, w)| is_silent(w))
            .map(|(name, _)| name.clone())
            .collect();
        for name in silent {
            let Some(worker) = self.workers.get_mut(&name) else { continue };
            worker.is_lost = true;
            let reason = format!("no word from `{name}` for {lease} ms");
            worker.suspect(&format!("it was lost: {reason}"), now);
            let tasks = std::mem::take(&mut worker.tasks);
            if let Some(session) = worker.session.take() {
                self.sessions.remove(&session);
                draft.effect(Effect::CloseSession { session, reason: reason.clone() });
            }
            for (task, state) in tasks {
                self.lost(draft, &name, &task, &state, &reason, now);
            }
            draft.because(Reason::Remark(format!("lost worker `{name}`: {reason}")));
        }
    }

    /// A task is gone from a worker: out of the inventory and, when it is one of a current gang,
    /// into that gang's ends.
    pub(super) fn ended(
        &mut self,
        draft: &mut Draft,
        worker: &Name,
        task: &TaskId,
        cause: ExitCause,
        now: Millis,
    ) {
        let known = self.workers.get_mut(worker).and_then(|host| host.tasks.remove(task));
        let held_state = known.as_ref().is_some_and(|known| known.holds_state);
        if known.is_some_and(|known| !known.kill_told && !known.stop_told) {
            self.rank_died(worker, &task.workload, &cause, now);
        }
        self.spare_ended(draft, task, &cause, now);
        if let Some(rank) = self.rank_of(worker, task)
            && let Some(gang) = self.gangs.get_mut(&task.workload)
        {
            gang.exited(rank, worker, cause, now);
            if held_state {
                gang.held_state(rank);
            }
        }
    }

    /// A task that was taken out of the inventory of its worker is lost with it.
    fn lost(
        &mut self,
        draft: &mut Draft,
        worker: &Name,
        task: &TaskId,
        state: &Task,
        reason: &str,
        now: Millis,
    ) {
        let reason = reason.to_owned();
        self.ended(draft, worker, task, ExitCause::WorkerLost { reason }, now);
        if let Some(rank) = self.rank_of(worker, task).filter(|_| state.holds_state)
            && let Some(gang) = self.gangs.get_mut(&task.workload)
        {
            gang.held_state(rank);
        }
    }

    /// The rank of a task of this worker in the current generation of a live workload.
    pub(super) fn rank_of(&self, worker: &Name, task: &TaskId) -> Option<Rank> {
        let workload = &self.index.get(&task.workload)?.workload;
        workload.place_of(worker, task).map(|place| place.rank)
    }

    /// Kills every task that nobody wants: of an older generation, of a workload that has ended or
    /// is between generations, or unknown. Told once per session.
    pub(super) fn kill_unwanted(&mut self, draft: &mut Draft) {
        for (name, worker) in &mut self.workers {
            let Some(session) = worker.session else { continue };
            for (task, state) in worker.tasks.iter_mut().filter(|(_, state)| !state.kill_told) {
                let gang = self.gangs.get(&task.workload);
                let is_condemned = gang.is_some_and(|gang| gang.is_condemned);
                let reason = match self.index.get(&task.workload).map(|entry| &entry.workload) {
                    Some(workload) => {
                        let place = workload.place_of(name, task);
                        // It counts as ended, as one that hangs: nobody waits for it, and others
                        // wait for its slot.
                        let ended = place.and_then(|place| gang?.exit_of(place.rank));
                        let is_placed = place.is_some();
                        let is_wanted = is_placed || gang.is_some_and(|gang| gang.has_spare(task));
                        let is_kept = is_wanted && !is_condemned && ended.is_none();
                        if workload.phase().is_active() && is_kept {
                            continue;
                        }
                        if let Some(cause) = ended {
                            let (task, reason) = (task.clone(), cause.to_string());
                            state.kill_told = true;
                            draft.send(session, CoordinatorMessage::Kill { task, reason });
                            continue;
                        }
                        match is_placed || workload.generation() == task.generation {
                            true => workload.reason().to_owned(),
                            false => format!("superseded by {}", workload.generation()),
                        }
                    }
                    None => format!("`{}` is over", task.workload),
                };
                state.kill_told = true;
                let task = task.clone();
                draft.send(session, CoordinatorMessage::Kill { task, reason });
            }
        }
    }

    /// Slots that are taken or spoken for, by worker: what runs there, dying or not, and what a
    /// current gang has placed there but not yet started.
    pub(super) fn occupancy(&self) -> BTreeMap<Name, u32> {
        let mut used: BTreeMap<Name, u32> = BTreeMap::new();
        for (name, worker) in &self.workers {
            used.insert(name.clone(), u32::try_from(worker.tasks.len()).unwrap_or(u32::MAX));
        }
        for entry in self.index.live().map(|(_, entry)| &entry.workload) {
            for place in entry.gang().iter().filter(|_| entry.phase().is_active()) {
                let task = entry.task(place);
                let runs =
                    self.workers.get(&place.worker).is_some_and(|w| w.tasks.contains_key(&task));
                if !runs && !self.has_ended(entry, place.rank) {
                    let slots = used.entry(place.worker.clone()).or_default();
                    *slots = slots.saturating_add(1);
                }
            }
        }
        used
    }

    /// Whether a rank of the current gang is known to have ended.
    pub(super) fn has_ended(&self, workload: &Workload, rank: Rank) -> bool {
        let gang = self.gangs.get(workload.name());
        let gang = gang.filter(|gang| gang.generation == workload.generation());
        workload.completed().contains(&rank)
            || gang.is_some_and(|gang| gang.exit_of(rank).is_some())
    }

    /// Where the tasks of one generation of a workload run, by rank.
    pub fn places(&self, workload: &Name, generation: Generation) -> Vec<TaskPlace> {
        let mut places = Vec::new();
        let entry = self.index.get(workload).map(|entry| &entry.workload);
        let current = entry.filter(|workload| workload.generation() == generation);
        for (name, worker) in &self.workers {
            let rank_of = |task: &TaskId| match current {
                Some(workload) => workload.place_of(name, task).map(|place| place.rank),
                None => (task.generation == generation).then_some(task.rank),
            };
            let own = worker.tasks.keys().filter(|task| task.workload == *workload);
            places.extend(own.filter_map(|task| {
                Some(TaskPlace {
                    rank: rank_of(task)?,
                    task: task.clone(),
                    worker: name.clone(),
                    host: worker.host.clone(),
                    session: worker.session,
                })
            }));
        }
        places.sort_by_key(|place| place.rank);
        places
    }

    /// The workers as the leader sees them, by name.
    pub fn workers(&self, now: Millis) -> Vec<WorkerView> {
        let used = self.occupancy();
        let view = |(name, worker): (&Name, &Worker)| {
            let (state, reason) = worker.state();
            WorkerView {
                name: name.clone(),
                host: worker.host.clone(),
                slots: worker.slots,
                used: used.get(name).copied().unwrap_or(0),
                attached: worker.session.is_some(),
                state,
                reason,
                lease_ms: match worker.is_lost {
                    true => 0,
                    false => self.options.lease_ms.saturating_sub(now.since(worker.heard)),
                },
                price: worker.price,
                tasks: worker.tasks.keys().map(ToString::to_string).collect(),
                labels: BTreeMap::new(),
            }
        };
        self.workers.iter().map(view).collect()
    }
}

/// The task of a rank of the current gang.
pub(super) fn task_id(workload: &Workload, rank: Rank) -> TaskId {
    let place = workload.gang().iter().find(|place| place.rank == rank);
    place.map_or_else(
        || TaskId { workload: workload.name().clone(), generation: workload.generation(), rank },
        |place| workload.task(place),
    )
}
