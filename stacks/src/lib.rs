//! What the threads of this process are in: every thread is interrupted by a signal and notes its own
//! return addresses, then one thread finds their names. What a JVM does on SIGQUIT.
//!
//! Names come from the binary's symbol table, files and lines from its debug information where it has
//! some. A thread that does not handle the signal in time, because a debugger holds it or it is in
//! uninterruptible sleep, has no frames.

mod capture;
mod symbols;

use std::collections::BTreeMap;
use std::time::Duration;

use api::stacks::{FRAMES_IN_ALL, StackFrame};

pub use capture::install;

/// How long threads may take to note where they are: each needs a time slice.
const CAPTURE_WAIT: Duration = Duration::from_millis(500);

/// The function that marks the beginning of what a thread does, by a convention of the standard library.
const BEGINNING: &str = "__rust_begin_short_backtrace";

/// The stacks of all threads of this process but the one that asks, by the kernel's thread numbers, the
/// innermost frame first; and what is missing, in words, or nothing.
///
/// Takes up to half a second where a thread cannot answer, and the time to read the binary's symbols.
pub fn dump() -> (Vec<(u32, Vec<StackFrame>)>, String) {
    let captured = match capture::capture(CAPTURE_WAIT) {
        Ok(captured) => captured,
        Err(why) => return (Vec::new(), why),
    };
    let mut names = BTreeMap::new();
    let mut left = FRAMES_IN_ALL;
    let mut stacks = Vec::new();
    for (thread, addresses) in captured.threads {
        let mut frames: Vec<StackFrame> = Vec::new();
        // The outermost return address is none.
        for address in addresses.into_iter().filter(|address| *address > 0) {
            let named = names.entry(address).or_insert_with(|| symbols::of(address)).clone();
            frames.extend(named.into_iter().take(left - frames.len().min(left)));
        }
        // What lies outside of it begins any thread.
        let outermost = frames.iter().position(|frame| frame.function.contains(BEGINNING));
        frames.truncate(outermost.unwrap_or(frames.len()));
        left -= frames.len();
        stacks.push((thread, frames));
    }
    let absent = match captured.silent {
        0 => String::new(),
        1 => "one thread did not say where it is".to_owned(),
        count => format!("{count} threads did not say where they are"),
    };
    (stacks, absent)
}
