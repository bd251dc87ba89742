//! Writes one large object in bounded memory: plain or compressed, in one request or in parts.
//!
//! The checksum is that of the stored bytes, computed beside the transfer. A try that fails leaves
//! nothing visible, and is repeated a few times where that can help.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::job::Compression;
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, Shared};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use object_store::{MultipartUpload, PutPayload, UploadPart};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::direct;
use crate::error::StoreError;
use crate::store::Store;

/// Least size of a part: S3 wants 5 MiB at least; larger parts cost fewer requests.
const PART_BYTES: u64 = 16 << 20;
/// S3's limit on the number of parts; larger objects get larger parts.
const PARTS_MAX: u64 = 10_000;
/// Up to here an object goes to S3 in one request.
pub(crate) const SINGLE_PUT_BYTES_MAX: u64 = 2 * PART_BYTES;
/// Parts on their way at once; with compression each is memory.
const PARTS_IN_FLIGHT: usize = 4;
/// Compressed parts that wait for a free place.
const PARTS_QUEUED: usize = 1;
/// zstd's fastest: it must keep up with training on the same processor.
const ZSTD_LEVEL: i32 = 1;
/// Input handed to zstd at once; fixed, so that the output is a function of the input alone.
const ZSTD_INPUT_BYTES: usize = 1 << 20;

/// From here on an object goes to a folder around the system's cache; what is smaller waits longer
/// for the disk than its copy takes.
const DIRECT_BYTES_MIN: u64 = 1 << 20;

const _: () = assert!(SINGLE_PUT_BYTES_MAX >= PART_BYTES);

/// What an object is made of.
#[derive(Clone)]
pub(crate) struct Content {
    /// All but its end.
    pub pieces: Vec<Bytes>,
    /// Length of the end.
    pub end_bytes: u64,
    /// What is computed while the rest is on its way; none when that failed.
    pub end: Shared<BoxFuture<'static, Option<Bytes>>>,
    /// Set when nobody wants the object any more: its write ends at the next block.
    pub unwanted: Arc<AtomicBool>,
}

impl Content {
    /// One whose end is there already.
    pub fn of(pieces: Vec<Bytes>) -> Self {
        let end = async { Some(Bytes::new()) };
        Self { pieces, end_bytes: 0, end: end.boxed().shared(), unwanted: Arc::default() }
    }

    fn bytes(&self) -> u64 {
        total(&self.pieces) + self.end_bytes
    }

    async fn end(&self, store: &Store, key: &str) -> Result<Bytes, StoreError> {
        self.end.clone().await.ok_or_else(|| store.attempt("write", key).io(&no_end()))
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub bytes: u64,
    pub blake3: String,
}

/// Writes an object, repeating what can be repeated.
pub(crate) async fn write_object(
    store: &Store,
    key: &str,
    content: &Content,
    compression: Compression,
) -> Result<Stored, StoreError> {
    let attempt = || async {
        match compression {
            Compression::None => write_plain(store, key, content).await,
            Compression::Zstd => write_zstd(store, key, content).await,
        }
    };
    store.patiently(attempt).await
}

/// An object without an end: trying again would change nothing.
fn no_end() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "its checksums were not computed")
}

