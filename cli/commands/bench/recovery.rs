//! `cluster bench recovery`: how long a job stands still when a rank dies, leaves or comes.
//!
//! Measured over and over in one run, on a cluster of this machine. Of a death: from the signal to the
//! start of the first microbatch after it, which is detection, the decision, meeting again, agreeing on
//! the state and, for a new process, starting and receiving it; the step that is redone is told apart.
//! Of a rank that leaves or joins: from the end of the last step before to the start of the first after.
//! The start of a step is when its report arrives less the time that it says it took.

use std::time::Instant;

use api::config::ClusterConfig;
use api::job::{Elastic, Ranks};
use api::{JobSpec, Name};
use chaos::Random;
use coordinator::ClusterClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::on_cluster::on_cluster;
use super::view::View;
use crate::args::{BenchFault, BenchRecovery, Global};
use crate::commands::submit::load_job;
use crate::error::{CliError, Result};
use crate::output;
use crate::processes::rank_processes;

/// The targets of `--check`, in seconds.
const MEDIAN_MAX: f64 = 1.0;
const WORST_MAX: f64 = 3.0;

/// One fault and what it cost.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    /// What happened.
    event: &'static str,
    /// Seconds until the coordinator had recorded the next generation.
    decided: f64,
    /// Seconds without a step.
    stall: f64,
    /// Seconds that the first step after it took.
    next_step: f64,
    /// Whole steps that were reported before and had to be computed again.
    steps_lost: u64,
    /// Processes that were there before and after.
    survivors: usize,
    /// How many should have been.
    survivors_expected: usize,
}

/// What `cluster bench recovery` measured of one kind of event. Times in seconds.
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
    let (workers, slots) = match fault {
        BenchFault::Kill | BenchFault::Stop => (1, ranks),
        BenchFault::Drain => {
            let min = std::num::NonZeroU32::new(ranks - 1);
            let max = std::num::NonZeroU32::new(ranks);
            if let (Some(min), Some(max)) = (min, max) {
                spec.resources.ranks = Ranks::Elastic(Elastic { min, max });
            }
            (ranks, 1)
        }
    };
    let samples = on_cluster(ClusterConfig::default(), workers, slots, async |client| {
        let mut bench = Bench::begin(client, &spec, ranks, seed).await?;
        let mut samples = Vec::new();
        for number in 1..=faults {
            let new = match fault {
                BenchFault::Kill => vec![bench.strike(Signal::SIGKILL).await?],
                BenchFault::Stop => vec![bench.strike(Signal::SIGSTOP).await?],
                BenchFault::Drain => bench.leave_and_join().await?,
            };
            if !global.json {
                for sample in &new {
                    let Sample { event, stall, .. } = sample;
                    eprintln!("{number} of {faults}: {event}: stall {:.0} ms", stall * 1e3);
                }
            }
            samples.extend(new);
        }
        Ok(samples)
    })
    .await?;
    let events: &[&'static str] = match fault {
        BenchFault::Kill => &["kill"],
        BenchFault::Stop => &["stop"],
        BenchFault::Drain => &["leave", "join"],
    };
    let of = |event: &&'static str| {
        let samples = samples.iter().filter(|sample| sample.event == *event).cloned().collect();
        summarise(event, ranks, samples)
    };
    let reports: Vec<RecoveryReport> = events.iter().map(of).collect();
    print(global, &reports);
    if check {
        reports.iter().try_for_each(|report| report.check(fault))?;
    }
    Ok(())
}

/// A job on a cluster, to be disturbed.
struct Bench {
    client: ClusterClient,
    view: View,
    random: Random,
    ranks: u32,
}

/// Process numbers of all ranks. Not by rank: a survivor and a newcomer may have been started as the
/// same one.
fn pids() -> Vec<Pid> {
    rank_processes(std::process::id()).into_iter().map(|(_, pid)| pid).collect()
}

fn count_of(these: &[Pid], in_those: &[Pid]) -> usize {
    these.iter().filter(|pid| in_those.contains(pid)).count()
}

impl Bench {
    async fn begin(client: ClusterClient, spec: &JobSpec, ranks: u32, seed: u64) -> Result<Self> {
        client.submit(spec).await?;
        let view = View::new(client.watch(&spec.name).await?);
        Ok(Self { client, view, random: Random::new(seed), ranks })
    }

    /// Sends a signal to a rank, and waits for the first step after it.
    async fn strike(&mut self, signal: Signal) -> Result<Sample> {
        self.view.steady(self.ranks).await?;
        let before = pids();
        let victim = self.random.below(before.len().max(1) as u64) as usize;
        let Some(&pid) = before.get(victim) else {
            return Err(CliError::internal("the job has no rank processes"));
        };
        let generation = self.view.generation();
        let struck = Instant::now();
        kill(pid, signal).map_err(|e| CliError::internal(format!("cannot signal {pid}: {e}")))?;
        let resumed = self.view.resumed(generation).await?;
        let since = |at: Instant| at.saturating_duration_since(struck).as_secs_f64();
        Ok(Sample {
            event: if signal == Signal::SIGKILL { "kill" } else { "stop" },
            decided: resumed.decided.map(since).unwrap_or_default(),
            stall: since(resumed.begun()),
            next_step: resumed.after.0.time.total,
            steps_lost: resumed.steps_lost(),
            survivors: count_of(&before, &pids()),
            survivors_expected: before.len() - 1,
        })
    }

