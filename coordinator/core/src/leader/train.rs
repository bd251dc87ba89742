//! The life of a job: start its ranks, form the group, watch it run, find out what failed first,
//! clear up, begin the next generation.
//!
//! Level-triggered: each step is derived from the job's record and from what the workers have, so
//! that a new leader goes on from wherever the former one was. What each phase means here:
//! *queued* with a gang: the former generation is being cleared (tasks killed, then the store asked
//! for checkpoints nobody recorded); *queued* without: it may be placed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api::events::JobEvent;
use api::ids::{Generation, Name, Rank, Secret};
use api::records::{
    EndpointRecord, Failure, JobRecord, JobStatus, KIND_ENDPOINT, Phase, Placement,
};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, RankOrder, StopCause, TrainAssignment,
};
use api::units::Span;

use super::Leader;
use super::decision::{Effect, Millis};
use super::draft::{Draft, Expect};
use super::gang::{self, Gang, Verdict};
use super::index::Workload;
use super::reason::Reason;
use super::regroup::{Regrouped, Why};
use super::retain;
use super::schedule;
use super::standing::{Standing, ended_unseen, slowest};
use super::workers::{Stage, Task};
use crate::records::Records;

/// How long the store may take to tell of unrecorded checkpoints before the job goes on without.
const ADOPT_WAIT_MS: u64 = 10_000;
/// How long ranks may take to leave after the model is recorded; nothing of worth is left in them.
const FINISH_WAIT_MS: u64 = 60_000;
/// How long ranks may take to finish a step and write a checkpoint after they were asked to stop.
pub(super) const STOP_WAIT_MS: u64 = 600_000;

/// The reason of a job that is being stopped.
pub(super) const STOPPING: &str = "asked to stop: writing a checkpoint";
/// Why ranks are asked to leave when a person wants it.
pub(super) const BY_A_USER: &str = "stopped by a user";

impl Leader {
    /// Records a job as it is about to be, and tells its watchers.
    pub(super) fn put_job(&mut self, draft: &mut Draft, expect: Expect, mut job: Arc<JobRecord>) {
        let name = job.spec.name.clone();
        let status = &mut Arc::make_mut(&mut job).status;
        self.rate_gang(status);
        self.remember(&name, status);
        let workload = Workload::Job(Arc::clone(&job));
        draft.put(workload.key(), expect, &*job);
        draft.publish(&name, JobEvent::Status(Box::new(job.status.clone())));
        draft.decided(Reason::changed(name, job.status.phase, &job.status.reason));
        self.sweep_if_over(draft, &job);
        self.index.set(workload);
    }

    /// Records a change of a job's status.
    pub(super) fn change_job(
        &mut self,
        draft: &mut Draft,
        version: u64,
        job: &JobRecord,
        change: impl FnOnce(&mut JobStatus),
    ) {
        let mut job = self.accounted(job);
        let was_running = job.status.phase == Phase::Running;
        change(&mut job.status);
        if was_running && matches!(job.status.phase, Phase::Queued | Phase::Failed) {
            self.count_broken(&mut job.status, &job.spec.name);
        }
        self.put_job(draft, Expect::Version(version), Arc::new(job));
    }

    /// One step in the life of a job; does nothing when there is nothing to do.
    pub(super) fn advance_job(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) {
        match job.status.phase {
            Phase::Queued if job.status.gang.is_empty() => {}
            Phase::Queued => self.clear_job(draft, now, version, job),
            Phase::Starting | Phase::Running => {
                self.advance_gang(draft, records, now, version, job);
            }
            Phase::Stopping => self.advance_stop(draft, now, version, job),
            Phase::Stopped | Phase::Succeeded | Phase::Failed => {}
        }
    }

    // ---- queued: clear the former generation ------------------------------------------------

