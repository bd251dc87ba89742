//! A job's captured lines, oldest first: segments that workers put into the object store, merged
//! with the recent window, and what arrives after that.
//!
//! Within a task lines come in sequence, each once. A line that is in neither place is stated: a
//! line of stream "gap" stands where the sequence jumps. Memory is bounded by one segment per rank.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read as _;

use api::session::{LogLine, LogStream};
use api::{Generation, Name, Rank, pb};
use checkpoint::{Store, keys};
use futures::stream::{self, StreamExt as _};
use tokio::sync::mpsc;
use tonic::Status;

use crate::logs::WindowLine;

/// Largest segment after decompression: workers cut segments well below it.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// Listings in flight: enough to hide latency, few enough not to flood a store.
const LISTINGS_AT_ONCE: usize = 16;
/// End of a segment's key.
const SEGMENT_SUFFIX: &str = ".jsonl.zst";

/// Why lines are missing when nothing else is known.
const NOT_KEPT: &str = "they are neither in the object store nor in the recent window";

/// The first sequence not yet given out, per task.
pub(crate) type Positions = BTreeMap<(Generation, Rank), u64>;
/// Where lines go; a reader that left closes it.
pub(crate) type LineSink = mpsc::Sender<Result<pb::LogLine, Status>>;

/// A line as it travels to a client.
pub(crate) fn to_wire(entry: WindowLine) -> pb::LogLine {
    let WindowLine { generation, rank, line } = entry;
    let stream = match line.stream {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
        LogStream::Gap => "gap",
    };
    pb::LogLine {
        generation: generation.0,
        rank: rank.0,
        time_ms: line.time_ms,
        stream: stream.to_owned(),
        text: line.text,
        sequence: line.sequence,
    }
}

/// One task's lines: those in the store, then those in the window, as one sequence.
struct TaskLines {
    generation: Generation,
    rank: Rank,
    segments: VecDeque<String>,
    stored: VecDeque<LogLine>,
    window: VecDeque<LogLine>,
    next: u64,
    /// Why stored lines could not be read, since the last gap was stated.
    unreadable: Option<String>,
    /// The line behind a gap that was just stated.
    behind_gap: Option<LogLine>,
}

impl TaskLines {
    async fn next(&mut self, store: &Store) -> Option<LogLine> {
        if let Some(line) = self.behind_gap.take() {
            return Some(self.give(line));
        }
        loop {
            if self.stored.is_empty()
                && let Some(key) = self.segments.pop_front()
            {
                match read_segment(store, &key).await {
                    Ok(lines) => self.stored = lines,
                    Err(error) => self.unreadable = Some(error),
                }
                continue;
            }
            let from_window = match (self.stored.front(), self.window.front()) {
                (Some(stored), Some(recent)) => recent.sequence < stored.sequence,
                (stored, _) => stored.is_none(),
            };
            let line = if from_window { self.window.pop_front() } else { self.stored.pop_front() };
            let Some(line) = line else {
                let why = self.unreadable.take()?;
                return Some(gap_line(self.next, 0, format!("later lines are missing: {why}")));
            };
            if line.sequence < self.next {
                continue;
            }
            if line.sequence == self.next || line.stream == LogStream::Gap {
                return Some(self.give(line));
            }
            let why = self.unreadable.take();
            let gap = missing_lines(self.next, &line, why.as_deref());
            self.behind_gap = Some(line);
            return Some(gap);
        }
    }

    fn give(&mut self, line: LogLine) -> LogLine {
        self.next = line.sequence.saturating_add(1);
        line
    }
}

/// Stands where the sequence jumps from `next` to `line`.
pub(crate) fn missing_lines(next: u64, line: &LogLine, why: Option<&str>) -> LogLine {
    let count = line.sequence.saturating_sub(next);
    let noun = if count == 1 { "line is" } else { "lines are" };
    let text = format!("{count} {noun} missing: {}", why.unwrap_or(NOT_KEPT));
    gap_line(next, line.time_ms, text)
}

fn gap_line(sequence: u64, time_ms: u64, text: String) -> LogLine {
    LogLine { sequence, time_ms, stream: LogStream::Gap, text }
}

