//! Looking at jobs and the cluster: `jobs`, `job`, `logs`, `follow`, `stop`, `status`.

use std::time::Duration;

use api::pb::LogLine;
use api::records::{Goodput, JobRecord, JobStatus, Moment, Phase};
use api::{ExitClass, Name};
use coordinator::ClusterClient;
use tokio_stream::StreamExt;

use crate::args::{Global, Logs, Stop};
use crate::commands::cost;
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::follow::{follow, outcome};
use crate::output;

async fn client(global: &Global) -> Result<ClusterClient> {
    let (access, _) = Access::find(global)?;
    access.connect().await
}

/// `cluster jobs`.
pub async fn list(global: &Global) -> Result<()> {
    let jobs = client(global).await?.jobs().await?;
    if global.json {
        jobs.iter().for_each(|(_, job)| output::json(job));
        return Ok(());
    }
    let rows = jobs.iter().map(|(_, job)| row(job)).collect();
    let header = ["name", "algorithm", "state", "ranks", "checkpoint", "submitted", "reason"];
    output::table(&header, rows, "no jobs");
    Ok(())
}

fn row(job: &JobRecord) -> Vec<String> {
    let checkpoint = job.status.checkpoint.as_ref().map(|c| format!("step {}", c.step.0));
    vec![
        job.spec.name.to_string(),
        job.spec.algorithm.clone(),
        job.status.phase.to_string(),
        job.spec.resources.ranks.to_string(),
        checkpoint.unwrap_or_else(|| "-".into()),
        output::ago(job.status.submitted_ms),
        job.status.reason.clone(),
    ]
}

/// `cluster job NAME`.
pub async fn show(global: &Global, name: &str) -> Result<()> {
    let name: Name = name.parse()?;
    let (version, mut job) = client(global).await?.job(&name).await?;
    count_waiting(&mut job.status, output::now_ms());
    if global.json {
        let (spec, status) = (&job.spec, &job.status);
        output::json(&serde_json::json!({
            "spec": spec,
            "status": status,
            "goodput_fraction": status.goodput.fraction(),
            "cost": cost::document(status),
        }));
        return Ok(());
    }
    let status = &job.status;
    let mut facts = vec![
        ("name", job.spec.name.to_string()),
        ("algorithm", job.spec.algorithm.clone()),
        ("state", status.phase.to_string()),
        ("reason", status.reason.clone()),
        (
            "generation",
            format!(
                "{} ({} restarts, {} of them in place)",
                status.generation.0, status.restarts, status.regroups
            ),
        ),
        ("record", format!("version {version}")),
        ("submitted", output::ago(status.submitted_ms)),
    ];
    if let (Some(begin), Some(end)) = (status.started_ms, status.ended_ms) {
        let took = Duration::from_millis(end.saturating_sub(begin));
        facts.push(("took", output::span(took)));
    }
    if !status.gang.is_empty() {
        let gang: Vec<String> =
            status.gang.iter().map(|p| format!("{} on {}", p.rank.0, p.worker)).collect();
        facts.push(("ranks", gang.join(", ")));
    }
    if let Some(checkpoint) = &status.checkpoint {
        let size = output::bytes(checkpoint.bytes);
        facts.push(("checkpoint", format!("step {} ({size})", checkpoint.step.0)));
    }
    if let Some(failure) = &status.first_cause {
        let rank = failure.rank.map_or_else(|| "worker".into(), |r| format!("rank {}", r.0));
        let text = format!(
            "generation {}: {rank} on {}: {}, {}",
            failure.generation.0,
            failure.worker,
            failure.cause,
            output::ago(failure.time_ms)
        );
        facts.push(("first cause", text));
    }
    if let Some(fingerprint) = &status.fingerprint {
        facts.push(("fingerprint", fingerprint.clone()));
    }
    if let Some(model) = &status.model {
        facts.push(("model", model.key.clone()));
        facts.push(("sha256", model.sha256.clone()));
        for (metric, value) in &model.metrics {
            facts.push((metric, format!("{value:.4}")));
        }
        if let Some(samples) = &model.samples {
            let text = format!(
                "{} whole epochs, each sample exactly once, and {} samples of the next",
                samples.epochs_verified, samples.count
            );
            facts.push(("trained on", text));
        }
    }
    for (key, value) in facts {
        output::line(&format!("{key:<20} {value}"));
    }
    show_goodput(&status.goodput);
    cost::show(status);
    show_history(&status.history);
    Ok(())
}

/// The record of a job that waits is not written meanwhile: its wait ends now.
fn count_waiting(status: &mut JobStatus, now_ms: u64) {
    if let (Phase::Queued, Some(then)) = (status.phase, status.accounted_ms) {
        status.goodput.queued_ms += now_ms.saturating_sub(then);
        status.accounted_ms = Some(now_ms.max(then));
    }
}

/// Where every rank-second went, as far as the record says.
pub fn show_goodput(book: &Goodput) {
    let fraction = book.fraction();
    if fraction.is_none() && book.queued_ms == 0 {
        return;
    }
    output::line("");
    let queued = book.queued_ms as f64 / 1e3;
    let queued = format!("  {:<18} {queued:>10.1} s, without ranks", "in the queue");
    let Some(fraction) = fraction else { return output::line(&queued) };
    output::line(&format!(
        "goodput              {:.1} % of {} rank-seconds; {} steps, {} of them computed again",
        fraction * 100.0,
        book.total_ms() / 1000,
        book.steps,
        book.steps_redone
    ));
    let rows = [
        ("steps", book.useful_ms),
        ("communication", book.communication_ms),
        ("checkpoints", book.checkpoint_ms),
        ("starting", book.starting_ms),
        ("recovery", book.recovery_ms),
        ("lost work", book.lost_ms),
        ("between steps", book.other_ms),
    ];
    for (what, milliseconds) in rows {
        let share = milliseconds as f64 / book.total_ms() as f64 * 100.0;
        let seconds = milliseconds as f64 / 1e3;
        output::line(&format!("  {what:<18} {seconds:>10.1} s {share:>6.1} %"));
    }
    output::line(&queued);
}