    fn clear_job(&mut self, draft: &mut Draft, now: Millis, version: u64, job: &Arc<JobRecord>) {
        let (name, generation) = (job.spec.name.clone(), job.status.generation);
        let left = self.left_over(&Workload::Job(Arc::clone(job)), now);
        let Some(gang) = self.gangs.get_mut(&name) else { return };
        gang.clearing_since.get_or_insert(now);
        if let Some(waits_for) = left {
            return draft.because(Reason::Clearing { name, generation, waits_for });
        }
        match gang.adopt_asked {
            None => {
                gang.adopt_asked = Some(now);
                let after = job.status.checkpoint.as_ref().map(|fact| fact.step);
                draft.because(Reason::Adopting { name: name.clone(), generation });
                draft.effect(Effect::Adopt { job: name, generation, after });
            }
            Some(asked) if now.since(asked) >= ADOPT_WAIT_MS => {
                let text = format!(
                    "the store did not tell within {ADOPT_WAIT_MS} ms which checkpoints \
                     {generation} completed: going on from the last recorded one"
                );
                draft.note(&name, generation, None, text);
                self.change_job(draft, version, job, |status| status.gang.clear());
                retain::sweep_store(draft, &name);
            }
            Some(_) => {}
        }
    }

    // ---- placed -----------------------------------------------------------------------------

    /// Starts the next generation of a job.
    pub(super) fn begin_job(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        version: u64,
        job: &Arc<JobRecord>,
        gang: Vec<Placement>,
        now: Millis,
    ) {
        let name = job.spec.name.clone();
        // Above the generations of an endpoint of the same name, so that task ids differ.
        let other = records.read::<EndpointRecord>(KIND_ENDPOINT, name.as_str());
        let other = other.ok().flatten().map(|(_, endpoint)| endpoint.status.generation);
        let generation = job.status.generation.max(other.unwrap_or_default()).next();
        let from = begins_at(&job.status);
        let places = schedule::describe(&gang);
        let mut record = self.accounted(job);
        self.gangs.insert(name.clone(), Gang::new(generation, Some(now)));
        draft.decided(Reason::Placed { name: name.clone(), generation, places: places.clone() });
        let status = &mut record.status;
        status.restarts += u64::from(status.generation > Generation(0));
        status.generation = generation;
        status.phase = Phase::Starting;
        status.reason = format!("starting {from}: {places}");
        status.gang = gang;
        status.completed.clear();
        status.spares_started = 0;
        // Whatever was computed beyond is computed again.
        status.furthest = status.checkpoint.as_ref().map(|fact| fact.step).unwrap_or_default();
        let record = Arc::new(record);
        self.put_job(draft, Expect::Version(version), Arc::clone(&record));
        draft.note(
            &name,
            generation,
            None,
            format!("generation {generation} starts {from}: {places}"),
        );
        for place in &record.status.gang {
            self.start_rank(draft, &record, place);
        }
    }

    /// Tells the worker to start one rank, if it is attached.
    pub(super) fn start_rank(
        &mut self,
        draft: &mut Draft,
        job: &Arc<JobRecord>,
        place: &Placement,
    ) {
        let status = &job.status;
        let here = status.gang.iter().filter(|other| other.worker == place.worker).count();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let assignment = Assignment::Train(TrainAssignment {
            spec: job.spec.clone(),
            generation: status.generation,
            rank: place.rank,
            world_size: count(status.gang.len()),
            local_rank: place.local_rank,
            local_world_size: count(here),
            restore: status.checkpoint.clone(),
            secret: Secret::new(""),
            elapsed: Span::millis(budget_used(status)),
            spare: false,
        });
        self.start_task(draft, &Workload::Job(Arc::clone(job)), place, assignment);
    }

    /// Tells the worker to start a task, if it is attached, and counts the task as its.
    pub(super) fn start_task(
        &mut self,
        draft: &mut Draft,
        workload: &Workload,
        place: &Placement,
        assignment: Assignment,
    ) {
        let task = workload.task(place);
        let Some(worker) = self.workers.get_mut(&place.worker) else { return };
        let Some(session) = worker.session else { return };
        worker.tasks.insert(task.clone(), Task::new(Stage::Told, workload.generation()));
        let assignment = Box::new(assignment);
        draft.send(session, CoordinatorMessage::Start { task, assignment });
    }

