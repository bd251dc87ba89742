//! What the tests of this crate share: a state to save, and one call for save and restore.

#![allow(dead_code, reason = "every test binary uses a part")]

pub mod counting;
pub mod failing;

use std::collections::BTreeMap;

use api::config::StoreSection;
use api::events::CheckpointFact;
use api::job::Compression;
use api::{Generation, Name, Rank, Step};
use checkpoint::{
    ManifestInfo, Restore, RestoreError, SaveError, Saver, SaverOptions, Store, TensorSlice,
    TensorTarget, share_tensors,
};

/// A training state: names, shapes, values.
#[derive(Clone, Debug, PartialEq)]
pub struct State(pub Vec<(String, Vec<usize>, Vec<f32>)>);

impl State {
    /// Values that depend on `seed`, in about `elements` elements over several tensors.
    pub fn new(seed: u64, elements: usize) -> Self {
        let mut random = Random(seed);
        let mut tensors = Vec::new();
        for (group, parts) in [("model", 2), ("optimizer.m", 4), ("optimizer.v", 4)] {
            for (layer, shape) in [
                ("embed.weight", vec![elements / parts / 8, 4]),
                ("head.bias", vec![7]),
                ("head.weight", vec![elements / parts / 4, 2]),
                ("scale", vec![]),
            ] {
                let count = shape.iter().product();
                let values = (0..count).map(|_| (random.next() % 4096) as f32 / 64.0 - 32.0);
                tensors.push((format!("{group}.{layer}"), shape, values.collect()));
            }
        }
        Self(tensors)
    }

    pub fn slices(&self) -> Vec<TensorSlice<'_>> {
        self.0.iter().map(|(name, shape, data)| TensorSlice { name, shape, data }).collect()
    }

    pub fn zeroed(&self) -> Self {
        let zero = |(name, shape, data): &(String, Vec<usize>, Vec<f32>)| {
            (name.clone(), shape.clone(), vec![0.0; data.len()])
        };
        Self(self.0.iter().map(zero).collect())
    }

    pub fn targets(&mut self) -> Vec<TensorTarget<'_>> {
        self.0.iter_mut().map(|(name, shape, out)| TensorTarget { name, shape, out }).collect()
    }
}

/// xorshift64*: any seed but 0.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

pub fn job() -> Name {
    "digits".parse().expect("a name")
}

pub fn options(rank: u32, world_size: u32, compression: Compression) -> SaverOptions {
    SaverOptions {
        job: job(),
        generation: Generation(3),
        rank: Rank(rank),
        world_size,
        compression,
        incremental: false,
    }
}

pub fn info() -> ManifestInfo {
    ManifestInfo {
        fingerprint: "test".into(),
        data_digest: "data".into(),
        spec_digest: "spec".into(),
        lanes: 8,
        samples: None,
        metrics: BTreeMap::from([
            ("validation:loss".into(), 0.1 + 0.2),
            ("validation:perplexity".into(), f64::INFINITY),
        ]),
    }
}

/// Saves a state as `world_size` ranks would, each with its own saver.
pub fn save(
    store: &Store,
    state: &State,
    step: u64,
    world_size: u32,
    compression: Compression,
) -> Result<CheckpointFact, SaveError> {
    let slices = state.slices();
    let lengths: Vec<usize> = slices.iter().map(|slice| slice.data.len()).collect();
    let shares = share_tensors(&lengths, world_size);
    let mut savers = Vec::new();
    for (rank, share) in shares.into_iter().enumerate() {
        let options = options(rank as u32, world_size, compression);
        let mut saver = Saver::with_store(store.clone(), options)?;
        saver.stage(Step(step), &slices[share])?;
        savers.push(saver);
    }
    let shards: Result<Vec<_>, _> =
        savers.iter_mut().map(|saver| saver.wait_shard(Step(step))).collect();
    savers[0].commit(Step(step), shards?, info());
    let fact = savers[0].wait_committed(Step(step))?;
    for saver in savers {
        saver.finish()?;
    }
    Ok(fact)
}

/// Restores into a zeroed copy of `like`.
pub fn restore(store: &Store, fact: &CheckpointFact, like: &State) -> Result<State, RestoreError> {
    let mut state = like.zeroed();
    let mut restore = Restore::with_store(store.clone(), fact)?;
    restore.read_all(&mut state.targets())?;
    Ok(state)
}

pub fn folder_store(folder: &std::path::Path) -> Store {
    let uri = format!("file://{}", folder.display());
    Store::open(&StoreSection::default(), &uri).expect("opens")
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a runtime")
}
