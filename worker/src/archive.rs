//! Uploads what tasks printed to the object store, so that `logs` still answers when this host or
//! the leader is gone. While the store is down the lines wait on disk, within their bound.
//!
//! One object per chunk, `<first sequence>.jsonl.zst`. A crash between upload and cursor uploads a
//! chunk again under the same key with at least the same lines: readers skip sequences they have.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::{Generation, Rank, TaskId};
use bytes::Bytes;
use checkpoint::{Store, keys};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use crate::folder::log_folder;
use crate::spool::Tail;

/// Lines wait at most this long for their upload while the store answers.
const INTERVAL: Duration = Duration::from_secs(5);
/// A put that takes longer is tried again.
const PUT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest pause between attempts while the store is down.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Starts, ends and flushes that may wait while an upload is under way.
const ORDER_QUEUE: usize = 1_024;
/// Folders of ended, uploaded tasks that stay on disk for people to look at.
const UPLOADED_FOLDERS_MAX: usize = 64;
/// Folders of ended tasks that wait for a store that is down; the oldest go first.
const WAITING_FOLDERS_MAX: usize = 1_024;

enum Order {
    Follow(TaskId),
    Ended(TaskId),
    Flush(oneshot::Sender<()>),
}

/// Handle of the task that uploads; it ends when the last clone is gone.
#[derive(Clone)]
pub(crate) struct Archive {
    orders: mpsc::Sender<Order>,
}

impl Archive {
    /// Starts with everything that a former incarnation could not upload.
    pub(crate) fn start(store: Store, logs: PathBuf, grown: Arc<Notify>) -> Self {
        let (orders, inbox) = mpsc::channel(ORDER_QUEUE);
        let uploader = Uploader {
            store,
            logs,
            tails: BTreeMap::new(),
            ended: VecDeque::new(),
            is_down: false,
        };
        tokio::spawn(uploader.run(inbox, grown));
        Self { orders }
    }

    pub(crate) async fn follow(&self, task: &TaskId) {
        // The uploader ends only with the runtime.
        let _ = self.orders.send(Order::Follow(task.clone())).await;
    }

    pub(crate) async fn ended(&self, task: &TaskId) {
        let _ = self.orders.send(Order::Ended(task.clone())).await;
    }

    /// Returns when everything on disk has been offered to the store once.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.orders.send(Order::Flush(done)).await.is_ok() {
            let _ = flushed.await;
        }
    }
}

/// Why a task's output is not uploaded.
enum Failure {
    Disk(String),
    Store(String),
}

struct Uploader {
    store: Store,
    logs: PathBuf,
    tails: BTreeMap<TaskId, Arc<std::sync::Mutex<Tail>>>,
    /// Tasks that write no more, oldest first.
    ended: VecDeque<TaskId>,
    is_down: bool,
}

impl Uploader {
    async fn run(mut self, mut inbox: mpsc::Receiver<Order>, grown: Arc<Notify>) {
        for task in former_tasks(&self.logs) {
            self.follow(task.clone());
            self.ended.push_back(task);
        }
        let mut pause = INTERVAL;
        let mut next = Instant::now();
        loop {
            let mut flushed = None;
            let mut has_ended = false;
            tokio::select! {
                order = inbox.recv() => match order {
                    None => return,
                    Some(Order::Follow(task)) => {
                        self.follow(task);
                        continue;
                    }
                    Some(Order::Ended(task)) => {
                        self.ended.push_back(task);
                        has_ended = true;
                    }
                    Some(Order::Flush(done)) => flushed = Some(done),
                },
                () = grown.notified() => {}
                () = sleep_until(next) => {}
            }
            // While the store is down only the clock and a flush try it.
            if !self.is_down || flushed.is_some() || Instant::now() >= next {
                self.is_down = !self.upload().await;
                pause = if self.is_down { (pause * 2).min(BACKOFF_MAX) } else { INTERVAL };
                next = Instant::now() + pause;
            }
            if has_ended {
                self.let_go().await;
            }
            if let Some(done) = flushed {
                let _ = done.send(());
            }
        }
    }

