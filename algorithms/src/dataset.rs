//! Where microbatches come from. Which samples one holds is decided by the trainer from (seed,
//! step, index); a data set only fetches and prepares them.

use burn::tensor::Device;

use crate::block::{BlockInput, StepKey, Targets};
use crate::error::DataError;

/// Samples prepared for one forward pass.
#[derive(Clone, Debug)]
pub struct Microbatch {
    /// Enters the first block.
    pub input: BlockInput,
    /// What the output is compared with.
    pub targets: Targets,
    /// Samples in it.
    pub samples: u64,
    /// Tokens in it; 0 where samples have none.
    pub tokens: u64,
}

/// A data set held or mapped in memory.
pub trait Dataset: Send + Sync {
    /// Number of samples; never 0.
    fn len(&self) -> u64;

    /// Whether it holds nothing; opening such a set is an error, so: no.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The samples at `indices` (each below `len()`), on `device`. With `augment`, training-time
    /// augmentation is applied, a pure function of the key and the position within `indices`.
    fn microbatch(
        &self,
        indices: &[u64],
        augment: Option<StepKey>,
        device: &Device,
    ) -> Result<Microbatch, DataError>;

    /// BLAKE3 over what was read (file names excluded, contents and order included), hex. Part of
    /// the job's identity: a resume on other data is refused.
    fn digest(&self) -> &str;
}
