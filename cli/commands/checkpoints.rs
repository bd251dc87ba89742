//! `cluster checkpoints` and `cluster checkpoint verify|diff|export|gc`.

use std::path::Path;

use api::config::StoreSection;
use api::records::{CheckpointRecord, JobStatus, WorkerView};
use api::{ExitClass, Generation, Name, Step};
use checkpoint::{Difference, Store, StoreError, VerifyReport};
use coordinator::ClusterClient;

use crate::args::{CheckpointCommand, Global};
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::output;

/// `cluster checkpoints JOB`.
pub async fn list(global: &Global, job: &str) -> Result<()> {
    let name: Name = job.parse()?;
    let client = Access::find(global)?.0.connect().await?;
    let records = records(&client, &name).await?;
    if global.json {
        records.iter().for_each(output::json);
        return Ok(());
    }
    let rows = records
        .iter()
        .map(|record| {
            let state = if record.damaged.is_some() { "could not be restored" } else { "" };
            vec![
                record.fact.step.0.to_string(),
                record.fact.generation.to_string(),
                output::bytes(record.fact.bytes),
                output::ago(record.committed_ms),
                record.fact.manifest_key.clone(),
                state.to_owned(),
            ]
        })
        .collect();
    let header = ["step", "generation", "size", "committed", "manifest", ""];
    output::table(&header, rows, "no checkpoints");
    Ok(())
}

/// `cluster checkpoint …`.
pub async fn run(global: &Global, command: CheckpointCommand) -> Result<()> {
    match command {
        CheckpointCommand::Verify { job, step } => verify(global, &job, step).await,
        CheckpointCommand::Gc { job, delete } => gc(global, &job, delete).await,
        CheckpointCommand::Diff { job, from, to } => diff(global, &job, from, to).await,
        CheckpointCommand::Export { job, output, step } => {
            export(global, &job, &output, step).await
        }
    }
}

async fn export(global: &Global, job: &str, to: &Path, step: Option<u64>) -> Result<()> {
    check_output(to)?;
    let Opened { records, store, .. } = Opened::find(global, job).await?;
    let record = pick(job, &records, step)?;
    let report = checkpoint::export(&store, &record.fact, to).await?;
    if global.json {
        output::json(&report);
        return Ok(());
    }
    output::line(&format!(
        "step {}: {} ({}), sha256 {}",
        record.fact.step.0,
        to.display(),
        output::bytes(report.bytes),
        report.sha256
    ));
    Ok(())
}

/// Before a gigabyte is read: a file can be made there.
fn check_output(to: &Path) -> Result<()> {
    if to.is_dir() {
        let example = to.join("weights.safetensors");
        let text = format!("--output `{}` is a folder, expected a file", to.display());
        return Err(CliError::usage(text).with_hint(format!("such as `{}`", example.display())));
    }
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    match parent.filter(|parent| !parent.is_dir()) {
        Some(parent) => {
            let text =
                format!("--output `{}`: there is no folder `{}`", to.display(), parent.display());
            Err(CliError::usage(text).with_hint("make it first, or correct the path"))
        }
        None => Ok(()),
    }
}

/// What reading one checkpoint came to.
enum Verified {
    /// It was read, or an object of it is gone.
    Report(VerifyReport),
    /// The leader has deleted it since it was listed.
    Deleted,
    /// Whether it is damaged is not known: it may not be read.
    Unread(CliError),
}

