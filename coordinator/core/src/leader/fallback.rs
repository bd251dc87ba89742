//! The checkpoint that a job was to go on from is damaged: it goes back to the newest one before.
//!
//! What cannot be restored is marked, not deleted: it may be the store that is wrong, mounted
//! elsewhere for an hour. A job never begins anew where there are checkpoints: with none that can be
//! restored it fails, and a resume begins with the newest again.

use std::sync::Arc;

use api::events::CheckpointFact;
use api::ids::Rank;
use api::records::{CheckpointRecord, Failure, JobRecord, KIND_CHECKPOINT, Phase, Placement};
use api::session::ExitCause;

use super::Leader;
use super::decision::Millis;
use super::draft::{Draft, Expect};
use super::gang::{self, START_WAIT_MS};
use super::index::Workload;
use super::reason::{Reason, count};
use super::train::{end_if_asked, stop_clock};
use crate::records::Records;
use crate::transaction::RecordKey;

impl Leader {
    /// If what failed is the checkpoint that the job was to go on from: has it go on from an older
    /// one, or fail where there is none. No failure counts: every time there is one fewer to try.
    /// Otherwise gives the failure back, for others to decide: of a rank whose peers have restored
    /// it the host is at fault, and a job that is to end does not go on.
    pub(super) fn go_back(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
        failure: Failure,
    ) -> Option<Failure> {
        let name = &job.spec.name;
        // What the rank said before, which its worker says again with its exit, to any leader.
        let found = match failure.cause {
            ExitCause::Code { damaged, .. } => damaged,
            _ => None,
        };
        let Some(fact) = job.status.checkpoint.as_ref().filter(|fact| Some(fact.step) == found)
        else {
            return Some(failure);
        };
        let (_, is_whole) = self.members(job, failure.rank);
        if is_whole || job.status.stop_asked {
            return Some(failure);
        }
        if self.is_held(job) {
            // Those that restored it are gone, or about to go: the checkpoint is to be tried again.
            return Some(can_be_retried(failure));
        }
        let is_patient = now.since(Millis(failure.time_ms)) < START_WAIT_MS;
        if let Some(other) = self.still_restores(job, failure.rank, now).filter(|_| is_patient) {
            let text = format!("{}: waiting for what {other} finds", gang::describe(&failure));
            draft.because(Reason::Waiting { name: name.clone(), text });
            return None;
        }
        let (generation, rank) = (failure.generation, failure.rank);
        let all = recorded(records, job);
        let former = all
            .iter()
            .rev()
            .find(|record| record.damaged.is_none() && record.fact.step < fact.step);
        let what = gang::describe(&failure);
        let (phase, from, reason) = match former {
            Some(record) => {
                mark(draft, &all, fact, &failure.cause.to_string());
                let step = record.fact.step.0;
                let reason = format!("{what}: going back to the checkpoint at step {step}");
                (Phase::Queued, record.fact.clone(), reason)
            }
            None => {
                unmark(draft, &all);
                let newest = all.last().map_or(fact, |record| &record.fact);
                let others = all.iter().filter(|record| record.damaged.is_some()).count();
                let others = match others {
                    0 => String::new(),
                    n => format!("; {} before failed alike", count(n, "newer checkpoint")),
                };
                let reason = format!(
                    "{what}{others}: mend the store and continue with `cluster resume {name}`, or \
                     submit the job under another name"
                );
                (Phase::Failed, newest.clone(), reason)
            }
        };
        self.change_job(draft, version, job, |status| {
            stop_clock(status, now);
            status.phase = phase;
            status.reason = reason.clone();
            status.checkpoint = Some(from);
            status.first_cause = Some(failure);
            status.completed.clear();
            status.ended_ms = phase.is_terminal().then_some(now.0);
            end_if_asked(status, now);
        });
        draft.note(name, generation, rank, reason);
        self.forget(draft, job);
        None
    }
}

impl Leader {
    /// Whether a rank of the gang holds the job's state or held it when it ended.
    fn is_held(&self, job: &Arc<JobRecord>) -> bool {
        job.status.gang.iter().any(|place| self.has_held(job, place.rank))
    }

    /// A rank of the gang, other than `without`, that has neither ended nor said what it found, as
    /// far as this leader has heard.
    fn still_restores(
        &self,
        job: &Arc<JobRecord>,
        without: Option<Rank>,
        now: Millis,
    ) -> Option<Rank> {
        let away = self.away(job, now);
        let workload = Workload::Job(Arc::clone(job));
        let gang = self.gangs.get(&job.spec.name)?;
        let still = |place: &&Placement| {
            let worker = self.workers.get(&place.worker).filter(|worker| !worker.is_lost);
            let is_there = worker.is_some_and(|w| w.tasks.contains_key(&workload.task(place)));
            let has_spoken = gang.ends.iter().any(|end| end.rank == place.rank);
            let may_be_there = is_there || Some(&place.worker) == away.as_ref();
            may_be_there && !has_spoken && Some(place.rank) != without
        };
        job.status.gang.iter().find(still).map(|place| place.rank)
    }
}

/// The same failure, but not of a kind that would come again whatever is tried.
fn can_be_retried(failure: Failure) -> Failure {
    let cause = match failure.cause {
        ExitCause::Code { code, message, .. } => {
            ExitCause::Code { code, message, retryable: true, damaged: None }
        }
        other => other,
    };
    Failure { cause, ..failure }
}

/// The job's checkpoints that can be read as records, the newest last.
fn recorded(records: &Records, job: &JobRecord) -> Vec<CheckpointRecord> {
    let prefix = format!("{}/", job.spec.name);
    let keys = records.list(KIND_CHECKPOINT, &prefix);
    keys.filter_map(|(key, _)| records.read(KIND_CHECKPOINT, &key.id).ok().flatten())
        .map(|(_, record): (u64, CheckpointRecord)| record)
        .collect()
}

fn mark(draft: &mut Draft, all: &[CheckpointRecord], fact: &CheckpointFact, why: &str) {
    if let Some(record) = all.iter().find(|record| record.fact.step == fact.step) {
        put(draft, &CheckpointRecord { damaged: Some(why.to_owned()), ..record.clone() });
    }
}

fn unmark(draft: &mut Draft, all: &[CheckpointRecord]) {
    for record in all.iter().filter(|record| record.damaged.is_some()) {
        put(draft, &CheckpointRecord { damaged: None, ..record.clone() });
    }
}

fn put(draft: &mut Draft, record: &CheckpointRecord) {
    let id = CheckpointRecord::id(&record.job, record.fact.step);
    draft.put(RecordKey::new(KIND_CHECKPOINT, id), Expect::Anything, record);
}
