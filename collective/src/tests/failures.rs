//! What goes wrong between honest ranks: each case ends at once, on every rank, with the cause.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use api::{Generation, Rank, Secret};

use super::{HANG, QUICK, error, group, in_parallel, listeners, options};
use crate::{CollectiveError, Communicator, LaneTree, Operation, Partial, ProcessGroup, ReduceOp};

type Calls = fn(&mut ProcessGroup) -> Result<(), CollectiveError>;

/// Far more than sockets and mailboxes hold.
const MUCH: usize = 20 << 20;

fn lanes(communicator: &mut ProcessGroup, lanes: u32) -> Result<(), CollectiveError> {
    let tree = LaneTree::new(lanes);
    let run = tree.lanes_of(communicator.rank().0, communicator.world_size());
    let data = vec![1.0f32; 100];
    let partials: Vec<Partial<'_>> = tree
        .owned_subtrees(run)
        .into_iter()
        .map(|subtree| Partial { subtree, data: (&data).into() })
        .collect();
    communicator.reduce_lanes(&tree, &partials, (&mut [0.0f32; 100]).into())
}

fn all_reduce(
    communicator: &mut ProcessGroup,
    len: usize,
    op: ReduceOp,
) -> Result<(), CollectiveError> {
    communicator.all_reduce((&mut vec![0.0f32; len]).into(), op)
}

/// Calls of rank 0 and of rank 1, and how both errors name them.
const MISMATCHES: [(&str, Calls, &str, Calls); 14] = [
    (
        // A small message that nobody receives; the first barrier may be over before it is found.
        "send(3 u8 to r1) #0",
        |c| {
            c.send((&[0u8; 3]).into(), Rank(1))?;
            c.barrier()?;
            c.barrier()
        },
        "barrier() #0",
        |c| c.barrier(),
    ),
    (
        "all_reduce(10 f32, sum) #0",
        |c| all_reduce(c, 10, ReduceOp::Sum),
        "barrier() #0",
        |c| c.barrier(),
    ),
    (
        "all_reduce(10 f32, sum) #0",
        |c| all_reduce(c, 10, ReduceOp::Sum),
        "all_reduce(10 f32, max) #0",
        |c| all_reduce(c, 10, ReduceOp::Max),
    ),
    (
        "all_reduce(10 f32, sum) #0",
        |c| all_reduce(c, 10, ReduceOp::Sum),
        "all_reduce(10 f64, sum) #0",
        |c| c.all_reduce((&mut [0.0f64; 10]).into(), ReduceOp::Sum),
    ),
    (
        "all_reduce(2000000 f32, sum) #0",
        |c| all_reduce(c, 2_000_000, ReduceOp::Sum),
        "all_reduce(2000001 f32, sum) #0",
        |c| all_reduce(c, 2_000_001, ReduceOp::Sum),
    ),
    (
        "all_reduce(2000000 f32, sum) #0",
        |c| all_reduce(c, 2_000_000, ReduceOp::Sum),
        "barrier() #0",
        |c| c.barrier(),
    ),
    (
        // Two roots are done when they have sent: the next call says what the last one was.
        "broadcast(3 u8 from r0) #0",
        |c| c.broadcast((&mut [0u8; 3]).into(), Rank(0)).and_then(|()| c.barrier()),
        "broadcast(3 u8 from r1) #0",
        |c| c.broadcast((&mut [0u8; 3]).into(), Rank(1)).and_then(|()| c.barrier()),
    ),
    (
        // Nobody sends anything that could be compared.
        "broadcast(3 u8 from r1) #0",
        |c| c.broadcast((&mut [0u8; 3]).into(), Rank(1)),
        "broadcast(3 u8 from r0) #0",
        |c| c.broadcast((&mut [0u8; 3]).into(), Rank(0)),
    ),
    (
        "recv(3 f32 from r1) #0",
        |c| c.recv((&mut [0.0f32; 3]).into(), Rank(1)),
        "recv(3 f32 from r0) #0",
        |c| c.recv((&mut [0.0f32; 3]).into(), Rank(0)),
    ),
    (
        "recv(3 f32 from r1) #0",
        |c| c.recv((&mut [0.0f32; 3]).into(), Rank(1)),
        "barrier() #0",
        |c| c.barrier(),
    ),
    (
        // A small send is over before its peer can object: the next call says so.
        "send(3 f32 to r1) #0",
        |c| c.send((&[0.0f32; 3]).into(), Rank(1)).and_then(|()| c.barrier()),
        "recv(4 f32 from r0) #0",
        |c| c.recv((&mut [0.0f32; 4]).into(), Rank(0)),
    ),
    (
        "send(64000000 u8 to r1) #0",
        |c| c.send((&vec![0u8; 64_000_000]).into(), Rank(1)).and_then(|()| c.barrier()),
        "barrier() #0",
        |c| c.barrier(),
    ),
    (
        "gather_bytes() #0",
        |c| c.gather_bytes(b"abc").map(|_| ()),
        "all_gather(3 u8) #0",
        |c| {
            let chunk = crate::chunk_range(3, c.world_size(), 1).len();
            c.all_gather((&vec![0u8; chunk]).into(), (&mut [0u8; 3]).into())
        },
    ),
    (
        "reduce_lanes(100 f32, sum over 8 lanes) #0",
        |c| lanes(c, 8),
        "reduce_lanes(100 f32, sum over 4 lanes) #0",
        |c| lanes(c, 4),
    ),
];

