//! Answers `Logs`: the history, then, while following, what arrives, until the job ends.

use std::sync::Arc;
use std::time::Duration;

use api::records::{EndpointRecord, JobRecord, KIND_ENDPOINT, KIND_JOB};
use api::session::LogStream;
use api::{Generation, Name, Rank};
use checkpoint::Store;
use coordinator_core::Records;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::log_history::{History, LineSink, Positions, missing_lines, to_wire};
use crate::logs::{LogReader, LogWindow, WindowLine};
use crate::raft_node::RaftHandle;
use crate::status::leadership_lost;

/// Lines of an ended job may still be on their way from its workers: a follower leaves when none
/// came for this long …
const DRAIN_QUIET: Duration = Duration::from_millis(300);
/// … and after this long in any case.
const DRAIN_MAX: Duration = Duration::from_secs(3);

/// The workload whose lines are wanted, as the records have it now.
pub(crate) struct Workload {
    pub(crate) name: Name,
    pub(crate) generation: Generation,
    ranks: u32,
    ended: bool,
}

impl Workload {
    /// The job or endpoint of that name; `None` when there is neither.
    pub(crate) fn find(records: &Records, name: &Name) -> Option<Self> {
        if let Ok(Some((_, job))) = records.read::<JobRecord>(KIND_JOB, name.as_str()) {
            return Some(Self {
                name: name.clone(),
                generation: job.status.generation,
                // Processes that began as spares have logs of their own.
                ranks: job.spec.resources.ranks.max().saturating_add(job.status.spares_most),
                ended: job.status.phase.is_terminal(),
            });
        }
        let endpoint = records.read::<EndpointRecord>(KIND_ENDPOINT, name.as_str());
        let (_, endpoint) = endpoint.ok()??;
        Some(Self {
            name: name.clone(),
            generation: endpoint.status.generation,
            ranks: 1,
            ended: endpoint.status.phase.is_terminal(),
        })
    }
}

/// Everything a log stream reads from.
#[derive(Clone)]
pub(crate) struct LogSources {
    pub(crate) store: Store,
    pub(crate) window: Arc<LogWindow>,
    pub(crate) raft: RaftHandle,
}

impl LogSources {
    /// Sends the workload's lines to `sink`; with `follow` until the workload ended and its lines
    /// came, the reader left, or `over` is cancelled (an error tells the reader to ask elsewhere).
    pub(crate) async fn stream(
        self,
        workload: Workload,
        rank: Option<Rank>,
        follow: bool,
        over: CancellationToken,
        sink: LineSink,
    ) {
        let ranks = rank.map_or(0..workload.ranks, |rank| rank.0..rank.0.saturating_add(1));
        let (window, reader) = self.window.snapshot(&workload.name);
        let (job, generation) = (workload.name.clone(), workload.generation);
        let history = History { job, ranks, generation, window };
        let reader_left = sink.clone();
        let positions = tokio::select! {
            positions = history.replay(&self.store, &sink) => positions,
            () = reader_left.closed() => return,
            () = over.cancelled() => return give_up(&sink).await,
        };
        if follow {
            let applied = self.raft.watch_applied();
            let follower = Follower { workload, rank, reader, positions, applied, raft: self.raft };
            tokio::select! {
                () = follower.run(&sink) => {}
                () = reader_left.closed() => {}
                () = over.cancelled() => give_up(&sink).await,
            }
        }
    }
}

async fn give_up(sink: &LineSink) {
    // A reader that does not take the last message is gone or will find the stream closed.
    let _ = sink.try_send(Err(leadership_lost()));
}

struct Follower {
    workload: Workload,
    rank: Option<Rank>,
    reader: LogReader,
    positions: Positions,
    applied: watch::Receiver<u64>,
    raft: RaftHandle,
}

impl Follower {
    async fn run(mut self, sink: &LineSink) {
        let mut ended_at = None;
        loop {
            let lines = self.reader.read();
            if !lines.is_empty() {
                for line in lines {
                    if !self.give(line, sink).await {
                        return;
                    }
                }
                continue;
            }
            if self.has_ended() && ended_at.is_none() {
                ended_at = Some(Instant::now());
            }
            let quiet_until = ended_at.map(|at| (at + DRAIN_MAX).min(Instant::now() + DRAIN_QUIET));
            tokio::select! {
                () = self.reader.changed() => {}
                changed = self.applied.changed(), if ended_at.is_none() => {
                    if changed.is_err() {
                        return give_up(sink).await;
                    }
                }
                () = sleep_until(quiet_until) => return,
            }
            if ended_at.is_some_and(|at| at.elapsed() > DRAIN_MAX) {
                return;
            }
        }
    }

    /// Sends one line, and the gap before it; false when the reader left.
    async fn give(&mut self, entry: WindowLine, sink: &LineSink) -> bool {
        if self.rank.is_some_and(|rank| rank != entry.rank) {
            return true;
        }
        let next = self.positions.entry((entry.generation, entry.rank)).or_insert(0);
        let sequence = entry.line.sequence;
        if sequence < *next {
            return true;
        }
        if sequence > *next && entry.line.stream != LogStream::Gap {
            let line = missing_lines(*next, &entry.line, None);
            let gap = WindowLine { line, ..entry };
            if sink.send(Ok(to_wire(gap))).await.is_err() {
                return false;
            }
        }
        *next = sequence.saturating_add(1);
        sink.send(Ok(to_wire(entry))).await.is_ok()
    }

    fn has_ended(&self) -> bool {
        Workload::find(&self.raft.records(), &self.workload.name).is_none_or(|found| found.ended)
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
