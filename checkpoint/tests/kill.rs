//! A writer killed at random moments never leaves a manifest that `verify` rejects.
//!
//! The writer is this very binary, started again; `COHORT_TEST_SEED` repeats a run's moments.

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use api::job::Compression;
use api::{Generation, Step};
use checkpoint::{Saver, keys};
use support::{Random, State, folder_store, info, job, options, runtime};

const KILLS: u64 = 64;
const FOLDER: &str = "COHORT_TEST_KILL_FOLDER";
const GENERATION: &str = "COHORT_TEST_KILL_GENERATION";

/// Not a test of its own: saves checkpoints until it is killed.
#[test]
#[ignore = "the process that `a_killed_writer_leaves_only_whole_checkpoints` kills"]
fn writer() {
    let (Ok(folder), Ok(generation)) = (std::env::var(FOLDER), std::env::var(GENERATION)) else {
        return;
    };
    let generation: u64 = generation.parse().expect("a number");
    let compression =
        if generation.is_multiple_of(2) { Compression::Zstd } else { Compression::None };
    let mut options = options(0, 1, compression);
    options.generation = Generation(generation);
    let store = folder_store(Path::new(&folder));
    let mut saver = Saver::with_store(store.clone(), options).expect("starts");
    let state = State::new(generation, 400_000);
    let runtime = runtime();
    println!("\nsaving");
    for step in 1.. {
        saver.stage(Step(step), &state.slices()).expect("stages");
        let shard = saver.wait_shard(Step(step)).expect("written");
        saver.commit(Step(step), vec![shard], info());
        if step > 2 {
            let old = saver.wait_committed(Step(step - 2)).expect("committed");
            let none = checkpoint::References::default();
            let deleted = checkpoint::delete_checkpoint(&store, &old.manifest_key, &none);
            runtime.block_on(deleted).expect("deleted");
        }
    }
}

#[test]
fn a_killed_writer_leaves_only_whole_checkpoints() {
    let clock = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64;
    let seed = std::env::var("COHORT_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(clock);
    println!("COHORT_TEST_SEED={seed}");
    let mut random = Random(seed | 1);
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder_store(folder.path());
    let runtime = runtime();
    let (mut manifests, mut broken_off) = (0, 0);
    for generation in 1..=KILLS {
        let mut writer = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "writer", "--ignored", "--nocapture"])
            .env(FOLDER, folder.path())
            .env(GENERATION, generation.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let output = BufReader::new(writer.stdout.take().expect("piped"));
        let started = output.lines().map_while(Result::ok).any(|line| line == "saving");
        assert!(started, "the writer ended early");
        // The moment itself is what is random here; a save takes some 10 ms.
        std::thread::sleep(Duration::from_micros(random.next() % 50_000));
        writer.kill().expect("killed");
        let status = writer.wait().expect("reaped");
        assert!(!status.success() && status.code().is_none(), "it ended by itself: {status}");

        let listed = runtime.block_on(store.list(&keys::checkpoints(&job()))).expect("lists");
        let mut found = Vec::new();
        for object in &listed {
            assert!(!object.key.contains('#'), "a staging file is listed: {}", object.key);
            let Some(key) = keys::parse_manifest(&object.key) else { continue };
            if key.generation != Generation(generation) {
                continue;
            }
            let report = runtime.block_on(checkpoint::verify(&store, &object.key, None));
            let report = report.expect("verifies");
            assert!(report.ok, "seed {seed}, generation {generation}: {report:?}");
            found.push(object.key.clone());
        }
        manifests += found.len();
        let complete = runtime.block_on(async {
            checkpoint::find_complete(&store, &job(), Some(Generation(generation))).await
        });
        let complete = complete.expect("lists");
        let complete: Vec<String> = complete.into_iter().map(|fact| fact.manifest_key).collect();
        assert_eq!(complete, found, "seed {seed}, generation {generation}");
        broken_off += incomplete(folder.path(), generation);
    }
    println!("{manifests} manifests survived, {broken_off} checkpoints were broken off");
    assert!(manifests > 0 && broken_off > 0, "the kills hit nothing: seed {seed}");
    // What was broken off can be told from what is whole, and deleted without touching that.
    let complete = |runtime: &tokio::runtime::Runtime| {
        runtime.block_on(checkpoint::find_complete(&store, &job(), None)).expect("lists")
    };
    let before = complete(&runtime);
    let deleted = runtime.block_on(async {
        let found = checkpoint::list_checkpoints(&store, &job()).await.expect("lists");
        let broken: Vec<_> = found.iter().filter(|found| !found.is_complete).collect();
        for found in &broken {
            checkpoint::delete_checkpoint(
                &store,
                &found.manifest_key,
                &checkpoint::References::default(),
            )
            .await
            .expect("deletes");
        }
        let left = checkpoint::list_checkpoints(&store, &job()).await.expect("lists");
        assert!(left.iter().all(|left| left.is_complete), "{left:?}");
        assert_eq!(left.len() + broken.len(), found.len());
        broken.len()
    });
    assert_eq!(deleted, broken_off, "folders without a manifest");
    assert_eq!(complete(&runtime), before);
    // The next generation's start removes what the killed left half-written among whole ones.
    let staged = folder.path().join(format!("{}#9", before[0].manifest_key));
    std::fs::write(&staged, "half").expect("written");
    let mut next = options(0, 1, Compression::None);
    next.generation = Generation(KILLS + 1);
    drop(Saver::with_store(store, next).expect("starts"));
    let staging = walk(folder.path()).into_iter().filter(|name| name.contains('#')).count();
    assert_eq!(staging, 0, "staging files are left");
}

/// Folders of a generation that hold something but no manifest.
fn incomplete(root: &Path, generation: u64) -> usize {
    let checkpoints = root.join(keys::checkpoints(&job()));
    // The first writer may die before it makes the folder.
    let folders = match std::fs::read_dir(checkpoints) {
        Ok(folders) => folders,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return 0,
        Err(error) => panic!("cannot list: {error}"),
    };
    folders
        .flatten()
        .filter(|folder| folder.file_name().to_string_lossy().ends_with(&format!("-g{generation}")))
        .filter(|folder| !folder.path().join(keys::MANIFEST).exists())
        .count()
}

fn walk(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).expect("lists").flatten() {
        if entry.path().is_dir() {
            names.extend(walk(&entry.path()));
        } else {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names
}
