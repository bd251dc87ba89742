//! `cluster submit` and `cluster resume`, with and without a running cluster.

use std::io::Write;
use std::path::{Path, PathBuf};

use api::config::ClusterConfig;
use api::events::ModelFact;
use api::records::{JobStatus, Phase};
use api::{JobSpec, Name};
use coordinator::ClusterClient;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{Global, Resume, Submit};
use crate::commands::cost;
use crate::context::{Access, DIR_DEFAULT};
use crate::embedded::{Embedded, EmbeddedOptions};
use crate::error::{CliError, Result};
use crate::follow::{follow, outcome};
use crate::output;
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// Data up to this size are read once before a job is sent; it takes well under a second.
const CHECKED_BYTES_MAX: u64 = 64 << 20;

/// Reads a job file and checks all that can be checked before anything runs.
pub fn load_job(path: &Path, overrides: &[String]) -> Result<JobSpec> {
    let mut spec = JobSpec::load(path, overrides)?;
    let schema = algorithms::algorithm(&spec.algorithm)?.schema();
    spec.resolve(&schema)?;
    trainer::open_device(spec.resources.device, 0)?;
    for (name, channel) in &spec.channels {
        let Some(path) = channel.uri.strip_prefix("file://").map(Path::new) else { continue };
        // A pack with a recipe beside it is made when it is missing, and refused when it is stale.
        if algorithms::data::ensure_recipe(path, &mut pack_progress())? || path.exists() {
            continue;
        }
        return Err(CliError::usage(format!(
            "channels.{name}.uri: `{}` does not exist",
            path.display()
        ))
        .with_hint("relative paths are taken from the job file's folder"));
    }
    check_data(&spec)?;
    Ok(spec)
}

/// Reads small local data as the ranks will, so that a malformed file is found before anything runs.
fn check_data(spec: &JobSpec) -> Result<()> {
    let mut local = algorithms::LocalChannels::new();
    let mut bytes = 0;
    for (name, channel) in &spec.channels {
        // Data elsewhere are found out about by the ranks.
        let Some(path) = channel.uri.strip_prefix("file://") else { return Ok(()) };
        let metadata = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
        let Some(metadata) = metadata else { return Ok(()) };
        bytes += metadata.len();
        local.insert(name.clone(), path.into());
    }
    if bytes <= CHECKED_BYTES_MAX {
        algorithms::algorithm(&spec.algorithm)?.open(spec, &local)?;
    }
    Ok(())
}

/// A bar while a pack is made; nothing when it is quick or nobody looks.
pub fn pack_progress() -> impl FnMut(u64, u64) {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("  packing [{bar:32}] {bytes}/{total_bytes}") {
        bar.set_style(style.progress_chars("=> "));
    }
    move |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if done >= total {
            bar.finish_and_clear();
        }
    }
}

/// `cluster submit`.
pub async fn submit(global: &Global, args: &Submit) -> Result<()> {
    let spec = load_job(&args.job, &args.overrides)?;
    if args.local {
        let dir = match &global.dir {
            Some(dir) => dir.clone(),
            None => free_run_folder(&spec.name),
        };
        let config = super::roles::load_config(global)?;
        let slots = spec.resources.ranks.max();
        return run_local(global, dir, config, slots, Start::Submit(Box::new(spec))).await;
    }
    let (access, _) = Access::find(global)?;
    let client = access.connect().await?;
    let name = spec.name.clone();
    client.submit(&spec).await?;
    if !args.follow {
        print_done(
            global,
            &format!("submitted job `{name}`; `cluster follow {name}` watches it"),
            &name,
        );
        return Ok(());
    }
    let status = follow(&client, &name, global.json).await?;
    conclude(global, &name, &status, &access.store_uri)
}

/// `cluster resume`.
pub async fn resume(global: &Global, args: &Resume) -> Result<()> {
    let name: Name = args.name.parse()?;
    if args.local {
        let dir = global.dir.clone().ok_or_else(|| {
            CliError::usage("`cluster resume --local` needs --dir PATH: the folder of the run")
        })?;
        // Without the client file there was never a cluster in that folder.
        Access::read(&dir)?;
        let config = super::roles::load_config(global)?;
        return run_local(global, dir, config, 0, Start::Resume(name)).await;
    }
    let (access, _) = Access::find(global)?;
    let client = access.connect().await?;
    client.resume(&name).await?;
    if !args.follow {
        print_done(global, &format!("job `{name}` is queued again"), &name);
        return Ok(());
    }
    let status = follow(&client, &name, global.json).await?;
    conclude(global, &name, &status, &access.store_uri)
}

fn print_done(global: &Global, text: &str, name: &Name) {
    if global.json {
        output::json(&serde_json::json!({ "job": name, "state": "queued" }));
    } else {
        output::line(text);
    }
}

enum Start {
    Submit(Box<JobSpec>),
    Resume(Name),
}

