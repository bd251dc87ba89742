//! A trained image classifier.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};

use crate::algorithm::{
    GenerateInput, ImageInput, ModelDescriptor, Predictor, Request, RequestError, Response,
};
use crate::block::{BlockInput, Mode, Model};
use crate::data::ImageGeometry;
use crate::error::AlgorithmError;
use crate::image::settings::{self, Parameters};
use crate::ops;
use crate::tensor::{tensor_from_vec, tensor_into_vec};
use crate::weights::load_weights;

/// Most images of one forward pass: bounds the memory of a batch, and larger ones are no faster.
const BATCH_MAX: usize = 64;
/// Largest PNG or JPEG file.
const ENCODED_BYTES_MAX: usize = 16 << 20;

/// An image classifier ready to answer.
pub(super) struct ImagePredictor {
    model: Model,
    params: Vec<Vec<Tensor<1>>>,
    geometry: ImageGeometry,
    device: Device,
}

impl ImagePredictor {
    pub(super) fn load(
        descriptor: &ModelDescriptor,
        weights: &[u8],
        device: &Device,
    ) -> Result<Self, AlgorithmError> {
        let Parameters { network, geometry } = Parameters::read(descriptor)?;
        let model = network.model(&geometry);
        let params = load_weights(&model, weights, device)?;
        Ok(Self { model, params, geometry, device: device.clone() })
    }

    fn input(&self, request: &Request) -> Result<Vec<f32>, RequestError> {
        self.check(request)?;
        match request {
            Request::Image(ImageInput::Pixels(pixels)) => self.geometry.input_of_pixels(pixels),
            Request::Image(ImageInput::Encoded(bytes)) => self.geometry.input_of_picture(bytes),
            Request::Generate(_) => return Err(wrong_kind()),
        }
        .map_err(RequestError)
    }

    /// Probabilities of every class, image after image.
    fn probabilities(&self, images: &[Vec<f32>]) -> Vec<f32> {
        let shape = [images.len(), self.geometry.features()];
        let mut x = tensor_from_vec(images.concat(), shape, &self.device);
        for (block, params) in self.model.blocks.iter().zip(&self.params) {
            x = block.forward(params, BlockInput::Features(x), Mode::Evaluate);
        }
        let mut logits = tensor_into_vec(x);
        for row in logits.chunks_exact_mut(self.geometry.labels.len()) {
            ops::softmax_in_place(row, 1.0);
        }
        logits
    }

    fn response(&self, probabilities: &[f32]) -> Result<Response, RequestError> {
        if !probabilities.iter().all(|probability| probability.is_finite()) {
            let text = "the pixel values are so large that the model's arithmetic overflows: give \
                        them in the scale of the training data";
            return Err(RequestError(text.into()));
        }
        let likelier = |best: usize, i: usize| {
            if probabilities[i] > probabilities[best] { i } else { best }
        };
        let best = (0..probabilities.len()).fold(0, likelier);
        let labels = self.geometry.labels.iter().cloned();
        Ok(Response::Class {
            label: self.geometry.labels[best].clone(),
            probability: probabilities[best],
            probabilities: labels.zip(probabilities.iter().copied()).collect(),
        })
    }
}

impl Predictor for ImagePredictor {
    fn predict(&mut self, requests: Vec<Request>) -> Vec<Result<Response, RequestError>> {
        let inputs: Vec<_> = requests.iter().map(|request| self.input(request)).collect();
        let mut images = Vec::new();
        let places: Vec<Result<usize, RequestError>> = inputs
            .into_iter()
            .map(|input| {
                input.map(|image| {
                    images.push(image);
                    images.len() - 1
                })
            })
            .collect();
        let mut answers = Vec::with_capacity(images.len());
        for batch in images.chunks(BATCH_MAX) {
            let probabilities = self.probabilities(batch);
            let rows = probabilities.chunks_exact(self.geometry.labels.len());
            answers.extend(rows.map(|row| self.response(row)));
        }
        places.into_iter().map(|place| place.and_then(|index| answers[index].clone())).collect()
    }

    fn generate(
        &mut self,
        _input: &GenerateInput,
        _emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Response, RequestError> {
        Err(wrong_kind())
    }

    fn request_types(&self) -> Vec<String> {
        settings::schema().request_types
    }

    fn check(&self, request: &Request) -> Result<(), RequestError> {
        match request {
            Request::Image(ImageInput::Pixels(pixels)) => {
                let expected = self.geometry.features();
                if pixels.len() != expected {
                    return Err(RequestError(format!(
                        "found {} pixel values, expected {expected} ({}x{}x{})",
                        pixels.len(),
                        self.geometry.height,
                        self.geometry.width,
                        self.geometry.channels
                    )));
                }
                match pixels.iter().position(|value| !value.is_finite()) {
                    None => Ok(()),
                    Some(at) => Err(RequestError(format!(
                        "pixel value {at} is `{}`, expected a finite number",
                        pixels[at]
                    ))),
                }
            }
            Request::Image(ImageInput::Encoded(bytes)) if bytes.len() > ENCODED_BYTES_MAX => {
                Err(RequestError(format!(
                    "the image file has {} bytes, expected at most {ENCODED_BYTES_MAX}",
                    bytes.len()
                )))
            }
            Request::Image(ImageInput::Encoded(_)) => Ok(()),
            Request::Generate(_) => Err(wrong_kind()),
        }
    }
}

fn wrong_kind() -> RequestError {
    RequestError("this model tells images apart, found a prompt: send pixels or an image".into())
}
