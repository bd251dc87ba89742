//! The crate's contract over NCCL: the same calls as over TCP, with the same bits.

use api::Rank;
use collective::nccl::{NcclCommunicator, NcclGroup, Reduction};
use collective::{
    CollectiveError, Communicator, LaneTree, Partial, ReduceOp, TcpCommunicator, chunk_range,
};

use crate::fake::{Counter, Fake};
use crate::ordered::floats;
use crate::ranks::{groups, options};

const LENGTHS: [usize; 4] = [0, 3, 1000, 40_001];

pub fn check_all(group: NcclGroup, control: &mut TcpCommunicator) {
    let mut over_nccl = NcclCommunicator::new(group, Reduction::Ordered).unwrap();
    assert_eq!(over_nccl.generation(), control.generation());
    for len in LENGTHS {
        let expected = everything(control, len);
        assert!(everything(&mut over_nccl, len) == expected, "{len} elements");
    }
}

/// The bits of the results of all operations.
fn everything(group: &mut dyn Communicator, len: usize) -> Vec<Vec<u32>> {
    let (rank, world) = (group.rank().0, group.world_size());
    let mine = floats(u64::from(rank) + 1, len);
    let own = chunk_range(len, world, rank);
    let mut results = Vec::new();
    for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg] {
        let mut buffer = mine.clone();
        group.all_reduce((&mut buffer).into(), op).unwrap();
        results.push(buffer);
        let mut chunk = vec![0f32; own.len()];
        group.reduce_scatter((&mine).into(), (&mut chunk).into(), op).unwrap();
        results.push(chunk);
    }
    let mut whole = vec![0f32; len];
    group.all_gather((&mine[own].to_vec()).into(), (&mut whole).into()).unwrap();
    results.push(whole);
    for root in 0..world {
        let mut buffer = mine.clone();
        group.broadcast((&mut buffer).into(), Rank(root)).unwrap();
        results.push(buffer);
    }
    // Every rank first sends to its neighbours, then receives: as the stages of a pipeline.
    let others: Vec<Rank> =
        (0..world).filter(|other| other.abs_diff(rank) == 1).map(Rank).collect();
    for other in &others {
        group.send((&mine).into(), *other).unwrap();
    }
    for other in &others {
        let mut buffer = vec![0f32; len];
        group.recv((&mut buffer).into(), *other).unwrap();
        results.push(buffer);
    }
    group.barrier().unwrap();
    let words = format!("r{rank}").repeat(rank as usize);
    for bytes in group.gather_bytes(words.as_bytes()).unwrap() {
        results.push(bytes.into_iter().map(f32::from).collect());
    }
    let tree = LaneTree::new(8);
    let nodes = tree.owned_subtrees(tree.lanes_of(rank, world));
    let data: Vec<Vec<f32>> = nodes.iter().map(|n| floats(u64::from(n.start) + 9, len)).collect();
    let partials: Vec<Partial<'_>> = nodes
        .iter()
        .zip(&data)
        .map(|(subtree, data)| Partial { subtree: *subtree, data: data.into() })
        .collect();
    let mut sum = vec![0f32; len];
    group.reduce_lanes(&tree, &partials, (&mut sum).into()).unwrap();
    results.push(sum);
    results.into_iter().map(|floats| floats.into_iter().map(f32::to_bits).collect()).collect()
}

#[test]
fn host_buffers_over_nccl_get_the_bits_of_tcp() {
    for world in [1, 2, 3, 4] {
        let Some(fake) = Fake::build(&format!("host-{world}"), &[]) else { return };
        let libraries = fake.open().unwrap();
        groups(&libraries, (world, 8), &options("world"), check_all);
        assert_eq!(fake.count(Counter::Aborts), 0);
        assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
        fake.expect(Counter::Frees, fake.count(Counter::Allocations));
    }
}

#[test]
fn the_fast_reduction_is_nccls_own() {
    let Some(fake) = Fake::build("fast", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (3, 8), &options("world"), |group, _| {
        let mut group = NcclCommunicator::new(group, Reduction::Fast).unwrap();
        let rank = group.rank().0;
        let mut buffer = vec![i64::from(rank) + 1; 10];
        group.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
        assert_eq!(buffer, [6; 10]);
        let mut chunk = vec![0i64; chunk_range(10, 3, rank).len()];
        group.reduce_scatter((&buffer).into(), (&mut chunk).into(), ReduceOp::Max).unwrap();
        assert!(chunk.iter().all(|value| *value == 6));
    });
    assert_eq!(fake.count(Counter::Launches), 0);
}

#[test]
fn ranks_that_call_differently_get_an_error_both() {
    let Some(fake) = Fake::build("mismatch", &[]) else { return };
    let libraries = fake.open().unwrap();
    let errors = groups(&libraries, (2, 8), &options("world"), |group, _| {
        let mut group = NcclCommunicator::new(group, Reduction::Ordered).unwrap();
        let mut buffer = vec![0f32; 4 + group.rank().0 as usize];
        let error = group.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap_err();
        // The group is finished, and says so again.
        assert_eq!(group.barrier().unwrap_err().to_string(), error.to_string());
        error
    });
    for (error, part) in errors.iter().zip(["r1 called all_reduce(5", "r0 called all_reduce(4"]) {
        assert!(matches!(error, CollectiveError::InvalidCall { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}