#[test]
pub(super) fn calls_that_differ_are_an_error_on_both_ranks_that_names_both() {
    for (zero, zero_calls, one, one_calls) in MISMATCHES {
        for world in [2, 3] {
            let results = group(world, move |rank, communicator| {
                // The third rank does as rank 0, or leaves at once where that concerns two ranks.
                let begun = Instant::now();
                let result = match rank {
                    0 => zero_calls(communicator),
                    1 => one_calls(communicator),
                    _ if zero.contains("_reduce") || zero.contains("lanes") => {
                        zero_calls(communicator)
                    }
                    _ => return None,
                };
                assert!(begun.elapsed() < QUICK, "took {:?}", begun.elapsed());
                let first = error(result);
                // The group stays failed.
                assert_eq!(error(communicator.barrier()).to_string(), first.to_string());
                Some(first)
            });
            let case = format!("{zero} against {one} in a world of {world}");
            for (rank, ours, theirs) in [(0, zero, one), (1, one, zero)] {
                let found = results[rank].clone().expect("both ranks call");
                let text = found.to_string();
                if world == 2 {
                    assert!(
                        matches!(found, CollectiveError::Mismatch { .. }),
                        "{case}: rank {rank} says `{text}`"
                    );
                    assert!(text.contains(&format!("r{rank} called `{ours}`")), "{case}: `{text}`");
                }
                if matches!(found, CollectiveError::Mismatch { .. }) {
                    assert!(text.contains(theirs), "{case}: rank {rank} says `{text}`");
                }
            }
            if let Some(Some(third)) = results.get(2) {
                // Told by whoever found it, or found by itself against rank 1.
                assert!(third.peer().is_some(), "{case}: the third rank says `{third}`");
            }
        }
    }
}

#[test]
pub(super) fn a_message_in_the_way_of_a_collective_is_an_error_on_all_that_names_both() {
    // Between the first and the last rank: their parts of a small sum need nothing of each other.
    let messages: [(&str, Calls); 2] = [
        ("recv(3 u8 from r0) #0", |c| c.recv((&mut [0u8; 3]).into(), Rank(0))),
        ("send(20971520 u8 to r0) #0", |c| c.send((&vec![0u8; MUCH]).into(), Rank(0))),
    ];
    for (text, message) in messages {
        let results = group(4, move |rank, c| {
            error(match rank {
                3 => message(c),
                _ => all_reduce(c, 10, ReduceOp::Sum).and_then(|()| c.barrier()),
            })
        });
        for (rank, error) in results.iter().enumerate() {
            for name in [text, "all_reduce(10 f32, sum) #0"] {
                assert!(error.to_string().contains(name), "r{rank}, {text}: {error}");
            }
        }
    }
}

#[test]
pub(super) fn a_rank_that_is_ahead_is_asked_what_it_called() {
    let over = Arc::new(Barrier::new(3));
    let results = group(3, move |rank, communicator| {
        // Rank 2 has sent its part to rank 1 and goes on: rank 0 has seen nothing of that call.
        let gather = |c: &mut ProcessGroup| c.gather((&[0u8; 3]).into(), None, Rank(1));
        let found = match rank {
            0 => Some(error(communicator.barrier())),
            1 => None,
            _ => Some(error(gather(communicator).and_then(|()| communicator.barrier()))),
        };
        over.wait();
        found.map(|error| error.to_string())
    });
    for (rank, ours, peer, theirs) in [
        (0, "barrier() #0", 2, "gather(3 u8 to r1) #0"),
        (2, "gather(3 u8 to r1) #0", 0, "barrier() #0"),
    ] {
        let text = results[rank].as_deref().expect("it calls");
        assert!(text.contains(&format!("r{rank} called `{ours}` but r{peer} at")), "{text}");
        assert!(text.contains(&format!("called `{theirs}`")), "{text}");
    }
}

