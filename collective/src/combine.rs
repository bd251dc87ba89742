//! Folds partials into one buffer in the order of the tree.
//!
//! Pure. Works block by block, so every partial is read once and the stack of open sums stays in
//! the cache; since each element is combined alone, neither the block length nor where a buffer is
//! cut into chunks changes a bit.

use crate::communicator::ReduceOp;
use crate::element::Element;
use crate::lane_tree::{LaneTree, Subtree};

/// Elements per block: a few levels of it fit the first-level cache.
const BLOCK: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Push a partial.
    Load(usize),
    /// Reduce the top with a partial.
    ReduceWith(usize),
    /// Reduce the second with the top, and pop it.
    Reduce,
}

/// The order in which partials are combined: a postfix walk of the tree.
#[derive(Debug)]
pub(crate) struct Plan {
    steps: Vec<Step>,
    /// Most sums open at one time.
    depth: usize,
    parts: usize,
}

impl Plan {
    /// The walk for partials of these nodes, in lane order; none if they do not tile the tree.
    pub(crate) fn new(tree: &LaneTree, nodes: &[Subtree]) -> Option<Self> {
        Self::of(tree.root(), nodes)
    }

    /// The walk for the sum of one node of the tree.
    pub(crate) fn of(node: Subtree, nodes: &[Subtree]) -> Option<Self> {
        let mut plan = Self { steps: Vec::new(), depth: 0, parts: 0 };
        plan.visit(node, nodes, 0)?;
        (plan.parts == nodes.len()).then_some(plan)
    }

    fn visit(&mut self, node: Subtree, nodes: &[Subtree], depth: usize) -> Option<()> {
        if nodes.get(self.parts) == Some(&node) {
            self.steps.push(Step::Load(self.parts));
            self.parts += 1;
            self.depth = self.depth.max(depth + 1);
            return Some(());
        }
        let (left, right) = node.children()?;
        self.visit(left, nodes, depth)?;
        if nodes.get(self.parts) == Some(&right) {
            self.steps.push(Step::ReduceWith(self.parts));
            self.parts += 1;
        } else {
            self.visit(right, nodes, depth + 1)?;
            self.steps.push(Step::Reduce);
        }
        Some(())
    }

    /// Combines the partials into `output`; an average is divided by `count` afterwards.
    ///
    /// # Panics
    /// If the partials are not those of the plan or differ from `output` in length.
    pub(crate) fn run<T: Element>(
        &self,
        parts: &[&[T]],
        output: &mut [T],
        op: ReduceOp,
        count: u32,
    ) {
        assert_eq!(parts.len(), self.parts, "one partial per node of the plan");
        for part in parts {
            assert_eq!(part.len(), output.len(), "partials are as long as their sum");
        }
        // Wider registers where the processor has them; each element is combined alone, so the
        // width changes no bit.
        pulp::Arch::new().dispatch(|| self.run_blocks(parts, output, op, count));
    }

    #[inline(always)]
    fn run_blocks<T: Element>(&self, parts: &[&[T]], output: &mut [T], op: ReduceOp, count: u32) {
        // The sums of two and of four ranks: one pass.
        if op == ReduceOp::Sum {
            match *self.steps.as_slice() {
                [Step::Load(a), Step::ReduceWith(b)] => {
                    let pairs = parts[a].iter().zip(parts[b]);
                    for (sum, (a, b)) in output.iter_mut().zip(pairs) {
                        *sum = a.sum(*b);
                    }
                    return;
                }
                [
                    Step::Load(a),
                    Step::ReduceWith(b),
                    Step::Load(c),
                    Step::ReduceWith(d),
                    Step::Reduce,
                ] => {
                    let left = parts[a].iter().zip(parts[b]);
                    let right = parts[c].iter().zip(parts[d]);
                    for (sum, ((a, b), (c, d))) in output.iter_mut().zip(left.zip(right)) {
                        *sum = a.sum(*b).sum(c.sum(*d));
                    }
                    return;
                }
                _ => {}
            }
        }
        let mut above = vec![T::zeroed(); (self.depth - 1) * BLOCK.min(output.len())];
        for (index, block) in output.chunks_mut(BLOCK).enumerate() {
            let start = index * BLOCK;
            let range = start..start + block.len();
            let mut depth = 0;
            for step in &self.steps {
                match *step {
                    Step::Load(part) => {
                        level(block, &mut above, depth)
                            .copy_from_slice(&parts[part][range.clone()]);
                        depth += 1;
                    }
                    Step::ReduceWith(part) => {
                        let sums = level(block, &mut above, depth - 1);
                        reduce(op, sums, &parts[part][range.clone()]);
                    }
                    Step::Reduce => {
                        depth -= 1;
                        reduce_top(op, block, &mut above, depth);
                    }
                }
            }
            if op == ReduceOp::Avg {
                block.iter_mut().for_each(|value| *value = value.divided(count));
            }
        }
    }
}

