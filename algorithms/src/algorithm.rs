//! The seam between algorithms and the rest: what trains and what serves.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use api::JobSpec;
use api::schema::AlgorithmSchema;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::block::Model;
use crate::dataset::Dataset;
use crate::error::AlgorithmError;

/// A job's channels as local paths: the trainer has fetched remote ones.
pub type LocalChannels = BTreeMap<String, PathBuf>;

/// Something that can be trained and served.
pub trait Algorithm: Send + Sync {
    /// What may be set, what must be fed, what is reported.
    fn schema(&self) -> AlgorithmSchema;

    /// Reads the data and builds the model of a resolved job ([`JobSpec::resolve`]).
    fn open(&self, spec: &JobSpec, channels: &LocalChannels) -> Result<Problem, AlgorithmError>;

    /// Rebuilds a trained model for serving. `weights` are the bytes of `model.safetensors`.
    fn predictor(
        &self,
        descriptor: &ModelDescriptor,
        weights: &[u8],
        device: &Device,
    ) -> Result<Box<dyn Predictor>, AlgorithmError>;
}

/// A model with its data.
pub struct Problem {
    /// The model.
    pub model: Model,
    /// Training samples.
    pub train: Box<dyn Dataset>,
    /// Validation samples, if the job has any.
    pub validation: Option<Box<dyn Dataset>>,
    /// What serving needs to know besides the weights.
    pub descriptor: ModelDescriptor,
}

/// `model.json`: what serving needs besides the weights. Holds no job name, time, generation or
/// number of ranks, so that the same training gives the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelDescriptor {
    /// The algorithm's name.
    pub algorithm: String,
    /// Format of this file.
    pub version: u32,
    /// Everything the algorithm needs to rebuild the model: sizes, labels, tokenizer.
    pub parameters: serde_json::Value,
}

/// One request to a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// An image as numbers 0–255 or 0–1 in rows, or encoded.
    Image(ImageInput),
    /// A text to go on from.
    Generate(GenerateInput),
}

/// An image to classify.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageInput {
    /// Pixel values in row-major order (channel last), in the scale of the training data.
    Pixels(Vec<f32>),
    /// The bytes of a PNG or JPEG file.
    Encoded(Vec<u8>),
}

/// A text to go on from.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateInput {
    /// The prompt; not empty.
    pub prompt: String,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// 0: always the likeliest token.
    pub temperature: f32,
    /// Sample among this many likeliest tokens; absent: all.
    pub top_k: Option<u32>,
    /// The same seed and request give the same text.
    pub seed: u64,
}

/// What a model answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// The class of an image.
    Class {
        /// The likeliest label.
        label: String,
        /// Its probability.
        probability: f32,
        /// Probability of every label, in the model's order.
        probabilities: Vec<(String, f32)>,
    },
    /// A generated text.
    Text {
        /// What was generated, without the prompt.
        text: String,
        /// Tokens generated.
        tokens: u32,
        /// `length`, or `stopped` when the receiver left.
        finish_reason: String,
    },
}

/// A request that this model cannot answer: the caller's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RequestError(pub String);

/// A trained model that answers requests.
pub trait Predictor: Send {
    /// Answers requests together; one result per request, in order.
    fn predict(&mut self, requests: Vec<Request>) -> Vec<Result<Response, RequestError>>;

    /// Generates text piece by piece; stops early when `emit` breaks. Models without text answer an
    /// error.
    fn generate(
        &mut self,
        input: &GenerateInput,
        emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Response, RequestError>;

    /// Content types it accepts.
    fn request_types(&self) -> Vec<String>;

    /// Checks one request without computing, so that a bad one is refused before it queues.
    fn check(&self, request: &Request) -> Result<(), RequestError>;
}
