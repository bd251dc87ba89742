//! Which shards may not go with the checkpoint that they were written for, since another refers to
//! them; and which objects no checkpoint needs at all.
//!
//! What decides is the manifests in the store. Whoever deletes first reads those of every checkpoint
//! that stays; one that cannot be read keeps everything, and so does one that is not what was
//! recorded of it: the store may be read wrongly for a while, and its shards may be whole. What nobody
//! recorded and is no manifest refers to nothing: nobody could restore from it.

use std::collections::{BTreeMap, BTreeSet};

use api::{Generation, Name};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde::Deserialize;

use crate::error::StoreError;
use crate::keys;
use crate::manifest::{self, MANIFEST_BYTES_MAX, Manifest};
use crate::store::{ObjectInfo, Store, with_retries};

/// Manifests read at once.
const READS_AT_ONCE: usize = 8;

/// A manifest whose checkpoint stays.
#[derive(Clone, Copy, Debug)]
pub struct Stays<'a> {
    /// Its key.
    pub manifest_key: &'a str,
    /// The digest that was recorded of it, if any.
    pub digest: Option<&'a str>,
}

impl<'a> From<&'a str> for Stays<'a> {
    fn from(manifest_key: &'a str) -> Self {
        Self { manifest_key, digest: None }
    }
}

/// What manifests refer to. Manifests never change, so each is read once.
#[derive(Clone, Debug, Default)]
pub struct References(BTreeMap<String, BTreeSet<String>>);

impl References {
    /// Knows afterwards what exactly these manifests refer to. What was read stays known when it is
    /// dropped half-way or fails, so that the next call goes on from there.
    ///
    /// # Errors
    /// When one of them cannot be read, is newer than this release, or is not the one that was
    /// recorded: then nothing may be deleted.
    pub async fn read(&mut self, store: &Store, manifests: &[Stays<'_>]) -> Result<(), StoreError> {
        self.0.retain(|key, _| manifests.iter().any(|stays| stays.manifest_key == key));
        let unknown = manifests.iter().filter(|stays| !self.0.contains_key(stays.manifest_key));
        let reads: Vec<_> = unknown
            .map(|stays| {
                let key = stays.manifest_key.to_owned();
                let read = read_references(store, *stays);
                async move { Ok::<_, StoreError>((key, read.await?)) }.boxed()
            })
            .collect();
        let mut found = stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        let mut outcome = Ok(());
        while let Some(read) = found.next().await {
            match read {
                // What refers to nothing because it is no manifest may have been read wrongly.
                Ok((key, references)) => self.0.extend(references.map(|found| (key, found))),
                // The others are worth knowing all the same.
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// The same for one more.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub async fn add(&mut self, store: &Store, manifest_key: &str) -> Result<(), StoreError> {
        let found = read_references(store, manifest_key.into()).await?;
        self.0.extend(found.map(|found| (manifest_key.to_owned(), found)));
        Ok(())
    }

    /// Whether one of them refers to this object.
    pub fn contains(&self, key: &str) -> bool {
        self.0.values().any(|keys| keys.contains(key))
    }
}

/// Of a manifest, what is needed here; whether all else is right is its reader's to find out.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    shards: Vec<OutlineShard>,
}

#[derive(Deserialize)]
struct OutlineShard {
    #[serde(default)]
    former: Vec<OutlineFormer>,
}

#[derive(Deserialize)]
struct OutlineFormer {
    key: String,
}

/// What a manifest refers to; `None` where there is none.
async fn read_references(
    store: &Store,
    stays: Stays<'_>,
) -> Result<Option<BTreeSet<String>>, StoreError> {
    let Stays { manifest_key: key, digest } = stays;
    let bytes = match with_retries(|| store.get_bounded(key, MANIFEST_BYTES_MAX)).await {
        Err(error @ (StoreError::TooLarge { .. } | StoreError::Corrupt { .. }))
            if digest.is_none() =>
        {
            tracing::warn!(%error, "what is no manifest refers to nothing");
            return Ok(None);
        }
        // Somebody else dropped it meanwhile, or deleted it.
        Err(StoreError::NotFound { .. }) if digest.is_some() => return Ok(None),
        bytes => bytes?,
    };
    let found = manifest::digest(&bytes);
    if let Some(expected) = digest.filter(|expected| *expected != found) {
        return Err(StoreError::Corrupt {
            key: key.to_owned(),
            problem: format!(
                "it is not the manifest that was recorded (BLAKE3 {found}, expected {expected}), so \
                 that it is not known which shards are needed and none is deleted; put it back, or \
                 delete it if nothing can"
            ),
        });
    }
    match manifest::check_version(key, &bytes) {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(key, "what is no manifest refers to nothing");
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let outline: Outline = serde_json::from_slice(&bytes).map_err(|error| StoreError::Corrupt {
        key: key.to_owned(),
        problem: format!("what it refers to cannot be read: {error}"),
    })?;
    let former = outline.shards.into_iter().flat_map(|shard| shard.former);
    Ok(Some(former.map(|former| former.key).collect()))
}

/// Objects among a job's checkpoints that no manifest in the store names: what killed writers and
/// broken-off deletions left. Those of generations after `ended` are left out: somebody may be
/// writing their manifest.
///
/// # Errors
/// When a manifest cannot be read: then it is not known what it names.
pub async fn find_orphans(
    store: &Store,
    job: &Name,
    ended: Generation,
) -> Result<Vec<ObjectInfo>, StoreError> {
    let objects = store.list(&keys::checkpoints(job)).await?;
    let is_manifest = |object: &&ObjectInfo| keys::parse_manifest(&object.key).is_some();
    let reads: Vec<_> = objects
        .iter()
        .filter(is_manifest)
        .map(|object| {
            let key = object.key.as_str();
            let read = with_retries(move || store.get_bounded(key, MANIFEST_BYTES_MAX));
            async move { Manifest::parse(key, &read.await?) }.boxed()
        })
        .collect();
    let manifests: Vec<Manifest> =
        stream::iter(reads).buffered(READS_AT_ONCE).try_collect().await?;
    let named: BTreeSet<String> =
        manifests.iter().flat_map(Manifest::objects).map(|shard| shard.key).collect();
    let is_orphan = |object: &ObjectInfo| {
        let place = keys::parse_object(job, &object.key);
        place.is_some_and(|(_, generation, file)| generation <= ended && file != keys::MANIFEST)
            && !named.contains(&object.key)
    };
    Ok(objects.into_iter().filter(is_orphan).collect())
}

/// Deletes objects that [`find_orphans`] found. One that is gone already is no error.
///
/// # Errors
/// When the store refuses one; the others stay then.
pub async fn delete_orphans(store: &Store, orphans: &[ObjectInfo]) -> Result<(), StoreError> {
    for orphan in orphans {
        store.delete(&orphan.key).await?;
    }
    Ok(())
}
