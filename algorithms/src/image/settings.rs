//! The schema of image classification, a job's hyperparameters as sizes, and `model.json`.

use api::JobSpec;
use api::schema::AlgorithmSchema;
use serde::{Deserialize, Serialize};

use crate::algorithm::ModelDescriptor;
use crate::data::{AugmentOptions, IMAGE_CONTENT_TYPES, ImageGeometry};
use crate::error::AlgorithmError;
use crate::image::architecture::Network;
use crate::schema::{
    Settings, boolean, channels, classification_metrics, integer, optimizer_hyperparameters,
    validation_fraction,
};

/// The value of `algorithm` in job.toml.
const NAME: &str = "image-classification";
/// Format of [`Parameters`].
const VERSION: u32 = 1;
/// Most values of one image of a model read from a file (a 4096² colour image): bounds what a
/// damaged `model.json` can make a server allocate.
const FEATURES_MAX: usize = 3 << 24;

/// The schema.
pub(super) fn schema() -> AlgorithmSchema {
    let mut hyperparameters = vec![
        integer(
            "width",
            16,
            (1, Network::WIDTH_MAX as i64),
            "Channels of the first stage; doubles per stage.",
        ),
        integer(
            "stages",
            3,
            (1, Network::STAGES_MAX as i64),
            "Stages; every one but the first halves the image.",
        ),
        integer("blocks", 1, (1, Network::BLOCKS_MAX as i64), "Residual blocks per stage."),
        integer(
            "stem_stride",
            0,
            (0, Network::STEM_STRIDE_MAX as i64),
            "Step of the first convolution; 0: 2 for images of 16 pixels and more, else 1.",
        ),
        boolean("augment", false, "Whether training images are shifted (and flipped)."),
        integer("shift", 1, (0, 64), "augment: most pixels an image is shifted by, each way."),
        boolean("flip", false, "augment: whether images are mirrored left to right."),
        validation_fraction(),
    ];
    hyperparameters.extend(optimizer_hyperparameters());
    AlgorithmSchema {
        name: NAME.into(),
        description: "A small residual network that tells images apart.".into(),
        hyperparameters,
        channels: channels(
            &IMAGE_CONTENT_TYPES,
            "Labelled images: IDX files, a CSV of pixels, or a folder of PNG/JPEG per class.",
        ),
        metrics: classification_metrics("image"),
        request_types: [
            "application/json",
            "application/jsonlines",
            "text/csv",
            "image/png",
            "image/jpeg",
        ]
        .map(str::to_owned)
        .to_vec(),
    }
}

/// A job's hyperparameters.
pub(super) struct Setup {
    pub(super) network: Network,
    pub(super) augment: AugmentOptions,
    pub(super) validation_fraction: f32,
}

impl Setup {
    pub(super) fn read(spec: &JobSpec) -> Result<Self, AlgorithmError> {
        let settings = Settings(&spec.hyperparameters);
        let network = Network {
            width: settings.size("width")?,
            stages: settings.size("stages")?,
            blocks: settings.size("blocks")?,
            stem_stride: settings.size("stem_stride")?,
        };
        let shift = u32::try_from(settings.size("shift")?).unwrap_or(u32::MAX);
        let augment = if settings.flag("augment")? {
            AugmentOptions { shift, flip: settings.flag("flip")? }
        } else {
            AugmentOptions { shift: 0, flip: false }
        };
        Ok(Self {
            network: network.checked().map_err(AlgorithmError::Hyperparameters)?,
            augment,
            validation_fraction: settings.number("validation_fraction")?,
        })
    }
}

/// What `model.json` holds under `parameters`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    pub(super) network: Network,
    pub(super) geometry: ImageGeometry,
}

/// `model.json` of such a model.
pub(super) fn descriptor(network: Network, geometry: ImageGeometry) -> ModelDescriptor {
    let parameters = Parameters { network, geometry };
    ModelDescriptor {
        algorithm: NAME.into(),
        version: VERSION,
        parameters: serde_json::to_value(parameters).expect("plain numbers and text"),
    }
}

impl Parameters {
    /// Reads and checks `model.json`.
    pub(super) fn read(descriptor: &ModelDescriptor) -> Result<Self, AlgorithmError> {
        let refuse = |message: String| AlgorithmError::Model { path: "model.json".into(), message };
        if (descriptor.algorithm.as_str(), descriptor.version) != (NAME, VERSION) {
            return Err(refuse(format!(
                "describes `{}` version {}, expected `{NAME}` version {VERSION}",
                descriptor.algorithm, descriptor.version
            )));
        }
        let parameters: Self = serde_json::from_value(descriptor.parameters.clone())
            .map_err(|error| refuse(error.to_string()))?;
        parameters.network.checked().map_err(refuse)?;
        let ImageGeometry { height, width, channels, labels, mean, std, .. } = &parameters.geometry;
        let features = height.checked_mul(*width).and_then(|n| n.checked_mul(*channels));
        if !features.is_some_and(|n| (1..=FEATURES_MAX).contains(&n)) {
            return Err(refuse(format!("images of {height}x{width}x{channels} make no sense")));
        }
        if labels.is_empty() {
            return Err(refuse("has no labels".into()));
        }
        if !mean.is_finite() || !std.is_finite() || *std <= 0.0 {
            return Err(refuse(format!("normalises by mean {mean} and standard deviation {std}")));
        }
        Ok(parameters)
    }
}
