//! Deletes what nobody needs any more from the store: checkpoints that `checkpoint.keep` has dropped
//! or that killed ranks left, and the flight logs of generations long past.
//!
//! Sweeps run beside the leader, one per job at a time, and outlive its term: what may go is judged
//! by [`Retention`] over the newest records, and a judgement that has aged is as good. Of what may
//! go, the shards that a checkpoint which stays refers to are left. A sweep that fails or is lost is
//! made up by the job's next, which looks at the whole folder again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::records::{JobRecord, KIND_JOB};
use api::{Generation, Name};
use checkpoint::{
    References, Stays, Store, StoreError, StoredCheckpoint, delete_checkpoint, list_checkpoints,
};
use coordinator_core::{RecordError, Records, Retention};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::flight::drop_old_flights;

/// Jobs swept at once: deletions must not keep the store from those who write to it.
const SWEEPS_AT_ONCE: usize = 4;
/// Attempts at one sweep; the job's next makes up for what is left then.
const ATTEMPTS_MAX: u32 = 5;
/// First pause between attempts; doubled each time.
const PAUSE: Duration = Duration::from_millis(250);
/// A listing that takes longer counts as failed.
const LIST_WAIT: Duration = Duration::from_secs(30);
/// So does the deletion of one checkpoint: it is one request per shard.
const DELETE_WAIT: Duration = Duration::from_secs(120);
/// Jobs whose last sweep a new leader repeats, those that ended last: the former leader may have
/// been lost with it. Jobs that go on are swept at one of their next checkpoints.
const REPEATED_MAX: usize = 16;

/// Jobs whose references are kept in memory; beyond, manifests are read again.
const REFERENCES_MAX: usize = 256;

/// Gives the newest records.
type ReadRecords = Box<dyn Fn() -> Arc<Records> + Send + Sync>;

/// Why a sweep did not come to its end.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl SweepError {
    fn is_retryable(&self) -> bool {
        match self {
            // A manifest that was listed and is gone: another leader's sweep goes on.
            Self::Store(error) => error.is_retryable() || error.is_not_found(),
            Self::Timeout(_) => true,
            Self::Record(_) => false,
        }
    }
}

/// What is asked for a job.
#[derive(Debug)]
struct Asked {
    /// Something was asked that no sweep has begun for.
    is_waiting: bool,
    /// The newest generation that is known to have ended.
    ended: Option<Generation>,
}

/// Sweeps on behalf of whoever leads. Clones share their work.
#[derive(Clone)]
pub(crate) struct Sweeper(Arc<Shared>);

struct Shared {
    store: Store,
    records: ReadRecords,
    /// What the checkpoints that stay refer to, so that no manifest is read twice.
    references: Mutex<BTreeMap<Name, References>>,
    /// Jobs with a sweep under way or waiting; as many tasks, each of a job.
    jobs: Mutex<BTreeMap<Name, Asked>>,
    slots: Semaphore,
    tasks: TaskTracker,
    /// No more pauses.
    closing: CancellationToken,
    /// No more waiting.
    over: CancellationToken,
}

