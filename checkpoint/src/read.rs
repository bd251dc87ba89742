//! Reads parts of tensors, whatever mesh wrote them, into memory the caller owns.
//!
//! Ranges are fetched a few at a time, checked against the checksums of their tiles, whose own
//! checksums are in the manifest, and only then copied. A shard that is needed nearly whole, is
//! compressed, or has no such checksums is read from end to end and checked as a whole.

use std::collections::BTreeMap;
use std::io;
use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;

use api::Rank;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use crate::decode::{TensorSink, read_shard};
use crate::error::StoreError;
use crate::fetch::{self, Batch, CheckGroup, CheckPlace, Part, Plan};
use crate::format::{Dtype, TensorEntry};
use crate::manifest::{Manifest, ShardEntry};
use crate::reshard::{self, ReshardError, Source, Want};
use crate::slice::{Runs, Slice};
use crate::store::{Store, with_retries};
use crate::tiles::{self, CHECKSUM_BYTES, TileSums};

/// Batches fetched ahead; their bytes are the memory that reading takes.
const BATCHES_AT_ONCE: usize = 4;
/// Requests of one batch under way at once. With the batches, 64 connections at most.
const REQUESTS_AT_ONCE: usize = 16;

/// Where a part of a tensor is to be read to.
#[derive(Debug)]
pub struct PieceTarget<'a> {
    /// The tensor's name in the checkpoint.
    pub name: &'a str,
    /// Type of its elements, which must be the one saved.
    pub dtype: Dtype,
    /// Shape of the whole tensor, which must be the one saved.
    pub shape: &'a [u64],
    /// The part.
    pub slice: Slice,
    /// As many bytes as the part has, row-major, little-endian.
    pub out: &'a mut [u8],
}

/// How much may be read in vain, for how few requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// This rank: of replicas it reads its own first, and others' in another order than its peers.
    pub reader: Rank,
    /// What may be fetched beyond what is needed, in percent: gaps between wanted ranges are
    /// fetched with them, so that there are fewer requests. Tiles at the edges count too.
    pub extra_percent: u64,
    /// Most requests. Where more would be needed, the smallest gaps are fetched whatever they cost:
    /// rows of a few bytes that lie far apart are sooner read whole.
    pub requests_max: usize,
}

impl ReadOptions {
    /// At most 1.1 times the bytes needed, and 65,536 requests: some 30 seconds of them to S3.
    pub fn of(reader: Rank) -> Self {
        Self { reader, extra_percent: 10, requests_max: 1 << 16 }
    }
}

/// What a read cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Bytes of the parts asked for.
    pub needed: u64,
    /// Bytes of shards fetched, without checksums of parts.
    pub fetched: u64,
    /// Bytes of checksums of parts fetched.
    pub checks: u64,
    /// Requests for either.
    pub requests: u64,
}