#[test]
fn a_rank_with_a_wrong_secret_is_refused_and_fails_nobody_else() {
    let results = in_parallel(3, |rank, listener, peers| {
        let mut options = options(rank, 3);
        options.connect_timeout = Duration::from_secs(3);
        if rank == 2 {
            options.secret = Secret::new("guess");
        }
        error(listener.connect(options, &peers).map(|_| ()))
    });
    assert!(matches!(results[2], CollectiveError::WrongSecret { .. }), "{}", results[2]);
    for result in &results[..2] {
        // They went on waiting for the real rank 2, and say what they saw.
        let CollectiveError::ConnectTimeout { missing, .. } = result else { panic!("{result}") };
        assert!(missing.starts_with("r2 at") && !missing.contains(", r"), "{missing}");
    }
    let seen = results[..2].iter().any(|result| result.to_string().contains("the secrets differ"));
    assert!(seen, "{} {}", results[0], results[1]);
    for result in &results {
        assert!(!result.to_string().contains("correct horse"), "{result}");
        assert!(!result.to_string().contains("guess"), "{result}");
    }
}

#[test]
fn a_rank_of_another_generation_is_refused_by_name() {
    let results = in_parallel(2, |rank, listener, peers| {
        let mut options = options(rank, 2);
        options.connect_timeout = Duration::from_secs(2);
        if rank == 1 {
            options.generation = Generation(2);
        }
        error(listener.connect(options, &peers).map(|_| ())).to_string()
    });
    assert!(results[1].contains("cannot join r0 at"), "{}", results[1]);
    assert!(results[1].contains("generation g2, expected g3"), "{}", results[1]);
    assert!(results[0].contains("missing r1 at"), "{}", results[0]);
    assert!(results[0].contains("generation g2, expected g3"), "{}", results[0]);
}

#[test]
pub(super) fn strangers_do_not_keep_a_group_from_forming() {
    let strangers: usize = 80;
    let results = in_parallel(3, move |rank, listener, peers| {
        let mut kept = Vec::new();
        if rank == 1 {
            // Half of them silent, half of them talking nonsense, all before the real ranks.
            for index in 0..strangers {
                let mut stranger = TcpStream::connect(peers[0]).unwrap();
                if index % 2 == 0 {
                    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                }
                kept.push(stranger);
            }
        }
        let mut communicator = listener.connect(options(rank, 3), &peers).unwrap();
        let mut buffer = [1i64];
        communicator.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
        buffer[0]
    });
    assert_eq!(results, [3, 3, 3]);
}

#[test]
pub(super) fn a_peer_that_dies_is_named_at_once_in_whatever_call() {
    let cases: [Calls; 4] = [
        |c| c.barrier(),
        |c| all_reduce(c, 3_000_000, ReduceOp::Sum),
        |c| c.recv((&mut [0u8; 1]).into(), Rank(2)),
        |c| c.gather_bytes(&[0; 1000]).map(|_| ()),
    ];
    for (index, calls) in cases.into_iter().enumerate() {
        let formed = Arc::new(Barrier::new(3));
        let results = in_parallel(3, move |rank, listener, peers| {
            let mut communicator = listener.connect(options(rank, 3), &peers).unwrap();
            formed.wait();
            if rank == 2 {
                // Its connections end with no farewell, as when the process is killed.
                communicator.vanish();
                return None;
            }
            let begun = Instant::now();
            let error = error(calls(&mut communicator));
            assert!(begun.elapsed() < QUICK, "took {:?}", begun.elapsed());
            Some(error)
        });
        for found in results[..2].iter().flatten() {
            let text = found.to_string();
            assert!(text.contains("r2 at `127.0.0.1:"), "case {index}: `{text}`");
            assert!(text.contains("lost"), "case {index}: `{text}`");
            assert_eq!(found.peer(), Some(Rank(2)), "case {index}: `{text}`");
        }
    }
}

