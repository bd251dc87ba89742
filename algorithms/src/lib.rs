//! What can be trained and served, one file or folder each.
//!
//! An algorithm is a schema, a way to read data, a model as a list of blocks, and a predictor. It
//! knows nothing of ranks, steps or checkpoints: the trainer does.

#![forbid(unsafe_code)]

mod algorithm;
mod block;
mod dataset;
mod error;

pub use algorithm::{
    Algorithm, GenerateInput, ImageInput, LocalChannels, ModelDescriptor, Predictor, Problem,
    Request, RequestError, Response,
};
pub use block::{Block, BlockInput, Init, LossOutput, Mode, Model, ParamSpec, StepKey, Targets};
pub use dataset::{Dataset, Microbatch};
pub use error::{AlgorithmError, DataError};
