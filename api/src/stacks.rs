//! What the threads of a rank's process were in, when somebody asked: the stacks where the process
//! could say, and what the kernel says of each thread in any case.
//!
//! Taken by the worker of a rank that holds its gang up before the rank is replaced, or of a healthy
//! one by `cluster flight --stacks`. Kept beside the flight logs, never in the transaction log.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Rank};

/// Threads of a process that are told; a rank has some ten.
pub const THREADS_MAX: usize = 256;
/// Frames of a thread that are told, the innermost.
pub const FRAMES_MAX: usize = 96;
/// Frames of all threads together: at some 300 bytes each they fit one report.
pub const FRAMES_IN_ALL: usize = 4_096;
/// Largest kept dump that is read back, in bytes: above what the bounds before allow.
pub const STACKS_BYTES_MAX: u64 = 4 << 20;
/// Longest function name, in bytes: that of a deeply generic one is cut.
pub const FUNCTION_BYTES_MAX: usize = 200;

/// The thread of a process that tells what the others are in.
pub const TELLING_THREAD: &str = "stacks";

/// Functions of libraries that say where a thread waits, not what for: a frame of ours further out
/// says more.
const LIBRARIES: [&str; 16] = [
    "std::",
    "core::",
    "alloc::",
    "<core::",
    "<alloc::",
    "<std::",
    "backtrace::",
    "stacks::",
    "rayon",
    "<rayon",
    "crossbeam",
    "tokio::",
    "mio::",
    "parking_lot",
    "rustix::",
    "nix::",
];

/// The threads of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackDump {
    /// The generation that the process was in.
    pub generation: Generation,
    /// Its rank in it.
    pub rank: Rank,
    /// Its host's name.
    pub host: String,
    /// The process.
    pub pid: u32,
    /// Milliseconds since the Unix epoch, by the host's clock.
    pub taken_ms: u64,
    /// Why there are no stacks but only what the kernel says of the threads; empty when there are.
    pub absent: String,
    /// The main thread first.
    pub threads: Vec<ThreadStack>,
}

/// One thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ThreadStack {
    /// The kernel's number.
    pub id: u32,
    /// Its name, of which the kernel keeps 15 bytes.
    pub name: String,
    /// What the scheduler says, such as "sleeping".
    pub state: String,
    /// Processor time used so far, in milliseconds.
    pub cpu_ms: u64,
    /// The system call that it is in; absent: in none, or not readable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_call: Option<String>,
    /// The function of the kernel that it waits in; absent: it does not wait, or not readable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_in: Option<String>,
    /// Its stack, the innermost frame first; empty: it could not say.
    pub frames: Vec<StackFrame>,
}

/// One function on a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackFrame {
    /// The address within the binary or library, or a name where the binary has names.
    pub function: String,
    /// Its file, where the binary knows lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The line in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

impl StackFrame {
    /// Whether it is a function of the program rather than of a library below it or the system. Its
    /// file tells, where that is known: those of libraries lie in a folder with a version or are the
    /// compiler's own.
    pub fn is_useful(&self) -> bool {
        let name = self.function.as_str();
        if let Some(file) = &self.file {
            let folder = file.split('/').next().unwrap_or_default();
            let is_versioned =
                folder.split('-').any(|part| part.starts_with(|c: char| c.is_ascii_digit()));
            return file.ends_with(".rs")
                && !is_versioned
                && !matches!(folder, "std" | "core" | "alloc" | "stacks");
        }
        name.contains("::") && !LIBRARIES.iter().any(|library| name.starts_with(library))
    }
}

impl fmt::Display for StackFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.function)?;
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, " ({file}:{line})"),
            (Some(file), None) => write!(f, " ({file})"),
            (None, _) => Ok(()),
        }
    }
}

impl ThreadStack {
    /// The innermost function of the program.
    pub fn innermost(&self) -> Option<&StackFrame> {
        self.frames.iter().find(|frame| frame.is_useful())
    }

