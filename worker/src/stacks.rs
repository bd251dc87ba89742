//! Has a rank say what its threads are in, and says what the kernel knows where the rank cannot.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use api::stacks::{StackDump, StackFrame};
use api::{Generation, Rank};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::strays::is_stopped;
use crate::threads::threads;

/// To capture stacks takes milliseconds, to find names in a large binary some tenths of a second; one
/// that takes longer cannot answer.
pub(crate) const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// What a rank told: its threads' stacks, and what is missing of them.
pub(crate) type Told = (Vec<(u32, Vec<StackFrame>)>, String);

/// Where the answer of one rank goes: to whoever asked last.
#[derive(Clone, Default)]
pub(crate) struct Answer(Arc<Mutex<Option<oneshot::Sender<Told>>>>);

impl Answer {
    /// Waits for the next answer; a question of before gets none.
    pub(crate) fn expect(&self) -> oneshot::Receiver<Told> {
        let (sender, receiver) = oneshot::channel();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    /// The rank answers; too late or unasked, it is of no use.
    pub(crate) fn give(&self, told: Told) {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waiting) = waiting {
            let _ = waiting.send(told);
        }
    }
}

/// A process, and the rank that it is at the moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    pub(crate) pid: u32,
    pub(crate) generation: Generation,
    pub(crate) rank: Rank,
}

/// What the kernel knows of a process, and `absent` for why there are no stacks; reads some files of
/// /proc, which no device or network is behind.
///
/// # Errors
/// Why there is nothing: the process is gone.
pub(crate) fn from_kernel(subject: Subject, absent: &str) -> Result<StackDump, String> {
    let Subject { pid, generation, rank } = subject;
    let threads = threads(pid).map_err(|error| format!("its process {pid} is gone: {error}"))?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(StackDump {
        generation,
        rank,
        host: host.trim().to_owned(),
        pid,
        taken_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        absent: absent.to_owned(),
        threads,
    })
}

/// A dump of a process that `ask` asks for its stacks: `ask` tells whether it could. Takes
/// [`ANSWER_WAIT`] at most.
///
/// # Errors
/// As [`from_kernel`].
pub(crate) async fn dump(
    subject: Subject,
    answer: &Answer,
    ask: impl FnOnce() -> bool,
) -> Result<StackDump, String> {
    let pid = subject.pid;
    if is_stopped(pid) {
        let why = format!("its process {pid} is stopped by a signal or a debugger");
        return from_kernel(subject, &why);
    }
    let told = answer.expect();
    if !ask() {
        return from_kernel(subject, "it leaves its orders unread");
    }
    match timeout(ANSWER_WAIT, told).await {
        Ok(Ok((stacks, absent))) => {
            let mut dump = from_kernel(subject, &absent)?;
            dump.add_frames(stacks);
            Ok(dump)
        }
        // Superseded by another question, or its socket is closed.
        Ok(Err(_)) => from_kernel(subject, "it did not answer"),
        Err(_) => {
            let why = format!("it did not answer within {} s", ANSWER_WAIT.as_secs());
            from_kernel(subject, &why)
        }
    }
}