async fn verify(global: &Global, job: &str, step: Option<u64>) -> Result<()> {
    let opened = Opened::find(global, job).await?;
    let chosen: Vec<&CheckpointRecord> = match step {
        Some(_) => vec![pick(job, &opened.records, step)?],
        None => opened.records.iter().collect(),
    };
    if chosen.is_empty() && !global.json {
        output::line("no checkpoints");
    }
    let (mut damaged, mut unread) = (0, None);
    for record in chosen {
        let step = record.fact.step;
        match opened.verify(record).await? {
            Verified::Report(report) => {
                damaged += usize::from(!report.ok);
                show_report(global, step, &report);
            }
            Verified::Deleted => {
                let json = serde_json::json!({ "step": step, "deleted": true });
                show_verdict(global, step, "deleted meanwhile", &json);
            }
            Verified::Unread(error) => {
                let json = serde_json::json!({ "step": step, "unread": error.message() });
                show_verdict(global, step, &format!("NOT READ: {}", error.message()), &json);
                unread.get_or_insert(error);
            }
        }
    }
    if damaged > 0 {
        return Err(CliError::new(
            ExitClass::Corrupt,
            format!("{damaged} checkpoint(s) of `{job}` are damaged"),
        )
        .with_hint("an older one may be whole: `cluster checkpoint export JOB --step N`"));
    }
    unread.map_or(Ok(()), Err)
}

fn show_report(global: &Global, step: Step, report: &VerifyReport) {
    let verdict = format!(
        "{} ({} shards, {} tensors, {})",
        if report.ok { "ok" } else { "DAMAGED" },
        report.shards,
        report.tensors,
        output::bytes(report.bytes)
    );
    let json = serde_json::json!({ "step": step, "report": report });
    show_verdict(global, step, &verdict, &json);
    if !global.json {
        report.problems.iter().for_each(|problem| output::line(&format!("  {problem}")));
    }
}

fn show_verdict(global: &Global, step: Step, verdict: &str, json: &serde_json::Value) {
    match global.json {
        true => output::json(json),
        false => output::line(&format!("step {}: {verdict}", step.0)),
    }
}

/// What no manifest names, and, asked to, its deletion: only of a job that is over, by the leader's
/// word, and of which no rank is known to run (a leader that has just begun does not know of all).
///
/// The store is worked on directly, and the leader need not wait for it: what is deleted is of no use
/// to anybody, whatever is decided meanwhile. Only objects of generations up to the job's last are
/// looked at, and nobody writes in those any more, so that no manifest will come to name what none
/// names now. A job that is resumed meanwhile writes in a newer generation; what its manifests refer to
/// of older ones is named by the checkpoint that it was restored from, which stays. Should a rank out
/// of the leader's sight still complete a checkpoint, it lacks the shard that was deleted and does not
/// count as one when the leader looks for checkpoints to adopt.
async fn gc(global: &Global, job: &str, delete: bool) -> Result<()> {
    let name: Name = job.parse()?;
    let (access, section) = Access::find(global)?;
    let client = access.connect().await?;
    let status = client.job(&name).await?.1.status;
    if delete && !status.phase.is_terminal() {
        let text = format!(
            "job `{job}` is {}: while a job goes on only the leader deletes of its checkpoints",
            status.phase
        );
        return Err(CliError::new(ExitClass::Conflict, text).with_hint(
            "the leader sweeps by itself after checkpoints and when the job is over; without \
             --delete this command shows what there is",
        ));
    }
    if delete && let Some(found) = still_there(&name, &status, &client.workers().await?) {
        let text = format!("job `{job}` is {}, but {found}: it may be writing", status.phase);
        return Err(CliError::new(ExitClass::Conflict, text).with_hint(
            "ask again when `cluster workers` shows it attached and without that task",
        ));
    }
    let store = open_store(&access, &section)?;
    // What the current generation has begun is no orphan while it goes on.
    let ended = match status.phase.is_terminal() {
        true => status.generation,
        false => Generation(status.generation.0.saturating_sub(1)),
    };
    let orphans = checkpoint::find_orphans(&store, &name, ended).await?;
    let bytes: u64 = orphans.iter().map(|orphan| orphan.bytes).sum();
    if delete {
        checkpoint::delete_orphans(&store, &orphans).await?;
    }
    if global.json {
        for orphan in &orphans {
            output::json(&serde_json::json!({
                "key": orphan.key, "bytes": orphan.bytes, "deleted": delete
            }));
        }
        return Ok(());
    }
    let row =
        |orphan: &checkpoint::ObjectInfo| vec![orphan.key.clone(), output::bytes(orphan.bytes)];
    let rows = orphans.iter().map(row).collect();
    output::table(&["object", "size"], rows, "every object is named by a manifest");
    if !orphans.is_empty() {
        let what = if delete { "deleted" } else { "--delete would delete" };
        output::line(&format!("{what} {} objects, {}", orphans.len(), output::bytes(bytes)));
    }
    Ok(())
}

