//! Checkpoints and models encrypted in the store: everything works as in the clear, nothing of what
//! was saved can be found there, and what is wrong with the key is said in one sentence.

mod support;

use std::sync::Arc;

use api::config::{EncryptionSection, StoreSection};
use api::job::Compression;
use api::{Generation, Step};
use bytes::Bytes;
use checkpoint::{
    Dtype, PieceTarget, ReadOptions, References, Restore, SaveError, Saver, Slice, Stays, Store,
    StoreError, StoreKey, diff, export, find_complete, keys, verify,
};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use support::failing::{FailingStore, Failure, Plan};
use support::{State, info, job, options, restore, runtime, save};

fn key(byte: u8) -> StoreKey {
    StoreKey::from_bytes([byte; 32])
}

/// The same objects, in the clear and under a key.
fn memory() -> (Store, Store) {
    let inner = Arc::new(InMemory::new());
    let plain = Store::with_inner(inner.clone(), "memory");
    (plain.clone(), plain.encrypted(&key(1)))
}

#[test]
fn what_is_saved_is_restored_verified_compared_and_exported() {
    let folder = tempfile::tempdir().expect("a folder");
    let key_file = folder.path().join("key");
    std::fs::write(&key_file, "5a".repeat(32)).expect("written");
    let encryption = EncryptionSection { key_file, ..EncryptionSection::default() };
    let section = StoreSection { encryption, ..StoreSection::default() };
    for compression in [Compression::None, Compression::Zstd] {
        let root = folder.path().join(format!("{compression:?}"));
        let uri = format!("file://{}", root.display());
        let store = Store::open(&section, &uri).expect("opens");
        // 36 MB in parts: more than one request.
        let state = State::new(5, 12_000_000);
        let fact = save(&store, &state, 1, 1, compression).expect("saves");
        assert_eq!(restore(&store, &fact, &state).as_ref(), Ok(&state));
        let mut other = state.clone();
        other.0[1].2[0] += 1.0;
        let second = save(&store, &other, 2, 1, compression).expect("saves");
        let runtime = runtime();
        runtime.block_on(async {
            let report = verify(&store, &fact.manifest_key, Some(&fact.manifest_digest)).await;
            assert!(report.as_ref().is_ok_and(|report| report.ok), "{report:?}");
            let report = diff(&store, &fact, &second).await.expect("compares");
            assert_eq!(report.differing.len(), 1, "{report:?}");
            let complete = find_complete(&store, &job(), None).await.expect("lists");
            assert_eq!(complete, [fact.clone(), second.clone()]);
            let exported = folder.path().join("exported.safetensors");
            export(&store, &fact, &exported).await.expect("exports");
        });
    }
}

