//! Every operation on device memory, of every type, in place and out of place.

use api::Rank;
use collective::ElementType;
use collective::ReduceOp;
use collective::nccl::NcclGroup;

use crate::elements::{assert_holds, upload};
use crate::fake::{Counter, Fake};
use crate::ranks::{groups, options};

/// What a rank brings at an index: small, so that every type holds every sum.
fn value(rank: u32, index: usize) -> i64 {
    i64::from(rank) * 3 + (index % 5) as i64 + 1
}

fn values(rank: u32, len: usize) -> Vec<i64> {
    (0..len).map(|index| value(rank, index)).collect()
}

/// The reduction of what all ranks bring; none if it is not whole.
fn reduced(world: u32, op: ReduceOp, len: usize) -> Option<Vec<i64>> {
    let over = |index| (0..world).map(move |rank| value(rank, index));
    (0..len)
        .map(|index| match op {
            ReduceOp::Sum => Some(over(index).sum()),
            ReduceOp::Max => over(index).max(),
            ReduceOp::Min => over(index).min(),
            ReduceOp::Avg => {
                let sum: i64 = over(index).sum();
                (sum % i64::from(world) == 0).then_some(sum / i64::from(world))
            }
        })
        .collect()
}

pub fn check_all(group: &mut NcclGroup) {
    for element in ElementType::ALL {
        check_reductions(group, element);
        check_gathers(group, element);
        check_exchanges(group, element);
        group.barrier().unwrap().wait().unwrap();
    }
}

fn check_reductions(group: &mut NcclGroup, element: ElementType) {
    let (world, rank) = (group.world_size(), group.rank().0);
    let n = 7;
    let len = n * world as usize;
    let own = rank as usize * n..(rank as usize + 1) * n;
    for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg] {
        let input = upload(group, element, &values(rank, len));
        let output = upload(group, element, &vec![0; len]);
        if op == ReduceOp::Avg && !element.is_float() {
            assert!(group.all_reduce(&input, &output, op).is_err());
            continue;
        }
        let Some(expected) = reduced(world, op, len) else { continue };
        group.all_reduce(&input, &output, op).unwrap().wait().unwrap();
        assert_holds(group, &output, &expected, "all_reduce");
        assert_holds(group, &input, &values(rank, len), "the input of all_reduce");

        let part = upload(group, element, &[0; 7]);
        group.reduce_scatter(&input, &part, op).unwrap().wait().unwrap();
        assert_holds(group, &part, &expected[own.clone()], "reduce_scatter");

        // Lengths that differ: the last rank has what is left.
        let lens: Vec<usize> = (0..world as usize)
            .map(|r| if r == 0 { len - (world as usize - 1) } else { 1 })
            .collect();
        let start: usize = lens[..rank as usize].iter().sum();
        let part = upload(group, element, &vec![0; lens[rank as usize]]);
        let mut calls = group.calls();
        calls.reduce_scatter_v(&input, &part, &lens, op).unwrap();
        group.run(calls).unwrap().wait().unwrap();
        let mine = &expected[start..start + lens[rank as usize]];
        assert_holds(group, &part, mine, "reduce_scatter_v");

        let part = input.slice(own.clone()).unwrap();
        group.reduce_scatter(&input, &part, op).unwrap().wait().unwrap();
        assert_holds(group, &part, &expected[own.clone()], "reduce_scatter in place");

        let input = upload(group, element, &values(rank, len));
        group.all_reduce(&input, &input, op).unwrap().wait().unwrap();
        assert_holds(group, &input, &expected, "all_reduce in place");
    }
}

fn check_gathers(group: &mut NcclGroup, element: ElementType) {
    let (world, rank) = (group.world_size(), group.rank().0);
    let n = 5;
    let own = rank as usize * n..(rank as usize + 1) * n;
    let all: Vec<i64> = (0..world).flat_map(|rank| values(rank, n)).collect();
    let input = upload(group, element, &values(rank, n));
    let output = upload(group, element, &vec![0; all.len()]);
    group.all_gather(&input, &output).unwrap().wait().unwrap();
    assert_holds(group, &output, &all, "all_gather");

    let mut mixed = vec![0; all.len()];
    mixed[own.clone()].copy_from_slice(&values(rank, n));
    let output = upload(group, element, &mixed);
    let part = output.slice(own.clone()).unwrap();
    group.all_gather(&part, &output).unwrap().wait().unwrap();
    assert_holds(group, &output, &all, "all_gather in place");

    let lens: Vec<usize> = (0..world as usize).collect();
    let all_v: Vec<i64> = (0..world).flat_map(|rank| values(rank, rank as usize)).collect();
    let input_v = upload(group, element, &values(rank, rank as usize));
    let output_v = upload(group, element, &vec![0; all_v.len()]);
    let mut calls = group.calls();
    calls.all_gather_v(&input_v, &output_v, &lens).unwrap();
    group.run(calls).unwrap().wait().unwrap();
    assert_holds(group, &output_v, &all_v, "all_gather_v");

    let root = Rank(world - 1);
    let input = upload(group, element, &values(rank, n));
    let output = upload(group, element, &[0; 5]);
    group.broadcast(&input, &output, root).unwrap().wait().unwrap();
    assert_holds(group, &output, &values(root.0, n), "broadcast");
    group.broadcast(&input, &input, root).unwrap().wait().unwrap();
    assert_holds(group, &input, &values(root.0, n), "broadcast in place");

    let input = upload(group, element, &values(rank, n));
    let whole = upload(group, element, &vec![0; all.len()]);
    let is_root = rank == root.0;
    group.gather(&input, is_root.then_some(&whole), root).unwrap().wait().unwrap();
    let expected = if is_root { all.clone() } else { vec![0; all.len()] };
    assert_holds(group, &whole, &expected, "gather");

    let part = upload(group, element, &[0; 5]);
    group.scatter(is_root.then_some(&whole), &part, root).unwrap().wait().unwrap();
    assert_holds(group, &part, &all[own], "scatter");
}

