//! The transformer's schema, and a job's hyperparameters as sizes.

use api::JobSpec;
use api::schema::AlgorithmSchema;
use serde::{Deserialize, Serialize};

use crate::algorithm::ModelDescriptor;
use crate::error::AlgorithmError;
use crate::schema::{
    Settings, channels, classification_metrics, float, integer, optimizer_hyperparameters, text,
    validation_fraction,
};
use crate::transformer::architecture::Architecture;
use crate::transformer::tokenizer::TextTokenizer;

/// The value of `algorithm` in job.toml.
pub(super) const NAME: &str = "transformer";
/// Format of [`Parameters`].
const VERSION: u32 = 1;
/// Largest vocabulary: above every published tokenizer, and its table still fits a laptop.
const VOCABULARY_MAX: i64 = 1 << 20;

/// The schema.
pub(super) fn schema() -> AlgorithmSchema {
    let mut hyperparameters = vec![
        integer("layers", 4, (1, Architecture::LAYERS_MAX as i64), "Transformer layers."),
        integer("width", 128, (1, 65_536), "Features per position; a multiple of heads."),
        integer("heads", 4, (1, 1024), "Attention heads per layer."),
        integer("sequence_length", 128, (2, 1 << 20), "Tokens of context."),
        float("dropout", 0.0, (0.0, 0.9), false, "Share of activations dropped in training."),
        integer(
            "vocabulary",
            0,
            (0, VOCABULARY_MAX),
            "Different tokens; 0: 256 for bytes, else the tokenizer's number.",
        ),
        text("tokenizer", "", "Path of a tokenizer.json; empty: every byte is a token."),
        validation_fraction(),
    ];
    hyperparameters.extend(optimizer_hyperparameters());
    AlgorithmSchema {
        name: NAME.into(),
        description: "A decoder-only language model (GPT-2's architecture), byte-level or with a \
                      tokenizer.json."
            .into(),
        hyperparameters,
        channels: channels(
            &["application/x-cohort-tokens", "text/plain"],
            "A pack made by `cluster data pack`, or text files.",
        ),
        metrics: classification_metrics("token"),
        request_types: vec![
            "application/json".into(),
            "application/jsonlines".into(),
            "text/csv".into(),
        ],
    }
}

/// What `model.json` holds under `parameters`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    pub(super) architecture: Architecture,
    /// The text of the tokenizer.json; absent: bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tokenizer: Option<String>,
}

/// A job's hyperparameters, checked against each other.
pub(super) struct Setup {
    pub(super) architecture: Architecture,
    pub(super) dropout: f32,
    pub(super) validation_fraction: f32,
    tokenizer: TextTokenizer,
}

impl Setup {
    /// What turns text into the job's tokens.
    pub(super) fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    pub(super) fn read(spec: &JobSpec) -> Result<Self, AlgorithmError> {
        let settings = Settings(&spec.hyperparameters);
        let path = settings.text("tokenizer")?;
        let tokenizer = if path.is_empty() {
            TextTokenizer::bytes()
        } else {
            TextTokenizer::open(path.as_ref())?
        };
        let least = tokenizer.vocabulary();
        let vocabulary = match settings.size("vocabulary")? {
            0 => least,
            given if given >= least => given,
            given => {
                let origin = if path.is_empty() { "bytes" } else { &path };
                return Err(AlgorithmError::Hyperparameters(format!(
                    "vocabulary = {given} is less than the {least} tokens of `{origin}`: leave it 0"
                )));
            }
        };
        let architecture = Architecture {
            layers: settings.size("layers")?,
            width: settings.size("width")?,
            heads: settings.size("heads")?,
            sequence_length: settings.size("sequence_length")?,
            vocabulary,
        };
        Ok(Self {
            architecture: architecture.checked().map_err(AlgorithmError::Hyperparameters)?,
            dropout: settings.number("dropout")?,
            validation_fraction: settings.number("validation_fraction")?,
            tokenizer,
        })
    }

    pub(super) fn descriptor(&self) -> ModelDescriptor {
        let parameters = Parameters {
            architecture: self.architecture,
            tokenizer: self.tokenizer.json().map(str::to_owned),
        };
        ModelDescriptor {
            algorithm: NAME.into(),
            version: VERSION,
            parameters: serde_json::to_value(parameters).expect("plain numbers and text"),
        }
    }
}

impl Parameters {
    /// Reads and checks `model.json`.
    pub(super) fn read(
        descriptor: &ModelDescriptor,
    ) -> Result<(Self, TextTokenizer), AlgorithmError> {
        let refuse = |message: String| AlgorithmError::Model { path: "model.json".into(), message };
        if (descriptor.algorithm.as_str(), descriptor.version) != (NAME, VERSION) {
            return Err(refuse(format!(
                "describes `{}` version {}, expected `{NAME}` version {VERSION}",
                descriptor.algorithm, descriptor.version
            )));
        }
        let parameters: Self = serde_json::from_value(descriptor.parameters.clone())
            .map_err(|error| refuse(error.to_string()))?;
        parameters.architecture.checked().map_err(refuse)?;
        let tokenizer = match &parameters.tokenizer {
            None => TextTokenizer::bytes(),
            Some(json) => TextTokenizer::from_json(json).map_err(refuse)?,
        };
        let (least, given) = (tokenizer.vocabulary(), parameters.architecture.vocabulary);
        if given < least {
            return Err(refuse(format!("vocabulary {given} is less than the tokenizer's {least}")));
        }
        Ok((parameters, tokenizer))
    }
}
