//! The sizes of the residual network and the blocks that follow from them.

use serde::{Deserialize, Serialize};

use crate::block::{Block, Model};
use crate::data::ImageGeometry;
use crate::image::blocks::{Head, Residual, Stem};
use crate::loss::{SUMS, classification_loss};

/// Images whose shorter side has at least this many pixels are halved by the stem: the first stage
/// is where the time goes, and large images lose little there.
const STEM_HALVES_FROM: usize = 16;

/// What the network consists of; the rest follows from the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Network {
    /// Channels of the first stage; doubles from stage to stage.
    pub(crate) width: usize,
    /// Stages; every one but the first halves the image.
    pub(crate) stages: usize,
    /// Residual blocks per stage.
    pub(crate) blocks: usize,
    /// Step of the stem's convolution; 0: chosen by the size of the images.
    pub(crate) stem_stride: usize,
}

/// An activation's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plane {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

impl Plane {
    pub(super) fn pixels(&self) -> usize {
        self.height * self.width
    }

    pub(super) fn features(&self) -> usize {
        self.pixels() * self.channels
    }

    /// After a padded 3×3 convolution.
    pub(super) fn convolved(&self, stride: usize, channels: usize) -> Self {
        let along = |n: usize| (n - 1) / stride + 1;
        Self { height: along(self.height), width: along(self.width), channels }
    }
}

impl Network {
    /// Most channels of the first stage: beyond is a mistake, not a small network.
    pub(super) const WIDTH_MAX: usize = 1024;
    /// Most stages: each halves the image, and 64 pixels are down to 1 after six.
    pub(super) const STAGES_MAX: usize = 6;
    /// Most blocks per stage: ResNet-152 has 36.
    pub(super) const BLOCKS_MAX: usize = 64;
    /// Longest step of the stem: beyond, pixels are skipped by a kernel of 3.
    pub(super) const STEM_STRIDE_MAX: usize = 3;

    /// The sizes, if they make sense.
    pub(super) fn checked(self) -> Result<Self, String> {
        let ranges = [
            ("width", self.width, 1..=Self::WIDTH_MAX),
            ("stages", self.stages, 1..=Self::STAGES_MAX),
            ("blocks", self.blocks, 1..=Self::BLOCKS_MAX),
            ("stem_stride", self.stem_stride, 0..=Self::STEM_STRIDE_MAX),
        ];
        match ranges.into_iter().find(|(_, value, range)| !range.contains(value)) {
            None => Ok(self),
            Some((name, value, range)) => {
                Err(format!("{name} = {value}, expected {} to {}", range.start(), range.end()))
            }
        }
    }

    /// The model for such images: `stem`, `stages.0.0` …, `head`.
    pub(crate) fn model(&self, geometry: &ImageGeometry) -> Model {
        let image =
            Plane { height: geometry.height, width: geometry.width, channels: geometry.channels };
        let stride = match self.stem_stride {
            0 if image.height.min(image.width) >= STEM_HALVES_FROM => 2,
            0 => 1,
            given => given,
        };
        let stem = Stem::new(image, self.width, stride);
        let mut plane = stem.output();
        let mut blocks: Vec<Box<dyn Block>> = vec![Box::new(stem)];
        for stage in 0..self.stages {
            for index in 0..self.blocks {
                let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                let name = format!("stages.{stage}.{index}");
                let block = Residual::new(name, plane, self.width << stage, stride);
                plane = block.output();
                blocks.push(Box::new(block));
            }
        }
        blocks.push(Box::new(Head::new(plane, geometry.labels.len())));
        Model { blocks, sums: SUMS.map(str::to_owned).to_vec(), loss: classification_loss }
    }
}
