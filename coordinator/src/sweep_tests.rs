//! What a sweep leaves in a real folder, and when it runs.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use api::config::StoreSection;
use api::events::CheckpointFact;
use api::records::{CheckpointRecord, JobStatus, KIND_CHECKPOINT, Phase, Placement};
use api::{JobSpec, Rank, Step};
use checkpoint::keys;
use coordinator_core::{RecordKey, Transaction, Write};

use super::*;

/// Fails a test that would hang; no run comes near it.
const GUARD: Duration = Duration::from_secs(60);

fn job() -> Name {
    "digits".parse().expect("a name")
}

fn store(folder: &Path) -> Store {
    let uri = format!("file://{}", folder.display());
    Store::open(&StoreSection::default(), &uri).expect("opens")
}

/// Makes a checkpoint's folder, with a manifest if it is complete.
fn place(root: &Path, job: &Name, step: u64, generation: u64, is_complete: bool) {
    let folder = root.join(keys::checkpoint(job, Step(step), Generation(generation)));
    std::fs::create_dir_all(&folder).expect("made");
    std::fs::write(folder.join("rank-00000-ab.safetensors"), "shard").expect("written");
    if is_complete {
        std::fs::write(folder.join(keys::MANIFEST), "manifest").expect("written");
    }
}

/// Steps and generations of the folders that are there.
fn left(root: &Path, job: &Name) -> Vec<(u64, u64)> {
    let parse = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.expect("an entry").file_name().into_string().expect("text");
        let (step, generation) = name.split_once("-g").expect("a checkpoint's folder");
        (step.parse().expect("a step"), generation.parse().expect("a generation"))
    };
    let entries = std::fs::read_dir(root.join(keys::checkpoints(job))).expect("a folder");
    let mut found: Vec<(u64, u64)> = entries.map(parse).collect();
    found.sort();
    found
}

/// What is recorded of a checkpoint at a step of a generation.
fn fact(job: &Name, (step, generation): (u64, u64)) -> CheckpointFact {
    let (step, generation) = (Step(step), Generation(generation));
    let manifest_key = keys::manifest(job, step, generation);
    let manifest_digest = "ab".into();
    CheckpointFact {
        step,
        generation,
        manifest_key,
        manifest_digest,
        bytes: 1,
        ..Default::default()
    }
}

/// The records of one job: its phase, generation, gang, and checkpoints by step and generation.
fn records(
    job: &Name,
    phase: Phase,
    generation: u64,
    has_gang: bool,
    recorded: &[(u64, u64)],
) -> Records {
    let fact = |at| fact(job, at);
    let text = format!("name = \"{job}\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 9\n");
    let spec = JobSpec::parse(&text, "job.toml", Path::new("/"), &[]).expect("a job");
    let worker = "w1".parse().expect("a name");
    let status = JobStatus {
        phase,
        generation: Generation(generation),
        gang: has_gang
            .then_some(Placement { rank: Rank(0), worker, started_as: None, local_rank: 0 })
            .into_iter()
            .collect(),
        checkpoint: recorded.last().copied().map(fact),
        ended_ms: phase.is_terminal().then_some(1),
        ..JobStatus::default()
    };
    let put = |key, json: serde_json::Result<Vec<u8>>| {
        let json = json.expect("serialises");
        Write::Put { key, json }
    };
    let key = RecordKey::new(KIND_JOB, job.as_str());
    let mut writes = vec![put(key, serde_json::to_vec(&JobRecord { spec, status }))];
    for fact in recorded.iter().copied().map(fact) {
        let key = RecordKey::new(KIND_CHECKPOINT, CheckpointRecord::id(job, fact.step));
        let record = CheckpointRecord { job: job.clone(), fact, committed_ms: 1, damaged: None };
        writes.push(put(key, serde_json::to_vec(&record)));
    }
    let mut records = Records::default();
    records.apply(1, &Transaction { writes, ..Transaction::default() });
    records
}

