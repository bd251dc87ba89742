//! Where a job's rank-seconds went, and the history of how it came about.
//!
//! Steps are no facts and give no transaction: what they took is summed here and written down with
//! the next change of the job's record, at the latest with its next checkpoint. A leader that dies
//! takes the last such sums with it; the time is then counted as `other`.

use api::events::StepMetrics;
use api::ids::{Name, Step};
use api::records::{Goodput, JobRecord, JobStatus, Moment, Phase};

use super::Leader;
use super::cost;
use super::decision::Millis;

/// Moments kept in a record, the newest.
const HISTORY_MAX: usize = 64;
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
}

impl Unwritten {
    /// A step was reported.
    pub(super) fn step(&mut self, metrics: &StepMetrics, now: Millis) {
        let time = &metrics.time;
        self.steps += 1;
        self.useful += time.compute + time.data;
        self.communication += time.communication;
        self.checkpoint += time.checkpoint;
        self.last = Some((metrics.step, now));
    }
}

impl Leader {
    /// The job's record with its time up to now accounted for, before a change.
    pub(super) fn accounted(&mut self, job: &JobRecord) -> JobRecord {
        let now = self.now;
        let mut job = job.clone();
        let unwritten = self.gangs.get_mut(&job.spec.name).map(|gang| {
            let last = gang.unwritten.last;
            Unwritten {
                last,
                ..std::mem::replace(&mut gang.unwritten, Unwritten { last, ..Unwritten::default() })
            }
        });
        account(&mut job.status, &unwritten.unwrap_or_default(), now);
        job
    }

    /// The running gang of a job that is about to be recorded has ended or broken.
    pub(super) fn count_broken(&self, status: &mut JobStatus, name: &Name) {
        if let Some(gang) = self.gangs.get(name) {
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
fn account(status: &mut JobStatus, unwritten: &Unwritten, now: Millis) {
    let since = status.accounted_ms.map_or(now, Millis);
    status.accounted_ms = Some(now.0);
    let elapsed = now.since(since);
    let ranks = status.gang.len() as u64;
    let in_all = elapsed.saturating_mul(ranks);
    if status.phase.is_active() {
        cost::charge(status, elapsed);
    }
    let book = &mut status.goodput;
    match status.phase {
        Phase::Queued => book.queued_ms += elapsed,
        Phase::Starting if status.regroups > 0 || status.restarts > 0 => book.recovery_ms += in_all,
        Phase::Starting => book.starting_ms += in_all,
        Phase::Running | Phase::Stopping => {
            let of_all = |seconds: f64| (seconds * 1e3 * ranks as f64) as u64;
            let (useful, communication) =
                (of_all(unwritten.useful), of_all(unwritten.communication));
            let checkpoint = of_all(unwritten.checkpoint);
            book.steps += unwritten.steps;
            book.useful_ms += useful;
            book.communication_ms += communication;
            book.checkpoint_ms += checkpoint;
            book.other_ms += in_all.saturating_sub(useful + communication + checkpoint);
            if let Some((step, _)) = unwritten.last {
                status.reported = status.reported.max(step);
            }
        }
        Phase::Stopped | Phase::Succeeded | Phase::Failed => {}
    }
}

/// A running gang has ended or broken: what was done since its last reported step is lost.
fn count_broken_step(status: &mut JobStatus, unwritten: &Unwritten, now: Millis) {
    if let Some((_, at)) = unwritten.last {
        let lost =
            now.since(at).saturating_mul(status.gang.len() as u64).min(status.goodput.other_ms);
        status.goodput.other_ms -= lost;
        status.goodput.lost_ms += lost;
    }
}

/// A generation begins at `step`: the steps reported after that will be computed again.
pub(super) fn count_redone_steps(status: &mut JobStatus, step: Step) {
    let redone = status.reported.0.saturating_sub(step.0);
    status.reported = step;
    let Goodput { steps, useful_ms, .. } = status.goodput;
    if redone > 0 && steps > 0 {
        let lost = (useful_ms / steps).saturating_mul(redone).min(useful_ms);
        status.goodput.useful_ms -= lost;
        status.goodput.lost_ms += lost;
        status.goodput.steps_redone += redone;
    }
}
