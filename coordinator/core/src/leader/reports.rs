//! What tasks report: facts become records here (checkpoints, models), the rest updates the
//! inventory. Whatever an older generation says is refused.
//!
//! Workers repeat what was not acknowledged, so every fact may come twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::events::{CheckpointFact, JobEvent, ModelFact};
use api::ids::{Generation, Name, Rank, Step, TaskId};
use api::records::{
    CheckpointRecord, JobRecord, KIND_CHECKPOINT, KIND_JOB, KIND_MODEL, ModelRecord, Phase,
};
use api::session::{
    CoordinatorMessage, RankOrder, RankReport, StopCause, TaskEvent, WorkerMessage,
};

use super::Leader;
use super::decision::Millis;
use super::draft::{Draft, Expect};
use super::gang::LastWords;
use super::index::Workload;
use super::reason::{Reason, count};
use super::retain::{surplus_checkpoints, sweep_store};
use super::workers::{Stage, Task};
use crate::records::Records;
use crate::transaction::RecordKey;

/// Longest key of a manifest or model taken from a rank, in bytes: S3's own limit for keys.
const KEY_BYTES_MAX: usize = 1_024;
/// Checkpoints adopted at once, the newest, however many the policy keeps: they are one transaction.
const ADOPTED_MAX: usize = 64;
/// Metrics in a record of a model or checkpoint; an algorithm reports a handful.
const METRICS_MAX: usize = 256;

/// A task of a gang that says something.
struct Speaker<'a> {
    worker: &'a Name,
    task: &'a TaskId,
    /// Its rank in the current generation.
    rank: Rank,
    /// Whether it says it as a rank of the current generation.
    is_current: bool,
}

impl Leader {
    /// One message of a worker. True when something changed that may let others go on.
    pub(super) fn message(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        worker: &Name,
        message: WorkerMessage,
    ) -> bool {
        match message {
            WorkerMessage::Task { task, event } => {
                self.task_event(draft, records, now, worker, &task, event)
            }
            // The deadline is the worker's own business: it sees to it that its tasks keep it.
            WorkerMessage::Leaving { cause, scope, .. } => {
                self.leaving(draft, worker, scope, &cause);
                true
            }
            WorkerMessage::Staying => {
                self.staying(draft, worker);
                true
            }
            WorkerMessage::Checked { request, failed } => {
                self.checked(draft, worker, request, &failed, now)
            }
            // The lease was renewed already; logs stay with the shell; a second hello is a mistake.
            WorkerMessage::Heartbeat
            | WorkerMessage::Logs { .. }
            | WorkerMessage::Flight { .. }
            | WorkerMessage::Stacks { .. } => false,
            WorkerMessage::Hello(_) => {
                draft.because(Reason::Remark(format!("`{worker}` said hello twice")));
                false
            }
        }
    }

    fn task_event(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        worker: &Name,
        task: &TaskId,
        event: TaskEvent,
    ) -> bool {
        let report = match event {
            TaskEvent::Exited { cause } => {
                self.ended(draft, worker, task, cause, now);
                return true;
            }
            TaskEvent::Started { .. } => {
                self.reached(worker, task, Stage::Started);
                return false;
            }
            TaskEvent::Report { generation, report } => (generation, report),
        };
        let (generation, report) = report;
        let metrics = match report {
            RankReport::Step(metrics) => JobEvent::Step(metrics),
            RankReport::Evaluation(evaluation) => JobEvent::Evaluation(evaluation),
            RankReport::Busy { .. } => {
                let gang = self.gangs.get_mut(&task.workload);
                if let Some(gang) = gang.filter(|gang| gang.generation == generation) {
                    gang.pace.busy(now);
                }
                return false;
            }
            RankReport::Ready { fingerprint } => {
                self.spare_ready(draft, worker, task, fingerprint);
                return true;
            }
            report => {
                let gang = self.gangs.get(&task.workload);
                if gang.is_some_and(|gang| gang.has_spare(task)) {
                    if let RankReport::Failed { message, .. } = report {
                        self.spare_failed(task, message);
                    }
                    return true;
                }
                let Some(rank) = self.rank_of(worker, task) else {
                    self.kill_unknown(draft, worker, task);
                    draft.because(self.superseded(records, task));
                    return true;
                };
                let current = gang.map(|gang| gang.generation).unwrap_or_default();
                let who = Speaker { worker, task, rank, is_current: generation == current };
                // A state that a process holds it keeps, whatever it was told to be part of since.
                if let RankReport::Running { holds_state: true, .. } = report
                    && !who.is_current
                    && let Some(worker) = self.workers.get_mut(worker)
                    && let Some(state) = worker.tasks.get_mut(task)
                {
                    state.holds_state = true;
                }
                // That a process is about to leave counts whatever it has heard of before.
                if !who.is_current && !matches!(report, RankReport::Failed { .. }) {
                    let of = TaskId { generation, ..task.clone() };
                    draft.because(Reason::Superseded { task: of, current });
                    return true;
                }
                self.fact(draft, records, now, &who, report);
                return true;
            }
        };
        let is_current = self.index.get(&task.workload).is_some_and(|entry| {
            entry.workload.generation() == generation
                && entry.workload.place_of(worker, task).is_some()
        });
        if is_current {
            if let Some(gang) = self.gangs.get_mut(&task.workload) {
                gang.pace.beat(now);
                if let JobEvent::Step(metrics) = &metrics {
                    gang.unwritten.step(metrics.step, &metrics.time, now);
                    gang.pace.compare(metrics, now);
                }
            }
            draft.publish(&task.workload, metrics);
        }
        false
    }