/// The same records, but of the manifests that are there with their digests.
fn as_written(root: &Path, mut records: Records) -> Records {
    let with_digest = |fact: CheckpointFact| match std::fs::read(root.join(&fact.manifest_key)) {
        Ok(bytes) => {
            CheckpointFact { manifest_digest: blake3::hash(&bytes).to_hex().to_string(), ..fact }
        }
        Err(_) => fact,
    };
    let mut writes = Vec::new();
    let prefix = format!("{}/", job());
    let keys: Vec<_> = records.list(KIND_CHECKPOINT, &prefix).map(|(key, _)| key.clone()).collect();
    for key in keys {
        let read = records.read::<CheckpointRecord>(KIND_CHECKPOINT, &key.id);
        let Ok(Some((_, record))) = read else { continue };
        let record = CheckpointRecord { fact: with_digest(record.fact.clone()), ..record };
        writes.push(Write::Put { key, json: serde_json::to_vec(&record).expect("serialises") });
    }
    if let Ok(Some((_, mut record))) = records.read::<JobRecord>(KIND_JOB, job().as_str()) {
        record.status.checkpoint = record.status.checkpoint.map(with_digest);
        let key = RecordKey::new(KIND_JOB, job().as_str());
        writes.push(Write::Put { key, json: serde_json::to_vec(&record).expect("serialises") });
    }
    records.apply(records.applied() + 1, &Transaction { writes, ..Transaction::default() });
    records
}

async fn sweep(folder: &Path, records: Records, ended: Option<u64>) {
    let records = Arc::new(as_written(folder, records));
    let sweeper = Sweeper::new(store(folder), move || Arc::clone(&records));
    sweeper.ask(job(), ended.map(Generation));
    sweeper.finish(GUARD).await;
}

/// Step, generation, whether it has a manifest. Recorded are 20 of g2 and 30 of g3, the current
/// generation. The letters are the situations below in which it stays.
const FOLDERS: [(u64, u64, bool, &str); 14] = [
    // Of former generations: only what is recorded.
    (5, 1, false, ""),
    (10, 1, true, ""),
    (20, 1, true, ""),
    (20, 2, true, "abcde"),
    (25, 2, true, ""),
    (26, 2, false, ""),
    (60, 2, true, ""),
    // Recorded once, and below what is kept.
    (15, 3, true, ""),
    // Its report came after that of a newer one.
    (25, 3, true, "ab"),
    (30, 3, true, "abcde"),
    // Being written, or just written and not recorded yet.
    (35, 3, false, "ab"),
    (40, 3, true, "abd"),
    // Of a generation that these records do not know yet.
    (45, 4, false, "abcde"),
    (50, 4, true, "abcde"),
];

#[tokio::test]
async fn only_what_nobody_needs_is_deleted() {
    for (letter, phase, has_gang, ended) in [
        ('a', Phase::Running, true, None),
        // Its former gang is being cleared, then the store is asked what it completed.
        ('b', Phase::Queued, true, None),
        // That is done.
        ('c', Phase::Queued, false, None),
        // Over, its ranks have left, and it may be resumed.
        ('d', Phase::Failed, true, Some(3)),
        // Over for good.
        ('e', Phase::Succeeded, false, Some(3)),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        for (step, generation, is_complete, _) in FOLDERS {
            place(folder.path(), &job(), step, generation, is_complete);
        }
        let records = records(&job(), phase, 3, has_gang, &[(20, 2), (30, 3)]);
        sweep(folder.path(), records, ended).await;
        let stays = FOLDERS.into_iter().filter(|(_, _, _, stays)| stays.contains(letter));
        let expected: Vec<(u64, u64)> = stays.map(|(step, by, _, _)| (step, by)).collect();
        assert_eq!(left(folder.path(), &job()), expected, "situation {letter}");
    }
}

/// Makes a checkpoint whose manifest refers to the shards that `place` makes for other checkpoints.
fn place_referring(root: &Path, step: u64, former: &[u64]) {
    place(root, &job(), step, 3, true);
    let shard = |step: &u64| keys::shard(&job(), Step(*step), Generation(3), Rank(0), "ab");
    let former: Vec<_> =
        former.iter().map(|step| serde_json::json!({ "key": shard(step) })).collect();
    let manifest = serde_json::json!({ "version": 3, "shards": [{ "former": former }] });
    let path = root.join(keys::manifest(&job(), Step(step), Generation(3)));
    std::fs::write(path, manifest.to_string()).expect("written");
}

/// The shards that are left, by step.
fn shards(root: &Path) -> Vec<u64> {
    let has_shard = |(step, generation): &(u64, u64)| {
        let key = keys::shard(&job(), Step(*step), Generation(*generation), Rank(0), "ab");
        root.join(key).exists()
    };
    left(root, &job()).iter().filter(|folder| has_shard(folder)).map(|(step, _)| *step).collect()
}

