//! Labelled images in memory, whatever file they came from.
//!
//! A reader (`idx`, `table`, `pictures`) fills an [`ImageStore`]; a data set is a list of its rows.
//! Validation takes shape, labels and scale from training and is refused when it does not fit.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::augment::AugmentOptions;
use super::geometry::ImageGeometry;
use super::labels::LabelTable;
use super::limits::{CHANNEL_BYTES_MAX, IMAGE_VALUES_MAX};
use super::pixels::PixelBuffer;
use super::source::{Source, has_extension};
use super::{idx, pictures, table};
use crate::block::{BlockInput, StepKey, Targets};
use crate::dataset::{Dataset, Microbatch};
use crate::error::DataError;

/// Content types that [`open_images`] reads; `image/*` is a folder with a folder of PNG or JPEG
/// files per class.
pub const IMAGE_CONTENT_TYPES: [&str; 5] =
    ["text/csv", "application/x-idx", "image/*", "image/png", "image/jpeg"];

/// Height, width and channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

impl Shape {
    /// A shape within the bounds, or what is wrong with it.
    pub(super) fn new(height: usize, width: usize, channels: usize) -> Result<Self, String> {
        let values = height.checked_mul(width).and_then(|v| v.checked_mul(channels));
        match values {
            Some(1..=IMAGE_VALUES_MAX) => Ok(Self { height, width, channels }),
            _ => Err(format!(
                "images of {height}x{width}x{channels} values, expected 1 to {IMAGE_VALUES_MAX} \
                 values each"
            )),
        }
    }

    /// Values per image.
    pub(super) fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl From<&ImageGeometry> for Shape {
    fn from(geometry: &ImageGeometry) -> Self {
        let ImageGeometry { height, width, channels, .. } = *geometry;
        Self { height, width, channels }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{}", self.height, self.width, self.channels)
    }
}

/// What a reader fills.
#[derive(Debug)]
pub(super) struct ImageStore {
    pub(super) shape: Shape,
    pub(super) pixels: PixelBuffer,
    pub(super) classes: Vec<u32>,
    pub(super) labels: LabelTable,
    /// The value of white, where the format fixes it.
    pub(super) white: Option<f32>,
}

impl ImageStore {
    /// Holds nothing yet.
    pub(super) fn new(shape: Shape, expect: Option<&ImageGeometry>) -> Self {
        let labels = LabelTable::new(expect.map(|g| g.labels.as_slice()));
        Self { shape, pixels: PixelBuffer::new(), classes: Vec::new(), labels, white: None }
    }

    /// Whether one more image stays within the bound of a channel; else what is wrong.
    pub(super) fn check_room(&self) -> Result<(), String> {
        let next = self.pixels.bytes() + 4 * self.shape.values() as u64;
        if next > CHANNEL_BYTES_MAX {
            return Err(format!(
                "the images decode to more than {CHANNEL_BYTES_MAX} bytes, the most that a rank \
                 holds in memory"
            ));
        }
        Ok(())
    }
}

/// Refuses a shape that is not that of training.
pub(super) fn check_shape(shape: Shape, expect: Option<&ImageGeometry>) -> Result<(), String> {
    match expect.map(Shape::from) {
        Some(expected) if expected != shape => Err(format!(
            "images of {shape} (height x width x channels), expected {expected} as in the \
             training channel"
        )),
        _ => Ok(()),
    }
}

/// Images with one label each. Cloning and splitting share the pixels.
#[derive(Clone, Debug)]
pub struct ImageDataset {
    pixels: Arc<PixelBuffer>,
    classes: Arc<[u32]>,
    rows: Arc<[u32]>,
    geometry: ImageGeometry,
    augment: AugmentOptions,
    digest: String,
}

/// Opens a channel of labelled images: idx files (`application/x-idx`, also compressed), CSV
/// (`text/csv`, also compressed) or a folder with a folder of PNG or JPEG files per class
/// (`image/*`). Without `content_type` the form is told by the names.
///
/// `expect` is the geometry of the training channel: the images must have its shape (files of
/// pictures are resized to it) and its labels, and are normalised by its mean and deviation.
///
/// # Errors
/// Names the file, the line or image, what was found and what was expected.
pub fn open_images(
    channel: &str,
    path: &Path,
    content_type: Option<&str>,
    expect: Option<&ImageGeometry>,
    augment: AugmentOptions,
) -> Result<ImageDataset, DataError> {
    let source = Source::channel(channel, path);
    let store = match form(&source, content_type)? {
        Form::Table => table::read(&source, expect)?,
        Form::Idx => idx::read(&source, expect)?,
        Form::Pictures => pictures::read(&source, expect)?,
    };
    let Shape { height, width, .. } = store.shape;
    if augment.shift as usize >= height.min(width) {
        return Err(DataError::Mismatch(format!(
            "images may be shifted by {} pixels, expected less than their {height}x{width}",
            augment.shift
        )));
    }
    if store.classes.is_empty() {
        return Err(source.malformed("holds no image"));
    }
    Ok(ImageDataset::new(store, expect, augment))
}

/// How images are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Table,
    Idx,
    Pictures,
}