/// The open sum at a depth: the output itself, then the scratch above it.
#[inline(always)]
fn level<'a, T>(block: &'a mut [T], above: &'a mut [T], depth: usize) -> &'a mut [T] {
    let len = block.len();
    if depth == 0 { block } else { &mut above[(depth - 1) * len..][..len] }
}

/// Reduces the sum at `top - 1` with the one at `top`.
#[inline(always)]
fn reduce_top<T: Element>(op: ReduceOp, block: &mut [T], above: &mut [T], top: usize) {
    let len = block.len();
    let (below, upper) = above.split_at_mut((top - 1) * len);
    let sums = if top == 1 { block } else { &mut below[(top - 2) * len..] };
    reduce(op, sums, &upper[..len]);
}

#[inline(always)]
fn reduce<T: Element>(op: ReduceOp, sums: &mut [T], values: &[T]) {
    match op {
        ReduceOp::Sum | ReduceOp::Avg => zip(sums, values, T::sum),
        ReduceOp::Max => zip(sums, values, T::largest),
        ReduceOp::Min => zip(sums, values, T::smallest),
    }
}

#[inline(always)]
fn zip<T: Element>(sums: &mut [T], values: &[T], combine: impl Fn(T, T) -> T) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum = combine(*sum, *value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formula(node: Subtree, nodes: &[Subtree], values: &[f64]) -> f64 {
        if let Ok(index) = nodes.binary_search(&node) {
            return values[index];
        }
        let (left, right) = node.children().expect("a tiling covers every lane");
        formula(left, nodes, values) + formula(right, nodes, values)
    }

    #[test]
    fn any_tiling_is_combined_as_the_tree_says() {
        for lanes in 1..=17u32 {
            let tree = LaneTree::new(lanes);
            for world in 1..=lanes {
                let nodes: Vec<Subtree> = (0..world)
                    .flat_map(|rank| tree.owned_subtrees(tree.lanes_of(rank, world)))
                    .collect();
                let plan = Plan::new(&tree, &nodes).expect("ranks tile the lanes");
                for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5] {
                    let data: Vec<Vec<f64>> = (0..nodes.len())
                        .map(|part| {
                            let scale = 10f64.powi(part as i32 * 5 % 13 - 6);
                            (0..len).map(|i| (i as f64 * 0.7 + 1.3) * scale).collect()
                        })
                        .collect();
                    let parts: Vec<&[f64]> = data.iter().map(Vec::as_slice).collect();
                    let mut output = vec![0.0; len];
                    plan.run(&parts, &mut output, ReduceOp::Sum, 1);
                    for (i, sum) in output.iter().enumerate() {
                        let values: Vec<f64> = data.iter().map(|part| part[i]).collect();
                        let expected = formula(tree.root(), &nodes, &values);
                        assert_eq!(sum.to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn nodes_that_do_not_tile_the_tree_have_no_plan() {
        let tree = LaneTree::new(4);
        let node = |start, len| Subtree { start, len };
        for nodes in [
            vec![],
            vec![node(0, 2)],
            vec![node(0, 2), node(2, 1)],
            vec![node(0, 1), node(1, 2), node(3, 1)],
            vec![node(0, 4), node(0, 4)],
            vec![node(2, 2), node(0, 2)],
        ] {
            assert!(Plan::new(&tree, &nodes).is_none(), "{nodes:?}");
        }
    }
}
