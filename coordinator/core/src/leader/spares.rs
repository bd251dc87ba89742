//! Spares: processes beside a running gang that have read the data and built the model, so that a
//! lost rank's place is taken at once and a gang grows without waiting for a start.
//!
//! Volatile but for their number: a new leader finds them in nobody's record, lets them be killed and
//! starts its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::ids::{Name, Rank, Secret, TaskId};
use api::job::Determinism;
use api::records::{JobRecord, Placement, StartedAs};
use api::session::{Assignment, CoordinatorMessage, ExitCause, TrainAssignment};
use api::units::Span;

use super::Leader;
use super::decision::Millis;
use super::draft::Draft;
use super::gang::{Spare, clip};
use super::index::Workload;
use super::regroup::lowest_free;
use super::train::budget_used;
use super::workers::{Stage, Task, Worker};

impl Leader {
    /// Starts as many spares as the gang lacks ranks, and those that the job wants beside it, as far
    /// as there are free slots that nobody waits for. Ends those that are too many. Once it has
    /// written something, nothing more is to be decided about the job.
    pub(super) fn tend_spares(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        lacks: usize,
    ) {
        let name = job.spec.name.clone();
        let beside = match self.has_queue() {
            true => 0,
            false => job.spec.recovery.spares as usize,
        };
        let wanted = lacks + beside;
        let mut free = self.free_slots();
        let usable = self.spares(&name);
        let Some(gang) = self.gangs.get_mut(&name) else { return };
        gang.spares.retain(|spare| usable.iter().any(|other| other.task == spare.task));
        // The last ones first: they have come least far.
        gang.spares.truncate(wanted);
        free.retain(|worker, _| gang.shunned.allows(worker, now));
        let straggler = gang.replacing.and_then(|straggler| {
            let place = job.status.gang.iter().find(|place| place.rank == straggler)?;
            // Its host may be as slow for another process; where there is no other, it is tried.
            let is_other = |(name, host): (&Name, &Worker)| *name != place.worker && !host.is_lost;
            self.workers.iter().any(is_other).then(|| place.worker.clone())
        });
        free.retain(|worker, _| Some(worker) != straggler.as_ref());
        let gone: BTreeSet<Rank> = gang.gone().collect();
        let mut starts: Vec<(Name, u32, Rank)> = Vec::new();
        for _ in gang.spares.len()..wanted {
            let roomy = free.iter().filter(|(_, slots)| **slots > 0);
            let Some(worker) = roomy.max_by_key(|(_, slots)| **slots).map(|(name, _)| name.clone())
            else {
                break;
            };
            if let Some(slots) = free.get_mut(&worker) {
                *slots -= 1;
            }
            let members = job
                .status
                .gang
                .iter()
                .filter(|place| place.worker == worker && !gone.contains(&place.rank));
            let spares = gang.spares.iter().filter(|spare| spare.worker == worker);
            let taken: BTreeSet<u32> = members
                .map(|place| place.local_rank)
                .chain(spares.map(|spare| spare.local_rank))
                .collect();
            let local_rank = lowest_free(&taken);
            // Above every rank of a gang, so that the two never share a name.
            let number = job.status.spares_started.saturating_add(starts.len() as u32);
            let rank = Rank(job.spec.resources.ranks.max().saturating_add(number));
            let generation = job.status.generation;
            let task = TaskId { workload: name.clone(), generation, rank };
            let worker = worker.clone();
            gang.spares.push(Spare {
                task,
                worker: worker.clone(),
                local_rank,
                is_ready: false,
                words: None,
            });
            starts.push((worker, local_rank, rank));
        }
        if starts.is_empty() {
            return;
        }
        // Recorded: a name that a former leader gave may still be heard of.
        let count = starts.len() as u32;
        self.change_job(draft, version, job, |status| {
            status.spares_started = status.spares_started.saturating_add(count);
            status.spares_most = status.spares_most.max(status.spares_started);
        });
        for (worker, local_rank, rank) in starts {
            self.start_spare(draft, job, worker, local_rank, rank);
        }
    }