fn check_exchanges(group: &mut NcclGroup, element: ElementType) {
    let (world, rank) = (group.world_size(), group.rank().0);
    let n = 3;
    // What rank r has for rank s.
    let parcel = |from: u32, to: u32| vec![i64::from(from * 8 + to); n];
    let out: Vec<i64> = (0..world).flat_map(|to| parcel(rank, to)).collect();
    let arrived: Vec<i64> = (0..world).flat_map(|from| parcel(from, rank)).collect();
    let input = upload(group, element, &out);
    let output = upload(group, element, &vec![0; out.len()]);
    group.all_to_all(&input, &output).unwrap().wait().unwrap();
    assert_holds(group, &output, &arrived, "all_to_all");

    // Rank r sends s + 1 elements to rank s.
    let send_lens: Vec<usize> = (0..world as usize).map(|to| to + 1).collect();
    let recv_lens = vec![rank as usize + 1; world as usize];
    let out: Vec<i64> = (0..world)
        .flat_map(|to| std::iter::repeat_n(i64::from(rank * 8 + to), to as usize + 1))
        .collect();
    let arrived: Vec<i64> = (0..world)
        .flat_map(|from| std::iter::repeat_n(i64::from(from * 8 + rank), rank as usize + 1))
        .collect();
    let input = upload(group, element, &out);
    let output = upload(group, element, &vec![0; arrived.len()]);
    group.all_to_all_v(&input, &send_lens, &output, &recv_lens).unwrap().wait().unwrap();
    assert_holds(group, &output, &arrived, "all_to_all_v");

    if world > 1 {
        // A ring in one group, together with a collective.
        let (next, previous) = (Rank((rank + 1) % world), Rank((rank + world - 1) % world));
        let input = upload(group, element, &values(rank, 4));
        let output = upload(group, element, &[0; 4]);
        let sum = upload(group, element, &values(rank, 4));
        let mut calls = group.calls();
        calls.send(&input, next).unwrap();
        calls.recv(&output, previous).unwrap();
        calls.all_reduce(&sum, &sum, ReduceOp::Sum).unwrap();
        group.run(calls).unwrap().wait().unwrap();
        assert_holds(group, &output, &values(previous.0, 4), "send and recv");
        let expected = reduced(world, ReduceOp::Sum, 4).unwrap();
        assert_holds(group, &sum, &expected, "an all_reduce with them");
        // Alone, one after the other.
        if rank == 0 {
            group.send(&input, Rank(1)).unwrap().wait().unwrap();
        } else if rank == 1 {
            group.recv(&output, Rank(0)).unwrap().wait().unwrap();
            assert_holds(group, &output, &values(0, 4), "recv");
        }
    }
}

#[test]
fn every_operation_gives_every_rank_what_it_should() {
    for world in [1, 2, 3, 4] {
        let test = format!("operations-{world}");
        let Some(fake) = Fake::build(&test, &[]) else { return };
        let libraries = fake.open().unwrap();
        groups(&libraries, (world, 8), &options("world"), |mut group, _| check_all(&mut group));
        fake.expect(Counter::Destroys, i64::from(world));
        assert_eq!(fake.count(Counter::Aborts), 0);
        assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
        fake.expect(Counter::Frees, fake.count(Counter::Allocations));
        fake.expect(Counter::Contexts, 0);
    }
}

#[test]
fn wrong_arguments_are_refused_before_anything_runs() {
    let Some(fake) = Fake::build("arguments", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (2, 8), &options("world"), |mut group, _| {
        let a = upload(&mut group, ElementType::F32, &[1; 8]);
        let b = upload(&mut group, ElementType::F64, &[1; 8]);
        let op = ReduceOp::Sum;
        assert!(group.all_reduce(&a, &b, op).is_err(), "types differ");
        assert!(group.all_reduce(&a, &a.slice(0..4).unwrap(), op).is_err(), "lengths differ");
        let (left, right) = (a.slice(0..4).unwrap(), a.slice(2..6).unwrap());
        assert!(group.all_reduce(&left, &right, op).is_err(), "they overlap");
        assert!(group.all_to_all(&a, &a).is_err(), "not in place");
        assert!(group.reduce_scatter(&a, &right, op).is_err(), "not at this rank's place");
        assert!(group.broadcast(&a, &a, Rank(2)).is_err(), "no such root");
        let own = group.rank();
        assert!(group.send(&a, own).is_err(), "to itself");
        assert!(group.all_to_all_v(&a, &[8], &a, &[8]).is_err(), "a length per rank");
        assert!(group.gather(&left, None, own).is_err(), "the root has an output");
        assert!(group.split("x", Some(u32::MAX), 0).is_err(), "a color too large");
        assert!(group.shrink("x", &[own], false).is_err(), "this rank stays");
        assert!(a.slice(7..9).is_err());
        let error = group.all_reduce(&a, &b, op).unwrap_err();
        assert!(error.to_string().contains("differ in type"), "{error}");
        assert!(!error.is_retryable());
        // None of it has harmed the group.
        group.all_reduce(&a, &a, op).unwrap().wait().unwrap();
        assert_holds(&mut group, &a, &[2; 8], "all_reduce");
    });
}
