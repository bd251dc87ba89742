//! Every operation against a scalar reference, bit for bit.

use api::Rank;

use half::{bf16, f16};

use super::{Random, error, group};
use crate::buffer::ElementType;
use crate::element::Element;
use crate::{
    Buffer, BufferMut, CollectiveError, Communicator, LaneTree, Partial, ProcessGroup, ReduceOp,
    Subtree, chunk_range,
};

const WORLDS: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
/// Empty, shorter than the world, not divisible, around a block, and beyond the small path.
const LENGTHS: [usize; 6] = [0, 1, 5, 1000, 4097, 33_001];
pub(super) const SEED: u64 = 20_260_801;

/// The sum (or another reduction) as the tree says, over leaves in order.
fn tree_reduce<T: Element>(node: Subtree, leaves: &[T], op: ReduceOp) -> T {
    let Some((left, right)) = node.children() else { return leaves[node.start as usize] };
    let (a, b) = (tree_reduce(left, leaves, op), tree_reduce(right, leaves, op));
    match op {
        ReduceOp::Sum | ReduceOp::Avg => a.sum(b),
        ReduceOp::Max => a.largest(b),
        ReduceOp::Min => a.smallest(b),
    }
}

/// [`tree_reduce`] of every element of several buffers.
pub(super) fn tree_reduce_all<T: Element>(
    node: Subtree,
    buffers: &[Vec<T>],
    op: ReduceOp,
) -> Vec<T> {
    let mut leaves = vec![T::zeroed(); buffers.len()];
    (0..buffers[0].len())
        .map(|i| {
            leaves.iter_mut().zip(buffers).for_each(|(leaf, buffer)| *leaf = buffer[i]);
            tree_reduce(node, &leaves, op)
        })
        .collect()
}

/// The elements that a rank brings: the same on whichever rank they are made.
pub(super) fn data<T: Element>(rank: u32, len: usize) -> Vec<T> {
    let mut random = Random(SEED ^ (u64::from(rank) << 32) ^ len as u64);
    (0..len)
        .map(|_| {
            let float = random.float();
            let bits = random.next();
            let mut bytes = bits.to_le_bytes();
            match T::TYPE {
                ElementType::F32 => bytes[..4].copy_from_slice(&(float as f32).to_le_bytes()),
                ElementType::F64 => bytes = float.to_le_bytes(),
                ElementType::Bf16 => {
                    bytes[..2].copy_from_slice(&bf16::from_f64(float).to_le_bytes());
                }
                ElementType::F16 => {
                    bytes[..2].copy_from_slice(&f16::from_f64(float).to_le_bytes());
                }
                ElementType::I64 | ElementType::I32 | ElementType::U8 => {}
            }
            bytemuck::pod_read_unaligned(&bytes[..size_of::<T>()])
        })
        .collect()
}

pub(super) fn assert_bits<T: Element>(found: &[T], expected: &[T], what: &str) {
    let (found, expected): (&[u8], &[u8]) =
        (bytemuck::cast_slice(found), bytemuck::cast_slice(expected));
    assert!(found == expected, "{what}: the bits differ (seed {SEED})");
}