/// An embedded cluster for one job: start, follow to the end, stop.
async fn run_local(
    global: &Global,
    dir: PathBuf,
    config: ClusterConfig,
    slots: u32,
    start: Start,
) -> Result<()> {
    let mut signals = Signals::new()?;
    let slots = match &start {
        Start::Submit(_) => slots,
        Start::Resume(_) => api::job::LANES_MAX,
    };
    let options = EmbeddedOptions {
        dir: dir.clone(),
        config,
        config_file: global.config.clone(),
        coordinators: 1,
        workers: 1,
        slots,
        port: 0,
    };
    let mut embedded = signals.or_exit(Embedded::start(options)).await?;
    let access = embedded.access.clone();
    let work = async {
        let client = access.connect().await?;
        let name = begin(&client, start).await?;
        if !global.json {
            eprintln!("job `{name}` in `{}`", dir.display());
        }
        let status = follow_or_stop(global, &client, &name, &mut signals).await?;
        Ok((name, status))
    };
    let ended = tokio::select! {
        ended = work => ended,
        error = embedded.failed() => Err(error),
    };
    // The result first: whatever happens while the cluster stops, it has been told.
    let concluded = ended.and_then(|(name, status)| {
        let concluded = conclude(global, &name, &status, &access.store_uri);
        if status.phase == Phase::Stopped && !global.json {
            eprintln!("go on with: cluster resume {name} --local --dir {}", dir.display());
        }
        concluded
    });
    let stopped = signals.or_exit(embedded.stop()).await;
    concluded.and(stopped)
}

/// Follows a job; the first Ctrl-C stops it politely, the second ends everything.
async fn follow_or_stop(
    global: &Global,
    client: &ClusterClient,
    name: &Name,
    signals: &mut Signals,
) -> Result<JobStatus> {
    let watching = follow(client, name, global.json);
    tokio::pin!(watching);
    tokio::select! {
        status = &mut watching => return status,
        () = signals.wait() => {}
    }
    // The terminal may be what has gone away.
    let told = "stopping: the job saves its state; Ctrl-C again to stop at once";
    let _ = writeln!(std::io::stderr(), "{told}");
    client.stop_job(name).await?;
    tokio::select! {
        status = &mut watching => status,
        () = signals.wait() => std::process::exit(EXIT_INTERRUPTED),
    }
}

async fn begin(client: &ClusterClient, start: Start) -> Result<Name> {
    match start {
        Start::Submit(spec) => {
            client.submit(&spec).await?;
            Ok(spec.name.clone())
        }
        Start::Resume(name) => {
            let (_, record) = client.job(&name).await?;
            // A job that was cut off with its cluster goes on by itself; one that had succeeded
            // before the result could be printed has nothing left but that.
            if record.status.phase.is_terminal() && record.status.phase != Phase::Succeeded {
                client.resume(&name).await?;
            }
            Ok(name)
        }
    }
}

/// Prints where the model is and how to serve it, or fails as the job did. With --json the last
/// line carries `state`, `model` and `sha256`.
fn conclude(global: &Global, name: &Name, status: &JobStatus, store_uri: &str) -> Result<()> {
    let model = status.model.as_ref().map(|fact| (fact, model_location(store_uri, fact)));
    if global.json {
        output::json(&serde_json::json!({
            "job": name,
            "state": status.phase,
            "reason": status.reason,
            "generation": status.generation,
            "restarts": status.restarts,
            "regroups": status.regroups,
            "goodput": status.goodput,
            "cost": cost::document(status),
            "history": status.history,
            "model": model.as_ref().map(|(_, path)| path),
            "sha256": model.as_ref().map(|(fact, _)| &fact.sha256),
            "steps": model.as_ref().map(|(fact, _)| fact.step),
            "metrics": model.as_ref().map(|(fact, _)| &fact.metrics),
            "samples": model.as_ref().map(|(fact, _)| fact.samples),
            "first_cause": status.first_cause,
        }));
    } else if let Some((fact, path)) = &model {
        let metrics: Vec<String> =
            fact.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        output::line(&format!(
            "job `{name}` succeeded at step {}: {}",
            fact.step.0,
            metrics.join(", ")
        ));
        output::line(&format!("model: {path}"));
        output::line(&format!("sha256: {}", fact.sha256));
        let folder = path.trim_end_matches("/model.safetensors");
        output::line(&format!("serve it: cluster serve {folder}"));
    }
    outcome(name, status).map_err(CliError::told_by_result)
}

/// Path (folder store) or URI (S3) of a model's weights file.
fn model_location(store_uri: &str, fact: &ModelFact) -> String {
    let base = store_uri.strip_prefix("file://").unwrap_or(store_uri);
    format!("{}/{}/model.safetensors", base.trim_end_matches('/'), fact.key)
}

/// `.cohort/runs/NAME`, or with a number when that is taken: every local run has its own folder.
fn free_run_folder(name: &Name) -> PathBuf {
    let runs = Path::new(DIR_DEFAULT).join("runs");
    let first = runs.join(name.as_str());
    if !first.exists() {
        return first;
    }
    (2u32..)
        .map(|n| runs.join(format!("{name}-{n}")))
        .find(|folder| !folder.exists())
        .unwrap_or(first)
}
