//! What a process keeps from one generation of its gang to the next.

use std::collections::BTreeMap;

use algorithms::Problem;
use api::samples::SampleTally;
use api::{JobSpec, Step};
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::optimizer::Optimizer;
use crate::parameters::Table;
use crate::state::TrainState;

/// What a process keeps from generation to generation.
pub struct Held {
    /// The job.
    pub spec: JobSpec,
    /// Model and data.
    pub problem: Problem,
    /// Parameters' places.
    pub table: Table,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Where tensors live.
    pub device: Device,
    /// The step at which the job ends.
    pub last_step: u64,
    /// The job's state; none before the first generation.
    pub state: Option<TrainState>,
    /// What goes with it.
    pub progress: Progress,
}

/// What a job's state does not say of how it came about; the same on every rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The last value of each metric.
    #[serde(with = "by_bits")]
    pub metrics: BTreeMap<String, f64>,
    /// Steps in a row that changed nothing.
    pub skipped: u32,
    /// The last step at which validation ran.
    pub evaluated: Option<Step>,
    /// Which samples the state was trained on.
    #[serde(default)]
    pub samples: SampleTally,
}

/// Metrics on the wire: JSON has neither NaN nor infinity, and a loss may be either.
mod by_bits {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(
        metrics: &BTreeMap<String, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(metrics.iter().map(|(name, value)| (name, value.to_bits())))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let bits: BTreeMap<String, u64> = BTreeMap::deserialize(deserializer)?;
        Ok(bits.into_iter().map(|(name, value)| (name, f64::from_bits(value))).collect())
    }
}

impl Held {
    /// Steps applied; 0 without a state.
    pub fn step(&self) -> Step {
        self.state.as_ref().map(|state| state.step).unwrap_or_default()
    }

    /// Bytes of a state.
    pub fn state_bytes(&self) -> u64 {
        let values = self.table.len as u64 * (1 + self.optimizer.moments() as u64);
        values * size_of::<f32>() as u64
    }

    /// Whether a checkpoint is due of this step.
    pub fn checkpoint_is_due(&self, step: Step) -> bool {
        let every = self.spec.checkpoint.every_steps;
        every > 0 && step.0.is_multiple_of(every) && step.0 != self.last_step
    }

    /// Whether validation is due before the last step, which has one in any case.
    pub fn evaluation_is_due(&self, step: Step, progress: &Progress) -> bool {
        let every = self.spec.evaluate.every_steps;
        let is_due = every > 0 && step.0.is_multiple_of(every) && step.0 < self.last_step;
        is_due && progress.evaluated != Some(step)
    }

    /// A state of the right shape, to be filled.
    pub fn blank_state(&self) -> TrainState {
        TrainState {
            step: Step(0),
            values: vec![0.0; self.table.len],
            optimizer: self.optimizer.initial_state(self.table.len),
        }
    }
}

/// The step at which a job ends.
pub fn last_step(spec: &JobSpec, samples: u64) -> u64 {
    let by_epochs = spec.stop.max_epochs.map(|epochs| {
        (epochs.saturating_mul(samples)).div_ceil(u64::from(spec.batch.global.get()))
    });
    [spec.stop.max_steps, by_epochs].into_iter().flatten().min().unwrap_or(0)
}
