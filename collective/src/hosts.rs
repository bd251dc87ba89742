//! Which ranks of a group share a host, and which of them talk to other hosts.
//!
//! Pure. Ranks are numbered host by host; where they are not, a host counts as several. Every host
//! has as many *rails* as the smallest has ranks: rank i of each host talks to rank i of the others,
//! so that each link carries its part of a buffer and no host waits for another's lack of ranks.

use std::ops::Range;

use crate::chunk::chunk_range;

/// The hosts of a group, in rank order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// The ranks of each.
    pub runs: Vec<Range<u32>>,
    /// This rank's.
    pub own: usize,
    /// This rank's place among those of its host.
    pub local: u32,
    /// Ranks of every host that talk to other hosts.
    pub rails: u32,
}

impl Hosts {
    /// From what each rank says of its host; who says nothing is alone.
    ///
    /// # Panics
    /// If `rank` is not one of them.
    pub(crate) fn of(names: &[Vec<u8>], rank: u32) -> Self {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for (rank, name) in names.iter().enumerate() {
            let same = rank > 0 && !name.is_empty() && *name == names[rank - 1];
            match runs.last_mut() {
                Some(run) if same => run.end += 1,
                _ => runs.push(rank as u32..rank as u32 + 1),
            }
        }
        let own = runs.iter().position(|run| run.contains(&rank)).expect("a rank has a host");
        let local = rank - runs[own].start;
        let rails = runs.iter().map(Range::len).min().unwrap_or(1) as u32;
        Self { runs, own, local, rails }
    }

    /// The ranks of this rank's host.
    pub(crate) fn here(&self) -> Range<u32> {
        self.runs[self.own].clone()
    }

    /// All ranks are on one host.
    pub(crate) fn is_one(&self) -> bool {
        self.runs.len() == 1
    }

    /// No two ranks are on one host.
    pub(crate) fn are_apart(&self) -> bool {
        self.runs.iter().all(|run| run.len() == 1)
    }

    /// Which of its host's ranks, if that talks to other hosts.
    pub(crate) fn rail(&self) -> Option<u32> {
        (self.local < self.rails).then_some(self.local)
    }

    /// By rank: the number of its host, for those that this rank talks to.
    pub(crate) fn others_on_rail(&self) -> Vec<Option<usize>> {
        let world = self.runs.last().map_or(0, |run| run.end);
        let mut others = vec![None; world as usize];
        if let Some(rail) = self.rail() {
            for (host, run) in self.runs.iter().enumerate().filter(|(host, _)| *host != self.own) {
                others[(run.start + rail) as usize] = Some(host);
            }
        }
        others
    }

    /// The part of `len` elements that each rank of this host takes to other hosts.
    pub(crate) fn shares(&self, len: usize) -> Vec<Range<usize>> {
        let share = |local| match local < self.rails {
            true => chunk_range(len, self.rails, local),
            false => len..len,
        };
        (0..self.here().len() as u32).map(share).collect()
    }

    /// The chunks of a host's ranks together, of a buffer of which every rank has a chunk.
    pub(crate) fn region(&self, host: usize, len: usize) -> Range<usize> {
        let world = self.runs.last().map_or(0, |run| run.end);
        let run = &self.runs[host];
        chunk_range(len, world, run.start).start..chunk_range(len, world, run.end - 1).end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<Vec<u8>> {
        text.split(' ').map(|name| name.trim_matches('-').as_bytes().to_vec()).collect()
    }

    #[test]
    fn runs_of_one_name_are_hosts_and_the_smallest_has_a_rail_per_rank() {
        let hosts = Hosts::of(&names("a a a b b c c"), 3);
        assert_eq!(hosts, Hosts { runs: vec![0..3, 3..5, 5..7], own: 1, local: 0, rails: 2 });
        assert_eq!(hosts.here(), 3..5);
        assert_eq!(
            hosts.others_on_rail(),
            [Some(0), None, None, None, None, Some(2), None],
            "the first rank of each other host"
        );
        assert!(!hosts.is_one() && !hosts.are_apart());
        let third = Hosts::of(&names("a a a b b c c"), 2);
        assert_eq!((third.rail(), third.others_on_rail()), (None, vec![None; 7]));
        assert_eq!(third.shares(5), [0..3, 3..5, 5..5]);
        assert_eq!(third.region(1, 14), 6..10);
    }

    #[test]
    fn a_rank_without_a_name_is_alone_and_a_host_may_come_twice() {
        assert!(Hosts::of(&names("- - -"), 1).are_apart());
        assert!(Hosts::of(&names("a a"), 1).is_one());
        assert_eq!(Hosts::of(&names("a b a"), 2).runs, [0..1, 1..2, 2..3]);
        assert_eq!(Hosts::of(&names("a"), 0).runs, std::slice::from_ref(&(0..1)));
    }
}
