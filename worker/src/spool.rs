//! A task's output on the worker's disk: JSON lines in segments named by their first sequence,
//! bounded, written by one thread so that a slow or full disk stalls no rank.
//!
//! The segments are also what is uploaded to the object store: a [`Tail`] follows them with its
//! own cursor, so that a store that is down costs nothing but the bound.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::TaskId;
use api::session::{LOG_LINE_BYTES_MAX, LogLine, LogStream};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::warn;

use crate::folder::log_folder;

/// Batches that wait for the disk; a batch is what one read of a pipe gave, at most 16 KiB of text.
const QUEUE_BATCHES: usize = 1_024;
/// Segments that make up a task's bound: the unit in which old lines are dropped.
const SEGMENTS: u64 = 8;
/// Largest segment, so that dropping one from a large bound is still quick.
const SEGMENT_BYTES_MAX: u64 = 4 << 20;
/// What is uploaded at once, before compression.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;
/// Worst case of one encoded line: text escaped sixfold, and the keys.
const ENCODED_LINE_BYTES_MAX: usize = LOG_LINE_BYTES_MAX * 6 + 256;
const CURSOR_FILE: &str = "cursor.json";
const NOTE_FILE: &str = "dropped.jsonl";
/// A larger cursor file is not ours.
const CURSOR_BYTES_MAX: u64 = 4 << 10;

const _: () = assert!(ENCODED_LINE_BYTES_MAX < CHUNK_BYTES);

/// A note that lines are missing up to and with `sequence`: the line behind it follows on.
pub(crate) fn gap(sequence: u64, time_ms: u64, text: String) -> LogLine {
    LogLine { sequence, time_ms, stream: LogStream::Gap, text }
}

enum Order {
    Lines { task: TaskId, lines: Vec<LogLine> },
    Close { task: TaskId, done: oneshot::Sender<()> },
}

/// Handle of the thread that writes; it ends when the last clone is gone.
#[derive(Clone)]
pub(crate) struct Spooler {
    orders: mpsc::Sender<Order>,
    /// Told when about a chunk of lines is new on disk.
    pub(crate) grown: Arc<Notify>,
}

impl Spooler {
    pub(crate) fn start(logs: PathBuf, bytes_max: u64) -> io::Result<Self> {
        let (orders, mut inbox) = mpsc::channel(QUEUE_BATCHES);
        let grown = Arc::new(Notify::new());
        let notify = grown.clone();
        std::thread::Builder::new().name("worker-logs".into()).spawn(move || {
            let mut spools: BTreeMap<TaskId, Spool> = BTreeMap::new();
            let mut fresh = 0;
            while let Some(order) = inbox.blocking_recv() {
                match order {
                    Order::Lines { task, lines } => {
                        let open = || Spool::new(log_folder(&logs, &task), bytes_max);
                        fresh += spools.entry(task.clone()).or_insert_with(open).append(lines);
                        if fresh >= CHUNK_BYTES as u64 {
                            fresh = 0;
                            notify.notify_one();
                        }
                    }
                    Order::Close { task, done } => {
                        spools.remove(&task);
                        // Nobody waits any more when the worker gave up on it: nothing to do.
                        let _ = done.send(());
                    }
                }
            }
        })?;
        Ok(Self { orders, grown })
    }

    /// Queues lines without waiting; false when the disk is too far behind.
    pub(crate) fn offer(&self, task: &TaskId, lines: Vec<LogLine>) -> bool {
        self.orders.try_send(Order::Lines { task: task.clone(), lines }).is_ok()
    }

    /// Returns when everything offered for the task before is on disk (or lost to a full one).
    pub(crate) async fn close(&self, task: &TaskId) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::Close { task: task.clone(), done }).await.is_ok() {
            let _ = closed.await;
        }
    }
}

/// One task's segments, as their writer sees them.
struct Spool {
    folder: PathBuf,
    bytes_max: u64,
    segment_bytes: u64,
    current: Option<File>,
    /// First sequence and bytes of each segment, oldest first; the last one is being written.
    segments: VecDeque<(u64, u64)>,
    /// Lines that could not be written, to be noted by the next that can.
    lost: Option<(LogLine, u64)>,
}

impl Spool {
    fn new(folder: PathBuf, bytes_max: u64) -> Self {
        let segment_bytes = (bytes_max / SEGMENTS).clamp(1, SEGMENT_BYTES_MAX);
        let (current, segments, lost) = (None, VecDeque::new(), None);
        Self { folder, bytes_max, segment_bytes, current, segments, lost }
    }

    /// Returns the bytes written.
    fn append(&mut self, lines: Vec<LogLine>) -> u64 {
        let mut written = 0;
        for line in lines {
            match self.append_line(&line) {
                Ok(bytes) => written += bytes,
                Err(error) => self.lose(&line, &error),
            }
        }
        written
    }