    /// "sleeping, in futex (futex_wait_queue)".
    pub fn position(&self) -> String {
        let mut text = self.state.clone();
        if let Some(call) = &self.system_call {
            text.push_str(&format!(", in {call}"));
        }
        if let Some(function) = &self.waits_in {
            text.push_str(&format!(" ({function})"));
        }
        text
    }
}

impl StackDump {
    /// Takes over what the process itself told of its threads, by their numbers.
    pub fn add_frames(&mut self, told: Vec<(u32, Vec<StackFrame>)>) {
        // The thread that found them out.
        self.threads.retain(|thread| thread.name != TELLING_THREAD);
        let mut told: BTreeMap<u32, Vec<StackFrame>> = told.into_iter().collect();
        for thread in &mut self.threads {
            thread.frames = told.remove(&thread.id).unwrap_or_default();
        }
    }

    /// Where the process was, in a few words to stand behind a cause; none where nothing is known
    /// that the cause would not say already.
    ///
    /// Of many threads most only wait for work. The one that works is the one with most functions of
    /// the program on its stack.
    pub fn innermost(&self) -> Option<String> {
        let useful = |thread: &ThreadStack| thread.frames.iter().filter(|f| f.is_useful()).count();
        // The first of equals, which the main thread is before all others.
        let busiest = self.threads.iter().rev().max_by_key(|thread| useful(thread));
        if let Some((thread, frame)) = busiest.and_then(|t| Some((t, t.innermost()?))) {
            return Some(format!("thread `{}` was in {frame}", thread.name));
        }
        let stuck = self.threads.iter().find(|thread| thread.state == UNINTERRUPTIBLE)?;
        Some(format!("thread `{}` was {}", stuck.name, stuck.position()))
    }
}

/// The state of a thread that waits for a device, a disk or a network file system, and that no signal
/// reaches.
pub const UNINTERRUPTIBLE: &str = "in uninterruptible sleep";

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str) -> StackFrame {
        StackFrame { function: function.into(), ..StackFrame::default() }
    }

    #[test]
    fn the_thread_that_works_is_named_by_its_innermost_own_function() {
        let thread = |id, name: &str, functions: &[&str]| ThreadStack {
            id,
            name: name.into(),
            frames: functions.iter().map(|function| frame(function)).collect(),
            ..ThreadStack::default()
        };
        let mut dump = StackDump {
            threads: vec![
                thread(1, "main", &["syscall", "std::sys::wait", "trainer::rank::run", "main"]),
                thread(
                    2,
                    "pool",
                    &[
                        "poll",
                        "<core::option::Option<T>>::map",
                        "collective::link::wait",
                        "trainer::train::step",
                        "rayon_core::scope",
                    ],
                ),
                thread(3, "control", &["read", "api::control::read_orders"]),
            ],
            ..StackDump::default()
        };
        let told = dump.innermost();
        assert_eq!(told.as_deref(), Some("thread `pool` was in collective::link::wait"));
        dump.add_frames(Vec::new());
        assert_eq!(dump.innermost(), None);
        dump.threads[1].state = UNINTERRUPTIBLE.into();
        dump.threads[1].system_call = Some("read".into());
        dump.threads[1].waits_in = Some("nfs_wait".into());
        let told = dump.innermost();
        let expected = "thread `pool` was in uninterruptible sleep, in read (nfs_wait)";
        assert_eq!(told.as_deref(), Some(expected));
    }

    #[test]
    fn a_frame_reads_well() {
        let with_line = StackFrame { file: Some("a.rs".into()), line: Some(7), ..frame("x::y") };
        assert_eq!(with_line.to_string(), "x::y (a.rs:7)");
        assert_eq!(frame("x::y").to_string(), "x::y");
        for (file, is_useful) in [
            ("trainer/src/train.rs", true),
            ("cli/main.rs", true),
            ("rayon-core-1.13.0/src/scope/mod.rs", false),
            ("std/src/sync/condvar.rs", false),
            ("./nptl/pthread_create.c", false),
        ] {
            let frame = StackFrame { file: Some(file.into()), ..frame("wait") };
            assert_eq!(frame.is_useful(), is_useful, "{file}");
        }
    }
}
