//! The next generation out of the present one, in place: who stays with its process and its state,
//! who takes a lost rank's place, who leaves.
//!
//! After a failure the group is broken: members are told at once, and the step that was lost is
//! redone. A gang that is to grow, or to let go of a worker that leaves, is whole: its ranks are
//! asked to pause, leave their group together between two steps, and nothing is redone. Either way
//! the ranks find out among themselves which state is the newest (`trainer::recovery`); all that is
//! decided here is who they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::ids::{Generation, Name, Rank, Secret, TaskId};
use api::records::{Failure, JobRecord, Phase, Placement, StartedAs};
use api::session::{ExitCause, RankOrder, Regroup};
use api::units::Span;

use super::Leader;
use super::decision::Millis;
use super::draft::{Draft, Expect};
use super::gang::{Gang, Spare};
use super::index::Workload;
use super::reason::{Reason, count};
use super::schedule;
use super::train::{budget_used, stop_clock};
use super::workers::Stage;

/// How long members that are too few wait for a slot before they save their state and leave to the
/// queue: a worker that is started anew is back by then.
const TOO_FEW_WAIT_MS: u64 = 10_000;

/// A process that lives and may be a rank of the next generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) worker: Name,
    pub(super) started_as: StartedAs,
    pub(super) local_rank: u32,
    /// It holds the job's state.
    pub(super) holds_state: bool,
}

impl Process {
    fn of(place: &Placement, generation: Generation, holds_state: bool) -> Self {
        let Placement { rank, worker, started_as, local_rank } = place.clone();
        let started_as = started_as.unwrap_or(StartedAs { generation, rank });
        Self { worker, started_as, local_rank, holds_state }
    }
}

impl Spare {
    fn process(&self) -> Process {
        let TaskId { generation, rank, .. } = self.task;
        let started_as = StartedAs { generation, rank };
        let (worker, local_rank) = (self.worker.clone(), self.local_rank);
        Process { worker, started_as, local_rank, holds_state: false }
    }
}

/// Why a gang regroups.
pub(super) enum Why {
    /// A rank is lost, or the group broke.
    Failed(Failure),
    /// A new leader found it between two generations.
    LeaderChanged,
    /// A worker left before its ranks could be let go of.
    Left(String),
    /// Nothing is broken: there is room for more, or a worker leaves.
    Reshape(String),
}

/// What came of the attempt to regroup.
pub(super) enum Regrouped {
    /// It is decided, or waited for.
    Yes,
    /// Nobody holds a state to go on from: a new gang begins from the last checkpoint.
    NobodyHoldsState,
}

/// Numbers the ranks of a gang of `processes` and of new ones on free slots, up to `ranks`, worker by
/// worker. New ones go where the gang is already, then to where most is free.
pub(super) fn next_gang(
    processes: &[Process],
    free: &BTreeMap<Name, u32>,
    ranks: usize,
) -> Vec<Placement> {
    let mut on: BTreeMap<&Name, (Vec<&Process>, u32)> = BTreeMap::new();
    for process in processes.iter().take(ranks) {
        on.entry(&process.worker).or_default().0.push(process);
    }
    let mut missing = ranks.saturating_sub(processes.len());
    let mut roomy: Vec<(&Name, u32)> = free.iter().map(|(name, slots)| (name, *slots)).collect();
    roomy.sort_by_key(|(name, slots)| {
        (!on.contains_key(name), std::cmp::Reverse(*slots), (*name).clone())
    });
    for (worker, slots) in roomy {
        let taken = missing.min(slots as usize);
        if taken > 0 {
            on.entry(worker).or_default().1 += taken as u32;
            missing -= taken;
        }
    }
    let mut gang = Vec::new();
    for (worker, (mut stay, new)) in on {
        stay.sort_by_key(|process| process.local_rank);
        let mut taken: BTreeSet<u32> = stay.iter().map(|process| process.local_rank).collect();
        for process in stay {
            gang.push((worker, Some(process.started_as), process.local_rank));
        }
        for _ in 0..new {
            let local_rank = lowest_free(&taken);
            taken.insert(local_rank);
            gang.push((worker, None, local_rank));
        }
    }
    let numbered = gang.into_iter().zip(0..).map(|((worker, started_as, local_rank), rank)| {
        Placement { rank: Rank(rank), worker: worker.clone(), started_as, local_rank }
    });
    numbered.collect()
}