    /// Drains a worker, waits until the others go on, takes it back, and waits until its new rank
    /// has joined.
    async fn leave_and_join(&mut self) -> Result<Vec<Sample>> {
        let victim = self.random.below(u64::from(self.ranks)) + 1;
        let worker: Name = format!("w{victim}").parse()?;
        self.view.steady(self.ranks).await?;
        let before = pids();
        let generation = self.view.generation();
        let asked = Instant::now();
        self.client.drain(&worker, None).await?;
        let leave = self.changed("leave", asked, generation, &before, before.len() - 1).await?;
        self.view.steady(self.ranks - 1).await?;
        let before = pids();
        let generation = self.view.generation();
        let asked = Instant::now();
        self.client.undrain(&worker).await?;
        let join = self.changed("join", asked, generation, &before, before.len()).await?;
        Ok(vec![leave, join])
    }

    async fn changed(
        &mut self,
        event: &'static str,
        asked: Instant,
        generation: api::Generation,
        before: &[Pid],
        survivors_expected: usize,
    ) -> Result<Sample> {
        let resumed = self.view.resumed(generation).await?;
        let since = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        Ok(Sample {
            event,
            decided: resumed.decided.map(|at| since(asked, at)).unwrap_or_default(),
            stall: since(resumed.before.1, resumed.begun()),
            next_step: resumed.after.0.time.total,
            steps_lost: resumed.steps_lost(),
            survivors: count_of(before, &pids()),
            survivors_expected,
        })
    }
}

fn summarise(fault: &'static str, ranks: u32, samples: Vec<Sample>) -> RecoveryReport {
    let sorted = |of: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (stalls, decided) = (sorted(|s| s.stall), sorted(|s| s.decided));
    let next = sorted(|s| s.next_step);
    let lost = |s: &Sample| s.survivors_expected.saturating_sub(s.survivors);
    RecoveryReport {
        fault,
        ranks,
        faults: samples.len(),
        stall_median: stalls[stalls.len() / 2],
        stall_min: stalls[0],
        stall_max: stalls[stalls.len() - 1],
        decided_median: decided[decided.len() / 2],
        decided_max: decided[decided.len() - 1],
        redone_step_median: next[next.len() / 2],
        steps_lost_max: samples.iter().map(|s| s.steps_lost).max().unwrap_or(0),
        survivors_lost: samples.iter().map(lost).sum(),
        samples,
    }
}

impl RecoveryReport {
    /// Compares with the targets: who leaves or joins on notice loses no step and stalls for the
    /// median's limit at worst.
    fn check(&self, fault: BenchFault) -> Result<()> {
        let (worst_max, lost_max) = match fault {
            BenchFault::Kill => (WORST_MAX, 1),
            // Its median holds the time after which a process counts as stopped.
            BenchFault::Stop => (WORST_MAX, 1),
            BenchFault::Drain => (MEDIAN_MAX, 0),
        };
        let median_max = if fault == BenchFault::Stop { WORST_MAX } else { MEDIAN_MAX };
        let found = format!(
            "{}: the stall is {:.2} s in the median and {:.2} s at worst, {} steps were lost at \
             once, {} survivors were replaced",
            self.fault, self.stall_median, self.stall_max, self.steps_lost_max, self.survivors_lost
        );
        let is_met = self.stall_median <= median_max
            && self.stall_max <= worst_max
            && self.steps_lost_max <= lost_max
            && self.survivors_lost == 0;
        if is_met {
            return Ok(());
        }
        Err(CliError::internal(format!(
            "{found}; expected at most {median_max} s and {worst_max} s, {lost_max} steps, and none"
        )))
    }
}

fn print(global: &Global, reports: &[RecoveryReport]) {
    if global.json {
        reports.iter().for_each(output::json);
        return;
    }
    let milliseconds = |seconds: f64| format!("{:.0} ms", seconds * 1e3);
    let row = |report: &RecoveryReport| {
        vec![
            report.fault.to_owned(),
            report.ranks.to_string(),
            report.faults.to_string(),
            milliseconds(report.stall_median),
            format!("{}–{}", milliseconds(report.stall_min), milliseconds(report.stall_max)),
            milliseconds(report.decided_median),
            milliseconds(report.redone_step_median),
            report.steps_lost_max.to_string(),
            report.survivors_lost.to_string(),
        ]
    };
    let header = [
        "fault",
        "ranks",
        "times",
        "stall",
        "range",
        "decided after",
        "next step",
        "steps lost",
        "survivors lost",
    ];
    output::table(&header, reports.iter().map(row).collect(), "nothing measured");
}
