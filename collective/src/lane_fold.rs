//! Adds finished lanes into the open subtrees of a rank, while the next lane is computed.
//!
//! Pure. Keeps one buffer per open subtree (at most one per level of the tree) and adds only where
//! the tree does: a lane is never added to a zero, because `0.0 + -0.0` would change a bit.

use crate::lane_tree::{LaneTree, Subtree};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// What a lane can be a sum of: `f32` or `f64`.
pub trait LaneElement: sealed::Sealed + Copy + Default + std::ops::AddAssign {}

impl LaneElement for f32 {}
impl LaneElement for f64 {}

/// Folds lanes, pushed in order, into maximal subtrees.
///
/// ```
/// # use collective::{LaneFold, LaneTree, Subtree};
/// let mut fold = LaneFold::<f32>::new(LaneTree::new(4));
/// for lane in 0..3 {
///     let mut sums = fold.take_buffer(1);
///     sums[0] = lane as f32;
///     fold.push(lane, sums);
/// }
/// let parts = fold.finish();
/// assert_eq!(parts[0], (Subtree { start: 0, len: 2 }, vec![1.0]));
/// assert_eq!(parts[1], (Subtree { start: 2, len: 1 }, vec![2.0]));
/// ```
#[derive(Clone, Debug)]
pub struct LaneFold<T: LaneElement> {
    tree: LaneTree,
    open: Vec<(Subtree, Vec<T>)>,
    spare: Vec<Vec<T>>,
}

impl<T: LaneElement> LaneFold<T> {
    /// An empty fold over a job's tree. The first lane pushed is the first of this rank's run.
    pub fn new(tree: LaneTree) -> Self {
        Self { tree, open: Vec::new(), spare: Vec::new() }
    }

    /// A zeroed buffer, an earlier one if there is one.
    pub fn take_buffer(&mut self, len: usize) -> Vec<T> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(len, T::default());
        buffer
    }

    /// Gives a buffer back for [`LaneFold::take_buffer`].
    pub fn recycle(&mut self, buffer: Vec<T>) {
        // One spare per level and one in the caller's hands is all that can ever be in use.
        if self.spare.len() <= self.tree.lanes().ilog2() as usize + 1 {
            self.spare.push(buffer);
        }
    }

    /// Adds the finished sum of a lane.
    ///
    /// # Panics
    /// If the lane is not in the tree, does not follow the last one, or has another length.
    pub fn push(&mut self, lane: u32, values: Vec<T>) {
        assert!(lane < self.tree.lanes(), "a lane of the tree");
        if let Some((last, sums)) = self.open.last() {
            assert_eq!(last.end(), lane, "lanes are pushed in order");
            assert_eq!(sums.len(), values.len(), "all lanes have the same length");
        }
        self.open.push((Subtree { start: lane, len: 1 }, values));
        self.fold_siblings();
    }

    /// The sums of the maximal subtrees of what was pushed, in lane order; the fold is empty again.
    pub fn finish(&mut self) -> Vec<(Subtree, Vec<T>)> {
        std::mem::take(&mut self.open)
    }

    fn fold_siblings(&mut self) {
        while let [.., (left, _), (right, _)] = self.open.as_slice()
            && let Some(parent) = self.tree.parent_of(*left, *right)
            && let Some((_, addend)) = self.open.pop()
            && let Some((node, sums)) = self.open.last_mut()
        {
            *node = parent;
            for (sum, value) in sums.iter_mut().zip(&addend) {
                *sum += *value;
            }
            self.recycle(addend);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree written down as a formula over strings of lanes.
    fn formula(node: Subtree, values: &[f32]) -> f32 {
        match node.children() {
            Some((left, right)) => formula(left, values) + formula(right, values),
            None => values[node.start as usize],
        }
    }

    #[test]
    fn a_fold_gives_the_owned_subtrees_with_the_bits_of_the_tree() {
        // Magnitudes far apart, so that another order gives other bits.
        let values: Vec<f32> =
            (0..23).map(|i| (1.0 + i as f32 * 0.37) * 10f32.powi(i % 7 - 3)).collect();
        for lanes in 1..=23u32 {
            let tree = LaneTree::new(lanes);
            for world in 1..=lanes {
                for rank in 0..world {
                    let run = tree.lanes_of(rank, world);
                    let mut fold = LaneFold::<f32>::new(tree.clone());
                    for lane in run.clone() {
                        let mut buffer = fold.take_buffer(1);
                        assert_eq!(buffer, [0.0], "a reused buffer is zeroed");
                        buffer[0] = values[lane as usize];
                        fold.push(lane, buffer);
                    }
                    let parts = fold.finish();
                    let nodes: Vec<_> = parts.iter().map(|(node, _)| *node).collect();
                    assert_eq!(nodes, tree.owned_subtrees(run));
                    for (node, sums) in parts {
                        let expected = formula(node, &values);
                        assert_eq!(sums[0].to_bits(), expected.to_bits(), "{node} of {lanes}");
                    }
                }
            }
        }
    }

    #[test]
    fn buffers_are_reused_and_bounded() {
        let mut fold = LaneFold::<f64>::new(LaneTree::new(8));
        let first = fold.take_buffer(100);
        let address = first.as_ptr();
        fold.recycle(first);
        let second = fold.take_buffer(50);
        assert_eq!(second.as_ptr(), address);
        for _ in 0..100 {
            fold.recycle(vec![0.0; 10]);
        }
        assert!(fold.spare.len() <= 5);
    }

    #[test]
    #[should_panic(expected = "lanes are pushed in order")]
    fn a_lane_out_of_order_is_refused() {
        let mut fold = LaneFold::<f32>::new(LaneTree::new(4));
        fold.push(0, vec![1.0]);
        fold.push(2, vec![1.0]);
    }
}
