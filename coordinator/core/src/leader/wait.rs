//! How long a job has waited for slots, and its end when that is as long as `stop.max_wait` allows.
//!
//! Time in the queue counts, whoever led: it is in the job's record like the rest of its time. An
//! end by it is that of a stop condition: checkpoints are kept, and a person may resume the job.

use std::collections::BTreeMap;

use api::ids::Name;
use api::records::{JobRecord, JobStatus, Phase};
use api::units::Span;

use super::Leader;
use super::decision::Millis;
use super::draft::Draft;
use super::index::{Entry, Workload};
use super::reason::{Reason, count};

/// Milliseconds in the queue since the job was submitted or last resumed.
fn waited_ms(status: &JobStatus, now: Millis) -> u64 {
    let since = status.accounted_ms.filter(|_| status.phase == Phase::Queued).map_or(now, Millis);
    let before = status.goodput.queued_ms.saturating_sub(status.queued_at_resume_ms);
    before.saturating_add(now.since(since))
}

/// Whether the job has waited for as long as it may.
fn is_wait_over(job: &JobRecord, now: Millis) -> bool {
    let limit = job.spec.stop.max_wait;
    limit.is_some_and(|limit| u128::from(waited_ms(&job.status, now)) >= limit.0.as_millis())
}

impl Leader {
    /// Whether a queued workload that waits for `reason` has waited for as long as it may. What is
    /// not the lack of slots is over in seconds and is waited for; so are the workers that a new
    /// leader has yet to hear of.
    pub(super) fn is_given_up(&self, reason: &Reason, entry: &Entry, now: Millis) -> bool {
        let Workload::Job(job) = &entry.workload else { return false };
        let lacks_slots = match reason {
            Reason::NoWorker
            | Reason::NeedsSlots { .. }
            | Reason::TooLarge { .. }
            | Reason::Unfit { .. } => true,
            Reason::Behind => job.status.gang.is_empty(),
            _ => false,
        };
        lacks_slots && self.is_past_grace(now) && is_wait_over(job, now)
    }

    /// Ends a queued job that has waited for as long as it may.
    pub(super) fn give_up(
        &mut self,
        draft: &mut Draft,
        entry: &Entry,
        free: &BTreeMap<Name, u32>,
        now: Millis,
    ) {
        let Workload::Job(job) = &entry.workload else { return };
        let reason = given_up(job, free, now);
        self.change_job(draft, entry.version, job, |status| {
            status.phase = Phase::Stopped;
            status.reason = reason;
            status.ended_ms = Some(now.0);
        });
    }
}

/// How long it waited, what for, what there was, and how to go on.
fn given_up(job: &JobRecord, free: &BTreeMap<Name, u32>, now: Millis) -> String {
    let waited = Span::millis(waited_ms(&job.status, now) / 1_000 * 1_000);
    let limit = job.spec.stop.max_wait.map(|limit| limit.to_string()).unwrap_or_default();
    let needs = count(job.spec.resources.ranks.min() as usize, "slot");
    let there = match free.len() {
        0 => "no worker takes tasks".to_owned(),
        workers => {
            let free: u32 = free.values().sum();
            format!("{} free on {}", count(free as usize, "slot"), count(workers, "worker"))
        }
    };
    let name = &job.spec.name;
    let checkpoint = match &job.status.checkpoint {
        Some(fact) => {
            format!("`cluster resume {name}` goes on from its checkpoint at step {}", fact.step.0)
        }
        None => format!("it has no checkpoint yet: `cluster resume {name}` queues it anew"),
    };
    format!(
        "waited {waited} for slots, stop.max_wait = {limit}: needs {needs}, {there}; {checkpoint}"
    )
}
