//! The learning rate of a step: linear warm-up, then constant, linear or cosine decay. A pure
//! function of the step, so that a resumed job continues exactly. Its cosine is computed in Rust: the
//! host's own could differ in the last bit from host to host.

use std::f64::consts::PI;

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Stays at the peak.
    Constant,
    /// Falls in a straight line to the minimum at the last step.
    Linear,
    /// Falls along half a cosine (Loshchilov and Hutter, 2017) to the minimum at the last step.
    Cosine,
}

/// A schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after the warm-up.
    pub shape: Shape,
    /// Rate at the end of the warm-up.
    pub peak: f64,
    /// Rate at the last step, as a part of the peak.
    pub min_ratio: f64,
    /// Steps over which the rate rises from peak / warmup to the peak.
    pub warmup: u64,
    /// Steps in all.
    pub total: u64,
}

impl Schedule {
    /// The rate applied in step `step`, from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup).saturating_sub(1).max(1);
        let progress = ((step - self.warmup) as f64 / span as f64).min(1.0);
        let left = match self.shape {
            Shape::Constant => return self.peak,
            Shape::Linear => 1.0 - progress,
            Shape::Cosine => 0.5 * (1.0 + libm::cos(PI * progress)),
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_minimum() {
        for (shape, middle) in
            [(Shape::Linear, 0.55), (Shape::Cosine, 0.55), (Shape::Constant, 1.0)]
        {
            let schedule = Schedule { shape, peak: 1.0, min_ratio: 0.1, warmup: 10, total: 31 };
            assert_eq!(schedule.rate(0), 0.1);
            assert_eq!(schedule.rate(9), 1.0);
            assert_eq!(schedule.rate(10), 1.0);
            assert!((schedule.rate(20) - middle).abs() < 1e-12);
            let end = if shape == Shape::Constant { 1.0 } else { 0.1 };
            assert!((schedule.rate(30) - end).abs() < 1e-12);
        }
    }
}
