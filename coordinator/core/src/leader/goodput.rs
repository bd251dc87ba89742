//! Where a job's rank-seconds went, and the history of how it came about.
//!
//! Steps are no facts and give no transaction: what they took is summed here and written down with
//! the next change of the job's record, or after ten seconds. A leader that dies takes the last such
//! sums with it; the time is then counted as `other`.

use std::sync::Arc;

use api::events::StepTime;
use api::ids::{Name, Step};
use api::records::{Goodput, JobRecord, JobStatus, Moment, Phase};

use super::Leader;
use super::cost;
use super::decision::Millis;
use super::draft::{Draft, Expect};
use super::index::Workload;
use super::reason::Reason;

/// Moments kept in a record, the newest: two for every generation that goes on in place.
const HISTORY_MAX: usize = 512;
/// How old a record of a job that makes steps may be.
const LEDGER_MS: u64 = 10_000;
/// Longest text of one, in bytes.
const TEXT_BYTES_MAX: usize = 512;

/// What the present generation's steps took since the record was last written, in seconds of one
/// rank.
#[derive(Clone, Debug, Default)]
pub(super) struct Unwritten {
    steps: u64,
    useful: f64,
    communication: f64,
    checkpoint: f64,
    /// The last step that was reported, and when.
    last: Option<(Step, Millis)>,
    /// What the record counts as between steps, in rank-milliseconds, and may be part of the step
    /// that was under way when it was written.
    open_ms: u64,
}

impl Unwritten {
    /// A step was reported.
    pub(super) fn step(&mut self, step: Step, time: &StepTime, now: Millis) {
        self.steps += 1;
        // The reporting rank's own, but for what it waited for the others or they for it.
        let all = seconds(time.compute) + seconds(time.data) + seconds(time.communication);
        let waited = seconds(time.communication_mean.unwrap_or(time.communication)).min(all);
        self.useful += all - waited;
        self.communication += waited;
        self.checkpoint += seconds(time.checkpoint);
        self.last = Some((step, now));
    }
}

/// What may be added up of a number that somebody reported.
fn seconds(reported: f64) -> f64 {
    if reported.is_finite() { reported.max(0.0) } else { 0.0 }
}

impl Leader {
    /// The job's record with its time up to now accounted for, before a change.
    pub(super) fn accounted(&mut self, job: &JobRecord) -> JobRecord {
        let now = self.now;
        let mut job = job.clone();
        let Some(gang) = self.gangs.get_mut(&job.spec.name) else {
            account(&mut job.status, &Unwritten::default(), now);
            return job;
        };
        let open_ms = account(&mut job.status, &gang.unwritten, now);
        gang.unwritten = Unwritten { last: gang.unwritten.last, open_ms, ..Unwritten::default() };
        job
    }

    /// Writes down what a gang's steps took, should nothing else have had its job's record written for
    /// a while. True when it did.
    pub(super) fn write_ledger(
        &mut self,
        draft: &mut Draft,
        version: u64,
        job: &Arc<JobRecord>,
    ) -> bool {
        let name = &job.spec.name;
        let is_due =
            job.status.accounted_ms.is_none_or(|then| self.now.since(Millis(then)) >= LEDGER_MS);
        let has_stepped = self.gangs.get(name).is_some_and(|gang| gang.unwritten.steps > 0);
        if !is_due || !has_stepped {
            return false;
        }
        let workload = Workload::Job(Arc::new(self.accounted(job)));
        if let Workload::Job(job) = &workload {
            draft.put(workload.key(), Expect::Version(version), &**job);
        }
        draft.because(Reason::Remark(format!("`{name}`: wrote down where its time went")));
        self.index.set(workload);
        true
    }

    /// The running gang of a job that is about to be recorded has ended or broken. Nothing is lost of
    /// one whose ranks have left in good order, their state saved.
    pub(super) fn count_broken(&self, status: &mut JobStatus, name: &Name) {
        let gang = self.gangs.get(name);
        if let Some(gang) = gang.filter(|gang| gang.is_broken() && gang.stopped.is_none()) {
            count_broken_step(status, &gang.unwritten, self.now);
        }
    }

    /// Adds a moment to the history if the phase or the generation is another than before.
    /// What it still lacks comes first.
    pub(super) fn remember(&mut self, name: &Name, status: &mut JobStatus) {
        status.history.extend(self.untold.remove(name).unwrap_or_default());
        let before =
            self.index.get(name).map(|entry| (entry.workload.phase(), entry.workload.generation()));
        if before == Some((status.phase, status.generation)) {
            return keep_newest(&mut status.history);
        }
        let (time_ms, generation, phase) = (self.now.0, status.generation, status.phase);
        let text = status.reason.clone();
        record_moment(&mut status.history, Moment { time_ms, generation, phase, text });
    }
}

