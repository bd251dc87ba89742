//! A job as its events show it to a benchmark.

use std::time::{Duration, Instant};

use api::events::{JobEvent, StepMetrics};
use api::records::{JobStatus, Phase};
use coordinator::EventStream;
use tokio_stream::StreamExt;

use crate::error::{CliError, Result};

/// What takes longer has failed.
const GUARD: Duration = Duration::from_secs(120);
/// Steps of a generation before it is disturbed.
const STEPS_BETWEEN: u64 = 3;

/// A job's newest status and step.
pub struct View {
    events: EventStream,
    /// What the leader last said of the job.
    pub status: Option<JobStatus>,
    /// The last step that was finished, and when word of it came.
    pub step: Option<(StepMetrics, Instant)>,
}

/// The first step of a new generation, beside the last one before it.
pub struct Resumed {
    /// When the leader had recorded the generation.
    pub decided: Option<Instant>,
    /// The last step that was reported before.
    pub before: (StepMetrics, Instant),
    /// The first one after.
    pub after: (StepMetrics, Instant),
}

impl Resumed {
    /// When the first microbatch of the new generation began.
    pub fn begun(&self) -> Instant {
        let (metrics, told) = &self.after;
        told.checked_sub(Duration::from_secs_f64(metrics.time.total)).unwrap_or(*told)
    }

    /// Whole steps that were reported before and had to be computed again.
    pub fn steps_lost(&self) -> u64 {
        (self.before.0.step.0 + 1).saturating_sub(self.after.0.step.0)
    }
}

impl View {
    /// A view of what `events` tell.
    pub fn new(events: EventStream) -> Self {
        Self { events, status: None, step: None }
    }

    /// The generation that runs or is being made.
    pub fn generation(&self) -> api::Generation {
        self.status.as_ref().map(|status| status.generation).unwrap_or_default()
    }

    /// The next event; an error when the job ends or nothing happens for long.
    pub async fn next(&mut self) -> Result<JobEvent> {
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
            JobEvent::Step(metrics) => self.step = Some((metrics.clone(), Instant::now())),
            _ => {}
        }
        Ok(event)
    }

    /// Returns when a generation of so many ranks has run for some steps.
    pub async fn steady(&mut self, ranks: u32) -> Result<()> {
        let (mut steps, mut generation) = (0, self.generation());
        while steps < STEPS_BETWEEN {
            let is_whole =
                |s: &JobStatus| s.phase == Phase::Running && s.gang.len() == ranks as usize;
            let is_running = self.status.as_ref().is_some_and(is_whole);
            match self.next().await? {
                JobEvent::Step(_) if is_running => steps += 1,
                // A record is also written to say where the time went.
                JobEvent::Status(status) if status.generation != generation => {
                    (steps, generation) = (0, status.generation);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits for the first step of a generation after `generation`. The job must have made a step.
    pub async fn resumed(&mut self, generation: api::Generation) -> Result<Resumed> {
        let none = || CliError::internal("the job has made no step yet");
        let mut before = self.step.clone().ok_or_else(none)?;
        let mut decided = None;
        let mut is_running = false;
        loop {
            match self.next().await? {
                JobEvent::Status(status) if status.generation > generation => {
                    decided.get_or_insert_with(Instant::now);
                    is_running = status.phase == Phase::Running;
                }
                JobEvent::Step(_) => {
                    let step = self.step.clone().ok_or_else(none)?;
                    if is_running {
                        return Ok(Resumed { decided, before, after: step });
                    }
                    // Finished before the change, or although a rank was gone already.
                    before = step;
                }
                _ => {}
            }
        }
    }
}
