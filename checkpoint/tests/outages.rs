//! Every call that a save makes fails once, and for good from there on, in every way that stores
//! fail; and the writer is killed before, in and after every call. Enumerated, not sampled: after each
//! of them no checkpoint is torn, what was acknowledged is there, and the next save works. So does every
//! call that a restore makes: it gives what was saved, or says that it is the store.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use api::events::CheckpointFact;
use api::job::Compression;
use api::{Generation, Step};
use checkpoint::{
    Restore, RestoreError, SaveError, Saver, SaverOptions, Store, StoreError, StoreKey,
    find_complete, keys, verify,
};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use support::failing::{FailingStore, Failure, Moment, Plan};
use support::{State, info, job, options, restore, runtime, save};

const FAILURES: [Failure; 5] =
    [Failure::TimeOut, Failure::SlowDown, Failure::Truncated, Failure::Expired, Failure::DiskFull];

/// How checkpoints are written.
#[derive(Clone, Copy, Debug)]
struct Mode {
    incremental: bool,
    encrypted: bool,
    compression: Compression,
}

impl Mode {
    fn store(self, inner: Arc<dyn ObjectStore>) -> Store {
        let store = Store::with_inner(inner, "a store");
        match self.encrypted {
            true => store.encrypted(&StoreKey::from_bytes([3; 32])),
            false => store,
        }
    }

    /// One checkpoint of two ranks, which goes on from `base`.
    fn save(
        self,
        store: &Store,
        state: &State,
        step: u64,
        base: Option<&CheckpointFact>,
    ) -> Result<CheckpointFact, SaveError> {
        let slices = state.slices();
        let halves = slices.split_at(slices.len() / 2);
        let mut savers = Vec::new();
        for (rank, half) in [halves.0, halves.1].into_iter().enumerate() {
            let options = SaverOptions {
                incremental: self.incremental,
                // Whoever comes after a killed writer is another generation.
                generation: Generation(step),
                ..options(rank as u32, 2, self.compression)
            };
            let mut saver = Saver::with_store(store.clone(), options)?;
            if let Some(base) = base {
                let restored = Restore::with_store(store.clone(), base);
                let restored = restored.map_err(|error| match error {
                    RestoreError::Store(error) => SaveError::Store(error),
                    other => panic!("{other}"),
                })?;
                saver.base_on(restored.manifest());
            }
            saver.stage(Step(step), half)?;
            savers.push(saver);
        }
        let shards: Result<Vec<_>, _> =
            savers.iter_mut().map(|saver| saver.wait_shard(Step(step))).collect();
        savers[0].commit(Step(step), shards?, info());
        let fact = savers[0].wait_committed(Step(step))?;
        savers.into_iter().try_for_each(Saver::finish)?;
        Ok(fact)
    }
}

/// The state at a step: most of it never changes.
fn state(step: u64) -> State {
    let mut state = State::new(11, 4000);
    state.0[1].2[0] = step as f32;
    state.0[9].2[1] = step as f32;
    state
}

/// Nothing is torn, and what was acknowledged is as it was saved.
fn check(store: &Store, acknowledged: &[(CheckpointFact, State)], what: &str) {
    let runtime = runtime();
    let objects = runtime.block_on(store.list(&keys::checkpoints(&job()))).expect("lists");
    let manifests = objects.iter().filter(|object| keys::parse_manifest(&object.key).is_some());
    let manifests: Vec<_> = manifests.collect();
    for manifest in &manifests {
        let report = runtime.block_on(verify(store, &manifest.key, None)).expect("verifies");
        assert!(report.ok, "{what}: torn: {report:?}");
    }
    let complete = runtime.block_on(find_complete(store, &job(), None)).expect("lists");
    assert_eq!(complete.len(), manifests.len(), "{what}");
    for (fact, state) in acknowledged {
        assert!(complete.contains(fact), "{what}: step {} is lost", fact.step.0);
        assert_eq!(restore(store, fact, state).as_ref(), Ok(state), "{what}");
    }
}

