//! What is missing, late, broken or aborted: every path that a healthy GPU never takes.

use std::ffi::c_void;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use api::Rank;
use collective::ElementType;
use collective::nccl::{Compute, Device, ForeignStream, NcclGroup, NcclOptions, NcclVersion};
use collective::{CollectiveError, Communicator, ReduceOp};

use crate::elements::{assert_holds, upload};
use crate::fake::{Counter, Fake};
use crate::ranks::{groups, options, ranks};

/// The promise: an abort that was pushed ends a blocked call within this.
const ABORT_LATENCY: Duration = Duration::from_secs(1);

#[test]
fn a_bad_version_is_refused_and_a_missing_symbol_is_named() {
    let Some(fake) = Fake::build("bad-version", &["-DFAKE_VERSION=22805"]) else { return };
    let shown = fake.open().unwrap_err().to_string();
    assert!(shown.contains("NCCL 2.28.5 is known bad"), "{shown}");
    let Some(fake) = Fake::build("no-send", &["-DWITHOUT_SEND"]) else { return };
    let shown = fake.open().unwrap_err().to_string();
    assert!(shown.contains("`ncclSend`") && shown.contains("version 2.30.7"), "{shown}");
    let Some(fake) = Fake::build("good-version", &[]) else { return };
    let libraries = fake.open().unwrap();
    assert_eq!(libraries.nccl_version(), NcclVersion::new(2, 30, 7));
    let shown = Device::new(&libraries, 8).unwrap_err().to_string();
    assert!(shown.contains("`GPU 8`") && shown.contains("sees 8 GPUs"), "{shown}");
}

#[test]
fn a_missing_optional_function_is_an_error_that_harms_nothing() {
    let defines = ["-DWITHOUT_OPTIONAL", "-DFAKE_VERSION=22602"];
    let Some(fake) = Fake::build("no-optional", &defines) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (2, 8), &options("world"), |mut group, _| {
        let data = upload(&mut group, ElementType::F32, &[1; 8]);
        let gone = Rank(1 - group.rank().0);
        let shown = |error: CollectiveError| {
            assert!(matches!(error, CollectiveError::Unavailable { .. }), "{error}");
            error.to_string()
        };
        let errors = [
            ("ncclCommSplit", "2.18", shown(group.split("half", Some(0), 0).unwrap_err())),
            ("ncclCommShrink", "2.27", shown(group.shrink("less", &[gone], true).unwrap_err())),
            ("ncclCommRevoke", "2.29", shown(group.revoke().unwrap_err())),
            ("ncclCommRegister", "2.19", shown(group.register(&data).unwrap_err())),
            ("cuCtxRecordEvent", "12.5", shown(group.wait_for(Compute::Context).unwrap_err())),
        ];
        for (symbol, needed, error) in errors {
            assert!(error.contains(symbol) && error.contains(needed), "{error}");
        }
        group.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_holds(&mut group, &data, &[2; 8], "all_reduce");
    });
}

#[test]
fn a_rank_without_nccl_is_named_on_all_ranks() {
    let Some(fake) = Fake::build("one-without", &[]) else { return };
    let libraries = fake.open().unwrap();
    let errors = ranks(3, move |rank, mut control| {
        let device = match rank {
            1 => Err(CollectiveError::Unavailable {
                what: "NCCL".into(),
                message: "cannot open `libnccl.so.2`".into(),
            }),
            _ => Device::new(&libraries, rank),
        };
        NcclGroup::connect(device, options("world"), &mut control).unwrap_err().to_string()
    });
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains("cannot open `libnccl.so.2`"), "{error}");
        assert!(rank == 1 || error.contains("NCCL on r1"), "{error}");
    }
    assert_eq!(fake.count(Counter::Aborts), 0);
}

