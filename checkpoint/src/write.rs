//! The two writes of which a save consists: a rank's shard, and the manifest that names them all.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use api::Step;
use api::events::CheckpointFact;
use api::job::Compression;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use crate::error::StoreError;
use crate::former::Former;
use crate::keys;
use crate::manifest::{self, Manifest, ShardEntry};
use crate::saver::{SaveError, SaverOptions};
use crate::staging::Staged;
use crate::store::Store;
use crate::upload::{Content, write_object};

/// Shards looked up at once before a manifest is written.
const LOOKUPS_AT_ONCE: usize = 16;

/// Writes what `former`, if given, does not hold already; breaks off when it is `unwanted`.
pub(crate) async fn write_shard(
    store: &Store,
    options: &SaverOptions,
    writer: &str,
    step: Step,
    staged: &mut Staged,
    former: Option<&Former>,
    unwanted: Arc<AtomicBool>,
) -> Result<ShardEntry, SaveError> {
    let mut key = keys::shard(&options.job, step, options.generation, options.rank, writer);
    if options.compression == Compression::Zstd {
        key.push_str(".zst");
    }
    let former = match former {
        Some(former) => tokio::task::block_in_place(|| former.reuse(staged))?,
        None => Vec::new(),
    };
    store.check_key_once().await?;
    let computing = tokio::task::spawn_blocking(staged.checksums());
    let checksums = computing.map(Result::ok).boxed().shared();
    let end = checksums.clone().map(|found| Some(found?.bytes)).boxed().shared();
    let (pieces, end_bytes) = (staged.pieces(), staged.checksum_bytes());
    let content = Content { pieces, end_bytes, end, unwanted };
    let stored = write_object(store, &key, &content, options.compression).await?;
    drop(content);
    if let Some(checksums) = checksums.await {
        staged.note(&checksums);
    }
    Ok(ShardEntry {
        rank: options.rank,
        key,
        bytes: staged.bytes(),
        stored_bytes: stored.bytes,
        blake3: stored.blake3,
        compression: options.compression,
        tensors: staged.tensors.clone(),
        used: None,
        former,
    })
}

/// Looks that every shard is there, then writes the manifest if there is none. It may refer to
/// `known` former shards only.
pub(crate) async fn write_manifest(
    store: &Store,
    manifest: &Manifest,
    known: &BTreeSet<String>,
) -> Result<CheckpointFact, SaveError> {
    let step = manifest.step.0;
    store.check_key_once().await?;
    if let Some(stranger) = manifest.references().into_iter().find(|key| !known.contains(*key)) {
        let problem = format!(
            "it refers to `{stranger}`, which the checkpoint before it does not hold: commit every \
             step that is staged, in order"
        );
        return Err(SaveError::Shards { step, problem });
    }
    let objects = manifest.objects();
    let lookups: Vec<_> = objects.iter().map(|shard| look_up(store, step, shard).boxed()).collect();
    stream::iter(lookups).buffer_unordered(LOOKUPS_AT_ONCE).try_collect::<()>().await?;
    let bytes = manifest.to_bytes().map_err(|problem| SaveError::Shards { step, problem })?;
    let manifest_digest = manifest::digest(&bytes);
    let manifest_key = manifest.key();
    let bytes = Bytes::from(bytes);
    let created = store.patiently(|| store.put_if_absent(&manifest_key, bytes.clone())).await?;
    if !created {
        return Err(SaveError::Superseded(manifest_key));
    }
    Ok(CheckpointFact {
        step: manifest.step,
        generation: manifest.generation,
        manifest_key,
        manifest_digest,
        bytes: manifest.stored_bytes(),
        metrics: manifest.metrics.clone(),
    })
}

async fn look_up(store: &Store, step: u64, shard: &ShardEntry) -> Result<(), SaveError> {
    let problem = match store.patiently(|| store.size(&shard.key)).await {
        Ok(bytes) if bytes == shard.stored_bytes => return Ok(()),
        Ok(bytes) => format!("has {bytes} bytes, expected {}", shard.stored_bytes),
        Err(StoreError::NotFound { .. }) => "is not in the store".to_owned(),
        Err(error) => return Err(SaveError::Store(error)),
    };
    let (rank, key) = (shard.rank, shard.key.clone());
    Err(SaveError::ShardMissing { step, rank, key, problem })
}
