//! Why a rank cannot go on.

use api::{Rank, Step};

use crate::divergence::Origin;

/// Why a rank cannot go on, and whether starting again can help.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The job as asked cannot run: its data, its settings, its device. Trying again ends the same.
    #[error("{0}")]
    Job(String),
    /// What the worker's cluster.toml names cannot be used for the connections among ranks.
    #[error(transparent)]
    DataPlane(#[from] crate::data_plane::DataPlaneError),
    /// The loss or the gradient is no longer a number.
    #[error(
        "the {what} is {value} at step {step}{}: training diverged{origin}; lower \
         `learning_rate`, set `clip_norm`, or look at the data",
        after(*skipped)
    )]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// What is no number: "loss" or "gradient's norm".
        what: &'static str,
        /// NaN or infinite.
        value: f64,
        /// Where it came from.
        origin: Box<Origin>,
        /// Steps in a row before it that were skipped for the same reason.
        skipped: u32,
    },
    /// A pass over the data did not see every sample exactly once.
    #[error("the sample ledger does not add up: {0}")]
    SampleLedger(String),
    /// A peer died, left, or disagreed.
    #[error(transparent)]
    Collective(#[from] collective::CollectiveError),
    /// A checkpoint or the model could not be written.
    #[error(transparent)]
    Save(checkpoint::SaveError),
    /// The state could not be restored.
    #[error("{error}")]
    Restore {
        /// Whose state.
        step: Step,
        /// What went wrong.
        error: Box<checkpoint::RestoreError>,
    },
    /// The control socket to the worker broke.
    #[error(transparent)]
    Control(#[from] api::control::ControlError),
}

fn after(skipped: u32) -> String {
    if skipped == 0 { String::new() } else { format!(", after {skipped} skipped ones in a row") }
}

impl TrainError {
    /// The state of `step` could not be restored.
    pub fn restore(step: Step, error: checkpoint::RestoreError) -> Self {
        Self::Restore { step, error: Box::new(error) }
    }

    /// Whether starting again can help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Job(_) | Self::DataPlane(_) | Self::Diverged { .. } | Self::SampleLedger(_) => {
                false
            }
            Self::Save(checkpoint::SaveError::Store(error)) => !error.is_key_mistake(),
            Self::Collective(_) | Self::Save(_) | Self::Control(_) => true,
            Self::Restore { error, .. } => error.is_retryable(),
        }
    }

    /// The checkpoint that cannot be restored any more, when that is what is wrong.
    pub fn damaged(&self) -> Option<Step> {
        match self {
            Self::Restore { step, error } => error.is_damage().then_some(*step),
            _ => None,
        }
    }

    /// The peer that is to blame, when it is not this rank's own fault.
    pub fn blames(&self) -> Option<Rank> {
        match self {
            Self::Collective(error) => error.peer(),
            // Every rank finds the same; whose microbatch it was is the cause.
            Self::Diverged { origin, .. } => origin.first.map(|(rank, _)| rank),
            _ => None,
        }
    }
}

impl From<checkpoint::SaveError> for TrainError {
    fn from(error: checkpoint::SaveError) -> Self {
        match error {
            // It waits no longer because its group is broken off: that is what happened.
            checkpoint::SaveError::Abandoned => {
                let reason = "the wait for the store was abandoned: its group is broken off".into();
                Self::Collective(collective::CollectiveError::Aborted { reason })
            }
            error => Self::Save(error),
        }
    }
}

impl From<algorithms::AlgorithmError> for TrainError {
    fn from(error: algorithms::AlgorithmError) -> Self {
        Self::Job(error.to_string())
    }
}

impl From<algorithms::DataError> for TrainError {
    fn from(error: algorithms::DataError) -> Self {
        Self::Job(error.to_string())
    }
}
