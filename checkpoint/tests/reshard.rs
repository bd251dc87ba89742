//! A checkpoint written under any mesh is read under any other: bit by bit the same, reading little
//! more than is wanted.

mod support;

use std::fs;
use std::path::Path;

use api::job::Compression;
use api::{Rank, Step};
use checkpoint::{
    Dtype, HeldTensor, PieceTarget, ReadOptions, ReadStats, Restore, RestoreError, Saver, Slice,
    StoreError, TensorPiece, TensorSlice, share_replicas,
};
use support::counting::CountingStore;
use support::{Random, info, options, runtime};

/// Random cases; a failure prints its seed, which [`one_case`] can be called with alone.
const SEEDS: std::ops::Range<u64> = 1..33;
const DTYPES: [Dtype; 7] =
    [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64, Dtype::I32, Dtype::U8];
/// Most ranks of a mesh.
const RANKS_MAX: u64 = 16;

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data: Vec<u8>,
}

impl Tensor {
    fn random(random: &mut Random, index: usize) -> Self {
        let dims = random.next() % 5;
        // A few large ones, as in a model; the others small, and empty now and then.
        let extent = |random: &mut Random| match (index < 3, random.next() % 8) {
            (true, _) => [100_000, 400, 50, 18][dims.max(1) as usize - 1] + random.next() % 40,
            (false, 0) => 0,
            (false, 1 | 2) => 1,
            (false, _) => 1 + random.next() % 12,
        };
        let shape: Vec<u64> = match (index < 3, dims) {
            (true, 0) => vec![extent(random)],
            _ => (0..dims).map(|_| extent(random)).collect(),
        };
        let dtype = DTYPES[(random.next() % 7) as usize];
        let bytes = shape.iter().product::<u64>() * dtype.bytes();
        let data = (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
        let data = data.take(bytes as usize).collect();
        Self { name: format!("t{index}"), dtype, shape, data }
    }

    /// The bytes of a part.
    fn part(&self, slice: &Slice) -> Vec<u8> {
        let runs = checkpoint::Runs::between(slice, &Slice::whole(&self.shape), slice);
        let element = self.dtype.bytes();
        let length = (runs.length * element) as usize;
        let run = |(at, _): (u64, u64)| self.data[(at * element) as usize..][..length].to_vec();
        runs.iter().flat_map(run).collect()
    }
}

/// What each rank of a mesh holds: pieces of tensors, by index.
type Held = Vec<Vec<(usize, Slice)>>;

/// A mesh of axes: data replicates, zero cuts the flattened rest, tensor cuts along a dim of each
/// tensor, pipeline spreads tensors over stages.
#[derive(Debug)]
struct Mesh {
    data: u64,
    zero: u64,
    tensor: u64,
    pipeline: u64,
    /// Whether zero cuts one flat buffer of all tensors of a stage, or each tensor.
    is_one_buffer: bool,
}

impl Mesh {
    fn random(random: &mut Random) -> Self {
        loop {
            let mut axis = || 1 + random.next() % [1, 2, 4, 16][(random.next() % 4) as usize];
            let mesh = Self {
                data: axis(),
                zero: axis(),
                tensor: axis(),
                pipeline: axis(),
                is_one_buffer: random.next().is_multiple_of(2),
            };
            if mesh.data * mesh.zero * mesh.tensor * mesh.pipeline <= RANKS_MAX {
                return mesh;
            }
        }
    }

    /// Decides for every tensor where it is cut, and gives each rank its pieces.
    fn cut(&self, tensors: &[Tensor], random: &mut Random) -> Held {
        let cuts: Vec<(u64, Option<usize>, Vec<u64>)> = tensors
            .iter()
            .map(|tensor| {
                let stage = random.next() % self.pipeline;
                let dims = tensor.shape.len() as u64;
                let dim = (dims > 0 && !random.next().is_multiple_of(4))
                    .then(|| random.next() % dims.max(1));
                let extent = dim.map_or(0, |dim| tensor.shape[dim as usize]);
                (stage, dim.map(|dim| dim as usize), cut_points(extent, self.tensor, random))
            })
            .collect();
        let mut held = Held::new();
        for _ in 0..self.data {
            for zero in 0..self.zero {
                for tensor in 0..self.tensor {
                    for stage in 0..self.pipeline {
                        let local = tensors.iter().zip(&cuts).enumerate();
                        let local = local.filter(|(_, (_, (at, ..)))| *at == stage);
                        let local = local.map(|(index, (t, (_, dim, points)))| match dim {
                            Some(dim) => {
                                let points = &points[tensor as usize..];
                                (index, Slice::cut(&t.shape, *dim, points[0]..points[1]))
                            }
                            None => (index, Slice::whole(&t.shape)),
                        });
                        held.push(self.flat_share(&local.collect::<Vec<_>>(), zero));
                    }
                }
            }
        }
        held
    }

