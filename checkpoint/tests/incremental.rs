//! Checkpoints that refer to former ones: what has not changed is not written again, and nothing that
//! a checkpoint which stays refers to is ever deleted.

mod support;

use std::sync::Arc;

use api::events::CheckpointFact;
use api::job::Compression;
use api::{Generation, Step};
use checkpoint::{
    References, Restore, SaveError, Saver, Stays, Store, delete_checkpoint, delete_orphans,
    find_complete, find_orphans, keys, list_checkpoints, verify,
};
use object_store::memory::InMemory;
use support::failing::{FailingStore, Failure, Plan};
use support::{State, info, job, options, restore, runtime};

fn memory() -> Store {
    Store::with_inner(Arc::new(InMemory::new()), "memory")
}

fn saver(store: &Store, compression: Compression) -> Saver {
    let options = checkpoint::SaverOptions { incremental: true, ..options(0, 1, compression) };
    Saver::with_store(store.clone(), options).expect("starts")
}

fn save(saver: &mut Saver, state: &State, step: u64) -> Result<CheckpointFact, SaveError> {
    saver.stage(Step(step), &state.slices())?;
    let shard = saver.wait_shard(Step(step))?;
    saver.commit(Step(step), vec![shard], info());
    saver.wait_committed(Step(step))
}

/// Tensors of these lengths, filled with these values.
fn state(tensors: &[(usize, f32)]) -> State {
    let tensor = |(index, (length, value)): (usize, &(usize, f32))| {
        (format!("model.t{index}"), vec![*length], vec![*value; *length])
    };
    State(tensors.iter().enumerate().map(tensor).collect())
}

#[test]
fn what_was_read_of_manifests_is_not_read_again_after_an_error() {
    let inner = Arc::new(InMemory::new());
    let honest = Store::with_inner(inner.clone(), "memory");
    let mut saver = saver(&honest, Compression::None);
    let facts: Vec<CheckpointFact> =
        (1..=12).map(|step| save(&mut saver, &state(&[(10, 1.0)]), step).expect("saves")).collect();
    let keys: Vec<Stays<'_>> = facts.iter().map(stays).collect();
    let plan = Plan::new(Failure::Expired, 6, false);
    let failing = Store::with_inner(Arc::new(FailingStore::new(inner, plan.clone())), "memory");
    let mut references = References::default();
    let runtime = runtime();
    runtime.block_on(references.read(&failing, &keys)).expect_err("refused once");
    runtime.block_on(references.read(&failing, &keys)).expect("all are read");
    assert_eq!(plan.calls(), keys.len() + 1);
    let first = Restore::with_store(honest, &facts[0]).expect("opens");
    assert!(references.contains(&first.manifest().shards[0].key));
}

fn references(store: &Store, fact: &CheckpointFact) -> Vec<String> {
    let restore = Restore::with_store(store.clone(), fact).expect("opens");
    restore.manifest().references().into_iter().map(str::to_owned).collect()
}

#[test]
fn what_has_not_changed_is_not_written_again() {
    for compression in [Compression::None, Compression::Zstd] {
        let store = memory();
        let mut saver = saver(&store, compression);
        let frozen = 100_000;
        // Values that do not compress to nothing.
        let mut now = State::new(5, frozen);
        let first = save(&mut saver, &now, 1).expect("saves");
        assert_eq!(references(&store, &first), Vec::<String>::new());
        for step in 2..5 {
            // One small tensor changes.
            now.0[1].2[0] += 1.0;
            let fact = save(&mut saver, &now, step).expect("saves");
            assert!(fact.bytes < first.bytes / 20, "{} of {}", fact.bytes, first.bytes);
            assert_eq!(references(&store, &fact).len(), 1, "{step}");
            assert_eq!(restore(&store, &fact, &now).as_ref(), Ok(&now), "{compression:?} {step}");
            let report = runtime().block_on(verify(&store, &fact.manifest_key, None));
            let report = report.expect("verifies");
            assert!(report.ok && report.shards == 2, "{report:?}");
        }
        // All changes: nothing is referred to any more.
        now.0.iter_mut().for_each(|(_, _, data)| data.iter_mut().for_each(|value| *value += 1.0));
        let last = save(&mut saver, &now, 9).expect("saves");
        assert_eq!(references(&store, &last), Vec::<String>::new());
        let complete = runtime().block_on(find_complete(&store, &job(), None)).expect("lists");
        assert_eq!(complete.len(), 5);
        assert_eq!(complete.last(), Some(&last));
    }
}

