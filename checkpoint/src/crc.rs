//! CRC32C of very many, very short runs of bytes.
//!
//! The checksums of tiles that are one element thin take four bytes at a time each; a call of the
//! library per element costs ten times what the instruction does. Results are the library's.

// The one instruction this file is for exists only behind a check of the processor.
#![allow(unsafe_code)]

/// From here on the library's several streams at once are faster than one.
pub(crate) const SHORT_BYTES_MAX: usize = 256;

/// Appends to each sum the next `width` bytes of `bytes`, which has as many for every sum.
pub(crate) fn append_each(sums: &mut [u32], bytes: &[u8], width: usize) {
    #[cfg(target_arch = "x86_64")]
    if (2..=SHORT_BYTES_MAX).contains(&width) && is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has SSE 4.2, which is all that the function asks for.
        return unsafe { x86::append_each(sums, bytes, width) };
    }
    for (sum, run) in sums.iter_mut().zip(bytes.chunks_exact(width.max(1))) {
        *sum = crc32c::crc32c_append(*sum, run);
    }
}

/// Appends to one sum.
pub(crate) fn append(sum: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() <= SHORT_BYTES_MAX && is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has SSE 4.2, which is all that the function asks for.
        return unsafe { x86::append(sum, bytes) };
    }
    crc32c::crc32c_append(sum, bytes)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u16, _mm_crc32_u32, _mm_crc32_u64};

    #[target_feature(enable = "sse4.2")]
    pub fn append_each(sums: &mut [u32], bytes: &[u8], width: usize) {
        match width {
            2 => sums.iter_mut().zip(bytes.as_chunks().0).for_each(|(sum, run)| {
                *sum = !_mm_crc32_u16(!*sum, u16::from_le_bytes(*run));
            }),
            4 => sums.iter_mut().zip(bytes.as_chunks().0).for_each(|(sum, run)| {
                *sum = !_mm_crc32_u32(!*sum, u32::from_le_bytes(*run));
            }),
            8 => sums.iter_mut().zip(bytes.as_chunks().0).for_each(|(sum, run)| {
                *sum = !(_mm_crc32_u64(u64::from(!*sum), u64::from_le_bytes(*run)) as u32);
            }),
            // One run's sum does not wait for another's: the processor has several under way.
            _ => sums.iter_mut().zip(bytes.chunks_exact(width)).for_each(|(sum, run)| {
                *sum = append(*sum, run);
            }),
        }
    }

    #[target_feature(enable = "sse4.2")]
    pub fn append(sum: u32, bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks();
        let mut state = u64::from(!sum);
        for word in words {
            state = _mm_crc32_u64(state, u64::from_le_bytes(*word));
        }
        !rest.iter().fold(state as u32, |state, byte| _mm_crc32_u8(state, *byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_those_of_the_library() {
        let bytes: Vec<u8> = (0..4096u32).map(|i| (i * 37 % 251) as u8).collect();
        for length in [0, 1, 3, 7, 8, 9, 88, 255, 256, 257, 4096] {
            let expected = crc32c::crc32c_append(17, &bytes[..length]);
            assert_eq!(append(17, &bytes[..length]), expected, "{length}");
        }
        for width in [1, 2, 3, 4, 8, 16, 88, 95, 256, 300] {
            let mut sums: Vec<u32> = (0..bytes.len() / width).map(|i| i as u32 * 7).collect();
            let expected: Vec<u32> = sums
                .iter()
                .zip(bytes.chunks_exact(width))
                .map(|(sum, run)| crc32c::crc32c_append(*sum, run))
                .collect();
            append_each(&mut sums, &bytes, width);
            assert_eq!(sums, expected, "{width}");
        }
    }
}
