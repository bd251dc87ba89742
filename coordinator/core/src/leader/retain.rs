//! When the store is swept of a job's checkpoints that nobody needs: after records were dropped,
//! after a generation was cleared, when the job is over, and once more when its last rank has gone.
//!
//! Only says when; what may go is judged in `retention.rs`, anew for every checkpoint. A sweep that
//! is lost with its leader is made up by the job's next one.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::events::CheckpointFact;
use api::ids::{Generation, Name, Step};
use api::job::CheckpointPolicy;
use api::records::{CheckpointRecord, JobRecord, KIND_CHECKPOINT};

use super::Leader;
use super::decision::Effect;
use super::draft::Draft;
use super::index::Workload;
use crate::records::Records;
use crate::retention::best;
use crate::transaction::RecordKey;

/// Jobs whose last ranks are waited for, the newest. One that is forgotten leaves a broken-off
/// checkpoint in the store until it is resumed.
const UNSWEPT_MAX: usize = 256;

/// Asks for a sweep while ranks may still write.
pub(super) fn sweep_store(draft: &mut Draft, job: &Name) {
    draft.effect(Effect::Sweep { job: job.clone(), ended: None });
}

impl Leader {
    /// The job is about to be recorded as it is. One that is over is swept, again when its last
    /// ranks have left.
    pub(super) fn sweep_if_over(&mut self, draft: &mut Draft, job: &Arc<JobRecord>) {
        let name = &job.spec.name;
        self.unswept.retain(|other| other.spec.name != *name);
        // Nothing was ever written for one that was never placed.
        if !job.status.phase.is_terminal() || job.status.generation == Generation(0) {
            return;
        }
        if self.has_left(job) {
            let ended = Some(job.status.generation);
            return draft.effect(Effect::Sweep { job: name.clone(), ended });
        }
        sweep_store(draft, name);
        if self.unswept.len() == UNSWEPT_MAX {
            self.unswept.pop_front();
        }
        self.unswept.push_back(Arc::clone(job));
    }

    /// Sweeps jobs that were over before their last rank had left.
    pub(super) fn sweep_left(&mut self, draft: &mut Draft) {
        let mut unswept = std::mem::take(&mut self.unswept);
        unswept.retain(|job| {
            let has_left = self.has_left(job);
            if has_left {
                let ended = Some(job.status.generation);
                draft.effect(Effect::Sweep { job: job.spec.name.clone(), ended });
            }
            !has_left
        });
        self.unswept = unswept;
    }

    /// Whether no rank of the job's generation runs any more. Never true while one of its workers
    /// is out of sight: a gang that was cut off there may still be writing.
    fn has_left(&self, job: &Arc<JobRecord>) -> bool {
        let workload = Workload::Job(Arc::clone(job));
        job.status.gang.iter().all(|place| {
            let worker = self.workers.get(&place.worker).filter(|worker| !worker.is_lost);
            worker.is_some_and(|w| !w.tasks.contains_key(&workload.task(place)))
        })
    }
}

/// Records beyond the newest `checkpoint.keep`, counting those of `written` that are about to be
/// recorded. Never those, nor what `checkpoint.keep_every_steps` keeps for good, nor the best.
pub(super) fn surplus_checkpoints(
    records: &Records,
    job: &JobRecord,
    written: &[CheckpointFact],
) -> Vec<RecordKey> {
    let policy = &job.spec.checkpoint;
    let written_ids: BTreeSet<String> =
        written.iter().map(|fact| CheckpointRecord::id(&job.spec.name, fact.step)).collect();
    let (former, damaged): (Vec<&RecordKey>, Vec<&RecordKey>) = records
        .list(KIND_CHECKPOINT, &format!("{}/", job.spec.name))
        .map(|(key, _)| key)
        .filter(|key| !written_ids.contains(&key.id))
        .partition(|key| !is_damaged(records, key));
    let kept = (policy.keep.get() as usize).saturating_sub(written_ids.len());
    let surplus = former.len().saturating_sub(kept);
    let best = best_steps(records, policy, &former, written);
    let is_kept = |key: &&RecordKey| {
        let step = CheckpointRecord::step_of(&key.id);
        step.is_some_and(|step| policy.is_kept_for_good(step) || best.contains(&step))
    };
    let oldest = former.get(surplus).map(|key| &key.id).or(written_ids.first());
    // They go with the age at which others go, and keep none of those from staying.
    let damaged = damaged.into_iter().filter(|key| Some(&key.id) < oldest);
    let goes = former.iter().copied().take(surplus).chain(damaged).filter(|key| !is_kept(key));
    goes.cloned().collect()
}

/// Whether it was tried to restore it in vain.
fn is_damaged(records: &Records, key: &RecordKey) -> bool {
    let record = records.read::<CheckpointRecord>(KIND_CHECKPOINT, &key.id);
    record.is_ok_and(|record| record.is_some_and(|(_, record)| record.damaged.is_some()))
}

/// The best of what is recorded and what is about to be. One whose record cannot be read counts as
/// best: what it is worth is not known.
fn best_steps(
    records: &Records,
    policy: &CheckpointPolicy,
    former: &[&RecordKey],
    written: &[CheckpointFact],
) -> BTreeSet<Step> {
    let Some(policy) = &policy.keep_best else { return BTreeSet::new() };
    let value = |fact: &CheckpointFact| Some((fact.step, *fact.metrics.get(&policy.metric)?));
    let mut values: Vec<(Step, f64)> = written.iter().filter_map(value).collect();
    let mut unreadable = BTreeSet::new();
    for key in former {
        match records.read::<CheckpointRecord>(KIND_CHECKPOINT, &key.id) {
            Ok(Some((_, record))) => values.extend(value(&record.fact)),
            Ok(None) => {}
            Err(_) => unreadable.extend(CheckpointRecord::step_of(&key.id)),
        }
    }
    let mut best = best(policy, values);
    best.extend(unreadable);
    best
}
