//! Keeps the last flight log of a rank that failed or is killed, and what the threads of one that hangs
//! were in, in the object store, so that it can be read when the rank is gone. Best effort: nothing waits
//! for it but the end of the worker.

use std::time::Duration;

use api::flight::FlightLog;
use api::stacks::StackDump;
use api::{Name, TaskId};
use checkpoint::{Store, keys};
use serde::Serialize;
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
        self.put(keys::flight(&task.workload, log.generation, log.rank), log);
    }

    /// Begins to write what a job's rank was in; a later dump of the same rank and generation replaces
    /// it.
    pub(crate) fn keep_stacks(&self, job: &Name, dump: &StackDump) {
        self.put(keys::stacks(job, dump.generation, dump.rank), dump);
    }

    fn put(&self, key: String, document: &impl Serialize) {
        let json = match serde_json::to_vec(document) {
            Ok(json) => json,
            Err(error) => return warn!(key, %error, "not kept: it is no JSON"),
        };
        let store = self.store.clone();
        self.puts.spawn(async move {
            match timeout(PUT_TIMEOUT, store.put(&key, json.into())).await {
                Ok(Ok(())) => debug!(key, "kept"),
                Ok(Err(error)) => warn!(key, %error, "not kept"),
                Err(_) => warn!(key, "not kept: the store does not answer"),
            }
        });
    }

    /// Returns when what has begun is written; each write has its own deadline.
    pub(crate) async fn finish(&self) {
        self.puts.close();
        self.puts.wait().await;
    }
}
