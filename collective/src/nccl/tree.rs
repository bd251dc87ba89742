//! The fixed-order sum: whose partials go where, and in which order a rank adds them.
//!
//! Pure. Every rank owns a range of the result. It gets that range of every partial, in the order
//! of their lanes, and adds them as [`LaneTree`] says: the same additions as on the CPU
//! (`combine.rs`), so the same bits.

use std::ops::Range;

use crate::chunk::chunk_range;
use crate::lane_tree::{LaneTree, Subtree};

/// Results up to this are summed whole by every rank: one exchange instead of two.
const DIRECT_BYTES: usize = 64 * 1024;

/// `slots[left] += slots[right]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Add {
    pub left: usize,
    pub right: usize,
}

/// The additions that leave the sum of all partials in slot 0; none if they do not tile the tree.
pub(super) fn additions(tree: &LaneTree, nodes: &[Subtree]) -> Option<Vec<Add>> {
    let (mut adds, mut next) = (Vec::new(), 0);
    visit(tree.root(), nodes, &mut next, &mut adds)?;
    (next == nodes.len()).then_some(adds)
}

/// The slot in which a node's sum is after the additions so far.
fn visit(node: Subtree, nodes: &[Subtree], next: &mut usize, adds: &mut Vec<Add>) -> Option<usize> {
    if nodes.get(*next) == Some(&node) {
        *next += 1;
        return Some(*next - 1);
    }
    let (left, right) = node.children()?;
    let left = visit(left, nodes, next, adds)?;
    let right = visit(right, nodes, next, adds)?;
    adds.push(Add { left, right });
    Some(left)
}

/// Who sums what.
#[derive(Debug)]
pub(super) struct Layout {
    rank: u32,
    world: u32,
    len: usize,
    /// Every rank sums everything.
    pub direct: bool,
    /// The partials of every rank, in lane order.
    pub nodes: Vec<Vec<Subtree>>,
    pub adds: Vec<Add>,
}

impl Layout {
    /// For a result of `len` elements of `bytes` each; `scatter` leaves it in the ranks' chunks.
    /// None if there are more ranks to share the lanes than lanes, or no rank.
    pub(super) fn new(
        tree: &LaneTree,
        (rank, world): (u32, u32),
        (len, bytes): (usize, usize),
        scatter: bool,
    ) -> Option<Self> {
        let owners = tree.owners(world);
        if owners == 0 || owners > tree.lanes() {
            return None;
        }
        let nodes: Vec<Vec<Subtree>> =
            (0..world).map(|rank| tree.owned_subtrees(tree.lanes_of(rank, world))).collect();
        let adds = additions(tree, &nodes.concat())?;
        let direct = !scatter && len.saturating_mul(bytes) <= DIRECT_BYTES;
        Some(Self { rank, world, len, direct, nodes, adds })
    }

    /// What a rank sums.
    pub(super) fn range_of(&self, rank: u32) -> Range<usize> {
        if self.direct { 0..self.len } else { chunk_range(self.len, self.world, rank) }
    }

    /// What this rank sums.
    pub(super) fn own(&self) -> Range<usize> {
        self.range_of(self.rank)
    }

    /// Lengths of the ranks' chunks.
    pub(super) fn lens(&self) -> Vec<usize> {
        (0..self.world).map(|rank| chunk_range(self.len, self.world, rank).len()).collect()
    }

    /// How many partials there are in all.
    pub(super) fn slots(&self) -> usize {
        self.nodes.iter().map(Vec::len).sum()
    }

    /// The slots of a rank's partials.
    pub(super) fn slots_of(&self, rank: u32) -> Range<usize> {
        let before: usize = self.nodes[..rank as usize].iter().map(Vec::len).sum();
        before..before + self.nodes[rank as usize].len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::combine::Plan;
    use crate::communicator::ReduceOp;

    #[test]
    fn the_additions_have_the_bits_of_the_specification() {
        for lanes in 1..=17u32 {
            let tree = LaneTree::new(lanes);
            for world in 1..=lanes {
                let layout = Layout::new(&tree, (0, world), (1, 4), false).unwrap();
                let nodes = layout.nodes.concat();
                let values: Vec<[f32; 1]> = (0..nodes.len())
                    .map(|slot| [(slot as f32 * 0.7 + 1.3) * 10f32.powi(slot as i32 * 5 % 13 - 6)])
                    .collect();
                let parts: Vec<&[f32]> = values.iter().map(<[f32; 1]>::as_slice).collect();
                let mut expected = [0.0];
                let plan = Plan::new(&tree, &nodes).unwrap();
                plan.run(&parts, &mut expected, ReduceOp::Sum, 1);
                let mut slots: Vec<f32> = values.iter().map(|value| value[0]).collect();
                for Add { left, right } in &layout.adds {
                    slots[*left] += slots[*right];
                }
                assert_eq!(slots[0].to_bits(), expected[0].to_bits(), "{lanes} on {world}");
            }
        }
    }

    #[test]
    fn slots_follow_the_lanes_and_partials_that_do_not_tile_have_no_sum() {
        let tree = LaneTree::new(8);
        let layout = Layout::new(&tree, (1, 3), (100_000, 4), false).unwrap();
        assert_eq!([0, 1, 2].map(|rank| layout.slots_of(rank)), [0..2, 2..4, 4..5]);
        assert_eq!((layout.slots(), layout.lens().iter().sum()), (5, 100_000));
        assert!(!layout.direct);
        assert!(Layout::new(&tree, (0, 9), (1, 4), false).is_none());
        let node = |start, len| Subtree { start, len };
        for nodes in [vec![], vec![node(0, 4)], vec![node(0, 8), node(0, 8)]] {
            assert_eq!(additions(&tree, &nodes), None);
        }
    }
}
