//! Carries out the leader's orders over the tasks of this worker: which may start, which must wait
//! for room, which are to end. It never decides what ought to run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use api::session::{Assignment, CoordinatorMessage, ExitCause, RankOrder, WorkerMessage};
use api::{Generation, TaskId};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::folder::Folder;
use crate::task::{Surroundings, Task, TaskHandle};

/// The tasks of a worker.
pub(crate) struct Agent {
    folder: Folder,
    slots: usize,
    shared: Arc<Surroundings>,
    running: BTreeMap<TaskId, TaskHandle>,
    /// Ordered to start, waiting for tasks that are dying to make room; in the order they came.
    waiting: Vec<(TaskId, Box<Assignment>)>,
    ends: JoinSet<TaskId>,
    /// Why nothing more is started.
    closed: Option<String>,
}

impl Agent {
    pub(crate) fn new(folder: Folder, slots: u32, shared: Arc<Surroundings>) -> Self {
        Self {
            folder,
            slots: slots as usize,
            shared,
            running: BTreeMap::new(),
            waiting: Vec::new(),
            ends: JoinSet::new(),
            closed: None,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Waits for the next task to end, for ever when there is none, and starts what waited for it.
    pub(crate) async fn task_ended(&mut self) {
        match self.ends.join_next().await {
            Some(Ok(task)) => {
                self.running.remove(&task);
            }
            Some(Err(error)) => {
                // A panic in a task's own code; its guard has killed the process.
                warn!(%error, "a task's supervision failed");
                self.bury_the_unsupervised();
            }
            None => std::future::pending().await,
        }
        self.start_waiting();
    }

    /// A task whose supervision ended without its exit event still gets one.
    fn bury_the_unsupervised(&mut self) {
        let gone = self.running.extract_if(.., |_, handle| handle.is_gone());
        for (task, _) in gone {
            let reason = "its supervision in the worker failed".to_owned();
            self.shared.ledger.exited(&task, ExitCause::Killed { reason });
        }
    }

    pub(crate) fn order(&mut self, message: CoordinatorMessage) {
        match message {
            CoordinatorMessage::Welcome { .. } => {}
            CoordinatorMessage::Start { task, assignment } => self.start(task, assignment),
            CoordinatorMessage::Deliver { task, order } => self.deliver(task, order),
            CoordinatorMessage::Kill { task, reason } => self.kill(task, &reason),
            CoordinatorMessage::Stacks { request, task, keep } => {
                self.tell_stacks(request, task, keep);
            }
            // The worker's own matter.
            CoordinatorMessage::Drain { .. }
            | CoordinatorMessage::Undrain
            | CoordinatorMessage::Check { .. } => {}
        }
    }

    fn start(&mut self, task: TaskId, assignment: Box<Assignment>) {
        // Known: it runs, waits, or its end is on its way to the leader.
        if !self.shared.ledger.accept(&task) {
            return;
        }
        // Not that of its name: a spare may be a rank of a later one before it is started.
        let generation = assignment.generation();
        if generation != task.generation {
            self.shared.ledger.joins(&task, generation);
        }
        let newest = self.generations(&task).max();
        if let Some(newer) = newest.filter(|newest| *newest > generation) {
            return self.refuse(&task, format!("superseded: {newer} of it is here already"));
        }
        if let Some(reason) = self.closed.clone() {
            return self.refuse(&task, reason);
        }
        let reason = format!("superseded by {generation}");
        for (other, handle) in &self.running {
            if other.workload == task.workload && handle.is_older(generation) {
                handle.kill(&reason);
            }
        }
        let is_older = |(other, begins): &mut (TaskId, Box<Assignment>)| {
            let is_rank = other.workload == task.workload && !begins.is_spare();
            is_rank && begins.generation() < generation
        };
        let older = self.waiting.extract_if(.., is_older).collect::<Vec<_>>();
        for (other, _) in older {
            self.shared.ledger.exited(&other, ExitCause::Killed { reason: reason.clone() });
        }
        let lasting = self.running.values().filter(|handle| !handle.is_dying()).count();
        let taken = lasting + self.waiting.len();
        if taken >= self.slots {
            return self
                .refuse(&task, format!("no free slot: {taken} of {} are taken", self.slots));
        }
        self.waiting.push((task, assignment));
        self.start_waiting();
    }

    fn generations(&self, task: &TaskId) -> impl Iterator<Item = Generation> {
        let waiting = self.waiting.iter().map(|(other, begins)| (other, begins.generation()));
        let running = self.running.iter().map(|(other, handle)| (other, handle.generation()));
        let mine = running.chain(waiting);
        mine.filter(|(other, _)| other.workload == task.workload).map(|(_, generation)| generation)
    }

    fn refuse(&self, task: &TaskId, reason: String) {
        info!(%task, reason, "task not started");
        self.shared.ledger.exited(task, ExitCause::NotStarted { reason });
    }

    /// Starts what has room: a free slot, and no older generation of its workload still dying.
    fn start_waiting(&mut self) {
        let mut still = Vec::new();
        for (task, assignment) in std::mem::take(&mut self.waiting) {
            let has_older = self.running.iter().any(|(other, handle)| {
                other.workload == task.workload && handle.is_older(assignment.generation())
            });
            if has_older || self.running.len() >= self.slots {
                still.push((task, assignment));
                continue;
            }
            let record = self.folder.rank_record(&task);
            let (run, handle) = Task::new(task.clone(), assignment, record, self.shared.clone());
            self.ends.spawn(run.run());
            self.running.insert(task, handle);
        }
        self.waiting = still;
    }

    fn deliver(&mut self, task: TaskId, order: RankOrder) {
        if let RankOrder::Flight { request, .. } = order
            && let Some(why) = self.cannot_tell(&task)
        {
            let answer = WorkerMessage::Flight { request, task, log: None, why };
            return self.shared.ledger.answer(&answer);
        }
        if let Some(handle) = self.running.get(&task) {
            match &order {
                RankOrder::Peers { .. } => self.shared.ledger.peers_given(&task),
                RankOrder::Regroup(regroup) => {
                    handle.joins(regroup.generation, regroup.rank);
                    self.shared.ledger.joins(&task, regroup.generation);
                }
                _ => {}
            }
            return handle.deliver(order);
        }
        let waiting = self.waiting.iter_mut().find(|(other, _)| *other == task);
        if let RankOrder::Regroup(regroup) = &order
            && let Some((_, assignment)) = waiting
            && let Assignment::Train(train) = assignment.as_mut()
        {
            // It is started for the newer generation right away.
            train.joins(regroup);
            return self.shared.ledger.joins(&task, regroup.generation);
        }
        match order {
            RankOrder::Stop { reason } | RankOrder::Abort { reason } => self.absent(&task, &reason),
            _ => self.absent(&task, "it is not on this worker"),
        }
    }

    fn tell_stacks(&self, request: u64, task: TaskId, keep: bool) {
        let shared = Arc::clone(&self.shared);
        let Some(handle) = self.running.get(&task) else {
            let why = "it is not on its worker: it waits to be started, or has just ended".into();
            let answer = WorkerMessage::Stacks { request, task, dump: None, why };
            return shared.ledger.answer(&answer);
        };
        let keep = keep.then(|| (shared.flights.clone(), task.workload.clone()));
        handle.tell_stacks(keep, move |told| {
            let (dump, why) = match told {
                Ok(dump) => (Some(Box::new(dump)), String::new()),
                Err(why) => (None, why),
            };
            shared.ledger.answer(&WorkerMessage::Stacks { request, task, dump, why });
        });
    }

    /// Why a task cannot tell its flight log, where this worker knows better than to wait for it.
    fn cannot_tell(&self, task: &TaskId) -> Option<String> {
        let Some(handle) = self.running.get(task) else {
            return Some(
                "it is not on its worker: it waits to be started, or has just ended".into(),
            );
        };
        handle.stopped().map(|pid| {
            format!(
                "its process {pid} is stopped by a signal or a debugger; `kill -CONT {pid}` on its \
                 host lets it go on"
            )
        })
    }

    fn kill(&mut self, task: TaskId, reason: &str) {
        match self.running.get(&task) {
            Some(handle) => handle.kill(reason),
            None => self.absent(&task, reason),
        }
    }

    /// Answers an order for a task that does not run here, so that the leader's view converges. One
    /// that waits to start is given up; one whose exit is on its way needs no second exit.
    fn absent(&mut self, task: &TaskId, reason: &str) {
        let before = self.waiting.len();
        self.waiting.retain(|(other, _)| other != task);
        if before != self.waiting.len() || !self.shared.ledger.knows(task) {
            self.shared.ledger.exited(task, ExitCause::Killed { reason: reason.to_owned() });
        }
    }

    /// Asks every task to write a checkpoint and leave within `limit`; nothing new is started.
    pub(crate) fn stop(&mut self, reason: &str, limit: Duration) {
        self.closed = Some(reason.to_owned());
        for (task, _) in std::mem::take(&mut self.waiting) {
            self.refuse(&task, reason.to_owned());
        }
        for handle in self.running.values() {
            handle.stop(reason, limit);
        }
    }

    /// Starts tasks again; those that were asked to leave still do.
    pub(crate) fn reopen(&mut self) {
        self.closed = None;
    }

    pub(crate) fn kill_all(&self, reason: &str) {
        self.running.values().for_each(|handle| handle.kill(reason));
    }
}