    fn lose(&mut self, line: &LogLine, error: &io::Error) {
        if self.lost.is_none() {
            warn!(folder = %self.folder.display(), %error, "output of a rank is not kept on disk");
        }
        let count = self.lost.take().map_or(1, |(_, before)| before + 1);
        let text = format!("the disk refused them: {error}");
        self.lost = Some((gap(line.sequence, line.time_ms, text), count));
    }

    fn append_line(&mut self, line: &LogLine) -> io::Result<u64> {
        let mut bytes = Vec::with_capacity(line.text.len() + 96);
        let mut first = line.sequence;
        if let Some((note, count)) = &self.lost {
            let text = format!("{count} lines are missing here: {}", note.text);
            serde_json::to_writer(&mut bytes, &LogLine { text, ..note.clone() })?;
            bytes.push(b'\n');
            first = note.sequence;
        }
        serde_json::to_writer(&mut bytes, line)?;
        bytes.push(b'\n');
        let full = self.segments.back().is_none_or(|(_, bytes)| *bytes >= self.segment_bytes);
        if full || self.current.is_none() {
            fs::create_dir_all(&self.folder)?;
            let path = segment_path(&self.folder, first);
            self.current = Some(OpenOptions::new().create_new(true).append(true).open(path)?);
            self.segments.push_back((first, 0));
        }
        let (Some(file), Some((_, length))) = (&mut self.current, self.segments.back_mut()) else {
            return Err(io::Error::other("no segment is open"));
        };
        if let Err(error) = file.write_all(&bytes) {
            // Half a line must not stand in front of the next whole one.
            file.set_len(*length)?;
            return Err(error);
        }
        *length += bytes.len() as u64;
        self.lost = None;
        if let Err(error) = self.enforce_bound() {
            // The line itself is written.
            warn!(folder = %self.folder.display(), %error, "old output cannot be dropped");
        }
        Ok(bytes.len() as u64)
    }

    fn enforce_bound(&mut self) -> io::Result<()> {
        let mut total: u64 = self.segments.iter().map(|(_, bytes)| bytes).sum();
        let mut kept_from = None;
        while total > self.bytes_max && self.segments.len() > 1 {
            let Some((first, bytes)) = self.segments.pop_front() else { break };
            fs::remove_file(segment_path(&self.folder, first))?;
            total -= bytes;
            kept_from = self.segments.front().map(|(first, _)| *first);
        }
        let Some(first) = kept_from else { return Ok(()) };
        let text = format!(
            "{first} lines are missing here: dropped to keep within worker.log_bytes = {}",
            self.bytes_max
        );
        let temporary = self.folder.join("dropped.tmp");
        fs::write(&temporary, serde_json::to_vec(&gap(first.saturating_sub(1), 0, text))?)?;
        fs::rename(temporary, self.folder.join(NOTE_FILE))
    }
}

fn segment_path(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:012}.jsonl"))
}

fn segments(folder: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<u64> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".jsonl")?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// How far a task's output is uploaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    segment: u64,
    offset: u64,
    next_sequence: u64,
}

/// Follows a task's segments in order; may skip what the bound removed, noting it.
pub(crate) struct Tail {
    folder: PathBuf,
    cursor: Cursor,
}

/// The next lines to upload.
pub(crate) struct Chunk {
    /// Sequence of its first line or note.
    pub(crate) first: u64,
    /// JSON lines, zstd-compressed.
    pub(crate) compressed: Vec<u8>,
    end: Cursor,
}

impl Tail {
    /// Continues where the last [`Tail::advance`] of any incarnation stood.
    pub(crate) fn open(folder: PathBuf) -> Self {
        let path = folder.join(CURSOR_FILE);
        let small = fs::metadata(&path).is_ok_and(|file| file.len() <= CURSOR_BYTES_MAX);
        // Without a cursor the upload begins anew: the same keys, the same lines.
        let bytes = if small { fs::read(&path).unwrap_or_default() } else { Vec::new() };
        Self { folder, cursor: serde_json::from_slice(&bytes).unwrap_or_default() }
    }

    /// Up to [`CHUNK_BYTES`] of whole lines after the cursor, or None when there is nothing new.
    pub(crate) fn next_chunk(&self) -> io::Result<Option<Chunk>> {
        // Listed before it is read: a segment with a successor is complete.
        let listed = segments(&self.folder)?;
        let mut cursor = self.cursor;
        while let Some(&segment) = listed.iter().find(|first| **first >= cursor.segment) {
            if segment != cursor.segment {
                cursor = Cursor { segment, offset: 0, ..cursor };
            }
            let bytes = match read_at(&segment_path(&self.folder, segment), cursor.offset) {
                // The bound removed it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                bytes => bytes?,
            };
            let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            if whole == 0 {
                let Some(&next) = listed.iter().find(|first| **first > segment) else { break };
                cursor = Cursor { segment: next, offset: 0, ..cursor };
                continue;
            }
            cursor.offset += whole as u64;
            if let Some(chunk) = chunk(&bytes[..whole], cursor)? {
                return Ok(Some(chunk));
            }
        }
        Ok(None)
    }