/// A rank of a job that is over which may still run: the leader has it killed, or cannot see it.
fn still_there(job: &Name, status: &JobStatus, workers: &[WorkerView]) -> Option<String> {
    let mine = format!("{job}/");
    workers.iter().find_map(|worker| {
        if let Some(task) = worker.tasks.iter().find(|task| task.starts_with(&mine)) {
            return Some(format!("{task} has not ended on `{}` yet", worker.name));
        }
        let was_on = status.gang.iter().any(|place| place.worker == worker.name);
        (was_on && !worker.attached)
            .then(|| format!("`{}`, which ran a rank of it, is not connected", worker.name))
    })
}

async fn diff(global: &Global, job: &str, from: Option<u64>, to: Option<u64>) -> Result<()> {
    let Opened { records, store, .. } = Opened::find(global, job).await?;
    let second = pick(job, &records, to)?;
    let first = match from {
        Some(_) => pick(job, &records, from)?,
        None => {
            let older = records.iter().rfind(|record| record.fact.step < second.fact.step);
            older.ok_or_else(|| {
                let text =
                    format!("job `{job}` has no checkpoint before step {}", second.fact.step.0);
                CliError::new(ExitClass::NotFound, text).with_hint("name one with --from STEP")
            })?
        }
    };
    let report = checkpoint::diff(&store, &first.fact, &second.fact).await?;
    let (from, to) = (first.fact.step, second.fact.step);
    if global.json {
        output::json(&serde_json::json!({ "from": from, "to": to, "report": report }));
        return Ok(());
    }
    let rows = report.differing.iter().map(|tensor| diff_row(&tensor.name, &tensor.difference));
    output::table(&["tensor", "differs in", "largest"], rows.collect(), "no tensor differs");
    output::line(&format!(
        "step {} and step {}: {} tensors differ, {} are the same",
        from.0,
        to.0,
        report.differing.len(),
        report.same
    ));
    Ok(())
}

fn diff_row(name: &str, difference: &Difference) -> Vec<String> {
    let (what, largest) = match difference {
        Difference::OnlyFirst => ("only the first has it".to_owned(), String::new()),
        Difference::OnlySecond => ("only the second has it".to_owned(), String::new()),
        Difference::Kind { first, second } => (format!("{first} became {second}"), String::new()),
        Difference::Values { elements, differing, largest } => (
            format!("{differing} of {elements} elements"),
            largest.map_or("not a number".to_owned(), |largest| format!("{largest:.3e}")),
        ),
    };
    vec![name.to_owned(), what, largest]
}

/// A job's checkpoints: who knows of them, and where they lie.
struct Opened {
    client: ClusterClient,
    name: Name,
    /// In step order.
    records: Vec<CheckpointRecord>,
    store: Store,
}

impl Opened {
    async fn find(global: &Global, job: &str) -> Result<Self> {
        let name: Name = job.parse()?;
        let (access, section) = Access::find(global)?;
        let client = access.connect().await?;
        let records = records(&client, &name).await?;
        Ok(Self { client, name, records, store: open_store(&access, &section)? })
    }

