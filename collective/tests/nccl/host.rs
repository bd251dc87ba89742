//! The crate's contract over NCCL: the same calls as over TCP, with the same bits.

use api::Rank;
use collective::nccl::{NcclCommunicator, NcclGroup};
use collective::{
    CollectiveError, Communicator, Group, LaneTree, ProcessGroup, ReduceOp, Reduction, chunk_range,
};

use crate::fake::{Counter, Fake};
use crate::ordered::{floats, lane_sums, views};
use crate::ranks::{groups, options};

const LENGTHS: [usize; 4] = [0, 3, 1000, 40_001];

pub fn check_all(group: NcclGroup, control: &mut ProcessGroup) {
    let mut over_nccl = NcclCommunicator::new(group, Reduction::Deterministic).unwrap();
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
    let own = lane_sums(&tree, rank, world, len);
    let mut sum = vec![0f32; len];
    group.reduce_lanes(&tree, &views(&own), (&mut sum).into()).unwrap();
    results.push(sum);
    results.extend(exchanges(group, &mine));
    if world > 1 {
        // Even ranks and odd ranks; then a group in a group.
        let ranks = (0..world).filter(|other| other % 2 == rank % 2).collect();
        let mut half = group.subgroup(&Group { name: "half".into(), ranks }).unwrap();
        assert_eq!(half.name(), format!("{}/half", group.name()));
        results.extend(exchanges(&mut *half, &mine));
        let alone = Group { name: "alone".into(), ranks: vec![half.rank().0] };
        results.extend(exchanges(&mut *half.subgroup(&alone).unwrap(), &mine));
        group.barrier().unwrap();
    }
    results.into_iter().map(|floats| floats.into_iter().map(f32::to_bits).collect()).collect()
}

/// What is in place, of several buffers, or between each two ranks.
fn exchanges(group: &mut dyn Communicator, mine: &[f32]) -> Vec<Vec<f32>> {
    let (rank, world) = (group.rank().0 as usize, group.world_size() as usize);
    let mut results = Vec::new();
    let mut output = vec![0f32; mine.len()];
    group.all_reduce_into(mine.into(), (&mut output).into(), ReduceOp::Sum).unwrap();
    results.push(output);
    let (mut first, mut second) = (mine.to_vec(), mine[mine.len() / 3..].to_vec());
    let mut several = [(&mut first).into(), (&mut second).into()];
    group.all_reduce_many(&mut several, ReduceOp::Avg).unwrap();
    results.extend([first, second]);
    group.all_reduce_many(&mut [], ReduceOp::Sum).unwrap();
    let mut buffer = mine.to_vec();
    group.reduce_scatter_in_place((&mut buffer).into(), ReduceOp::Sum).unwrap();
    results.push(buffer.clone());
    group.all_gather_in_place((&mut buffer).into()).unwrap();
    results.push(buffer);
    let even = &mine[..mine.len() / world * world];
    let mut output = vec![0f32; even.len()];
    group.all_to_all(even.into(), (&mut output).into()).unwrap();
    results.push(output);
    // A rank sends more to higher ranks, and nothing to the first.
    let unit = mine.len() / (world * world);
    let send: Vec<usize> = (0..world).map(|to| to * unit).collect();
    let receive = vec![rank * unit; world];
    let mut output = vec![0f32; receive.iter().sum()];
    let input = &mine[..send.iter().sum()];
    group.all_to_all_v(input.into(), &send, (&mut output).into(), &receive).unwrap();
    results.push(output);
    for root in 0..world {
        let at_root = root == rank;
        let mut whole = vec![0f32; mine.len() * world];
        let output = at_root.then_some((&mut whole).into());
        group.gather(mine.into(), output, Rank(root as u32)).unwrap();
        let mut part = vec![0f32; mine.len()];
        let input = at_root.then_some((&whole).into());
        group.scatter(input, (&mut part).into(), Rank(root as u32)).unwrap();
        assert!(part == mine, "what was gathered comes back");
        results.push(whole);
    }
    results
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
        let mut group = NcclCommunicator::new(group, Reduction::Deterministic).unwrap();
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

#[test]
fn lengths_that_do_not_meet_are_an_error_on_all_ranks() {
    let Some(fake) = Fake::build("lengths", &[]) else { return };
    let libraries = fake.open().unwrap();
    let errors = groups(&libraries, (3, 8), &options("world"), |group, _| {
        let mut group = NcclCommunicator::new(group, Reduction::Deterministic).unwrap();
        // r2 expects one element too many from r1.
        let receive = if group.rank().0 == 2 { [1, 2, 1] } else { [1, 1, 1] };
        let mut output = vec![0i32; receive.iter().sum()];
        let input = [1i32, 2, 3];
        let (input, output) = ((&input).into(), (&mut output).into());
        group.all_to_all_v(input, &[1, 1, 1], output, &receive).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("r1 sends 1 elements to r2, which expects 2"), "{error}");
    }
}

#[test]
fn a_subgroup_outlives_an_abort_of_its_parent_and_a_wrong_one_harms_nothing() {
    let Some(fake) = Fake::build("subgroup", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (2, 8), &options("world"), |group, control| {
        let mut group = NcclCommunicator::new(group, Reduction::Deterministic).unwrap();
        let wrong = Group { name: "wrong".into(), ranks: vec![0] };
        let error = group.subgroup(&wrong).err().unwrap();
        assert!(matches!(error, CollectiveError::InvalidOptions { .. }), "{error}");
        let all = Group { name: "all".into(), ranks: vec![0, 1] };
        let mut inner = group.subgroup(&all).unwrap();
        group.abort_handle().abort("only this one");
        assert!(group.barrier().unwrap_err().is_aborted());
        control.barrier().unwrap();
        let mut buffer = [half::bf16::ONE; 3];
        inner.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
        assert_eq!(buffer, [half::bf16::from_f32(2.0); 3]);
    });
}