#[tokio::test]
async fn a_shard_stays_as_long_as_a_checkpoint_that_stays_refers_to_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    // 10 ← 20 ← 40, and 40 is not recorded yet; 15 ← 30, and 30 goes.
    for (step, former) in [(10, &[][..]), (15, &[]), (20, &[10]), (30, &[15]), (40, &[10, 20])] {
        place_referring(root, step, former);
    }
    let running = |recorded: &[(u64, u64)]| records(&job(), Phase::Running, 3, true, recorded);
    // As if the steps between had been recorded and dropped; keep is 3.
    sweep(root, running(&[(31, 3), (32, 3), (33, 3)]), None).await;
    assert_eq!(shards(root), [10, 20, 40]);
    // What is not there to be deleted again is no error, and 10 is waited for.
    sweep(root, running(&[(32, 3), (33, 3), (40, 3)]), None).await;
    assert_eq!(shards(root), [10, 20, 40]);
    place_referring(root, 50, &[]);
    sweep(root, running(&[(41, 3), (42, 3), (50, 3)]), None).await;
    assert_eq!(left(root, &job()), [(50, 3)]);
}

#[tokio::test]
async fn while_a_manifest_that_stays_cannot_be_read_nothing_is_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    place_referring(root, 10, &[]);
    place_referring(root, 40, &[10]);
    let newer = root.join(keys::manifest(&job(), Step(40), Generation(3)));
    std::fs::write(newer, r#"{"version": 4, "somewhere": "else"}"#).expect("written");
    let recorded = [(38, 3), (39, 3), (40, 3)];
    sweep(root, records(&job(), Phase::Running, 3, true, &recorded), None).await;
    assert_eq!(shards(root), [10, 40]);
}

#[tokio::test]
async fn while_a_recorded_manifest_reads_otherwise_nothing_is_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    place_referring(root, 10, &[]);
    place_referring(root, 40, &[10]);
    let recorded = [(38, 3), (39, 3), (40, 3)];
    let records = as_written(root, records(&job(), Phase::Running, 3, true, &recorded));
    let records = Arc::new(records);
    let manifest = root.join(keys::manifest(&job(), Step(40), Generation(3)));
    let whole = std::fs::read(&manifest).expect("reads");
    let sweeper = Sweeper::new(store(root), move || Arc::clone(&records));
    // Neither garbage nor a manifest of something else tells what the one that is recorded needs.
    for other in ["garbage", r#"{ "version": 3, "shards": [] }"#] {
        std::fs::write(&manifest, other).expect("written");
        let refused = sweeper.0.sweep(&job(), None).await.expect_err("it is another");
        assert!(refused.to_string().contains("not the manifest that was recorded"), "{refused}");
        assert_eq!(shards(root), [10, 40], "{other}");
    }
    // Nothing of what was read wrongly is remembered.
    std::fs::write(&manifest, whole).expect("written");
    sweeper.0.sweep(&job(), None).await.expect("it reads right");
    assert_eq!((left(root, &job()), shards(root)), (vec![(10, 3), (40, 3)], vec![10, 40]));
    let gone = root.join(keys::manifest(&job(), Step(10), Generation(3)));
    assert!(!gone.exists(), "what was refused before is made up for");
}

#[tokio::test]
async fn what_a_sweep_that_failed_has_read_is_known_to_the_next() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    place_referring(root, 10, &[]);
    place_referring(root, 39, &[10]);
    place(root, &job(), 40, 3, true);
    let newer = root.join(keys::manifest(&job(), Step(40), Generation(3)));
    std::fs::write(newer, r#"{"version": 4, "somewhere": "else"}"#).expect("written");
    let recorded = [(38, 3), (39, 3), (40, 3)];
    let records = as_written(root, records(&job(), Phase::Running, 3, true, &recorded));
    let records = Arc::new(records);
    let sweeper = Sweeper::new(store(root), move || Arc::clone(&records));
    sweeper.ask(job(), None);
    sweeper.finish(GUARD).await;
    assert_eq!(shards(root), [10, 39, 40]);
    let known = sweeper.0.references();
    let shard = keys::shard(&job(), Step(10), Generation(3), Rank(0), "ab");
    assert!(known.get(&job()).is_some_and(|references| references.contains(&shard)));
}