    fn start_spare(
        &mut self,
        draft: &mut Draft,
        job: &Arc<JobRecord>,
        worker: Name,
        local_rank: u32,
        rank: Rank,
    ) {
        let generation = job.status.generation;
        let assignment = Assignment::Train(TrainAssignment {
            spec: job.spec.clone(),
            generation,
            rank,
            world_size: u32::try_from(job.status.gang.len()).unwrap_or(u32::MAX),
            local_rank,
            local_world_size: local_rank + 1,
            restore: None,
            secret: Secret::new(""),
            elapsed: Span::millis(budget_used(&job.status)),
            spare: true,
        });
        let started_as = Some(StartedAs { generation, rank });
        let place = Placement { rank, worker, started_as, local_rank };
        let task = Workload::Job(Arc::clone(job)).task(&place);
        let Some(host) = self.workers.get_mut(&place.worker) else { return };
        let Some(session) = host.session else { return };
        host.tasks.insert(task.clone(), Task::new(Stage::Told, generation));
        draft.send(session, CoordinatorMessage::Start { task, assignment: Box::new(assignment) });
    }

    /// A spare says that it is ready.
    pub(super) fn spare_ready(
        &mut self,
        draft: &mut Draft,
        worker: &Name,
        task: &TaskId,
        fingerprint: String,
    ) {
        if let Some(state) = self.workers.get_mut(worker).and_then(|w| w.tasks.get_mut(task)) {
            state.fingerprint = Some(fingerprint.clone());
            state.stage = state.stage.max(Stage::Started);
        }
        let job = match self.index.get(&task.workload).map(|entry| &entry.workload) {
            Some(Workload::Job(job)) => Arc::clone(job),
            _ => return,
        };
        let is_strict = job.spec.parallel.determinism == Determinism::Strict;
        let expected = job.status.fingerprint.as_ref().filter(|f| is_strict && **f != fingerprint);
        if let Some(expected) = expected {
            // It would be no rank of this job; nobody wants it any more, so it is killed.
            let why = format!("it computes as `{fingerprint}`, the job began as `{expected}`");
            self.shun(draft, &task.workload, worker, &why);
            if let Some(gang) = self.gangs.get_mut(&task.workload) {
                gang.spares.retain(|spare| spare.task != *task);
            }
            return;
        }
        if let Some(gang) = self.gangs.get_mut(&task.workload)
            && let Some(spare) = gang.spares.iter_mut().find(|spare| spare.task == *task)
        {
            spare.is_ready = true;
        }
    }

    /// A spare says that it cannot go on: its worker is left alone for a while.
    pub(super) fn spare_failed(&mut self, task: &TaskId, message: String) {
        if let Some(gang) = self.gangs.get_mut(&task.workload)
            && let Some(spare) = gang.spares.iter_mut().find(|spare| spare.task == *task)
        {
            spare.words = Some(clip(&message));
        }
    }

    /// A task ended; it may have been a spare. Whatever ended it would end the next one there, too.
    pub(super) fn spare_ended(
        &mut self,
        draft: &mut Draft,
        task: &TaskId,
        cause: &ExitCause,
        now: Millis,
    ) {
        let Some(gang) = self.gangs.get_mut(&task.workload) else { return };
        let Some(index) = gang.spares.iter().position(|spare| spare.task == *task) else { return };
        let spare = gang.spares.remove(index);
        if matches!(cause, ExitCause::WorkerLost { .. } | ExitCause::Killed { .. }) {
            return;
        }
        let wait = gang.shunned.failed(&spare.worker, now) / 1000;
        let what = spare.words.unwrap_or_else(|| cause.to_string());
        let text = format!(
            "a spare on `{}` ended: {what}: no other is started there for {wait} s",
            spare.worker
        );
        draft.note(&task.workload, gang.generation, None, text);
    }

    /// Whether workloads wait for slots: a gang that runs takes none then. One that could not run if
    /// all slots were free does not count.
    pub(super) fn has_queue(&self) -> bool {
        let total = self.slots_in_all();
        self.index.live().any(|(_, entry)| {
            !entry.workload.phase().is_active() && entry.workload.slots().0 <= total
        })
    }
}
