//! What checkpoints cost the steps of a job: the same job with and without them, by turns.

use std::collections::BTreeMap;
use std::time::Instant;

use api::events::{JobEvent, StepMetrics};
use api::{JobSpec, Name};
use checkpoint::Store;
use coordinator::ClusterClient;
use serde::Serialize;
use tokio_stream::StreamExt;

use crate::error::{CliError, Result};
use crate::follow::outcome;

/// Steps before measuring.
const WARMUP: u64 = 3;
/// Steps that a checkpoint may slow down, the one that it ends included.
const BEHIND: u64 = 3;

/// One round. Times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingSample {
    /// Mean time from step to step without checkpoints.
    pub step_plain: f64,
    /// The same with them.
    pub step_saved: f64,
    /// How long each checkpoint held up the step loop.
    pub stalls: Vec<f64>,
    /// What each cost: the step that it ended and the next two, over the median of the others of its run,
    /// three times. A run's mean drifts with whatever else the machine does; this does not.
    pub lost: Vec<f64>,
    /// That median.
    pub step_between: f64,
    /// Bytes of one checkpoint, of all ranks.
    pub bytes: u64,
}

impl TrainingSample {
    /// How much slower the job was with checkpoints than without; 0.01 is one percent.
    pub fn slowdown(&self) -> f64 {
        self.step_saved / self.step_plain - 1.0
    }

    /// The part of the time that checkpoints took of a run, one every so many steps.
    pub fn taken(&self, every: u64) -> impl Iterator<Item = f64> {
        self.lost.iter().map(move |lost| lost / (self.step_between * every as f64))
    }
}

/// What one run of the job told.
struct Run {
    steps: Vec<(StepMetrics, Instant)>,
    bytes: u64,
}

impl Run {
    /// Each step's number, and the time since the one before was told, in seconds.
    fn times(&self) -> Vec<(u64, f64)> {
        let time = |pair: &[(StepMetrics, Instant)]| {
            (pair[1].0.step.0, pair[1].1.duration_since(pair[0].1).as_secs_f64())
        };
        self.steps.windows(2).map(time).collect()
    }

    /// Mean time from step to step after the warm-up, in seconds.
    fn mean(&self) -> Result<f64> {
        let measured = self.steps.iter().filter(|(metrics, _)| metrics.step.0 >= WARMUP);
        let times: Vec<Instant> = measured.map(|(_, told)| *told).collect();
        match times.as_slice() {
            [first, .., last] => {
                Ok(last.duration_since(*first).as_secs_f64() / (times.len() - 1) as f64)
            }
            _ => Err(CliError::internal("no step was measured")),
        }
    }
}

/// A job's name; in a store that others use it is nobody else's.
fn job_name(round: usize, every: u64) -> Result<Name> {
    Ok(format!("bench-{}-{round}-every-{every}", std::process::id()).parse()?)
}

/// Removes what the jobs of `rounds` rounds wrote to a store that is not gone with their cluster.
pub async fn clean(store: &Store, every: u64, rounds: usize) -> Result<()> {
    for (round, every) in (1..=rounds).flat_map(|round| [(round, 0), (round, every)]) {
        for object in store.list(&format!("jobs/{}", job_name(round, every)?)).await? {
            store.delete(&object.key).await?;
        }
    }
    Ok(())
}

/// What checkpoints cost a run, each, and the median time of its other steps; `times` are of each step.
fn lost(times: &[(u64, f64)], every: u64) -> (Vec<f64>, f64) {
    let measured = times.iter().copied().filter(|(step, _)| *step > WARMUP);
    let (behind, mut others): (Vec<_>, Vec<_>) =
        measured.partition(|(step, _)| *step >= every && step % every < BEHIND);
    others.sort_by(|a, b| a.1.total_cmp(&b.1));
    let between = others.get(others.len() / 2).map_or(f64::NAN, |(_, time)| *time);
    let mut by_checkpoint: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (step, time) in behind {
        by_checkpoint.entry(step / every).or_default().push(time);
    }
    let whole = by_checkpoint.into_values().filter(|times| times.len() as u64 == BEHIND);
    let lost = whole.map(|times| times.iter().sum::<f64>() - BEHIND as f64 * between);
    (lost.collect(), between)
}

/// Runs the job `rounds` times each way.
pub async fn measure(
    client: &ClusterClient,
    spec: &JobSpec,
    steps: u64,
    every: u64,
    rounds: usize,
    mut tell: impl FnMut(usize, &TrainingSample),
) -> Result<Vec<TrainingSample>> {
    let mut samples = Vec::new();
    for round in 1..=rounds {
        let mut plain = None;
        if round % 2 == 1 {
            plain = Some(run(client, spec, steps, 0, round).await?);
        }
        let saved = run(client, spec, steps, every, round).await?;
        let plain = match plain {
            Some(plain) => plain,
            None => run(client, spec, steps, 0, round).await?,
        };
        let is_due = |metrics: &StepMetrics| {
            metrics.step.0.is_multiple_of(every) && metrics.step != metrics.last_step
        };
        let due = saved.steps.iter().filter(|(metrics, _)| is_due(metrics));
        let (lost, step_between) = lost(&saved.times(), every);
        let sample = TrainingSample {
            step_plain: plain.mean()?,
            step_saved: saved.mean()?,
            stalls: due.map(|(metrics, _)| metrics.time.checkpoint).collect(),
            lost,
            step_between,
            bytes: saved.bytes,
        };
        tell(round, &sample);
        samples.push(sample);
    }
    Ok(samples)
}

async fn run(
    client: &ClusterClient,
    spec: &JobSpec,
    steps: u64,
    every: u64,
    round: usize,
) -> Result<Run> {
    let mut spec = spec.clone();
    spec.name = job_name(round, every)?;
    spec.stop.max_steps = Some(WARMUP + steps);
    spec.checkpoint.every_steps = every;
    client.submit(&spec).await?;
    let mut events = client.watch(&spec.name).await?;
    let mut run = Run { steps: Vec::new(), bytes: 0 };
    while let Some(event) = events.next().await {
        match event? {
            JobEvent::Step(metrics) => run.steps.push((metrics, Instant::now())),
            JobEvent::Checkpoint(fact) => run.bytes = fact.bytes,
            JobEvent::Status(status) if status.phase.is_terminal() => {
                outcome(&spec.name, &status)?;
                break;
            }
            _ => {}
        }
    }
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_checkpoint_costs_is_told_from_what_all_steps_take() {
        // Steps of 2 s; those of 10 and 11 take more; the second checkpoint's last step is missing.
        let time = |step| match step {
            10 => 2.25,
            11 => 2.5,
            _ => 2.0,
        };
        let times: Vec<(u64, f64)> = (2..=21).map(|step| (step, time(step))).collect();
        assert_eq!(lost(&times, 10), (vec![0.75], 2.0));
        let (each, between) = lost(&times, 2);
        assert!(each.is_empty() && between.is_nan(), "no step is undisturbed");
    }
}