/// Reads one segment; the error is for people.
async fn read_segment(store: &Store, key: &str) -> Result<VecDeque<LogLine>, String> {
    let bytes = store.get(key).await.map_err(|error| format!("`{key}`: {error}"))?;
    let parsed = tokio::task::spawn_blocking(move || parse_segment(&bytes)).await;
    let parsed = parsed.unwrap_or_else(|_| Err("reading it failed unexpectedly".to_owned()));
    parsed.map_err(|error| format!("`{key}`: {error}"))
}

fn parse_segment(bytes: &[u8]) -> Result<VecDeque<LogLine>, String> {
    let decoder = zstd::stream::read::Decoder::new(bytes).map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    let read = decoder.take(SEGMENT_BYTES_MAX + 1).read_to_end(&mut text);
    let bytes = read.map_err(|error| error.to_string())?;
    if bytes as u64 > SEGMENT_BYTES_MAX {
        return Err(format!("it decompresses to more than {SEGMENT_BYTES_MAX} bytes"));
    }
    let mut lines = VecDeque::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let parsed = serde_json::from_slice::<LogLine>(line);
        lines.push_back(parsed.map_err(|error| format!("not a log line: {error}"))?);
    }
    lines.make_contiguous().sort_by_key(|line| line.sequence);
    Ok(lines)
}

/// Which lines of a job are wanted.
pub(crate) struct History {
    pub(crate) job: Name,
    /// Ranks that may have written lines.
    pub(crate) ranks: std::ops::Range<u32>,
    /// The newest generation.
    pub(crate) generation: Generation,
    /// The window's lines, in order of arrival.
    pub(crate) window: Vec<WindowLine>,
}

impl History {
    /// Hands every line to `sink`, generation by generation and by time within one; ends early when
    /// its reader left. Returns how far each task came.
    pub(crate) async fn replay(self, store: &Store, sink: &LineSink) -> Positions {
        let mut window: BTreeMap<(Generation, Rank), VecDeque<LogLine>> = BTreeMap::new();
        for entry in self.window {
            if self.ranks.contains(&entry.rank.0) {
                let key = (entry.generation, entry.rank);
                window.entry(key).or_default().push_back(entry.line);
            }
        }
        let newest = window.keys().map(|(generation, _)| generation.0).max().unwrap_or(0);
        let mut positions = Positions::new();
        for generation in (1..=self.generation.0.max(newest)).map(Generation) {
            let listed = list_generation(store, &self.job, generation, self.ranks.clone()).await;
            let mut tasks: Vec<TaskLines> = listed
                .into_iter()
                .map(|(rank, segments)| {
                    let (segments, unreadable) = match segments {
                        Ok(segments) => (segments, None),
                        Err(error) => (VecDeque::new(), Some(error)),
                    };
                    TaskLines {
                        generation,
                        rank,
                        segments,
                        stored: VecDeque::new(),
                        window: window.remove(&(generation, rank)).unwrap_or_default(),
                        next: 0,
                        unreadable,
                        behind_gap: None,
                    }
                })
                .collect();
            let alive = merge_by_time(&mut tasks, store, sink).await;
            let reached = tasks.iter().filter(|task| task.next > 0);
            positions.extend(reached.map(|task| ((task.generation, task.rank), task.next)));
            if !alive {
                break;
            }
        }
        positions
    }
}

/// Hands out the tasks' lines by time, keeping each task's own order; false when the reader left.
async fn merge_by_time(tasks: &mut [TaskLines], store: &Store, sink: &LineSink) -> bool {
    let mut heads = BTreeMap::new();
    for (index, task) in tasks.iter_mut().enumerate() {
        if let Some(line) = task.next(store).await {
            heads.insert((line.time_ms, index), line);
        }
    }
    while let Some(((_, index), line)) = heads.pop_first() {
        let task = &mut tasks[index];
        let entry = WindowLine { generation: task.generation, rank: task.rank, line };
        if sink.send(Ok(to_wire(entry))).await.is_err() {
            return false;
        }
        if let Some(line) = task.next(store).await {
            heads.insert((line.time_ms, index), line);
        }
    }
    true
}

type Listed = (Rank, Result<VecDeque<String>, String>);

