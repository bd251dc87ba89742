//! Threads of this very process are found in the functions that they are in.

use std::sync::mpsc::{Receiver, Sender, channel};

/// The thread that waits has begun to by then.
const LOOKS_MAX: u32 = 1_000;

#[inline(never)]
fn waits_for_a_word(inbox: &Receiver<()>) {
    inbox.recv().expect_err("the sender goes");
    std::hint::black_box(inbox);
}

#[inline(never)]
fn computes(stop: &Receiver<()>, begun: &Sender<u32>) {
    begun.send(nix::unistd::gettid().as_raw() as u32).expect("heard");
    let mut sum = 0u64;
    while stop.try_recv().is_err() {
        sum = std::hint::black_box(sum.wrapping_add(1));
    }
}

#[test]
fn threads_that_wait_and_threads_that_compute_are_found_where_they_are() {
    stacks::install().expect("a handler");
    let (release, inbox) = channel();
    let (stop, stopped) = channel();
    let (begun, ids) = channel();
    let tell = begun.clone();
    let waiting = std::thread::spawn(move || {
        tell.send(nix::unistd::gettid().as_raw() as u32).expect("heard");
        waits_for_a_word(&inbox);
    });
    let waiting_id = ids.recv().expect("it runs");
    let computing = std::thread::spawn(move || computes(&stopped, &begun));
    let computing_id = ids.recv().expect("it runs");
    // More than once: slots are used again. The thread that waits may just be on its way.
    for _ in 0..3 {
        for look in 1.. {
            let (threads, absent) = stacks::dump();
            let has = |id: u32, function: &str| {
                let (_, frames) = threads.iter().find(|(known, _)| *known == id).expect("told");
                frames.iter().any(|frame| frame.function.contains(function))
            };
            assert_eq!(absent, "");
            assert!(has(computing_id, "computes"), "{threads:#?}");
            let all = threads.iter().flat_map(|(_, frames)| frames);
            assert!(!all.clone().any(|frame| frame.function.contains("capture::note")));
            if has(waiting_id, "waits_for_a_word") {
                break;
            }
            assert!(look < LOOKS_MAX, "{threads:#?}");
        }
    }
    stop.send(()).expect("it listens");
    drop(release);
    waiting.join().expect("no panic");
    computing.join().expect("no panic");
}
