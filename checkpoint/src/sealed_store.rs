//! A store that encrypts checkpoints and models on their way in and decrypts them on their way out.
//!
//! It lies beneath everything else in this crate, which sees plaintext and its sizes: so checksums,
//! digests, ranges and put-if-absent mean what they always mean. Logs, flight logs and the objects of
//! other stores pass through as they are.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result, UploadPart,
};

use crate::sealing::{
    self, HEADER_BYTES, MasterKey, ObjectKey, SEALED_SEGMENT_BYTES, SEGMENT_BYTES, SealError,
};

/// Headers remembered; one more than that and all are forgotten. Each saves a request per range.
const HEADERS_MAX: usize = 4096;

type Header = [u8; HEADER_BYTES];

/// The store.
#[derive(Debug)]
pub(crate) struct SealedStore {
    inner: Arc<dyn ObjectStore>,
    key: MasterKey,
    /// What comes before every key.
    prefix: Path,
    headers: Mutex<HashMap<Path, Header>>,
}

impl fmt::Display for SealedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "encrypted {}", self.inner)
    }
}

impl From<SealError> for Error {
    fn from(error: SealError) -> Self {
        Self::Generic { store: "encryption", source: Box::new(error) }
    }
}

impl SealedStore {
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: Path, key: MasterKey) -> Self {
        Self { inner, key, prefix, headers: Mutex::default() }
    }

    fn headers(&self) -> MutexGuard<'_, HashMap<Path, Header>> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, location: &Path, header: Header) {
        let mut headers = self.headers();
        if headers.len() >= HEADERS_MAX {
            headers.clear();
        }
        headers.insert(location.clone(), header);
    }

    /// The key of an object, and whether its header was remembered from before.
    async fn object_key(&self, location: &Path, name: &str) -> Result<(ObjectKey, bool)> {
        let known = self.headers().get(location).copied();
        if let Some(header) = known {
            return Ok((self.key.open(&header, name)?, true));
        }
        let bytes = self.inner.get_range(location, 0..HEADER_BYTES as u64).await?;
        let key = self.key.open(&bytes, name)?;
        if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
            self.remember(location, *header);
        }
        Ok((key, false))
    }

    /// Reads the segments around a range, all at once: ranges are small beside memory.
    async fn get_part(
        &self,
        location: &Path,
        name: &str,
        options: GetOptions,
        range: Range<u64>,
    ) -> Result<GetResult> {
        let segment = SEGMENT_BYTES as u64;
        let first = range.start / segment;
        let end = range.end.div_ceil(segment).max(first + 1);
        let place = |segment: u64| HEADER_BYTES as u64 + segment * SEALED_SEGMENT_BYTES as u64;
        let mut tries = 0;
        loop {
            tries += 1;
            // From the beginning, the header comes along.
            let known = match first {
                0 => None,
                _ => Some(self.object_key(location, name).await?),
            };
            let begin = if known.is_some() { place(first) } else { 0 };
            let sealed = GetRange::Bounded(begin..place(end));
            let found = self.inner.get_opts(location, options.clone().with_range(Some(sealed)));
            let found = found.await?;
            let plain = sealing::plain_bytes(found.meta.size);
            let (meta, attributes, extensions) =
                (found.meta.clone(), found.attributes.clone(), found.extensions.clone());
            let expected = found.range.end - found.range.start;
            let bytes = found.bytes().await?;
            if bytes.len() as u64 != expected {
                return Err(cut_off());
            }
            let mut bytes = bytes.to_vec();
            let (key, was_remembered, sealed) = match known {
                Some((key, was_remembered)) => (key, was_remembered, &mut bytes[..]),
                None => {
                    let length = HEADER_BYTES.min(bytes.len());
                    let (header, sealed) = bytes.split_at_mut(length);
                    let key = self.key.open(header, name)?;
                    if let Some(header) = header.first_chunk() {
                        self.remember(location, *header);
                    }
                    (key, false, sealed)
                }
            };
            let plain = plain.ok_or(SealError::Damaged)?;
            if range.start > plain {
                return Err(SealError::Short.into());
            }
            match open_all(&key, first, sealing::segments(plain) - 1, sealed) {
                // Written anew since its header was read: another key.
                Err(SealError::Damaged) if was_remembered && tries == 1 => {
                    self.headers().remove(location);
                }
                Err(error) => return Err(error.into()),
                Ok(opened) => {
                    let base = first * segment;
                    let range = range.start..range.end.min(plain);
                    let content = range.start.saturating_sub(base) as usize
                        ..range.end.saturating_sub(base) as usize;
                    let content = Bytes::from(opened).slice(content);
                    let payload =
                        GetResultPayload::Stream(stream::once(async { Ok(content) }).boxed());
                    let meta = ObjectMeta { size: plain, ..meta };
                    return Ok(GetResult { payload, meta, range, attributes, extensions });
                }
            }
        }
    }

    /// Reads an object from end to end, segment by segment.
    async fn get_whole(
        &self,
        location: &Path,
        name: &str,
        options: GetOptions,
    ) -> Result<GetResult> {
        let found = self.inner.get_opts(location, options).await?;
        // One that has no such size is not encrypted, or cut off; its first bytes tell.
        let plain = sealing::plain_bytes(found.meta.size);
        let meta = ObjectMeta { size: plain.unwrap_or(found.meta.size), ..found.meta.clone() };
        let (attributes, extensions) = (found.attributes.clone(), found.extensions.clone());
        let found_bytes = found.meta.size;
        let opening = Opening {
            source: found.into_stream(),
            buffer: BytesMut::new(),
            master: self.key.clone(),
            name: name.to_owned(),
            key: None,
            left: found_bytes,
            next: 0,
            last: plain.map(|plain| sealing::segments(plain) - 1),
        };
        let payload = GetResultPayload::Stream(stream::try_unfold(opening, Opening::next).boxed());
        let range = 0..meta.size;
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }
}