    /// What zero leaves to one of its ranks of the pieces that all of them would hold.
    fn flat_share(&self, local: &[(usize, Slice)], zero: u64) -> Vec<(usize, Slice)> {
        if self.zero == 1 {
            return local.to_vec();
        }
        let total: u64 = local.iter().map(|(_, slice)| slice.elements()).sum();
        let mut at = 0;
        let mut share = Vec::new();
        for (index, slice) in local {
            let elements = slice.elements();
            let (start, end) = if self.is_one_buffer {
                let cut = |rank: u64| (total * rank / self.zero).clamp(at, at + elements) - at;
                (cut(zero), cut(zero + 1))
            } else {
                (elements * zero / self.zero, elements * (zero + 1) / self.zero)
            };
            at += elements;
            if elements == 0 {
                share.push((*index, slice.clone()));
            }
            for mut piece in Slice::of_range(&slice.length, start..end) {
                piece.offset.iter_mut().zip(&slice.offset).for_each(|(own, base)| *own += base);
                share.push((*index, piece));
            }
        }
        share
    }
}

/// Where an extent is cut into parts: evenly, or anywhere.
fn cut_points(extent: u64, parts: u64, random: &mut Random) -> Vec<u64> {
    let mut points: Vec<u64> = match random.next() % 2 {
        0 => (1..parts).map(|part| extent * part / parts).collect(),
        _ => (1..parts).map(|_| random.next() % (extent + 1)).collect(),
    };
    points.extend([0, extent]);
    points.sort_unstable();
    points
}

/// Saves what the ranks of a mesh hold, each piece once or by everyone who holds it.
fn save(
    store: &checkpoint::Store,
    tensors: &[Tensor],
    held: &Held,
    with_replicas: bool,
    compression: Compression,
) -> api::events::CheckpointFact {
    let mut all: Vec<HeldTensor> = tensors
        .iter()
        .map(|tensor| HeldTensor { element_bytes: tensor.dtype.bytes(), pieces: Vec::new() })
        .collect();
    for (rank, pieces) in held.iter().enumerate() {
        for (tensor, slice) in pieces {
            all[*tensor].pieces.push((Rank(rank as u32), slice.clone()));
        }
    }
    let mut shares = share_replicas(&all);
    // Replicas that overlap but are not the same have to be shared.
    let may_be_replicated = |pieces: &[(Rank, Slice)]| {
        pieces
            .iter()
            .all(|(_, a)| pieces.iter().all(|(_, b)| a == b || a.intersection(b).is_none()))
    };
    for (share, tensor) in shares.iter_mut().zip(all) {
        if with_replicas && may_be_replicated(&tensor.pieces) {
            *share = tensor.pieces;
        }
    }
    let world_size = held.len() as u32;
    let mut savers: Vec<Saver> = Vec::new();
    for rank in 0..world_size {
        let own = tensors.iter().zip(&shares).flat_map(|(tensor, share)| {
            let own = share.iter().filter(|(writer, _)| *writer == Rank(rank));
            own.map(move |(_, slice)| (tensor, slice, tensor.part(slice)))
        });
        let own: Vec<(&Tensor, &Slice, Vec<u8>)> = own.collect();
        let pieces: Vec<TensorPiece<'_>> = own
            .iter()
            .map(|(tensor, slice, data)| {
                let Tensor { name, dtype, shape, .. } = tensor;
                TensorPiece { name, dtype: *dtype, shape, slice: (*slice).clone(), data }
            })
            .collect();
        let options = options(rank, world_size, compression);
        let mut saver = Saver::with_store(store.clone(), options).expect("up");
        saver.stage_pieces(Step(1), &pieces).expect("stages");
        savers.push(saver);
    }
    let shards: Result<Vec<_>, _> = savers.iter_mut().map(|s| s.wait_shard(Step(1))).collect();
    savers[0].commit(Step(1), shards.expect("written"), info());
    savers[0].wait_committed(Step(1)).expect("committed")
}

/// Reads what one rank holds and compares it; returns what that cost.
fn read(
    restore: &mut Restore,
    tensors: &[Tensor],
    pieces: &[(usize, Slice)],
    rank: u32,
    place: &str,
) -> ReadStats {
    let length =
        |(tensor, slice): &(usize, Slice)| slice.elements() * tensors[*tensor].dtype.bytes();
    let mut outs: Vec<Vec<u8>> = pieces.iter().map(|p| vec![0xaa; length(p) as usize]).collect();
    let mut targets: Vec<PieceTarget<'_>> = pieces
        .iter()
        .zip(&mut outs)
        .map(|((tensor, slice), out)| {
            let Tensor { name, dtype, shape, .. } = &tensors[*tensor];
            PieceTarget { name, dtype: *dtype, shape, slice: slice.clone(), out }
        })
        .collect();
    let stats = restore.read(&mut targets, &ReadOptions::of(Rank(rank)));
    let stats = stats.unwrap_or_else(|error| panic!("{place}: {error}"));
    for ((tensor, slice), out) in pieces.iter().zip(outs) {
        assert!(out == tensors[*tensor].part(slice), "{place}: {slice} of tensor {tensor} differs");
    }
    stats
}

#[derive(Default)]
struct Totals {
    needed: u64,
    fetched: u64,
    checks: u64,
    requests: u64,
}

fn one_case(seed: u64, totals: &mut Totals) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let tensors: Vec<Tensor> =
        (0..4 + random.next() as usize % 8).map(|i| Tensor::random(&mut random, i)).collect();
    let (from, to) = (Mesh::random(&mut random), Mesh::random(&mut random));
    let (written, wanted) = (from.cut(&tensors, &mut random), to.cut(&tensors, &mut random));
    let with_replicas = random.next().is_multiple_of(4);
    let compression =
        [Compression::None, Compression::Zstd][usize::from(random.next().is_multiple_of(8))];
    let place = format!("seed {seed}: {from:?} to {to:?}");
    let folder = tempfile::tempdir().expect("a folder");
    let store = support::folder_store(folder.path());
    let fact = save(&store, &tensors, &written, with_replicas, compression);

