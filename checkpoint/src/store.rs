//! One object store, a folder or a bucket, behind the few operations that Cohort needs.
//!
//! It wraps `object_store`: keys are relative to the store's root, errors are ours, everything
//! read into memory is bounded, and put-if-absent knows its own retried write. It keeps no state but
//! that its key is the right one, and may be cloned freely.

use std::fmt;
use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::config::StoreSection;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload,
};
use tokio::sync::OnceCell;

use crate::error::{Attempt, Place, StoreError};
use crate::sealed_store::SealedStore;
use crate::sealing::is_encrypted;
use crate::store_key::StoreKey;
use crate::{local, s3};

/// Largest object that [`Store::get`] reads into memory; what is larger is read by ranges.
const GET_BYTES_MAX: u64 = 16 << 30;
/// Most objects in one listing: a year of a job's log segments and then some.
const LIST_MAX: usize = 1_000_000;
/// Tries of one put-if-absent whose outcome is unknown; the library retries inside each.
const CREATE_ATTEMPTS_MAX: u32 = 4;
/// Tries of anything else that may be done twice, over the library's retries of each request.
const ATTEMPTS_MAX: u32 = 3;
/// Half the wait after the first failed try; doubled at each further one.
const BACKOFF: Duration = Duration::from_millis(100);
/// The longest wait is 3.2 seconds: BACKOFF, doubled so often.
const BACKOFF_DOUBLINGS_MAX: u32 = 5;

/// Where data, checkpoints, models and logs are remembered.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// What `s3://bucket/prefix` puts before every key; empty in a folder.
    prefix: Path,
    place: Arc<Place>,
    /// How long what is written behind training is tried again: an outage of minutes must not end a
    /// job, and steps go on meanwhile.
    patience: Duration,
    /// What tells the key apart under which checkpoints and models are encrypted, if they are.
    key_id: Option<Arc<str>>,
    /// Set once the store has said that this is its key; clones share it.
    pub(crate) key_checked: Arc<OnceCell<()>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not `inner`: its Debug would show credentials.
        write!(f, "Store({}, {})", self.place, self.prefix)
    }
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key, relative to the store's root.
    pub key: String,
    /// Its size.
    pub bytes: u64,
}

impl Store {
    /// Opens `file:///absolute/folder` (made when absent) or `s3://bucket/prefix`, with the key if one
    /// is configured. Talks to no server yet: [`probe`](Self::probe) does.
    pub fn open(section: &StoreSection, uri: &str) -> Result<Self, StoreError> {
        let store = Self::open_plain(section, uri)?;
        Ok(match StoreKey::load(&section.encryption)? {
            Some(key) => store.encrypted(&key),
            None => store,
        })
    }

    fn open_plain(section: &StoreSection, uri: &str) -> Result<Self, StoreError> {
        let bad = |problem: &str| StoreError::Uri { uri: uri.to_owned(), problem: problem.into() };
        if let Some(path) = uri.strip_prefix("file://") {
            let (inner, folder) = local::open(uri, FsPath::new(path))?;
            let place = Arc::new(Place::Folder(folder));
            return Ok(Self::plain(inner, Path::default(), place, section.patience.0));
        }
        let Some(rest) = uri.strip_prefix("s3://") else {
            return Err(bad("expected `file:///folder` or `s3://bucket/prefix`"));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(bad("it names no bucket, expected `s3://bucket/prefix`"));
        }
        let prefix = Path::parse(prefix).map_err(|error| bad(&error.to_string()))?;
        let (inner, place) = s3::open(&section.s3, bucket)?;
        Ok(Self::plain(inner, prefix, Arc::new(place), section.patience.0))
    }

    fn plain(
        inner: Arc<dyn ObjectStore>,
        prefix: Path,
        place: Arc<Place>,
        patience: Duration,
    ) -> Self {
        Self { inner, prefix, place, patience, key_id: None, key_checked: Arc::default() }
    }

    /// Wraps a store that the caller made, such as one that fails on purpose; `name` appears in
    /// errors. What fails is tried again a few times only.
    pub fn with_inner(inner: Arc<dyn ObjectStore>, name: &str) -> Self {
        let place = Arc::new(Place::Other(name.to_owned()));
        Self::plain(inner, Path::default(), place, Duration::ZERO)
    }

