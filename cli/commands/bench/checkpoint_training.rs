//! What checkpoints cost the steps of a job: the same job with and without them, by turns.

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

/// One round. Times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingSample {
    /// Mean time from step to step without checkpoints.
    pub step_plain: f64,
    /// The same with them.
    pub step_saved: f64,
    /// How long each checkpoint held up the step loop.
    pub stalls: Vec<f64>,
    /// Bytes of one checkpoint, of all ranks.
    pub bytes: u64,
}

impl TrainingSample {
    /// How much slower the job is with checkpoints; 0.01 is one percent.
    pub fn slowdown(&self) -> f64 {
        self.step_saved / self.step_plain - 1.0
    }
}

/// What one run of the job told.
struct Run {
    steps: Vec<(StepMetrics, Instant)>,
    bytes: u64,
}

impl Run {
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
        let sample = TrainingSample {
            step_plain: plain.mean()?,
            step_saved: saved.mean()?,
            stalls: due.map(|(metrics, _)| metrics.time.checkpoint).collect(),
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
