//! `cluster bench recovery`: how long a job stands still when one of its ranks dies.
//!
//! Measured from the signal to the start of the first microbatch after it, over and over in one
//! run, on a cluster of this machine: detection, the decision, meeting again, agreeing on the
//! state and, for a new process, starting and receiving it. The step that is redone is told apart.
//! The start of that step is when its report arrives less the time that it says it took.

use std::time::{Duration, Instant};

use api::config::ClusterConfig;
use api::events::{JobEvent, StepMetrics};
use api::records::{JobStatus, Phase};
use chaos::Random;
use coordinator::EventStream;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use tokio_stream::StreamExt;

use crate::args::{BenchFault, BenchRecovery, Global};
use crate::commands::submit::load_job;
use crate::embedded::{Embedded, EmbeddedOptions};
use crate::error::{CliError, Result};
use crate::output;
use crate::processes::rank_processes;

/// Steps of a generation before it is disturbed.
const STEPS_BETWEEN: u64 = 3;
/// What takes longer has failed.
const GUARD: Duration = Duration::from_secs(120);
/// The targets of `--check`, in seconds.
const MEDIAN_MAX: f64 = 1.0;
const WORST_MAX: f64 = 3.0;

/// One fault and what it cost.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    /// Seconds until the coordinator had recorded the next generation.
    decided: f64,
    /// Seconds until the first microbatch after it began.
    stall: f64,
    /// Seconds that this first step took.
    redone_step: f64,
    /// Whole steps that were reported before and had to be computed again.
    steps_lost: u64,
    /// Processes that were there before and after.
    survivors: usize,
}

/// What `cluster bench recovery` measured. Times in seconds.
#[derive(Debug, Serialize)]
struct RecoveryReport {
    fault: &'static str,
    ranks: u32,
    faults: usize,
    stall_median: f64,
    stall_min: f64,
    stall_max: f64,
    decided_median: f64,
    decided_max: f64,
    redone_step_median: f64,
    steps_lost_max: u64,
    survivors_lost: usize,
    samples: Vec<Sample>,
}

/// Runs the job and disturbs it.
pub async fn run(global: &Global, args: BenchRecovery) -> Result<()> {
    let BenchRecovery { job, faults, seed, fault, check, mut overrides } = args;
    if faults == 0 {
        return Err(CliError::usage("--faults 0: expected at least 1"));
    }
    overrides.extend([
        "stop.max_steps=1000000".into(),
        "checkpoint.every_steps=0".into(),
        "evaluate.every_steps=0".into(),
    ]);
    let mut spec = load_job(&job, &overrides)?;
    spec.channels.remove("validation");
    let ranks = spec.resources.ranks.max();
    if ranks < 2 {
        return Err(CliError::usage(
            "resources.ranks = 1: with no rank left there is nobody to recover; set at least 2",
        ));
    }
    let folder = std::env::temp_dir().join(format!("cohort-bench-{}", std::process::id()));
    let options = EmbeddedOptions {
        dir: folder.clone(),
        config: ClusterConfig::default(),
        config_file: None,
        coordinators: 1,
        workers: 1,
        slots: ranks,
        port: 0,
    };
    let mut embedded = Embedded::start(options).await?;
    let access = embedded.access.clone();
    let work = async {
        let client = access.connect().await?;
        client.submit(&spec).await?;
        let mut view = View { events: client.watch(&spec.name).await?, status: None, step: None };
        let mut samples = Vec::new();
        let mut random = Random::new(seed);
        for number in 0..faults {
            view.steady().await?;
            let victim = random.below(u64::from(ranks)) as usize;
            samples.push(view.disturb(victim, fault).await?);
            if !global.json {
                let sample = &samples[number];
                eprintln!("fault {} of {faults}: stall {:.0} ms", number + 1, sample.stall * 1e3);
            }
        }
        Ok(samples)
    };
    let ended = tokio::select! {
        ended = work => ended,
        error = embedded.failed() => Err(error),
    };
    // Nothing of the job is wanted any more: its ranks need not write a last checkpoint.
    for (_, pid) in rank_processes(std::process::id()) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let stopped = embedded.stop().await;
    let _ = std::fs::remove_dir_all(&folder);
    let samples = ended?;
    stopped?;
    let report = summarise(fault, ranks, samples);
    print(global, &report);
    if check && (report.stall_median > MEDIAN_MAX || report.stall_max > WORST_MAX) {
        return Err(CliError::internal(format!(
            "the stall is {:.2} s in the median and {:.2} s at worst, expected at most \
             {MEDIAN_MAX} s and {WORST_MAX} s",
            report.stall_median, report.stall_max
        )));
    }
    Ok(())
}

/// The job as its events show it.
struct View {
    events: EventStream,
    status: Option<JobStatus>,
    step: Option<StepMetrics>,
}

