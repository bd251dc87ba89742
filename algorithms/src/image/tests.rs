//! The image classifier as a whole.

use burn::tensor::{Device, Int, Tensor};

use super::ImageClassification;
use super::architecture::Network;
use super::settings;
use crate::algorithm::{Algorithm, GenerateInput, ImageInput, ModelDescriptor, Request, Response};
use crate::block::{BlockInput, Targets};
use crate::data::ImageGeometry;
use crate::registry::model_params;
use crate::tensor::tensor_from_slice;
use crate::testing::{Descent, check_gradients, descend, initial, noise, perturbed, safetensors};

const NETWORK: Network = Network { width: 6, stages: 2, blocks: 1, stem_stride: 0 };

fn geometry(height: usize, width: usize, channels: usize, classes: usize) -> ImageGeometry {
    ImageGeometry {
        height,
        width,
        channels,
        labels: (0..classes).map(|class| format!("class {class}")).collect(),
        mean: 0.5,
        std: 2.0,
        maximum: 255.0,
    }
}

/// Noisy images of textures: plain, stripes one way or the other, a chequerboard.
fn microbatch(geometry: &ImageGeometry, batch: usize) -> (BlockInput, Targets) {
    let device = Device::flex();
    let features = geometry.features();
    let mut pixels = noise("images", batch * features);
    let mut classes = Vec::new();
    for (i, image) in pixels.chunks_exact_mut(features).enumerate() {
        let class = i % geometry.labels.len();
        for (at, value) in image.iter_mut().enumerate() {
            let (x, y) = (at % geometry.width, at / geometry.width);
            let bright = [true, x % 2 == 0, y % 2 == 0, (x + y) % 2 == 0][class];
            *value += if bright { 1.0 } else { -1.0 };
        }
        classes.push(class as i64);
    }
    let images = tensor_from_slice(&pixels, &device).reshape([batch, features]);
    let classes = Tensor::<1, Int>::from_ints(classes.as_slice(), &device);
    (BlockInput::Features(images), Targets::Classes(classes))
}

#[test]
fn gradients_are_right_through_blocks() {
    for (height, width, channels) in [(5, 6, 1), (7, 4, 3)] {
        let geometry = geometry(height, width, channels, 3);
        let model = NETWORK.model(&geometry);
        let (input, targets) = microbatch(&geometry, 3);
        // Rectifiers bend and small groups curve: the step is small and noise takes a larger share.
        let values = perturbed(&model, 0.3);
        check_gradients(&model, &values, &input, &targets, (1e-4, 5e-2, 0.2));
    }
}

#[test]
fn thirty_steps_of_plain_descent_lower_the_loss() {
    let geometry = geometry(8, 8, 1, 4);
    let model = NETWORK.model(&geometry);
    let (input, targets) = microbatch(&geometry, 16);
    let Descent { before, after, .. } = descend(&model, (&input, &targets), 0.1, 30, false);
    assert!(after < before * 0.7, "{before} to {after}");
}

#[test]
fn an_image_is_computed_alone() {
    let geometry = geometry(8, 8, 1, 4);
    let model = NETWORK.model(&geometry);
    let (BlockInput::Features(images), Targets::Classes(classes)) = microbatch(&geometry, 4) else {
        panic!("images")
    };
    let values = perturbed(&model, 0.2);
    let mode = crate::block::Mode::Evaluate;
    let at = |from: usize, count: usize| {
        let input = BlockInput::Features(images.clone().narrow(0, from, count));
        let targets = Targets::Classes(classes.clone().narrow(0, from, count));
        crate::testing::loss(&model, &values, &input, &targets, mode)
    };
    let apart: f64 = (0..4).map(|i| at(i, 1)).sum();
    assert!((apart - at(0, 4)).abs() < 1e-4);
}

#[test]
fn names_and_sizes_follow_from_network_and_images() {
    let network = Network { width: 16, stages: 3, blocks: 1, stem_stride: 0 };
    let names = |side: usize| -> Vec<String> {
        let params = model_params(&network.model(&geometry(side, side, 1, 10)));
        params.into_iter().map(|(b, p)| format!("{b} {} {:?}", p.name, p.shape)).collect()
    };
    let small = names(8);
    assert_eq!(small, names(28), "the parameters do not depend on the size of the images");
    assert_eq!(small[0], "0 stem.convolution.weight [3, 3, 1, 16]");
    assert!(small.contains(&"2 stages.1.0.shortcut.weight [1, 1, 16, 32]".to_owned()));
    assert!(!small.iter().any(|name| name.contains("stages.0.0.shortcut")));
    assert_eq!(small.last().map(String::as_str), Some("4 head.bias [10]"));
    let error = |network: Network| network.checked().expect_err("refused");
    assert_eq!(error(Network { stages: 60, ..network }), "stages = 60, expected 1 to 6");
    assert_eq!(error(Network { blocks: 0, ..network }), "blocks = 0, expected 1 to 64");
}