    // ---- starting and running ---------------------------------------------------------------

    fn advance_gang(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) {
        let name = &job.spec.name;
        let workload = Workload::Job(Arc::clone(job));
        let mut standing = self.standing(&workload, now);
        let Some(gang) = self.gangs.get_mut(name) else { return };
        let is_starting = job.status.phase == Phase::Starting;
        // A gang that an earlier leader was starting: this leader does not hold its secret, and
        // cannot tell a rank that never started from one that ended.
        let is_inherited = is_starting && !gang.is_mine();
        if job.status.model.is_some() {
            standing.settle(gang, &ExitCause::Completed, now);
            return self.advance_finish(draft, now, version, job, &standing);
        }
        if !is_inherited {
            standing.settle(gang, &ended_unseen(), now);
        }
        if is_starting && let Some((rank, worker)) = slowest(&self.workers, &workload, &standing) {
            gang.give_up_if_overdue(rank, worker, now);
        }
        // A worker whose session is gone while the other ranks have lost its ranks, too, is not just
        // out of the leader's sight: its lease is not waited for.
        for blamed in gang.all_blamed() {
            let place = job.status.gang.iter().find(|place| place.rank == blamed);
            let is_cut = |place: &&Placement| {
                self.workers.get(&place.worker).is_some_and(|worker| worker.session.is_none())
            };
            let Some(worker) = place.filter(is_cut).map(|place| place.worker.clone()) else {
                continue;
            };
            for place in job.status.gang.iter().filter(|place| place.worker == worker) {
                let reason = "its session and its ranks' connections broke".to_owned();
                gang.exited(place.rank, &worker, ExitCause::WorkerLost { reason }, now);
            }
        }
        let lease = self.options.lease_ms;
        match gang.verdict(|rank| standing.present.contains_key(&rank), now, lease) {
            Verdict::Fine => {}
            Verdict::Await(text) => {
                return draft.because(Reason::Waiting { name: name.clone(), text });
            }
            Verdict::Cause(failure) => {
                if let Some(failure) = self.go_back(draft, records, now, version, job, failure) {
                    self.fail_job(draft, now, version, job, failure);
                }
                return;
            }
            Verdict::AllWait => {
                let why = Why::LeaderChanged;
                if let Regrouped::NobodyHoldsState = self.regroup_job(draft, now, version, job, why)
                {
                    self.requeue_job(draft, now, version, job);
                }
                return;
            }
        }
        // No failure counts: what is broken was broken by a worker that leaves. A gang that starts
        // without a state holds nothing worth a checkpoint, so that it is not waited for.
        let (is_broken, leaver) = (gang.is_broken(), gang.leaver().cloned());
        let was_stopped = gang.stopped.is_some();
        if is_broken || (is_starting && leaver.is_some()) {
            if !was_stopped {
                let why =
                    leaver.as_ref().map(|leaver| self.how_it_leaves(leaver)).unwrap_or_default();
                let why = Why::Left(why);
                if let Regrouped::Yes = self.regroup_job(draft, now, version, job, why) {
                    return;
                }
            }
            // The last that hold the state are those that leave: they run first, then they save it.
            if is_broken || was_stopped || !self.holds_state(job) {
                return self.requeue_job(draft, now, version, job);
            }
        }
        let may_meet = is_starting || self.waits_for_state(job);
        if may_meet && job.status.stop_asked && self.has_newcomers(job) {
            let why = Why::Left("its ranks meet to save what they hold".into());
            if let Regrouped::Yes = self.regroup_job(draft, now, version, job, why) {
                return;
            }
        }
        if job.status.phase == Phase::Running && job.status.stop_asked && !is_broken {
            // The newcomers that it waited for have got the state meanwhile.
            return self.stop_at_a_boundary(draft, version, job);
        }
        if is_inherited {
            return self.take_over(draft, now, version, job, &standing);
        }
        if standing.is_empty() {
            return self.end_without_model(draft, now, version, job);
        }
        if is_starting {
            return self.advance_start(draft, now, version, job, &standing);
        }
        let completed: BTreeSet<Rank> =
            self.gangs.get(name).into_iter().flat_map(Gang::completed).collect();
        let is_whole = standing.present.len() == job.status.gang.len();
        if is_whole && self.watch_over(draft, now, version, job) {
            return;
        }
        if is_whole && self.reshape_job(draft, now, version, job) {
            return;
        }
        if self.write_ledger(draft, version, job) {
            return;
        }
        if !completed.iter().all(|rank| job.status.completed.contains(rank)) {
            self.change_job(draft, version, job, |status| {
                let known: BTreeSet<Rank> = status.completed.iter().copied().collect();
                status.completed = known.union(&completed).copied().collect();
                let (ended, all) = (status.completed.len(), status.gang.len());
                status.reason = format!("{ended} of {all} ranks have ended well");
            });
        }
    }

