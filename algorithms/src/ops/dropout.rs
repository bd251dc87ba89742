//! Dropout (Srivastava et al. 2014) whose mask is a pure function of seed, step, microbatch and
//! place in the model: never of the rank, and the same when a forward pass is computed again.

use burn::tensor::{Tensor, TensorData};
use rand_chacha::rand_core::Rng;

use crate::block::{Mode, StepKey};
use crate::random;

/// Zeroes elements with probability `rate` and scales the others by 1 / (1 − rate), in training
/// only. `place` names the layer and must be unique in the model.
pub(crate) fn dropout(x: Tensor<2>, rate: f32, place: &str, mode: Mode) -> Tensor<2> {
    let Mode::Train(key) = mode else { return x };
    if rate <= 0.0 {
        return x;
    }
    let shape = x.dims();
    let mask = TensorData::new(mask(shape[0] * shape[1], rate, place, key), shape);
    // On the same device as `x`, whether that tracks gradients or not.
    let mask = Tensor::<2>::from_data(mask, &x.device());
    x * mask
}

fn mask(elements: usize, rate: f32, place: &str, key: StepKey) -> Vec<f32> {
    let (step, microbatch) = (key.step.to_le_bytes(), key.microbatch.to_le_bytes());
    let parts = [&key.seed.to_le_bytes()[..], &step, &microbatch, place.as_bytes()];
    let mut generator = random::stream("cohort dropout mask", &parts);
    let scale = 1.0 / (1.0 - rate);
    // Of 2^32 equally likely draws, those below are dropped.
    let dropped = (f64::from(rate) * 4_294_967_296.0) as u64;
    let keep = |draw: u32| if u64::from(draw) < dropped { 0.0 } else { scale };
    (0..elements).map(|_| keep(generator.next_u32())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_a_function_of_its_key_and_drops_the_asked_share() {
        let key = StepKey { seed: 1, step: 2, microbatch: 3 };
        let first = mask(100_000, 0.25, "layers.0.mlp", key);
        assert_eq!(first, mask(100_000, 0.25, "layers.0.mlp", key));
        assert_ne!(first, mask(100_000, 0.25, "layers.1.mlp", key));
        assert_ne!(first, mask(100_000, 0.25, "layers.0.mlp", StepKey { microbatch: 4, ..key }));
        let dropped = first.iter().filter(|&&x| x == 0.0).count();
        assert!((24_000..26_000).contains(&dropped), "{dropped}");
        assert!(first.iter().all(|&x| x == 0.0 || x == 1.0 / 0.75));
    }
}