fn check_every_operation<T: Element + Send>(rank: u32, communicator: &mut ProcessGroup)
where
    for<'a> Buffer<'a>: From<&'a Vec<T>>,
    for<'a> BufferMut<'a>: From<&'a mut Vec<T>>,
{
    let world = communicator.world_size();
    let tree = LaneTree::new(world);
    let mut ops = vec![ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min];
    if T::TYPE.is_float() {
        ops.push(ReduceOp::Avg);
    }
    for len in LENGTHS {
        let all: Vec<Vec<T>> = (0..world).map(|rank| data(rank, len)).collect();
        let own = chunk_range(len, world, rank);
        let what = format!("{} × {len} on {rank} of {world}", T::TYPE);
        for op in &ops {
            let mut expected = tree_reduce_all(tree.root(), &all, *op);
            if *op == ReduceOp::Avg {
                expected.iter_mut().for_each(|value| *value = value.divided(world));
            }
            let mut buffer = all[rank as usize].clone();
            communicator.all_reduce((&mut buffer).into(), *op).unwrap();
            assert_bits(&buffer, &expected, &format!("all_reduce {op:?} of {what}"));

            let mut chunk = vec![T::zeroed(); own.len()];
            let input = &all[rank as usize];
            communicator.reduce_scatter(input.into(), (&mut chunk).into(), *op).unwrap();
            assert_bits(&chunk, &expected[own.clone()], &format!("reduce_scatter of {what}"));

            let mut output = vec![T::zeroed(); len];
            communicator.all_reduce_into(input.into(), (&mut output).into(), *op).unwrap();
            assert_bits(&output, &expected, &format!("all_reduce_into {op:?} of {what}"));

            let mut buffer = input.clone();
            communicator.reduce_scatter_in_place((&mut buffer).into(), *op).unwrap();
            let mut expected_buffer = input.clone();
            expected_buffer[own.clone()].copy_from_slice(&expected[own.clone()]);
            assert_bits(&buffer, &expected_buffer, &format!("in place of {what}"));

            let (mut left, mut right) = (input.clone(), input[..len / 3].to_vec());
            let mut buffers = [(&mut left).into(), (&mut right).into()];
            communicator.all_reduce_many(&mut buffers, *op).unwrap();
            assert_bits(&left, &expected, &format!("all_reduce_many of {what}"));
            assert_bits(&right, &expected[..len / 3], &format!("all_reduce_many of {what}"));
        }

        let whole = &all[0];
        let mut output = vec![T::zeroed(); len];
        output[own.clone()].copy_from_slice(&whole[own.clone()]);
        communicator.all_gather_in_place((&mut output).into()).unwrap();
        assert_bits(&output, whole, &format!("all_gather_in_place of {what}"));
        let mut output = vec![T::zeroed(); len];
        communicator.all_gather((&whole[own].to_vec()).into(), (&mut output).into()).unwrap();
        assert_bits(&output, whole, &format!("all_gather of {what}"));

        for root in 0..world {
            let mut buffer = all[rank as usize].clone();
            communicator.broadcast((&mut buffer).into(), Rank(root)).unwrap();
            assert_bits(&buffer, &all[root as usize], &format!("broadcast of {what}"));
        }

        // Round the ring: each sends to the next before it receives from the one before.
        if world > 1 {
            let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
            let mut buffer = vec![T::zeroed(); len];
            communicator.send((&all[rank as usize]).into(), Rank(next)).unwrap();
            communicator.recv((&mut buffer).into(), Rank(before)).unwrap();
            assert_bits(&buffer, &all[before as usize], &format!("send and recv of {what}"));
        }
        communicator.barrier().unwrap();
    }
}

#[test]
pub(super) fn every_operation_on_every_world_has_the_bits_of_the_reference() {
    for world in WORLDS {
        group(world, |rank, communicator| {
            check_every_operation::<f32>(rank, communicator);
            check_every_operation::<f64>(rank, communicator);
            check_every_operation::<i64>(rank, communicator);
            check_every_operation::<u8>(rank, communicator);
            check_every_operation::<bf16>(rank, communicator);
            check_every_operation::<f16>(rank, communicator);
            check_every_operation::<i32>(rank, communicator);
        });
    }
}

/// This rank's partials of the lanes' sums, as a trainer would fold them.
pub(super) fn partials<T: Element>(
    tree: &LaneTree,
    lanes: &[Vec<T>],
    rank: u32,
    world: u32,
) -> Vec<(Subtree, Vec<T>)> {
    tree.owned_subtrees(tree.lanes_of(rank, world))
        .into_iter()
        .map(|node| (node, tree_reduce_all(node, lanes, ReduceOp::Sum)))
        .collect()
}

/// The same to read, as a call takes them.
pub(super) fn views<T>(own: &[(Subtree, Vec<T>)]) -> Vec<Partial<'_>>
where
    for<'a> Buffer<'a>: From<&'a Vec<T>>,
{
    own.iter().map(|(subtree, data)| Partial { subtree: *subtree, data: data.into() }).collect()
}