    /// Reads all of one checkpoint. An error is one of the whole store: the next checkpoint would wait
    /// as long and fare no better.
    async fn verify(&self, record: &CheckpointRecord) -> Result<Verified> {
        let fact = &record.fact;
        let digest = Some(fact.manifest_digest.as_str());
        let report = match checkpoint::verify(&self.store, &fact.manifest_key, digest).await {
            Ok(report) => report,
            // It is on record, so it should be there.
            Err(error @ StoreError::NotFound { .. }) => {
                VerifyReport { problems: vec![error.to_string()], ..VerifyReport::default() }
            }
            Err(error @ StoreError::Denied { .. }) => return Ok(Verified::Unread(error.into())),
            Err(error) => return Err(error.into()),
        };
        let is_it = |other: &CheckpointRecord| other.fact.manifest_key == fact.manifest_key;
        if !report.ok && !records(&self.client, &self.name).await?.iter().any(is_it) {
            return Ok(Verified::Deleted);
        }
        Ok(Verified::Report(report))
    }
}

/// A job's checkpoints on record, in step order. An unknown job is an error; a known one without
/// checkpoints an empty list.
async fn records(client: &ClusterClient, job: &Name) -> Result<Vec<CheckpointRecord>> {
    client.job(job).await?;
    Ok(client.checkpoints(job).await?.into_iter().map(|(_, record)| record).collect())
}

/// The store as it is: a folder that is gone is not made anew, all would seem to be missing from it.
fn open_store(access: &Access, section: &StoreSection) -> Result<Store> {
    let folder = access.store_uri.strip_prefix("file://").map(Path::new);
    if let Some(folder) = folder.filter(|folder| folder.is_absolute() && !folder.exists()) {
        let text = format!("the store's folder `{}` does not exist", folder.display());
        let hint = "is it mounted on this host, at the same path as on the cluster's?";
        return Err(CliError::new(ExitClass::NotFound, text).with_hint(hint));
    }
    Ok(Store::open(section, &access.store_uri)?)
}

fn pick<'a>(
    job: &str,
    records: &'a [CheckpointRecord],
    step: Option<u64>,
) -> Result<&'a CheckpointRecord> {
    let found = match step {
        Some(step) => records.iter().find(|record| record.fact.step == Step(step)),
        None => records.last(),
    };
    found.ok_or_else(|| {
        let steps: Vec<String> = records.iter().map(|r| r.fact.step.0.to_string()).collect();
        let text = match step {
            Some(step) => format!("job `{job}` has no checkpoint at step {step}"),
            None => format!("job `{job}` has no checkpoint"),
        };
        CliError::new(ExitClass::NotFound, text).with_hint(format!(
            "there are: {}",
            if steps.is_empty() { "none".into() } else { steps.join(", ") }
        ))
    })
}

#[cfg(test)]
mod tests {
    use api::records::Placement;

    use super::*;

    fn worker(name: &str, attached: bool, tasks: &[&str]) -> WorkerView {
        let view = serde_json::json!({
            "name": name, "host": name, "slots": 2, "used": tasks.len(), "attached": attached,
            "lease_ms": 0, "tasks": tasks,
        });
        serde_json::from_value(view).expect("a worker")
    }

    #[test]
    fn nothing_is_deleted_while_a_rank_may_still_write() {
        let job: Name = "digits".parse().expect("a name");
        let place = |worker: &str| Placement {
            rank: api::Rank(0),
            worker: worker.parse().expect("a name"),
            started_as: None,
            local_rank: 0,
        };
        let status = JobStatus { gang: vec![place("w1"), place("w2")], ..JobStatus::default() };
        let found = |workers: &[WorkerView]| still_there(&job, &status, workers);
        let others = ["digits-2/g1/r0"];
        assert_eq!(found(&[worker("w1", true, &others), worker("w2", true, &[])]), None);
        // One that the leader has not heard of for long, and one that never had a rank of it.
        assert_eq!(found(&[worker("w1", true, &[]), worker("w3", false, &[])]), None);
        let dying = found(&[worker("w1", true, &["digits/g1/r0"])]).expect("it runs");
        assert_eq!(dying, "digits/g1/r0 has not ended on `w1` yet");
        let away = found(&[worker("w2", false, &[])]).expect("it is out of sight");
        assert_eq!(away, "`w2`, which ran a rank of it, is not connected");
    }
}
