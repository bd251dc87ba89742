//! Checkpoints in a folder: what is saved comes back, and what is not whole is refused.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use api::config::StoreSection;
use api::job::Compression;
use api::{Generation, Step};
use checkpoint::{
    Manifest, Restore, RestoreError, SaveError, Saver, Store, StoreError, StoredCheckpoint,
    TensorSlice, keys,
};
use support::{State, folder_store, job, options, restore, runtime, save};

#[test]
fn what_is_saved_comes_back_whatever_number_of_ranks_saved_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder_store(&folder.path().join("made/when absent"));
    let runtime = runtime();
    let state = State::new(1, 400_000);
    let mut exported = Vec::new();
    let mut step = 0;
    for compression in [Compression::None, Compression::Zstd] {
        for world_size in [1, 3, 16] {
            step += 1;
            let fact = save(&store, &state, step, world_size, compression).expect("saves");
            assert_eq!((fact.step, fact.generation), (Step(step), Generation(3)));
            assert_eq!(restore(&store, &fact, &state).expect("restores"), state);

            let report = runtime.block_on(checkpoint::verify(
                &store,
                &fact.manifest_key,
                Some(&fact.manifest_digest),
            ));
            let report = report.expect("verifies");
            assert!(report.ok, "{report:?}");
            assert_eq!(report.shards, u64::from(world_size));
            assert_eq!((report.tensors, report.bytes), (state.0.len() as u64, fact.bytes));

            let path = folder.path().join(format!("{step}.safetensors"));
            let report = runtime.block_on(checkpoint::export(&store, &fact, &path));
            let report = report.expect("exports");
            assert_eq!(report.bytes, fs::metadata(&path).expect("a file").len());
            exported.push((report.sha256, fs::read(&path).expect("a file")));
        }
    }
    exported.dedup();
    let [(sha256, bytes)] = &exported[..] else { panic!("exports differ") };

    // An export is the model that a finished job writes.
    let model: Vec<(String, TensorSlice<'_>)> = state
        .slices()
        .into_iter()
        .filter_map(|t| Some((t.name.strip_prefix("model.")?.to_owned(), t)))
        .collect();
    let model: Vec<TensorSlice<'_>> =
        model.iter().map(|(name, t)| TensorSlice { name, ..*t }).collect();
    let mut saver = Saver::with_store(store.clone(), options(0, 1, Compression::Zstd)).expect("up");
    let (key, model_sha256, size) = saver.put_model(&model, b"{}").expect("writes");
    assert_eq!((&model_sha256, size), (sha256, bytes.len() as u64));
    assert_eq!(key, keys::model(&job(), Generation(3)));
    let weights = runtime.block_on(store.get(&format!("{key}/model.safetensors"))).expect("there");
    assert_eq!(&weights[..], &bytes[..]);
    assert_eq!(runtime.block_on(store.get(&format!("{key}/model.json"))).expect("there"), "{}");

    let complete = runtime.block_on(checkpoint::find_complete(&store, &job(), None));
    let steps: Vec<u64> = complete.expect("lists").iter().map(|fact| fact.step.0).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let other = runtime.block_on(checkpoint::find_complete(&store, &job(), Some(Generation(4))));
    assert_eq!(other, Ok(vec![]));
}

#[test]
fn shards_of_the_same_state_have_the_same_bytes() {
    let state = State::new(2, 100_000);
    for compression in [Compression::None, Compression::Zstd] {
        let digests = || -> Vec<String> {
            let folder = tempfile::tempdir().expect("a folder");
            let store = folder_store(folder.path());
            let fact = save(&store, &state, 5, 2, compression).expect("saves");
            let restore = Restore::with_store(store, &fact).expect("opens");
            restore.manifest().shards.iter().map(|shard| shard.blake3.clone()).collect()
        };
        assert_eq!(digests(), digests());
    }
}

/// A saved checkpoint whose files a test then damages.
struct Damaged {
    store: Store,
    folder: tempfile::TempDir,
    state: State,
    fact: api::events::CheckpointFact,
}