fn form(source: &Source<'_>, content_type: Option<&str>) -> Result<Form, DataError> {
    let is_folder = source.is_folder()?;
    if let Some(content_type) = content_type {
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        return match essence {
            "text/csv" => Ok(Form::Table),
            "application/x-idx" => Ok(Form::Idx),
            "image/*" | "image/png" | "image/jpeg" if is_folder => Ok(Form::Pictures),
            "image/*" | "image/png" | "image/jpeg" => Err(source.malformed(format!(
                "is a file, expected for content type `{essence}` a folder with one folder of \
                 images per class"
            ))),
            _ => Err(source.malformed(format!(
                "content type `{essence}` is not one of {}",
                IMAGE_CONTENT_TYPES.join(", ")
            ))),
        };
    }
    if is_folder {
        let entries = source.entries(super::limits::FILES_MAX)?;
        return Ok(if entries.iter().any(|p| idx::is_images_file(p)) {
            Form::Idx
        } else if entries.iter().any(|p| has_extension(p, &["csv"])) {
            Form::Table
        } else {
            Form::Pictures
        });
    }
    if idx::is_images_file(source.path) {
        Ok(Form::Idx)
    } else if has_extension(source.path, &["csv"]) {
        Ok(Form::Table)
    } else {
        Err(source.malformed(format!(
            "its name does not tell its form: set the channel's content_type to one of {}",
            IMAGE_CONTENT_TYPES.join(", ")
        )))
    }
}

impl ImageDataset {
    fn new(store: ImageStore, expect: Option<&ImageGeometry>, augment: AugmentOptions) -> Self {
        let ImageStore { shape, pixels, mut classes, labels, white } = store;
        let labels = labels.finish(&mut classes);
        let rows: Arc<[u32]> = (0..classes.len() as u32).collect();
        let geometry = expect.cloned().unwrap_or_else(|| {
            let (mean, std) = pixels.moments(&rows, shape.values());
            let maximum = white.unwrap_or_else(|| pixels.maximum());
            let maximum = if maximum > 0.0 { maximum } else { 255.0 };
            let Shape { height, width, channels } = shape;
            ImageGeometry { height, width, channels, labels, mean, std, maximum }
        });
        let digest = digest(shape, &pixels, &classes, &geometry.labels);
        let (pixels, classes) = (Arc::new(pixels), classes.into());
        Self { pixels, classes, rows, geometry, augment, digest }
    }

    /// Shape, labels and scale: those of training.
    pub fn geometry(&self) -> &ImageGeometry {
        &self.geometry
    }

    /// Sets `fraction` of the images aside for validation, the same share of every class and always
    /// the same images. No second part when either would be empty. Both keep the whole's digest and
    /// geometry, so that a geometry read before the split stays true of the model. Mean and
    /// deviation are thus over the held-out images too: for a strict hold-out, give a validation
    /// channel of its own.
    pub fn split(self, fraction: f32) -> (Self, Option<Self>) {
        // Sorted by class and then by a hash, every 1/fraction-th image is taken: systematic
        // sampling, which is stratified without rounding per class.
        let order_of = |&row: &u32| {
            let hash = blake3::derive_key("cohort image split 1", &row.to_le_bytes());
            (self.classes[row as usize], hash)
        };
        let mut order = self.rows.to_vec();
        order.sort_by_cached_key(order_of);
        let fraction = f64::from(fraction.clamp(0.0, 1.0));
        let share = |count: usize| (count as f64 * fraction).floor() as usize;
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for (at, row) in order.into_iter().enumerate() {
            let part = if share(at + 1) > share(at) { &mut validation } else { &mut train };
            part.push(row);
        }
        if train.is_empty() || validation.is_empty() {
            return (self, None);
        }
        train.sort_unstable();
        validation.sort_unstable();
        let part = |rows: Vec<u32>| Self { rows: rows.into(), ..self.clone() };
        (part(train), Some(part(validation)))
    }

    /// The store's row behind a sample.
    fn row(&self, index: u64) -> Result<u32, DataError> {
        let row = usize::try_from(index).ok().and_then(|i| self.rows.get(i));
        row.copied().ok_or_else(|| {
            DataError::Mismatch(format!("sample {index} of a set of {} samples", self.rows.len()))
        })
    }
}

/// BLAKE3 over shape, labels, classes and pixels as decoded, so that compression and container do
/// not matter.
fn digest(shape: Shape, pixels: &PixelBuffer, classes: &[u32], labels: &[String]) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("cohort images 1");
    for number in [shape.height, shape.width, shape.channels, classes.len(), labels.len()] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    for label in labels {
        hasher.update(&(label.len() as u64).to_le_bytes()).update(label.as_bytes());
    }
    for class in classes {
        hasher.update(&class.to_le_bytes());
    }
    pixels.hash(&mut hasher);
    hasher.finalize().to_hex().to_string()
}

