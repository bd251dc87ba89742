//! What a running job reports: facts about steps, checkpoints and the finished model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Rank, Step};
use crate::records::JobStatus;
use crate::samples::SampleTally;

/// Where one step's wall time went, in seconds. Data, compute, communication and checkpoint add up to
/// `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// The whole step.
    pub total: f64,
    /// Fetching and preparing samples.
    pub data: f64,
    /// Forward, backward and optimiser.
    pub compute: f64,
    /// Waiting for and exchanging with other ranks, as far as nothing was computed meanwhile.
    pub communication: f64,
    /// What ranks waited so in the mean, in the step before; absent in a generation's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub communication_mean: Option<f64>,
    /// How long gradients were exchanged in all, behind the backward pass too.
    #[serde(default)]
    pub communication_total: f64,
    /// What the step loop paid for checkpoints.
    pub checkpoint: f64,
}

/// One finished optimiser step, as rank 0 saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step just finished, counted from 1: `n` means n steps have been applied.
    pub step: Step,
    /// The step the job ends at.
    pub last_step: Step,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean training loss over the global batch, in nats.
    pub loss: f64,
    /// Learning rate applied.
    pub learning_rate: f64,
    /// Norm of the averaged gradient before clipping.
    pub gradient_norm: f64,
    /// Samples per second of this step, over all ranks.
    pub samples_per_second: f64,
    /// Tokens per second of this step, over all ranks; 0 where samples have no tokens.
    pub tokens_per_second: f64,
    /// Where the time went.
    pub time: StepTime,
    /// Resident memory of rank 0, in bytes.
    pub memory_bytes: u64,
    /// Who computed the slowest in the step before; absent with one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowest: Option<Slowest>,
}

/// The rank whose microbatches took longest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slowest {
    /// Which one.
    pub rank: Rank,
    /// Its time per microbatch over the median of all ranks'.
    pub ratio: f64,
}

/// Validation at one step: metric name → value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps applied when it ran.
    pub step: Step,
    /// `validation:loss` and whatever else the algorithm's schema lists.
    pub metrics: BTreeMap<String, f64>,
}

/// A complete checkpoint: its manifest lies in the store.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointFact {
    /// Steps applied in it.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The manifest's key in the cluster's store.
    pub manifest_key: String,
    /// BLAKE3 of the manifest's bytes, hex.
    pub manifest_digest: String,
    /// Bytes of the shards that were written for it.
    pub bytes: u64,
    /// Metrics at its step, by which the best are kept.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// The finished model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFact {
    /// Key of the folder with `model.safetensors` and `model.json` in the cluster's store.
    pub key: String,
    /// SHA-256 of `model.safetensors`, hex.
    pub sha256: String,
    /// Size of `model.safetensors`.
    pub bytes: u64,
    /// Steps applied.
    pub step: Step,
    /// The last evaluation and training loss.
    pub metrics: BTreeMap<String, f64>,
    /// Which samples it was trained on, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleTally>,
}

/// What followers of a job see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum JobEvent {
    /// The job's record changed.
    Status(Box<JobStatus>),
    /// A step finished.
    Step(StepMetrics),
    /// A validation finished.
    Evaluation(Evaluation),
    /// A checkpoint was committed.
    Checkpoint(CheckpointFact),
    /// Something people should know, such as a lost rank with its cause.
    Note {
        /// Generation it happened in.
        generation: Generation,
        /// The rank it concerns, if one.
        rank: Option<Rank>,
        /// One sentence.
        text: String,
    },
}
