//! Counter-based random streams: what comes out depends on what it is for, never on who asks,
//! when, or what was drawn before.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The stream named by `domain` (one per purpose, so that two purposes never share numbers) and
/// `parts` (each prefixed with its length, so that no two lists of parts collide).
pub(crate) fn stream(domain: &str, parts: &[&[u8]]) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key(domain);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Uniform in (0, 1], a multiple of 2^-53.
pub(crate) fn unit(generator: &mut ChaCha8Rng) -> f64 {
    ((generator.next_u64() >> 11) + 1) as f64 / 9_007_199_254_740_992.0
}