#[tokio::test]
async fn without_a_record_that_says_so_nothing_is_deleted() {
    let unreadable = |kind| {
        let mut records = records(&job(), Phase::Succeeded, 3, false, &[(30, 3)]);
        let id = match kind {
            KIND_JOB => job().to_string(),
            _ => CheckpointRecord::id(&job(), Step(30)),
        };
        let write = Write::Put { key: RecordKey::new(kind, id), json: b"{}".to_vec() };
        records.apply(2, &Transaction { writes: vec![write], ..Transaction::default() });
        records
    };
    let first = records(&job(), Phase::Running, 1, true, &[]);
    for (what, records) in [
        ("no such job", Records::default()),
        ("its first checkpoint is being written", first),
        ("the job cannot be read", unreadable(KIND_JOB)),
        ("a checkpoint's record cannot be read", unreadable(KIND_CHECKPOINT)),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        place(folder.path(), &job(), 10, 1, true);
        place(folder.path(), &job(), 20, 1, false);
        sweep(folder.path(), records, None).await;
        assert_eq!(left(folder.path(), &job()), [(10, 1), (20, 1)], "{what}");
    }
}

#[tokio::test]
async fn what_is_damaged_says_nothing_about_what_came_after_the_job_went_back() {
    let folder = tempfile::tempdir().expect("a folder");
    // It went back from step 60 to step 20, and completed step 50 unrecorded before it stopped.
    let mut records = records(&job(), Phase::Stopped, 4, true, &[(20, 2)]);
    let damaged = Some("a shard is gone".to_owned());
    let record =
        CheckpointRecord { job: job(), fact: fact(&job(), (60, 3)), committed_ms: 1, damaged };
    let key = RecordKey::new(KIND_CHECKPOINT, CheckpointRecord::id(&job(), Step(60)));
    let json = serde_json::to_vec(&record).expect("serialises");
    let writes = vec![Write::Put { key, json }];
    records.apply(2, &Transaction { writes, ..Transaction::default() });
    for (step, generation, is_whole) in
        [(20, 2, true), (40, 4, false), (50, 4, true), (60, 3, true)]
    {
        place(folder.path(), &job(), step, generation, is_whole);
    }
    sweep(folder.path(), records, Some(4)).await;
    assert_eq!(left(folder.path(), &job()), [(20, 2), (50, 4), (60, 3)]);
}

#[tokio::test]
async fn what_is_asked_during_a_sweep_is_done_after_it() {
    let folder = tempfile::tempdir().expect("a folder");
    place(folder.path(), &job(), 35, 3, false);
    let records = Arc::new(records(&job(), Phase::Failed, 3, true, &[]));
    let (asks, looks) = (Arc::new(OnceLock::<Sweeper>::new()), Arc::new(AtomicUsize::new(0)));
    let sweeper = Sweeper::new(store(folder.path()), {
        let (asks, looks) = (Arc::clone(&asks), Arc::clone(&looks));
        move || {
            // In the middle of the first sweep, which began without knowing it, the last rank ends.
            if looks.fetch_add(1, Ordering::SeqCst) == 0 {
                let sweeper: &Sweeper = asks.wait();
                (0..3).for_each(|_| sweeper.ask(job(), Some(Generation(3))));
            }
            Arc::clone(&records)
        }
    });
    assert!(asks.set(sweeper.clone()).is_ok());
    sweeper.ask(job(), None);
    sweeper.finish(GUARD).await;
    assert_eq!(left(folder.path(), &job()), []);
    assert_eq!(looks.load(Ordering::SeqCst), 2, "one more sweep, however often it was asked for");
}

#[tokio::test]
async fn a_new_leader_repeats_the_last_sweeps_of_jobs_that_are_over() {
    let folder = tempfile::tempdir().expect("a folder");
    place(folder.path(), &job(), 10, 1, true);
    place(folder.path(), &job(), 20, 1, true);
    let records = records(&job(), Phase::Succeeded, 1, false, &[(20, 1)]);
    let records = Arc::new(as_written(folder.path(), records));
    let sweeper = Sweeper::new(store(folder.path()), move || Arc::clone(&records));
    sweeper.take_over();
    sweeper.finish(GUARD).await;
    assert_eq!(left(folder.path(), &job()), [(20, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_that_hangs_holds_up_nobody_for_longer_than_allowed() {
    let folder = tempfile::tempdir().expect("a folder");
    place(folder.path(), &job(), 10, 1, true);
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let sweeper = Sweeper::new(store(folder.path()), move || {
        let _ = released.lock().expect("not poisoned").recv();
        Arc::default()
    });
    sweeper.ask(job(), None);
    sweeper.finish(Duration::from_millis(1)).await;
    drop(release);
    assert_eq!(left(folder.path(), &job()), [(10, 1)]);
}
