//! The newest captured lines of every job, in memory. Older ones lie as segments in the object
//! store, where workers put them; `log_history` merges both.
//!
//! Lines never enter raft. A line that arrives twice (a worker sends again what was not
//! acknowledged) is kept once; a line that was dropped to stay within bounds shows as a jump in
//! sequence numbers, which readers state.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::session::LogLine;
use api::{Generation, Name, Rank, TaskId};
use tokio::sync::watch;

/// Bytes of lines kept per job: what a person scrolls through.
const JOB_BYTES_MAX: usize = 4 << 20;
/// Bytes of lines kept for all jobs together.
const TOTAL_BYTES_MAX: usize = 64 << 20;
/// Jobs with a window; the ones without new lines for the longest lose theirs first.
const JOBS_MAX: usize = 1024;
/// Tasks per job whose position is remembered to drop repeated lines; the oldest generation goes
/// first.
const TASKS_MAX: usize = 4096;
/// What a line costs beside its text.
const LINE_OVERHEAD: usize = size_of::<WindowLine>();
/// Lines handed to a follower at once, so that none copies a whole window under the lock.
const BATCH_MAX: usize = 256;

/// A line and whose it is.
#[derive(Clone, Debug)]
pub(crate) struct WindowLine {
    pub(crate) generation: Generation,
    pub(crate) rank: Rank,
    pub(crate) line: LogLine,
}

struct JobWindow {
    lines: VecDeque<WindowLine>,
    /// Arrival index of `lines[0]`.
    first: u64,
    bytes: usize,
    next_sequence: BTreeMap<(Generation, Rank), u64>,
    changed: watch::Sender<u64>,
    touched: u64,
}

impl JobWindow {
    fn new() -> Self {
        let (changed, _) = watch::channel(0);
        Self {
            lines: VecDeque::new(),
            first: 0,
            bytes: 0,
            next_sequence: BTreeMap::new(),
            changed,
            touched: 0,
        }
    }

    fn end(&self) -> u64 {
        self.first + self.lines.len() as u64
    }

    fn push(&mut self, task: &TaskId, lines: Vec<LogLine>) {
        let key = (task.generation, task.rank);
        let mut next = self.next_sequence.get(&key).copied().unwrap_or(0);
        for line in lines {
            if line.sequence < next {
                continue;
            }
            next = line.sequence.saturating_add(1);
            self.bytes += line.text.len() + LINE_OVERHEAD;
            let (generation, rank) = key;
            self.lines.push_back(WindowLine { generation, rank, line });
        }
        self.next_sequence.insert(key, next);
        while self.next_sequence.len() > TASKS_MAX {
            self.next_sequence.pop_first();
        }
        while self.bytes > JOB_BYTES_MAX
            && let Some(dropped) = self.lines.pop_front()
        {
            self.bytes -= dropped.line.text.len() + LINE_OVERHEAD;
            self.first += 1;
        }
        self.changed.send_replace(self.end());
    }
}

#[derive(Default)]
struct State {
    jobs: HashMap<Name, JobWindow>,
    bytes: usize,
    clock: u64,
}

impl State {
    fn window(&mut self, job: &Name) -> &mut JobWindow {
        self.clock += 1;
        let window = self.jobs.entry(job.clone()).or_insert_with(JobWindow::new);
        window.touched = self.clock;
        window
    }

    fn drop_oldest_windows(&mut self) {
        while self.bytes > TOTAL_BYTES_MAX || self.jobs.len() > JOBS_MAX {
            let oldest = self.jobs.iter().min_by_key(|(_, window)| window.touched);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else { return };
            if let Some(dropped) = self.jobs.remove(&oldest) {
                self.bytes -= dropped.bytes;
            }
        }
    }
}

/// The windows of all jobs.
#[derive(Default)]
pub(crate) struct LogWindow {
    state: Mutex<State>,
}

impl LogWindow {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every method leaves the state whole, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds captured lines of a task.
    pub(crate) fn push(&self, task: &TaskId, lines: Vec<LogLine>) {
        let mut state = self.lock();
        let window = state.window(&task.workload);
        let before = window.bytes;
        window.push(task, lines);
        let after = window.bytes;
        state.bytes = state.bytes + after - before;
        state.drop_oldest_windows();
    }