    /// Whether the gang has ranks that hold no state, beside others that do.
    fn has_newcomers(&self, job: &Arc<JobRecord>) -> bool {
        let (members, holds_state) = self.members(job, None);
        let holders = members.iter().filter(|member| member.holds_state).count();
        holds_state && holders < job.status.gang.len()
    }

    /// Whether a living task of the job's gang, leaving or not, holds a state.
    pub(super) fn holds_state(&self, job: &Arc<JobRecord>) -> bool {
        let workload = Workload::Job(Arc::clone(job));
        job.status.gang.iter().any(|place| {
            let worker = self.workers.get(&place.worker).filter(|worker| !worker.is_lost);
            let task = worker.and_then(|worker| worker.tasks.get(&workload.task(place)));
            task.is_some_and(|task| task.holds_state && !task.kill_told)
        })
    }

    // ---- ends -------------------------------------------------------------------------------

    /// Every rank has left in good order before the last step, and no user asked for it.
    fn end_without_model(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) {
        let Some(gang) = self.gangs.get(&job.spec.name) else { return };
        if gang.stopped == Some(StopCause::MaxTime) || is_time_up(job, now) {
            let at = reached(&job.status);
            self.change_job(draft, version, job, |status| {
                stop_clock(status, now);
                status.phase = Phase::Stopped;
                status.reason = format!("its ranks reached a stop condition {at}");
                status.completed.clear();
                status.ended_ms = Some(now.0);
            });
            return self.forget(draft, job);
        }
        // What an earlier leader was told of it is not known; that it was in good order is.
        let was_asked = gang.stopped.is_some() || gang.leaver().is_some() || !gang.is_mine();
        if was_asked {
            return self.requeue_job(draft, now, version, job);
        }
        // Counted, or it would begin again and again.
        let place = job.status.gang.first().map(|place| (place.rank, place.worker.clone()));
        let Some((rank, worker)) = place else { return };
        let message = "it left before the last step although nobody had asked it to".to_owned();
        let failure = Failure {
            generation: job.status.generation,
            rank: Some(rank),
            worker,
            cause: ExitCause::Code { code: 0, message, retryable: true, damaged: None },
            time_ms: now.0,
        };
        self.fail_job(draft, now, version, job, failure);
    }

    /// Ends a generation because a worker leaves: nobody's failure, and the job goes on elsewhere.
    fn requeue_job(&mut self, draft: &mut Draft, now: Millis, version: u64, job: &Arc<JobRecord>) {
        let name = job.spec.name.clone();
        let leaver = self.gangs.get(&name).and_then(Gang::leaver);
        let who = match leaver {
            Some(worker) => match self.workers.get(worker).map_or("", |w| w.leave.cause()) {
                "" => format!("its worker `{worker}` left"),
                cause => format!("its worker `{worker}` left ({cause})"),
            },
            None => "its ranks were asked to leave".to_owned(),
        };
        let text = match job.status.stop_asked {
            true => format!("{who}: stopped {}", reached(&job.status)),
            false => format!("{who}: going on {}", begins_at(&job.status)),
        };
        self.change_job(draft, version, job, |status| {
            stop_clock(status, now);
            status.phase = Phase::Queued;
            status.reason = text.clone();
            status.completed.clear();
            end_if_asked(status, now);
        });
        draft.note(&name, job.status.generation, None, text);
        self.forget(draft, job);
    }