impl Damaged {
    fn new(compression: Compression) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = folder_store(folder.path());
        let state = State::new(3, 20_000);
        let fact = save(&store, &state, 7, 2, compression).expect("saves");
        Self { store, folder, state, fact }
    }

    fn manifest(&self) -> Manifest {
        let bytes = fs::read(self.path(&self.fact.manifest_key)).expect("a manifest");
        serde_json::from_slice(&bytes).expect("a manifest")
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.path().join(key)
    }

    fn shard(&self) -> (String, PathBuf) {
        let key = self.manifest().shards[1].key.clone();
        let path = self.path(&key);
        (key, path)
    }

    fn restore_error(&self) -> RestoreError {
        restore(&self.store, &self.fact, &self.state).expect_err("refused")
    }

    /// What `verify` says; it must refuse whenever restoring does.
    fn problems(&self) -> String {
        let digest = Some(self.fact.manifest_digest.as_str());
        let report =
            runtime().block_on(checkpoint::verify(&self.store, &self.fact.manifest_key, digest));
        let report = report.expect("verifies");
        assert!(!report.ok && !report.problems.is_empty());
        report.problems.join("; ")
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at] ^= 0x10;
    fs::write(path, bytes).expect("writes");
}

#[test]
fn one_flipped_byte_anywhere_names_the_shard() {
    for compression in [Compression::None, Compression::Zstd] {
        let damaged = Damaged::new(compression);
        let (key, path) = damaged.shard();
        let length = fs::metadata(&path).expect("a file").len() as usize;
        for at in [0, 9, length / 3, length - 1] {
            flip(&path, at);
            let error = damaged.restore_error();
            let text = error.to_string();
            assert!(!error.is_retryable());
            assert!(text.contains(&key) && text.contains("r1"), "{text}");
            assert!(text.contains("not those that were written"), "{text}");
            assert!(damaged.problems().contains(&key));
            let to = damaged.path("out.safetensors");
            let exported =
                runtime().block_on(checkpoint::export(&damaged.store, &damaged.fact, &to));
            assert!(exported.is_err() && !to.exists(), "half an export");
            flip(&path, at);
        }
        assert_eq!(restore(&damaged.store, &damaged.fact, &damaged.state), Ok(damaged.state));
    }
}

#[test]
fn shortened_lengthened_and_missing_shards_are_refused() {
    let damaged = Damaged::new(Compression::None);
    let (key, path) = damaged.shard();
    let whole = fs::read(&path).expect("a file");
    let complete = || runtime().block_on(checkpoint::find_complete(&damaged.store, &job(), None));
    assert_eq!(complete(), Ok(vec![damaged.fact.clone()]));

    fs::write(&path, &whole[..whole.len() - 1]).expect("writes");
    let text = damaged.restore_error().to_string();
    assert!(text.contains(&key) && text.contains("expected"), "{text}");
    assert!(damaged.problems().contains(&key));
    assert_eq!(complete(), Ok(vec![]));

    fs::write(&path, [&whole[..], b"x"].concat()).expect("writes");
    assert!(damaged.restore_error().to_string().contains(&key));

    fs::remove_file(&path).expect("removes");
    let error = damaged.restore_error();
    assert!(matches!(error, RestoreError::Store(StoreError::NotFound { .. })), "{error}");
    assert!(error.to_string().contains(&key));
    assert!(damaged.problems().contains(&key));
    assert_eq!(complete(), Ok(vec![]));
}