fn total(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

fn part_bytes(total: u64) -> u64 {
    // What encryption adds, a 4096th, must not make one part too many.
    let total = total.saturating_add(total >> 10);
    total.div_ceil(PARTS_MAX).next_multiple_of(1 << 20).max(PART_BYTES)
}

async fn write_plain(store: &Store, key: &str, content: &Content) -> Result<Stored, StoreError> {
    let bytes = content.bytes();
    if let Some(folder) = store.plain_folder()
        && bytes >= DIRECT_BYTES_MIN
    {
        let (root, path, content) = (folder.to_owned(), folder.join(key), content.clone());
        let end = async move { content.end.await.ok_or_else(no_end) };
        let (runtime, pieces, unwanted) = (Handle::current(), content.pieces, content.unwanted);
        let written = tokio::task::spawn_blocking(move || {
            let before = |_| match unwanted.load(Ordering::Relaxed) {
                true => Err(io::Error::other("nobody wants the object any more")),
                false => Ok(()),
            };
            direct::write_file(&root, &path, &pieces, || runtime.block_on(end), &before)
        });
        let failed = |error: io::Error| store.attempt("write", key).io(&error);
        let blake3 = joined(store, key, written).await?.map_err(failed)?;
        return Ok(Stored { bytes, blake3 });
    }
    let hashed = content.pieces.clone();
    let hash = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        for piece in &hashed {
            hasher.update(piece);
        }
        hasher
    });
    if bytes <= SINGLE_PUT_BYTES_MAX {
        let end = content.end(store, key).await?;
        store.put_payload(key, content.pieces.iter().cloned().chain([end]).collect()).await?;
    } else {
        let mut parts = Parts::begin(store, key).await?;
        let sent = send_slices(&mut parts, content, part_bytes(bytes)).await;
        parts.end(sent).await?;
    }
    let mut hasher = joined(store, key, hash).await?;
    hasher.update(&content.end(store, key).await?);
    Ok(Stored { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

/// Writes bytes as they are, in parts as tools that copy files do; computes and checks nothing.
///
/// # Errors
/// Those of the store. Nothing is tried again, and nothing is left.
pub async fn copy_to_store(store: &Store, key: &str, bytes: Bytes) -> Result<(), StoreError> {
    let content = Content::of(vec![bytes]);
    let mut parts = Parts::begin(store, key).await?;
    let sent = send_slices(&mut parts, &content, part_bytes(content.bytes())).await;
    parts.end(sent).await
}

/// Cuts the content into parts of equal size (some servers insist on that) without copying.
async fn send_slices(
    parts: &mut Parts<'_>,
    content: &Content,
    part_bytes: u64,
) -> Result<(), StoreError> {
    let mut part = Vec::new();
    let mut missing = part_bytes as usize;
    for index in 0..=content.pieces.len() {
        let mut rest = match content.pieces.get(index) {
            Some(piece) => piece.clone(),
            None => content.end(parts.store, parts.key).await?,
        };
        while !rest.is_empty() {
            let slice = rest.split_to(missing.min(rest.len()));
            missing -= slice.len();
            part.push(slice);
            if missing == 0 {
                parts.send(part.drain(..).collect()).await?;
                missing = part_bytes as usize;
            }
        }
    }
    if !part.is_empty() {
        parts.send(part.into_iter().collect()).await?;
    }
    Ok(())
}

async fn write_zstd(store: &Store, key: &str, content: &Content) -> Result<Stored, StoreError> {
    let (sender, mut receiver) = mpsc::channel(PARTS_QUEUED);
    // A frame is a function of all that it holds.
    let input = [content.pieces.clone(), vec![content.end(store, key).await?]].concat();
    let part_bytes = part_bytes(crate::manifest::stored_bytes_max(content.bytes())) as usize;
    let compressor = tokio::task::spawn_blocking(move || compress(&input, part_bytes, sender));
    let sent = send_compressed(store, key, &mut receiver).await;
    // A compressor whose receiver is gone stops by itself.
    drop(receiver);
    let compressed = joined(store, key, compressor).await?;
    sent?;
    compressed.map_err(|error| StoreError::host(std::path::Path::new(key), &error))
}

async fn send_compressed(
    store: &Store,
    key: &str,
    receiver: &mut mpsc::Receiver<Bytes>,
) -> Result<(), StoreError> {
    let first = receiver.recv().await.unwrap_or_default();
    let Some(second) = receiver.recv().await else {
        return store.put(key, first).await;
    };
    let mut parts = Parts::begin(store, key).await?;
    let sent = async {
        parts.send(first.into()).await?;
        parts.send(second.into()).await?;
        while let Some(part) = receiver.recv().await {
            parts.send(part.into()).await?;
        }
        Ok(())
    };
    let sent = sent.await;
    parts.end(sent).await
}

fn compress(input: &[Bytes], part_bytes: usize, sender: mpsc::Sender<Bytes>) -> io::Result<Stored> {
    let sink =
        PartSink { sender, part_bytes, part: BytesMut::new(), hasher: blake3::Hasher::new() };
    let mut encoder = zstd::stream::write::Encoder::new(sink, ZSTD_LEVEL)?;
    encoder.set_pledged_src_size(Some(total(input)))?;
    encoder.include_contentsize(true)?;
    for piece in input {
        for chunk in piece.chunks(ZSTD_INPUT_BYTES) {
            encoder.write_all(chunk)?;
        }
    }
    let mut sink = encoder.finish()?;
    sink.flush_part()?;
    let bytes = sink.hasher.count();
    Ok(Stored { bytes, blake3: sink.hasher.finalize().to_hex().to_string() })
}

/// Collects compressed bytes into parts and hands them to the uploader, waiting when it is behind.
struct PartSink {
    sender: mpsc::Sender<Bytes>,
    part_bytes: usize,
    part: BytesMut,
    hasher: blake3::Hasher,
}

impl PartSink {
    fn flush_part(&mut self) -> io::Result<()> {
        if self.part.is_empty() {
            return Ok(());
        }
        let part = self.part.split().freeze();
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the upload has failed");
        self.sender.blocking_send(part).map_err(gone)
    }
}

impl Write for PartSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.part_bytes - self.part.len());
        self.hasher.update(&bytes[..taken]);
        self.part.extend_from_slice(&bytes[..taken]);
        if self.part.len() == self.part_bytes {
            self.flush_part()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An upload in parts, a few at a time; completed or aborted by [`Parts::end`].
struct Parts<'a> {
    store: &'a Store,
    key: &'a str,
    upload: Box<dyn MultipartUpload>,
    in_flight: FuturesUnordered<UploadPart>,
}

impl<'a> Parts<'a> {
    async fn begin(store: &'a Store, key: &'a str) -> Result<Self, StoreError> {
        let upload = store.put_multipart(key).await?;
        Ok(Self { store, key, upload, in_flight: FuturesUnordered::new() })
    }

    async fn send(&mut self, part: PutPayload) -> Result<(), StoreError> {
        while self.in_flight.len() >= PARTS_IN_FLIGHT {
            self.settle().await?;
        }
        self.in_flight.push(self.upload.put_part(part));
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), StoreError> {
        match self.in_flight.next().await {
            Some(Err(error)) => Err(self.store.attempt("write", self.key).failed(error)),
            Some(Ok(())) | None => Ok(()),
        }
    }

    async fn end(mut self, sent: Result<(), StoreError>) -> Result<(), StoreError> {
        let mut outcome = sent;
        while outcome.is_ok() && !self.in_flight.is_empty() {
            outcome = self.settle().await;
        }
        if outcome.is_ok() {
            let completed = self.upload.complete().await;
            outcome = completed
                .map(drop)
                .map_err(|error| self.store.attempt("write", self.key).failed(error));
        }
        if outcome.is_err() {
            self.in_flight.clear();
            // Best effort: parts left behind are invisible, and a bucket's lifecycle removes them.
            if let Err(error) = self.upload.abort().await {
                tracing::debug!(key = self.key, %error, "cannot abort an upload");
            }
        }
        outcome
    }
}

async fn joined<T>(
    store: &Store,
    key: &str,
    task: tokio::task::JoinHandle<T>,
) -> Result<T, StoreError> {
    task.await.map_err(|error| store.attempt("write", key).unavailable(error.to_string(), true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fit_the_limits_of_s3() {
        assert_eq!(part_bytes(0), PART_BYTES);
        assert_eq!(part_bytes(100 << 30), PART_BYTES);
        for total in [200 << 30, (1 << 40) + 1, 5 << 40] {
            assert!(part_bytes(total) * PARTS_MAX >= total);
            assert!(part_bytes(total) <= 5 << 30);
        }
    }

    #[test]
    fn compression_is_a_function_of_the_content() {
        let content: Vec<u8> = (0..5_000_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let whole = vec![Bytes::from(content.clone())];
        let cut = vec![Bytes::from(content[..32].to_vec()), Bytes::from(content[32..].to_vec())];
        let run = |input: Vec<Bytes>| {
            let (sender, mut receiver) = mpsc::channel(1000);
            let stored = compress(&input, 1 << 20, sender).expect("compresses");
            let mut bytes = Vec::new();
            while let Ok(part) = receiver.try_recv() {
                bytes.extend_from_slice(&part);
            }
            assert_eq!(stored.bytes, bytes.len() as u64);
            assert_eq!(stored.blake3, crate::manifest::digest(&bytes));
            bytes
        };
        let first = run(whole.clone());
        assert_eq!(first, run(whole));
        let back = zstd::stream::decode_all(&run(cut)[..]).expect("decompresses");
        assert_eq!(back, content);
    }
}