    let (counting, counted) = CountingStore::over(folder.path());
    let (mut needed, mut fetched, mut checks, mut requests) = (0, 0, 0, 0);
    let mut restore = Restore::with_store(counting, &fact).expect("opens");
    for (rank, pieces) in wanted.iter().enumerate() {
        counted.reset();
        let stats = read(&mut restore, &tensors, pieces, rank as u32, &place);
        let bytes: u64 = pieces.iter().map(|(t, s)| s.elements() * tensors[*t].dtype.bytes()).sum();
        assert_eq!(stats.needed, bytes, "{place}");
        assert_eq!(counted.bytes(), stats.fetched + stats.checks, "{place}: bytes uncounted");
        needed += stats.needed;
        fetched += stats.fetched;
        checks += stats.checks;
        requests += stats.requests;
    }
    let ratio = |bytes: u64| bytes as f64 / needed.max(1) as f64;
    println!(
        "{place}, {compression:?}: {needed} B needed, fetched {:.4}, with checksums {:.4}, \
         {requests} requests",
        ratio(fetched),
        ratio(fetched + checks)
    );
    if compression == Compression::None {
        assert!(fetched * 10 <= needed * 11, "{place}: {fetched} B fetched for {needed}");
        totals.needed += needed;
        totals.fetched += fetched;
        totals.checks += checks;
        totals.requests += requests;
    }
    let report = runtime().block_on(checkpoint::verify(&store, &fact.manifest_key, None));
    let report = report.expect("verifies");
    assert!(report.ok && report.tensors == tensors.len() as u64, "{place}: {report:?}");
}

#[test]
fn any_mesh_reads_what_any_other_wrote() {
    let mut totals = Totals::default();
    for seed in SEEDS {
        one_case(seed, &mut totals);
    }
    let Totals { needed, fetched, checks, requests } = totals;
    assert!((fetched + checks) * 10 <= needed * 11, "with checksums {}", fetched + checks);
    println!(
        "all: {needed} B needed, fetched {:.4}, with checksums {:.4}, {requests} requests",
        fetched as f64 / needed as f64,
        (fetched + checks) as f64 / needed as f64
    );
}