    /// Why a word of the task does not count.
    fn superseded(&self, records: &Records, task: &TaskId) -> Reason {
        let live = self.index.get(&task.workload).map(|entry| entry.workload.generation());
        let settled = || {
            let job = records.read::<JobRecord>(KIND_JOB, task.workload.as_str()).ok()??;
            Some(job.1.status.generation)
        };
        match live.or_else(settled) {
            Some(current) => Reason::Superseded { task: task.clone(), current },
            None => Reason::Remark(format!("ignored a word of {task}: nobody knows it")),
        }
    }

    /// How far a task of the inventory has come.
    fn reached(&mut self, worker: &Name, task: &TaskId, stage: Stage) -> Option<&mut Task> {
        let state = self.workers.get_mut(worker)?.tasks.get_mut(task)?;
        state.stage = state.stage.max(stage);
        Some(state)
    }

    /// A word of a task that its worker did not tell of: should it exist after all, it must not.
    /// Those of the inventory are killed when nobody wants them.
    fn kill_unknown(&self, draft: &mut Draft, worker: &Name, task: &TaskId) {
        let Some(host) = self.workers.get(worker) else { return };
        if let Some(session) = host.session
            && !host.tasks.contains_key(task)
        {
            let (task, reason) = (task.clone(), "nobody wants it".to_owned());
            draft.send(session, CoordinatorMessage::Kill { task, reason });
        }
    }

    /// A report of the current generation that is more than a metric.
    fn fact(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        who: &Speaker<'_>,
        report: RankReport,
    ) {
        let Speaker { worker, task, rank, is_current } = *who;
        match report {
            RankReport::Listening { address, fingerprint } => {
                if let Some(state) = self.reached(worker, task, Stage::Listening) {
                    state.address = Some(address);
                    state.fingerprint = Some(fingerprint);
                }
            }
            RankReport::Running { step, holds_state } => {
                if let Some(state) = self.reached(worker, task, Stage::Running) {
                    let has_got_it = state.step.is_some() && !state.holds_state && holds_state;
                    state.holds_state |= holds_state;
                    state.step = Some(step);
                    if let Some(gang) = self.gangs.get_mut(&task.workload).filter(|_| has_got_it) {
                        // The step behind which it came may take no longer than others.
                        gang.pace.busy_is_over(now);
                    }
                }
            }
            RankReport::Paused { .. } => {
                if let Some(state) = self.reached(worker, task, Stage::Told) {
                    state.is_paused = true;
                }
            }
            RankReport::Broken { step, message, blames } => {
                if let Some(state) = self.reached(worker, task, Stage::Told) {
                    state.holds_state |= step.is_some();
                }
                if let Some(gang) = self.gangs.get_mut(&task.workload) {
                    let words = LastWords {
                        message,
                        retryable: true,
                        blames,
                        stays: true,
                        damaged: None,
                        is_hearsay: false,
                    };
                    gang.failed(rank, worker, words, now);
                }
            }
            RankReport::Stopped { step, why } => {
                if let Some(gang) = self.gangs.get_mut(&task.workload) {
                    gang.stopped.get_or_insert(why);
                }
                let why = match why {
                    StopCause::Order => "as ordered",
                    StopCause::MaxTime => "its time is up",
                };
                let text = format!("{task} leaves at step {}: {why}", step.0);
                draft.because(Reason::Remark(text));
            }
            RankReport::Failed { message, retryable, blames, damaged } => {
                if let Some(gang) = self.gangs.get_mut(&task.workload) {
                    // Ranks have other numbers in another generation.
                    let blames = blames.filter(|_| is_current);
                    let (stays, is_hearsay) = (false, false);
                    let words =
                        LastWords { message, retryable, blames, stays, damaged, is_hearsay };
                    gang.failed(rank, worker, words, now);
                }
            }
            RankReport::Checkpoint(fact) => self.checkpoint(draft, records, now, who, fact),
            RankReport::Finished(fact) => self.finished(draft, now, who, fact),
            // Flight logs and stacks stay with the worker.
            RankReport::Step(_)
            | RankReport::Evaluation(_)
            | RankReport::Busy { .. }
            | RankReport::Ready { .. }
            | RankReport::Flight { .. }
            | RankReport::Stacks { .. } => {}
        }
    }