#[test]
fn a_group_that_does_not_form_says_which_and_how_long_it_waited() {
    let Some(fake) = Fake::build("late", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_absent", 1);
    let errors = ranks(2, move |rank, mut control| {
        let timeout = Duration::from_millis(300);
        let options = NcclOptions { connect_timeout: timeout, ..options("pipeline") };
        NcclGroup::connect(Device::new(&libraries, rank), options, &mut control).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, CollectiveError::ConnectTimeout { .. }), "{error}");
        let shown = error.to_string();
        assert!(shown.contains("`pipeline` of 2 ranks") && shown.contains("30"), "{shown}");
        assert!(error.is_retryable());
    }
    // What had begun to form is aborted, once each.
    fake.expect(Counter::Aborts, 2);
    assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
    fake.expect(Counter::Contexts, 0);
}

#[test]
fn an_abort_of_the_control_group_ends_the_forming() {
    let Some(fake) = Fake::build("abort-forming", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_absent", 1);
    let watched = fake.clone();
    ranks(2, move |rank, mut control| {
        let (abort, watched) = (control.abort_handle(), watched.clone());
        thread::spawn(move || {
            // Both are inside NCCL's initialisation, which the absent rank keeps from ending.
            watched.expect(Counter::Formings, 2);
            abort.abort("generation 4 begins");
        });
        let device = Device::new(&libraries, rank);
        let error = NcclGroup::connect(device, options("world"), &mut control).unwrap_err();
        assert!(error.is_aborted(), "{error}");
    });
    fake.expect(Counter::Aborts, 2);
}

#[test]
fn an_abort_ends_a_blocked_operation_within_a_second_and_once() {
    let Some(fake) = Fake::build("abort", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_hang", 1);
    groups(&libraries, (2, 8), &options("world"), |mut group, _| {
        let data = upload(&mut group, ElementType::F32, &[1; 8]);
        let (handle, again) = (group.abort_handle(), group.abort_handle());
        let (sender, pushed) = mpsc::channel();
        let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        let second = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        assert!(pending.wait_timeout(Duration::from_millis(100)).is_none());
        thread::spawn(move || {
            handle.abort("generation 4 begins");
            sender.send(Instant::now()).unwrap();
        });
        let error = pending.wait().unwrap_err();
        assert!(pushed.recv().unwrap().elapsed() < ABORT_LATENCY);
        assert!(error.to_string().contains("generation 4 begins"), "{error}");
        assert!(second.wait().unwrap_err().is_aborted());
        again.abort("and again");
        // Every later call gets the first error, at once.
        let later = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        assert_eq!(later.wait().unwrap_err().to_string(), error.to_string());
        assert!(group.read_bytes(&data).unwrap_err().is_aborted());
    });
    assert_eq!(fake.count(Counter::Aborts), 2);
    assert_eq!(fake.count(Counter::Destroys), 0);
    assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
    // What the aborted operations held is given back too.
    fake.expect(Counter::Frees, fake.count(Counter::Allocations));
}

#[test]
fn an_asynchronous_error_ends_the_group_with_what_nccl_says() {
    let Some(fake) = Fake::build("async-error", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_break", 0);
    groups(&libraries, (2, 8), &options("data"), |mut group, control| {
        let data = upload(&mut group, ElementType::F32, &[1; 8]);
        let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        if group.rank().0 == 0 {
            let error = pending.wait().unwrap_err();
            let CollectiveError::Nccl { code: 6, .. } = error else { panic!("{error}") };
            assert!(error.to_string().contains("fake: the peer is gone"), "{error}");
            assert!(error.to_string().contains("of NCCL group `data`"), "{error}");
            assert!(error.is_retryable());
            control.barrier().unwrap();
        } else {
            control.barrier().unwrap();
            group.abort_handle().abort("r0 failed");
            assert!(pending.wait().unwrap_err().is_aborted());
        }
    });
    assert_eq!((fake.count(Counter::Aborts), fake.count(Counter::UsesAfterEnd)), (2, 0));
}

#[test]
fn survivors_shrink_the_group_and_go_on() {
    let Some(fake) = Fake::build("shrink", &[]) else { return };
    let libraries = fake.open().unwrap();
    let options = NcclOptions { shrinkable: true, ..options("world") };
    fake.switch("fake_hang", 1);
    let copy = fake.clone();
    groups(&libraries, (3, 8), &options, move |mut group, control| {
        let data = upload(&mut group, ElementType::I32, &[1; 8]);
        let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        assert!(pending.wait_timeout(Duration::from_millis(50)).is_none());
        if group.rank().0 == 1 {
            // It is stuck until it is told to leave.
            group.abort_handle().abort("excluded");
            assert!(pending.wait().unwrap_err().is_aborted());
            control.barrier().unwrap();
            return;
        }
        let mut survivors = group.shrink("survivors", &[Rank(1)], true).unwrap();
        assert!(pending.wait().unwrap_err().to_string().contains("being shrunk"));
        assert_eq!(survivors.world_size(), 2);
        assert_eq!(survivors.rank(), Rank(u32::from(group.rank().0 == 2)));
        control.barrier().unwrap();
        copy.switch("fake_hang", -1);
        // The old group is finished, the new one works without it.
        assert!(group.barrier().unwrap().wait().is_err());
        drop(group);
        let data = upload(&mut survivors, ElementType::I32, &[1; 8]);
        survivors.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_holds(&mut survivors, &data, &[2; 8], "all_reduce of the survivors");
    });
    fake.expect(Counter::Aborts, 3);
    fake.expect(Counter::Destroys, 2);
    fake.expect(Counter::UsesAfterEnd, 0);
}

#[test]
fn a_split_makes_groups_by_color_in_the_order_of_the_keys() {
    let Some(fake) = Fake::build("split", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (5, 8), &options("world"), |mut group, _| {
        let rank = group.rank().0;
        // Even ranks, odd ranks in reverse, and the last in none.
        let (color, key) = match rank {
            4 => (None, 0),
            rank => (Some(rank % 2), if rank % 2 == 0 { rank } else { 9 - rank }),
        };
        let half = group.split("half", color, key).unwrap();
        assert_eq!(half.is_some(), rank != 4);
        if let Some(mut half) = half {
            assert_eq!(half.world_size(), 2);
            assert_eq!(half.rank().0, [0, 1, 1, 0][rank as usize]);
            let data = upload(&mut half, ElementType::I64, &[i64::from(rank); 4]);
            half.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
            assert_holds(&mut half, &data, &[if rank % 2 == 0 { 2 } else { 4 }; 4], "half");
            // The parent goes on beside it.
        }
        group.barrier().unwrap().wait().unwrap();
    });
    fake.expect(Counter::Destroys, 9);
    assert_eq!((fake.count(Counter::Aborts), fake.count(Counter::UsesAfterEnd)), (0, 0));
}

#[test]
fn registrations_end_with_their_guard_or_with_the_group() {
    let Some(fake) = Fake::build("register", &[]) else { return };
    let libraries = fake.open().unwrap();
    let copy = fake.clone();
    groups(&libraries, (1, 8), &options("world"), move |mut group, _| {
        let data = upload(&mut group, ElementType::F32, &[1; 8]);
        let first = group.register(&data).unwrap();
        let second = group.register(&data).unwrap();
        assert_eq!(copy.count(Counter::Registered), 2);
        drop(first);
        group.all_reduce(&data, &data, ReduceOp::Sum).unwrap().wait().unwrap();
        copy.expect(Counter::Deregistered, 1);
        drop(group);
        copy.expect(Counter::Deregistered, 2);
        drop(second);
    });
    assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
    fake.expect(Counter::Frees, fake.count(Counter::Allocations));
}

#[test]
fn a_group_left_while_a_peer_hangs_aborts_in_bounded_time() {
    let Some(fake) = Fake::build("left", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_hang", 0);
    groups(&libraries, (2, 8), &options("world"), |mut group, _| {
        let data = upload(&mut group, ElementType::F32, &[1; 8]);
        let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
        let begun = Instant::now();
        drop(group);
        assert!(begun.elapsed() < Duration::from_secs(40));
        assert!(pending.wait().is_err());
    });
    assert_eq!((fake.count(Counter::Aborts), fake.count(Counter::UsesAfterEnd)), (2, 0));
}

#[test]
fn a_panicking_user_aborts_instead_of_waiting() {
    let Some(fake) = Fake::build("panic", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (1, 8), &options("world"), |mut group, _| {
        let user = thread::spawn(move || {
            let _data = upload(&mut group, ElementType::F32, &[1; 8]);
            panic!("a bug of the trainer, on purpose");
        });
        assert!(user.join().is_err());
    });
    assert_eq!((fake.count(Counter::Aborts), fake.count(Counter::Destroys)), (1, 0));
}

#[test]
fn many_operations_begun_at_once_run_in_order() {
    let Some(fake) = Fake::build("many", &[]) else { return };
    let libraries = fake.open().unwrap();
    groups(&libraries, (2, 8), &options("world"), |mut group, _| {
        let data = upload(&mut group, ElementType::I64, &[1; 4]);
        // More than may be in flight: the owner thread takes them as the stream finishes.
        let pending: Vec<_> = (0..40)
            .flat_map(|_| {
                (0..32).map(|_| group.all_reduce(&data, &data, ReduceOp::Max)).collect::<Vec<_>>()
            })
            .collect();
        for pending in pending {
            pending.unwrap().wait().unwrap();
        }
        assert_holds(&mut group, &data, &[1; 4], "all_reduce");
    });
}

#[test]
fn compute_streams_are_ordered_against_communication() {
    type Enter = unsafe extern "C" fn(*const c_void) -> i32;
    type Retain = unsafe extern "C" fn(*mut *const c_void, i32) -> i32;
    type Create = unsafe extern "C" fn(*mut *mut c_void, u32) -> i32;
    type Upload = unsafe extern "C" fn(u64, *const c_void, usize, *mut c_void) -> i32;
    type Download = unsafe extern "C" fn(*mut c_void, u64, usize, *mut c_void) -> i32;
    type Query = unsafe extern "C" fn(*mut c_void) -> i32;
    let Some(fake) = Fake::build("streams", &[]) else { return };
    let libraries = fake.open().unwrap();
    let copy = fake.clone();
    groups(&libraries, (2, 8), &options("world"), move |mut group, _| {
        let library = copy.library();
        let rank = group.rank().0 as i32;
        let data = upload(&mut group, ElementType::I64, &[0; 4]);
        // SAFETY: the fake's own functions, with the types of cuda.h; the stream is never
        // destroyed, and host memory lives until the stream is idle.
        unsafe {
            let (mut context, mut stream) = (std::ptr::null(), std::ptr::null_mut());
            library.get::<Retain>(b"cuDevicePrimaryCtxRetain").unwrap()(&mut context, rank);
            library.get::<Enter>(b"cuCtxPushCurrent_v2").unwrap()(context);
            assert_eq!(library.get::<Create>(b"cuStreamCreate").unwrap()(&mut stream, 1), 0);
            let to_device = library.get::<Upload>(b"cuMemcpyHtoDAsync_v2").unwrap();
            let to_host = library.get::<Download>(b"cuMemcpyDtoHAsync_v2").unwrap();
            let query = library.get::<Query>(b"cuStreamQuery").unwrap();
            for compute in [Compute::Stream(ForeignStream::from_raw(stream)), Compute::Context] {
                let input = [i64::from(rank) + 1; 4];
                let mut output = [0i64; 4];
                to_device(data.address(), input.as_ptr().cast(), 32, stream);
                group.wait_for(compute).unwrap();
                let pending = group.all_reduce(&data, &data, ReduceOp::Sum).unwrap();
                group.release(compute).unwrap();
                // Nobody waits on the host: the streams wait for each other.
                to_host(output.as_mut_ptr().cast(), data.address(), 32, stream);
                while query(stream) != 0 {
                    thread::yield_now();
                }
                assert_eq!(output, [3; 4]);
                pending.wait().unwrap();
                group.barrier().unwrap().wait().unwrap();
            }
        }
    });
}