    fn fail_job(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        failure: Failure,
    ) {
        let name = job.spec.name.clone();
        let (generation, rank) = (failure.generation, failure.rank);
        let what = gang::describe(&failure);
        let failures = self.failures_with(job, &failure);
        let allowed = job.spec.recovery.max_failures;
        let from = begins_at(&job.status);
        if let Some(place) = self.newcomer_at_fault(job, &failure) {
            self.shun(draft, &name, &place.worker, &failure.cause.to_string());
            let why = Why::Left(what.clone());
            if let Regrouped::Yes = self.regroup_job(draft, now, version, job, why) {
                return;
            }
        }
        if let ExitCause::Code { .. } | ExitCause::NotStarted { .. } = failure.cause
            && let Some(gang) = self.gangs.get_mut(&name)
        {
            gang.shunned.failed(&failure.worker, now);
        }
        // What belongs to an incident that was counted does not end what came of it, a last save either.
        let is_counted = failures == job.status.failures;
        if failure.cause.is_retryable() && (failures <= allowed || is_counted) {
            let why = Why::Failed(failure.clone());
            if let Regrouped::Yes = self.regroup_job(draft, now, version, job, why) {
                return;
            }
        }
        // What survivors hold is saved before the job ends; once, whatever comes of it.
        let is_last = failure.cause.is_retryable() && failures > allowed;
        if is_last && job.status.fails_with.is_none() && self.members(job, None).1 {
            let mut last = JobRecord::clone(job);
            last.status.stop_asked = true;
            last.status.fails_with = Some(too_many(&what, failures, &job.status, allowed));
            let why = Why::Failed(failure.clone());
            if let Regrouped::Yes = self.regroup_job(draft, now, version, &Arc::new(last), why) {
                return;
            }
        }
        let (phase, reason) = if let Some(reason) = job.status.fails_with.clone() {
            (Phase::Failed, format!("{reason}; its state could not be saved: {what}"))
        } else if !failure.cause.is_retryable() {
            (Phase::Failed, format!("{what}: trying again would end the same way"))
        } else if failures > allowed {
            (Phase::Failed, too_many(&what, failures, &job.status, allowed))
        } else {
            (Phase::Queued, format!("{what}: restarting {from}"))
        };
        self.change_job(draft, version, job, |status| {
            stop_clock(status, now);
            status.phase = phase;
            status.reason = reason;
            if failures > status.failures {
                status.first_cause = Some(failure);
            }
            status.failures = failures;
            status.completed.clear();
            status.ended_ms = phase.is_terminal().then_some(now.0);
            end_if_asked(status, now);
        });
        draft.note(&name, generation, rank, what);
        self.forget(draft, job);
    }

    /// How many failures there are with this one. What one incident takes away counts once, however
    /// many hosts that is: what is lost of a gang that has not formed again since, and is found to be
    /// lost within the time in which every loss is found.
    pub(super) fn failures_with(&self, job: &Arc<JobRecord>, failure: &Failure) -> u32 {
        let since = self.gangs.get(&job.spec.name).and_then(|gang| gang.incident);
        // A lease runs out a heartbeat after the first word that did not come, at the latest.
        let heartbeat = u64::try_from(self.options.heartbeat.0.as_millis()).unwrap_or(u64::MAX);
        let window = self.options.lease_ms.saturating_add(heartbeat);
        let found = Millis(failure.time_ms);
        let is_near = since.is_some_and(|since| found.since(since) <= window);
        let is_loss =
            matches!(failure.cause, ExitCause::WorkerLost { .. } | ExitCause::Signal { .. });
        // Not of those that were started since.
        let was_there = job.status.gang.iter().any(|place| {
            let is_it = place.worker == failure.worker;
            is_it
                && failure.rank.is_none_or(|rank| rank == place.rank)
                && self.has_held(job, place.rank)
        });
        let is_same = job.status.phase == Phase::Starting && is_near && is_loss && was_there;
        job.status.failures.saturating_add(u32::from(!is_same))
    }