fn show_history(history: &[Moment]) {
    if history.is_empty() {
        return;
    }
    output::line("");
    let rows = history.iter().map(|moment| {
        let phase = format!("{} g{}", moment.phase, moment.generation.0);
        vec![output::ago(moment.time_ms), phase, moment.text.clone()]
    });
    output::table(&["when", "state", "why"], rows.collect(), "");
}

/// `cluster logs NAME`.
pub async fn logs(global: &Global, args: &Logs) -> Result<()> {
    let name: Name = args.name.parse()?;
    let client = client(global).await?;
    let mut lines = client.logs(&name, args.rank, args.follow).await?;
    if let Some(rank) = args.rank {
        check_rank(&client, &name, rank).await?;
    }
    let mut is_empty = true;
    while let Some(line) = lines.next().await {
        print_log(global, &line?);
        is_empty = false;
    }
    if let Some(rank) = args.rank.filter(|_| is_empty) {
        // Of an elastic job: it may never have run on so many.
        eprintln!("rank {rank} of `{name}` has written nothing");
    }
    Ok(())
}

/// Refuses a rank that the job cannot have had: it would show nothing, as one that wrote nothing does.
async fn check_rank(client: &ClusterClient, name: &Name, rank: u32) -> Result<()> {
    let count = match client.job(name).await {
        // Processes that began as spares have logs of their own, behind those of the ranks.
        Ok((_, job)) => job.spec.resources.ranks.max().saturating_add(job.status.spares_most),
        // An endpoint: it has one replica.
        Err(error) if error.exit_class() == ExitClass::NotFound => 1,
        Err(error) => return Err(error.into()),
    };
    if rank < count {
        return Ok(());
    }
    let there = match count {
        1 => "the only one is rank 0".to_owned(),
        _ => format!("it has ranks 0 to {}", count - 1),
    };
    Err(CliError::new(ExitClass::NotFound, format!("`{name}` has no rank {rank}: {there}")))
}

fn print_log(global: &Global, line: &LogLine) {
    if global.json {
        output::json(&serde_json::json!({
            "generation": line.generation, "rank": line.rank, "sequence": line.sequence,
            "time_ms": line.time_ms, "stream": line.stream, "text": line.text,
        }));
        return;
    }
    let seconds = line.time_ms / 1000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mark = match line.stream.as_str() {
        "stderr" => "!",
        "gap" => "…",
        _ => " ",
    };
    output::line(&format!(
        "{hour:02}:{minute:02}:{second:02}.{:03} g{} r{}{mark} {}",
        line.time_ms % 1000,
        line.generation,
        line.rank,
        line.text
    ));
}

/// `cluster follow NAME`.
pub async fn watch(global: &Global, name: &str) -> Result<()> {
    let name: Name = name.parse()?;
    let client = client(global).await?;
    let status = follow(&client, &name, global.json).await?;
    if !global.json {
        output::line(&format!("job `{name}` {}: {}", status.phase, status.reason));
    }
    outcome(&name, &status)
}

/// `cluster stop NAME`.
pub async fn stop(global: &Global, args: &Stop) -> Result<()> {
    let name: Name = args.name.parse()?;
    let client = client(global).await?;
    let phase = if args.endpoint {
        client.stop_endpoint(&name).await?.status.phase
    } else {
        refuse_ambiguous(&client, &name).await?;
        client.stop_job(&name).await?.status.phase
    };
    if global.json {
        output::json(&serde_json::json!({ "name": name, "state": phase }));
    } else {
        output::line(&format!("`{name}` is {phase}"));
    }
    Ok(())
}

/// A job that has ended and a running endpoint may share a name: then the endpoint is meant, or
/// nothing, and the person should say so.
async fn refuse_ambiguous(client: &ClusterClient, name: &Name) -> Result<()> {
    let ended = match client.job(name).await {
        Ok((_, job)) => job.status.phase.is_terminal(),
        Err(_) => true,
    };
    let running = client.endpoint(name).await.is_ok_and(|(_, e)| !e.status.phase.is_terminal());
    if ended && running {
        let text = format!("`{name}` is a running endpoint, and no running job");
        return Err(CliError::new(ExitClass::Conflict, text)
            .with_hint(format!("stop the endpoint with `cluster stop {name} --endpoint`")));
    }
    Ok(())
}

/// `cluster status`.
pub async fn status(global: &Global) -> Result<()> {
    let status = client(global).await?.status().await?;
    if global.json {
        let members: Vec<_> = status
            .members
            .iter()
            .map(|m| serde_json::json!({ "node": m.node, "address": m.address }))
            .collect();
        output::json(&serde_json::json!({
            "node": status.node, "leader": status.leader, "term": status.term,
            "commit_index": status.commit_index, "applied_index": status.applied_index,
            "members": members,
        }));
        return Ok(());
    }
    let rows = status
        .members
        .iter()
        .map(|member| {
            let role = if member.node == status.leader { "leader" } else { "follower" };
            let asked = if member.node == status.node { "answered" } else { "" };
            vec![format!("n{}", member.node), member.address.clone(), role.into(), asked.into()]
        })
        .collect();
    output::table(&["node", "address", "role", ""], rows, "no coordinators");
    output::line(&format!(
        "term {}, committed {}, applied {}",
        status.term, status.commit_index, status.applied_index
    ));
    Ok(())
}
