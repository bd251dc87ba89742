//! The job files and data under `examples/` are what they say: tests only.

use std::path::{Path, PathBuf};

use api::JobSpec;

use super::{AugmentOptions, ImageDataset, ImageGeometry, open_images};
use crate::block::BlockInput;
use crate::dataset::Dataset;

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(path)
}

fn open(channel: &str, path: &Path, expect: Option<&ImageGeometry>) -> ImageDataset {
    open_images(channel, path, None, expect, AugmentOptions::default()).expect("opens")
}

fn first_image(set: &ImageDataset) -> Vec<f32> {
    let batch = set.microbatch(&[0], None, &burn::tensor::Device::flex()).expect("not empty");
    let BlockInput::Features(image) = batch.input else { panic!("images are features") };
    image.into_data().iter().collect()
}

#[test]
fn every_job_file_fits_its_schema() {
    for name in ["digits", "rust-lm", "fashion-mnist"] {
        let mut spec = JobSpec::load(&example(&format!("{name}/job.toml")), &[]).expect(name);
        assert_eq!(spec.name.as_str(), name);
        let algorithm = crate::algorithm(&spec.algorithm).expect(name);
        spec.resolve(&algorithm.schema()).expect(name);
        assert!(spec.resources.ranks.max() == 2 && spec.channels.contains_key("train"), "{name}");
    }
}

#[test]
fn the_digits_are_the_committed_ones() {
    let train = open("train", &example("digits/train.csv.gz"), None);
    let geometry = train.geometry().clone();
    let validation = open("validation", &example("digits/validation.csv.gz"), Some(&geometry));
    assert_eq!((train.len(), validation.len()), (1442, 355));
    assert_eq!(
        (geometry.to_string(), geometry.labels.concat()),
        ("8x8x1".into(), "0123456789".into())
    );
    assert_eq!(geometry.maximum, 16.0);
    assert_eq!(train.digest(), TRAIN_DIGEST);
    // The sample is the first validation image, as a request.
    let text = std::fs::read_to_string(example("digits/sample.json")).expect("reads");
    let sample: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let pixels: Vec<f32> = serde_json::from_value(sample["pixels"].clone()).expect("numbers");
    assert_eq!(geometry.input_of_pixels(&pixels).expect("64 pixels"), first_image(&validation));
}

/// A change of it changes the identity of every job on this data.
const TRAIN_DIGEST: &str = "810d143d4661389c1ba1f390199633e65378ed727dcd098e8f38925ce9c2ab48";

#[test]
#[ignore = "needs Debian's package dataset-fashion-mnist"]
fn fashion_mnist_opens_as_packaged() {
    let spec = JobSpec::load(&example("fashion-mnist/job.toml"), &[]).expect("parses");
    let path = |channel: &str| PathBuf::from(spec.channels[channel].uri.replace("file://", ""));
    let train = open("train", &path("train"), None);
    let geometry = train.geometry().clone();
    let validation = open("validation", &path("validation"), Some(&geometry));
    assert_eq!((train.len(), validation.len()), (60_000, 10_000));
    assert_eq!(geometry.to_string(), "28x28x1");
    // Known of the data set: 0.2860 and 0.3530 of 255.
    let near = |found: f32, known: f32| (found / 255.0 - known).abs() < 1e-4;
    assert!(near(geometry.mean, 0.2860) && near(geometry.std, 0.3530), "{geometry:?}");
    // The folder is told apart by the channel's name.
    let folder = path("train").parent().expect("a folder").to_owned();
    assert_eq!(open("train", &folder, None).digest(), train.digest());
    assert_eq!(open("validation", &folder, Some(&geometry)).digest(), validation.digest());
}
