//! Who has which partials of a tree, and how all of them become one sum.

use api::Rank;

use crate::combine::Plan;
use crate::communicator::ReduceOp;
use crate::element::Element;
use crate::lane_tree::{LaneTree, Subtree};

/// Elements that are copied aside at a time where a sum replaces one of its own parts: what is
/// copied stays in the first-level cache.
const BLOCK: usize = 1024;
/// Parts of a sum that are listed without taking memory.
const FEW_PARTS: usize = 16;

/// The partials of all ranks of a group.
#[derive(Debug)]
pub(crate) struct Combination {
    tree: LaneTree,
    /// Partials of each rank.
    pub counts: Vec<usize>,
    /// Partials of other ranks than this one, of those below each.
    pub before: Vec<usize>,
    /// Partials of all other ranks.
    pub foreign: usize,
    /// Every rank has one partial, and neighbours combine: pairs, then pairs of pairs …
    pub pairs: bool,
    plan: Plan,
    own: Rank,
}

impl Combination {
    pub(crate) fn new(tree: &LaneTree, own: Rank, world: u32) -> Self {
        let nodes =
            (0..world).map(|rank| tree.owned_subtrees(tree.lanes_of(rank, world))).collect();
        Self::of(tree, own, nodes)
    }

    /// The partials of members that have these nodes, in lane order; this process is one of them.
    pub(crate) fn of(tree: &LaneTree, own: Rank, nodes: Vec<Vec<Subtree>>) -> Self {
        let counts: Vec<usize> = nodes.iter().map(Vec::len).collect();
        let mut foreign = 0;
        let mut before = Vec::with_capacity(counts.len());
        for (rank, count) in counts.iter().enumerate() {
            before.push(foreign);
            foreign += if rank == own.0 as usize { 0 } else { *count };
        }
        let nodes = nodes.concat();
        let pairs = counts.iter().all(|count| *count == 1) && are_pairs(tree, nodes.clone());
        let plan = Plan::new(tree, &nodes).expect("runs of lanes in rank order tile the tree");
        Self { tree: tree.clone(), counts, before, foreign, pairs, plan, own }
    }

    /// Whether it is that of a tree.
    pub(crate) fn is_of(&self, tree: &LaneTree) -> bool {
        self.tree == *tree
    }

    /// Two parts, the left one first.
    pub(crate) fn of_two(own: Rank) -> Self {
        Self::new(&LaneTree::new(2), own, 2)
    }

    /// Combines this rank's partials with those of the others, which are given one after another
    /// in rank order, into `output`; an average is divided by `count`.
    pub(crate) fn run<T: Element>(
        &self,
        own: &[&[T]],
        others: &[T],
        output: &mut [T],
        op: ReduceOp,
        count: u32,
    ) {
        let mut few: [&[T]; FEW_PARTS] = [&[]; FEW_PARTS];
        let mut many = Vec::new();
        let parts = list(&mut few, &mut many, own.len() + self.foreign);
        let len = output.len();
        let split = self.before[self.own.0 as usize];
        for (index, part) in parts.iter_mut().enumerate() {
            *part = match index.checked_sub(split) {
                Some(index) if index < own.len() => own[index],
                after => {
                    let other = after.map_or(index, |_| index - own.len());
                    &others[other * len..][..len]
                }
            };
        }
        self.plan.run(parts, output, op, count);
    }

    /// The same where this rank's only partial is `output` itself.
    pub(crate) fn run_in_place<T: Element>(
        &self,
        others: &[T],
        output: &mut [T],
        op: ReduceOp,
        count: u32,
    ) {
        let len = output.len();
        let own = self.before[self.own.0 as usize];
        let mut copy = [T::zeroed(); BLOCK];
        for (index, block) in output.chunks_mut(BLOCK).enumerate() {
            let copy = &mut copy[..block.len()];
            copy.copy_from_slice(block);
            let mut few: [&[T]; FEW_PARTS] = [&[]; FEW_PARTS];
            let mut many = Vec::new();
            let parts = list(&mut few, &mut many, 1 + self.foreign);
            for (part, slot) in parts.iter_mut().enumerate() {
                let other = if part < own { part } else { part.wrapping_sub(1) };
                *slot = if part == own {
                    copy
                } else {
                    &others[other * len + index * BLOCK..][..block.len()]
                };
            }
            self.plan.run(parts, block, op, count);
        }
    }
}

/// Places for that many parts.
fn list<'b, 'a, T>(
    few: &'b mut [&'a [T]; FEW_PARTS],
    many: &'b mut Vec<&'a [T]>,
    parts: usize,
) -> &'b mut [&'a [T]] {
    if parts <= FEW_PARTS {
        return &mut few[..parts];
    }
    many.resize(parts, &[]);
    many.as_mut_slice()
}

/// Whether nodes combine as neighbours, level by level, to the whole tree.
fn are_pairs(tree: &LaneTree, mut nodes: Vec<Subtree>) -> bool {
    while nodes.len() > 1 {
        let parents = nodes.chunks(2).map(|pair| match pair {
            [left, right] => tree.parent_of(*left, *right),
            _ => None,
        });
        let Some(parents) = parents.collect::<Option<Vec<_>>>() else { return false };
        nodes = parents;
    }
    nodes == [tree.root()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_combine_where_every_rank_has_one_aligned_subtree() {
        for (lanes, world, expected) in [
            (1, 1, true),
            (2, 2, true),
            (8, 4, true),
            (8, 8, true),
            (7, 4, true),
            (3, 3, false),
            (6, 2, false),
            (12, 4, false),
            (8, 3, false),
        ] {
            let combination = Combination::new(&LaneTree::new(lanes), Rank(0), world);
            assert_eq!(combination.pairs, expected, "{lanes} lanes on {world}");
        }
    }

    #[test]
    fn in_place_gives_the_same_bits() {
        let (tree, len) = (LaneTree::new(5), 3 * BLOCK + 7);
        let parts: Vec<Vec<f32>> = (0..5)
            .map(|part| (0..len).map(|i| (i as f32 + 0.3) * 10f32.powi(part * 3 - 6)).collect())
            .collect();
        for rank in 0..5 {
            let combination = Combination::new(&tree, Rank(rank), 5);
            let own = parts[rank as usize].as_slice();
            let others: Vec<Vec<f32>> =
                parts.iter().filter(|part| part.as_slice() != own).cloned().collect();
            let others = others.concat();
            let mut output = vec![0.0; len];
            combination.run(&[own], &others, &mut output, ReduceOp::Avg, 5);
            let mut buffer = own.to_vec();
            combination.run_in_place(&others, &mut buffer, ReduceOp::Avg, 5);
            assert!(output.iter().zip(&buffer).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}