/// What went wrong: the checkpoint does not hold what is wanted, or cannot be read.
pub(crate) enum ReadError {
    Reshard(ReshardError),
    Store(StoreError),
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Fills the targets, whose lengths have been checked. With `all`, shards are read from end to end,
/// except former ones of which little is used.
pub(crate) async fn read(
    store: &Store,
    manifest: &Manifest,
    targets: &mut [PieceTarget<'_>],
    options: &ReadOptions,
    all: bool,
) -> Result<ReadStats, ReadError> {
    let want = |target: &PieceTarget<'_>| Want {
        name: target.name.to_owned(),
        dtype: target.dtype,
        shape: target.shape.to_vec(),
        slice: target.slice.clone(),
    };
    let wants: Vec<Want> = targets.iter().map(want).collect();
    let shards: Arc<[ShardEntry]> = manifest.objects().into();
    let shards = &shards;
    let sources = reshard::sources(shards, &wants, options.reader).map_err(ReadError::Reshard)?;
    let Plan { whole, checks, batches, needed } = fetch::plan(shards, sources, options, all);
    let mut stats = ReadStats { needed, ..ReadStats::default() };
    for (shard, sources) in whole {
        let entry = &shards[shard];
        let places = |source: &Source| wants[source.want].slice.clone();
        let write = |want: usize, at: u64, bytes: &[u8]| {
            let place = usize::try_from(at).ok().and_then(|at| targets[want].out.get_mut(at..));
            let place = place.and_then(|out| out.get_mut(..bytes.len()));
            let place = place.ok_or_else(|| io::Error::other("a tensor has no place to go"))?;
            place.copy_from_slice(bytes);
            Ok(())
        };
        stats.fetched += entry.stored_bytes;
        stats.requests += 1;
        read_shard(store, entry, &mut Scatter::new(entry, &sources, places, write)).await?;
    }
    stats.checks = checks.iter().map(CheckGroup::bytes).sum();
    stats.requests += checks.len() as u64;
    let checks = read_checks(store, shards, checks).await?;
    for batch in &batches {
        stats.fetched += batch.ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        stats.requests += batch.ranges.len() as u64;
    }
    let fetches = batches.into_iter().map(|batch| {
        let (store, shards) = (store.clone(), shards.clone());
        let checks = checks.get(&batch.shard).cloned().unwrap_or_default();
        let task = async move {
            let entry = &shards[batch.shard];
            let fetched = Fetched::fetch(&store, entry, batch).await?;
            fetched.check(entry, &checks)?;
            Ok(fetched)
        };
        // On a task of its own, so that batches arrive and are checked while others are copied.
        let task = tokio::spawn(task);
        async move {
            task.await.unwrap_or_else(|error| {
                let (path, problem) = ("a shard".to_owned(), error.to_string());
                Err(StoreError::Host { path, problem })
            })
        }
    });
    let mut fetches = stream::iter(fetches).buffered(BATCHES_AT_ONCE);
    while let Some(fetched) = fetches.next().await {
        fetched?.copy(shards, &wants, targets)?;
    }
    Ok(stats)
}

/// The checksums of tiles, by tensor and way.
type Checksums = BTreeMap<(usize, usize), Bytes>;

/// Reads the checksums of everything that is read in part, by shard.
async fn read_checks(
    store: &Store,
    shards: &[ShardEntry],
    groups: Vec<CheckGroup>,
) -> Result<BTreeMap<usize, Arc<Checksums>>, StoreError> {
    let fetches: Vec<_> = groups
        .into_iter()
        .map(|CheckGroup { shard, places }| {
            async move { Ok((shard, fetch_checks(store, &shards[shard], places).await?)) }.boxed()
        })
        .collect();
    let fetched: Vec<(usize, Checksums)> =
        stream::iter(fetches).buffered(REQUESTS_AT_ONCE).try_collect().await?;
    let mut checks: BTreeMap<usize, Checksums> = BTreeMap::new();
    for (shard, found) in fetched {
        checks.entry(shard).or_default().extend(found);
    }
    Ok(checks.into_iter().map(|(shard, found)| (shard, Arc::new(found))).collect())
}

/// Reads checksums that lie near one another with one request, and checks them.
async fn fetch_checks(
    store: &Store,
    entry: &ShardEntry,
    group: Vec<CheckPlace>,
) -> Result<Checksums, StoreError> {
    let (Some((_, first)), Some((_, last))) = (group.first(), group.last()) else {
        return Ok(Checksums::new());
    };
    let range = first.start..last.end;
    let bytes = fetch_range(store, entry, range.clone()).await?;
    let mut found = Checksums::new();
    for ((tensor, way), place) in group {
        let (start, end) = (place.start - range.start, place.end - range.start);
        let own = bytes.slice(start as usize..end as usize);
        let piece = &entry.tensors[tensor];
        if piece.checks[way].crc32c != crc32c::crc32c(&own) {
            return Err(damaged(entry, piece, "the checksums"));
        }
        found.insert((tensor, way), own);
    }
    Ok(found)
}

async fn fetch_range(
    store: &Store,
    entry: &ShardEntry,
    range: Range<u64>,
) -> Result<Bytes, StoreError> {
    with_retries(|| store.get_range_of(&entry.key, range.clone(), entry.stored_bytes)).await
}

fn damaged(entry: &ShardEntry, piece: &TensorEntry, what: &str) -> StoreError {
    let (rank, place, name) = (entry.rank, piece.place(), &piece.name);
    let problem = format!(
        "shard of {rank}: {what} of tensor `{name}`, stored as {place}, are not those that were \
         written"
    );
    StoreError::Corrupt { key: entry.key.clone(), problem }
}

/// A batch and its bytes, one buffer per request.
struct Fetched {
    batch: Batch,
    buffers: Vec<Bytes>,
}

impl Fetched {
    async fn fetch(store: &Store, entry: &ShardEntry, batch: Batch) -> Result<Self, StoreError> {
        let fetches: Vec<_> = batch
            .ranges
            .iter()
            .map(|range| fetch_range(store, entry, range.clone()).boxed())
            .collect();
        let buffers = stream::iter(fetches).buffered(REQUESTS_AT_ONCE).try_collect().await?;
        Ok(Self { batch, buffers })
    }

    /// Bytes of the shard that lie within one request.
    fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        let index = self.batch.ranges.partition_point(|fetched| fetched.end <= range.start);
        let start = range.start.checked_sub(self.batch.ranges.get(index)?.start)?;
        let end = start + (range.end - range.start);
        self.buffers.get(index)?.get(start as usize..end as usize)
    }

