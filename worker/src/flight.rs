//! Keeps the last flight log of a rank that failed or is killed in the object store, so that it can
//! be read when the rank is gone. Best effort: nothing waits for it but the end of the worker.

use std::time::Duration;

use api::TaskId;
use api::flight::FlightLog;
use checkpoint::{Store, keys};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

/// A store that takes longer for a log is not waited for.
const PUT_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes logs beside whatever else goes on; clones share their work.
#[derive(Clone)]
pub(crate) struct FlightKeeper {
    store: Store,
    puts: TaskTracker,
}

impl FlightKeeper {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, puts: TaskTracker::new() }
    }

    /// Begins to write a task's last log of a generation; a later one of the same rank replaces it.
    pub(crate) fn keep(&self, task: &TaskId, log: &FlightLog) {
        let key = keys::flight(&task.workload, log.generation, log.rank);
        let json = match serde_json::to_vec(log) {
            Ok(json) => json,
            Err(error) => return warn!(%task, %error, "a flight log is not JSON"),
        };
        let (store, task) = (self.store.clone(), task.clone());
        self.puts.spawn(async move {
            match timeout(PUT_TIMEOUT, store.put(&key, json.into())).await {
                Ok(Ok(())) => debug!(%task, key, "kept the flight log"),
                Ok(Err(error)) => warn!(%task, %error, "the flight log is not kept"),
                Err(_) => warn!(%task, "the flight log is not kept: the store does not answer"),
            }
        });
    }

    /// Returns when what has begun is written; each write has its own deadline.
    pub(crate) async fn finish(&self) {
        self.puts.close();
        self.puts.wait().await;
    }
}