    /// The current job of a task, with its version.
    fn job_of(&self, task: &TaskId) -> Option<(u64, Arc<JobRecord>)> {
        match self.index.get(&task.workload) {
            Some(entry) => match &entry.workload {
                Workload::Job(job) => Some((entry.version, Arc::clone(job))),
                Workload::Endpoint(_) => None,
            },
            None => None,
        }
    }

    /// A complete checkpoint: recorded, it may be resumed from. The oldest beyond the job's policy
    /// go in the same transaction.
    fn checkpoint(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        who: &Speaker<'_>,
        fact: CheckpointFact,
    ) {
        let task = who.task;
        let Some((version, job)) = self.job_of(task) else { return };
        let name = job.spec.name.clone();
        let step = fact.step;
        let fact = CheckpointFact { metrics: finite(fact.metrics), ..fact };
        if let Err(found) = check_checkpoint(job.status.generation, who.rank, &fact) {
            return draft
                .because(Reason::Remark(format!("refused a checkpoint of {task}: {found}")));
        }
        let marks = |fact: &CheckpointFact| {
            (fact.step, fact.generation, fact.manifest_key.clone(), fact.manifest_digest.clone())
        };
        if job.status.checkpoint.as_ref().map(marks) == Some(marks(&fact)) {
            draft.because(Reason::Remark(format!("step {} of {task} is recorded", step.0)));
            return self.deliver_to_gang(draft, &job, &RankOrder::Committed { step });
        }
        if let Some(newest) = &job.status.checkpoint
            && newest.step >= step
        {
            let newest = newest.step.0;
            let text = format!("a checkpoint of {task} at step {}: {newest} is recorded", step.0);
            return draft.because(Reason::Remark(text));
        }
        draft.decided(Reason::Remark(format!("recorded step {} of {task}", step.0)));
        // A job that went back from one that is damaged makes progress when it is beyond that.
        let is_beyond = is_beyond_recorded(records, &name, step);
        self.change_job(draft, version, &job, |status| {
            status.checkpoint = Some(fact.clone());
            if is_beyond {
                status.failures = 0;
            }
        });
        record_checkpoint(draft, &name, &fact, now);
        let surplus = surplus_checkpoints(records, &job, std::slice::from_ref(&fact));
        draft.publish(&name, JobEvent::Checkpoint(fact));
        self.deliver_to_gang(draft, &job, &RankOrder::Committed { step });
        if !surplus.is_empty() {
            surplus.into_iter().for_each(|key| draft.delete(key));
            sweep_store(draft, &name);
        }
    }

    /// The model is written: recorded under the job's name.
    fn finished(&mut self, draft: &mut Draft, now: Millis, who: &Speaker<'_>, fact: ModelFact) {
        let task = who.task;
        let Some((version, job)) = self.job_of(task) else { return };
        if who.rank != Rank(0) || fact.key.len() > KEY_BYTES_MAX {
            let text =
                format!("refused a model of {task}: expected one of rank 0 with a short key");
            return draft.because(Reason::Remark(text));
        }
        let fact = ModelFact { metrics: finite(fact.metrics), ..fact };
        if job.status.model.as_ref() == Some(&fact) {
            return draft.because(Reason::Remark(format!("the model of {task} is recorded")));
        }
        let name = job.spec.name.clone();
        let record = ModelRecord {
            name: name.clone(),
            job: name.clone(),
            algorithm: job.spec.algorithm.clone(),
            fact: fact.clone(),
            created_ms: now.0,
        };
        self.change_job(draft, version, &job, |status| {
            status.reason = "the model is recorded, its ranks are leaving".into();
            status.model = Some(fact);
        });
        draft.put(RecordKey::new(KIND_MODEL, name.as_str()), Expect::Anything, &record);
    }

