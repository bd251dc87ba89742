//! The priority of threads that work behind training.

// One system call without a safe wrapper at hand.
#![allow(unsafe_code)]

use nix::libc;

/// What a thread that is behind training adds to the process's niceness. Where all processors are busy
/// such a thread gets a tenth of one, so a checkpoint is written in the gaps that training leaves, and
/// still comes to an end where it leaves none.
const BEHIND: libc::c_int = 10;

/// Puts the calling thread behind those of the step loop. Best effort: where the system does not let
/// it, checkpoints cost the steps more.
pub(crate) fn behind_training() {
    // The process's first thread, not the calling one: that may have been started by one behind.
    let first = std::process::id();
    // SAFETY: takes integers only; 0 is the calling thread, to which Linux confines the change.
    unsafe {
        let niceness = libc::getpriority(libc::PRIO_PROCESS, first);
        libc::setpriority(libc::PRIO_PROCESS, 0, niceness + BEHIND);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn niceness() -> libc::c_int {
        // SAFETY: as above.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn only_the_calling_thread_steps_back() {
        let before = niceness();
        let thread = std::thread::spawn(|| {
            behind_training();
            niceness()
        });
        let there = thread.join().expect("no panic");
        assert_eq!((niceness(), there), (before, (before + BEHIND).min(19)));
    }

    #[test]
    fn one_that_is_started_by_one_behind_is_no_further_back() {
        let thread = std::thread::spawn(|| {
            behind_training();
            let next = std::thread::spawn(|| {
                behind_training();
                niceness()
            });
            (niceness(), next.join().expect("no panic"))
        });
        let (first, second) = thread.join().expect("no panic");
        assert_eq!(first, second);
    }
}
