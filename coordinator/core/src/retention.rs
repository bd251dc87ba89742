//! Which checkpoints in the store nobody needs: not recorded, not being written, and never to be
//! recorded.
//!
//! A judgement over records; who looks into the store and deletes is the shell. Invariant: what may
//! go once may go for ever, whatever is committed later. So nothing of worth is lost when somebody
//! acts on a judgement that has aged, not even a leader that has been deposed.

use std::collections::{BTreeMap, BTreeSet};

use api::events::CheckpointFact;
use api::ids::{Generation, Name, Step};
use api::job::{BestMode, KeepBest};
use api::records::{CheckpointRecord, JobRecord, KIND_CHECKPOINT, KIND_JOB};

use crate::records::{RecordError, Records};

/// The steps of the best checkpoints, given each one's value of the policy's metric. Of equals the
/// older: what is best stays so until something better comes.
pub(crate) fn best(
    policy: &KeepBest,
    values: impl IntoIterator<Item = (Step, f64)>,
) -> BTreeSet<Step> {
    let mut values: Vec<(Step, f64)> =
        values.into_iter().filter(|(_, value)| value.is_finite()).collect();
    values.sort_by(|(step, value), (other_step, other)| {
        let order = match policy.mode {
            BestMode::Min => value.total_cmp(other),
            BestMode::Max => other.total_cmp(value),
        };
        order.then(step.cmp(other_step))
    });
    values.into_iter().take(policy.count.get() as usize).map(|(step, _)| step).collect()
}

/// What one job needs of its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Recorded: may be resumed from, verified and exported. With manifest's key and digest.
    recorded: BTreeMap<(Step, Generation), (String, String)>,
    /// The newest of those that nobody found damaged. A job that went back from one writes and records
    /// at steps before that.
    newest: Option<(Step, Generation)>,
    /// The oldest of the newest that `checkpoint.keep` keeps.
    window: Option<(Step, Generation)>,
    /// Nothing of this generation and those before it will be recorded any more.
    cleared: Generation,
    /// The newest generation. Later ones may write at earlier steps, after a checkpoint was found
    /// damaged that is none here.
    known: Generation,
}

impl Retention {
    /// What `job` needs according to `records`; `None` when there is no such job.
    ///
    /// # Errors
    /// When one of its records cannot be read: then nothing is known to be of no use.
    pub fn of(records: &Records, job: &Name) -> Result<Option<Self>, RecordError> {
        let Some((_, JobRecord { spec, status, .. })) = records.read(KIND_JOB, job.as_str())?
        else {
            return Ok(None);
        };
        let (mut recorded, mut sound) = (BTreeMap::new(), BTreeSet::new());
        let entry = |fact: &CheckpointFact| {
            (
                (fact.step, fact.generation),
                (fact.manifest_key.clone(), fact.manifest_digest.clone()),
            )
        };
        for (key, _) in records.list(KIND_CHECKPOINT, &format!("{job}/")) {
            if let Some((_, CheckpointRecord { fact, damaged, .. })) =
                records.read(KIND_CHECKPOINT, &key.id)?
            {
                recorded.extend([entry(&fact)]);
                if damaged.is_none() {
                    sound.insert((fact.step, fact.generation));
                }
            }
        }
        recorded.extend(status.checkpoint.as_ref().map(entry));
        sound.extend(status.checkpoint.map(|fact| (fact.step, fact.generation)));
        // A generation is placed when the former one is cleared; the gang of a cleared one is
        // forgotten.
        let cleared = match status.gang.is_empty() {
            true => status.generation,
            false => Generation(status.generation.0.saturating_sub(1)),
        };
        let keep = spec.checkpoint.keep.get() as usize;
        let window = sound.iter().rev().take(keep).next_back().copied();
        let (newest, known) = (sound.last().copied(), status.generation);
        Ok(Some(Self { recorded, newest, window, cleared, known }))
    }

    /// Key and digest of each manifest that is recorded.
    pub fn manifests(&self) -> impl Iterator<Item = (&str, &str)> {
        self.recorded.values().map(|(key, digest)| (key.as_str(), digest.as_str()))
    }

    /// Whether a checkpoint of the store may go. `is_complete`: it has a manifest. `ended`: a
    /// generation of which no rank runs any more (see [`crate::Effect::Sweep`]).
    pub fn may_go(
        &self,
        step: Step,
        generation: Generation,
        is_complete: bool,
        ended: Option<Generation>,
    ) -> bool {
        if self.recorded.contains_key(&(step, generation)) || generation > self.known {
            return false;
        }
        let is_before = |recorded: Option<&(Step, Generation)>| {
            recorded.is_some_and(|(recorded, _)| step < *recorded)
        };
        // Nobody writes or records at steps before the newest sound one; before the oldest of
        // the newest ones, between those that are kept for good, lie those that were recorded once.
        let is_dropped = is_before(self.window.as_ref());
        // Its own ranks have said all they had to say: only what is newer and whole may be adopted.
        let is_left_over = ended.is_some_and(|ended| generation <= ended)
            && (!is_complete || is_before(self.newest.as_ref()));
        generation <= self.cleared || is_dropped || is_left_over
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn the_best_are_the_least_or_the_largest_and_of_equals_the_older() {
        let values = [(10, 3.0), (20, 1.0), (30, f64::NAN), (40, 1.0), (50, 2.0), (60, 3.0)];
        let steps = |mode, count| {
            let count = NonZeroU32::new(count).expect("not zero");
            let policy = KeepBest { metric: "validation:loss".into(), mode, count };
            let found = best(&policy, values.map(|(step, value)| (Step(step), value)));
            found.into_iter().map(|step| step.0).collect::<Vec<u64>>()
        };
        assert_eq!(steps(BestMode::Min, 1), [20]);
        assert_eq!(steps(BestMode::Min, 2), [20, 40]);
        assert_eq!(steps(BestMode::Min, 3), [20, 40, 50]);
        assert_eq!(steps(BestMode::Max, 1), [10]);
        assert_eq!(steps(BestMode::Max, 3), [10, 50, 60]);
        assert_eq!(steps(BestMode::Max, 99), [10, 20, 40, 50, 60]);
    }
}