/// The lowest number that is not taken.
pub(super) fn lowest_free(taken: &BTreeSet<u32>) -> u32 {
    (0..).find(|number| !taken.contains(number)).unwrap_or(u32::MAX)
}

impl Leader {
    /// Members of the current gang that can go on: their process lives, on a worker that stays. With
    /// whether any of them holds a state.
    pub(super) fn members(
        &self,
        job: &Arc<JobRecord>,
        without: Option<Rank>,
    ) -> (Vec<Process>, bool) {
        let workload = Workload::Job(Arc::clone(job));
        let (mut members, mut holds_state) = (Vec::new(), false);
        let Some(gang) = self.gangs.get(&job.spec.name) else { return (members, false) };
        let gone: BTreeSet<Rank> = gang.gone().collect();
        for place in &job.status.gang {
            let is_out = gone.contains(&place.rank)
                || job.status.completed.contains(&place.rank)
                || gang.is_departing(place.rank)
                || without == Some(place.rank);
            let worker = self.workers.get(&place.worker);
            let worker = worker.filter(|w| !w.is_lost && !is_out);
            if let Some(task) = worker.and_then(|w| w.tasks.get(&workload.task(place)))
                && !task.kill_told
            {
                members.push(Process::of(place, job.status.generation, task.holds_state));
                holds_state |= task.holds_state;
            }
        }
        (members, holds_state)
    }

    /// A worker of the gang that this leader has yet to hear of: its ranks may well be alive.
    pub(super) fn away(&self, job: &Arc<JobRecord>, now: Millis) -> Option<Name> {
        let is_away = |place: &&Placement| {
            !self.workers.contains_key(&place.worker) && !self.is_past_grace(now)
        };
        job.status.gang.iter().find(is_away).map(|place| place.worker.clone())
    }

    /// Spares that live on workers that stay; the ready ones first.
    pub(super) fn spares(&self, job: &Name) -> Vec<Spare> {
        let is_usable = |spare: &&Spare| {
            let worker = self.workers.get(&spare.worker);
            let worker = worker.filter(|w| !w.is_lost && !w.is_leaving && w.health.is_fit());
            worker.is_some_and(|w| w.tasks.contains_key(&spare.task))
        };
        let spares = self.gangs.get(job).map(|gang| gang.spares.as_slice()).unwrap_or_default();
        let mut usable: Vec<Spare> = spares.iter().filter(is_usable).cloned().collect();
        usable.sort_by_key(|spare| !spare.is_ready);
        usable
    }

    /// Goes on from what the members hold in memory, after a failure or a change of leader.
    pub(super) fn regroup_job(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        why: Why,
    ) -> Regrouped {
        let name = job.spec.name.clone();
        // A group that broke a second time while all its ranks live: something lies between them.
        if let Why::Failed(Failure { cause: ExitCause::GroupBroken { .. }, .. }) = &why
            && job.status.failures > 0
            && let Some(blamed) = self.gangs.get(&name).and_then(Gang::blamed)
            && let Some(place) = job.status.gang.iter().find(|place| place.rank == blamed)
            && let Some(gang) = self.gangs.get_mut(&name)
        {
            // It counts as ended, so that its slot comes free.
            let reason = "the others lost it twice: it is replaced".to_owned();
            gang.exited(blamed, &place.worker, ExitCause::Killed { reason }, now);
        }
        if let Some(away) = self.away(job, now) {
            let text = format!("`{away}` to come back to the new leader");
            draft.because(Reason::Waiting { name, text });
            return Regrouped::Yes;
        }
        let (mut members, holds_state) = self.members(job, None);
        if !holds_state {
            return Regrouped::NobodyHoldsState;
        }
        if job.status.stop_asked {
            // They only meet to save what they hold.
            members.retain(|member| member.holds_state);
        }
        let ranks = job.spec.resources.ranks;
        let (min, max) = (ranks.min() as usize, ranks.max() as usize);
        let mut free = self.free_slots();
        if let Some(gang) = self.gangs.get(&name) {
            free.retain(|worker, _| gang.shunned.fits(worker));
        }
        let spares = self.spares(&name);
        let ready = spares.iter().filter(|spare| spare.is_ready).count();
        let at_hand = members.len() + ready;
        let room: usize = free.values().map(|slots| *slots as usize).sum();
        let since = match &why {
            Why::Failed(failure) => now.since(Millis(failure.time_ms)),
            _ => u64::MAX,
        };
        let wait = u64::try_from(job.spec.recovery.wait_for_replacement.0.as_millis());
        let wait = wait.unwrap_or(u64::MAX);
        let former = job.status.gang.len();
        let size = if job.status.stop_asked {
            members.len()
        } else if at_hand >= min {
            if at_hand < former.min(max) && since < wait {
                let text = format!("{at_hand} of {former} ranks are left, waiting for a spare");
                let lacks = former.min(max) - members.len();
                self.tend_spares(draft, now, version, job, lacks);
                if draft.has_writes() {
                    return Regrouped::Yes;
                }
                self.wait_for_more(draft, version, job, text);
                return Regrouped::Yes;
            }
            at_hand.min(max)
        } else if members.len() + spares.len() + room >= min {
            min
        } else if since < wait.max(TOO_FEW_WAIT_MS) {
            let text = format!(
                "{} of at least {min} ranks are left, waiting for a slot before they save their \
                 state and leave",
                members.len()
            );
            self.wait_for_more(draft, version, job, text);
            return Regrouped::Yes;
        } else {
            members.len()
        };
        let mut processes = members;
        let missing = size.saturating_sub(processes.len());
        processes.extend(spares.iter().take(missing).map(Spare::process));
        let gang = next_gang(&processes, &free, size);
        self.next_generation(draft, now, version, job, gang, why);
        Regrouped::Yes
    }

