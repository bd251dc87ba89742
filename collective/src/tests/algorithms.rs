//! Every algorithm against the scalar reference: the same bits, but for the ring.

use api::Rank;

use super::results::{assert_bits, data, partials, tree_reduce_all, views};
use super::{REDUCTION, TCP, group};
use crate::{
    Algorithm, Communicator, LaneTree, ProcessGroup, ReduceOp, Reduction, Selection, TcpOptions,
};

/// Around a segment of the pipeline and of several, and less than an element per rank.
const LENGTHS: [usize; 5] = [0, 3, 1001, 66_000, 400_001];

fn choose(algorithm: Algorithm, reduction: Reduction) {
    REDUCTION.set(reduction);
    TCP.set(TcpOptions { selection: Selection::only(algorithm), ..TcpOptions::default() });
}

fn check_lanes(rank: u32, communicator: &mut ProcessGroup, lanes: u32, len: usize) {
    let (tree, world) = (LaneTree::new(lanes), communicator.world_size());
    let all: Vec<Vec<f32>> = (0..lanes).map(|lane| data(lane, len)).collect();
    let own = partials(&tree, &all, rank, world);
    let own = views(&own);
    let mut output = vec![f32::NAN; len];
    communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
    let expected = tree_reduce_all(tree.root(), &all, ReduceOp::Sum);
    assert_bits(&output, &expected, &format!("{lanes} lanes × {len} on {rank} of {world}"));
    // All but the last own none.
    let tree = tree.without((0..world - 1).map(Rank));
    let own = partials(&tree, &all, rank, world);
    let own = views(&own);
    communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
    assert_bits(&output, &expected, &format!("{lanes} lanes × {len} of {world}, all on one"));
}

#[test]
fn every_algorithm_has_the_bits_of_the_tree() {
    for algorithm in Algorithm::ALL {
        // The ring is not chosen where the order counts.
        choose(algorithm, Reduction::Deterministic);
        for world in [2, 3, 4, 8] {
            group(world, move |rank, communicator| {
                // The longest takes the reference long, and is cut into the most pieces by two ranks.
                let longest = if world > 2 { 66_000 } else { 400_001 };
                for len in LENGTHS.into_iter().filter(|len| *len <= longest) {
                    let all: Vec<Vec<f32>> = (0..world).map(|rank| data(rank, len)).collect();
                    for op in [ReduceOp::Avg, ReduceOp::Min] {
                        let tree = LaneTree::new(world);
                        let mut expected = tree_reduce_all(tree.root(), &all, op);
                        if op == ReduceOp::Avg {
                            expected.iter_mut().for_each(|value| *value /= world as f32);
                        }
                        let mut buffer = all[rank as usize].clone();
                        communicator.all_reduce((&mut buffer).into(), op).unwrap();
                        let what = format!("{algorithm} {op:?} × {len} on {rank} of {world}");
                        assert_bits(&buffer, &expected, &what);
                    }
                    for lanes in [8, 11] {
                        check_lanes(rank, communicator, lanes, len);
                    }
                }
            });
        }
    }
}

#[test]
fn a_fast_reduction_is_the_same_on_every_rank_and_near_the_sum() {
    for algorithm in Algorithm::ALL {
        choose(algorithm, Reduction::Fast);
        for world in [1, 2, 3, 4, 5] {
            let results = group(world, move |rank, communicator| {
                let mut results = Vec::new();
                for len in [0, 2, 5000, 200_001] {
                    let all: Vec<Vec<i64>> = (0..world).map(|rank| data(rank, len)).collect();
                    let mut buffer = all[rank as usize].clone();
                    communicator.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
                    let expected =
                        tree_reduce_all(LaneTree::new(world).root(), &all, ReduceOp::Sum);
                    assert_bits(&buffer, &expected, &format!("{algorithm} of integers"));

                    let mut buffer = vec![(rank + 1) as f32; len];
                    communicator.all_reduce((&mut buffer).into(), ReduceOp::Avg).unwrap();
                    let mean = (world + 1) as f32 / 2.0;
                    assert!(buffer.iter().all(|value| (value - mean).abs() < 1e-5));

                    // On all ranks, and on the first alone.
                    for idle in [1..1, 1..world] {
                        let (tree, lanes) = (LaneTree::new(7).without(idle.map(Rank)), 7);
                        let all: Vec<Vec<f32>> =
                            (0..lanes).map(|lane| vec![0.1 * (lane + 1) as f32; len]).collect();
                        let own = partials(&tree, &all, rank, world);
                        let own = views(&own);
                        let mut output = vec![f32::NAN; len];
                        communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
                        assert!(output.iter().all(|value| (value - 2.8).abs() < 1e-5));
                        results.push(output);
                    }
                }
                results
            });
            assert!(results.iter().all(|result| *result == results[0]), "{algorithm}, {world}");
        }
    }
}
