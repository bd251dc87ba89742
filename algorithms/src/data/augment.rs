//! Training-time changes to images, as a pure function of (seed, step, microbatch, position): the
//! same sample in the same place is changed the same way on any rank, after any restart.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::block::StepKey;

/// Which changes are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AugmentOptions {
    /// Images move by up to this many pixels in each direction; what is uncovered becomes 0, the
    /// mean of the normalised data.
    pub shift: u32,
    /// Every second image is mirrored left to right.
    pub flip: bool,
}

impl AugmentOptions {
    /// Whether nothing is changed.
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Changes one normalised image of `planes` planes of `height` × `width`. `scratch` keeps its
    /// memory from call to call.
    pub(super) fn apply(
        &self,
        key: StepKey,
        position: u64,
        (planes, height, width): (usize, usize, usize),
        image: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        assert_eq!(image.len(), planes * height * width, "the image has its shape");
        let mut random = generator(key, position);
        let reach = 2 * self.shift + 1;
        // Drawn whether used or not, so that switching one change on leaves the others.
        let down = below(&mut random, reach) as isize - self.shift as isize;
        let right = below(&mut random, reach) as isize - self.shift as isize;
        let mirror = below(&mut random, 2) == 1 && self.flip;
        if (down, right, mirror) == (0, 0, false) {
            return;
        }
        scratch.clear();
        scratch.extend_from_slice(image);
        for plane in 0..planes {
            for row in 0..height {
                for column in 0..width {
                    let from_row = row as isize - down;
                    let from_column = column as isize - right;
                    let is_inside = (0..height as isize).contains(&from_row)
                        && (0..width as isize).contains(&from_column);
                    let at = (plane * height + row) * width + column;
                    image[at] = if is_inside {
                        let (row, column) = (from_row as usize, from_column as usize);
                        let column = if mirror { width - 1 - column } else { column };
                        scratch[(plane * height + row) * width + column]
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

/// The generator of one place in training.
fn generator(key: StepKey, position: u64) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key("cohort image augmentation 1");
    for number in [key.seed, key.step, key.microbatch, position] {
        hasher.update(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A number below `bound`; its bias, at most bound / 2^32, cannot be seen in training.
fn below(random: &mut ChaCha8Rng, bound: u32) -> u32 {
    ((u64::from(random.next_u32()) * u64::from(bound)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: (usize, usize, usize) = (2, 3, 4);

    fn image() -> Vec<f32> {
        (1..=24).map(|v| v as f32).collect()
    }

    fn augmented(options: AugmentOptions, key: StepKey, position: u64) -> Vec<f32> {
        let mut image = image();
        options.apply(key, position, SHAPE, &mut image, &mut vec![9.0; 3]);
        image
    }

    #[test]
    fn every_part_of_the_key_counts_and_nothing_else() {
        let options = AugmentOptions { shift: 2, flip: true };
        let key = StepKey { seed: 1, step: 2, microbatch: 3 };
        let others = [
            StepKey { seed: 9, ..key },
            StepKey { step: 9, ..key },
            StepKey { microbatch: 9, ..key },
        ];
        let series = |key| (0..32).map(|p| augmented(options, key, p)).collect::<Vec<_>>();
        assert_eq!(series(key), series(key));
        for other in others {
            assert_ne!(series(key), series(other));
        }
        let distinct: std::collections::BTreeSet<String> =
            series(key).iter().map(|image| format!("{image:?}")).collect();
        assert!(distinct.len() > 16, "32 positions gave {} images", distinct.len());
    }

    #[test]
    fn all_shifts_and_both_mirrors_occur_and_move_whole_planes() {
        let options = AugmentOptions { shift: 1, flip: true };
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..400 {
            let changed = augmented(options, StepKey { seed: 0, step, microbatch: 0 }, 0);
            let found = (-1..=1).flat_map(|d| (-1..=1).map(move |r| (d, r)));
            let found = found.flat_map(|(d, r)| [(d, r, false), (d, r, true)]);
            let matches: Vec<_> = found.filter(|&change| reference(change) == changed).collect();
            assert_eq!(matches.len(), 1, "step {step} gave {changed:?}");
            seen.insert(matches[0]);
        }
        assert_eq!(seen.len(), 18, "only {seen:?} occurred");
        let still =
            augmented(AugmentOptions::default(), StepKey { seed: 0, step: 0, microbatch: 0 }, 0);
        assert_eq!(still, image());
    }

    /// The change written the other way round: every source pixel is sent to its place.
    fn reference((down, right, mirror): (i32, i32, bool)) -> Vec<f32> {
        let mut out = vec![0.0; 24];
        for (at, value) in image().into_iter().enumerate() {
            let (plane, row, column) = (at / 12, at / 4 % 3, at % 4);
            let column = if mirror { 3 - column } else { column };
            let (row, column) = (row as i32 + down, column as i32 + right);
            if (0..3).contains(&row) && (0..4).contains(&column) {
                out[plane * 12 + row as usize * 4 + column as usize] = value;
            }
        }
        out
    }
}