/// Two ranks' halves of one tensor and a small tensor, in files that a test then damages.
struct Halves {
    folder: tempfile::TempDir,
    store: checkpoint::Store,
    tensors: Vec<Tensor>,
    fact: api::events::CheckpointFact,
}

impl Halves {
    fn new() -> Self {
        let mut random = Random(7);
        let mut tensor = |name: &str, shape: &[u64]| {
            let bytes = shape.iter().product::<u64>() * 4;
            let data = (0..bytes).map(|_| random.next() as u8).collect();
            Tensor { name: name.to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), data }
        };
        let tensors = vec![tensor("model.w", &[512, 256]), tensor("model.b", &[256])];
        let held = vec![
            vec![(0, Slice::cut(&[512, 256], 0, 0..256)), (1, Slice::whole(&[256]))],
            vec![(0, Slice::cut(&[512, 256], 0, 256..512)), (1, Slice::whole(&[256]))],
        ];
        let folder = tempfile::tempdir().expect("a folder");
        let store = support::folder_store(folder.path());
        let fact = save(&store, &tensors, &held, true, Compression::None);
        Self { folder, store, tensors, fact }
    }

    fn shard(&self, rank: usize) -> (checkpoint::ShardEntry, std::path::PathBuf) {
        let restore = Restore::with_store(self.store.clone(), &self.fact).expect("opens");
        let entry = restore.manifest().shards[rank].clone();
        let path = self.folder.path().join(&entry.key);
        (entry, path)
    }

    /// Reads a part of the large tensor.
    fn part(&self, slice: Slice) -> Result<Vec<u8>, RestoreError> {
        let mut restore = Restore::with_store(self.store.clone(), &self.fact)?;
        let mut out = vec![0; slice.elements() as usize * 4];
        let shape = &[512, 256];
        let piece = PieceTarget { name: "model.w", dtype: Dtype::F32, shape, slice, out: &mut out };
        restore.read(&mut [piece], &ReadOptions::of(Rank(0)))?;
        Ok(out)
    }
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at as usize] ^= 0x04;
    fs::write(path, bytes).expect("writes");
}

#[test]
fn a_damaged_byte_is_refused_by_whoever_reads_it_and_by_nobody_else() {
    let halves = Halves::new();
    let (entry, path) = halves.shard(1);
    let weight = entry.tensors.iter().find(|t| t.name == "model.w").expect("there").clone();
    // Row 300 is the shard's 44th; column 10 of it.
    let damaged = weight.offset + (44 * 256 + 10) * 4 + 1;
    let rows = |range| Slice::cut(&[512, 256], 0, range);
    let columns = |range| Slice::cut(&[512, 256], 1, range);
    let whole = halves.part(rows(0..512)).expect("reads");
    flip(&path, damaged);
    for slice in [rows(300..301), rows(256..400), columns(10..11), columns(0..128), rows(0..512)] {
        let error = halves.part(slice.clone()).expect_err("damaged");
        let text = error.to_string();
        assert!(matches!(error, RestoreError::Store(StoreError::Corrupt { .. })), "{text}");
        assert!(text.contains(&entry.key) && text.contains("r1"), "{slice}: {text}");
        assert!(text.contains("not those that were written"), "{slice}: {text}");
    }
    for slice in [rows(0..256), rows(301..320), columns(11..20), rows(260..300)] {
        let found = halves.part(slice.clone()).expect("another part");
        assert!(found == halves.tensors[0].part(&slice), "{slice}");
    }
    flip(&path, damaged);
    assert!(halves.part(rows(0..512)).expect("whole again") == whole);

    // The checksums themselves.
    flip(&path, entry.bytes - 1);
    flip(&path, weight.offset + weight.bytes + 5);
    let text = halves.part(columns(3..9)).expect_err("damaged").to_string();
    assert!(text.contains("the checksums of tensor `model.w`"), "{text}");
}

