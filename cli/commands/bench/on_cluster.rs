//! A cluster of this process for one benchmark: it is gone afterwards, with all that it ran.

use api::config::ClusterConfig;
use coordinator::ClusterClient;
use nix::sys::signal::{Signal, kill};

use crate::embedded::{Embedded, EmbeddedOptions};
use crate::error::Result;
use crate::processes::rank_processes;

/// Starts a cluster of one coordinator and `workers` of so many slots in a folder of its own, hands
/// `work` a client of it, and ends what is still running when that returns.
pub async fn on_cluster<T>(
    config: ClusterConfig,
    workers: u32,
    slots: u32,
    work: impl AsyncFnOnce(ClusterClient) -> Result<T>,
) -> Result<T> {
    let folder = std::env::temp_dir().join(format!("cohort-bench-{}", std::process::id()));
    let options = EmbeddedOptions {
        dir: folder.clone(),
        config,
        config_file: None,
        coordinators: 1,
        workers,
        slots,
        port: 0,
    };
    let mut embedded = Embedded::start(options).await?;
    let access = embedded.access.clone();
    let ended = tokio::select! {
        ended = async { work(access.connect().await?).await } => ended,
        error = embedded.failed() => Err(error),
    };
    // Nothing of the job is wanted any more: its ranks need not write a last checkpoint.
    for (_, pid) in rank_processes(std::process::id()) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let stopped = embedded.stop().await;
    // The folder holds nothing but this run's scratch.
    let _ = std::fs::remove_dir_all(&folder);
    let value = ended?;
    stopped?;
    Ok(value)
}
