//! Random text from the operating system. The only source of randomness in this crate outside raft:
//! decisions use none.

use rustls::crypto::ring;

/// The operating system refused to give random bytes.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gave no random bytes")]
pub struct RandomError;

/// Bytes of a gang's secret: 256 bits cannot be guessed.
pub(crate) const SECRET_BYTES: usize = 32;
/// Bytes of a request id: 128 bits do not collide.
pub(crate) const REQUEST_ID_BYTES: usize = 16;

/// `N` random bytes in lowercase hex.
pub(crate) fn random_hex<const N: usize>() -> Result<String, RandomError> {
    use std::fmt::Write as _;

    let mut bytes = [0_u8; N];
    ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| RandomError)?;
    let mut text = String::with_capacity(2 * N);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// A random number.
pub(crate) fn random_u64() -> Result<u64, RandomError> {
    let mut bytes = [0_u8; 8];
    ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| RandomError)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ_and_have_the_asked_length() {
        let (first, second) = (random_hex::<SECRET_BYTES>(), random_hex::<SECRET_BYTES>());
        let (first, second) = (first.expect("random"), second.expect("random"));
        assert_eq!((first.len(), second.len()), (64, 64));
        assert!(first.bytes().all(|b| b.is_ascii_hexdigit()), "{first}");
        assert_ne!(first, second);
    }
}