fn cut_off() -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the answer was cut off");
    Error::Generic { store: "encryption", source: Box::new(source) }
}

/// Decrypts consecutive segments, the first of which has the number `first`.
fn open_all(
    key: &ObjectKey,
    first: u64,
    last: u64,
    sealed: &mut [u8],
) -> Result<Vec<u8>, SealError> {
    let mut plain = Vec::with_capacity(sealed.len());
    for (index, segment) in sealed.chunks_mut(SEALED_SEGMENT_BYTES).enumerate() {
        let number = first + index as u64;
        plain.extend_from_slice(key.open(number, number == last, segment)?);
    }
    Ok(plain)
}

/// The relative name of an object that is encrypted; none for all others.
fn name_of(prefix: &Path, location: &Path) -> Option<String> {
    let name: Path = location.prefix_match(prefix)?.collect();
    let mut parts = name.parts();
    let (jobs, kind) = (parts.next()?, parts.nth(1)?);
    let is_ours = jobs.as_ref() == "jobs" && ["checkpoints", "model"].contains(&kind.as_ref());
    is_ours.then(|| name.to_string())
}

/// With the size of the plaintext.
fn plain_meta(prefix: &Path, meta: ObjectMeta) -> ObjectMeta {
    let plain = name_of(prefix, &meta.location).and(sealing::plain_bytes(meta.size));
    ObjectMeta { size: plain.unwrap_or(meta.size), ..meta }
}

/// An object that is being read.
struct Opening {
    source: BoxStream<'static, Result<Bytes>>,
    buffer: BytesMut,
    master: MasterKey,
    name: String,
    /// Known once the header has come.
    key: Option<ObjectKey>,
    /// Encrypted bytes that are still to be taken.
    left: u64,
    next: u64,
    /// None when the object's size is that of no encrypted one.
    last: Option<u64>,
}

impl Opening {
    /// Takes so many bytes, fewer only at the object's end; an answer that ends before is cut off.
    async fn take(&mut self, bytes: usize) -> Result<BytesMut> {
        let bytes = usize::try_from(self.left).map_or(bytes, |left| left.min(bytes));
        while self.buffer.len() < bytes {
            let Some(more) = self.source.try_next().await? else { return Err(cut_off()) };
            self.buffer.extend_from_slice(&more);
        }
        self.left -= bytes as u64;
        Ok(self.buffer.split_to(bytes))
    }

    async fn next(mut self) -> Result<Option<(Bytes, Self)>> {
        if self.key.is_none() {
            let header = self.take(HEADER_BYTES).await?;
            self.key = Some(self.master.open(&header, &self.name)?);
        }
        let last = self.last.ok_or(SealError::Damaged)?;
        if self.next > last {
            return Ok(None);
        }
        let is_last = self.next == last;
        let mut sealed = self.take(SEALED_SEGMENT_BYTES).await?;
        let Some(key) = &self.key else { return Err(SealError::Damaged.into()) };
        let plain = key.open(self.next, is_last, &mut sealed)?.len();
        sealed.truncate(plain);
        self.next += 1;
        Ok(Some((sealed.freeze(), self)))
    }
}

/// Encrypts a stream of bytes, the last segment of which is not known until it ends.
#[derive(Debug)]
struct Sealing {
    key: ObjectKey,
    /// What is not encrypted yet: at most a segment between calls.
    plain: BytesMut,
    sealed: BytesMut,
    next: u64,
}

