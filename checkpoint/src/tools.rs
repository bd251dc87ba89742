//! What coordinator and command line do with checkpoints: find complete ones, verify, delete.

use std::collections::{BTreeMap, HashMap};

use api::events::CheckpointFact;
use api::{Generation, Name, Step};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::decode::{Discard, read_shard};
use crate::error::StoreError;
use crate::manifest::{self, MANIFEST_BYTES_MAX, Manifest};
use crate::references::References;
use crate::store::Store;
use crate::{keys, local};

/// What reading every byte of a checkpoint showed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
    /// Shards that the manifest names, former ones too.
    pub shards: u64,
    /// Tensors in them.
    pub tensors: u64,
    /// Bytes of the shards in the store.
    pub bytes: u64,
}

/// Every complete checkpoint of a job (of one generation, if given), oldest step first: its
/// manifest can be read and its shards exist with the right length. Shards are not read.
pub async fn find_complete(
    store: &Store,
    job: &Name,
    generation: Option<Generation>,
) -> Result<Vec<CheckpointFact>, StoreError> {
    let objects = store.list(&keys::checkpoints(job)).await?;
    let sizes: HashMap<&str, u64> = objects.iter().map(|o| (o.key.as_str(), o.bytes)).collect();
    let mut facts = Vec::new();
    for object in &objects {
        let Some(parsed) = keys::parse_manifest(&object.key) else { continue };
        if generation.is_some_and(|wanted| wanted != parsed.generation) {
            continue;
        }
        let bytes = match store.get_bounded(&object.key, MANIFEST_BYTES_MAX).await {
            Ok(bytes) => bytes,
            // Deleted since it was listed.
            Err(StoreError::NotFound { .. }) => continue,
            Err(error @ (StoreError::TooLarge { .. } | StoreError::Corrupt { .. })) => {
                tracing::warn!(%error, "a checkpoint is not usable");
                continue;
            }
            Err(error) => return Err(error),
        };
        let manifest = match Manifest::parse(&object.key, &bytes) {
            Ok(manifest) => manifest,
            Err(error) => {
                tracing::warn!(%error, "a checkpoint is not usable");
                continue;
            }
        };
        let lacking = manifest
            .objects()
            .into_iter()
            .find(|shard| sizes.get(shard.key.as_str()) != Some(&shard.stored_bytes));
        if let Some(shard) = lacking {
            tracing::warn!(key = object.key, shard = shard.key, "a checkpoint lacks a shard");
            continue;
        }
        facts.push(CheckpointFact {
            step: manifest.step,
            generation: manifest.generation,
            manifest_key: object.key.clone(),
            manifest_digest: manifest::digest(&bytes),
            bytes: manifest.stored_bytes(),
            metrics: manifest.metrics.clone(),
        });
    }
    facts.sort_by_key(|fact| (fact.step, fact.generation));
    Ok(facts)
}

/// A checkpoint's folder, whole or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredCheckpoint {
    /// Steps applied in it.
    pub step: Step,
    /// The generation that wrote it, or began to.
    pub generation: Generation,
    /// The key of its manifest, which [`delete_checkpoint`] takes.
    pub manifest_key: String,
    /// Whether that manifest is there.
    pub is_complete: bool,
}

/// Everything that lies among a job's checkpoints, oldest step first: whole ones, and what killed
/// writers and broken-off deletions left. What is not a checkpoint's folder is left out.
pub async fn list_checkpoints(
    store: &Store,
    job: &Name,
) -> Result<Vec<StoredCheckpoint>, StoreError> {
    let root = keys::checkpoints(job);
    let mut folders: BTreeMap<String, bool> = BTreeMap::new();
    for object in store.list(&root).await? {
        let Some((folder, file)) = object.key.rsplit_once('/') else { continue };
        *folders.entry(folder.to_owned()).or_default() |= file == keys::MANIFEST;
    }
    // A writer that was killed at its first object leaves a folder without any.
    if let Some(folder) = store.folder() {
        for name in local::subfolders(&folder.join(&root))? {
            folders.entry(format!("{root}/{name}")).or_default();
        }
    }
    let parse = |(folder, is_complete): (String, bool)| {
        let manifest_key = format!("{folder}/{}", keys::MANIFEST);
        let keys::ManifestKey { step, generation, .. } = keys::parse_manifest(&manifest_key)?;
        Some(StoredCheckpoint { step, generation, manifest_key, is_complete })
    };
    let mut found: Vec<StoredCheckpoint> = folders.into_iter().filter_map(parse).collect();
    found.sort_by_key(|found| (found.step, found.generation));
    Ok(found)
}