#[test]
fn nothing_of_a_checkpoint_or_model_lies_in_the_store_in_the_clear() {
    let (plain, sealed) = memory();
    // Found in any shard that is not encrypted.
    let marked = State(vec![("model.secret-layer".into(), vec![40_000], vec![1234.5; 40_000])]);
    save(&sealed, &marked, 1, 1, Compression::None).expect("saves");
    let mut saver = Saver::with_store(sealed.clone(), options(0, 1, Compression::None)).expect("s");
    let (model, ..) = saver.put_model(&marked.slices(), br#"{"secret-layer": 1}"#).expect("writes");
    let runtime = runtime();
    let needles = [&b"secret-layer"[..], &1234.5f32.to_le_bytes().repeat(3)];
    let objects = runtime.block_on(plain.list("jobs")).expect("lists");
    assert_eq!(objects.len(), 4, "{objects:?}");
    for object in &objects {
        let sealed_size = runtime.block_on(sealed.size(&object.key)).expect("there");
        assert!(sealed_size < object.bytes, "{} is not encrypted", object.key);
        // Read past the check that tells encrypted from damaged.
        let bytes = runtime.block_on(plain.get_range(&object.key, 1..object.bytes)).expect("reads");
        for needle in needles {
            let found = bytes.windows(needle.len()).any(|window| window == needle);
            assert!(!found, "{} holds what it should hide", object.key);
        }
    }
    let descriptor = runtime.block_on(sealed.get(&format!("{model}/{}", keys::MODEL_DESCRIPTOR)));
    assert_eq!(descriptor.expect("reads"), r#"{"secret-layer": 1}"#);
    // What is no checkpoint and no model is as it was.
    let log = "jobs/digits/logs/g1/r0/0.log";
    runtime.block_on(sealed.put(log, Bytes::from("a line"))).expect("writes");
    assert_eq!(runtime.block_on(plain.get(log)).expect("reads"), "a line");
}

#[test]
fn any_range_of_an_object_reads_as_in_the_clear() {
    let (_, sealed) = memory();
    let runtime = runtime();
    let name = keys::shard(&job(), Step(1), Generation(1), api::Rank(0), "ab");
    let segment = 64u64 << 10;
    for length in [0, 1, segment - 1, segment, segment + 1, 3 * segment, 3 * segment + 7] {
        let content: Bytes = (0..length).map(|i| (i * 31 % 251) as u8).collect();
        runtime.block_on(sealed.put(&name, content.clone())).expect("writes");
        assert_eq!(runtime.block_on(sealed.get(&name)).expect("reads"), content, "{length}");
        assert_eq!(runtime.block_on(sealed.size(&name)), Ok(length));
        let edges = [0, 1, segment - 1, segment, segment + 1, 2 * segment, length];
        for start in edges.into_iter().filter(|start| *start < length) {
            for end in edges.into_iter().chain([length - 1]).filter(|end| *end <= length) {
                if start < end {
                    let found = runtime.block_on(sealed.get_range(&name, start..end));
                    let expected = content.slice(start as usize..end as usize);
                    assert_eq!(found, Ok(expected), "{start}..{end} of {length}");
                }
            }
        }
    }
}

#[test]
fn parts_of_tensors_are_read_by_the_ranges_they_need() {
    let (_, sealed) = memory();
    let state = State::new(9, 200_000);
    let fact = save(&sealed, &state, 1, 2, Compression::None).expect("saves");
    let mut reader = Restore::with_store(sealed, &fact).expect("opens");
    let (name, shape, data) = &state.0[2];
    let shape: Vec<u64> = shape.iter().map(|extent| *extent as u64).collect();
    let slice = Slice::cut(&shape, 0, 100..200);
    let mut out = vec![0u8; slice.elements() as usize * 4];
    let target = PieceTarget { name, dtype: Dtype::F32, shape: &shape, slice, out: &mut out };
    reader.read(&mut [target], &ReadOptions::of(api::Rank(0))).expect("reads");
    let expected: Vec<u8> = data[200..400].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(out, expected);
}

#[test]
fn a_wrong_missing_or_new_key_is_one_clear_error() {
    let (plain, sealed) = memory();
    let other = plain.clone().encrypted(&key(2));
    let state = State::new(3, 4000);
    let fact = save(&sealed, &state, 1, 1, Compression::None).expect("saves");
    let runtime = runtime();
    let (own, wrong) = (key(1).id(), key(2).id());
    for (store, parts) in [(&plain, ["no key is configured", ""]), (&other, [&*own, &*wrong])] {
        let mut texts = vec![
            restore(store, &fact, &state).expect_err("refused").to_string(),
            runtime.block_on(store.probe()).expect_err("refused").to_string(),
            runtime.block_on(find_complete(store, &job(), None)).expect_err("refused").to_string(),
            runtime
                .block_on(verify(store, &fact.manifest_key, None))
                .expect_err("refused")
                .to_string(),
        ];
        match save(store, &state, 2, 1, Compression::None) {
            Err(SaveError::Store(error @ StoreError::Encryption { .. })) => {
                assert!(!error.is_retryable());
                texts.push(error.to_string());
            }
            saved => panic!("expected a refusal before anything is written: {saved:?}"),
        }
        for text in texts {
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
            assert!(text.contains("[store.encryption]"), "{text}");
            assert!(!text.contains("01010101") && !text.contains("02020202"), "{text}");
        }
    }
    runtime.block_on(sealed.probe()).expect("the key it was encrypted under");
    assert_eq!(restore(&sealed, &fact, &state).as_ref(), Ok(&state));
}

#[test]
fn a_store_in_use_is_not_encrypted_halfway() {
    let (plain, sealed) = memory();
    let state = State::new(3, 4000);
    let fact = save(&plain, &state, 1, 1, Compression::None).expect("saves");
    let text = runtime().block_on(sealed.probe()).expect_err("refused").to_string();
    assert!(text.contains("jobs that are not encrypted"), "{text}");
    let text = restore(&sealed, &fact, &state).expect_err("refused").to_string();
    assert!(text.contains("it is not encrypted, and the store is"), "{text}");
}

#[test]
fn whatever_is_changed_in_the_store_is_found() {
    let (plain, sealed) = memory();
    let state = State::new(3, 60_000);
    let fact = save(&sealed, &state, 1, 2, Compression::None).expect("saves");
    let runtime = runtime();
    let objects = runtime.block_on(plain.list(&keys::checkpoints(&job()))).expect("lists");
    let raw = |key: &str, bytes: u64| {
        let first = Bytes::from_static(b"C");
        let rest = runtime.block_on(plain.get_range(key, 1..bytes)).expect("reads");
        [first, rest].concat()
    };
    let check = |what: &str| {
        let is_found = match runtime.block_on(verify(&sealed, &fact.manifest_key, None)) {
            Ok(report) => !report.ok,
            // The byte that was changed said which key it is.
            Err(error) => error.is_key_mistake(),
        };
        assert!(is_found, "{what}");
    };
    for object in &objects {
        let good = raw(&object.key, object.bytes);
        for at in [8, 20, 50, 60, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            runtime.block_on(plain.put(&object.key, bad.into())).expect("writes");
            check(&format!("byte {at} of {}", object.key));
        }
        let cut = Bytes::from(good.clone()).slice(..good.len() - 1);
        runtime.block_on(plain.put(&object.key, cut)).expect("writes");
        check("the last byte is gone");
        runtime.block_on(plain.put(&object.key, good.into())).expect("writes");
    }
    // The shards of two ranks swapped: each opens under its own name only.
    let shards: Vec<_> = objects.iter().filter(|o| o.key.ends_with(".safetensors")).collect();
    let first = raw(&shards[0].key, shards[0].bytes);
    let second = raw(&shards[1].key, shards[1].bytes);
    runtime.block_on(plain.put(&shards[0].key, second.into())).expect("writes");
    check("another shard in its place");
    runtime.block_on(plain.put(&shards[0].key, first.into())).expect("writes");
    let report = runtime.block_on(verify(&sealed, &fact.manifest_key, None)).expect("verifies");
    assert!(report.ok, "{report:?}");
}

#[test]
fn one_damaged_manifest_is_in_the_way_of_no_other_checkpoint() {
    let (plain, sealed) = memory();
    let state = State::new(3, 4000);
    let facts =
        [1, 2].map(|step| save(&sealed, &state, step, 1, Compression::None).expect("saves"));
    let manifests = facts.each_ref().map(|fact| fact.manifest_key.as_str());
    runtime().block_on(async {
        let objects = plain.list(&keys::checkpoints(&job())).await.expect("lists");
        let object = objects.iter().find(|object| object.key == manifests[0]).expect("there");
        let rest = plain.get_range(&object.key, 1..object.bytes).await.expect("reads");
        let mut bad = [&b"C"[..], &rest].concat();
        *bad.last_mut().expect("bytes") ^= 1;
        plain.put(&object.key, bad.into()).await.expect("writes");
        let report = verify(&sealed, manifests[0], None).await.expect("a report");
        assert!(!report.ok && report.problems[0].contains("is damaged"), "{report:?}");
        let complete = find_complete(&sealed, &job(), None).await.expect("lists");
        assert_eq!(complete, facts[1..]);
        let mut references = References::default();
        references
            .read(&sealed, &manifests.iter().map(|key| (*key).into()).collect::<Vec<_>>())
            .await
            .expect("nobody recorded it: it keeps nothing");
        let digest = Some(facts[0].manifest_digest.as_str());
        let recorded = Stays { manifest_key: manifests[0], digest };
        let refused = references.read(&sealed, &[recorded]).await.expect_err("it is damaged");
        assert!(matches!(refused, StoreError::Corrupt { .. }), "{refused}");
    });
}

#[test]
fn the_key_is_asked_for_once_per_process_and_behind_what_is_staged() {
    let plan = Plan::new(Failure::SlowDown, usize::MAX, false);
    let inner = Arc::new(FailingStore::new(Arc::new(InMemory::new()), plan.clone()));
    let store = Store::with_inner(inner, "memory").encrypted(&key(1));
    let state = State::new(3, 4000);
    save(&store, &state, 1, 1, Compression::None).expect("saves");
    let with_key = plan.calls();
    save(&store, &state, 2, 2, Compression::None).expect("saves");
    let shard_and_look = 2;
    // To ask for the mark, to see that nothing lies there without it, and to make it; the second save
    // has one shard more.
    assert_eq!(plan.calls() - with_key, with_key - 3 + shard_and_look);
    // A rank that meets others again asks nothing of a store.
    let refuses = Plan::new(Failure::SlowDown, 0, true);
    let inner = Arc::new(FailingStore::new(Arc::new(InMemory::new()), refuses.clone()));
    let store = Store::with_inner(inner, "memory").encrypted(&key(1));
    let mut saver = Saver::with_store(store, options(0, 1, Compression::None)).expect("starts");
    assert_eq!(refuses.calls(), 0);
    saver.stage(Step(1), &state.slices()).expect("stages");
    let error = saver.wait_shard(Step(1)).expect_err("nothing can be written");
    assert!(error.is_retryable(), "{error}");
}

#[test]
fn a_store_that_does_not_say_its_key_ends_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    // It leads to itself: to read it fails as a disk fails that has a bad day.
    std::os::unix::fs::symlink("encryption.json", folder.path().join("encryption.json"))
        .expect("made");
    let inner = LocalFileSystem::new_with_prefix(folder.path()).expect("a folder");
    let store = Store::with_inner(Arc::new(inner), "a folder");
    let error = runtime().block_on(store.check_key()).expect_err("it does not say");
    assert!(error.is_retryable(), "{error}");
    let state = State::new(3, 4000);
    let fact = save(&store, &state, 1, 1, Compression::None).expect("saves");
    assert_eq!(restore(&store, &fact, &state).as_ref(), Ok(&state));
}

#[test]
fn a_mark_of_another_version_is_not_guessed_at() {
    let (plain, sealed) = memory();
    let mark = format!("{{\"version\": 2, \"key_id\": \"{}\"}}", key(1).id());
    let runtime = runtime();
    runtime.block_on(plain.put("encryption.json", Bytes::from(mark))).expect("writes");
    let text = runtime.block_on(sealed.check_key()).expect_err("refused").to_string();
    assert!(text.contains("version 2, this release knows version 1"), "{text}");
}

#[test]
fn a_range_that_begins_behind_the_end_is_an_error() {
    let (_, sealed) = memory();
    let name = keys::shard(&job(), Step(1), Generation(1), api::Rank(0), "ab");
    let runtime = runtime();
    runtime.block_on(sealed.put(&name, Bytes::from_static(b"short"))).expect("writes");
    let read = runtime.block_on(sealed.get_range(&name, 10..20));
    assert!(matches!(read, Err(StoreError::Corrupt { .. })), "{read:?}");
}

#[test]
fn former_shards_are_read_through_the_same_key() {
    let (_, sealed) = memory();
    let options =
        checkpoint::SaverOptions { incremental: true, ..options(0, 1, Compression::None) };
    let mut saver = Saver::with_store(sealed.clone(), options).expect("starts");
    let mut state = State::new(4, 50_000);
    for step in 1..3 {
        state.0[1].2[0] += 1.0;
        saver.stage(Step(step), &state.slices()).expect("stages");
        let shard = saver.wait_shard(Step(step)).expect("written");
        assert_eq!(shard.former.len(), usize::from(step == 2));
        saver.commit(Step(step), vec![shard], info());
        let fact = saver.wait_committed(Step(step)).expect("committed");
        assert_eq!(restore(&sealed, &fact, &state).as_ref(), Ok(&state));
    }
}
