//! Which rank the others wait for.

use api::Rank;
use api::events::Slowest;

/// The rank with the largest of the times, over their median; of ranks that computed, whose times
/// are not 0.
pub fn slowest(times: &[i64]) -> Option<Slowest> {
    let mut sorted: Vec<i64> = times.iter().copied().filter(|time| *time > 0).collect();
    sorted.sort_unstable();
    let median = *sorted.get((sorted.len().max(1) - 1) / 2)?;
    let (rank, time) = (0..).zip(times).max_by_key(|(_, time)| **time)?;
    let is_known = sorted.len() > 1;
    is_known.then(|| Slowest { rank: Rank(rank), ratio: *time as f64 / median as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_computed_are_compared() {
        for (times, expected) in [
            (&[][..], None),
            (&[0, 0], None),
            (&[10], None),
            (&[0, 10], None),
            (&[10, 10, 30], Some((2, 3.0))),
            (&[0, 10, 20, 10], Some((2, 2.0))),
            (&[0, 0, 20, 10], Some((2, 2.0))),
        ] {
            let found = slowest(times).map(|slowest| (slowest.rank.0, slowest.ratio));
            assert_eq!(found, expected, "{times:?}");
        }
    }
}
