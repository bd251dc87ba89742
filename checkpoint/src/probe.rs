//! Tries out, before anything depends on it, whether a store keeps the promise that checkpoints
//! rest on: of several writers that create one key at once, exactly one wins.

use bytes::Bytes;
use futures::future::join_all;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::local;
use crate::nonce::nonce;
use crate::store::{Store, with_retries};

/// Races run; a store that lets two win seldom is caught more often.
const ROUNDS: usize = 3;
/// Writers per race.
const CONTENDERS: usize = 12;

/// Says, in the clear, under which key a store is encrypted.
const MARK: &str = "encryption.json";
/// Longest mark.
const MARK_BYTES_MAX: u64 = 4096;
/// Its present form.
const MARK_VERSION: u32 = 1;

/// The content of [`MARK`].
#[derive(Serialize, Deserialize)]
struct Mark {
    version: u32,
    key_id: String,
}

impl Store {
    /// Whether this store is encrypted under the key at hand, or not at all and there is none. To be
    /// asked before anything is written: no host may write what the others cannot read.
    pub async fn check_key(&self) -> Result<(), StoreError> {
        let wrong = |problem: String| Err(self.attempt("read", MARK).encryption(problem));
        match (self.mark().await?, self.key_id()) {
            (None, None) => Ok(()),
            (Some(found), None) => {
                wrong(format!("the store is encrypted under key `{found}`, no key is configured"))
            }
            (Some(found), Some(own)) if found == own => Ok(()),
            (Some(found), Some(own)) => wrong(format!(
                "the store is encrypted under key `{found}`, the configured key is `{own}`"
            )),
            (None, Some(own)) => {
                if self.list_any("jobs").await? {
                    return wrong(
                        "a key is configured, and the store holds jobs that are not encrypted: \
                         choose an empty folder or prefix for an encrypted store; if they are, its \
                         mark `encryption.json` is lost: put it back from a backup"
                            .into(),
                    );
                }
                self.make_mark(own).await
            }
        }
    }

    /// The same for whoever writes behind training: once per process, however often it is asked, and
    /// as patiently as what is written then. A store that does not answer says nothing about the key,
    /// and a process that holds a job's state must not end for that: the write that comes next speaks
    /// for itself, and the one after it asks again.
    pub(crate) async fn check_key_once(&self) -> Result<(), StoreError> {
        let check = || self.patiently(|| self.check_key());
        match self.key_checked.get_or_try_init(check).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_key_mistake() || matches!(error, StoreError::Corrupt { .. }) => {
                Err(error)
            }
            Err(error) => {
                tracing::warn!(%error, "the store does not say under which key it is encrypted");
                Ok(())
            }
        }
    }

    async fn mark(&self) -> Result<Option<String>, StoreError> {
        let bytes = match with_retries(|| self.get_bounded(MARK, MARK_BYTES_MAX)).await {
            Err(StoreError::NotFound { .. }) => return Ok(None),
            bytes => bytes?,
        };
        let unusable = |problem| StoreError::Corrupt { key: MARK.to_owned(), problem };
        let mark: Mark = serde_json::from_slice(&bytes).map_err(|error| {
            unusable(format!("it does not say how the store is encrypted: {error}"))
        })?;
        match mark.version {
            MARK_VERSION => Ok(Some(mark.key_id)),
            found => Err(unusable(format!(
                "it has version {found}, this release knows version {MARK_VERSION}"
            ))),
        }
    }

    async fn make_mark(&self, key_id: &str) -> Result<(), StoreError> {
        let mark = Mark { version: MARK_VERSION, key_id: key_id.to_owned() };
        let bytes = serde_json::to_vec(&mark)
            .map_err(|error| StoreError::Host { path: MARK.into(), problem: error.to_string() })?;
        // Whoever is first under the same key writes the same bytes.
        let bytes = Bytes::from(bytes);
        if with_retries(|| self.put_if_absent(MARK, bytes.clone())).await? {
            return Ok(());
        }
        let found = self.mark().await?.unwrap_or_default();
        let problem = format!(
            "the store was encrypted under key `{found}` just now, the configured key is `{key_id}`"
        );
        Err(self.attempt("read", MARK).encryption(problem))
    }

    /// Reads, writes, races and deletes under `probe/`, and refuses a store that does any of it
    /// wrong, or is encrypted under another key; refused credentials and a missing bucket each give one
    /// clear error. Also removes what killed writers left in a folder.
    pub async fn probe(&self) -> Result<(), StoreError> {
        if let Some(folder) = self.folder() {
            let folder = folder.to_owned();
            let cleaned = tokio::task::spawn_blocking(move || local::clean_old(&folder)).await;
            if let Err(error) = cleaned {
                tracing::warn!(%error, "cleaning the store was interrupted");
            }
        }
        for round in 0..ROUNDS {
            let key = format!("probe/{}-{round}", nonce());
            let raced = self.race(&key).await;
            // Cleans up in any case; the race's error comes first.
            let cleaned = match &raced {
                Err(error) if error.has_no_side_effects() && !self.is_verdict(error) => Ok(()),
                _ => self.delete(&key).await,
            };
            raced.and(cleaned)?;
        }
        self.check_key().await
    }

    fn is_verdict(&self, error: &StoreError) -> bool {
        matches!(error, StoreError::Unsafe { .. })
    }

    async fn race(&self, key: &str) -> Result<(), StoreError> {
        let bodies: Vec<Bytes> =
            (0..CONTENDERS).map(|i| Bytes::from(format!("{key} contender {i}"))).collect();
        let writes = bodies.iter().map(|body| self.put_if_absent(key, body.clone()));
        let outcomes: Result<Vec<bool>, StoreError> = join_all(writes).await.into_iter().collect();
        let outcomes = outcomes.map_err(|error| self.unsupported(error))?;
        let winners: Vec<usize> =
            outcomes.iter().enumerate().filter(|(_, won)| **won).map(|(i, _)| i).collect();
        let [winner] = winners[..] else {
            let count = winners.len();
            return Err(self.unsafe_because(format!(
                "{count} of {CONTENDERS} writers that created one object at once were told that \
                 they won, expected exactly one (put-if-absent, `If-None-Match: *`)"
            )));
        };
        if self.get(key).await? != bodies[winner] {
            let problem = "the object of the writer that won a race is not the one it holds";
            return Err(self.unsafe_because(problem.into()));
        }
        if self.put_if_absent(key, Bytes::from(format!("{key} late"))).await? {
            let problem = "it let a second writer create an object that existed";
            return Err(self.unsafe_because(problem.into()));
        }
        Ok(())
    }

    fn unsafe_because(&self, problem: String) -> StoreError {
        StoreError::Unsafe { place: self.place().clone(), problem }
    }

    /// A server that knows no conditional writes says so in its own way.
    fn unsupported(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::Refused { problem, .. } => self.unsafe_because(format!(
                "it refuses to create an object only if absent (`If-None-Match: *`): it answered \
                 {problem}"
            )),
            other => other,
        }
    }
}