    /// The place of a rank that cannot be part of a job whose other ranks hold its state: its host has
    /// other data, or its device cannot be opened. Not one that ran already.
    fn newcomer_at_fault(&self, job: &Arc<JobRecord>, failure: &Failure) -> Option<Placement> {
        let place = job.status.gang.iter().find(|place| Some(place.rank) == failure.rank)?;
        let is_final = !failure.cause.is_retryable()
            || matches!(failure.cause, ExitCause::NotStarted { .. })
                && !self.gangs.get(&job.spec.name)?.shunned.fits(&place.worker);
        let (_, others_hold_it) = self.members(job, Some(place.rank));
        let is_new = !self.has_held(job, place.rank);
        (is_final && is_new && others_hold_it).then(|| place.clone())
    }

    /// Whether the rank was ever heard to run.
    pub(super) fn has_held(&self, job: &Arc<JobRecord>, rank: Rank) -> bool {
        let gang = self.gangs.get(&job.spec.name);
        let held =
            gang.is_some_and(|gang| gang.ends.iter().any(|end| end.rank == rank && end.held_state));
        let place = job.status.gang.iter().find(|place| place.rank == rank);
        let task = place.and_then(|place| {
            let task = Workload::Job(Arc::clone(job)).task(place);
            self.workers.get(&place.worker)?.tasks.get(&task)
        });
        held || task.is_some_and(|task| task.holds_state)
    }

    /// The model is recorded: the job has succeeded as soon as its ranks have left.
    fn advance_finish(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        standing: &Standing,
    ) {
        let Some(gang) = self.gangs.get_mut(&job.spec.name) else { return };
        let lost = gang
            .ends
            .iter()
            .find(|end| end.exit.as_ref().is_some_and(|e| *e != ExitCause::Completed));
        let remark = lost.map(|end| format!(" ({} left badly after that)", end.rank));
        if standing.is_empty() {
            let step = job.status.model.as_ref().map(|model| model.step).unwrap_or_default();
            self.change_job(draft, version, job, |status| {
                stop_clock(status, now);
                status.phase = Phase::Succeeded;
                status.reason =
                    format!("finished at step {}{}", step.0, remark.unwrap_or_default());
                status.gang.clear();
                status.completed.clear();
                status.ended_ms = Some(now.0);
            });
            return self.forget(draft, job);
        }
        let since = *gang.leaving_since.get_or_insert(now);
        gang.is_condemned |= remark.is_some() || now.since(since) >= FINISH_WAIT_MS;
    }

    fn advance_stop(&mut self, draft: &mut Draft, now: Millis, version: u64, job: &Arc<JobRecord>) {
        let name = &job.spec.name;
        let workload = Workload::Job(Arc::clone(job));
        let mut standing = self.standing(&workload, now);
        let Some(gang) = self.gangs.get_mut(name) else { return };
        // A rank that ended while nobody led had been asked to.
        standing.settle(gang, &ExitCause::Completed, now);
        if job.status.model.is_some() {
            return self.advance_finish(draft, now, version, job, &standing);
        }
        // After a kill everybody's end looks like a failure; only the one before it is a cause.
        let failure = match gang.verdict(|_| false, now, 0) {
            Verdict::Cause(failure) if !matches!(failure.cause, ExitCause::Killed { .. }) => {
                Some(failure)
            }
            _ => None,
        };
        if !standing.is_empty() {
            let since = *gang.leaving_since.get_or_insert(now);
            gang.is_condemned |= failure.is_some() || now.since(since) >= STOP_WAIT_MS;
            let why = job.status.fails_with.as_deref().unwrap_or(BY_A_USER);
            return self.tell_to_stop(draft, name, job.status.generation, why);
        }
        let at = reached(&job.status);
        self.change_job(draft, version, job, |status| {
            stop_clock(status, now);
            let how = failure.as_ref().map(|failure| format!("; {}", gang::describe(failure)));
            let how = how.unwrap_or_default();
            (status.phase, status.reason) = match &status.fails_with {
                Some(reason) => (Phase::Failed, format!("{reason}; ended {at}{how}")),
                None => (Phase::Stopped, format!("stopped {at}{how}")),
            };
            status.first_cause = failure.or(status.first_cause.take());
            status.completed.clear();
            status.ended_ms = Some(now.0);
        });
        self.forget(draft, job);
    }

