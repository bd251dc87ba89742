//! Which rank writes which tensors of a replicated state. Pure.

use std::ops::Range;

/// Cuts a list of tensors, given by their lengths, into one contiguous run per rank such that the
/// largest run is as small as contiguous runs allow. Ranks at the end may get none.
///
/// Linear partitioning: binary search for the smallest capacity into which first-fit packs.
pub fn share_tensors(lengths: &[usize], world_size: u32) -> Vec<Range<usize>> {
    let runs = world_size.max(1) as usize;
    let largest = lengths.iter().copied().max().unwrap_or(0) as u128;
    let total: u128 = lengths.iter().map(|l| *l as u128).sum();
    let (mut low, mut high) = (largest, total.max(largest));
    while low < high {
        let middle = low + (high - low) / 2;
        if pack(lengths, middle).len() <= runs {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut shares = pack(lengths, low);
    shares.resize(runs, lengths.len()..lengths.len());
    shares
}

/// First-fit runs of at most `capacity` each; every single length must fit.
fn pack(lengths: &[usize], capacity: u128) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut filled) = (0, 0u128);
    for (index, length) in lengths.iter().enumerate() {
        if filled + *length as u128 > capacity && index > start {
            runs.push(start..index);
            (start, filled) = (index, 0);
        }
        filled += *length as u128;
    }
    if start < lengths.len() {
        runs.push(start..lengths.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_has_one_writer_and_the_largest_share_is_least() {
        let cases: [(&[usize], u32, usize); 7] = [
            (&[], 3, 0),
            (&[5], 1, 5),
            (&[5], 4, 5),
            (&[1, 1, 1, 1], 2, 2),
            (&[10, 1, 1, 1, 10], 3, 10),
            (&[4, 4, 4, 4, 4, 4], 4, 8),
            (&[0, 0, 7, 0], 2, 7),
        ];
        for (lengths, world_size, least) in cases {
            let shares = share_tensors(lengths, world_size);
            assert_eq!(shares.len(), world_size as usize, "{lengths:?}");
            let covered: Vec<usize> = shares.iter().cloned().flatten().collect();
            assert_eq!(covered, (0..lengths.len()).collect::<Vec<_>>(), "{lengths:?}");
            let sum = |share: &Range<usize>| lengths[share.clone()].iter().sum::<usize>();
            let largest = shares.iter().map(sum).max().expect("one share at least");
            assert_eq!(largest, least, "{lengths:?} over {world_size}");
        }
    }
}