    /// Compares every tile with its checksum.
    fn check(&self, entry: &ShardEntry, checks: &Checksums) -> Result<(), StoreError> {
        for part in &self.batch.parts {
            let piece = &entry.tensors[part.tensor];
            let sums = self.sums(entry, part);
            if sums.is_none() || sums != expected_sums(piece, part, checks) {
                return Err(damaged(entry, piece, &format!("elements {}", part.cover)));
            }
        }
        Ok(())
    }

    fn sums(&self, entry: &ShardEntry, part: &Part) -> Option<Vec<u32>> {
        let piece = &entry.tensors[part.tensor];
        let tile = &piece.checks.get(part.way)?.tile;
        let mut sums = TileSums::new(&part.cover.length, tile, piece.dtype.bytes());
        for range in fetch::ranges(entry, part) {
            sums.update(self.bytes(range)?);
        }
        Some(sums.finish())
    }

    fn copy(
        &self,
        shards: &[ShardEntry],
        wants: &[Want],
        targets: &mut [PieceTarget<'_>],
    ) -> Result<(), StoreError> {
        let entry = &shards[self.batch.shard];
        for part in &self.batch.parts {
            let piece = &entry.tensors[part.tensor];
            let element = piece.dtype.bytes();
            for (want, slice) in &part.copies {
                let runs = Runs::between(slice, &piece.place(), &wants[*want].slice);
                let length = runs.length * element;
                for (from, to) in runs.iter() {
                    let (from, to) = (piece.offset + from * element, to * element);
                    let out = targets[*want].out.get_mut(to as usize..(to + length) as usize);
                    let (Some(bytes), Some(out)) = (self.bytes(from..from + length), out) else {
                        return Err(damaged(entry, piece, &format!("elements {slice}")));
                    };
                    out.copy_from_slice(bytes);
                }
            }
        }
        Ok(())
    }
}

/// The checksums of a part's tiles, out of those of the piece.
fn expected_sums(piece: &TensorEntry, part: &Part, checks: &Checksums) -> Option<Vec<u32>> {
    let tile = &piece.checks.get(part.way)?.tile;
    let (tiles, all) = tiles::in_tiles(&part.cover, &piece.place(), tile);
    let bytes = checks.get(&(part.tensor, part.way))?;
    let runs = Runs::between(&tiles, &all, &tiles);
    let mut sums = Vec::with_capacity(tiles.elements() as usize);
    for (at, _) in runs.iter() {
        let (start, end) = (at * CHECKSUM_BYTES, (at + runs.length) * CHECKSUM_BYTES);
        for sum in bytes.get(start as usize..end as usize)?.chunks_exact(4) {
            sums.push(u32::from_le_bytes(sum.try_into().ok()?));
        }
    }
    Some(sums)
}

/// Takes a shard's tensors as they stream by and hands each run of bytes to whom it is for.
pub(crate) struct Scatter<W> {
    /// What is still to be taken of each tensor.
    taps: Vec<Vec<Tap>>,
    write: W,
}

/// What one want takes of one tensor: runs from and to which bytes.
struct Tap {
    want: usize,
    length: u64,
    runs: Peekable<Box<dyn Iterator<Item = (u64, u64)> + Send>>,
}

impl<W: FnMut(usize, u64, &[u8]) -> io::Result<()> + Send> Scatter<W> {
    /// `destination` is the box whose layout a source is written to; `write` gets the index of the
    /// want, a byte's place in that layout, and bytes.
    pub fn new(
        entry: &ShardEntry,
        sources: &[Source],
        destination: impl Fn(&Source) -> Slice,
        write: W,
    ) -> Self {
        let mut taps: Vec<Vec<Tap>> = entry.tensors.iter().map(|_| Vec::new()).collect();
        for source in sources {
            let piece = &entry.tensors[source.tensor];
            let element = piece.dtype.bytes();
            let runs = Runs::between(&source.slice, &piece.place(), &destination(source));
            let length = runs.length * element;
            let bytes = runs.iter().map(move |(from, to)| (from * element, to * element));
            let runs: Box<dyn Iterator<Item = (u64, u64)> + Send> = Box::new(bytes);
            taps[source.tensor].push(Tap { want: source.want, length, runs: runs.peekable() });
        }
        Self { taps, write }
    }
}

impl<W: FnMut(usize, u64, &[u8]) -> io::Result<()> + Send> TensorSink for Scatter<W> {
    fn data(&mut self, tensor: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        for tap in self.taps.get_mut(tensor).into_iter().flatten() {
            while let Some((from, to)) = tap.runs.peek().copied() {
                let (start, stop) = (from.max(offset), (from + tap.length).min(end));
                if start < stop {
                    let run = &bytes[(start - offset) as usize..(stop - offset) as usize];
                    (self.write)(tap.want, to + (start - from), run)?;
                }
                if from + tap.length > end {
                    break;
                }
                tap.runs.next();
            }
        }
        Ok(())
    }
}