#[test]
fn a_manifest_that_is_not_the_recorded_one_is_refused() {
    let damaged = Damaged::new(Compression::None);
    let path = damaged.path(&damaged.fact.manifest_key);
    let whole = fs::read(&path).expect("a manifest");
    flip(&path, whole.len() / 2);
    let error = damaged.restore_error();
    assert!(matches!(error, RestoreError::Digest { .. }), "{error}");
    assert!(damaged.problems().contains("not the one that was recorded"));

    // Recorded or not, a document that contradicts itself is not used.
    let edit = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest: Manifest = serde_json::from_slice(&whole).expect("a manifest");
        change(&mut manifest);
        let bytes = serde_json::to_vec(&manifest).expect("bytes");
        fs::write(&path, &bytes).expect("writes");
        let mut fact = damaged.fact.clone();
        fact.manifest_digest = blake3::hash(&bytes).to_hex().to_string();
        let error = restore(&damaged.store, &fact, &damaged.state).expect_err("refused");
        let verdict =
            runtime().block_on(checkpoint::verify(&damaged.store, &fact.manifest_key, None));
        assert!(!verdict.expect("verifies").ok, "verify accepted what restore refuses: {error}");
        error.to_string()
    };
    let text = edit(&|m| m.job = "other".parse().expect("a name"));
    assert!(text.contains("jobs/other/"), "{text}");
    let text = edit(&|m| m.version = 99);
    assert!(text.contains("version 99, expected at most 3"), "{text}");
    let text = edit(&|m| drop(m.shards.pop()));
    assert!(text.contains("1 shards for a world size of 2"), "{text}");
    let text = edit(&|m| m.shards.reverse());
    assert!(text.contains("is that of r1"), "{text}");
    let text = edit(&|m| m.shards[0].bytes = u64::MAX);
    assert!(text.contains("more than can be"), "{text}");
    let text = edit(&|m| m.shards[1].tensors[0].shape = vec![u64::MAX, 2]);
    assert!(text.contains("shape"), "{text}");
    let text = edit(&|m| m.shards[1].tensors[0].offset += 4);
    assert!(text.contains("one after another"), "{text}");
    let text = edit(&|m| m.shards[1].key = "jobs/digits/checkpoints/x".into());
    assert!(text.contains("does not lie in"), "{text}");
    let text = edit(&|m| {
        let twin = m.shards[0].clone();
        m.shards[1] = checkpoint::ShardEntry { rank: api::Rank(1), ..twin };
    });
    assert!(text.contains("the key of two shards"), "{text}");

    fs::write(&path, "{").expect("writes");
    assert!(damaged.problems().contains("not a manifest"));
}

#[test]
fn a_decompression_bomb_is_stopped_at_the_declared_length() {
    let damaged = Damaged::new(Compression::Zstd);
    let (key, path) = damaged.shard();
    // 1 GiB of zeros in a few kilobytes, under an otherwise perfect manifest.
    let bomb = zstd::stream::encode_all(std::io::Read::take(std::io::repeat(0), 1 << 30), 1);
    let bomb = bomb.expect("compresses");
    fs::write(&path, &bomb).expect("writes");
    let mut manifest = damaged.manifest();
    manifest.shards[1].stored_bytes = bomb.len() as u64;
    manifest.shards[1].blake3 = blake3::hash(&bomb).to_hex().to_string();
    let bytes = serde_json::to_vec(&manifest).expect("bytes");
    fs::write(damaged.path(&damaged.fact.manifest_key), &bytes).expect("writes");
    let mut fact = damaged.fact.clone();
    fact.manifest_digest = blake3::hash(&bytes).to_hex().to_string();
    let text = restore(&damaged.store, &fact, &damaged.state).expect_err("refused").to_string();
    assert!(text.contains(&key), "{text}");
}

#[test]
fn tensors_must_be_exactly_those_of_the_model() {
    let damaged = Damaged::new(Compression::None);
    let refused =
        |state: &State| restore(&damaged.store, &damaged.fact, state).expect_err("refused");
    let mut more = damaged.state.clone();
    more.0.push(("model.new".into(), vec![2], vec![0.0; 2]));
    assert!(matches!(refused(&more), RestoreError::Missing { name, .. } if name == "model.new"));
    let mut fewer = damaged.state.clone();
    let (gone, ..) = fewer.0.pop().expect("a tensor");
    assert!(matches!(refused(&fewer), RestoreError::Extra { name, .. } if name == gone));
    let mut turned = damaged.state.clone();
    turned.0[0].1.reverse();
    let text = refused(&turned).to_string();
    assert!(text.contains("model.embed.weight") && text.contains("expected"), "{text}");
    let mut wrong = damaged.state.clone();
    wrong.0[1].1 = vec![8];
    assert!(matches!(refused(&wrong), RestoreError::Target { .. }));
    let fact = api::events::CheckpointFact { step: Step(8), ..damaged.fact.clone() };
    let error = restore(&damaged.store, &fact, &damaged.state).expect_err("refused");
    assert!(matches!(error, RestoreError::Other { .. }), "{error}");
}

