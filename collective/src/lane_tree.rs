//! The fixed binary tree over the lanes of a job.
//!
//! Pure arithmetic on `(start, len)`. The tree is a function of the number of lanes alone, so the
//! order of a sum belongs to the data and not to the ranks.

use std::fmt;
use std::ops::Range;

use api::Rank;

/// A node of a [`LaneTree`]: the lanes `start .. start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subtree {
    /// Its first lane.
    pub start: u32,
    /// How many lanes it holds; never 0 in a tree.
    pub len: u32,
}

impl Subtree {
    /// The lane after its last.
    pub fn end(self) -> u32 {
        self.start + self.len
    }

    /// The two halves whose sum it is; none for a single lane.
    ///
    /// The left half holds the largest power of two of lanes that leaves the right one non-empty.
    pub fn children(self) -> Option<(Self, Self)> {
        if self.len < 2 {
            return None;
        }
        let left = 1 << (self.len - 1).ilog2();
        Some((
            Self { start: self.start, len: left },
            Self { start: self.start + left, len: self.len - left },
        ))
    }
}

impl fmt::Display for Subtree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

/// Most lanes of a tree: a call tells them to the peers in 16 bits.
const LANES_MAX: u32 = u16::MAX as u32;

/// The tree over lanes `0 .. lanes`, and which ranks own none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneTree {
    lanes: u32,
    /// In order, each once.
    idle: Vec<Rank>,
}

impl LaneTree {
    /// The tree over that many lanes, which all ranks share.
    ///
    /// # Panics
    /// If there are no lanes, or more than 65,535.
    pub fn new(lanes: u32) -> Self {
        assert!(lanes > 0, "a job has at least one lane");
        assert!(lanes <= LANES_MAX, "lanes are told in 16 bits");
        Self { lanes, idle: Vec::new() }
    }

    /// The same tree, whose lanes the other ranks share: these bring nothing to a sum, and get it.
    pub fn without(self, ranks: impl IntoIterator<Item = Rank>) -> Self {
        let mut idle: Vec<Rank> = ranks.into_iter().collect();
        idle.sort_unstable();
        idle.dedup();
        Self { idle, ..self }
    }

    /// The number of lanes.
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// All lanes: the node whose sum is the result.
    pub fn root(&self) -> Subtree {
        Subtree { start: 0, len: self.lanes }
    }

    /// The contiguous run of whole lanes that a rank owns: near-equal, the first ranks get what
    /// does not divide. Empty where the next one begins for a rank [`LaneTree::without`] lanes, and
    /// for some ranks if there are more than lanes.
    ///
    /// # Panics
    /// If `rank` is not below `world_size`, or no rank owns a lane.
    pub fn lanes_of(&self, rank: u32, world_size: u32) -> Range<u32> {
        assert!(rank < world_size, "lanes belong to a rank below the world size");
        let owners = self.owners(world_size);
        assert!(owners > 0, "some rank owns the lanes");
        let edge = |owner: u32| self.lanes / owners * owner + (self.lanes % owners).min(owner);
        edge(self.owners(rank))..edge(self.owners(rank + 1))
    }

    /// How many of the ranks below `rank` may own lanes.
    pub(crate) fn owners(&self, rank: u32) -> u32 {
        rank - self.idle.partition_point(|idle| idle.0 < rank) as u32
    }

    /// What of it must agree between ranks, for [`crate::call::Call::detail`]: the lanes, and above
    /// them how many ranks own none.
    pub(crate) fn detail(&self) -> u32 {
        self.lanes | (self.idle.len() as u32) << u16::BITS
    }

    /// The maximal subtrees that lie wholly inside a run of lanes, in lane order; at most two per
    /// level of the tree. Lanes outside the tree own nothing.
    pub fn owned_subtrees(&self, lanes: Range<u32>) -> Vec<Subtree> {
        let mut owned = Vec::new();
        collect_owned(self.root(), &lanes, &mut owned);
        owned
    }

    /// The node whose children `left` and `right` are, if they are siblings of this tree.
    pub(crate) fn parent_of(&self, left: Subtree, right: Subtree) -> Option<Subtree> {
        let mut node = self.root();
        loop {
            let (a, b) = node.children()?;
            if (a, b) == (left, right) {
                return Some(node);
            }
            node = if left.start < b.start { a } else { b };
        }
    }
}

fn collect_owned(node: Subtree, lanes: &Range<u32>, owned: &mut Vec<Subtree>) {
    if lanes.start <= node.start && node.end() <= lanes.end {
        owned.push(node);
    } else if lanes.start < node.end()
        && node.start < lanes.end
        && let Some((left, right)) = node.children()
    {
        collect_owned(left, lanes, owned);
        collect_owned(right, lanes, owned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(lanes: u32, run: Range<u32>) -> String {
        let owned = LaneTree::new(lanes).owned_subtrees(run);
        owned.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn owned_subtrees_are_maximal() {
        for (lanes, run, expected) in [
            (8, 0..8, "0..8"),
            (8, 0..3, "0..2 2..3"),
            (8, 3..6, "3..4 4..6"),
            (8, 1..7, "1..2 2..4 4..6 6..7"),
            (6, 0..6, "0..6"),
            (6, 4..6, "4..6"),
            (6, 3..6, "3..4 4..6"),
            (7, 4..7, "4..7"),
            (5, 2..5, "2..4 4..5"),
            (1, 0..1, "0..1"),
            (8, 4..4, ""),
        ] {
            assert_eq!(shown(lanes, run.clone()), expected, "lanes {lanes}, run {run:?}");
        }
    }

    #[test]
    fn runs_tile_the_lanes_and_a_rank_owns_few_subtrees() {
        for lanes in 1..=40 {
            let tree = LaneTree::new(lanes);
            let bound = 2 * (lanes.ilog2() as usize + 1);
            for world in 1..=lanes + 3 {
                let mut next = 0;
                for rank in 0..world {
                    let run = tree.lanes_of(rank, world);
                    assert_eq!(run.start, next);
                    next = run.end;
                    let owned = tree.owned_subtrees(run.clone());
                    assert_eq!(owned.iter().map(|s| s.len).sum::<u32>(), run.len() as u32);
                    assert!(owned.len() <= bound, "{} of at most {bound}", owned.len());
                }
                assert_eq!(next, lanes);
            }
        }
    }

    #[test]
    fn ranks_without_lanes_leave_them_to_the_others_in_order() {
        for (idle, expected) in [
            (&[][..], ["0..3", "3..6", "6..8"]),
            (&[1], ["0..4", "4..4", "4..8"]),
            (&[0], ["0..0", "0..4", "4..8"]),
            (&[2, 2], ["0..4", "4..8", "8..8"]),
            (&[2, 0], ["0..0", "0..8", "8..8"]),
        ] {
            let tree = LaneTree::new(8).without(idle.iter().copied().map(Rank));
            let runs = [0, 1, 2].map(|rank| tree.lanes_of(rank, 3));
            assert_eq!(runs.map(|run| format!("{}..{}", run.start, run.end)), expected);
        }
    }

    #[test]
    fn only_siblings_have_a_parent() {
        let tree = LaneTree::new(6);
        let node = |start, len| Subtree { start, len };
        assert_eq!(tree.parent_of(node(0, 4), node(4, 2)), Some(node(0, 6)));
        assert_eq!(tree.parent_of(node(2, 1), node(3, 1)), Some(node(2, 2)));
        assert_eq!(tree.parent_of(node(1, 1), node(2, 1)), None);
        assert_eq!(tree.parent_of(node(3, 1), node(4, 2)), None);
    }
}
