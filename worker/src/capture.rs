//! Reads a task's standard output and error from the moment it starts, numbers the lines, and hands
//! them to the leader and to the disk. It never waits for either: a rank must not stall on its own
//! output.

use std::io;
use std::process;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use api::TaskId;
use api::session::{LogLine, LogStream};
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, ChildStdout};
use tokio_util::sync::CancellationToken;

use crate::ledger::Ledger;
use crate::lines::LineSplitter;
use crate::spool::{Spooler, gap};

/// Read at once from a pipe; a quarter of the kernel's buffer.
const READ_BYTES: usize = 16 << 10;

/// Where lines go, and the count of them.
pub(crate) struct Capture {
    task: TaskId,
    ledger: Arc<Ledger>,
    spooler: Spooler,
    next: u64,
    last_error: String,
    /// Last sequence and number of lines that the disk's queue had no room for.
    lost: Option<(u64, u64)>,
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Capture {
    pub(crate) fn new(task: TaskId, ledger: Arc<Ledger>, spooler: Spooler) -> Self {
        Self { task, ledger, spooler, next: 0, last_error: String::new(), lost: None }
    }

    /// Reads until both pipes end or `give_up`; returns the last line on standard error.
    pub(crate) async fn run(
        mut self,
        stdout: process::ChildStdout,
        stderr: process::ChildStderr,
        give_up: CancellationToken,
    ) -> io::Result<String> {
        let mut stdout = ChildStdout::from_std(stdout)?;
        let mut stderr = ChildStderr::from_std(stderr)?;
        let mut buffers = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
        let mut splitters = (LineSplitter::default(), LineSplitter::default());
        let mut open = (true, true);
        while open.0 || open.1 {
            // An error ends a stream as its end does: there is nothing more to read from it.
            tokio::select! {
                read = stdout.read(&mut buffers.0), if open.0 => {
                    let bytes = read.unwrap_or(0);
                    open.0 = bytes > 0;
                    self.take(LogStream::Stdout, &mut splitters.0, &buffers.0[..bytes]);
                }
                read = stderr.read(&mut buffers.1), if open.1 => {
                    let bytes = read.unwrap_or(0);
                    open.1 = bytes > 0;
                    self.take(LogStream::Stderr, &mut splitters.1, &buffers.1[..bytes]);
                }
                () = give_up.cancelled() => {
                    self.take(LogStream::Stdout, &mut splitters.0, &[]);
                    self.take(LogStream::Stderr, &mut splitters.1, &[]);
                    let text = "the rank is gone but a process that it detached still holds its \
                                output: what that one writes is not kept";
                    self.emit(vec![gap(self.next, now_ms(), text.into())]);
                    break;
                }
            }
        }
        Ok(self.last_error)
    }

    /// Empty `bytes`: the stream has ended.
    fn take(&mut self, stream: LogStream, splitter: &mut LineSplitter, bytes: &[u8]) {
        let time_ms = now_ms();
        let mut lines = Vec::new();
        let mut line = |text: String| {
            // A panic's hint about backtraces stands behind its message and explains nothing.
            let hint = text.trim().is_empty() || text.starts_with("note: ");
            if stream == LogStream::Stderr && !hint {
                self.last_error.clone_from(&text);
            }
            lines.push(LogLine { sequence: self.next, time_ms, stream, text });
            self.next += 1;
        };
        splitter.push(bytes, &mut line);
        if bytes.is_empty()
            && let Some(text) = splitter.finish()
        {
            line(text);
        }
        if !lines.is_empty() {
            self.emit(lines);
        }
    }

    fn emit(&mut self, lines: Vec<LogLine>) {
        let mut batch = Vec::with_capacity(lines.len() + 1);
        if let Some((last, count)) = self.lost {
            let text = format!("{count} lines are missing here: the disk is too slow for them");
            batch.push(gap(last, now_ms(), text));
        }
        batch.extend(lines.iter().cloned());
        if self.spooler.offer(&self.task, batch) {
            self.lost = None;
        } else {
            let before = self.lost.map_or(0, |(_, before)| before);
            self.lost = lines.last().map(|last| (last.sequence, before + lines.len() as u64));
        }
        self.ledger.lines(&self.task, lines);
    }
}
