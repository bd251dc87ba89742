//! Calls that run behind the caller.

use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};

use api::Rank;

use super::in_parallel;
use crate::tests::options;
use crate::{CollectiveError, Queue, ReduceOp};

#[test]
fn calls_run_in_order_behind_the_caller_and_give_their_buffers_back() {
    for world in [1, 3] {
        let sums = in_parallel(world, move |rank, listener, peers| {
            let group = listener.connect(options(rank, world), &peers).unwrap();
            let queue = Queue::start(Box::new(group)).unwrap();
            let (go, wait) = channel::<()>();
            if world == 1 {
                go.send(()).unwrap();
            }
            // Nothing is over before the first call may begin: the caller does not wait.
            let first = queue.submit(move |_| {
                wait.recv().unwrap();
                Ok(())
            });
            let later: Vec<_> = (0..10i64)
                .map(|step| {
                    let mut buffer = vec![step + i64::from(rank); 1000];
                    queue.submit(move |group| {
                        group.all_reduce((&mut buffer).into(), ReduceOp::Sum)?;
                        Ok(buffer)
                    })
                })
                .collect();
            if world > 1 {
                go.send(()).unwrap();
            }
            first.wait().unwrap();
            let sums: Vec<i64> =
                later.into_iter().map(|work| work.wait().unwrap().0[999]).collect();
            let mut turn = queue.turn();
            assert_eq!(turn.rank(), Rank(rank));
            turn.barrier().unwrap();
            sums
        });
        let world = i64::from(world);
        for found in sums {
            let expected: Vec<i64> = (0..10).map(|s| s * world + world * (world - 1) / 2).collect();
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn the_error_of_a_call_comes_from_its_handle_and_from_all_later_ones() {
    // A rank that panics must not fail one that is still forming.
    let formed = Arc::new(Barrier::new(2));
    let texts = in_parallel(2, move |rank, listener, peers| {
        let group = listener.connect(options(rank, 2), &peers).unwrap();
        formed.wait();
        let queue = Queue::start(Box::new(group)).unwrap();
        let len = 10 + rank as usize;
        let submit = || {
            queue.submit(move |group| {
                group.all_reduce((&mut vec![0.0f32; len]).into(), ReduceOp::Sum)
            })
        };
        let (first, second) = (submit(), submit());
        let first = first.wait().expect_err("the lengths differ");
        assert!(matches!(first, CollectiveError::Mismatch { .. }), "{first}");
        assert_eq!(second.wait().expect_err("the group failed").to_string(), first.to_string());
        first.to_string()
    });
    assert!(texts[0].contains("all_reduce(10 f32, sum) #0"), "{}", texts[0]);
}

#[test]
fn a_call_that_panics_fails_itself_later_calls_and_the_peers() {
    // A rank that panics must not fail one that is still forming.
    let formed = Arc::new(Barrier::new(2));
    let texts = in_parallel(2, move |rank, listener, peers| {
        let group = listener.connect(options(rank, 2), &peers).unwrap();
        formed.wait();
        let queue = Queue::start(Box::new(group)).unwrap();
        if rank == 0 {
            let work = queue.submit::<()>(|_| panic!("on purpose"));
            work.wait().expect_err("it panicked");
        }
        queue.turn().barrier().expect_err("the group is aborted").to_string()
    });
    assert!(texts.iter().all(|text| text.contains("panicked")), "{texts:?}");
}

super::also_over_memory_and_hosts!(
    calls_run_in_order_behind_the_caller_and_give_their_buffers_back,
    a_call_that_panics_fails_itself_later_calls_and_the_peers,
    the_error_of_a_call_comes_from_its_handle_and_from_all_later_ones,
);
