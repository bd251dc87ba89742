//! Reads an object from its beginning to its end, some chunks ahead of whoever takes them.
//!
//! Of a server a chunk is large, since each request costs a round trip. Of a folder it is so small
//! that it stays in the processor's cache while it is read, hashed and copied, and memory is used
//! again: fresh memory for every chunk costs as much as reading it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tokio::sync::mpsc;

use crate::error::StoreError;
use crate::store::{Store, with_retries};

/// Bytes asked for at once of a server,
const CHUNK_BYTES: u64 = 8 << 20;
/// and of a folder.
const FOLDER_CHUNK_BYTES: u64 = 1 << 20;
/// Chunks fetched ahead; with the one before, the memory that reading takes.
const CHUNKS_AHEAD: usize = 4;
/// Threads that read a file: one alone leaves the disk idle while it copies.
const FOLDER_READERS: usize = 2;

/// The object's `bytes` bytes, in order; what comes after an error is worth nothing.
pub(crate) fn read_ahead<'a>(
    store: &'a Store,
    key: &'a str,
    bytes: u64,
) -> BoxStream<'a, Result<Bytes, StoreError>> {
    let Some(folder) = store.plain_folder() else {
        return stream::iter(chunks(bytes, CHUNK_BYTES))
            .map(move |(start, end)| fetch(store, key, start, end))
            .buffered(CHUNKS_AHEAD)
            .boxed();
    };
    let path = folder.join(key);
    let readers = (0..FOLDER_READERS).map(|reader| read_file(path.clone(), bytes, reader));
    let readers: Vec<mpsc::Receiver<Option<Bytes>>> = readers.collect();
    let all = chunks(bytes, FOLDER_CHUNK_BYTES).enumerate();
    let state = (readers, all);
    stream::unfold(state, move |(mut readers, mut all)| async move {
        let (index, (start, end)) = all.next()?;
        let chunk = match readers[index % FOLDER_READERS].recv().await.flatten() {
            Some(chunk) => Ok(chunk),
            // Whatever is wrong, the store says it, or does better the second time.
            None => fetch(store, key, start, end).await,
        };
        Some((chunk, (readers, all)))
    })
    .boxed()
}

fn chunks(bytes: u64, of: u64) -> impl Iterator<Item = (u64, u64)> + Send {
    (0..bytes.div_ceil(of)).map(move |i| (i * of, bytes.min((i + 1) * of)))
}

/// Fetches on a task of its own, so that chunks arrive while earlier ones are decoded.
async fn fetch(store: &Store, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
    let (task_store, task_key) = (store.clone(), key.to_owned());
    let task =
        tokio::spawn(
            async move { with_retries(|| task_store.get_range(&task_key, start..end)).await },
        );
    match task.await {
        Ok(chunk) => chunk,
        Err(error) => Err(store.attempt("read", key).unavailable(error.to_string(), false)),
    }
}

/// Every [`FOLDER_READERS`]th chunk of a file, beginning with number `reader`; none for one that
/// cannot be read.
fn read_file(path: PathBuf, bytes: u64, reader: usize) -> mpsc::Receiver<Option<Bytes>> {
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD / FOLDER_READERS);
    tokio::task::spawn_blocking(move || {
        let Ok(file) = File::open(path) else { return };
        let free = Arc::new(Mutex::new(Vec::new()));
        let own = chunks(bytes, FOLDER_CHUNK_BYTES).skip(reader).step_by(FOLDER_READERS);
        for (start, end) in own {
            let former: Option<Vec<u8>> = lock(&free).pop();
            let mut memory = former.unwrap_or_default();
            memory.resize((end - start) as usize, 0);
            let chunk = file.read_exact_at(&mut memory, start).ok();
            let chunk = chunk.map(|()| Bytes::from_owner(Lent { memory, free: free.clone() }));
            if sender.blocking_send(chunk).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A chunk's memory, which goes back to the reader.
struct Lent {
    memory: Vec<u8>,
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        lock(&self.free).push(std::mem::take(&mut self.memory));
    }
}

fn lock(free: &Mutex<Vec<Vec<u8>>>) -> MutexGuard<'_, Vec<Vec<u8>>> {
    // A list of buffers is whole at every moment.
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use api::config::StoreSection;

    use super::*;

    #[tokio::test]
    async fn a_file_is_read_in_order_to_its_end_and_a_short_one_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let store = Store::open(&StoreSection::default(), &uri).expect("opens");
        let length = 5 * FOLDER_CHUNK_BYTES + 77;
        let content: Vec<u8> = (0..length).map(|i| (i * 31 % 253) as u8).collect();
        store.put("a/b", content.clone().into()).await.expect("written");
        let mut found = Vec::new();
        let mut chunks = read_ahead(&store, "a/b", length);
        while let Some(chunk) = chunks.next().await {
            found.extend_from_slice(&chunk.expect("read"));
        }
        assert!(found == content, "other bytes");
        let outcomes: Vec<bool> =
            read_ahead(&store, "a/b", length + 10).map(|chunk| chunk.is_ok()).collect().await;
        assert_eq!(outcomes, [true, true, true, true, true, false]);
        let missing: Vec<_> = read_ahead(&store, "a/c", 10).collect().await;
        assert!(matches!(missing[..], [Err(StoreError::NotFound { .. })]), "{missing:?}");
    }
}
