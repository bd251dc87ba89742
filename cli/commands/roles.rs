//! `cluster coordinator` and `cluster worker`: one role of a cluster of several hosts, as
//! cluster.toml says.

use std::path::Path;
use std::sync::Arc;

use api::config::ClusterConfig;
use api::connect::read_token;
use api::document::read_text;
use api::{ExitClass, Name};
use coordinator::{Coordinator, CoordinatorOptions};
use tokio_util::sync::CancellationToken;
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

/// `cluster coordinator`.
pub async fn coordinator(global: &Global) -> Result<()> {
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
    let mut config = required_config(global, "worker")?;
    config.store.uri = config.store_uri();
    probe_data_plane(&config)?;
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
