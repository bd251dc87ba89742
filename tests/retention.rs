//! `checkpoint.keep` is kept: when a command has ended, the store holds the newest checkpoints and those
//! that are kept for good, all of them whole, and nothing else; also after a rank was killed.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use api::config::{EncryptionSection, StoreSection};
use api::{Name, Step};
use checkpoint::{Restore, Store, StoredCheckpoint};
use common::{Running, small_job, submit_local};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// Forty checkpoints are written, two are kept.
const SETS: [&str; 4] =
    ["checkpoint.keep=2", "checkpoint.every_steps=5", "resources.ranks=2", "stop.max_steps=200"];

#[test]
fn a_clean_run_leaves_the_newest_checkpoints() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let running = Running::start(&mut submit_local(&small_job(folder.path(), ""), &dir, &SETS));
    let last = running.finish().expect_code(0).last_json();
    assert_eq!((&last["state"], &last["restarts"]), (&"succeeded".into(), &0.into()), "{last}");
    check_left(&dir, &[(195, 1), (200, 1)]);
}

#[test]
fn every_k_th_checkpoint_is_kept_for_good() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let sets = [&SETS[..], &["checkpoint.keep_every_steps=80"]].concat();
    let running = Running::start(&mut submit_local(&small_job(folder.path(), ""), &dir, &sets));
    running.finish().expect_code(0);
    check_left(&dir, &[(80, 1), (160, 1), (195, 1), (200, 1)]);
}

#[test]
fn the_best_stay_and_all_of_it_can_be_encrypted_and_incremental() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let (config, section) = encryption(folder.path());
    let best = "checkpoint.keep_best={ metric = \"train:loss\", mode = \"max\" }";
    let sets = [&SETS[..], &[best, "checkpoint.incremental=true"]].concat();
    let mut command = submit_local(&small_job(folder.path(), ""), &dir, &sets);
    let mut running = Running::start(command.arg("--config").arg(&config));
    running.wait_for_step(53);
    let ranks = running.ranks();
    kill(ranks[1].1, Signal::SIGKILL).expect("killed");
    let last = running.finish().expect_code(0).last_json();
    assert_eq!((&last["state"], &last["restarts"]), (&"succeeded".into(), &1.into()), "{last}");
    // Of all losses that of the first checkpoint is the largest.
    check_left_in(&section, &dir, &[(5, 1), (195, 2), (200, 2)]);
}

#[test]
fn what_is_referred_to_outlives_sweeps_and_is_restored_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let (config, section) = encryption(folder.path());
    // Steps so small that next to no weight changes, and no other state than the weights.
    let still = [
        "checkpoint.incremental=true",
        "hyperparameters.optimizer=\"sgd\"",
        "hyperparameters.momentum=0.0",
        "hyperparameters.learning_rate=0.00000001",
        "hyperparameters.warmup_steps=100000",
    ];
    let sets = [&SETS[..], &still].concat();
    let mut command = submit_local(&small_job(folder.path(), ""), &dir, &sets);
    let mut running = Running::start(command.arg("--config").arg(&config));
    let committed = running.wait_for_checkpoint(50);
    let seen = running.seen().len();
    // Nobody is left who holds the state: it is in the store alone.
    for (_, pid) in running.ranks() {
        kill(pid, Signal::SIGKILL).expect("killed");
    }
    let finished = running.finish().expect_code(0);
    assert_eq!(finished.last_json()["state"], "succeeded", "{finished:?}");
    let after = finished.stdout.lines().skip(seen);
    let after = after.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps = after.filter(|event| event["event"] == "step");
    let first = steps.filter_map(|event| event["step"].as_u64()).min();
    assert!(first > Some(committed), "it goes on from a checkpoint: {first:?}");

    let store = open(&section, &dir);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let job: Name = "small".parse().expect("a name");
    let facts = runtime.block_on(checkpoint::find_complete(&store, &job, None)).expect("lists");
    assert_eq!(facts.iter().map(|fact| fact.step.0).collect::<Vec<_>>(), [195, 200]);
    let mut needed = BTreeSet::new();
    for fact in &facts {
        let report = runtime.block_on(checkpoint::verify(&store, &fact.manifest_key, None));
        assert!(report.as_ref().is_ok_and(|report| report.ok), "{report:?}");
        let restore = Restore::with_store(store.clone(), fact).expect("opens");
        let references = restore.manifest().references();
        assert!(!references.is_empty(), "step {}: all was written again", fact.step.0);
        needed.extend(restore.manifest().objects().into_iter().map(|shard| shard.key));
        needed.insert(fact.manifest_key.clone());
    }
    let objects = runtime.block_on(store.list(&checkpoint::keys::checkpoints(&job)));
    let objects: BTreeSet<String> =
        objects.expect("lists").into_iter().map(|object| object.key).collect();
    assert_eq!(objects, needed, "what they refer to, and nothing else");
}