impl View {
    async fn next(&mut self) -> Result<JobEvent> {
        let event = tokio::time::timeout(GUARD, self.events.next()).await;
        let gone = || CliError::internal("the job's events ended");
        let event = event
            .map_err(|_| CliError::internal(format!("no event for {} s", GUARD.as_secs())))?
            .ok_or_else(gone)??;
        match &event {
            JobEvent::Status(status) => {
                if status.phase.is_terminal() {
                    let text = format!("the job is {}: {}", status.phase, status.reason);
                    return Err(CliError::internal(text));
                }
                self.status = Some((**status).clone());
            }
            JobEvent::Step(metrics) => self.step = Some(metrics.clone()),
            _ => {}
        }
        Ok(event)
    }

    /// Returns when the present generation has run for some steps.
    async fn steady(&mut self) -> Result<()> {
        let mut steps = 0;
        while steps < STEPS_BETWEEN {
            let is_running = self.status.as_ref().is_some_and(|s| s.phase == Phase::Running);
            match self.next().await? {
                JobEvent::Step(_) if is_running => steps += 1,
                JobEvent::Status(_) => steps = 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// One fault, and the wait for the first step after it.
    async fn disturb(&mut self, victim: usize, fault: BenchFault) -> Result<Sample> {
        let before = rank_processes(std::process::id());
        // Not by rank: a survivor and a newcomer may have been started as the same one.
        let pids: Vec<Pid> = before.iter().map(|(_, pid)| *pid).collect();
        let Some(pid) = before.get(victim % before.len().max(1)).map(|(_, pid)| *pid) else {
            return Err(CliError::internal("the job has no rank processes"));
        };
        let generation = self.status.as_ref().map(|s| s.generation).unwrap_or_default();
        let reported = self.step.as_ref().map_or(0, |metrics| metrics.step.0);
        let signal = match fault {
            BenchFault::Kill => Signal::SIGKILL,
            BenchFault::Stop => Signal::SIGSTOP,
        };
        let struck = Instant::now();
        kill(pid, signal).map_err(|e| CliError::internal(format!("cannot signal {pid}: {e}")))?;
        let mut reported = reported;
        let mut decided = None;
        let mut is_running = false;
        loop {
            match self.next().await? {
                JobEvent::Status(status) if status.generation > generation => {
                    decided.get_or_insert_with(|| struck.elapsed().as_secs_f64());
                    is_running = status.phase == Phase::Running;
                }
                // Finished before the fault, or although a rank was gone already.
                JobEvent::Step(metrics) if !is_running => reported = metrics.step.0,
                JobEvent::Step(metrics) => {
                    let stall = struck.elapsed().as_secs_f64() - metrics.time.total;
                    let after = rank_processes(std::process::id());
                    let stayed = |pid: &Pid| after.iter().any(|(_, other)| other == pid);
                    return Ok(Sample {
                        decided: decided.unwrap_or_default(),
                        stall,
                        redone_step: metrics.time.total,
                        steps_lost: (reported + 1).saturating_sub(metrics.step.0),
                        survivors: pids.iter().filter(|pid| stayed(pid)).count(),
                    });
                }
                _ => {}
            }
        }
    }
}

fn summarise(fault: BenchFault, ranks: u32, samples: Vec<Sample>) -> RecoveryReport {
    let sorted = |of: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (stalls, decided) = (sorted(|s| s.stall), sorted(|s| s.decided));
    let redone = sorted(|s| s.redone_step);
    let expected = ranks as usize - 1;
    RecoveryReport {
        fault: match fault {
            BenchFault::Kill => "kill",
            BenchFault::Stop => "stop",
        },
        ranks,
        faults: samples.len(),
        stall_median: stalls[stalls.len() / 2],
        stall_min: stalls[0],
        stall_max: stalls[stalls.len() - 1],
        decided_median: decided[decided.len() / 2],
        decided_max: decided[decided.len() - 1],
        redone_step_median: redone[redone.len() / 2],
        steps_lost_max: samples.iter().map(|s| s.steps_lost).max().unwrap_or(0),
        survivors_lost: samples.iter().map(|s| expected.saturating_sub(s.survivors)).sum(),
        samples,
    }
}

fn print(global: &Global, report: &RecoveryReport) {
    if global.json {
        return output::json(report);
    }
    let milliseconds = |seconds: f64| format!("{:.0} ms", seconds * 1e3);
    let rows = vec![vec![
        report.fault.to_owned(),
        report.ranks.to_string(),
        report.faults.to_string(),
        milliseconds(report.stall_median),
        format!("{}–{}", milliseconds(report.stall_min), milliseconds(report.stall_max)),
        milliseconds(report.decided_median),
        milliseconds(report.redone_step_median),
        report.steps_lost_max.to_string(),
        report.survivors_lost.to_string(),
    ]];
    let header = [
        "fault",
        "ranks",
        "times",
        "stall",
        "range",
        "decided after",
        "redone step",
        "steps lost",
        "survivors lost",
    ];
    output::table(&header, rows, "nothing measured");
}
