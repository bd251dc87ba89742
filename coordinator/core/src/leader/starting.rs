//! From placed to running: tell who is not told, compare fingerprints, introduce the ranks to one
//! another; or take over what an earlier leader was starting.

use std::net::SocketAddr;
use std::sync::Arc;

use api::ids::{Name, Rank, Step};
use api::job::Determinism;
use api::records::{JobRecord, Phase};
use api::session::{ExitCause, RankOrder};

use super::Leader;
use super::decision::Millis;
use super::draft::Draft;
use super::goodput::count_redone_steps;
use super::index::Workload;
use super::reason::Reason;
use super::regroup::{Regrouped, Why};
use super::standing::Standing;
use super::train::{BY_A_USER, STOPPING};
use super::workers::{Stage, Task, task_id};

impl Leader {
    /// A starting gang of an earlier leader goes on when every rank has its peers already, else the
    /// job starts over; that is nobody's failure.
    pub(super) fn take_over(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        standing: &Standing,
    ) {
        let name = job.spec.name.clone();
        let generation = job.status.generation;
        if let Some(place) = standing.away.first() {
            let waits_for = format!("`{}` to come back to the new leader", place.worker);
            return draft.because(Reason::Waiting { name, text: waits_for });
        }
        let has_peers = |(rank, worker): (&Rank, &Name)| {
            let task = task_id(&Workload::Job(Arc::clone(job)), *rank);
            let worker = self.workers.get(worker);
            // Peers of another generation are no peers: the order to be part of this one is lost.
            let task = worker.and_then(|w| w.tasks.get(&task));
            task.is_some_and(|task| task.has_peers && task.generation == generation)
        };
        if standing.is_accounted_for() && standing.present.iter().all(has_peers) {
            return self.run_job(draft, now, version, job, None, "taken over by a new leader");
        }
        if let Regrouped::Yes = self.regroup_job(draft, now, version, job, Why::LeaderChanged) {
            return;
        }
        let text = "starting over: the leader changed before the ranks had met";
        self.change_job(draft, version, job, |status| {
            status.phase = Phase::Queued;
            status.reason = text.into();
        });
        draft.note(&name, generation, None, text);
        self.forget(draft, job);
    }

    /// Starting under this leader: tell who is not told, introduce the ranks to one another, notice
    /// when all of them run.
    pub(super) fn advance_start(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        standing: &Standing,
    ) {
        let name = &job.spec.name;
        // First: a worker that is told to start a rank ends what it has of older generations.
        self.repeat_regroup(draft, job);
        for place in &standing.untold {
            self.start_rank(draft, job, place);
        }
        if self.give_up_deaf(now, job, standing) {
            return;
        }
        if !standing.untold.is_empty() || !standing.away.is_empty() {
            return;
        }
        let Some(ranks) = self.ranks(job, standing) else { return };
        if ranks.iter().all(|rank| rank.stage == Stage::Running) {
            let step = ranks.iter().filter_map(|rank| rank.step).max();
            return self.run_job(draft, now, version, job, step, "every rank runs");
        }
        let is_whole = ranks.len() == job.status.gang.len();
        if !is_whole || ranks.iter().all(|rank| rank.has_peers) {
            return;
        }
        let addresses: Vec<SocketAddr> = ranks.iter().filter_map(|rank| rank.address).collect();
        if addresses.len() < ranks.len() {
            let listening = addresses.len();
            let text = format!("{listening} of {} ranks listen for their peers", ranks.len());
            return draft.because(Reason::Waiting { name: name.clone(), text });
        }
        if self.give_up_unfit(draft, now, job, standing) {
            return;
        }
        let Some(ranks) = self.ranks(job, standing) else { return };
        match agree(job, &ranks) {
            Agreement::Refused(reason) => {
                self.change_job(draft, version, job, |status| {
                    status.phase = Phase::Failed;
                    status.reason = reason;
                    status.ended_ms = Some(now.0);
                });
                self.forget(draft, job);
            }
            Agreement::Unknown => self.await_fingerprints(draft, now, version, job),
            Agreement::Reached { fingerprint, note } => {
                let generation = job.status.generation;
                let text = "every rank listens, they are told of one another".to_owned();
                draft.decided(Reason::Waiting { name: name.clone(), text });
                if job.status.fingerprint.is_none() {
                    self.change_job(draft, version, job, |status| {
                        status.fingerprint = Some(fingerprint);
                    });
                }
                if let Some(note) = note {
                    draft.note(name, generation, None, note);
                }
                self.introduce(draft, job, standing, &addresses);
            }
        }
    }