/// A descriptor and the weights of a model trained on [`microbatch`].
fn trained() -> (ModelDescriptor, Vec<u8>) {
    let geometry = geometry(8, 8, 1, 4);
    let model = NETWORK.model(&geometry);
    let (input, targets) = microbatch(&geometry, 32);
    let Descent { after, values, .. } = descend(&model, (&input, &targets), 0.01, 60, true);
    assert!(after < 0.2, "the model has not learned: loss {after}");
    (settings::descriptor(NETWORK, geometry), safetensors(&model, &values))
}

#[test]
fn a_served_model_answers_in_order_and_refuses_alone() {
    let (descriptor, weights) = trained();
    let text = serde_json::to_string(&descriptor).expect("serialisable");
    let descriptor = serde_json::from_str(&text).expect("readable");
    let mut model =
        ImageClassification.predictor(&descriptor, &weights, &Device::flex()).expect("loads");
    let geometry = geometry(8, 8, 1, 4);
    let (BlockInput::Features(images), _) = microbatch(&geometry, 32) else { panic!("images") };
    // Back to the scale of the data: the model normalises by itself.
    let raw = crate::tensor::tensor_into_vec(images * 2.0 + 0.5);
    let mut requests: Vec<Request> = raw
        .chunks_exact(64)
        .map(|image| Request::Image(ImageInput::Pixels(image.to_vec())))
        .collect();
    requests.insert(5, Request::Image(ImageInput::Pixels(vec![0.0; 63])));
    requests.insert(9, Request::Image(ImageInput::Encoded(b"no image".to_vec())));
    let mut answers = model.predict(requests.clone());
    assert_eq!(answers.len(), 34);
    assert!(answers.remove(9).expect_err("refused").0.contains("PNG or JPEG"));
    let error = answers.remove(5).expect_err("refused").0;
    assert_eq!(error, "found 63 pixel values, expected 64 (8x8x1)");
    for (i, answer) in answers.iter().enumerate() {
        let Ok(Response::Class { label, probability, probabilities }) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(*label, format!("class {}", i % 4));
        let total: f32 = probabilities.iter().map(|(_, p)| p).sum();
        assert!((total - 1.0).abs() < 1e-5 && probabilities.len() == 4);
        assert_eq!(probabilities.iter().find(|(l, _)| l == label).map(|p| p.1), Some(*probability));
    }
    // Alone or in a batch, the answer is the same.
    let alone = model.predict(vec![requests[0].clone()]);
    let Ok(Response::Class { probability: alone, .. }) = alone[0] else { panic!("a class") };
    let Ok(Response::Class { probability, .. }) = answers[0] else { panic!("a class") };
    assert!((alone - probability).abs() < 1e-5);
}

#[test]
fn an_encoded_image_is_brought_to_the_trained_geometry() {
    let (descriptor, weights) = trained();
    let mut model =
        ImageClassification.predictor(&descriptor, &weights, &Device::flex()).expect("loads");
    // A colour image of another size, flat: the same answer as the same grey in pixels.
    let mut png = Vec::new();
    ::image::RgbImage::from_pixel(24, 20, ::image::Rgb([90, 90, 90]))
        .write_to(&mut std::io::Cursor::new(&mut png), ::image::ImageFormat::Png)
        .expect("encodes");
    let answers = model.predict(vec![
        Request::Image(ImageInput::Encoded(png)),
        Request::Image(ImageInput::Pixels(vec![90.0; 64])),
    ]);
    assert!(answers[0].is_ok());
    assert_eq!(answers[0], answers[1]);
    let prompt =
        GenerateInput { prompt: "x".into(), max_tokens: 1, temperature: 0.0, top_k: None, seed: 0 };
    let error = model.check(&Request::Generate(prompt)).expect_err("refused");
    assert!(error.0.contains("send pixels or an image"), "{error}");
}

#[test]
fn bad_model_files_say_what_is_wrong() {
    let geometry = geometry(8, 8, 1, 4);
    let model = NETWORK.model(&geometry);
    let weights = safetensors(&model, &initial(&model, 1));
    let error = |network: Network, geometry: ImageGeometry| {
        let descriptor = settings::descriptor(network, geometry);
        let loaded = ImageClassification.predictor(&descriptor, &weights, &Device::flex());
        let Err(error) = loaded else { panic!("loaded") };
        error.to_string()
    };
    let huge = ImageGeometry { height: usize::MAX, ..geometry.clone() };
    assert!(error(NETWORK, huge).contains("make no sense"));
    let flat = ImageGeometry { std: 0.0, ..geometry.clone() };
    assert!(error(NETWORK, flat).contains("standard deviation 0"));
    let unlabelled = ImageGeometry { labels: vec![], ..geometry.clone() };
    assert!(error(NETWORK, unlabelled).contains("no labels"));
    let wide = Network { width: 12, ..NETWORK };
    assert!(error(wide, geometry).contains("expected F32 [3, 3, 1, 12]"));
}