    /// Says, once, that a broken gang waits and for what.
    fn wait_for_more(
        &mut self,
        draft: &mut Draft,
        version: u64,
        job: &Arc<JobRecord>,
        text: String,
    ) {
        let first = self.gangs.get(&job.spec.name).and_then(|gang| gang.ends.first());
        let rank = first.map_or(String::new(), |end| format!("{} is lost, ", end.rank));
        let reason = format!("{rank}{text}");
        if job.status.reason == reason {
            return draft.because(Reason::Waiting { name: job.spec.name.clone(), text });
        }
        self.change_job(draft, version, job, |status| status.reason = reason);
    }

    /// Records the next generation and tells everybody.
    fn next_generation(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        gang: Vec<Placement>,
        why: Why,
    ) {
        let name = job.spec.name.clone();
        let generation = job.status.generation.next();
        let what = match &why {
            Why::Failed(failure) => super::gang::describe(failure),
            Why::LeaderChanged => "the leader changed before the ranks had met".into(),
            Why::Left(text) | Why::Reshape(text) => text.clone(),
        };
        let places = schedule::describe(&gang);
        let stay = gang.iter().filter(|place| place.started_as.is_some()).count();
        let tail = format!("{} of {} stay, going on in place: {places}", stay, gang.len());
        let mut next = Gang::new(generation, Some(now));
        let failures = match &why {
            Why::Failed(failure) => self.failures_with(job, failure),
            _ => job.status.failures,
        };
        if let Some(former) = self.gangs.get_mut(&name) {
            next.incident = match &why {
                Why::Failed(failure) if failures > job.status.failures => {
                    Some(Millis(failure.time_ms))
                }
                _ => former.incident.filter(|_| job.status.phase == Phase::Starting),
            };
            let is_promoted = |spare: &Spare| {
                gang.iter().any(|place| place.task(&name, generation) == spare.task)
            };
            next.pace = former.pace.carried();
            next.shunned = std::mem::take(&mut former.shunned);
            next.spares = std::mem::take(&mut former.spares);
            next.spares.retain(|spare| !is_promoted(spare));
        }
        self.forget(draft, job);
        let mut record = self.accounted(job);
        if job.status.phase == Phase::Running && !matches!(why, Why::Reshape(_)) {
            self.count_broken(&mut record.status, &name);
        }
        self.gangs.insert(name.clone(), next);
        let status = &mut record.status;
        stop_clock(status, now);
        status.restarts += 1;
        status.regroups += 1;
        status.spares_started = 0;
        status.generation = generation;
        status.phase = Phase::Starting;
        status.reason = format!("{what}: {tail}");
        status.gang = gang;
        status.completed.clear();
        let rank = match why {
            Why::Failed(failure) => {
                let rank = failure.rank;
                if failures > status.failures {
                    status.first_cause = Some(failure);
                }
                status.failures = failures;
                rank
            }
            _ => None,
        };
        let record = Arc::new(record);
        draft.decided(Reason::Placed { name: name.clone(), generation, places });
        self.put_job(draft, Expect::Version(version), Arc::clone(&record));
        draft.note(&name, job.status.generation, rank, what.clone());
        draft.note(&name, generation, None, format!("generation {generation}: {tail}"));
        for place in &record.status.gang {
            match place.started_as {
                Some(_) => self.tell_to_regroup(draft, &record, place, &what),
                None => self.start_rank(draft, &record, place),
            }
        }
    }