    fn follow(&mut self, task: TaskId) {
        let tail = Tail::open(log_folder(&self.logs, &task));
        self.tails.insert(task, Arc::new(std::sync::Mutex::new(tail)));
    }

    /// Uploads whatever is new; false when the store did not take it.
    async fn upload(&mut self) -> bool {
        let mut done = Vec::new();
        for (task, tail) in &self.tails {
            match self.upload_task(task, tail).await {
                Ok(()) => done.push(task.clone()),
                Err(Failure::Disk(error)) => {
                    // Others go on; this one is tried again at the next turn.
                    warn!(%task, error, "output on disk cannot be read");
                }
                Err(Failure::Store(error)) => {
                    if !self.is_down {
                        let waits = "output of ranks waits on disk";
                        warn!(%task, error, "the object store takes no logs: {waits}");
                    }
                    return false;
                }
            }
        }
        if self.is_down {
            info!("the object store takes logs again");
        }
        for task in done {
            if let Some(index) = self.ended.iter().position(|ended| *ended == task) {
                self.ended.remove(index);
                self.tails.remove(&task);
            }
        }
        true
    }

    async fn upload_task(
        &self,
        task: &TaskId,
        tail: &Arc<std::sync::Mutex<Tail>>,
    ) -> Result<(), Failure> {
        let prefix = keys::logs(&task.workload, task.generation, task.rank);
        let prefix = prefix.trim_end_matches('/');
        loop {
            let chunk = on_tail(tail, |tail| tail.next_chunk()).await?;
            let Some(mut chunk) = chunk else { return Ok(()) };
            let key = format!("{prefix}/{:012}.jsonl.zst", chunk.first);
            let bytes = Bytes::from(std::mem::take(&mut chunk.compressed));
            match timeout(PUT_TIMEOUT, self.store.put(&key, bytes)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(Failure::Store(error.to_string())),
                Err(_) => {
                    let text = format!("no answer within {} s", PUT_TIMEOUT.as_secs());
                    return Err(Failure::Store(text));
                }
            }
            on_tail(tail, move |tail| tail.advance(&chunk)).await?;
        }
    }

    /// Keeps the number of folders of ended tasks within its bounds.
    async fn let_go(&mut self) {
        while self.ended.len() > WAITING_FOLDERS_MAX {
            let Some(task) = self.ended.pop_front() else { break };
            self.tails.remove(&task);
            warn!(%task, "dropped the output of an ended rank: the object store is down for long");
        }
        let (logs, live) = (self.logs.clone(), self.tails.keys().cloned().collect::<Vec<_>>());
        let pruned = tokio::task::spawn_blocking(move || prune(&logs, &live)).await;
        if let Err(error) = pruned {
            warn!(%error, "old output of ranks was not removed");
        }
    }
}

async fn on_tail<T: Send + 'static>(
    tail: &Arc<std::sync::Mutex<Tail>>,
    act: impl FnOnce(&mut Tail) -> std::io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let tail = tail.clone();
    let acted = tokio::task::spawn_blocking(move || {
        act(&mut tail.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    });
    let result = acted.await.map_err(|error| Failure::Disk(error.to_string()))?;
    result.map_err(|error| Failure::Disk(error.to_string()))
}

/// Tasks with output on disk, oldest first.
fn former_tasks(logs: &Path) -> Vec<TaskId> {
    let mut found: Vec<(SystemTime, TaskId)> = Vec::new();
    let below = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    for workload in below(logs) {
        let Some(name) = workload.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        for generation in below(&workload.path()) {
            let Some(number) = numbered(&generation, 'g') else { continue };
            for rank in below(&generation.path()) {
                let Some(rank_number) = numbered(&rank, 'r') else { continue };
                let Ok(rank_number) = u32::try_from(rank_number) else { continue };
                let modified = rank.metadata().and_then(|m| m.modified());
                let (generation, rank) = (Generation(number), Rank(rank_number));
                let task = TaskId { workload: Clone::clone(&name), generation, rank };
                found.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), task));
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, task)| task).collect()
}