#[test]
fn lanes_have_the_same_bits_on_any_number_of_ranks() {
    const LANES: [u32; 6] = [1, 2, 3, 6, 8, 11];
    const LENGTHS: [usize; 6] = [0, 1, 7, 4099, 12_289, 20_001];
    for lane_count in LANES {
        for world in 1..=lane_count {
            group(world, move |rank, communicator| {
                let tree = LaneTree::new(lane_count);
                for len in LENGTHS {
                    let lanes: Vec<Vec<f32>> = (0..lane_count).map(|l| data(l, len)).collect();
                    let own = partials(&tree, &lanes, rank, world);
                    let own = views(&own);
                    let mut output = vec![f32::NAN; len];
                    communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
                    let expected = tree_reduce_all(tree.root(), &lanes, ReduceOp::Sum);
                    let what = format!("{lane_count} lanes × {len} on {rank} of {world}");
                    assert_bits(&output, &expected, &what);
                }
                // Metric sums are f64.
                let lanes: Vec<Vec<f64>> = (0..lane_count).map(|l| data(l, 3)).collect();
                let own = partials(&tree, &lanes, rank, world);
                let own = views(&own);
                let mut output = [0.0f64; 3];
                communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
                let expected = partials(&tree, &lanes, 0, 1).remove(0).1;
                assert_bits(&output, &expected, "f64 lanes");
            });
        }
    }
}

#[test]
fn lanes_have_the_same_bits_whoever_owns_none() {
    for world in 2..=5u32 {
        group(world, move |rank, communicator| {
            let lanes = 6;
            // Every set of ranks without lanes that leaves one with, and the world's own tree between
            // them, so that what is kept of the last call must not be taken for the next.
            for idle in (0..(1u32 << world) - 1).flat_map(|idle| [idle, 0]) {
                let ranks = (0..world).filter(|rank| idle & 1 << rank != 0).map(Rank);
                let tree = LaneTree::new(lanes).without(ranks);
                for len in [0, 1, 4099, 40_001] {
                    let all: Vec<Vec<f32>> = (0..lanes).map(|lane| data(lane, len)).collect();
                    let own = partials(&tree, &all, rank, world);
                    assert_eq!(own.is_empty(), idle & 1 << rank != 0);
                    let own = views(&own);
                    let mut output = vec![f32::NAN; len];
                    communicator.reduce_lanes(&tree, &own, (&mut output).into()).unwrap();
                    let expected = tree_reduce_all(tree.root(), &all, ReduceOp::Sum);
                    let what = format!("{len} on {rank} of {world}, none on {idle:b}");
                    assert_bits(&output, &expected, &what);
                }
            }
        });
    }
}

#[test]
fn a_negative_zero_and_nan_survive() {
    for world in [1, 2, 3] {
        group(world, |rank, communicator| {
            let mut buffer = [-0.0f32, if rank == 0 { f32::NAN } else { 1.0 }];
            communicator.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
            assert_eq!(buffer[0].to_bits(), (-0.0f32).to_bits());
            let mut buffer = [if rank == 0 { f32::NAN } else { 1.0 }];
            communicator.all_reduce((&mut buffer).into(), ReduceOp::Max).unwrap();
            assert!(buffer[0].is_nan());
        });
    }
}

#[test]
pub(super) fn bytes_of_different_lengths_reach_every_rank_and_too_many_are_refused() {
    group(4, |rank, communicator| {
        for round in 0..3usize {
            let bytes = |rank: u32| vec![rank as u8; rank as usize * 100_000 * round];
            let all = communicator.gather_bytes(&bytes(rank)).unwrap();
            assert_eq!(all, (0..4).map(bytes).collect::<Vec<_>>());
        }
    });
    let results = group(4, |rank, communicator| {
        let much = vec![0; if rank == 2 { (4 << 20) + 1 } else { 1 }];
        error(communicator.gather_bytes(&much))
    });
    for (rank, error) in results.iter().enumerate() {
        if rank == 2 {
            assert!(matches!(error, CollectiveError::InvalidCall { .. }), "{error}");
        } else {
            assert_eq!(error.peer(), Some(Rank(2)), "{error}");
            assert!(error.to_string().contains("4194305 bytes"), "{error}");
        }
    }
}