    /// Tells a living process its part in the current generation.
    pub(super) fn tell_to_regroup(
        &mut self,
        draft: &mut Draft,
        job: &Arc<JobRecord>,
        place: &Placement,
        reason: &str,
    ) {
        let generation = job.status.generation;
        let task = place.task(&job.spec.name, generation);
        let Some(worker) = self.workers.get_mut(&place.worker) else { return };
        let Some(state) = worker.tasks.get_mut(&task) else { return };
        let Some(session) = worker.session else { return };
        state.joins(generation);
        let order = RankOrder::Regroup(Box::new(Regroup {
            generation,
            rank: place.rank,
            world_size: u32::try_from(job.status.gang.len()).unwrap_or(u32::MAX),
            restore: job.status.checkpoint.clone(),
            secret: Secret::new(""),
            elapsed: Span::millis(budget_used(&job.status)),
            reason: reason.to_owned(),
        }));
        draft.deliver(session, &task, order);
    }

    /// Asks the ranks that run to pause, once per session; whether all have.
    fn pause(&mut self, draft: &mut Draft, job: &Arc<JobRecord>, reason: &str) -> bool {
        let workload = Workload::Job(Arc::clone(job));
        let mut all = true;
        for place in &job.status.gang {
            let task = workload.task(place);
            let Some(worker) = self.workers.get_mut(&place.worker) else { return false };
            let Some(state) = worker.tasks.get_mut(&task) else { return false };
            all &= state.is_paused;
            if let Some(session) = worker.session.filter(|_| !state.is_paused && !state.pause_told)
            {
                state.pause_told = true;
                draft.deliver(session, &task, RankOrder::Pause { reason: reason.to_owned() });
            }
        }
        all
    }

    fn all_paused(&self, job: &Arc<JobRecord>) -> bool {
        let workload = Workload::Job(Arc::clone(job));
        job.status.gang.iter().all(|place| {
            let worker = self.workers.get(&place.worker);
            let task = worker.and_then(|worker| worker.tasks.get(&workload.task(place)));
            task.is_some_and(|task| task.is_paused)
        })
    }

    /// Whether a rank that runs, on a worker that stays, has yet to get the state from the others.
    pub(super) fn waits_for_state(&self, job: &Arc<JobRecord>) -> bool {
        let workload = Workload::Job(Arc::clone(job));
        let departs = |rank| {
            let gang = self.gangs.get(&job.spec.name);
            gang.is_some_and(|gang| gang.is_departing(rank))
        };
        job.status.gang.iter().filter(|place| !departs(place.rank)).any(|place| {
            let worker = self.workers.get(&place.worker);
            let task = worker.and_then(|worker| worker.tasks.get(&workload.task(place)));
            task.is_some_and(|task| task.stage == Stage::Running && !task.holds_state)
        })
    }

