//! Has each thread note its return addresses, in a signal handler.
//!
//! The only place of this crate with unsafe code. What a handler may do is little: it must not allocate,
//! lock, or touch what the interrupted function was in the middle of changing. This one reads its thread's
//! number and walks its own stack into memory that was there before.

#![allow(unsafe_code, reason = "a signal handler, and a signal to one thread of this process")]

use std::ffi::c_int;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::stacks::{FRAMES_MAX, THREADS_MAX};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The first signal that has no meaning of its own and that neither Rust's runtime nor a debugger uses.
const SIGNAL: Signal = Signal::SIGUSR2;
/// How often it is looked whether all threads have answered.
const LOOK: Duration = Duration::from_millis(1);
/// Frames of the handler and of the walk itself, the innermost: they say nothing of the thread.
const OWN_FRAMES_MAX: usize = 8;

/// Where one thread notes its stack.
struct Slot {
    /// The thread that is to fill it; 0: none.
    thread: AtomicU32,
    /// Addresses noted, plus one; 0: it has not answered.
    answered: AtomicUsize,
    addresses: [AtomicUsize; FRAMES_MAX + OWN_FRAMES_MAX],
}

static SLOTS: [Slot; THREADS_MAX] = [const {
    Slot {
        thread: AtomicU32::new(0),
        answered: AtomicUsize::new(0),
        addresses: [const { AtomicUsize::new(0) }; FRAMES_MAX + OWN_FRAMES_MAX],
    }
}; THREADS_MAX];

/// Held while slots are in use: one capture at a time.
static CAPTURING: Mutex<()> = Mutex::new(());

/// What threads noted.
pub(crate) struct Captured {
    /// By the kernel's number, the innermost address first.
    pub(crate) threads: Vec<(u32, Vec<usize>)>,
    /// Threads that did not answer.
    pub(crate) silent: usize,
}

/// Prepares this process to answer. To be called once, early, before there are many threads.
///
/// # Errors
/// Where the kernel refuses the handler.
pub fn install() -> Result<(), Errno> {
    // The unwinder sets itself up at its first use; that must not be inside a handler.
    backtrace::trace(|_| true);
    // Restarted, so that few system calls of a healthy process notice.
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::all());
    // SAFETY: `note` only does what is allowed in a handler (see there), and no other part of this
    // program gives the signal a meaning.
    unsafe { sigaction(SIGNAL, &action) }.map(|_| ())
}

/// The handler.
extern "C" fn note(_: c_int) {
    let errno = Errno::last_raw();
    // SAFETY: takes no argument, and is a plain system call, hence allowed in a handler.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    if let Some(slot) = SLOTS.iter().find(|slot| slot.thread.load(Ordering::Acquire) == thread) {
        let mut count = 0;
        let note = |frame: &backtrace::Frame| {
            slot.addresses[count].store(frame.ip() as usize, Ordering::Relaxed);
            count += 1;
            count < slot.addresses.len()
        };
        // SAFETY: "unsynchronized" is about the crate's own state for looking up names, which a walk
        // over addresses does not touch on Linux; there it is `_Unwind_Backtrace`. That one reads the
        // interrupted stack, which does not change while its thread is here, and the tables of the
        // loaded objects, which glibc gives without a lock (`_dl_find_object`) or, where it is old,
        // under one that a thread may take again that holds it. Another thread that holds it goes
        // on, as this one holds nothing that it could wait for. It allocates nothing.
        unsafe { backtrace::trace_unsynchronized(note) };
        slot.answered.store(count + 1, Ordering::Release);
    }
    Errno::set_raw(errno);
}

/// Has every thread of this process but the calling one note where it is; waits at most `wait` for them.
///
/// # Errors
/// Where the threads cannot be listed.
pub(crate) fn capture(wait: Duration) -> Result<Captured, String> {
    let _one_at_a_time = CAPTURING.lock().unwrap_or_else(PoisonError::into_inner);
    let own = nix::unistd::gettid().as_raw() as u32;
    let listed = std::fs::read_dir("/proc/self/task")
        .map_err(|error| format!("its threads cannot be listed: {error}"))?;
    let mut threads: Vec<u32> = listed
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|thread| *thread != own)
        .collect();
    threads.sort_unstable();
    threads.truncate(THREADS_MAX);
    let mut asked: Vec<(u32, &Slot)> = Vec::new();
    for thread in threads {
        let holder = |slot: &&Slot| slot.thread.load(Ordering::Acquire);
        // The slot that it did not fill in a former capture it may still be about to fill. One that
        // another thread filled too late is free.
        let own = SLOTS.iter().find(|slot| holder(slot) == thread);
        let free = || {
            SLOTS.iter().find(|slot| {
                let taken = asked.iter().any(|(_, taken)| std::ptr::eq(*taken, *slot));
                let is_late = || slot.answered.load(Ordering::Acquire) > 0;
                !taken && (holder(slot) == 0 || is_late())
            })
        };
        let Some(slot) = own.or_else(free) else { break };
        asked.push((thread, slot));
    }
    for (thread, slot) in &asked {
        slot.answered.store(0, Ordering::Relaxed);
        slot.thread.store(*thread, Ordering::Release);
        if interrupt(*thread).is_err() {
            // It has ended meanwhile.
            slot.thread.store(0, Ordering::Release);
        }
    }
    let deadline = Instant::now() + wait;
    let is_missing = |(thread, slot): &(u32, &Slot)| {
        slot.thread.load(Ordering::Relaxed) == *thread && slot.answered.load(Ordering::Acquire) == 0
    };
    while asked.iter().any(is_missing) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    let mut captured = Captured { threads: Vec::new(), silent: 0 };
    for (thread, slot) in asked {
        if slot.thread.load(Ordering::Relaxed) != thread {
            continue;
        }
        match slot.answered.load(Ordering::Acquire).checked_sub(1) {
            None => captured.silent += 1,
            Some(count) => {
                let noted = slot.addresses.iter().take(count);
                let noted = noted.map(|address| address.load(Ordering::Relaxed)).collect();
                captured.threads.push((thread, without_own(noted)));
                slot.thread.store(0, Ordering::Release);
            }
        }
    }
    Ok(captured)
}

/// The signal to one thread of this process.
fn interrupt(thread: u32) -> Result<(), Errno> {
    let process = std::process::id();
    // SAFETY: plain numbers. A thread of this number that is not of this process is refused by the
    // kernel (`tgkill`), so a number that was given away again does no harm elsewhere.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL as c_int) };
    Errno::result(sent).map(|_| ())
}

/// Without the frames of the handler: those up to the trampoline through which the kernel entered it.
fn without_own(mut addresses: Vec<usize>) -> Vec<usize> {
    let is_handler = |address: &usize| {
        let mut is_it = false;
        backtrace::resolve((address.saturating_sub(1)) as *mut _, |symbol| {
            let name = symbol.name().map(|name| name.to_string()).unwrap_or_default();
            is_it |= name.starts_with("stacks::capture::note");
        });
        is_it
    };
    let outermost = addresses.iter().take(OWN_FRAMES_MAX).rposition(is_handler);
    // One more: the trampoline.
    addresses.drain(..outermost.map_or(0, |handler| (handler + 2).min(addresses.len())));
    addresses.truncate(FRAMES_MAX);
    addresses
}