/// Adds a moment to a history, which is bounded: it is part of a record that is written often.
pub(super) fn record_moment(history: &mut Vec<Moment>, mut moment: Moment) {
    let text = &mut moment.text;
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
    }
    history.push(moment);
    keep_newest(history);
}

fn keep_newest(history: &mut Vec<Moment>) {
    let surplus = history.len().saturating_sub(HISTORY_MAX);
    history.drain(..surplus);
}

/// Adds the time since the last account to where it went, judging by the phase that has lasted.
/// Returns the rank-milliseconds that count as between steps until the step under way is reported.
fn account(status: &mut JobStatus, unwritten: &Unwritten, now: Millis) -> u64 {
    let since = status.accounted_ms.map_or(now, Millis);
    status.accounted_ms = Some(now.0);
    let elapsed = now.since(since);
    if status.phase.is_active() {
        cost::charge(status, elapsed);
    }
    let ranks = status.gang.len() as u64;
    let mut left = elapsed.saturating_mul(ranks);
    let book = &mut status.goodput;
    if matches!(status.phase, Phase::Running | Phase::Stopping) {
        // What was under way at the last account is part of a step that is reported now.
        let open = unwritten.open_ms.min(book.other_ms);
        book.other_ms -= open;
        left = left.saturating_add(open);
    }
    // Of what ranks report no more is believed than there was.
    let mut of_all = |seconds: f64| {
        let found = ((seconds * 1e3 * ranks as f64) as u64).min(left);
        left -= found;
        found
    };
    if status.phase.is_active() {
        // The first ranks to run make steps before the last one is heard to.
        add(&mut book.useful_ms, of_all(unwritten.useful));
        add(&mut book.communication_ms, of_all(unwritten.communication));
        add(&mut book.checkpoint_ms, of_all(unwritten.checkpoint));
        add(&mut book.steps, unwritten.steps);
    }
    match status.phase {
        Phase::Queued => add(&mut book.queued_ms, elapsed),
        Phase::Starting if status.regroups > 0 || status.restarts > 0 => {
            add(&mut book.recovery_ms, left);
        }
        Phase::Starting => add(&mut book.starting_ms, left),
        Phase::Running | Phase::Stopping => {
            add(&mut book.other_ms, left);
            // Not while it starts: until it runs, this tells how far the generation before came.
            if let Some((step, _)) = unwritten.last {
                status.reported = status.reported.max(step);
            }
        }
        Phase::Stopped | Phase::Succeeded | Phase::Failed => {}
    }
    match (status.phase, unwritten.last) {
        (Phase::Running, Some((_, at))) => left.min(now.since(at).saturating_mul(ranks)),
        _ => 0,
    }
}

fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

/// A running gang has ended or broken: what was done since its last reported step is lost.
fn count_broken_step(status: &mut JobStatus, unwritten: &Unwritten, now: Millis) {
    if let Some((_, at)) = unwritten.last {
        let lost =
            now.since(at).saturating_mul(status.gang.len() as u64).min(status.goodput.other_ms);
        status.goodput.other_ms -= lost;
        add(&mut status.goodput.lost_ms, lost);
    }
}

/// A generation begins at `step`: the steps reported after that will be computed again.
pub(super) fn count_redone_steps(status: &mut JobStatus, step: Step) {
    let Goodput { steps, steps_redone, useful_ms, .. } = status.goodput;
    // Those that are lost already are in what is useful no more.
    let counted = steps.saturating_sub(steps_redone);
    let redone = status.reported.0.saturating_sub(step.0).min(counted);
    status.reported = step;
    if redone > 0 {
        let lost = (useful_ms / counted).saturating_mul(redone).min(useful_ms);
        status.goodput.useful_ms -= lost;
        add(&mut status.goodput.lost_ms, lost);
        add(&mut status.goodput.steps_redone, redone);
    }
}

#[cfg(test)]
mod tests {
    use api::events::StepTime;
    use api::ids::Rank;
    use api::records::Placement;

    use super::*;

    /// A status of two ranks that has been in its phase for ten seconds, at `now` = 10 s.
    fn status(phase: Phase) -> JobStatus {
        let place = |rank| Placement {
            rank: Rank(rank),
            worker: "w1".parse().expect("a name"),
            started_as: None,
            local_rank: rank,
        };
        let gang = vec![place(0), place(1)];
        JobStatus { phase, gang, accounted_ms: Some(0), ..JobStatus::default() }
    }

