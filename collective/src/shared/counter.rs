//! A counter in shared memory that one rank advances and others wait for: spin, then sleep.
//!
//! Sleeping is Linux's futex on the counter itself, between processes. A waiter says that it sleeps
//! before it looks a last time, and the owner looks for sleepers after it has advanced; both with
//! sequentially consistent fences, so one of them sees the other. A waiter that is killed in its
//! sleep leaves the number of sleepers too high: that costs needless wake-ups, nothing else.

#![allow(unsafe_code, reason = "the futex system call has no safe form in our libraries")]

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

/// Looks between two looks at the clock.
const LOOKS: u32 = 64;
/// Shortest and longest time that a waiter spins before it sleeps.
const SPIN_LEAST: Duration = Duration::from_micros(1);
const SPIN_MOST: Duration = Duration::from_micros(100);
/// Times a waiter gives its core away before it sleeps, where ranks outnumber cores.
const YIELDS: u32 = 8;

/// A counter of rounds; wraps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counter<'a> {
    pub value: &'a AtomicU32,
    pub sleepers: &'a AtomicU32,
}

/// How a rank waits: for how long it spins is learnt from whether that helped.
#[derive(Debug)]
pub(crate) struct Patience {
    spin: Duration,
    crowded: bool,
}

impl Patience {
    /// For a host with that many ranks and cores.
    pub(crate) fn new(ranks: usize, cores: usize) -> Self {
        Self { spin: SPIN_MOST / 4, crowded: ranks > cores }
    }

    /// Spins until the counter has reached a round; false if it is time to sleep.
    pub(crate) fn spin(&mut self, counter: Counter<'_>, round: u32) -> bool {
        if self.crowded {
            for _ in 0..YIELDS {
                std::thread::yield_now();
                if counter.has_reached(round) {
                    return true;
                }
            }
            return false;
        }
        let begin = Instant::now();
        loop {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if counter.has_reached(round) {
                    self.spin = (self.spin * 2).min(SPIN_MOST);
                    return true;
                }
            }
            if begin.elapsed() >= self.spin {
                // It did not help: waits here are long, and somebody may want the core.
                self.spin = (self.spin / 2).max(SPIN_LEAST);
                return false;
            }
        }
    }
}

impl Counter<'_> {
    /// Whether that many rounds are counted; exact while fewer than 2³¹ lie between.
    pub(crate) fn has_reached(self, round: u32) -> bool {
        (self.value.load(Ordering::Acquire).wrapping_sub(round) as i32) >= 0
    }

    /// Counts up to a round, and wakes who sleeps for it.
    pub(crate) fn advance(self, round: u32) {
        self.value.store(round, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            futex(self.value, libc::FUTEX_WAKE, i32::MAX as u32, None);
        }
    }

    /// Sleeps until the counter may have reached a round, or a timeout.
    pub(crate) fn sleep(self, round: u32, timeout: Duration) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let seen = self.value.load(Ordering::Acquire);
        if (seen.wrapping_sub(round) as i32) < 0 {
            futex(self.value, libc::FUTEX_WAIT, seen, Some(timeout));
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Errors need no look: a wait that returns for whatever reason looks at the counter again.
fn futex(word: &AtomicU32, operation: i32, value: u32, timeout: Option<Duration>) {
    let timeout = timeout.map(|time| libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: time.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word is an aligned, mapped u32 for the length of the call, and the timeout is null
    // or points to a timespec on this stack; the kernel writes to neither.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout, 0usize, 0u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_wraps() {
        let (value, sleepers) = (AtomicU32::new(u32::MAX), AtomicU32::new(0));
        let counter = Counter { value: &value, sleepers: &sleepers };
        assert!(counter.has_reached(u32::MAX) && counter.has_reached(u32::MAX - 1));
        assert!(!counter.has_reached(0));
        counter.advance(0);
        assert!(counter.has_reached(u32::MAX) && counter.has_reached(0) && !counter.has_reached(1));
    }

    #[test]
    fn a_sleeper_is_woken_and_a_timeout_ends_a_sleep() {
        let (value, sleepers) = (AtomicU32::new(0), AtomicU32::new(0));
        let counter = Counter { value: &value, sleepers: &sleepers };
        counter.sleep(1, Duration::from_millis(1));
        assert!(!counter.has_reached(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while sleepers.load(Ordering::Relaxed) == 0 {
                    std::thread::yield_now();
                }
                counter.advance(1);
            });
            // Far longer than the test may take: only a wake-up ends it.
            while !counter.has_reached(1) {
                counter.sleep(1, Duration::from_secs(100));
            }
        });
        assert_eq!(sleepers.load(Ordering::Relaxed), 0);
    }
}
