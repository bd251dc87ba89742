//! What can be trained and served, one file or folder each.
//!
//! An algorithm is a schema, a way to read data, a model as a list of blocks, and a predictor. It
//! knows nothing of ranks, steps or checkpoints: the trainer does.

#![forbid(unsafe_code)]

mod algorithm;
mod block;
pub mod data;
mod dataset;
mod error;
mod image;
mod init;
mod loss;
mod ops;
mod random;
mod registry;
mod schema;
mod tensor;
#[cfg(test)]
mod testing;
mod transformer;
mod weights;

pub use algorithm::{
    Algorithm, GenerateInput, ImageInput, LocalChannels, ModelDescriptor, Predictor, Problem,
    Request, RequestError, Response,
};
pub use block::{Block, BlockInput, Init, LossOutput, Mode, Model, ParamSpec, StepKey, Targets};
pub use dataset::{Dataset, Microbatch};
pub use error::{AlgorithmError, DataError};
pub use init::initial_values;
pub use registry::{algorithm, algorithms, model_params};
pub use schema::optimizer_hyperparameters;
pub use tensor::{tensor_from_slice, tensor_into_vec, with_slice};
pub use transformer::TextTokenizer;
