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