#[test]
fn the_saver_refuses_what_is_out_of_order_and_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder_store(folder.path());
    let state = State::new(4, 4000);
    let mut saver = Saver::with_store(store.clone(), options(0, 1, Compression::None)).expect("up");
    assert_eq!(saver.wait_shard(Step(1)), Err(SaveError::UnknownStep(1)));
    assert_eq!(saver.wait_committed(Step(1)), Err(SaveError::UnknownStep(1)));
    let twice = [state.slices()[0], state.slices()[0]];
    assert!(matches!(saver.stage(Step(1), &twice), Err(SaveError::Format(_))));
    // Several in flight: more than there are arenas.
    for step in 1..=5 {
        saver.stage(Step(step), &state.slices()).expect("stages");
    }
    assert_eq!(
        saver.stage(Step(5), &state.slices()),
        Err(SaveError::StepOrder { step: 5, last: 5 })
    );
    let fifth = saver.wait_shard(Step(5)).expect("written");
    saver.commit(Step(4), vec![], support::info());
    let text = saver.wait_committed(Step(4)).expect_err("no shards").to_string();
    assert!(text.contains("0 shards for a world size of 1"), "{text}");
    // A shard that somebody else's store holds is noticed before the manifest.
    let mut elsewhere = fifth.clone();
    elsewhere.key = elsewhere.key.replace("rank-00000", "rank-00009");
    saver.commit(Step(5), vec![elsewhere], support::info());
    let error = saver.wait_committed(Step(5)).expect_err("missing");
    assert!(matches!(error, SaveError::ShardMissing { .. }), "{error}");
    assert!(error.to_string().contains("same store"), "{error}");
    saver.commit(Step(5), vec![fifth.clone()], support::info());
    let fact = saver.wait_committed(Step(5)).expect("committed");
    // Another process of the same generation comes too late, and changes nothing.
    let mut late = Saver::with_store(store.clone(), options(0, 1, Compression::None)).expect("up");
    late.stage(Step(5), &state.slices()).expect("stages");
    let shard = late.wait_shard(Step(5)).expect("written");
    assert_ne!(shard.key, fifth.key, "a shard was overwritten");
    late.commit(Step(5), vec![shard], support::info());
    assert!(matches!(late.wait_committed(Step(5)), Err(SaveError::Superseded(_))));
    assert_eq!(restore(&store, &fact, &state), Ok(state.clone()));

    saver.finish().expect("all done");
}

#[test]
fn whatever_lies_among_checkpoints_shows_and_can_be_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder_store(folder.path());
    let state = State::new(4, 4000);
    let list = || runtime().block_on(checkpoint::list_checkpoints(&store, &job())).expect("lists");
    assert_eq!(list(), []);
    let facts = [3, 5].map(|step| save(&store, &state, step, 2, Compression::None).expect("saved"));
    // What killed writers leave: a file half-written, a folder without anything. And what is not
    // ours.
    let checkpoints = folder.path().join(keys::checkpoints(&job()));
    let broken_off = keys::manifest(&job(), Step(7), Generation(3));
    let staged = checkpoints.join("000000000005-g3/rank-00000-ab.safetensors#1");
    fs::write(staged, "half").expect("written");
    fs::create_dir(checkpoints.join("000000000007-g3")).expect("made");
    fs::create_dir(checkpoints.join("notes")).expect("made");
    let found = |step, manifest_key: &str, is_complete| StoredCheckpoint {
        step: Step(step),
        generation: Generation(3),
        manifest_key: manifest_key.to_owned(),
        is_complete,
    };
    let [first, second] = facts.map(|fact| fact.manifest_key);
    let all = [found(3, &first, true), found(5, &second, true), found(7, &broken_off, false)];
    assert_eq!(list(), all);

    let delete = |key: &str| {
        runtime().block_on(checkpoint::delete_checkpoint(
            &store,
            key,
            &checkpoint::References::default(),
        ))
    };
    assert!(matches!(delete("not/a/manifest"), Err(StoreError::Key { .. })));
    for key in [&second, &broken_off, &broken_off] {
        delete(key).expect("deleted");
    }
    assert_eq!(list(), all[..1]);
    let mut names: Vec<_> = fs::read_dir(&checkpoints)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["000000000003-g3", "notes"]);
}