    /// The same store with checkpoints and models encrypted under `key`, on their way in and out.
    pub fn encrypted(self, key: &StoreKey) -> Self {
        let sealed = SealedStore::new(self.inner, self.prefix.clone(), key.0.clone());
        let key_checked = Arc::default();
        Self { inner: Arc::new(sealed), key_id: Some(key.id().into()), key_checked, ..self }
    }

    /// What tells its key from others, if it is encrypted.
    pub fn key_id(&self) -> Option<&str> {
        self.key_id.as_deref()
    }

    /// Which store this is, for messages.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The folder, where objects lie in it as they are given: no server, and no encryption on the way.
    pub(crate) fn plain_folder(&self) -> Option<&FsPath> {
        self.folder().filter(|_| self.key_id.is_none())
    }

    /// The folder, when it is one.
    pub(crate) fn folder(&self) -> Option<&FsPath> {
        match &*self.place {
            Place::Folder(path) => Some(path),
            _ => None,
        }
    }

    /// Writes an object, replacing one of the same key. Atomic: a reader sees the old one or the
    /// new one; durable when it returns.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.put_payload(key, bytes.into()).await
    }

    pub(crate) async fn put_payload(
        &self,
        key: &str,
        payload: PutPayload,
    ) -> Result<(), StoreError> {
        let attempt = self.attempt("write", key);
        let result = self.inner.put_opts(&self.path(key)?, payload, PutOptions::default()).await;
        result.map(drop).map_err(|error| attempt.failed(error))
    }

    /// Begins an upload in parts; nothing is visible before it is completed.
    pub(crate) async fn put_multipart(
        &self,
        key: &str,
    ) -> Result<Box<dyn MultipartUpload>, StoreError> {
        let attempt = self.attempt("write", key);
        let result = self.inner.put_multipart(&self.path(key)?).await;
        result.map_err(|error| attempt.failed(error))
    }

    /// Writes an object unless one of that key exists; tells whether this call's object is the one
    /// that is there now.
    ///
    /// `bytes` must be unique to the caller (hold a nonce): a write whose answer was lost is
    /// recognised by reading the object back, so two callers with equal bytes would both win.
    pub async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<bool, StoreError> {
        let attempt = self.attempt("create", key);
        let path = self.path(key)?;
        let mut unknown = attempt.unavailable("it answers conflicts without end".into(), true);
        for tries in 0..CREATE_ATTEMPTS_MAX {
            if tries > 0 {
                tokio::time::sleep(BACKOFF * (1 << tries)).await;
            }
            let options = PutOptions::from(PutMode::Create);
            match self.inner.put_opts(&path, bytes.clone().into(), options).await {
                Ok(_) => return Ok(true),
                // Somebody's object, or this call's own, written by a try whose answer was lost; or
                // S3's 409 for two writes at once, which leaves none behind.
                Err(Error::AlreadyExists { .. }) => {
                    match self.get_bounded(key, bytes.len() as u64).await {
                        Ok(found) => return Ok(found == bytes),
                        Err(StoreError::TooLarge { .. }) => return Ok(false),
                        Err(error) if error.is_retryable() => unknown = error,
                        Err(StoreError::NotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => {
                    let error = attempt.failed(error);
                    if !error.is_retryable() {
                        return Err(error);
                    }
                    unknown = error;
                }
            }
        }
        Err(unknown)
    }

    /// Reads a whole object of at most 16 GiB.
    pub async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.get_bounded(key, GET_BYTES_MAX).await
    }

    /// Reads a whole object of at most `max` bytes; a larger one is refused before it is read.
    pub async fn get_bounded(&self, key: &str, max: u64) -> Result<Bytes, StoreError> {
        let attempt = self.attempt("read", key);
        let found = self.inner.get(&self.path(key)?).await;
        let found = found.map_err(|error| attempt.failed(error))?;
        let bytes = found.meta.size;
        if bytes > max {
            return Err(StoreError::TooLarge { key: key.to_owned(), bytes, max });
        }
        let content = found.bytes().await.map_err(|error| attempt.failed(error))?;
        if content.len() as u64 != bytes {
            let problem = format!("{} of {bytes} bytes came", content.len());
            return Err(attempt.unavailable(problem, false));
        }
        self.opened(key, content)
    }

    /// Tells encrypted bytes, which nobody decrypted, from damaged ones.
    fn opened(&self, key: &str, content: Bytes) -> Result<Bytes, StoreError> {
        if is_encrypted(&content) {
            let problem = "it is encrypted, and no key is configured".to_owned();
            return Err(self.attempt("read", key).encryption(problem));
        }
        Ok(content)
    }

    /// Reads some bytes of an object; fewer than asked for is an error.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let attempt = self.attempt("read", key);
        let expected = range.end.saturating_sub(range.start);
        if expected > GET_BYTES_MAX {
            let (key, bytes, max) = (key.to_owned(), expected, GET_BYTES_MAX);
            return Err(StoreError::TooLarge { key, bytes, max });
        }
        if expected == 0 {
            return Ok(Bytes::new());
        }
        let options = GetOptions::new().with_range(Some(range.clone()));
        let found = self.inner.get_opts(&self.path(key)?, options).await;
        let found = found.map_err(|error| attempt.failed(error))?;
        let size = found.meta.size;
        if size < range.end {
            let problem = format!("it ends at byte {size}, expected at least {}", range.end);
            return Err(StoreError::Corrupt { key: key.to_owned(), problem });
        }
        let content = found.bytes().await.map_err(|error| attempt.failed(error))?;
        // An answer that was cut off: the object is as long as it should be.
        if content.len() as u64 != expected {
            let problem = format!("{} of {expected} bytes came", content.len());
            return Err(attempt.unavailable(problem, false));
        }
        match range.start {
            0 => self.opened(key, content),
            _ => Ok(content),
        }
    }

    /// Reads some bytes of an object that must have `bytes` bytes in all: one that was cut off or
    /// replaced is told by its size in the same answer.
    pub(crate) async fn get_range_of(
        &self,
        key: &str,
        range: Range<u64>,
        bytes: u64,
    ) -> Result<Bytes, StoreError> {
        let attempt = self.attempt("read", key);
        let expected = range.end.saturating_sub(range.start);
        let options = GetOptions::new().with_range(Some(range));
        let found = self.inner.get_opts(&self.path(key)?, options).await;
        let found = found.map_err(|error| attempt.failed(error))?;
        if found.meta.size != bytes {
            let problem = format!("it has {} bytes, expected {bytes}", found.meta.size);
            return Err(StoreError::Corrupt { key: key.to_owned(), problem });
        }
        let content = found.bytes().await.map_err(|error| attempt.failed(error))?;
        if content.len() as u64 != expected {
            let problem = format!("{} of {expected} bytes came", content.len());
            return Err(attempt.unavailable(problem, false));
        }
        Ok(content)
    }

    /// The size of an object.
    pub async fn size(&self, key: &str) -> Result<u64, StoreError> {
        let attempt = self.attempt("look up", key);
        let found = self.inner.head(&self.path(key)?).await;
        found.map(|meta| meta.size).map_err(|error| attempt.failed(error))
    }

    /// What an object, or all objects below a folder, are now: a digest over keys, sizes and the
    /// store's own marks of change (entity tag, version, time). It changes when the content does.
    pub async fn revision(&self, prefix_or_key: &str) -> Result<String, StoreError> {
        let attempt = self.attempt("look up", prefix_or_key);
        let path = self.path(prefix_or_key)?;
        let mut found = match self.inner.head(&path).await {
            Ok(meta) => vec![meta],
            Err(Error::NotFound { .. }) => self
                .inner
                .list(Some(&path))
                .take(LIST_MAX)
                .try_collect()
                .await
                .map_err(|error| attempt.failed(error))?,
            Err(error) => return Err(attempt.failed(error)),
        };
        found.sort_by(|a, b| a.location.cmp(&b.location));
        let mut hasher = blake3::Hasher::new();
        for meta in found {
            let marks = (meta.location.as_ref(), meta.size, meta.e_tag, meta.version);
            hasher.update(format!("{marks:?} {}\n", meta.last_modified).as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Every object below a folder, sorted by key. A prefix is whole path segments: `a/b` does not
    /// list `a/bc`. A folder that does not exist is empty.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let attempt = self.attempt("list", prefix);
        let path = self.path(prefix)?;
        let mut stream = self.inner.list(Some(&path));
        let mut found = Vec::new();
        while let Some(meta) = stream.try_next().await.map_err(|error| attempt.failed(error))? {
            if found.len() == LIST_MAX {
                let (key, max) = (prefix.to_owned(), LIST_MAX);
                let problem = format!("more than {max} objects lie below it");
                return Err(StoreError::Key { key, problem });
            }
            if let Some(key) = self.key(&meta.location) {
                found.push(ObjectInfo { key, bytes: meta.size });
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    /// Whether anything lies below a folder.
    pub(crate) async fn list_any(&self, prefix: &str) -> Result<bool, StoreError> {
        let path = self.path(prefix)?;
        let first = self.inner.list(Some(&path)).try_next().await;
        let first = first.map_err(|error| self.attempt("list", prefix).failed(error))?;
        Ok(first.is_some())
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let attempt = self.attempt("delete", key);
        match self.inner.delete(&self.path(key)?).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(attempt.failed(error)),
        }
    }

    /// Deletes every object below a folder that does not stay, and the folder itself where that is
    /// a thing and nothing stays. Tells whether something went.
    pub(crate) async fn delete_below(
        &self,
        prefix: &str,
        stays: impl Fn(&str) -> bool,
    ) -> Result<bool, StoreError> {
        let found = self.list(prefix).await?;
        let (stay, go): (Vec<_>, Vec<_>) = found.iter().partition(|object| stays(&object.key));
        for object in &go {
            self.delete(&object.key).await?;
        }
        if let Some(folder) = self.folder() {
            local::remove_leftovers(&folder.join(prefix));
        }
        Ok(!go.is_empty() || stay.is_empty())
    }

    pub(crate) fn attempt<'a>(&'a self, operation: &'static str, key: &'a str) -> Attempt<'a> {
        Attempt { place: &self.place, operation, key }
    }

    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let parsed = Path::parse(key).map_err(|error| StoreError::Key {
            key: key.chars().take(200).collect(),
            problem: error.to_string(),
        })?;
        Ok(self.prefix.parts().chain(parsed.parts()).collect())
    }

    /// What a copy of a key is called: its last segment, or that of the store's prefix or bucket.
    pub(crate) fn last_name(&self, key: &str) -> String {
        let path = self.path(key).unwrap_or_default();
        match (path.filename(), &*self.place) {
            (Some(name), _) => name.to_owned(),
            (None, Place::Bucket { bucket, .. }) => bucket.clone(),
            (None, _) => "store".to_owned(),
        }
    }

    /// The reverse of `path`; nothing for what lies outside the prefix.
    fn key(&self, location: &Path) -> Option<String> {
        let parts = location.prefix_match(&self.prefix)?;
        let path: Path = parts.collect();
        Some(path.to_string())
    }
}

/// Does something that may be done twice, again while that can help: a few times, for callers that
/// wait for the outcome.
pub(crate) async fn with_retries<T, Work>(work: impl FnMut() -> Work) -> Result<T, StoreError>
where
    Work: Future<Output = Result<T, StoreError>>,
{
    retry(Duration::ZERO, work).await
}

impl Store {
    /// The same with the store's patience, for what is done behind training.
    pub(crate) async fn patiently<T, Work>(
        &self,
        work: impl FnMut() -> Work,
    ) -> Result<T, StoreError>
    where
        Work: Future<Output = Result<T, StoreError>>,
    {
        retry(self.patience, work).await
    }
}

async fn retry<T, Work>(patience: Duration, mut work: impl FnMut() -> Work) -> Result<T, StoreError>
where
    Work: Future<Output = Result<T, StoreError>>,
{
    let begun = Instant::now();
    let mut tries = 0;
    loop {
        tries += 1;
        match work().await {
            Err(error)
                if error.is_retryable() && (tries < ATTEMPTS_MAX || begun.elapsed() < patience) =>
            {
                tracing::warn!(%error, tries, "the store is tried again");
                tokio::time::sleep(BACKOFF * (1 << tries.min(BACKOFF_DOUBLINGS_MAX))).await;
            }
            outcome => return outcome,
        }
    }
}