    /// An answer of the store: complete checkpoints of the generation that has just ended, which no
    /// leader was there to record.
    pub(super) fn adopted(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        name: &Name,
        generation: Generation,
        facts: Vec<CheckpointFact>,
    ) {
        let gang = self.gangs.get(name).filter(|gang| gang.adopt_asked.is_some());
        let awaited = gang.is_some_and(|gang| gang.generation == generation);
        let entry = self.index.get(name).filter(|_| awaited);
        let Some((version, Workload::Job(job))) = entry.map(|e| (e.version, e.workload.clone()))
        else {
            let text =
                format!("checkpoints of {generation} of `{name}` come too late to be adopted");
            return draft.because(Reason::Remark(text));
        };
        if job.status.phase != Phase::Queued || job.status.gang.is_empty() {
            let text = format!("`{name}` waits for no checkpoints of {generation}");
            return draft.because(Reason::Remark(text));
        }
        let newest = job.status.checkpoint.as_ref().map(|fact| fact.step);
        let is_new = |fact: &CheckpointFact| {
            check_checkpoint(generation, Rank(0), fact).is_ok()
                && newest.is_none_or(|newest| fact.step > newest)
        };
        let mut facts: Vec<CheckpointFact> = facts.into_iter().filter(is_new).collect();
        facts.sort_by_key(|fact| fact.step);
        facts.dedup_by_key(|fact| fact.step);
        let kept = ADOPTED_MAX.min(job.spec.checkpoint.keep.get() as usize);
        let facts = facts.split_off(facts.len().saturating_sub(kept));
        let surplus = surplus_checkpoints(records, &job, &facts);
        self.change_job(draft, version, &job, |status| {
            status.gang.clear();
            if let Some(newest) = facts.last() {
                status.checkpoint = Some(newest.clone());
                let step = newest.step.0;
                status.reason = format!("adopted step {step}, complete but not recorded before");
                // It went on between the checkpoint before and this one: only the failure that
                // ended it counts.
                status.failures = status.failures.min(1);
            }
        });
        let adopted = facts.last().map(|newest| {
            let found = count(facts.len(), "checkpoint");
            format!(
                "adopted {found} that {generation} completed unrecorded, up to step {}",
                newest.step.0
            )
        });
        for fact in facts {
            record_checkpoint(draft, name, &fact, now);
            draft.publish(name, JobEvent::Checkpoint(fact));
        }
        surplus.into_iter().for_each(|key| draft.delete(key));
        sweep_store(draft, name);
        if let Some(text) = adopted {
            draft.note(name, generation, None, text);
        }
    }

    /// An order to every rank that is present.
    fn deliver_to_gang(&self, draft: &mut Draft, job: &JobRecord, order: &RankOrder) {
        for place in &job.status.gang {
            let task = place.task(&job.spec.name, job.status.generation);
            self.deliver(draft, &task, order.clone());
        }
    }

    /// An order to one task, if it is present on an attached worker.
    fn deliver(&self, draft: &mut Draft, task: &TaskId, order: RankOrder) {
        let host = self.workers.values().find(|worker| worker.tasks.contains_key(task));
        if let Some(session) = host.and_then(|worker| worker.session) {
            draft.deliver(session, task, order);
        }
    }
}

/// Whether no checkpoint of the job is recorded at this step or a later one.
fn is_beyond_recorded(records: &Records, job: &Name, step: Step) -> bool {
    let prefix = format!("{job}/");
    let newest = records.list(KIND_CHECKPOINT, &prefix).map(|(key, _)| key.id.clone());
    newest.max().is_none_or(|newest| newest < CheckpointRecord::id(job, step))
}

fn check_checkpoint(
    generation: Generation,
    rank: Rank,
    fact: &CheckpointFact,
) -> Result<(), String> {
    if fact.generation != generation {
        return Err(format!("found {}, expected {generation}", fact.generation));
    }
    if rank != Rank(0) {
        return Err(format!("found one of {rank}, expected one of {}", Rank(0)));
    }
    let length = fact.manifest_key.len().max(fact.manifest_digest.len());
    if length > KEY_BYTES_MAX {
        return Err(format!("found a key of {length} bytes, expected at most {KEY_BYTES_MAX}"));
    }
    Ok(())
}

fn record_checkpoint(draft: &mut Draft, job: &Name, fact: &CheckpointFact, now: Millis) {
    let key = RecordKey::new(KIND_CHECKPOINT, CheckpointRecord::id(job, fact.step));
    let record = CheckpointRecord {
        job: job.clone(),
        fact: fact.clone(),
        committed_ms: now.0,
        damaged: None,
    };
    draft.put(key, Expect::Anything, &record);
}

/// Without values that JSON cannot hold, which would make the record unreadable.
fn finite(mut metrics: BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    metrics.retain(|_, value| value.is_finite());
    while metrics.len() > METRICS_MAX {
        metrics.pop_last();
    }
    metrics
}