#[test]
fn objects_are_put_listed_downloaded_and_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder_store(folder.path());
    let target = tempfile::tempdir().expect("a folder");
    runtime().block_on(async {
        store.probe().await.expect("a folder keeps the promise");
        for (key, text) in [("data/a/1.csv", "one"), ("data/a/b/2.csv", "two"), ("data/ab", "no")] {
            store.put(key, text.into()).await.expect("writes");
        }
        let listed = store.list("data/a").await.expect("lists");
        let listed: Vec<(&str, u64)> = listed.iter().map(|o| (o.key.as_str(), o.bytes)).collect();
        assert_eq!(listed, [("data/a/1.csv", 3), ("data/a/b/2.csv", 3)]);
        assert_eq!(store.list("probe").await, Ok(vec![]), "the probe left something");
        assert_eq!(store.list("nowhere").await, Ok(vec![]));

        let copied = store.download("data/a", target.path()).await.expect("copies");
        assert_eq!(copied, target.path().join("a"));
        assert_eq!(fs::read_to_string(copied.join("b/2.csv")).expect("there"), "two");
        let file = store.download("data/a/1.csv", target.path()).await.expect("copies");
        assert_eq!(file, target.path().join("1.csv"));
        assert_eq!(fs::read_to_string(&file).expect("there"), "one");
        assert!(store.download("data/none", target.path()).await.expect_err("no").is_not_found());
        let mut names: Vec<_> = fs::read_dir(target.path()).expect("lists").flatten().collect();
        names.retain(|entry| entry.file_name().to_string_lossy().starts_with('.'));
        assert!(names.is_empty(), "temporary names remain: {names:?}");

        assert_eq!(store.put_if_absent("x", "mine".into()).await, Ok(true));
        assert_eq!(store.put_if_absent("x", "yours".into()).await, Ok(false));
        assert_eq!(store.put_if_absent("x", "mine".into()).await, Ok(true), "a repeated own write");
        assert_eq!(store.get_range("x", 1..3).await.expect("reads"), "in");
        assert!(matches!(store.get_range("x", 1..9).await, Err(StoreError::Corrupt { .. })));
        assert!(matches!(store.get_range("x", 7..9).await, Err(StoreError::Corrupt { .. })));
        assert!(matches!(store.get_bounded("x", 3).await, Err(StoreError::TooLarge { .. })));
        assert!(matches!(store.get("../x").await, Err(StoreError::Key { .. })));
        store.delete("x").await.expect("deletes");
        store.delete("x").await.expect("deletes again");
        assert!(store.get("x").await.expect_err("gone").is_not_found());
    });
}

#[test]
fn a_uri_that_names_no_store_is_one_clear_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("writes");
    let beneath = format!("file://{}", file.join("below").display());
    let file = format!("file://{}", file.display());
    for (uri, part) in [
        ("", "expected `file:///folder` or `s3://bucket/prefix`"),
        ("/tmp/x", "expected `file:///folder`"),
        ("file://relative", "absolute"),
        ("s3://", "no bucket"),
        (&file, "expected a folder"),
        (&beneath, "expected a folder"),
    ] {
        let error = Store::open(&StoreSection::default(), uri).expect_err("refused");
        assert!(error.to_string().contains(part), "{uri}: {error}");
        assert!(!error.is_retryable());
    }
}
