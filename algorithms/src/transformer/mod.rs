//! `transformer`: a decoder-only language model in the manner of GPT-2 (Radford et al. 2019),
//! trained on bytes or on the tokens of a `tokenizer.json`.

mod architecture;
mod blocks;
mod decoder;
mod predictor;
mod sampling;
mod settings;
mod tokenizer;

#[cfg(test)]
mod tests;

use std::path::Path;

use api::JobSpec;
use api::schema::AlgorithmSchema;
use burn::tensor::Device;

use crate::algorithm::{Algorithm, LocalChannels, ModelDescriptor, Predictor, Problem};
use crate::data::{TokenDataset, open_tokens};
use crate::dataset::Dataset;
use crate::error::{AlgorithmError, DataError};
use architecture::Architecture;
use predictor::TextPredictor;
use settings::{NAME, Setup};

pub use tokenizer::TextTokenizer;

/// The algorithm `transformer`.
pub(crate) struct Transformer;

impl Algorithm for Transformer {
    fn schema(&self) -> AlgorithmSchema {
        settings::schema()
    }

    fn open(&self, spec: &JobSpec, channels: &LocalChannels) -> Result<Problem, AlgorithmError> {
        let setup = Setup::read(spec)?;
        let Architecture { sequence_length, vocabulary, .. } = setup.architecture;
        let path = |channel: &str| {
            channels.get(channel).ok_or_else(|| {
                DataError::Mismatch(format!("channel `{channel}` is missing: add it to the job"))
            })
        };
        let open = |channel: &str, path: &Path| {
            let data = open_tokens(channel, path, sequence_length, vocabulary)?;
            check_tokenizer(channel, &data, setup.tokenizer())?;
            Ok::<_, DataError>(data)
        };
        let train = open("train", path("train")?)?;
        let (train, validation) = match channels.get("validation") {
            Some(path) => (train, Some(open("validation", path)?)),
            None if setup.validation_fraction > 0.0 => {
                TokenDataset::split(train, setup.validation_fraction)
            }
            None => (train, None),
        };
        Ok(Problem {
            model: setup.architecture.model(setup.dropout),
            train: Box::new(train),
            validation: validation.map(|data| Box::new(data) as Box<dyn Dataset>),
            descriptor: setup.descriptor(),
        })
    }

    fn predictor(
        &self,
        descriptor: &ModelDescriptor,
        weights: &[u8],
        device: &Device,
    ) -> Result<Box<dyn Predictor>, AlgorithmError> {
        debug_assert_eq!(descriptor.algorithm, NAME);
        Ok(Box::new(TextPredictor::load(descriptor, weights, device)?))
    }
}

/// Refuses a pack whose tokens come from another tokenizer than the job's: the numbers would fit and
/// mean something else.
fn check_tokenizer(
    channel: &str,
    data: &TokenDataset,
    expected: &TextTokenizer,
) -> Result<(), DataError> {
    let found = data.tokenizer();
    if found == expected.json().map(str::as_bytes) {
        return Ok(());
    }
    let name = |json: Option<&[u8]>| match json {
        Some(json) => format!("tokenizer.json {}", &blake3::hash(json).to_hex()[..12]),
        None => "bytes".to_owned(),
    };
    Err(DataError::Mismatch(format!(
        "channel `{channel}`: its tokens are {}, the job's are {}: set hyperparameters.tokenizer to \
         the file the pack was made with, or pack the text again with it",
        name(found),
        name(expected.json().map(str::as_bytes))
    )))
}
