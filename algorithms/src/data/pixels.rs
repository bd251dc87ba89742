//! Pixel values of a whole channel in memory: a byte each while all of them are whole numbers
//! 0–255, four bytes each from the first one that is not.

/// Values in sample order; within a sample channel by channel, row by row.
#[derive(Debug)]
pub(super) enum PixelBuffer {
    /// All are whole numbers 0–255.
    Bytes(Vec<u8>),
    /// At least one is not.
    Floats(Vec<f32>),
}

impl PixelBuffer {
    /// Holds nothing yet.
    pub(super) fn new() -> Self {
        Self::Bytes(Vec::new())
    }

    /// Values held.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(values) => values.len(),
            Self::Floats(values) => values.len(),
        }
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> u64 {
        let width = match self {
            Self::Bytes(_) => 1,
            Self::Floats(_) => 4,
        };
        self.len() as u64 * width
    }

    /// Appends one sample.
    pub(super) fn extend(&mut self, sample: &[f32]) {
        let fits = |v: &f32| *v >= 0.0 && *v <= 255.0 && v.fract() == 0.0;
        if let Self::Bytes(values) = self {
            if sample.iter().all(fits) {
                values.extend(sample.iter().map(|&v| v as u8));
                return;
            }
            *self = Self::Floats(values.iter().map(|&v| f32::from(v)).collect());
        }
        if let Self::Floats(values) = self {
            values.extend_from_slice(sample);
        }
    }

    /// Appends one sample of bytes.
    pub(super) fn extend_bytes(&mut self, sample: &[u8]) {
        match self {
            Self::Bytes(values) => values.extend_from_slice(sample),
            Self::Floats(values) => values.extend(sample.iter().map(|&v| f32::from(v))),
        }
    }

    /// Writes `(value - mean) / std` of the values at `from` into `out`.
    pub(super) fn normalised(&self, from: usize, mean: f32, std: f32, out: &mut [f32]) {
        let range = from..from + out.len();
        match self {
            Self::Bytes(values) => {
                for (out, value) in out.iter_mut().zip(&values[range]) {
                    *out = (f32::from(*value) - mean) / std;
                }
            }
            Self::Floats(values) => {
                for (out, value) in out.iter_mut().zip(&values[range]) {
                    *out = (value - mean) / std;
                }
            }
        }
    }

    /// Mean and standard deviation over the samples `rows` of `size` values each; a deviation of 0
    /// is given as 1, so that constant data stay finite. The order of the sums is that of `rows`.
    pub(super) fn moments(&self, rows: &[u32], size: usize) -> (f32, f32) {
        let count = (rows.len() * size) as f64;
        let sample = |row: u32| row as usize * size..(row as usize + 1) * size;
        let (mean, variance) = match self {
            // Exact in whole numbers: 2^33 values of at most 255^2 stay below 2^64.
            Self::Bytes(values) => {
                let (mut sum, mut squares) = (0u64, 0u64);
                for value in rows.iter().flat_map(|&row| &values[sample(row)]) {
                    sum += u64::from(*value);
                    squares += u64::from(*value) * u64::from(*value);
                }
                let mean = sum as f64 / count;
                (mean, squares as f64 / count - mean * mean)
            }
            // Two passes: the difference of squares would cancel where mean ≫ deviation.
            Self::Floats(values) => {
                let all = || rows.iter().flat_map(|&row| &values[sample(row)]);
                let mean = all().map(|v| f64::from(*v)).sum::<f64>() / count;
                let variance = all().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
                (mean, variance)
            }
        };
        let std = variance.max(0.0).sqrt() as f32;
        (mean as f32, if std > 0.0 && std.is_finite() { std } else { 1.0 })
    }

    /// The largest value; 0 when there is none.
    pub(super) fn maximum(&self) -> f32 {
        match self {
            Self::Bytes(values) => values.iter().copied().max().map_or(0.0, f32::from),
            Self::Floats(values) => values.iter().copied().fold(0.0, f32::max),
        }
    }

    /// Feeds the values into a hash.
    pub(super) fn hash(&self, hasher: &mut blake3::Hasher) {
        match self {
            Self::Bytes(values) => {
                hasher.update(b"u8").update(values);
            }
            Self::Floats(values) => {
                hasher.update(b"f32");
                for value in values {
                    hasher.update(&value.to_le_bytes());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_widen_at_the_first_fraction_and_keep_their_values() {
        let mut buffer = PixelBuffer::new();
        buffer.extend(&[0.0, 255.0]);
        assert_eq!(buffer.bytes(), 2);
        buffer.extend(&[0.5, -1.0]);
        assert_eq!(buffer.bytes(), 16);
        let mut out = [0.0; 4];
        buffer.normalised(0, 0.0, 1.0, &mut out);
        assert_eq!(out, [0.0, 255.0, 0.5, -1.0]);
    }

    #[test]
    fn moments_of_both_forms_agree() {
        let (mut bytes, mut floats) = (PixelBuffer::new(), PixelBuffer::new());
        let values: Vec<f32> = (0..24).map(|i| (i * 37 % 101) as f32).collect();
        bytes.extend(&values);
        floats.extend(&[0.5, 0.5, 0.5, 0.5]);
        floats.extend(&values);
        let (mean, std) = bytes.moments(&[0, 1, 5], 4);
        assert_eq!(floats.moments(&[1, 2, 6], 4), (mean, std));
        assert_eq!(bytes.moments(&[0], 1), (0.0, 1.0));
    }
}
