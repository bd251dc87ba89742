//! What images look like to a model: their shape, their labels and their scale. Training finds it,
//! validation and serving keep to it.

use serde::{Deserialize, Serialize};

use super::pictures;

/// Shape, labels and scale of the training images; part of a model's descriptor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageGeometry {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 for grey, 3 for colour.
    pub channels: usize,
    /// The label of every class, sorted (as numbers when all are numbers).
    pub labels: Vec<String>,
    /// Mean of all values of the training images.
    pub mean: f32,
    /// Standard deviation of all values of the training images; never 0.
    pub std: f32,
    /// The value of a white pixel: 255 in image files, in other data the largest value seen.
    /// Encoded images are brought to this scale when the model is served.
    #[serde(default = "white")]
    pub maximum: f32,
}

fn white() -> f32 {
    255.0
}

impl ImageGeometry {
    /// Values per image.
    pub fn features(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// A model's input from pixel values in rows, channel last, in the scale of the training data:
    /// channel by channel (`[channels × height × width]`) and normalised.
    ///
    /// # Errors
    /// Says what was found and expected when the number of values is wrong or one is not finite.
    pub fn input_of_pixels(&self, pixels: &[f32]) -> Result<Vec<f32>, String> {
        if pixels.len() != self.features() {
            return Err(format!(
                "found {} pixel values, expected {} ({self})",
                pixels.len(),
                self.features()
            ));
        }
        if let Some(at) = pixels.iter().position(|v| !v.is_finite()) {
            return Err(format!("pixel value {at} is `{}`, expected a finite number", pixels[at]));
        }
        let mut planar = planar(pixels, self.channels);
        for value in &mut planar {
            *value = (*value - self.mean) / self.std;
        }
        Ok(planar)
    }

    /// A model's input from the bytes of a PNG or JPEG file, resized to the training images.
    ///
    /// # Errors
    /// Says what is wrong when the bytes are no such image or it is larger than the bounds.
    pub fn input_of_picture(&self, bytes: &[u8]) -> Result<Vec<f32>, String> {
        let picture = pictures::decode(bytes)?;
        let scale = self.maximum / 255.0;
        let pixels = pictures::values(picture, self.height, self.width, self.channels)?;
        let pixels: Vec<f32> = pixels.into_iter().map(|v| f32::from(v) * scale).collect();
        self.input_of_pixels(&pixels)
    }
}

impl std::fmt::Display for ImageGeometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{}", self.height, self.width, self.channels)
    }
}

/// Channel-last values channel by channel.
pub(super) fn planar<T: Copy>(interleaved: &[T], channels: usize) -> Vec<T> {
    (0..channels)
        .flat_map(|channel| interleaved.iter().skip(channel).step_by(channels).copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_move_channel_by_channel() {
        assert_eq!(planar(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
        let geometry = ImageGeometry {
            height: 1,
            width: 2,
            channels: 3,
            labels: vec!["a".into()],
            mean: 1.0,
            std: 2.0,
            maximum: 255.0,
        };
        let features = geometry.input_of_pixels(&[1.0, 3.0, 5.0, 7.0, 9.0, 11.0]).expect("fits");
        assert_eq!(features, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let text = geometry.input_of_pixels(&[1.0]).expect_err("too few");
        assert_eq!(text, "found 1 pixel values, expected 6 (1x2x3)");
        assert!(geometry.input_of_pixels(&[f32::NAN; 6]).is_err());
    }
}