/// Fails the call `at`, and says whether a save makes so many.
fn fail_at(mode: Mode, inner: Arc<dyn ObjectStore>, plan: &Plan) -> bool {
    let what = format!("{mode:?}, {:?} at {}, stays: {}", plan.failure, plan.at, plan.stays);
    let honest = mode.store(inner.clone());
    let first = mode.save(&honest, &state(1), 1, None).expect("saves");
    let failing = mode.store(Arc::new(FailingStore::new(inner, plan.clone())));
    let second = mode.save(&failing, &state(2), 2, Some(&first));
    let reached = plan.calls() > plan.at;
    let mut acknowledged = vec![(first, state(1))];
    match second {
        Ok(fact) => acknowledged.push((fact, state(2))),
        Err(error) => {
            assert!(reached, "{what}: {error}");
            // One call that fails, and may be tried again, ends nothing.
            let is_passing = !plan.stays && plan.failure != Failure::Expired;
            assert!(!is_passing, "{what}: {error}");
        }
    }
    check(&honest, &acknowledged, &what);
    let base = acknowledged.last().map(|(fact, _)| fact.clone());
    let third = mode.save(&honest, &state(3), 3, base.as_ref());
    let third = third.unwrap_or_else(|error| panic!("{what}: the next save: {error}"));
    acknowledged.push((third, state(3)));
    check(&honest, &acknowledged, &what);
    reached
}

fn fail_every_call(mode: Mode, store: impl Fn() -> Arc<dyn ObjectStore> + Sync) {
    // Most of the time is waiting between tries: all at once.
    std::thread::scope(|scope| {
        for failure in FAILURES {
            for stays in [false, true] {
                let store = &store;
                scope.spawn(move || {
                    let mut at = 0;
                    while fail_at(mode, store(), &Plan::new(failure, at, stays)) {
                        at += 1;
                    }
                    assert!(at >= 8, "{mode:?} {failure:?}: a save makes more than {at} calls");
                });
            }
        }
    });
}

#[test]
fn no_failing_call_tears_or_loses_a_checkpoint() {
    let mode = Mode { incremental: false, encrypted: false, compression: Compression::Zstd };
    fail_every_call(mode, || Arc::new(InMemory::new()));
}

#[test]
fn no_failing_call_tears_or_loses_an_incremental_encrypted_checkpoint_in_a_folder() {
    let mode = Mode { incremental: true, encrypted: true, compression: Compression::None };
    let folder = tempfile::tempdir().expect("a folder");
    let count = std::sync::atomic::AtomicUsize::new(0);
    fail_every_call(mode, || {
        let name = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst).to_string();
        let root = folder.path().join(name);
        std::fs::create_dir(&root).expect("made");
        Arc::new(LocalFileSystem::new_with_prefix(root).expect("a folder"))
    });
}

/// Saves a shard that is sent in parts with the call `at` failing, and says whether a save makes so
/// many.
fn upload_fails_at(small: &State, large: &State, plan: &Plan) -> bool {
    let what = format!("{:?} at {}", plan.failure, plan.at);
    let inner = Arc::new(InMemory::new());
    let honest = Store::with_inner(inner.clone(), "a store");
    let known = save(&honest, small, 1, 1, Compression::None).expect("saves");
    let failing = Arc::new(FailingStore::new(inner, plan.clone()));
    let failing = Store::with_inner(failing, "a failing store");
    let saved = save(&failing, large, 2, 1, Compression::None);
    let reached = plan.calls() > plan.at;
    // What is there is verified, which reads all of it.
    check(&honest, &[(known, small.clone())], &what);
    match saved {
        Ok(fact) => {
            let job = job();
            let found = runtime().block_on(find_complete(&honest, &job, None)).expect("lists");
            assert!(found.contains(&fact), "{what}: step 2 is lost");
        }
        Err(error) => {
            assert!(reached && plan.failure == Failure::Expired, "{what}: {error}");
        }
    }
    reached
}

/// The beginning of the upload, every part and its end. Fewer failures than above, since every save
/// moves 35 MB.
#[test]
fn no_failing_call_of_an_upload_in_parts_tears_or_loses_a_checkpoint() {
    let (small, large) = (State::new(12, 4000), State::new(13, 8_600_000));
    std::thread::scope(|scope| {
        for failure in [Failure::TimeOut, Failure::SlowDown, Failure::Expired, Failure::DiskFull] {
            let (small, large) = (&small, &large);
            scope.spawn(move || {
                let mut at = 0;
                while upload_fails_at(small, large, &Plan::new(failure, at, false)) {
                    at += 1;
                }
                // To begin, three parts, to end, and the manifest.
                assert!(at >= 6, "{failure:?}: {at} calls: the shard went in one piece");
            });
        }
    });
}

/// Restores with the call `at` failing, and says whether a restore makes so many.
fn restore_fails_at(
    mode: Mode,
    inner: &Arc<dyn ObjectStore>,
    fact: &CheckpointFact,
    plan: &Plan,
) -> bool {
    let what = format!("{mode:?}, {:?} at {}, stays: {}", plan.failure, plan.at, plan.stays);
    let failing = mode.store(Arc::new(FailingStore::new(inner.clone(), plan.clone())));
    let restored = restore(&failing, fact, &state(2));
    let reached = plan.calls() > plan.at;
    match restored {
        Ok(restored) => assert!(restored == state(2), "{what}: it is not what was saved"),
        Err(error) => {
            assert!(reached, "{what}: {error}");
            let is_denied = matches!(&error, RestoreError::Store(StoreError::Denied { .. }));
            match plan.failure {
                Failure::Expired => assert!(is_denied, "{what}: {error}"),
                // The checkpoint is as good as ever: it is not called damaged.
                _ => assert!(plan.stays && error.is_retryable(), "{what}: {error}"),
            }
        }
    }
    reached
}