    /// A worker's list tells that a rank listens, but not how it computes: that follows, unless it was
    /// told in a session of which nothing is known any more.
    fn await_fingerprints(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) {
        let name = &job.spec.name;
        let Some(gang) = self.gangs.get_mut(name) else { return };
        let since = *gang.unknown_since.get_or_insert(now);
        if now.since(since) < self.options.lease_ms {
            let text = "a rank listens, how it computes is not heard yet".to_owned();
            return draft.because(Reason::Waiting { name: name.clone(), text });
        }
        let what = "a rank's fingerprint was lost";
        let why = Why::Left(what.into());
        if let Regrouped::Yes = self.regroup_job(draft, now, version, job, why) {
            return;
        }
        self.change_job(draft, version, job, |status| {
            status.phase = Phase::Queued;
            status.reason = format!("starting over: {what}");
        });
        self.forget(draft, job);
    }

    /// An order to be part of this generation may have been lost with a worker's session.
    fn repeat_regroup(&mut self, draft: &mut Draft, job: &Arc<JobRecord>) {
        let generation = job.status.generation;
        for place in job.status.gang.iter().filter(|place| place.started_as.is_some()) {
            let task = place.task(&job.spec.name, generation);
            let worker = self.workers.get(&place.worker).filter(|w| w.session.is_some());
            let state = worker.and_then(|w| w.tasks.get(&task));
            if state.is_some_and(|state| state.generation != generation) {
                let reason = job.status.reason.clone();
                self.tell_to_regroup(draft, job, place, &reason);
            }
        }
    }

    /// A member that has not come to listen for long after it was told to regroup hangs: it looks for
    /// orders between the blocks of its model. True when there was one.
    fn give_up_deaf(&mut self, now: Millis, job: &Arc<JobRecord>, standing: &Standing) -> bool {
        let name = &job.spec.name;
        let min = u64::try_from(job.spec.recovery.hang_min.0.as_millis()).unwrap_or(u64::MAX);
        let Some(gang) = self.gangs.get(name) else { return false };
        let limit = gang.pace.limit_of_orders(min);
        let overdue =
            gang.placed_at.map(|placed| now.since(placed)).filter(|since| *since >= limit);
        let Some(waited) = overdue.filter(|_| min > 0) else { return false };
        let workload = Workload::Job(Arc::clone(job));
        let deaf = job.status.gang.iter().find(|place| {
            let task = self.workers.get(&place.worker).and_then(|w| {
                w.tasks.get(&workload.task(place)).filter(|_| place.started_as.is_some())
            });
            standing.present.contains_key(&place.rank)
                && task.is_some_and(|task| task.stage < Stage::Listening && task.holds_state)
        });
        let Some(place) = deaf else { return false };
        let reason = format!("it does not meet the others {} s after the order to", waited / 1000);
        if let Some(gang) = self.gangs.get_mut(name) {
            gang.exited(place.rank, &place.worker, ExitCause::Killed { reason }, now);
        }
        true
    }

    /// Newcomers that compute in another way than ranks that hold the job's state are given up: it
    /// goes on without them, and without their hosts. True when there were any.
    fn give_up_unfit(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        job: &Arc<JobRecord>,
        standing: &Standing,
    ) -> bool {
        let Some(fingerprint) = job.status.fingerprint.clone() else { return false };
        let Some(ranks) = self.ranks(job, standing) else { return false };
        let is_strict = job.spec.parallel.determinism == Determinism::Strict;
        if !is_strict || ranks.iter().all(|task| !task.holds_state) {
            return false;
        }
        let differs = |task: &Task| {
            !task.holds_state && task.fingerprint.as_ref().is_some_and(|f| *f != fingerprint)
        };
        let unfit: Vec<(Rank, Name, String)> = standing
            .present
            .iter()
            .zip(&ranks)
            .filter(|(_, task)| differs(task))
            .map(|((rank, worker), task)| {
                let found = task.fingerprint.clone().unwrap_or_default();
                (*rank, worker.clone(), found)
            })
            .collect();
        for (rank, worker, found) in &unfit {
            let reason = format!(
                "it computes as `{found}`, the job began as `{fingerprint}`: bit-identical results \
                 hold within one numeric fingerprint only"
            );
            self.shun(draft, &job.spec.name, worker, &reason);
            if let Some(gang) = self.gangs.get_mut(&job.spec.name) {
                gang.exited(*rank, worker, ExitCause::NotStarted { reason }, now);
            }
        }
        !unfit.is_empty()
    }

