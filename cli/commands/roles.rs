//! `cluster coordinator` and `cluster worker`: one role of a cluster of several hosts, as
//! cluster.toml says.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::config::ClusterConfig;
use api::connect::read_token;
use api::control::die_with_parent;
use api::document::read_text;
use api::{ExitClass, Name};
use checkpoint::{Store, StoreError};
use coordinator::{Coordinator, CoordinatorOptions};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use worker::{Worker, WorkerOptions};

use crate::args::{Global, WorkerArgs};
use crate::certificates::make_private_folder;
use crate::embedded::{probe_data_plane, probe_store, validate_job};
use crate::error::{CliError, Result};
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// The configuration that `--config` names, or the defaults.
pub fn load_config(global: &Global) -> Result<ClusterConfig> {
    match &global.config {
        Some(path) => Ok(ClusterConfig::load(path)?),
        None => Ok(ClusterConfig::default()),
    }
}

fn required_config(global: &Global, role: &str) -> Result<ClusterConfig> {
    if global.config.is_none() {
        return Err(CliError::usage(format!("`cluster {role}` needs --config cluster.toml"))
            .with_hint("`cluster up` runs a whole cluster on this machine without one"));
    }
    load_config(global)
}

/// Names a process that a role must not outlive: the one that started it for a while.
pub const DIES_WITH: &str = "COHORT_DIES_WITH";

/// How long a store may take to say under which key it is encrypted.
const KEY_WAIT: Duration = Duration::from_secs(10);

/// Ends this process with the one that started it, where that asks for it.
fn die_with() -> Result<()> {
    let Some(parent) = std::env::var(DIES_WITH).ok().and_then(|pid| pid.parse().ok()) else {
        return Ok(());
    };
    die_with_parent().map_err(|error| CliError::internal(error.to_string()))?;
    // It may have ended before this process asked to be told.
    if nix::unistd::getppid() != nix::unistd::Pid::from_raw(parent) {
        return Err(CliError::internal("the process that started this one is gone"));
    }
    Ok(())
}

/// Refuses a store whose key is another than this worker's: its ranks would have a gang wait for them and
/// fail only then. Whether the store answers is not this worker's to judge.
async fn check_store_key(config: &ClusterConfig) -> Result<()> {
    let store = Store::open(&config.store, &config.store.uri)?;
    match tokio::time::timeout(KEY_WAIT, store.check_key()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.is_key_mistake() || matches!(error, StoreError::Corrupt { .. }) => {
            return Err(error.into());
        }
        Ok(Err(error)) => {
            warn!(%error, "the store does not say under which key it is encrypted");
        }
        Err(_) => warn!("the store does not answer: under which key it is encrypted is not known"),
    }
    Ok(())
}

/// `cluster coordinator`.
pub async fn coordinator(global: &Global) -> Result<()> {
    die_with()?;
    let config = required_config(global, "coordinator")?;
    let token = read_token(&config.cluster.token_file)?;
    make_private_folder(&config.cluster.dir)?;
    probe_store(&config).await?;
    let shutdown = stop_on_signal()?;
    let options =
        CoordinatorOptions { config, token, validate: Arc::new(validate_job), listener: None };
    Ok(Coordinator::run(options, shutdown).await?)
}

/// `cluster worker`.
pub async fn worker(global: &Global, args: &WorkerArgs) -> Result<()> {
    die_with()?;
    let mut config = required_config(global, "worker")?;
    config.store.uri = config.store_uri();
    probe_data_plane(&config)?;
    check_store_key(&config).await?;
    let name = worker_name(args.name.as_deref(), &config.worker.name)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let slots = args.slots.unwrap_or(config.worker.slots);
    let options = WorkerOptions {
        slots: if slots == 0 { cores } else { slots },
        coordinators: config.coordinator.members.iter().map(|m| m.address).collect(),
        token: read_token(&config.cluster.token_file)?,
        program: std::env::current_exe()
            .map_err(|e| CliError::internal(format!("cannot find this program's file: {e}")))?,
        dir: config.cluster.dir.join(format!("worker-{name}")),
        name,
        config,
    };
    let shutdown = stop_on_signal()?;
    Ok(Worker::run(options, shutdown).await?)
}

/// The given name, the configured one, or the host's made into a legal one.
fn worker_name(given: Option<&str>, configured: &str) -> Result<Name> {
    if let Some(name) = given.or(Some(configured)).filter(|name| !name.is_empty()) {
        return Ok(name.parse()?);
    }
    let host = read_text(Path::new("/proc/sys/kernel/hostname")).map_err(|e| {
        CliError::new(ExitClass::Usage, format!("this host's name is unknown: {e}"))
            .with_hint("name the worker with --name")
    })?;
    let legal: String = host
        .trim()
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(63)
        .collect();
    Ok(legal.trim_matches('-').parse()?)
}

/// A token that Ctrl-C or SIGTERM cancels; a second one ends the process at once.
fn stop_on_signal() -> Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let mut signals = Signals::new()?;
    let cancel = shutdown.clone();
    tokio::spawn(async move {
        signals.wait().await;
        cancel.cancel();
        signals.wait().await;
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(shutdown)
}