    /// All lines of a job in order of arrival, and a reader that continues behind them.
    pub(crate) fn snapshot(self: &Arc<Self>, job: &Name) -> (Vec<WindowLine>, LogReader) {
        let mut state = self.lock();
        let window = state.window(job);
        let lines = window.lines.iter().cloned().collect();
        let (cursor, changed) = (window.end(), window.changed.subscribe());
        state.drop_oldest_windows();
        (lines, LogReader { window: Arc::clone(self), job: job.clone(), cursor, changed })
    }
}

/// One follower's position in a job's window.
pub(crate) struct LogReader {
    window: Arc<LogWindow>,
    job: Name,
    cursor: u64,
    changed: watch::Receiver<u64>,
}

impl LogReader {
    /// The next lines in order of arrival; empty when there are none yet. A reader that falls
    /// behind the window continues at its beginning: the jump shows in the sequence numbers.
    pub(crate) fn read(&mut self) -> Vec<WindowLine> {
        self.changed.mark_unchanged();
        let mut state = self.window.lock();
        let window = state.window(&self.job);
        if self.changed.has_changed().is_err() {
            // The window was dropped for others' sake and began anew: so does the reader.
            self.changed = window.changed.subscribe();
            self.cursor = 0;
        }
        let skip = self.cursor.saturating_sub(window.first);
        let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(window.lines.len());
        let lines: Vec<_> = window.lines.range(skip..).take(BATCH_MAX).cloned().collect();
        self.cursor = window.first + (skip + lines.len()) as u64;
        lines
    }

    /// Returns when there may be more to read.
    pub(crate) async fn changed(&mut self) {
        // An error means that the window was dropped: `read` subscribes to the new one.
        let _ = self.changed.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use api::session::LogStream;

    use super::*;

    fn task(job: &str, rank: u32) -> TaskId {
        let workload = job.parse().expect("a name");
        TaskId { workload, generation: Generation(1), rank: Rank(rank) }
    }

    fn line(sequence: u64, text: &str) -> LogLine {
        LogLine { sequence, time_ms: sequence, stream: LogStream::Stdout, text: text.to_owned() }
    }

    fn sequences(lines: &[WindowLine]) -> Vec<u64> {
        lines.iter().map(|entry| entry.line.sequence).collect()
    }

    #[test]
    fn repeated_lines_are_kept_once_and_followers_continue_behind_the_snapshot() {
        let window = Arc::new(LogWindow::default());
        let task = task("a", 0);
        window.push(&task, vec![line(0, "x"), line(1, "y")]);
        let (lines, mut reader) = window.snapshot(&task.workload);
        assert_eq!(sequences(&lines), [0, 1]);
        assert!(reader.read().is_empty());
        window.push(&task, vec![line(1, "y"), line(2, "z")]);
        assert_eq!(sequences(&reader.read()), [2]);
        assert!(reader.read().is_empty());
    }

    #[test]
    fn one_job_and_all_jobs_together_are_bounded() {
        let window = Arc::new(LogWindow::default());
        let text = "x".repeat(8 << 10);
        let lines = |count: u64| (0..count).map(|n| line(n, &text)).collect::<Vec<_>>();
        window.push(&task("loud", 0), lines(1_000));
        let kept = window.lock().jobs.values().map(|job| job.bytes).sum::<usize>();
        assert!(kept <= JOB_BYTES_MAX && kept > JOB_BYTES_MAX / 2, "{kept}");
        let (kept, _) = window.snapshot(&"loud".parse().expect("a name"));
        assert_eq!(kept.last().map(|entry| entry.line.sequence), Some(999));
        for number in 0..40 {
            window.push(&task(&format!("job-{number}"), 0), lines(300));
        }
        let state = window.lock();
        let total: usize = state.jobs.values().map(|job| job.bytes).sum();
        assert_eq!(total, state.bytes);
        assert!(total <= TOTAL_BYTES_MAX, "{total}");
        assert!(!state.jobs.contains_key(&"loud".parse().expect("a name")), "the oldest was kept");
    }
}