#[test]
fn a_shard_cut_off_lengthened_or_missing_is_refused_also_in_part() {
    let halves = Halves::new();
    let (entry, path) = halves.shard(1);
    let rows = |range| Slice::cut(&[512, 256], 0, range);
    let whole = fs::read(&path).expect("a file");
    for bytes in [&whole[..whole.len() - 1], &whole[..4000], &[&whole[..], b"x"].concat(), b""] {
        fs::write(&path, bytes).expect("writes");
        let error = halves.part(rows(300..310)).expect_err("refused");
        assert!(matches!(error, RestoreError::Store(StoreError::Corrupt { .. })), "{error}");
        assert!(error.to_string().contains(&entry.key), "{error}");
        halves.part(rows(3..250)).expect("the other shard's");
    }
    fs::remove_file(&path).expect("removes");
    let error = halves.part(rows(300..310)).expect_err("refused");
    assert!(matches!(error, RestoreError::Store(StoreError::NotFound { .. })), "{error}");
}

#[test]
fn what_is_wanted_must_be_what_is_there() {
    let halves = Halves::new();
    let mut restore = Restore::with_store(halves.store.clone(), &halves.fact).expect("opens");
    let mut refused = |name: &str, dtype: Dtype, shape: &[u64], slice: Slice, bytes: usize| {
        let mut out = vec![0; bytes];
        let target = PieceTarget { name, dtype, shape, slice, out: &mut out };
        let error = restore.read(&mut [target], &ReadOptions::of(Rank(0))).expect_err("refused");
        assert!(!error.is_retryable());
        let text = error.to_string();
        assert!(text.contains(name), "{text}");
        (error, text)
    };
    let slice = Slice::cut(&[512, 256], 0, 0..2);
    let (_, text) = refused("model.v", Dtype::F32, &[512, 256], slice.clone(), 2048);
    assert!(text.contains("no part of tensor"), "{text}");
    let (_, text) = refused("model.w", Dtype::F32, &[256, 256], slice.clone(), 2048);
    assert!(text.contains("[512, 256], expected [256, 256]"), "{text}");
    let (_, text) = refused("model.w", Dtype::BF16, &[512, 256], slice.clone(), 1024);
    assert!(text.contains("F32, expected BF16"), "{text}");
    let outside = Slice::cut(&[512, 256], 0, 511..513);
    let (_, text) = refused("model.w", Dtype::F32, &[512, 256], outside, 2048);
    assert!(text.contains("[511:513,0:256] does not lie inside"), "{text}");
    let (error, _) = refused("model.w", Dtype::F32, &[512, 256], slice, 2047);
    assert!(matches!(error, RestoreError::Target { .. }), "{error}");
}

#[test]
fn pieces_that_do_not_make_whole_tensors_are_not_committed() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = support::folder_store(folder.path());
    let shape = [4, 6];
    let mut step = 0;
    let mut refused = |shape_of_second: &[u64], dtype: Dtype, first: Slice, second: Slice| {
        step += 1;
        let mut savers = Vec::new();
        let mut shards = Vec::new();
        let pieces = [(&shape[..], Dtype::F32, first), (shape_of_second, dtype, second)];
        for (rank, (shape, dtype, slice)) in pieces.into_iter().enumerate() {
            let data = vec![1; (slice.elements() * dtype.bytes()) as usize];
            let options = options(rank as u32, 2, Compression::None);
            let mut saver = Saver::with_store(store.clone(), options).expect("up");
            let piece = TensorPiece { name: "w", dtype, shape, slice, data: &data };
            saver.stage_pieces(Step(step), &[piece]).expect("stages");
            shards.push(saver.wait_shard(Step(step)).expect("written"));
            savers.push(saver);
        }
        savers[0].commit(Step(step), shards, info());
        savers[0].wait_committed(Step(step)).expect_err("refused").to_string()
    };
    let rows = |range| Slice::cut(&shape, 0, range);
    let text = refused(&shape, Dtype::F32, rows(0..2), rows(3..4));
    assert!(text.contains("[2:3,0:6] of tensor `w` is in no shard"), "{text}");
    let text = refused(&shape, Dtype::F32, rows(0..3), rows(2..4));
    assert!(text.contains("[0:3,0:6] and [2:4,0:6] of tensor `w` overlap"), "{text}");
    let text = refused(&[4, 7], Dtype::F32, rows(0..2), rows(2..4));
    assert!(text.contains("tensor `w` has shape"), "{text}");
    let text = refused(&shape, Dtype::I32, rows(0..2), rows(2..4));
    assert!(text.contains("I32, expected F32"), "{text}");

    let mut saver = Saver::with_store(store, options(0, 1, Compression::None)).expect("up");
    let data = [0; 96];
    let piece = |slice, length: usize| TensorPiece {
        name: "w",
        dtype: Dtype::F32,
        shape: &shape,
        slice,
        data: &data[..length],
    };
    let mut staged =
        |piece| saver.stage_pieces(Step(1), &[piece]).expect_err("refused").to_string();
    let text = staged(piece(Slice::cut(&shape, 0, 3..5), 48));
    assert!(text.contains("`w`") && text.contains("does not lie inside"), "{text}");
    let text = staged(piece(rows(0..1), 20));
    assert!(text.contains("[0:1,0:6]") && text.contains("20 bytes"), "{text}");
}