    fn steps(times: &[StepTime]) -> Unwritten {
        let mut unwritten = Unwritten::default();
        for (time, step) in times.iter().zip(1..) {
            unwritten.step(Step(step), time, Millis(9_000));
        }
        unwritten
    }

    #[test]
    fn what_ranks_report_is_never_more_than_the_time_there_was() {
        let odd = [
            StepTime { compute: 1e300, data: f64::INFINITY, ..StepTime::default() },
            StepTime { compute: 1.0, communication: f64::MAX, ..StepTime::default() },
            StepTime { checkpoint: f64::NAN, data: -1e300, ..StepTime::default() },
        ];
        let mut status = status(Phase::Running);
        for now in [10_000, 20_000] {
            account(&mut status, &steps(&odd), Millis(now));
        }
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.total_ms(), book.steps), (40_000, 40_000, 6));

        let negative = StepTime { compute: -5.0, communication: 2.0, ..StepTime::default() };
        let mut status = self::status(Phase::Running);
        account(&mut status, &steps(&[negative]), Millis(10_000));
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.communication_ms, book.other_ms), (0, 4_000, 16_000));
        status.goodput.other_ms = u64::MAX;
        account(&mut status, &Unwritten::default(), Millis(20_000));
        assert_eq!(status.goodput.other_ms, u64::MAX);
    }

    #[test]
    fn what_ranks_wait_is_that_of_all_of_them() {
        let mut status = status(Phase::Running);
        let slow = StepTime { compute: 2.0, communication: 0.0, ..StepTime::default() };
        let told = StepTime { communication_mean: Some(0.75), ..slow };
        // The slowest rank reports that it waits for nobody; the other one waits 1.5 s of each step.
        account(&mut status, &steps(&[told, told]), Millis(10_000));
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.communication_ms, book.other_ms), (5_000, 3_000, 12_000));
    }

    #[test]
    fn a_step_under_way_at_an_account_counts_once_it_is_reported() {
        let mut status = status(Phase::Running);
        status.accounted_ms = Some(0);
        let (mut unwritten, mut now) = (Unwritten::default(), 0);
        // Steps of six seconds, without a pause; the record is written every ten.
        for step in 1..=10 {
            let time = StepTime { compute: 6.0, ..StepTime::default() };
            for second in 1..=6 {
                now += 1_000;
                if second == 6 {
                    unwritten.step(Step(step), &time, Millis(now));
                }
                if now % 10_000 == 0 {
                    let open_ms = account(&mut status, &unwritten, Millis(now));
                    let last = unwritten.last;
                    unwritten = Unwritten { last, open_ms, ..Unwritten::default() };
                }
            }
        }
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.other_ms, book.steps), (120_000, 0, 10));
    }

    #[test]
    fn steps_before_the_last_rank_runs_count() {
        let mut status = status(Phase::Starting);
        status.reported = Step(7);
        let second = StepTime { compute: 1.0, ..StepTime::default() };
        let unwritten = steps(&[second, second]);
        account(&mut status, &unwritten, Millis(10_000));
        let book = status.goodput;
        assert_eq!((book.steps, book.useful_ms, book.starting_ms), (2, 4_000, 16_000));
        assert_eq!(status.reported, Step(7), "of the generation before");
        status.phase = Phase::Running;
        count_redone_steps(&mut status, Step(0));
        let written = Unwritten { last: unwritten.last, ..Unwritten::default() };
        account(&mut status, &written, Millis(11_000));
        assert_eq!(status.reported, Step(2));
    }

    #[test]
    fn a_step_that_is_lost_costs_as_much_as_one_that_counts() {
        let mut status = JobStatus { reported: Step(100), ..JobStatus::default() };
        status.goodput = Goodput { steps: 100, useful_ms: 100_000, ..Goodput::default() };
        count_redone_steps(&mut status, Step(50));
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.lost_ms, book.steps_redone), (50_000, 50_000, 50));
        // The same fifty again, and the gang breaks in the same place.
        (status.reported, status.goodput.steps) = (Step(100), 150);
        status.goodput.useful_ms += 50_000;
        count_redone_steps(&mut status, Step(50));
        let book = status.goodput;
        assert_eq!((book.useful_ms, book.lost_ms, book.steps_redone), (50_000, 100_000, 100));
        // No more than were counted, whatever was reported.
        status.reported = Step(u64::MAX);
        count_redone_steps(&mut status, Step(0));
        assert_eq!((status.goodput.useful_ms, status.goodput.steps_redone), (0, 150));
    }
}