#[test]
fn a_restored_job_goes_on_referring_to_what_it_was_restored_from() {
    let store = memory();
    let now = state(&[(50_000, 1.0), (8, 2.0)]);
    let first = save(&mut saver(&store, Compression::None), &now, 1).expect("saves");
    let restored = Restore::with_store(store.clone(), &first).expect("opens");
    let mut next = options(0, 1, Compression::None);
    (next.generation, next.incremental) = (Generation(4), true);
    let mut next = Saver::with_store(store.clone(), next).expect("starts");
    next.base_on(restored.manifest());
    let second = save(&mut next, &now, 2).expect("saves");
    assert_eq!(references(&store, &second).len(), 1);
    assert_eq!(restore(&store, &second, &now).as_ref(), Ok(&now));
}

#[test]
fn a_shard_of_which_little_is_used_is_not_kept_for_it() {
    let store = memory();
    let mut saver = saver(&store, Compression::None);
    // 49 of 100 stay the same, then 51 of 100.
    let first = state(&[(51, 1.0), (49, 1.0)]);
    save(&mut saver, &first, 1).expect("saves");
    let second = state(&[(51, 2.0), (49, 1.0)]);
    let fact = save(&mut saver, &second, 2).expect("saves");
    assert_eq!(references(&store, &fact), Vec::<String>::new());
    let third = state(&[(51, 2.0), (49, 3.0)]);
    let fact = save(&mut saver, &third, 3).expect("saves");
    assert_eq!(references(&store, &fact).len(), 1);
    assert_eq!(restore(&store, &fact, &third).as_ref(), Ok(&third));
}

#[test]
fn a_manifest_refers_only_to_what_the_checkpoint_before_it_holds() {
    let store = memory();
    let mut saver = saver(&store, Compression::None);
    let now = state(&[(500, 1.0)]);
    saver.stage(Step(1), &now.slices()).expect("stages");
    saver.wait_shard(Step(1)).expect("written");
    // Step 1 is never committed: nobody could know that step 2 needs its shard.
    let error = save(&mut saver, &now, 2).expect_err("refused");
    assert!(error.to_string().contains("which the checkpoint before it does not hold"), "{error}");
    let complete = runtime().block_on(find_complete(&store, &job(), None)).expect("lists");
    assert_eq!(complete, []);
}

#[test]
fn a_lost_or_damaged_former_shard_is_found_by_whoever_needs_it() {
    let store = memory();
    let mut saver = saver(&store, Compression::None);
    let now = state(&[(5000, 1.0), (8, 2.0)]);
    save(&mut saver, &now, 1).expect("saves");
    let fact = save(&mut saver, &now, 2).expect("saves");
    let key = references(&store, &fact).remove(0);
    let runtime = runtime();
    let bytes = runtime.block_on(store.get(&key)).expect("reads");
    let mut damaged = bytes.to_vec();
    damaged[bytes.len() / 2] ^= 1;
    runtime.block_on(store.put(&key, damaged.into())).expect("writes");
    let report = runtime.block_on(verify(&store, &fact.manifest_key, None)).expect("verifies");
    assert!(!report.ok && report.problems[0].contains(&key), "{report:?}");
    assert!(restore(&store, &fact, &now).is_err());
    runtime.block_on(store.delete(&key)).expect("deletes");
    let complete = runtime.block_on(find_complete(&store, &job(), None)).expect("lists");
    assert_eq!(complete, [], "both need the shard that is gone");
}

/// Every way in which three tensors may change over three steps, with one or two checkpoints kept:
/// after every deletion each kept checkpoint is whole, and nothing is left when none is kept.
#[test]
fn no_deletion_takes_what_a_kept_checkpoint_refers_to() {
    let runtime = runtime();
    let lengths = [60, 30, 10];
    let mut referred = 0;
    for changes in 0..8u32.pow(3) {
        let keep = 1 + changes as usize % 2;
        let store = memory();
        let mut saver = saver(&store, Compression::None);
        let mut values = [0.0f32; 3];
        let mut kept: Vec<(CheckpointFact, State)> = Vec::new();
        for step in 1..=4u64 {
            for (tensor, value) in values.iter_mut().enumerate() {
                let mask = changes / 8u32.pow((step as u32).saturating_sub(2)) % 8;
                *value += if step > 1 && mask & (1 << tensor) != 0 { 1.0 } else { 0.0 };
            }
            let now = state(&[0, 1, 2].map(|i| (lengths[i], values[i])));
            let fact = save(&mut saver, &now, step).expect("saves");
            referred += references(&store, &fact).len();
            kept.push((fact, now));
            kept.drain(..kept.len().saturating_sub(keep));
            sweep(&runtime, &store, &kept);
            for (fact, now) in &kept {
                let found = restore(&store, fact, now);
                assert_eq!(found.as_ref(), Ok(now), "changes {changes:o}, step {step}");
            }
            let whole = runtime.block_on(find_complete(&store, &job(), None)).expect("lists");
            assert_eq!(whole.len(), kept.len(), "changes {changes:o}, step {step}");
        }
        sweep(&runtime, &store, &[]);
        let left = runtime.block_on(store.list("")).expect("lists");
        assert_eq!(left, [], "changes {changes:o}");
    }
    assert!(referred > 500, "only {referred} shards were referred to");
}

