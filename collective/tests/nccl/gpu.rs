//! The same checks over a real GPU and a real NCCL.
//!
//! `cargo test -p collective --test nccl -- --ignored` on a machine with both. With one GPU the
//! tests of two ranks need `NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0` and NCCL 2.30; where
//! they cannot run they say so and pass.

use std::time::{Duration, Instant};

use collective::ElementType;
use collective::nccl::{
    Compute, Device, Libraries, LibraryPaths, NcclGroup, NcclOptions, NcclVersion,
};
use collective::{Communicator, ReduceOp};

use crate::elements::{assert_holds, upload};
use crate::fake::Fake;
use crate::ordered::doubles;
use crate::ranks::{groups, options};
use crate::{host, operations, ordered};

fn libraries() -> Libraries {
    Libraries::open(&LibraryPaths::from_environment()).unwrap()
}

/// How many GPUs two ranks may be spread over; none, with a word about it, if they cannot run.
fn two_ranks(libraries: &Libraries, test: &str) -> Option<u32> {
    if Device::new(libraries, 1).is_ok() {
        return Some(2);
    }
    let enabled = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
    if enabled && libraries.nccl_version() >= NcclVersion::new(2, 30, 0) {
        return Some(1);
    }
    let found = libraries.nccl_version();
    eprintln!(
        "SKIPPED {test}: one GPU, NCCL {found}, NCCL_MULTI_RANK_GPU_ENABLE=1 set: {enabled}; two \
         ranks on a GPU need NCCL 2.30 and the variable"
    );
    None
}

#[test]
#[ignore = "needs libnccl, named by COHORT_NCCL_LIBRARY; no GPU"]
fn the_real_library_has_every_symbol() {
    let Some(fake) = Fake::build("real-nccl", &[]) else { return };
    let paths = LibraryPaths { cuda: fake.paths().cuda, ..LibraryPaths::from_environment() };
    let libraries = Libraries::open(&paths).unwrap();
    eprintln!("NCCL {}", libraries.nccl_version());
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn every_operation_on_one_rank() {
    groups(&libraries(), (1, 1), &options("world"), |mut group, control| {
        operations::check_all(&mut group);
        ordered::check_all(&mut group, control);
        host::check_all(group, control);
    });
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn every_operation_on_two_ranks() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "every_operation_on_two_ranks") else { return };
    groups(&libraries, (2, gpus), &options("world"), |mut group, _| {
        operations::check_all(&mut group);
    });
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn ordered_sums_on_two_ranks_have_the_bits_of_the_cpu() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "ordered_sums") else { return };
    groups(&libraries, (2, gpus), &options("world"), |mut group, control| {
        // Integers of every width wrap alike, floats round alike: equal, not close.
        ordered::check_all(&mut group, control);
        let values = [i64::from(i32::MAX), 7, -5, 0];
        let data = upload(&mut group, ElementType::I32, &values);
        group.all_reduce_ordered(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_holds(&mut group, &data, &[-2, 14, -10, 0], "i32");
    });
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn the_fast_sum_is_near_a_reference_in_double() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "the_fast_sum") else { return };
    groups(&libraries, (2, gpus), &options("world"), |mut group, _| {
        let len = 100_003;
        let of = |rank: u64| doubles(rank + 1, len);
        let mine: Vec<f32> = of(u64::from(group.rank().0)).iter().map(|v| *v as f32).collect();
        let data = upload(&mut group, ElementType::F32, &vec![0; len]);
        group.write(&data, (&mine).into()).unwrap();
        group.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        let mut found = vec![0f32; len];
        group.read(&data, (&mut found).into()).unwrap();
        for ((found, a), b) in found.iter().zip(of(0)).zip(of(1)) {
            let bound = (a.abs() + b.abs()) * 1e-6;
            assert!((f64::from(*found) - (a + b)).abs() <= bound, "{found} of {a} + {b}");
        }
    });
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn host_buffers_on_two_ranks_have_the_bits_of_tcp() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "host_buffers") else { return };
    groups(&libraries, (2, gpus), &options("world"), host::check_all);
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn an_abort_ends_an_all_reduce_that_the_peer_never_joins() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "an_abort") else { return };
    groups(&libraries, (2, gpus), &options("world"), move |mut group, control| {
        if group.rank().0 == 0 {
            let data = upload(&mut group, ElementType::F32, &vec![1; 1 << 20]);
            let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
            assert!(pending.wait_timeout(Duration::from_millis(500)).is_none());
            let pushed = Instant::now();
            group.abort_handle().abort("the peer is gone");
            let error = pending.wait().unwrap_err();
            assert!(error.is_aborted() && pushed.elapsed() < Duration::from_secs(1), "{error}");
            control.barrier().unwrap();
        } else {
            control.barrier().unwrap();
            group.abort_handle().abort("the peer has aborted");
        }
        drop(group);
        // The process survives: it forms the next generation's group.
        control.barrier().unwrap();
        let device = Device::new(&self::libraries(), control.rank().0 % gpus);
        let mut next = NcclGroup::connect(device, options("next"), control).unwrap();
        next.barrier().unwrap().wait().unwrap();
    });
}

#[test]
#[ignore = "needs a GPU and libnccl"]
fn splits_registrations_and_context_order_on_two_ranks() {
    let libraries = libraries();
    let Some(gpus) = two_ranks(&libraries, "splits") else { return };
    let options = NcclOptions { max_ctas: Some(2), ..options("world") };
    groups(&libraries, (2, gpus), &options, move |mut group, _| {
        let data = upload(&mut group, ElementType::F32, &[1; 1024]);
        let registration = group.register(&data).unwrap();
        // Ranks that share a GPU and a process share its context: they would wait for each other.
        let own_context = gpus == 2;
        if own_context {
            group.wait_for(Compute::Context).unwrap();
        }
        let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        if own_context {
            group.release(Compute::Context).unwrap();
        }
        pending.wait().unwrap();
        drop(registration);
        let rank = group.rank().0;
        let mut reversed = group.split("reversed", Some(0), 1 - rank).unwrap().unwrap();
        assert_eq!(reversed.rank().0, 1 - rank);
        reversed.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_holds(&mut reversed, &data, &[4; 1024], "after the split");
    });
}
