//! Finds complete checkpoints that no leader has recorded: written while the control plane was away.

use std::time::Duration;

use api::events::CheckpointFact;
use api::ids::Step;
use api::{Generation, Name};
use checkpoint::{Store, StoreError, find_complete};
use tracing::warn;

/// Attempts before a job is resumed from what is recorded: an object store's hiccup passes within
/// seconds, and a job should not wait much longer for it.
const ATTEMPTS_MAX: u32 = 5;
/// First pause between attempts; doubled each time.
const PAUSE: Duration = Duration::from_millis(250);
/// A listing that takes longer counts as failed.
const ATTEMPT_WAIT: Duration = Duration::from_secs(30);

/// Complete manifests of one generation, newer than `after`. The error is for people.
pub(crate) async fn find_unrecorded(
    store: &Store,
    job: &Name,
    generation: Generation,
    after: Option<Step>,
) -> Result<Vec<CheckpointFact>, String> {
    let mut pause = PAUSE;
    let mut attempt = 1;
    loop {
        let found = tokio::time::timeout(ATTEMPT_WAIT, find_complete(store, job, Some(generation)));
        let (error, retryable) = match found.await {
            Ok(Ok(mut facts)) => {
                facts.retain(|fact| after.is_none_or(|after| fact.step > after));
                facts.sort_by_key(|fact| fact.step);
                return Ok(facts);
            }
            Ok(Err(error)) => (error.to_string(), StoreError::is_retryable(&error)),
            Err(_) => (format!("no answer within {} s", ATTEMPT_WAIT.as_secs()), true),
        };
        warn!(%job, %generation, attempt, error, "cannot list checkpoints in the object store");
        if !retryable || attempt == ATTEMPTS_MAX {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use api::Rank;
    use api::config::StoreSection;
    use api::job::Compression;
    use checkpoint::{ManifestInfo, Saver, SaverOptions, TensorSlice};

    use super::*;

    fn save(folder: &Path, job: &Name, generation: Generation, steps: &[u64]) {
        let options = SaverOptions {
            job: job.clone(),
            generation,
            rank: Rank(0),
            world_size: 1,
            compression: Compression::None,
            incremental: false,
        };
        let uri = format!("file://{}", folder.display());
        let store = Store::open(&StoreSection::default(), &uri).expect("opens");
        let mut saver = Saver::with_store(store, options).expect("starts");
        for step in steps.iter().copied().map(Step) {
            let tensor = TensorSlice { name: "model.w", shape: &[2], data: &[1.0, 2.0] };
            saver.stage(step, &[tensor]).expect("staged");
            let shard = saver.wait_shard(step).expect("uploaded");
            let info = ManifestInfo {
                fingerprint: "cpu/test".into(),
                data_digest: String::new(),
                spec_digest: String::new(),
                lanes: 8,
                metrics: Default::default(),
                samples: None,
            };
            saver.commit(step, vec![shard], info);
            saver.wait_committed(step).expect("committed");
        }
        saver.finish().expect("finishes");
    }

    #[tokio::test]
    async fn only_complete_newer_checkpoints_of_the_generation_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let job: Name = "a".parse().expect("a name");
        let (path, owner) = (folder.path().to_owned(), job.clone());
        tokio::task::spawn_blocking(move || {
            save(&path, &owner, Generation(1), &[10]);
            save(&path, &owner, Generation(2), &[20, 30, 40]);
        })
        .await
        .expect("saved");
        // The newest lost its shard: it is no checkpoint.
        let newest = checkpoint::keys::checkpoint(&job, Step(40), Generation(2));
        for entry in std::fs::read_dir(folder.path().join(newest)).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                std::fs::remove_file(path).expect("removed");
            }
        }
        let uri = format!("file://{}", folder.path().display());
        let store = Store::open(&StoreSection::default(), &uri).expect("opens");
        let found = find_unrecorded(&store, &job, Generation(2), Some(Step(20))).await;
        let steps: Vec<_> = found.expect("lists").iter().map(|fact| fact.step).collect();
        assert_eq!(steps, [Step(30)]);
        let found = find_unrecorded(&store, &job, Generation(2), None).await;
        let steps: Vec<_> = found.expect("lists").iter().map(|fact| fact.step).collect();
        assert_eq!(steps, [Step(20), Step(30)]);
    }
}