    /// Asks every present task of a generation to leave in good order, once per session.
    pub(super) fn tell_to_stop(
        &mut self,
        draft: &mut Draft,
        name: &Name,
        generation: Generation,
        reason: &str,
    ) {
        for worker in self.workers.values_mut() {
            let Some(session) = worker.session else { continue };
            let theirs =
                |task: &api::TaskId, s: &Task| task.workload == *name && s.generation == generation;
            for (task, state) in
                worker.tasks.iter_mut().filter(|(task, s)| theirs(task, s) && !s.stop_told)
            {
                state.stop_told = true;
                let reason = reason.to_owned();
                draft.deliver(session, task, RankOrder::Stop { reason });
            }
        }
    }

    pub(super) fn forget(&self, draft: &mut Draft, job: &JobRecord) {
        let generation = job.status.generation;
        draft.effect(Effect::ForgetSecret { job: job.spec.name.clone(), generation });
    }
}

/// A job's failures are one too many.
fn too_many(what: &str, failures: u32, status: &JobStatus, allowed: u32) -> String {
    format!(
        "{what}: {} without progress{}, recovery.max_failures = {allowed}",
        super::reason::count(failures as usize, "failure"),
        // Where no generation has begun since, the last step of the one before.
        match status.furthest.max(status.reported).0 {
            0 => String::new(),
            step => format!(" beyond step {step}"),
        }
    )
}

/// A job that was asked to stop and cannot save any more does not go on.
pub(super) fn end_if_asked(status: &mut JobStatus, now: Millis) {
    if status.stop_asked && status.phase == Phase::Queued {
        status.phase = if status.fails_with.is_some() { Phase::Failed } else { Phase::Stopped };
        status.ended_ms = Some(now.0);
    }
}

/// "from step 100" or "from the beginning".
pub(super) fn begins_at(status: &JobStatus) -> String {
    match &status.checkpoint {
        Some(fact) => format!("from step {}", fact.step.0),
        None => "from the beginning".into(),
    }
}

/// "with a checkpoint at step 100" or "without a checkpoint".
fn reached(status: &JobStatus) -> String {
    match &status.checkpoint {
        Some(fact) => format!("with a checkpoint at step {}", fact.step.0),
        None => "without a checkpoint".into(),
    }
}

/// Milliseconds of `stop.max_time` that earlier generations used up.
pub(super) fn budget_used(status: &JobStatus) -> u64 {
    status.elapsed_ms.saturating_sub(status.elapsed_at_resume_ms)
}

/// Whether the job has run for as long as it may, by this leader's clock.
fn is_time_up(job: &JobRecord, now: Millis) -> bool {
    let running = job.status.running_since_ms.map_or(0, |since| now.since(Millis(since)));
    let used = Duration::from_millis(budget_used(&job.status).saturating_add(running));
    job.spec.stop.max_time.is_some_and(|limit| used >= limit.0)
}

/// Adds the time the gang ran to the job's.
pub(super) fn stop_clock(status: &mut JobStatus, now: Millis) {
    if let Some(since) = status.running_since_ms.take() {
        status.elapsed_ms = status.elapsed_ms.saturating_add(now.since(Millis(since)));
    }
}