#[test]
pub(super) fn a_peer_that_leaves_while_it_is_needed_is_named() {
    let results = group(3, |rank, communicator| {
        // The end of one call does not wait for the end of the last: a rank that fails in the
        // second ends the first of a slower one.
        let first = communicator.barrier();
        (rank != 2).then(|| error(first.and_then(|()| communicator.barrier())).to_string())
    });
    for text in results.iter().flatten() {
        assert!(text.contains("r2 at") && text.contains("left the group"), "`{text}`");
    }
    // Leaving is no failure for those that no longer need it.
    group(3, |rank, communicator| {
        communicator.barrier().unwrap();
        if rank == 0 {
            communicator.recv((&mut [0u8; 4]).into(), Rank(1)).unwrap();
        } else if rank == 1 {
            communicator.send((&[0u8; 4]).into(), Rank(0)).unwrap();
        }
    });
}

#[test]
pub(super) fn an_abort_ends_a_call_and_every_later_one_and_is_told_to_the_peers() {
    let over = Arc::new(Barrier::new(2));
    let results = group(2, move |rank, communicator| {
        if rank == 1 {
            over.wait();
            return error(communicator.barrier()).to_string();
        }
        let handle = communicator.abort_handle();
        // Before the call or inside it: both must end it. That a blocked call ends is certain in
        // `hostile::an_abort_reaches_a_rank_that_is_certainly_blocked`.
        let aborter = thread::spawn(move || {
            handle.abort("superseded by g4");
            handle.abort("a later reason is not kept");
        });
        let found = error(communicator.recv((&mut [0u8; 9]).into(), Rank(1)));
        aborter.join().unwrap();
        assert!(error(communicator.barrier()).is_aborted());
        over.wait();
        found.to_string()
    });
    assert_eq!(results[0], "aborted: superseded by g4");
    assert!(results[1].contains("r0 at"), "{}", results[1]);
    assert!(results[1].contains("failed: aborted: superseded by g4"), "{}", results[1]);
}

#[test]
fn an_abort_ends_a_group_that_is_forming() {
    // A peer that takes the connection and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (mut listeners, mut peers) = listeners(2);
    peers[0] = silent.local_addr().unwrap();
    let listener = listeners.remove(1);
    let handle = listener.abort_handle();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = listener.connect(options(1, 2), &peers).map(|_| ());
        let _ = sender.send(result);
    });
    let (_connection, _) = silent.accept().unwrap();
    handle.abort("stop");
    let found = error(receiver.recv_timeout(HANG).expect("the abort ends the connecting"));
    assert_eq!(found.to_string(), "aborted: stop");
}

#[test]
fn an_abort_before_connecting_holds() {
    let (mut listeners, peers) = listeners(1);
    let listener = listeners.remove(0);
    listener.abort_handle().abort("too late");
    let mut communicator = listener.connect(options(0, 1), &peers).unwrap();
    assert_eq!(error(communicator.barrier()).to_string(), "aborted: too late");
}

#[test]
fn a_peer_that_never_comes_is_named() {
    let (mut listeners, peers) = listeners(3);
    // Rank 2 waits for rank 0, whose port is closed, and rank 1, which listens and never answers.
    let two = listeners.remove(2);
    drop(listeners.remove(0));
    let mut options = options(2, 3);
    options.connect_timeout = Duration::from_millis(300);
    let text = error(two.connect(options, &peers).map(|_| ())).to_string();
    assert!(text.contains("did not form within 300ms"), "`{text}`");
    assert!(text.contains(&format!("r0 at `{}` (Connection refused", peers[0])), "`{text}`");
    assert!(text.contains(&format!("r1 at `{}`", peers[1])), "`{text}`");
}

#[test]
pub(super) fn a_wrong_call_of_one_rank_is_told_to_all() {
    let cases: [(&str, Calls); 6] = [
        ("an average of i64 would round", |c| c.all_reduce((&mut [0i64; 2]).into(), ReduceOp::Avg)),
        ("the output holds 7 elements, expected", |c| {
            c.reduce_scatter((&[0u8; 10]).into(), (&mut [0u8; 7]).into(), ReduceOp::Sum)
        }),
        ("r9 is not below the world size", |c| c.send((&[0u8; 1]).into(), Rank(9))),
        ("is this rank itself", |c| c.recv((&mut [0u8; 1]).into(), c.rank())),
        ("2 ranks share 1 lanes", |c| {
            c.reduce_lanes(&LaneTree::new(1), &[], (&mut [0.0f32; 1]).into())
        }),
        ("no rank owns a lane", |c| {
            let tree = LaneTree::new(2).without([Rank(0), Rank(1)]);
            c.reduce_lanes(&tree, &[], (&mut [0.0f32; 1]).into())
        }),
    ];
    for (expected, calls) in cases {
        let results = group(2, move |rank, communicator| {
            error(if rank == 0 { calls(communicator) } else { communicator.barrier() })
        });
        assert!(matches!(results[0], CollectiveError::InvalidCall { .. }), "{}", results[0]);
        for (rank, found) in results.iter().enumerate() {
            assert!(found.to_string().contains(expected), "rank {rank}: `{found}`");
        }
        assert_eq!(results[1].peer(), Some(Rank(0)));
    }
}