impl Dataset for ImageDataset {
    fn len(&self) -> u64 {
        self.rows.len() as u64
    }

    fn microbatch(
        &self,
        indices: &[u64],
        augment: Option<StepKey>,
        device: &Device,
    ) -> Result<Microbatch, DataError> {
        let geometry = &self.geometry;
        let features = geometry.features();
        let mut values = vec![0.0; indices.len() * features];
        let mut classes = Vec::with_capacity(indices.len());
        let mut scratch = Vec::new();
        for (position, (&index, image)) in
            indices.iter().zip(values.chunks_exact_mut(features)).enumerate()
        {
            let row = self.row(index)? as usize;
            self.pixels.normalised(row * features, geometry.mean, geometry.std, image);
            if let Some(key) = augment
                && !self.augment.is_none()
            {
                let shape = (geometry.channels, geometry.height, geometry.width);
                self.augment.apply(key, position as u64, shape, image, &mut scratch);
            }
            classes.push(self.classes[row] as i32);
        }
        let input = TensorData::new(values, [indices.len(), features]);
        let targets = TensorData::new(classes, [indices.len()]);
        Ok(Microbatch {
            input: BlockInput::Features(Tensor::<2>::from_data(input, device)),
            targets: Targets::Classes(Tensor::<1, Int>::from_data(targets, device)),
            samples: indices.len() as u64,
            tokens: 0,
        })
    }

    fn digest(&self) -> &str {
        &self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten images of class `i % 2` with pixel values that tell them apart.
    fn dataset(augment: AugmentOptions) -> ImageDataset {
        let shape = Shape::new(2, 2, 1).expect("small");
        let mut store = ImageStore::new(shape, None);
        for image in 0..10u8 {
            store.pixels.extend_bytes(&[image, 2 * image, 100, image * image]);
            store
                .classes
                .push(store.labels.number(["b", "a"][usize::from(image % 2)]).expect("ok"));
        }
        ImageDataset::new(store, None, augment)
    }

    fn features(batch: Microbatch) -> (Vec<f32>, Vec<i64>) {
        let BlockInput::Features(input) = batch.input else { panic!("images are features") };
        let Targets::Classes(classes) = batch.targets;
        let classes = classes.into_data().iter::<i64>().collect();
        (input.into_data().iter::<f32>().collect(), classes)
    }

    #[test]
    fn a_microbatch_holds_the_asked_samples_normalised() {
        let set = dataset(AugmentOptions::default());
        let geometry = set.geometry().clone();
        assert_eq!(geometry.labels, ["a", "b"]);
        let batch = set.microbatch(&[3, 0, 3], None, &Device::flex()).expect("in range");
        assert_eq!((batch.samples, batch.tokens), (3, 0));
        let (values, classes) = features(batch);
        assert_eq!(classes, [0, 1, 0]);
        let scale = |v: f32| (v - geometry.mean) / geometry.std;
        let three = [3.0, 6.0, 100.0, 9.0].map(scale);
        assert_eq!([&values[..4], &values[8..]], [three, three]);
        let error = set.microbatch(&[10], None, &Device::flex()).expect_err("out of range");
        assert_eq!(error.to_string(), "sample 10 of a set of 10 samples");
    }

    #[test]
    fn augmentation_depends_on_key_and_position_only() {
        let set = dataset(AugmentOptions { shift: 1, flip: true });
        let key = StepKey { seed: 7, step: 1, microbatch: 0 };
        let indices: Vec<u64> = (0..10).collect();
        let batch = |set: &ImageDataset, key| {
            features(set.microbatch(&indices, Some(key), &Device::flex()).expect("in range"))
        };
        assert_eq!(batch(&set, key), batch(&set.clone(), key));
        assert_ne!(batch(&set, key), batch(&set, StepKey { microbatch: 1, ..key }));
        let plain = features(set.microbatch(&indices, None, &Device::flex()).expect("in range"));
        assert_ne!(batch(&set, key), plain);
    }

    #[test]
    fn a_split_is_stratified_disjoint_and_repeatable() {
        let whole = dataset(AugmentOptions::default());
        let (train, validation) = whole.clone().split(0.4);
        let validation = validation.expect("four images");
        assert_eq!((train.len(), validation.len()), (6, 4));
        let mut rows = [&*train.rows, &*validation.rows].concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..10).collect::<Vec<u32>>());
        let of_class_a = validation.rows.iter().filter(|&&r| whole.classes[r as usize] == 0);
        assert_eq!(of_class_a.count(), 2);
        assert_eq!(train.geometry(), whole.geometry());
        assert_eq!(validation.geometry(), whole.geometry());
        let again = whole.clone().split(0.4);
        assert_eq!((&again.0.rows, &again.1.expect("four").rows), (&train.rows, &validation.rows));
        assert!(whole.clone().split(0.0).1.is_none());
        assert_eq!(whole.split(1.0).0.len(), 10);
    }
}
