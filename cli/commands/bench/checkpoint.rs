//! `cluster bench checkpoint`: what checkpoints cost, and how fast they are written and read.

use api::config::ClusterConfig;
use checkpoint::Store;
use serde::Serialize;

use super::checkpoint_store::{self, StoreSample};
use super::checkpoint_training::{self, TrainingSample};
use super::on_cluster::on_cluster;
use crate::args::{BenchCheckpoint, Global};
use crate::commands::submit::load_job;
use crate::error::{CliError, Result};
use crate::output;

/// The targets of `--check`: seconds that a checkpoint may stop the steps for in the median,
const STALL_MAX: f64 = 0.050;
/// part of the time that they may take,
const SLOWDOWN_MAX: f64 = 0.03;
/// part of a plain write's speed,
const WRITE_RATIO_MIN: f64 = 0.8;
/// and time over that of a plain read.
const READ_RATIO_MAX: f64 = 1.2;

/// What `cluster bench checkpoint` measured. Times in seconds; medians over the rounds.
#[derive(Debug, Serialize)]
struct CheckpointReport {
    bytes: u64,
    staged: Spread,
    written: Spread,
    written_plainly: Spread,
    write_ratio: Spread,
    read: Spread,
    read_plainly: Spread,
    read_ratio: Spread,
    training: Option<TrainingReport>,
    samples: Vec<StoreSample>,
}

#[derive(Debug, Serialize)]
struct TrainingReport {
    ranks: u32,
    global_batch: u32,
    bytes: u64,
    every_steps: u64,
    step_plain: Spread,
    step_saved: Spread,
    stall: Spread,
    slowdown: Spread,
    taken: Spread,
    samples: Vec<TrainingSample>,
}

/// A median and its range.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { median: at(values.len() / 2), min: at(0), max: at(values.len().saturating_sub(1)) }
    }

    fn show(&self, unit: impl Fn(f64) -> String) -> Vec<String> {
        vec![unit(self.median), format!("{}–{}", unit(self.min), unit(self.max))]
    }
}

/// Writes and reads a state, and trains with and without checkpoints.
pub async fn run(global: &Global, args: BenchCheckpoint) -> Result<()> {
    let BenchCheckpoint { job, state, rounds, every, steps, check, overrides } = args;
    for (what, value) in
        [("rounds", rounds as u64), ("every", every), ("steps", steps), ("state", state.0)]
    {
        if value == 0 {
            return Err(CliError::usage(format!("--{what} 0: expected at least 1")));
        }
    }
    let config = global.config.as_deref().map(ClusterConfig::load).transpose()?.unwrap_or_default();
    let training = match &job {
        Some(job) => {
            let mut spec = load_job(job, &overrides)?;
            spec.channels.remove("validation");
            spec.evaluate.every_steps = 0;
            Some(spec)
        }
        None => None,
    };
    let is_told = !global.json;
    let training = match training {
        Some(spec) => {
            let ranks = spec.resources.ranks.max();
            let samples = on_cluster(config.clone(), 1, ranks, async |client| {
                checkpoint_training::measure(
                    &client,
                    &spec,
                    steps,
                    every,
                    rounds,
                    |round, sample| {
                        if is_told {
                            let slower = sample.slowdown() * 100.0;
                            eprintln!("training, round {round} of {rounds}: {slower:+.1} %");
                        }
                    },
                )
                .await
            })
            .await;
            if !config.store.uri.is_empty() {
                let store = Store::open(&config.store, &config.store.uri)?;
                checkpoint_training::clean(&store, every, rounds).await?;
            }
            let samples = samples?;
            Some(TrainingReport {
                ranks,
                global_batch: spec.batch.global.get(),
                bytes: samples.iter().map(|s| s.bytes).max().unwrap_or(0),
                every_steps: every,
                step_plain: Spread::of(samples.iter().map(|s| s.step_plain)),
                step_saved: Spread::of(samples.iter().map(|s| s.step_saved)),
                stall: Spread::of(samples.iter().flat_map(|s| s.stalls.iter().copied())),
                slowdown: Spread::of(samples.iter().map(TrainingSample::slowdown)),
                taken: Spread::of(samples.iter().flat_map(|sample| sample.taken(every))),
                samples,
            })
        }
        None => None,
    };
    let folder = std::env::temp_dir().join(format!("cohort-bench-store-{}", std::process::id()));
    let mut section = config.store.clone();
    let is_own = section.uri.is_empty();
    if is_own {
        section.uri = format!("file://{}", folder.display());
    }
    let measured = tokio::task::spawn_blocking(move || {
        checkpoint_store::measure(section, state.0, rounds, |round, sample| {
            if is_told {
                let (write, read) = (sample.write_ratio(), sample.read_ratio());
                eprintln!("store, round {round} of {rounds}: write {write:.2}, read {read:.2}");
            }
        })
    })
    .await;
    if is_own {
        // Nothing is there when the store could not be opened.
        let _ = std::fs::remove_dir_all(&folder);
    }
    let samples = measured.map_err(|error| CliError::internal(error.to_string()))??;
    let spread = |of: fn(&StoreSample) -> f64| Spread::of(samples.iter().map(of));
    let report = CheckpointReport {
        bytes: state.0,
        staged: spread(|s| s.staged),
        written: spread(|s| s.written),
        written_plainly: spread(|s| s.written_plainly),
        write_ratio: spread(StoreSample::write_ratio),
        read: spread(|s| s.read),
        read_plainly: spread(|s| s.read_plainly),
        read_ratio: spread(StoreSample::read_ratio),
        training,
        samples,
    };
    print(global, &report);
    if check { report.check() } else { Ok(()) }
}

