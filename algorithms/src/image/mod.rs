//! `image-classification`: a small residual network (He et al. 2016) with group normalisation.

mod architecture;
mod blocks;
mod predictor;
mod settings;

#[cfg(test)]
mod tests;

use api::JobSpec;
use api::schema::AlgorithmSchema;
use burn::tensor::Device;

use crate::algorithm::{Algorithm, LocalChannels, ModelDescriptor, Predictor, Problem};
use crate::data::{ImageDataset, open_images};
use crate::dataset::Dataset;
use crate::error::{AlgorithmError, DataError};
use predictor::ImagePredictor;
use settings::Setup;

/// The algorithm `image-classification`.
pub(crate) struct ImageClassification;

impl Algorithm for ImageClassification {
    fn schema(&self) -> AlgorithmSchema {
        settings::schema()
    }

    fn open(&self, spec: &JobSpec, channels: &LocalChannels) -> Result<Problem, AlgorithmError> {
        let setup = Setup::read(spec)?;
        let content_type = |channel: &str| {
            spec.channels.get(channel).and_then(|channel| channel.content_type.as_deref())
        };
        let path = channels.get("train").ok_or_else(|| {
            DataError::Mismatch("channel `train` is missing: add it to the job".into())
        })?;
        let train = open_images("train", path, content_type("train"), None, setup.augment)?;
        let geometry = train.geometry().clone();
        let (train, validation) = match channels.get("validation") {
            Some(path) => {
                let kind = content_type("validation");
                let data = open_images("validation", path, kind, Some(&geometry), setup.augment)?;
                (train, Some(data))
            }
            None if setup.validation_fraction > 0.0 => {
                ImageDataset::split(train, setup.validation_fraction)
            }
            None => (train, None),
        };
        Ok(Problem {
            model: setup.network.model(&geometry),
            train: Box::new(train),
            validation: validation.map(|data| Box::new(data) as Box<dyn Dataset>),
            descriptor: settings::descriptor(setup.network, geometry),
        })
    }

    fn predictor(
        &self,
        descriptor: &ModelDescriptor,
        weights: &[u8],
        device: &Device,
    ) -> Result<Box<dyn Predictor>, AlgorithmError> {
        Ok(Box::new(ImagePredictor::load(descriptor, weights, device)?))
    }
}
