//! What a number of timed calls say: the middle, the spread, the least.

use serde::Serialize;

/// The times of calls, in seconds, sorted.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Of each call, the time of the rank it took longest.
    slowest: Vec<f64>,
    /// Of each call, the first rank's time.
    first: Vec<f64>,
}

/// The figures of a case. Times in seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    /// Timed calls.
    pub iterations: usize,
    /// Half of the calls took longer; this and the next three are of the rank it took longest.
    pub median: f64,
    /// A tenth of the calls were faster.
    pub p10: f64,
    /// A tenth of the calls were slower.
    pub p90: f64,
    /// The fastest call.
    pub latency: f64,
    /// The median of the first rank's times.
    pub median_rank0: f64,
}

impl Samples {
    /// From the nanoseconds of every call, by rank.
    pub fn new(by_rank: &[Vec<u64>]) -> Self {
        let calls = by_rank.iter().map(Vec::len).min().unwrap_or(0);
        let slowest = |call| by_rank.iter().map(|times| times[call]).max().unwrap_or(0);
        let first = |call| by_rank.first().map_or(0, |times| times[call]);
        Self { slowest: sorted((0..calls).map(slowest)), first: sorted((0..calls).map(first)) }
    }

    /// Half of the calls took longer.
    pub fn median(&self) -> f64 {
        quantile(&self.slowest, 0.5)
    }

    /// The figures.
    pub fn times(&self) -> Times {
        Times {
            iterations: self.slowest.len(),
            median: self.median(),
            p10: quantile(&self.slowest, 0.1),
            p90: quantile(&self.slowest, 0.9),
            latency: quantile(&self.slowest, 0.0),
            median_rank0: quantile(&self.first, 0.5),
        }
    }
}

fn sorted(nanoseconds: impl Iterator<Item = u64>) -> Vec<f64> {
    let mut seconds: Vec<f64> = nanoseconds.map(|n| n as f64 / 1e9).collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// The value below which a share of the sorted values lies; 0 if there are none.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * sorted.len().saturating_sub(1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    match (sorted.get(below), sorted.get(above)) {
        (Some(low), Some(high)) => low + (high - low) * place.fract(),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_takes_as_long_as_its_slowest_rank() {
        let samples = Samples::new(&[vec![1, 5, 2], vec![4, 3, 9]]);
        let nanoseconds = |seconds: f64| (seconds * 1e9).round();
        let times = samples.times();
        assert_eq!(nanoseconds(times.median), 5.0);
        assert_eq!(nanoseconds(times.latency), 4.0);
        assert_eq!(nanoseconds(times.median_rank0), 2.0);
        assert_eq!(times.iterations, 3);
    }

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0], 0.9), 1.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