fn fail_every_call_of_a_restore(mode: Mode) {
    let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = mode.store(inner.clone());
    let first = mode.save(&store, &state(1), 1, None).expect("saves");
    let second = mode.save(&store, &state(2), 2, Some(&first)).expect("saves");
    std::thread::scope(|scope| {
        for failure in [Failure::TimeOut, Failure::SlowDown, Failure::Truncated, Failure::Expired] {
            for stays in [false, true] {
                let (inner, fact) = (&inner, &second);
                scope.spawn(move || {
                    let mut at = 0;
                    while restore_fails_at(mode, inner, fact, &Plan::new(failure, at, stays)) {
                        at += 1;
                    }
                    assert!(at >= 5, "{mode:?} {failure:?}: a restore makes more than {at} calls");
                });
            }
        }
    });
    assert_eq!(restore(&store, &second, &state(2)).as_ref(), Ok(&state(2)));
}

#[test]
fn no_failing_call_of_a_restore_gives_something_else_or_calls_it_damaged() {
    for compression in [Compression::None, Compression::Zstd] {
        fail_every_call_of_a_restore(Mode { incremental: false, encrypted: false, compression });
    }
}

#[test]
fn no_failing_call_of_a_restore_from_former_encrypted_shards_does_either() {
    let mode = Mode { incremental: true, encrypted: true, compression: Compression::None };
    fail_every_call_of_a_restore(mode);
}

const FOLDER: &str = "COHORT_TEST_CRASH_FOLDER";
const AT: &str = "COHORT_TEST_CRASH_AT";
const CRASH_MODE: Mode =
    Mode { incremental: true, encrypted: true, compression: Compression::None };

fn folder(root: &Path) -> Arc<dyn ObjectStore> {
    Arc::new(LocalFileSystem::new_with_prefix(root).expect("a folder"))
}

/// Not a test of its own: saves step 2 and ends itself at one point of it.
#[test]
#[ignore = "the process that `a_writer_killed_at_any_point_leaves_only_whole_checkpoints` starts"]
fn crashing_writer() {
    let (Ok(root), Ok(at)) = (std::env::var(FOLDER), std::env::var(AT)) else { return };
    let at: usize = at.parse().expect("a number");
    let moment = [Moment::Before, Moment::Halfway, Moment::After][at % 3];
    let plan = Plan::new(Failure::Crash(moment), at / 3, false);
    let honest = CRASH_MODE.store(folder(Path::new(&root)));
    let complete = runtime().block_on(find_complete(&honest, &job(), None)).expect("lists");
    let failing = FailingStore::new(folder(Path::new(&root)), plan);
    let store = CRASH_MODE.store(Arc::new(failing));
    CRASH_MODE.save(&store, &state(2), 2, complete.first()).expect("saves");
}

#[test]
fn a_writer_killed_at_any_point_leaves_only_whole_checkpoints() {
    let mut survived = 0;
    for at in 0.. {
        let root = tempfile::tempdir().expect("a folder");
        let honest = CRASH_MODE.store(folder(root.path()));
        let first = CRASH_MODE.save(&honest, &state(1), 1, None).expect("saves");
        let writer = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "crashing_writer", "--ignored"])
            .env(FOLDER, root.path())
            .env(AT, at.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("starts");
        let complete = runtime().block_on(find_complete(&honest, &job(), None)).expect("lists");
        survived += usize::from(complete.len() == 2);
        let mut acknowledged = vec![(first, state(1))];
        acknowledged.extend(complete.get(1).map(|fact| (fact.clone(), state(2))));
        let what = format!("killed at point {at}");
        check(&honest, &acknowledged, &what);
        let base = acknowledged.last().map(|(fact, _)| fact.clone());
        let third = CRASH_MODE.save(&honest, &state(3), 3, base.as_ref()).expect("saves");
        acknowledged.push((third, state(3)));
        check(&honest, &acknowledged, &what);
        if writer.success() {
            assert!(at >= 27, "a save passes more than {at} points");
            break;
        }
        assert_eq!(writer.code(), None, "{what}: it ended by itself");
    }
    // After the manifest is written, and when it was not killed.
    assert_eq!(survived, 2, "writers whose checkpoint was whole");
}