    /// The chunk is uploaded.
    pub(crate) fn advance(&mut self, chunk: &Chunk) -> io::Result<()> {
        self.cursor = chunk.end;
        let temporary = self.folder.join("cursor.tmp");
        fs::write(&temporary, serde_json::to_vec(&self.cursor)?)?;
        fs::rename(temporary, self.folder.join(CURSOR_FILE))
    }
}

fn read_at(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(CHUNK_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn chunk(bytes: &[u8], mut cursor: Cursor) -> io::Result<Option<Chunk>> {
    let (mut out, mut first) = (Vec::with_capacity(bytes.len()), None);
    let mut write = |line: &LogLine| {
        first.get_or_insert(line.sequence);
        serde_json::to_writer(&mut out, line)?;
        out.push(b'\n');
        io::Result::Ok(())
    };
    for bytes in bytes.split(|b| *b == b'\n') {
        // What a power cut left unreadable is missing, and noted as such by the next line.
        let Ok(line) = serde_json::from_slice::<LogLine>(bytes) else { continue };
        if line.sequence < cursor.next_sequence {
            continue;
        }
        if line.sequence > cursor.next_sequence && line.stream != LogStream::Gap {
            let missing = line.sequence - cursor.next_sequence;
            let text = format!("{missing} lines are missing here: dropped on the worker's disk");
            write(&gap(line.sequence - 1, line.time_ms, text))?;
        }
        write(&line)?;
        cursor.next_sequence = line.sequence + 1;
    }
    let Some(first) = first else { return Ok(None) };
    Ok(Some(Chunk { first, compressed: zstd::encode_all(out.as_slice(), 3)?, end: cursor }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(sequence: u64) -> LogLine {
        let text = format!("line {sequence} {}", "x".repeat(40));
        LogLine { sequence, time_ms: 1, stream: LogStream::Stdout, text }
    }

    fn read_all(tail: &mut Tail) -> Vec<LogLine> {
        let mut lines = Vec::new();
        while let Some(chunk) = tail.next_chunk().expect("reads") {
            let bytes = zstd::decode_all(chunk.compressed.as_slice()).expect("decompresses");
            let text = String::from_utf8(bytes).expect("text");
            let first = lines.len();
            lines.extend(text.lines().map(|l| serde_json::from_str::<LogLine>(l).expect("a line")));
            assert_eq!(lines[first].sequence, chunk.first);
            tail.advance(&chunk).expect("writes");
        }
        lines
    }

    #[test]
    fn a_tail_sees_every_line_once_across_segments_and_restarts() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut spool = Spool::new(folder.path().to_owned(), 1 << 20);
        spool.segment_bytes = 300;
        let (mut seen, mut next) = (Vec::new(), 0);
        for count in [1, 2, 7, 30] {
            spool.append((next..next + count).map(line).collect());
            next += count;
            seen.extend(read_all(&mut Tail::open(folder.path().to_owned())));
        }
        assert!(segments(folder.path()).expect("lists").len() > 5);
        assert_eq!(seen, (0..next).map(line).collect::<Vec<_>>());
    }

    #[test]
    fn the_bound_holds_and_what_it_dropped_is_noted() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut spool = Spool::new(folder.path().to_owned(), 4_000);
        let mut tail = Tail::open(folder.path().to_owned());
        spool.append((0..3).map(line).collect());
        assert_eq!(read_all(&mut tail).len(), 3);
        spool.append((3..200).map(line).collect());
        let kept = segments(folder.path()).expect("lists");
        let size = |first: &u64| fs::metadata(segment_path(folder.path(), *first)).map(|f| f.len());
        let bytes: u64 = kept.iter().map(|first| size(first).expect("a file")).sum();
        assert!(bytes <= 4_000, "{bytes} bytes are kept");
        let note = fs::read_to_string(folder.path().join(NOTE_FILE)).expect("a note");
        assert!(note.contains(&format!("{} lines are missing", kept[0])), "{note}");

        let lines = read_all(&mut tail);
        assert_eq!((lines[0].stream, lines[0].sequence), (LogStream::Gap, kept[0] - 1));
        assert!(lines[0].text.starts_with(&format!("{} lines are missing", kept[0] - 3)));
        assert_eq!(lines[1..], (kept[0]..200).map(line).collect::<Vec<_>>());
    }

    #[test]
    fn a_disk_that_refuses_is_noted_and_never_tears_a_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let blocked = folder.path().join("logs");
        fs::write(&blocked, "a file where the folder should be").expect("writes");
        let mut spool = Spool::new(blocked.clone(), 1 << 20);
        spool.append((0..5).map(line).collect());
        fs::remove_file(&blocked).expect("removes");
        spool.append((5..7).map(line).collect());
        let lines = read_all(&mut Tail::open(blocked));
        assert_eq!((lines[0].stream, lines[0].sequence), (LogStream::Gap, 4));
        assert!(lines[0].text.starts_with("5 lines are missing here: the disk refused them"));
        assert_eq!(lines[1..], [line(5), line(6)]);
    }
}
