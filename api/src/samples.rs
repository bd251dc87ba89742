//! The sample ledger: which samples a job's state was trained on.

use serde::{Deserialize, Serialize};

/// Samples of one pass over the data that the steps applied so far were computed from, counted and
/// hashed where they were fed to the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleTally {
    /// Passes over the data in which every sample came exactly once.
    pub epochs_verified: u64,
    /// The pass under way, from 0.
    pub epoch: u64,
    /// Samples of it so far.
    pub count: u64,
    /// The sum of their hashes.
    pub digest: u64,
    /// The pass began before anyone kept a ledger: it cannot be verified.
    #[serde(default)]
    pub is_partial: bool,
}