/// Reads every byte of a checkpoint and reports what is wrong with it. An error means that the
/// store could not be asked, has no such manifest, or is encrypted under another key.
pub async fn verify(
    store: &Store,
    manifest_key: &str,
    expected_digest: Option<&str>,
) -> Result<VerifyReport, StoreError> {
    let (store, key) = (store.clone(), manifest_key.to_owned());
    let expected = expected_digest.map(str::to_owned);
    blocking(manifest_key, async move { verify_here(&store, &key, expected.as_deref()).await })
        .await
}

async fn verify_here(
    store: &Store,
    key: &str,
    expected_digest: Option<&str>,
) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::default();
    let bytes = match store.get_bounded(key, MANIFEST_BYTES_MAX).await {
        Err(error @ (StoreError::TooLarge { .. } | StoreError::Corrupt { .. })) => {
            report.problems.push(error.to_string());
            return Ok(report);
        }
        bytes => bytes?,
    };
    let found = manifest::digest(&bytes);
    if let Some(expected) = expected_digest.filter(|expected| *expected != found) {
        report.problems.push(format!(
            "manifest `{key}` is not the one that was recorded: BLAKE3 {found}, expected {expected}"
        ));
    }
    let manifest = match Manifest::parse(key, &bytes) {
        Ok(manifest) => manifest,
        Err(error) => {
            report.problems.push(error.to_string());
            return Ok(report);
        }
    };
    let shards = manifest.objects();
    report.shards = shards.len() as u64;
    report.tensors = manifest.tensors().count() as u64;
    report.bytes = shards.iter().map(|shard| shard.stored_bytes).sum();
    for shard in &shards {
        match read_shard(store, shard, &mut Discard).await {
            Ok(()) => {}
            Err(error @ (StoreError::Corrupt { .. } | StoreError::NotFound { .. })) => {
                report.problems.push(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    report.ok = report.problems.is_empty();
    Ok(report)
}

/// Deletes a checkpoint: its manifest first, so that nobody begins to read what is going away, then
/// all else in its folder but what `kept` refers to. Tells whether anything was there to delete. One
/// that is gone already, wholly or in part, is no error. Nobody may be writing it any more, or its
/// manifest could outlive its shards; of several, the newest goes first for the same reason.
pub async fn delete_checkpoint(
    store: &Store,
    manifest_key: &str,
    kept: &References,
) -> Result<bool, StoreError> {
    let Some(folder) = keys::folder_of(manifest_key) else {
        return Err(StoreError::Key {
            key: manifest_key.to_owned(),
            problem: "expected the key of a checkpoint's manifest".into(),
        });
    };
    store.delete(manifest_key).await?;
    store.delete_below(folder, |key| kept.contains(key)).await
}

/// Runs work that computes as much as it waits off the threads that answer requests.
pub(crate) async fn blocking<T, W>(key: &str, work: W) -> Result<T, StoreError>
where
    T: Send + 'static,
    W: Future<Output = Result<T, StoreError>> + Send + 'static,
{
    let handle = Handle::current();
    let done = tokio::task::spawn_blocking(move || handle.block_on(work)).await;
    done.unwrap_or_else(|error| {
        Err(StoreError::Host { path: key.to_owned(), problem: error.to_string() })
    })
}
