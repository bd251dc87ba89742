//! `cluster bench train`: the step time and throughput of a job file on this machine.

use std::time::Instant;

use api::config::ClusterConfig;
use api::events::{JobEvent, StepMetrics};
use serde::Serialize;
use tokio_stream::StreamExt;

use super::on_cluster::on_cluster;
use crate::args::{BenchTrain, Global};
use crate::commands::submit::load_job;
use crate::error::{CliError, Result};
use crate::follow::outcome;
use crate::output;

/// What `cluster bench train` measured. Times in seconds.
#[derive(Debug, Serialize)]
struct TrainReport {
    algorithm: String,
    ranks: u32,
    threads_per_rank: u32,
    global_batch: u32,
    steps: usize,
    step_median: f64,
    step_min: f64,
    step_max: f64,
    steps_per_second: f64,
    samples_per_second: f64,
    tokens_per_second: f64,
    data: f64,
    compute: f64,
    communication: f64,
    /// Part of the time that lies between steps: agreeing on stops, pauses and checkpoints, comparing
    /// ranks, reporting. What surviving faults costs while there are none.
    between_steps: f64,
    start_to_first_step: f64,
    memory_bytes_rank0: u64,
    fingerprint: String,
}

/// Runs the job for a few steps and prints what they took.
pub async fn run(global: &Global, args: BenchTrain) -> Result<()> {
    let BenchTrain { job, steps, warmup, mut overrides } = args;
    if steps == 0 {
        return Err(CliError::usage("--steps 0: expected at least 1"));
    }
    // From the command's start, as the peer is timed: the cluster's own start is part of the wait.
    let begin = Instant::now();
    overrides.extend([
        format!("stop.max_steps={}", steps + warmup),
        "checkpoint.every_steps=0".into(),
        "evaluate.every_steps=0".into(),
    ]);
    let mut spec = load_job(&job, &overrides)?;
    // Only steps are measured; validation at the end would be waited for and thrown away.
    spec.channels.remove("validation");
    let ranks = spec.resources.ranks.max();
    let (first, seen, fingerprint) =
        on_cluster(ClusterConfig::default(), 1, ranks, async |client| {
            client.submit(&spec).await?;
            let mut events = client.watch(&spec.name).await?;
            let (mut first, mut seen, mut fingerprint) = (None, Vec::new(), None);
            while let Some(event) = events.next().await {
                match event? {
                    JobEvent::Step(metrics) => {
                        first.get_or_insert_with(|| begin.elapsed().as_secs_f64());
                        seen.push((metrics, Instant::now()));
                    }
                    JobEvent::Status(status) => {
                        fingerprint = status.fingerprint.clone().or(fingerprint);
                        if status.phase.is_terminal() {
                            outcome(&spec.name, &status)?;
                            break;
                        }
                    }
                    _ => {}
                }
            }
            Ok((first.unwrap_or_default(), seen, fingerprint.unwrap_or_default()))
        })
        .await?;
    let told = seen.iter().filter(|(metrics, _)| metrics.step.0 > warmup);
    let between_steps = between(&told.clone().collect::<Vec<_>>());
    let measured: Vec<&StepMetrics> = told.map(|(metrics, _)| metrics).collect();
    if measured.is_empty() {
        return Err(CliError::internal("no step was measured"));
    }
    let median = |of: fn(&StepMetrics) -> f64| {
        let mut values: Vec<f64> = measured.iter().map(|m| of(m)).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let times: Vec<f64> = measured.iter().map(|m| m.time.total).collect();
    let report = TrainReport {
        algorithm: spec.algorithm.clone(),
        ranks,
        threads_per_rank: spec.resources.threads_per_rank.get(),
        global_batch: spec.batch.global.get(),
        steps: measured.len(),
        step_median: median(|m| m.time.total),
        step_min: times.iter().copied().fold(f64::INFINITY, f64::min),
        step_max: times.iter().copied().fold(0.0, f64::max),
        steps_per_second: 1.0 / median(|m| m.time.total),
        samples_per_second: median(|m| m.samples_per_second),
        tokens_per_second: median(|m| m.tokens_per_second),
        data: median(|m| m.time.data),
        compute: median(|m| m.time.compute),
        communication: median(|m| m.time.communication),
        between_steps,
        start_to_first_step: first,
        memory_bytes_rank0: measured.iter().map(|m| m.memory_bytes).max().unwrap_or(0),
        fingerprint,
    };
    if global.json {
        output::json(&report);
        return Ok(());
    }
    let rows = vec![vec![
        format!("{} × {}", report.ranks, report.threads_per_rank),
        format!("{:.1} ms", report.step_median * 1e3),
        format!("{:.1}–{:.1}", report.step_min * 1e3, report.step_max * 1e3),
        format!("{:.0}", report.samples_per_second),
        format!("{:.0}", report.tokens_per_second),
        format!("{:.1} ms", report.communication * 1e3),
        format!("{:.2} %", report.between_steps * 100.0),
        format!("{:.2} s", report.start_to_first_step),
        output::bytes(report.memory_bytes_rank0),
    ]];
    let header = [
        "ranks × threads",
        "step",
        "range",
        "samples/s",
        "tokens/s",
        "comm",
        "between steps",
        "first step",
        "memory",
    ];
    output::table(&header, rows, "nothing measured");
    Ok(())
}

/// The part of the time from the first report to the last that no step took.
fn between(told: &[&(StepMetrics, Instant)]) -> f64 {
    let [(_, first), rest @ ..] = told else { return 0.0 };
    let Some((_, last)) = rest.last() else { return 0.0 };
    let all = last.duration_since(*first).as_secs_f64();
    let steps: f64 = rest.iter().map(|(metrics, _)| metrics.time.total).sum();
    (1.0 - steps / all).max(0.0)
}