#[test]
fn partials_that_are_not_this_ranks_are_refused() {
    let (mut listeners, peers) = listeners(1);
    let mut communicator = listeners.remove(0).connect(options(0, 1), &peers).unwrap();
    let tree = LaneTree::new(4);
    let data = [0.0f32; 2];
    let (left, right) = tree.root().children().unwrap();
    let partials = [left, right].map(|subtree| Partial { subtree, data: (&data).into() });
    let found = error(communicator.reduce_lanes(&tree, &partials, (&mut [0.0f32; 2]).into()));
    assert!(
        found.to_string().contains("partials of lanes `0..2, 2..4`, expected `0..4`"),
        "{found}"
    );
}

#[test]
fn options_that_cannot_be_are_refused() {
    type Change = fn(&mut crate::GroupOptions, &mut Vec<SocketAddr>);
    let cases: [(&str, Change); 6] = [
        ("a world of 0 ranks", |options, _| options.world_size = 0),
        ("a world of 5000 ranks, expected 1 to 480", |options, _| options.world_size = 5000),
        ("r2 is not below the world size of 2", |options, _| options.rank = Rank(2)),
        ("3 addresses of peers", |_, peers| peers.push(peers[0])),
        ("its host is longer than 1024 bytes", |options, _| {
            options.host = Some("h".repeat(1025));
        }),
        ("the secret is empty", |options, _| options.secret = Secret::new("")),
    ];
    for (expected, change) in cases {
        let (mut listeners, mut peers) = listeners(2);
        let mut options = options(0, 2);
        change(&mut options, &mut peers);
        let found = error(listeners.remove(0).connect(options, &peers).map(|_| ()));
        assert!(found.to_string().contains(expected), "`{found}`");
    }
}

#[test]
fn a_rank_that_is_not_in_the_subgroup_it_asks_for_lets_nobody_wait() {
    let texts = group(3, |rank, communicator| {
        let ranks = if rank == 2 { vec![0, 1] } else { vec![0, 1, 2] };
        let group = crate::Group { name: "odd".to_owned(), ranks };
        let found = error(communicator.subgroup(&group).map(|_| ()));
        // The group itself goes on.
        communicator.barrier().unwrap();
        found.to_string()
    });
    assert!(texts[2].contains("r2 is not one of its ranks [0, 1]"), "{}", texts[2]);
    for text in &texts[..2] {
        assert!(text.contains("r2 does not take part"), "{text}");
    }
}

#[test]
fn operations_are_point_to_point_or_not() {
    assert!(Operation::Recv.is_point_to_point());
    assert!(!Operation::Barrier.is_point_to_point());
}

super::also_over_memory_and_hosts!(
    a_message_in_the_way_of_a_collective_is_an_error_on_all_that_names_both,
    calls_that_differ_are_an_error_on_both_ranks_that_names_both,
    a_rank_with_a_wrong_secret_is_refused_and_fails_nobody_else,
    a_rank_of_another_generation_is_refused_by_name,
    strangers_do_not_keep_a_group_from_forming,
    a_peer_that_dies_is_named_at_once_in_whatever_call,
    a_peer_that_leaves_while_it_is_needed_is_named,
    an_abort_ends_a_call_and_every_later_one_and_is_told_to_the_peers,
    an_abort_ends_a_group_that_is_forming,
    an_abort_before_connecting_holds,
    a_peer_that_never_comes_is_named,
    a_wrong_call_of_one_rank_is_told_to_all,
    partials_that_are_not_this_ranks_are_refused,
    options_that_cannot_be_are_refused,
    operations_are_point_to_point_or_not,
    a_rank_that_is_not_in_the_subgroup_it_asks_for_lets_nobody_wait,
    ; only memory:
    a_rank_that_is_ahead_is_asked_what_it_called,
);
