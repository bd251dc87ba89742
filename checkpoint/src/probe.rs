//! Tries out, before anything depends on it, whether a store keeps the promise that checkpoints
//! rest on: of several writers that create one key at once, exactly one wins.

use bytes::Bytes;
use futures::future::join_all;

use crate::error::StoreError;
use crate::local;
use crate::nonce::nonce;
use crate::store::Store;

/// Races run; a store that lets two win seldom is caught more often.
const ROUNDS: usize = 3;
/// Writers per race.
const CONTENDERS: usize = 12;

impl Store {
    /// Reads, writes, races and deletes under `probe/`, and refuses a store that does any of it
    /// wrong; refused credentials and a missing bucket each give one clear error. Also removes
    /// what killed writers left in a folder.
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
        Ok(())
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