/// The segments of every rank of a generation, in rank order.
async fn list_generation(
    store: &Store,
    job: &Name,
    generation: Generation,
    ranks: std::ops::Range<u32>,
) -> Vec<Listed> {
    let listings = stream::iter(ranks.map(Rank)).map(|rank| async move {
        let prefix = keys::logs(job, generation, rank);
        let listed = store.list(&prefix).await.map_err(|error| error.to_string());
        let segments = listed.map(|objects| {
            let keys = objects.into_iter().map(|object| object.key);
            // A listing by prefix may also hold those of rank 10 when rank 1 is meant.
            let is_own = |key: &String| {
                let file = key.strip_prefix(&prefix).and_then(|rest| rest.strip_prefix('/'));
                file.is_some_and(|file| file.ends_with(SEGMENT_SUFFIX))
            };
            let mut keys: Vec<_> = keys.filter(is_own).collect();
            keys.sort();
            VecDeque::from(keys)
        });
        (rank, segments)
    });
    listings.buffered(LISTINGS_AT_ONCE).collect().await
}

#[cfg(test)]
mod tests {
    use api::config::StoreSection;

    use super::*;

    fn line(sequence: u64, time_ms: u64) -> LogLine {
        LogLine { sequence, time_ms, stream: LogStream::Stdout, text: format!("line {sequence}") }
    }

    fn segment(lines: &[LogLine]) -> Vec<u8> {
        let text: String = lines
            .iter()
            .map(|line| serde_json::to_string(line).expect("serialises") + "\n")
            .collect();
        zstd::encode_all(text.as_bytes(), 1).expect("compresses")
    }

    async fn put(
        store: &Store,
        job: &Name,
        generation: u64,
        rank: u32,
        bytes: Vec<u8>,
        first: u64,
    ) {
        let prefix = keys::logs(job, Generation(generation), Rank(rank));
        let key = format!("{}/{first:012}{SEGMENT_SUFFIX}", prefix.trim_end_matches('/'));
        store.put(&key, bytes.into()).await.expect("stored");
    }

    fn entry(generation: u64, rank: u32, line: LogLine) -> WindowLine {
        WindowLine { generation: Generation(generation), rank: Rank(rank), line }
    }

    #[tokio::test]
    async fn segments_and_window_merge_into_one_sequence_with_gaps_stated() {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let store = Store::open(&StoreSection::default(), &uri).expect("opens");
        let job: Name = "a".parse().expect("a name");
        // Rank 0 of g1: 0–2 stored, 2–3 in the window, then a jump to 6. Rank 1: stored only, then
        // a segment with a flipped byte. g2: only in the window.
        put(&store, &job, 1, 0, segment(&[line(0, 10), line(1, 11)]), 0).await;
        put(&store, &job, 1, 0, segment(&[line(2, 30)]), 2).await;
        put(&store, &job, 1, 1, segment(&[line(0, 20)]), 0).await;
        let mut damaged = segment(&[line(1, 21)]);
        damaged[0] ^= 1;
        put(&store, &job, 1, 1, damaged, 1).await;
        let window = vec![
            entry(1, 0, line(2, 30)),
            entry(1, 0, line(3, 31)),
            entry(1, 0, line(6, 34)),
            entry(2, 0, line(0, 5)),
        ];
        let history = History { job, ranks: 0..2, generation: Generation(2), window };
        let (sink, mut lines) = mpsc::channel(64);
        let positions = history.replay(&store, &sink).await;
        drop(sink);
        let mut seen = Vec::new();
        while let Some(line) = lines.recv().await {
            let pb::LogLine { generation, rank, sequence, stream, text, .. } =
                line.expect("a line");
            let text = text.split(" missing").next().filter(|_| stream == "gap");
            seen.push(format!("g{generation} r{rank} {sequence} {}", text.unwrap_or_default()));
        }
        // The damaged segment's gap carries no time of its own, so it stands where it was found.
        assert_eq!(
            seen,
            [
                "g1 r0 0 ",
                "g1 r0 1 ",
                "g1 r1 0 ",
                "g1 r1 1 later lines are",
                "g1 r0 2 ",
                "g1 r0 3 ",
                "g1 r0 4 2 lines are",
                "g1 r0 6 ",
                "g2 r0 0 "
            ]
        );
        let reached: Vec<u64> = positions.into_values().collect();
        assert_eq!(reached, [7, 1, 1]);
    }
}