    /// The job uses this worker no more, and people are told why.
    pub(super) fn shun(&mut self, draft: &mut Draft, job: &Name, worker: &Name, why: &str) {
        let Some(gang) = self.gangs.get_mut(job) else { return };
        if gang.shunned.is_unfit(worker, why) {
            let text = format!("`{worker}` is not used for this job any more: {why}");
            draft.note(job, gang.generation, None, text);
        }
    }

    /// The present ranks in order, with what each reported; `None` when one has just gone.
    fn ranks(&self, job: &Arc<JobRecord>, standing: &Standing) -> Option<Vec<&Task>> {
        let workload = Workload::Job(Arc::clone(job));
        let task = |(rank, worker): (&Rank, &Name)| {
            self.workers.get(worker)?.tasks.get(&task_id(&workload, *rank))
        };
        standing.present.iter().map(task).collect()
    }

    /// Gives every rank that lacks them the addresses of all.
    fn introduce(
        &mut self,
        draft: &mut Draft,
        job: &Arc<JobRecord>,
        standing: &Standing,
        addresses: &[SocketAddr],
    ) {
        let workload = Workload::Job(Arc::clone(job));
        for (rank, worker) in &standing.present {
            let task = task_id(&workload, *rank);
            if let Some(worker) = self.workers.get_mut(worker)
                && let Some(session) = worker.session
                && let Some(state) = worker.tasks.get_mut(&task)
                && !state.has_peers
            {
                state.has_peers = true;
                let (generation, addresses) = (job.status.generation, addresses.to_vec());
                draft.deliver(session, &task, RankOrder::Peers { generation, addresses });
            }
        }
    }

    fn run_job(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        step: Option<Step>,
        why: &str,
    ) {
        let is_asked_to_stop = job.status.stop_asked;
        self.change_job(draft, version, job, |status| {
            status.phase = if is_asked_to_stop { Phase::Stopping } else { Phase::Running };
            status.reason = match (&status.fails_with, is_asked_to_stop) {
                (Some(_), _) => "one failure too many: saving what its ranks hold".into(),
                (None, true) => STOPPING.into(),
                (None, false) => why.into(),
            };
            if let Some(step) = step {
                count_redone_steps(status, step);
            }
            if let Some(step) = step.filter(|step| *step > status.furthest) {
                // Steps were gained before the failure that led here.
                status.furthest = step;
                status.failures = 0;
            }
            status.started_ms.get_or_insert(now.0);
            status.running_since_ms = Some(now.0);
        });
        if is_asked_to_stop {
            let why = job.status.fails_with.as_deref().unwrap_or(BY_A_USER);
            self.tell_to_stop(draft, &job.spec.name, job.status.generation, why);
        }
    }
}

/// Whether ranks may compute together.
enum Agreement {
    Reached { fingerprint: String, note: Option<String> },
    Refused(String),
    Unknown,
}

/// Compares the ranks' numeric fingerprints with one another and with the job's: the promise of
/// equal bits holds within one only.
fn agree(job: &JobRecord, ranks: &[&Task]) -> Agreement {
    let Some(fingerprints) =
        ranks.iter().map(|rank| rank.fingerprint.as_deref()).collect::<Option<Vec<&str>>>()
    else {
        return Agreement::Unknown;
    };
    let Some(first) = fingerprints.first().copied() else { return Agreement::Unknown };
    let differing = fingerprints.iter().zip(0..).find(|(other, _)| **other != first);
    let former = job.status.fingerprint.as_deref().filter(|former| *former != first);
    let difference = match (differing, former) {
        (Some((other, rank)), _) => {
            format!("{} computes as `{first}` and {} as `{other}`", Rank(0), Rank(rank))
        }
        (None, Some(former)) => {
            format!("the ranks compute as `{first}`, the job began as `{former}`")
        }
        (None, None) => {
            return Agreement::Reached { fingerprint: first.to_owned(), note: None };
        }
    };
    match job.spec.parallel.determinism {
        Determinism::Relaxed => Agreement::Reached {
            fingerprint: first.to_owned(),
            note: Some(format!("{difference}: the result is no longer bit-identical")),
        },
        Determinism::Strict => Agreement::Refused(format!(
            "{difference}: bit-identical results hold within one numeric fingerprint only; use \
             hosts of one kind, or set parallel.determinism = \"relaxed\""
        )),
    }
}
