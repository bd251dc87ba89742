//! Reads one shard as a stream: checksum, decompression, header, tensors, in bounded memory.
//!
//! Whatever the bytes are, no more is decompressed than the manifest declares, and a shard that is
//! not exactly what was written is an error. Tensor data is handed on before the checksum of the
//! whole is known: on an error, what was handed on is worthless.

use std::io::{self, Write};

use api::job::Compression;
use futures::StreamExt;
use tokio::task::JoinError;

use crate::ahead::read_ahead;
use crate::error::StoreError;
use crate::manifest::ShardEntry;
use crate::store::{Store, with_retries};

/// Largest window a shard may make the decompressor allocate, as a power of two; our level needs
/// less.
const WINDOW_LOG_MAX: u32 = 24;

/// Takes tensors as they come.
pub(crate) trait TensorSink: Send {
    /// Some bytes of the shard's tensor number `tensor`, from byte `offset` within it.
    fn data(&mut self, tensor: usize, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Wants only to know whether the shard is whole.
pub(crate) struct Discard;

impl TensorSink for Discard {
    fn data(&mut self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a shard to its end into `sink`.
pub(crate) async fn read_shard(
    store: &Store,
    entry: &ShardEntry,
    sink: &mut dyn TensorSink,
) -> Result<(), StoreError> {
    let corrupt = |problem: String| StoreError::Corrupt {
        key: entry.key.clone(),
        problem: format!("shard of {}: {problem}", entry.rank),
    };
    let found = with_retries(|| store.size(&entry.key)).await?;
    if found != entry.stored_bytes {
        return Err(corrupt(format!("it has {found} bytes, expected {}", entry.stored_bytes)));
    }
    let header = entry.header().map_err(&corrupt)?;
    let layout = Layout { entry, header, position: 0, tensor: 0, sink };
    let mut decoder =
        Decoder::new(entry.compression, layout).map_err(|e| corrupt(e.to_string()))?;
    let mut hasher = blake3::Hasher::new();
    // The first thing wrong inside; the checksum, which says more, is awaited before it is told.
    let mut wrong: Option<io::Error> = None;
    let mut chunks = read_ahead(store, &entry.key, entry.stored_bytes);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        // Beside what is done with the bytes, so that reading is bound by the store.
        let hashed = chunk.clone();
        let hashing = tokio::task::spawn_blocking(move || {
            hasher.update(&hashed);
            hasher
        });
        if wrong.is_none() {
            wrong = decoder.write_all(&chunk).err();
        }
        let failed = |error: JoinError| {
            store.attempt("read", &entry.key).unavailable(error.to_string(), false)
        };
        hasher = hashing.await.map_err(failed)?;
    }
    let found = hasher.finalize().to_hex();
    if found.as_str() != entry.blake3 {
        return Err(corrupt(format!(
            "its bytes are not those that were written: BLAKE3 {found}, expected {}",
            entry.blake3
        )));
    }
    if let Some(error) = wrong {
        return Err(corrupt(error.to_string()));
    }
    decoder.finish().map_err(|error| corrupt(error.to_string()))
}

/// Undoes the compression.
enum Decoder<'a> {
    Plain(Layout<'a>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Layout<'a>>>),
}

impl<'a> Decoder<'a> {
    fn new(compression: Compression, layout: Layout<'a>) -> io::Result<Self> {
        match compression {
            Compression::None => Ok(Self::Plain(layout)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(layout)?;
                decoder.window_log_max(WINDOW_LOG_MAX)?;
                Ok(Self::Zstd(Box::new(decoder)))
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(layout) => layout.write_all(bytes),
            Self::Zstd(decoder) => decoder.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Plain(layout) => layout.check_end(),
            Self::Zstd(mut decoder) => {
                decoder.flush()?;
                decoder.into_inner().check_end()
            }
        }
    }
}

/// Splits the uncompressed bytes into the header, which must be the one the entries imply, and the
/// tensors.
struct Layout<'a> {
    entry: &'a ShardEntry,
    header: Vec<u8>,
    position: u64,
    tensor: usize,
    sink: &'a mut dyn TensorSink,
}

impl Layout<'_> {
    fn check_end(&self) -> io::Result<()> {
        if self.position == self.entry.bytes {
            return Ok(());
        }
        let (found, expected) = (self.position, self.entry.bytes);
        Err(io::Error::other(format!("it holds {found} bytes uncompressed, expected {expected}")))
    }

    /// Takes some of the bytes, at least one.
    fn take(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let header = self.header.len() as u64;
        if self.position < header {
            let rest = &self.header[self.position as usize..];
            let taken = rest.len().min(bytes.len());
            if rest[..taken] != bytes[..taken] {
                return Err(io::Error::other("its header is not the one the manifest describes"));
            }
            return Ok(taken);
        }
        while let Some(tensor) = self.entry.tensors.get(self.tensor) {
            let within = self.position - tensor.offset;
            if within < tensor.bytes {
                let taken = (bytes.len() as u64).min(tensor.bytes - within) as usize;
                self.sink.data(self.tensor, within, &bytes[..taken])?;
                return Ok(taken);
            }
            self.tensor += 1;
        }
        // The checksums of parts: whoever reads all has a better one.
        let left = self.entry.bytes - self.position;
        if left > 0 {
            return Ok(left.min(bytes.len() as u64) as usize);
        }
        let expected = self.entry.bytes;
        Err(io::Error::other(format!("it holds more than the expected {expected} bytes")))
    }
}

impl Write for Layout<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let taken = self.take(bytes)?;
        self.position += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