fn numbered(entry: &fs::DirEntry, letter: char) -> Option<u64> {
    entry.file_name().to_str()?.strip_prefix(letter)?.parse().ok()
}

/// Removes the oldest folders beyond the bound, apart from those of `live` tasks.
fn prune(logs: &Path, live: &[TaskId]) {
    let mut tasks = former_tasks(logs);
    tasks.retain(|task| !live.contains(task));
    let excess = tasks.len().saturating_sub(UPLOADED_FOLDERS_MAX);
    for task in tasks.drain(..excess) {
        let folder = log_folder(logs, &task);
        if let Err(error) = fs::remove_dir_all(&folder) {
            warn!(folder = %folder.display(), %error, "cannot remove old output");
        }
        // Its generation and workload, if it was the last in them; not empty is no error.
        for parent in folder.ancestors().skip(1).take(2) {
            let _ = fs::remove_dir(parent);
        }
    }
}

#[cfg(test)]
mod tests {
    use api::config::StoreSection;
    use api::session::{LogLine, LogStream};

    use super::*;
    use crate::spool::Spooler;

    fn task(generation: u64) -> TaskId {
        let workload = "job".parse().expect("a name");
        TaskId { workload, generation: Generation(generation), rank: Rank(0) }
    }

    async fn print(spooler: &Spooler, task: &TaskId, sequence: u64) {
        let text = format!("line {sequence}");
        let line = LogLine { sequence, time_ms: 1, stream: LogStream::Stdout, text };
        assert!(spooler.offer(task, vec![line]));
        spooler.close(task).await;
    }

    #[tokio::test]
    async fn output_waits_on_disk_while_the_store_is_down() {
        let folder = tempfile::tempdir().expect("a folder");
        let (logs, place) = (folder.path().join("logs"), folder.path().join("store"));
        fs::create_dir(&place).expect("creates");
        let uri = format!("file://{}", place.display());
        let store = Store::open(&StoreSection::default(), &uri).expect("opens");
        let spooler = Spooler::start(logs.clone(), 1 << 20).expect("starts");
        let archive = Archive::start(store.clone(), logs.clone(), spooler.grown.clone());
        archive.follow(&task(1)).await;
        // A file where the store's folder was: every write fails.
        fs::remove_dir_all(&place).expect("removes");
        fs::write(&place, "").expect("writes");
        print(&spooler, &task(1), 0).await;
        archive.flush().await;
        archive.ended(&task(1)).await;
        archive.flush().await;

        fs::remove_file(&place).expect("removes");
        fs::create_dir(&place).expect("creates");
        archive.flush().await;
        let key = "jobs/job/logs/g1/r0/000000000000.jsonl.zst";
        let stored = store.get(key).await.expect("the object is there");
        let text = zstd::decode_all(stored.as_ref()).expect("zstd");
        assert!(String::from_utf8_lossy(&text).contains("line 0"));

        // The next incarnation has nothing to upload again.
        store.delete(key).await.expect("deletes");
        let next = Archive::start(store.clone(), logs, Arc::new(Notify::new()));
        next.flush().await;
        assert!(store.get(key).await.is_err(), "the cursor was not kept");
    }

    #[test]
    fn only_the_newest_folders_of_ended_tasks_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let logs = folder.path();
        let count = UPLOADED_FOLDERS_MAX as u64 + 3;
        for generation in 0..count {
            let path = log_folder(logs, &task(generation));
            fs::create_dir_all(&path).expect("creates");
            fs::write(path.join("000000000000.jsonl"), "").expect("writes");
            let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(generation);
            fs::File::open(path).and_then(|f| f.set_modified(modified)).expect("sets its time");
        }
        prune(logs, &[task(1)]);
        let mut kept: Vec<u64> =
            former_tasks(logs).into_iter().map(|task| task.generation.0).collect();
        kept.sort_unstable();
        let expected: Vec<u64> = std::iter::once(1).chain(3..count).collect();
        assert_eq!(kept, expected, "0 and 2 went; 1 is live");
    }
}