impl Sealing {
    fn begin(header: &Header, key: ObjectKey) -> Self {
        Self { key, plain: BytesMut::new(), sealed: BytesMut::from(&header[..]), next: 0 }
    }

    fn push(&mut self, payload: &PutPayload) -> Result<(), SealError> {
        self.sealed.reserve(payload.content_length() + SEALED_SEGMENT_BYTES);
        for bytes in payload {
            self.plain.extend_from_slice(bytes);
            // One byte more has come: this segment is not the last.
            while self.plain.len() > SEGMENT_BYTES {
                let segment = self.plain.split_to(SEGMENT_BYTES);
                self.seal(&segment, false)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SealError> {
        let segment = self.plain.split();
        self.seal(&segment, true)
    }

    fn seal(&mut self, segment: &[u8], is_last: bool) -> Result<(), SealError> {
        let mut data = Vec::with_capacity(SEALED_SEGMENT_BYTES);
        data.extend_from_slice(segment);
        self.key.seal(self.next, is_last, &mut data)?;
        self.sealed.extend_from_slice(&data);
        self.next += 1;
        Ok(())
    }
}

/// An upload in parts of the caller's size; they end elsewhere than the caller's, since segments grow.
#[derive(Debug)]
struct SealedUpload {
    inner: Box<dyn MultipartUpload>,
    sealing: Sealing,
    part_bytes: Option<usize>,
}

impl SealedUpload {
    /// Begins to send whole parts, and with `all` the rest.
    fn send(&mut self, all: bool) -> Vec<UploadPart> {
        let part_bytes = self.part_bytes.unwrap_or(usize::MAX).max(1);
        let mut parts = Vec::new();
        while self.sealing.sealed.len() >= part_bytes {
            let part = self.sealing.sealed.split_to(part_bytes).freeze();
            parts.push(self.inner.put_part(part.into()));
        }
        if all && !self.sealing.sealed.is_empty() {
            let part = self.sealing.sealed.split().freeze();
            parts.push(self.inner.put_part(part.into()));
        }
        parts
    }
}

#[async_trait]
impl MultipartUpload for SealedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.part_bytes.get_or_insert(data.content_length());
        if let Err(error) = self.sealing.push(&data) {
            return Box::pin(async { Err(error.into()) });
        }
        let parts = self.send(false);
        Box::pin(async move { try_join_all(parts).await.map(drop) })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.sealing.finish()?;
        try_join_all(self.send(true)).await?;
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[async_trait]
impl ObjectStore for SealedStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let Some(name) = name_of(&self.prefix, location) else {
            return self.inner.put_opts(location, payload, options).await;
        };
        let (header, key) = self.key.seal(&name)?;
        let mut sealing = Sealing::begin(&header, key);
        sealing.push(&payload)?;
        drop(payload);
        sealing.finish()?;
        self.headers().remove(location);
        self.inner.put_opts(location, sealing.sealed.freeze().into(), options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(location, options).await?;
        let Some(name) = name_of(&self.prefix, location) else { return Ok(inner) };
        let (header, key) = self.key.seal(&name)?;
        self.headers().remove(location);
        let sealing = Sealing::begin(&header, key);
        Ok(Box::new(SealedUpload { inner, sealing, part_bytes: None }))
    }

    async fn get_opts(&self, location: &Path, mut options: GetOptions) -> Result<GetResult> {
        let Some(name) = name_of(&self.prefix, location) else {
            return self.inner.get_opts(location, options).await;
        };
        if options.head {
            let found = self.inner.get_opts(location, options).await?;
            let meta = plain_meta(&self.prefix, found.meta.clone());
            return Ok(GetResult { range: 0..meta.size, meta, ..found });
        }
        let range = match options.range.take() {
            None => return self.get_whole(location, &name, options).await,
            Some(GetRange::Bounded(range)) => range,
            Some(open) => {
                let size = self.head(location).await?.size;
                match open {
                    GetRange::Offset(start) => start..size,
                    GetRange::Suffix(bytes) => size.saturating_sub(bytes)..size,
                    GetRange::Bounded(range) => range,
                }
            }
        };
        self.get_part(location, &name, options, range).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let own = self.prefix.clone();
        self.inner.list(prefix).map_ok(move |meta| plain_meta(&own, meta)).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut found = self.inner.list_with_delimiter(prefix).await?;
        let plain = |meta| plain_meta(&self.prefix, meta);
        found.objects = found.objects.into_iter().map(plain).collect();
        Ok(found)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        // The name is part of the key: a copy would not open.
        if name_of(&self.prefix, from).or(name_of(&self.prefix, to)).is_some() {
            return Err(SealError::Copied.into());
        }
        self.inner.copy_opts(from, to, options).await
    }
}