fn stays(fact: &CheckpointFact) -> Stays<'_> {
    Stays { manifest_key: &fact.manifest_key, digest: Some(&fact.manifest_digest) }
}

/// What the leader's sweep does, with a list of those to keep in place of records.
fn sweep(runtime: &tokio::runtime::Runtime, store: &Store, kept: &[(CheckpointFact, State)]) {
    runtime.block_on(async {
        let kept: Vec<Stays<'_>> = kept.iter().map(|(fact, _)| stays(fact)).collect();
        let mut references = References::default();
        references.read(store, &kept).await.expect("reads");
        for found in list_checkpoints(store, &job()).await.expect("lists").into_iter().rev() {
            if !kept.iter().any(|stays| stays.manifest_key == found.manifest_key) {
                delete_checkpoint(store, &found.manifest_key, &references).await.expect("deletes");
            }
        }
    });
}

#[test]
fn a_checkpoint_without_references_is_one_that_former_releases_read() {
    let store = memory();
    let mut saver = saver(&store, Compression::None);
    let now = state(&[(50, 1.0), (8, 2.0)]);
    save(&mut saver, &now, 1).expect("saves");
    save(&mut saver, &now, 2).expect("saves");
    let version = |step| {
        let key = keys::manifest(&job(), Step(step), Generation(3));
        let bytes = runtime().block_on(store.get(&key)).expect("reads");
        let manifest: serde_json::Value = serde_json::from_slice(&bytes).expect("parses");
        manifest["version"].clone()
    };
    assert_eq!((version(1), version(2)), (2.into(), 3.into()));
}

#[test]
fn orphans_are_what_no_manifest_names_and_nobody_writes() {
    let store = memory();
    let mut saver = saver(&store, Compression::None);
    let now = state(&[(500, 1.0), (8, 2.0)]);
    let first = save(&mut saver, &now, 1).expect("saves");
    let second = save(&mut saver, &now, 2).expect("saves");
    // The first is deleted, but for the shard that the second refers to; a writer died at step 3.
    let runtime = runtime();
    let mut kept = References::default();
    runtime.block_on(kept.read(&store, &[stays(&second)])).expect("reads");
    runtime.block_on(delete_checkpoint(&store, &first.manifest_key, &kept)).expect("deletes");
    saver.stage(Step(3), &state(&[(500, 9.0), (8, 9.0)]).slices()).expect("stages");
    let lost = saver.wait_shard(Step(3)).expect("written").key;
    // Of the next generation somebody may be writing the manifest; a log is no checkpoint's.
    let begun = keys::shard(&job(), Step(4), Generation(4), api::Rank(0), "ab");
    runtime.block_on(store.put(&begun, "shard".into())).expect("writes");
    runtime.block_on(store.put("jobs/digits/logs/g3/r0/0", "line".into())).expect("writes");
    let find = |ended| runtime.block_on(find_orphans(&store, &job(), Generation(ended)));
    let keys = |found: &[checkpoint::ObjectInfo]| {
        found.iter().map(|orphan| orphan.key.clone()).collect::<Vec<_>>()
    };
    assert_eq!(keys(&find(2).expect("lists")), Vec::<String>::new());
    let found = find(3).expect("lists");
    assert_eq!(keys(&found), [lost]);
    runtime.block_on(delete_orphans(&store, &found)).expect("deletes");
    assert_eq!(keys(&find(4).expect("lists")), [begun]);
    assert_eq!(restore(&store, &second, &now).as_ref(), Ok(&now));
    // What a manifest names is not known when it cannot be read.
    let manifest = keys::manifest(&job(), Step(2), Generation(3));
    runtime.block_on(store.put(&manifest, "no manifest".into())).expect("writes");
    assert!(find(3).is_err());
}
