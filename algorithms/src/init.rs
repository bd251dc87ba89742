//! Initial parameter values: a pure function of (seed, parameter name), the same on every machine,
//! whatever is initialised before or after and by whichever rank.

use std::f64::consts::TAU;

use crate::block::{Init, ParamSpec};
use crate::random;

/// Fills `out` with the initial values of `spec`. ChaCha8 keyed by BLAKE3 of (seed, name); normal
/// numbers by Box–Muller in 64-bit floats with the portable logarithm, sine and cosine of `libm`.
///
/// # Panics
/// If `out` does not have `spec.len()` elements.
pub fn initial_values(seed: u64, spec: &ParamSpec, out: &mut [f32]) {
    assert_eq!(out.len(), spec.len(), "one value per element of `{}`", spec.name);
    let parts: [&[u8]; 2] = [&seed.to_le_bytes(), spec.name.as_bytes()];
    let mut generator = random::stream("cohort initial values", &parts);
    match spec.init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Uniform { bound } => {
            for value in out {
                *value = ((2.0 * random::unit(&mut generator) - 1.0) * f64::from(bound)) as f32;
            }
        }
        Init::Normal { std } => {
            for pair in out.chunks_mut(2) {
                let radius = (-2.0 * libm::log(random::unit(&mut generator))).sqrt();
                let angle = TAU * random::unit(&mut generator);
                let both = [radius * libm::cos(angle), radius * libm::sin(angle)];
                for (value, normal) in pair.iter_mut().zip(both) {
                    *value = (normal * f64::from(std)) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u64, name: &str, init: Init, length: usize) -> Vec<f32> {
        let spec = ParamSpec { name: name.into(), shape: vec![length], init, decay: true };
        let mut out = vec![0.0; length];
        initial_values(seed, &spec, &mut out);
        out
    }

    #[test]
    fn values_depend_on_seed_and_name_alone() {
        let normal = Init::Normal { std: 0.02 };
        let first = values(7, "a", normal, 1001);
        values(7, "b", normal, 5);
        assert_eq!(first, values(7, "a", normal, 1001));
        assert_ne!(first, values(8, "a", normal, 1001));
        assert_ne!(first, values(7, "b", normal, 1001));
        // A shorter tensor of the same name begins alike: a resized model stays comparable.
        assert_eq!(first[..100], values(7, "a", normal, 100));
    }

    #[test]
    fn moments_are_as_asked() {
        let drawn = values(1, "w", Init::Normal { std: 2.0 }, 100_000);
        let mean = drawn.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        let variance = drawn.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 4.0).abs() < 0.06, "{mean} {variance}");
        let drawn = values(1, "w", Init::Uniform { bound: 0.5 }, 100_000);
        assert!(drawn.iter().all(|x| x.abs() <= 0.5) && drawn.iter().any(|x| *x > 0.49));
    }

    #[test]
    fn the_numbers_are_pinned() {
        // Changing them would make every recorded result irreproducible.
        let drawn = values(42, "head.output.weight", Init::Normal { std: 1.0 }, 4);
        let drawn: [f32; 4] = drawn.try_into().expect("four");
        assert_eq!(
            drawn.map(f32::to_bits),
            [3_179_470_170, 1_035_653_267, 1_070_370_102, 3_210_410_020]
        );
    }
}