#[test]
pub(super) fn two_ranks_may_send_much_to_each_other_at_the_same_time() {
    // Far more than the sockets hold.
    const LEN: usize = 3 << 20;
    group(3, |rank, communicator| {
        for round in 0..2 {
            let peers = (0..3).filter(|peer| *peer != rank);
            for peer in peers.clone() {
                let buffer = vec![(rank * 10 + peer) as i64 + round; LEN];
                communicator.send((&buffer).into(), Rank(peer)).unwrap();
            }
            for peer in peers {
                let mut buffer = vec![0i64; LEN];
                communicator.recv((&mut buffer).into(), Rank(peer)).unwrap();
                assert!(buffer.iter().all(|v| *v == (peer * 10 + rank) as i64 + round));
            }
        }
    });
}

#[test]
pub(super) fn a_rank_that_is_blocked_in_a_send_takes_what_others_send_to_it() {
    // Rank 2 waits for rank 0, which waits for room at rank 1, which waits for room at rank 2.
    const LEN: usize = 2 << 20;
    group(3, |rank, communicator| {
        let message = |from: u32| vec![i64::from(from); LEN];
        let send = |communicator: &mut ProcessGroup, to| {
            communicator.send((&message(rank)).into(), Rank(to)).unwrap();
        };
        let receive = |communicator: &mut ProcessGroup, from| {
            let mut buffer = vec![-1; LEN];
            communicator.recv((&mut buffer).into(), Rank(from)).unwrap();
            assert_eq!(buffer, message(from));
        };
        match rank {
            0 => [1, 2].into_iter().for_each(|to| send(communicator, to)),
            1 => {
                send(communicator, 2);
                receive(communicator, 0);
            }
            _ => [0, 1].into_iter().for_each(|from| receive(communicator, from)),
        }
    });
}

#[test]
pub(super) fn a_long_random_script_stays_in_step() {
    // Ranks run ahead of each other where a call lets them; nothing may be taken for another call.
    const WORLD: u32 = 4;
    println!("seed {SEED}");
    group(WORLD, |rank, communicator| {
        let mut random = Random(SEED);
        for step in 0..600i64 {
            let len = random.below(if step % 50 == 0 { 300_000 } else { 3000 }) as usize;
            let (a, b) = (random.below(4) as u32, random.below(4) as u32);
            match random.below(4) {
                0 => {
                    let mut buffer = vec![step + i64::from(rank); len];
                    communicator.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
                    assert!(buffer.iter().all(|v| *v == 4 * step + 6), "step {step}");
                }
                1 => {
                    let mut buffer = vec![step * i64::from(rank == a); len];
                    communicator.broadcast((&mut buffer).into(), Rank(a)).unwrap();
                    assert!(buffer.iter().all(|v| *v == step), "step {step}");
                }
                2 if a != b => {
                    if rank == a {
                        communicator.send((&vec![step; len]).into(), Rank(b)).unwrap();
                    } else if rank == b {
                        let mut buffer = vec![0; len];
                        communicator.recv((&mut buffer).into(), Rank(a)).unwrap();
                        assert!(buffer.iter().all(|v| *v == step), "step {step}");
                    }
                }
                _ => {
                    let all = communicator.gather_bytes(&step.to_le_bytes()).unwrap();
                    assert!(all.iter().all(|bytes| *bytes == step.to_le_bytes()), "step {step}");
                }
            }
        }
    });
}

super::also_over_memory_and_hosts!(
    every_operation_on_every_world_has_the_bits_of_the_reference,
    lanes_have_the_same_bits_on_any_number_of_ranks,
    lanes_have_the_same_bits_whoever_owns_none,
    a_negative_zero_and_nan_survive,
    bytes_of_different_lengths_reach_every_rank_and_too_many_are_refused,
    two_ranks_may_send_much_to_each_other_at_the_same_time,
    a_rank_that_is_blocked_in_a_send_takes_what_others_send_to_it,
    a_long_random_script_stays_in_step,
);