#[test]
fn a_killed_rank_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let mut running = Running::start(&mut submit_local(&small_job(folder.path(), ""), &dir, &SETS));
    // Twice, a checkpoint may be broken off at any point.
    for (kills, step) in [(1, 12), (2, 53)] {
        running.wait_for("the next generation", |event| {
            event["event"] == "status"
                && event["phase"] == "running"
                && event["restarts"] == kills - 1
        });
        running.wait_for_step(step);
        let ranks = running.ranks();
        assert_eq!(ranks.len(), 2, "{ranks:?}");
        kill(ranks[kills as usize - 1].1, Signal::SIGKILL).expect("killed");
    }
    let last = running.finish().expect_code(0).last_json();
    assert_eq!((&last["state"], &last["restarts"]), (&"succeeded".into(), &2.into()), "{last}");
    check_left(&dir, &[(195, 3), (200, 3)]);
}

/// Steps and generations of the checkpoints that are left; each must verify, and no other folder
/// may lie among them.
fn check_left(dir: &Path, expected: &[(u64, u64)]) {
    check_left_in(&StoreSection::default(), dir, expected);
}

/// A file of settings under which a store is encrypted, and what they say.
fn encryption(folder: &Path) -> (PathBuf, StoreSection) {
    let key_file = folder.join("key");
    std::fs::write(&key_file, "5a".repeat(32)).expect("written");
    let config = folder.join("cluster.toml");
    let text = format!("[store.encryption]\nkey_file = \"{}\"\n", key_file.display());
    std::fs::write(&config, text).expect("written");
    let encryption = EncryptionSection { key_file, ..EncryptionSection::default() };
    (config, StoreSection { encryption, ..StoreSection::default() })
}

/// The store of a run in `dir`.
fn open(section: &StoreSection, dir: &Path) -> Store {
    let root = std::fs::canonicalize(dir.join("store")).expect("a store");
    Store::open(section, &format!("file://{}", root.display())).expect("opens")
}

fn check_left_in(section: &StoreSection, dir: &Path, expected: &[(u64, u64)]) {
    let job: Name = "small".parse().expect("a name");
    let root = dir.join("store");
    let store = open(section, dir);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let found = runtime.block_on(checkpoint::list_checkpoints(&store, &job)).expect("lists");
    let which = |found: &StoredCheckpoint| (found.step.0, found.generation.0);
    assert_eq!(found.iter().map(which).collect::<Vec<_>>(), expected);
    for StoredCheckpoint { step: Step(step), manifest_key, .. } in &found {
        let report = runtime.block_on(checkpoint::verify(&store, manifest_key, None));
        let report = report.expect("verifies");
        assert!(report.ok && report.tensors > 0, "step {step}: {report:?}");
    }
    let folders = std::fs::read_dir(root.join(checkpoint::keys::checkpoints(&job)));
    assert_eq!(folders.expect("a folder").count(), expected.len(), "and nothing else");
}