    /// A whole gang that runs: lets go of workers that leave, and grows into free slots. True when
    /// something was decided.
    pub(super) fn reshape_job(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) -> bool {
        let name = job.spec.name.clone();
        let Some(gang) = self.gangs.get(&name) else { return false };
        let leaver = gang.leaver().cloned();
        let ranks = job.spec.resources.ranks;
        let (min, max) = (ranks.min() as usize, ranks.max() as usize);
        let former = job.status.gang.len();
        if leaver.is_none() && former < min {
            // Its members only met to save what they hold.
            let why = "too few ranks are left: saving the state until there are slots";
            self.tell_to_stop(draft, &name, job.status.generation, why);
            return false;
        }
        let replacing = gang.replacing.filter(|_| leaver.is_none());
        let (members, holds_state) = self.members(job, replacing);
        if leaver.is_some() && !holds_state && self.waits_for_state(job) {
            // A step later somebody who stays holds it.
            return false;
        }
        if let Some(worker) = leaver.as_ref().filter(|_| !holds_state) {
            // Newcomers would have nobody to get the state from.
            let why = self.how_it_leaves(worker);
            let why = format!("{why}, and no rank stays that holds the state");
            self.tell_to_stop(draft, &name, job.status.generation, &why);
            return false;
        }
        let spares = self.spares(&name);
        let ready = spares.iter().filter(|spare| spare.is_ready).count();
        let wanted = match &leaver {
            Some(_) => former.max(min),
            None if replacing.is_some() => former,
            None if self.has_queue() => former,
            None => max,
        };
        let at_hand = (members.len() + ready).min(wanted);
        let lacks = wanted.saturating_sub(members.len());
        self.tend_spares(draft, now, version, job, lacks);
        if draft.has_writes() {
            return true;
        }
        let all_paused = self.all_paused(job);
        if let Some(gang) = self.gangs.get_mut(&name).filter(|_| all_paused) {
            // By a former leader, for a reason that it knew.
            gang.pausing.get_or_insert_with(|| "the leader changed while they paused".into());
        }
        let is_pausing = self.gangs.get(&name).is_some_and(|gang| gang.pausing.is_some());
        let text = match leaver {
            _ if is_pausing => String::new(),
            Some(worker) => {
                let is_coming = self.spares(&name).len() > ready;
                if at_hand < former && is_coming {
                    return false;
                }
                if at_hand < min {
                    let why = self.how_it_leaves(&worker);
                    let why = format!("{why}, and nobody can take its ranks");
                    self.tell_to_stop(draft, &name, job.status.generation, &why);
                    return false;
                }
                self.how_it_leaves(&worker)
            }
            None if replacing.is_some() => {
                if at_hand < former {
                    return false;
                }
                let rank = replacing.unwrap_or_default();
                format!("{rank} is replaced: it is slower than the others")
            }
            None if at_hand > former => {
                format!("{} joined", count(at_hand - former, "rank"))
            }
            None => return false,
        };
        let Some(gang) = self.gangs.get_mut(&name) else { return false };
        let reason = gang.pausing.get_or_insert(text).clone();
        if !self.pause(draft, job, &reason) {
            return false;
        }
        let mut processes = members;
        // Too few, when a spare has gone meanwhile: they meet to save what they hold.
        let missing = at_hand.saturating_sub(processes.len());
        processes.extend(spares.iter().take(missing).map(Spare::process));
        let gang = next_gang(&processes, &BTreeMap::new(), processes.len());
        self.next_generation(draft, now, version, job, gang, Why::Reshape(reason));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(worker: &str, generation: u64, rank: u32, local_rank: u32) -> Process {
        let started_as = StartedAs { generation: Generation(generation), rank: Rank(rank) };
        let worker = worker.parse().expect("a name");
        Process { worker, started_as, local_rank, holds_state: true }
    }

    fn described(processes: &[Process], free: &[(&str, u32)], ranks: usize) -> String {
        let free = free.iter().map(|(name, slots)| (name.parse().expect("a name"), *slots));
        let gang = next_gang(processes, &free.collect(), ranks);
        let each = gang.iter().map(|place| {
            let from = place.started_as.map(|s| format!("={}/{}", s.generation, s.rank));
            let from = from.unwrap_or_default();
            format!("{}:{}#{}{from}", place.rank, place.worker, place.local_rank)
        });
        each.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn survivors_keep_their_device_and_ranks_stay_in_order_of_workers() {
        let stay = [process("w2", 1, 2, 0), process("w1", 1, 1, 1)];
        assert_eq!(described(&stay, &[], 2), "r0:w1#1=g1/r1 r1:w2#0=g1/r2");
        // The lost rank's device on w1 is the new one's; hosts of the gang come first.
        let free = [("w0", 4), ("w1", 1)];
        assert_eq!(described(&stay, &free, 3), "r0:w1#1=g1/r1 r1:w1#0 r2:w2#0=g1/r2");
        assert_eq!(described(&stay, &free, 4), "r0:w0#0 r1:w1#1=g1/r1 r2:w1#0 r3:w2#0=g1/r2");
        assert_eq!(described(&stay, &free, 1), "r0:w2#0=g1/r2");
    }
}
