//! Which state a new generation goes on from, and who sends it to whom.
//!
//! A pure decision over what every member offers, taken by each of them alike once the offers are
//! gathered. Members of a group that broke have applied the same steps up to the one that was under
//! way, which some may have finished: the newest state any of them holds is the job's, and those
//! that lack it receive it, bit for bit, from all that hold it. The store is the last resort: used
//! when nobody holds a state, or when what was recorded there is newer than what is held.

use std::ops::Range;

use api::{Rank, Step};
use collective::chunk_range;

/// What one member brings: the step of the state it holds, if it holds one.
pub type Offer = Option<Step>;

/// Where the state of a generation comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Members hold it.
    Members {
        /// Steps applied to it.
        step: Step,
        /// Who holds it, in rank order; never empty.
        holders: Vec<Rank>,
        /// Who lacks it.
        receivers: Vec<Rank>,
    },
    /// The checkpoint that the leader named.
    Checkpoint(Step),
    /// There is none: the job begins.
    Beginning,
}

/// Decides over the offers, in rank order. `recorded`: the step of the newest checkpoint.
pub fn origin(offers: &[Offer], recorded: Option<Step>) -> Origin {
    let newest = offers.iter().flatten().max().copied();
    match (newest, recorded) {
        (Some(step), recorded) if recorded.is_none_or(|recorded| recorded <= step) => {
            let ranks = |holds: bool| {
                let all = (0..).map(Rank).zip(offers);
                all.filter(move |(_, offer)| (**offer == Some(step)) == holds)
                    .map(|(rank, _)| rank)
                    .collect()
            };
            Origin::Members { step, holders: ranks(true), receivers: ranks(false) }
        }
        (_, Some(recorded)) => Origin::Checkpoint(recorded),
        (_, None) => Origin::Beginning,
    }
}

/// Cuts a buffer of `len` elements into one contiguous part per holder, so that each sends its own.
pub fn parts(len: usize, holders: &[Rank]) -> Vec<(Rank, Range<usize>)> {
    let count = u32::try_from(holders.len()).unwrap_or(u32::MAX);
    let part = |(index, rank): (u32, &Rank)| (*rank, chunk_range(len, count, index));
    (0..).zip(holders).map(part).filter(|(_, range)| !range.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "3 - 4": ranks that hold steps 3, none, 4.
    fn decided(offers: &str, recorded: Option<u64>) -> String {
        let offers: Vec<Offer> =
            offers.split_whitespace().map(|word| word.parse().ok().map(Step)).collect();
        match origin(&offers, recorded.map(Step)) {
            Origin::Members { step, holders, receivers } => {
                let list = |ranks: &[Rank]| {
                    ranks.iter().map(|rank| rank.0.to_string()).collect::<Vec<_>>().join(",")
                };
                format!("{} from {} to [{}]", step.0, list(&holders), list(&receivers))
            }
            Origin::Checkpoint(step) => format!("checkpoint {}", step.0),
            Origin::Beginning => "beginning".into(),
        }
    }

    #[test]
    fn the_newest_state_that_anybody_holds_is_the_jobs() {
        let table = [
            // A rank died before or during the reduction: nobody has finished the step.
            ("7 7 -", Some(5), "7 from 0,1 to [2]"),
            // After it: some have, the others catch up instead of computing it again.
            ("8 7 8 -", Some(5), "8 from 0,2 to [1,3]"),
            // Two at once, and a newcomer is rank 0 now.
            ("- - 7 7", None, "7 from 2,3 to [0,1]"),
            // Nobody is new: a group broke although all live.
            ("7 7", None, "7 from 0,1 to []"),
            // Ranks that died again while they were joining hold nothing.
            ("- 7 -", Some(5), "7 from 1 to [0,2]"),
            ("- -", Some(5), "checkpoint 5"),
            ("- -", None, "beginning"),
            ("0 -", None, "0 from 0 to [1]"),
            // What was recorded is never behind what a member of the last gang holds; should it be
            // newer all the same, it is the job's.
            ("4 -", Some(5), "checkpoint 5"),
            ("5 -", Some(5), "5 from 0 to [1]"),
            ("7", Some(5), "7 from 0 to []"),
        ];
        for (offers, recorded, expected) in table {
            assert_eq!(decided(offers, recorded), expected, "{offers} {recorded:?}");
        }
    }

    #[test]
    fn every_element_is_sent_once_and_by_all_that_hold_it() {
        for (len, holders) in [(0, 1), (1, 3), (7, 3), (1_000_003, 4)] {
            let holders: Vec<Rank> = (0..holders).map(Rank).collect();
            let parts = parts(len, &holders);
            let covered: usize = parts.iter().map(|(_, range)| range.len()).sum();
            assert_eq!(covered, len);
            assert!(parts.windows(2).all(|pair| pair[0].1.end == pair[1].1.start));
            if len > 1_000 {
                assert_eq!(parts.len(), holders.len());
            }
        }
    }
}
