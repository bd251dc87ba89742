//! Whose microbatch made a step's loss no number.
//!
//! The reduced loss of such a step is the same on every rank and says nothing about where it came
//! from. Each rank remembers what its own microbatches gave; only when a step is bad do they compare.

use std::fmt;

use api::Rank;
use collective::{CollectiveError, Queue, ReduceOp};

/// Samples that are named.
const NAMED_MAX: usize = 8;

/// What one rank's microbatches of a step gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finds {
    /// The first one whose loss is no number.
    first: Option<u64>,
    bad: i64,
    all: i64,
}

impl Finds {
    /// A microbatch of the step, in order, gave this loss.
    pub fn note(&mut self, microbatch: u64, loss: f64) {
        self.all += 1;
        if !loss.is_finite() {
            self.bad += 1;
            self.first.get_or_insert(microbatch);
        }
    }

    /// What all ranks found, the same on each.
    ///
    /// # Errors
    /// When the group breaks.
    pub fn compare(
        self,
        queue: &Queue,
        rank: Rank,
        world_size: u32,
    ) -> Result<Origin, CollectiveError> {
        let mut counts = vec![0; 2 + world_size as usize];
        counts[0] = self.bad;
        counts[1] = self.all;
        counts[2 + rank.0 as usize] = self.first.map_or(0, |first| first as i64 + 1);
        queue.turn().all_reduce(counts.as_mut_slice().into(), ReduceOp::Sum)?;
        Ok(Origin::of(counts[0], counts[1], &counts[2..]))
    }
}

/// Where a loss that is no number came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Microbatches of the step whose loss is no number, and all.
    bad: i64,
    all: i64,
    /// The first of them and who computed it, where it is not all of them.
    pub first: Option<(Rank, u64)>,
    /// Its samples' places in the training data, from 0.
    pub samples: Vec<u64>,
}

impl Origin {
    /// `firsts`: in rank order, each one's first bad microbatch, counted from 1; 0 for none.
    fn of(bad: i64, all: i64, firsts: &[i64]) -> Self {
        let ranks = (0..).map(Rank).zip(firsts).filter(|(_, first)| **first > 0);
        let first = ranks.min_by_key(|(_, first)| **first);
        // Of a model that is no number in itself every microbatch is bad, and nobody's the first.
        let first = first.filter(|_| bad < all).map(|(rank, first)| (rank, *first as u64 - 1));
        Self { bad, all, first, samples: Vec::new() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bad, &self.first) {
            (0, _) => f.write_str(", the loss of every microbatch is a number"),
            (_, None) => f.write_str(" in every microbatch"),
            (bad, Some((rank, _))) => {
                let named: Vec<String> =
                    self.samples.iter().take(NAMED_MAX).map(u64::to_string).collect();
                let plural = if self.samples.len() == 1 { "" } else { "s" };
                let more = match self.samples.len().saturating_sub(NAMED_MAX) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                write!(
                    f,
                    " in {bad} of {} microbatches, first in that of {rank} with sample{plural} \
                     {}{more} of the training data (counted from 0)",
                    self.all,
                    named.join(", ")
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_microbatch_and_its_rank_are_named_unless_all_are_bad() {
        let origin = Origin::of(2, 8, &[0, 6, 3]);
        assert_eq!(origin.first, Some((Rank(2), 2)));
        let told = |samples: &[u64]| Origin { samples: samples.to_vec(), ..origin.clone() };
        assert_eq!(
            told(&[37]).to_string(),
            " in 2 of 8 microbatches, first in that of r2 with sample 37 of the training data \
             (counted from 0)"
        );
        let many: Vec<u64> = (0..10).collect();
        assert!(told(&many).to_string().contains("samples 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of"));
        assert_eq!(Origin::of(8, 8, &[1, 3]).first, None);
        assert_eq!(Origin::of(8, 8, &[1, 3]).to_string(), " in every microbatch");
        let none = Origin::of(0, 8, &[0, 0]);
        assert_eq!(none.to_string(), ", the loss of every microbatch is a number");
        let mut finds = Finds::default();
        for (microbatch, loss) in [(4, 1.0), (5, f64::NAN), (6, f64::INFINITY)] {
            finds.note(microbatch, loss);
        }
        assert_eq!((finds.first, finds.bad, finds.all), (Some(5), 2, 3));
    }
}