impl Sweeper {
    pub(crate) fn new(
        store: Store,
        records: impl Fn() -> Arc<Records> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            store,
            records: Box::new(records),
            references: Mutex::default(),
            jobs: Mutex::default(),
            slots: Semaphore::new(SWEEPS_AT_ONCE),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            over: CancellationToken::new(),
        }))
    }

    /// Begins a sweep, or repeats the one that is under way once it has ended. Call it inside a
    /// tokio runtime, after the commit that calls for it.
    pub(crate) fn ask(&self, job: Name, ended: Option<Generation>) {
        {
            let mut jobs = self.0.lock();
            if let Some(asked) = jobs.get_mut(&job) {
                asked.is_waiting = true;
                asked.ended = asked.ended.max(ended);
                return;
            }
            jobs.insert(job.clone(), Asked { is_waiting: true, ended });
        }
        let shared = Arc::clone(&self.0);
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = shared.over.cancelled() => shared.lock().clear(),
                () = shared.run(&job) => {}
            }
        });
    }

    /// A term of office begins: repeats what the former leader may have left undone.
    pub(crate) fn take_over(&self) {
        let sweeper = self.clone();
        // Not on a thread that answers: there may be thousands of jobs to read.
        self.0.tasks.spawn_blocking(move || {
            let records = (sweeper.0.records)();
            let ended = |(key, _): (&coordinator_core::RecordKey, _)| {
                // One that cannot be read is the leader's to tell.
                let (_, job) = records.read::<JobRecord>(KIND_JOB, &key.id).ok()??;
                Some((job.status.ended_ms?, job.spec.name))
            };
            let mut jobs: Vec<(u64, Name)> = records.list(KIND_JOB, "").filter_map(ended).collect();
            jobs.sort();
            for (_, job) in jobs.into_iter().rev().take(REPEATED_MAX) {
                sweeper.ask(job, None);
            }
        });
    }

    /// Lets what is under way come to its end, for so long at most.
    pub(crate) async fn finish(&self, wait: Duration) {
        self.0.closing.cancel();
        self.0.tasks.close();
        if tokio::time::timeout(wait, self.0.tasks.wait()).await.is_err() {
            let jobs: Vec<String> = self.0.lock().keys().map(ToString::to_string).collect();
            warn!(jobs = jobs.join(", "), "stopping before old checkpoints are deleted");
            self.0.over.cancel();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Asked>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sweeps until nothing more is asked.
    async fn run(&self, job: &Name) {
        while let Some(ended) = self.next(job) {
            // Never closed.
            let Ok(_slot) = self.slots.acquire().await else { return };
            self.sweep_patiently(job, ended).await;
        }
    }

    /// What is asked for the job, taken; when nothing is, its task ends.
    fn next(&self, job: &Name) -> Option<Option<Generation>> {
        let mut jobs = self.lock();
        match jobs.get_mut(job) {
            Some(asked) if asked.is_waiting => {
                asked.is_waiting = false;
                Some(asked.ended)
            }
            _ => {
                jobs.remove(job);
                None
            }
        }
    }

    async fn sweep_patiently(&self, job: &Name, ended: Option<Generation>) {
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS_MAX {
            let Err(error) = self.sweep(job, ended).await else { return };
            warn!(%job, attempt, %error, "old checkpoints cannot be deleted");
            if !error.is_retryable() || attempt == ATTEMPTS_MAX {
                return;
            }
            tokio::select! {
                () = self.closing.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause *= 2;
        }
    }

    async fn sweep(&self, job: &Name, ended: Option<Generation>) -> Result<(), SweepError> {
        // Records before the store: what is recorded by then is in the listing, and what is written
        // later refers to nothing but what a checkpoint that stays by these records holds.
        let retention = Retention::of(&(self.records)(), job)?;
        let found = in_time(LIST_WAIT, list_checkpoints(&self.store, job)).await?;
        let may_go = |found: &StoredCheckpoint| {
            let StoredCheckpoint { step, generation, is_complete, .. } = *found;
            retention.as_ref().is_some_and(|r| r.may_go(step, generation, is_complete, ended))
        };
        let (go, stay): (Vec<_>, Vec<_>) = found.into_iter().partition(may_go);
        let refused = match go.is_empty() {
            true => None,
            false => {
                // What is recorded stays, even where this one listing lacks its manifest.
                let recorded = retention.iter().flat_map(Retention::manifests).collect();
                self.delete(job, go, &stay, recorded).await?
            }
        };
        // They are few and small: one deadline for all of them.
        in_time(DELETE_WAIT, drop_old_flights(&self.store, job)).await?;
        refused.map_or(Ok(()), Err)
    }

    /// Deletes checkpoints but what others refer to; returns why one of them had to stay. What was
    /// read of manifests is kept for the next try or sweep, however this one ends.
    async fn delete(
        &self,
        job: &Name,
        go: Vec<StoredCheckpoint>,
        stay: &[StoredCheckpoint],
        recorded: BTreeMap<&str, &str>,
    ) -> Result<Option<SweepError>, SweepError> {
        let is_recorded = |found: &&StoredCheckpoint| recorded.contains_key(&*found.manifest_key);
        let others = stay.iter().filter(|stays| stays.is_complete && !is_recorded(stays));
        let mut needed: Vec<Stays<'_>> =
            others.map(|stays| stays.manifest_key.as_str().into()).collect();
        let recorded = recorded.iter();
        needed.extend(
            recorded.map(|(key, digest)| Stays { manifest_key: key, digest: Some(digest) }),
        );
        let mut references = self.references().remove(job).unwrap_or_default();
        let done = self.delete_by(&mut references, job, go, &needed).await;
        let mut known = self.references();
        if known.len() >= REFERENCES_MAX {
            known.clear();
        }
        known.insert(job.clone(), references);
        done
    }

    async fn delete_by(
        &self,
        references: &mut References,
        job: &Name,
        go: Vec<StoredCheckpoint>,
        stay: &[Stays<'_>],
    ) -> Result<Option<SweepError>, SweepError> {
        let (mut deleted, mut refused) = (0, None);
        in_time(LIST_WAIT, references.read(&self.store, stay)).await?;
        // The newest first: a manifest goes before what it refers to.
        for found in go.into_iter().rev() {
            let key = found.manifest_key.as_str();
            match in_time(DELETE_WAIT, delete_checkpoint(&self.store, key, references)).await {
                Ok(was_there) => deleted += usize::from(was_there),
                Err(error) if error.is_retryable() => return Err(error),
                // This one stays, and what it refers to; it must not keep the others.
                Err(error) => {
                    refused.get_or_insert(error);
                    in_time(LIST_WAIT, references.add(&self.store, key)).await?;
                }
            }
        }
        if deleted > 0 {
            info!(%job, deleted, "deleted checkpoints that nobody needs");
        }
        Ok(refused)
    }

    fn references(&self) -> MutexGuard<'_, BTreeMap<Name, References>> {
        self.references.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn in_time<T>(
    wait: Duration,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, SweepError> {
    match tokio::time::timeout(wait, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(SweepError::Timeout(wait)),
    }
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