impl CheckpointReport {
    fn check(&self) -> Result<()> {
        let mut missed = Vec::new();
        let (write, read) = (self.write_ratio.median, self.read_ratio.median);
        if write < WRITE_RATIO_MIN {
            missed.push(format!(
                "writes at {write:.2} of a plain write's speed, expected at least {WRITE_RATIO_MIN}"
            ));
        }
        if read > READ_RATIO_MAX {
            missed.push(format!(
                "reads in {read:.2} times a plain read's time, expected at most {READ_RATIO_MAX}"
            ));
        }
        if let Some(training) = &self.training {
            let stall = training.stall.median;
            // With a checkpoint every few steps no step is undisturbed: then by runs.
            let slower = match training.taken.median {
                taken if taken.is_nan() => training.slowdown.median,
                taken => taken,
            };
            if stall > STALL_MAX {
                missed.push(format!(
                    "a checkpoint stops the steps for {stall:.3} s, expected at most {STALL_MAX}"
                ));
            }
            if slower > SLOWDOWN_MAX {
                missed.push(format!(
                    "checkpoints take {slower:.3} of the time, expected at most {SLOWDOWN_MAX}"
                ));
            }
        }
        match missed.is_empty() {
            true => Ok(()),
            false => Err(CliError::internal(missed.join("; "))),
        }
    }
}

fn print(global: &Global, report: &CheckpointReport) {
    if global.json {
        return output::json(report);
    }
    let milliseconds = |seconds: f64| format!("{:.0} ms", seconds * 1e3);
    let number = |ratio: f64| format!("{ratio:.2}");
    let percent = |part: f64| format!("{:+.1} %", part * 100.0);
    let row = |name: &str, shown: Vec<String>| [vec![name.to_owned()], shown].concat();
    let mut rows = vec![
        row("copy, for which steps wait", report.staged.show(milliseconds)),
        row("written", report.written.show(milliseconds)),
        row("plain write", report.written_plainly.show(milliseconds)),
        row("speed of writing / of a plain write", report.write_ratio.show(number)),
        row("read, cold", report.read.show(milliseconds)),
        row("plain read, cold", report.read_plainly.show(milliseconds)),
        row("time of reading / of a plain read", report.read_ratio.show(number)),
    ];
    if let Some(training) = &report.training {
        rows.extend([
            row("step without checkpoints", training.step_plain.show(milliseconds)),
            row("step with them", training.step_saved.show(milliseconds)),
            row("stall of a checkpoint", training.stall.show(milliseconds)),
            row("slower than without, by run", training.slowdown.show(percent)),
            row("part of the time that checkpoints take", training.taken.show(percent)),
        ]);
    }
    let size = output::bytes(report.bytes);
    output::table(&[&format!("state of {size}"), "median", "range"], rows, "nothing measured");
    if let Some(training) = &report.training {
        output::line(&format!(
            "the job: {} ranks, {} samples a step, {} every {} steps",
            training.ranks,
            training.global_batch,
            output::bytes(training.bytes),
            training.every_steps
        ));
    }
}