#[test]
fn an_export_puts_parts_together_and_verify_reads_them() {
    let halves = Halves::new();
    let path = halves.folder.path().join("model.safetensors");
    let report = runtime().block_on(checkpoint::export(&halves.store, &halves.fact, &path));
    assert_eq!(report.expect("exports").bytes, fs::metadata(&path).expect("a file").len());
    let bytes = fs::read(&path).expect("a file");
    let exported = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    assert_eq!(exported.len(), 2);
    let weight = exported.tensor("w").expect("there");
    assert_eq!(weight.shape(), [512, 256]);
    assert!(weight.data() == halves.tensors[0].data && exported.tensor("b").is_ok());

    let verify = || {
        let key = &halves.fact.manifest_key;
        runtime().block_on(checkpoint::verify(&halves.store, key, None)).expect("verifies")
    };
    let report = verify();
    assert!(report.ok && (report.shards, report.tensors) == (2, 2), "{report:?}");
    let (entry, path) = halves.shard(0);
    flip(&path, entry.bytes - 1);
    assert!(!verify().ok, "damaged checksums");
}

#[test]
fn a_checkpoint_of_version_1_is_read_whole_and_in_part() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = support::folder_store(folder.path());
    let state = support::State::new(11, 20_000);
    let fact = support::save(&store, &state, 5, 2, Compression::None).expect("saves");
    // As the release before wrote it: no checksums, in the manifest or at the end of the shards.
    let path = folder.path().join(&fact.manifest_key);
    let mut manifest: checkpoint::Manifest =
        serde_json::from_slice(&fs::read(&path).expect("a manifest")).expect("a manifest");
    manifest.version = 1;
    for shard in &mut manifest.shards {
        let own = |t: &&(String, Vec<usize>, Vec<f32>)| shard.tensors.iter().any(|o| o.name == t.0);
        let slices =
            state.0.iter().filter(own).map(|(name, shape, data)| TensorSlice { name, shape, data });
        let bytes = checkpoint::safetensors_bytes(&slices.collect::<Vec<_>>()).expect("a file");
        let data: u64 = shard.tensors.iter().map(|tensor| tensor.bytes).sum();
        let mut offset = bytes.len() as u64 - data;
        for tensor in &mut shard.tensors {
            (tensor.checks, tensor.offset) = (Vec::new(), offset);
            offset += tensor.bytes;
        }
        (shard.bytes, shard.stored_bytes) = (bytes.len() as u64, bytes.len() as u64);
        shard.blake3 = blake3::hash(&bytes).to_hex().to_string();
        fs::write(folder.path().join(&shard.key), bytes).expect("writes");
    }
    let bytes = serde_json::to_vec(&manifest).expect("bytes");
    let text = String::from_utf8(bytes.clone()).expect("text");
    assert!(!text.contains("checks") && !text.contains("slice"), "{text}");
    fs::write(&path, &bytes).expect("writes");
    let manifest_digest = blake3::hash(&bytes).to_hex().to_string();
    let fact = api::events::CheckpointFact { manifest_digest, ..fact };
    assert_eq!(support::restore(&store, &fact, &state).expect("restores"), state);

    let (name, shape, data) = &state.0[0];
    let shape: Vec<u64> = shape.iter().map(|extent| *extent as u64).collect();
    let mut out = vec![0; 2 * 4 * 4];
    let slice = Slice::cut(&shape, 0, 3..5);
    let mut restore = Restore::with_store(store, &fact).expect("opens");
    let target = PieceTarget { name, dtype: Dtype::F32, shape: &shape, slice, out: &mut out };
    let stats = restore.read(&mut [target], &ReadOptions::of(Rank(1))).expect("reads");
    let expected: Vec<u8> = data[12..20].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(out, expected);
    assert!(stats.fetched > 100 * stats.needed, "read whole, since only the whole can be checked");
}
