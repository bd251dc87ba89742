//! `cluster checkpoint`: what is damaged or gone is told apart from mistakes, and what nobody needs goes.
//! Through the shipped binary.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{Finished, Running, cluster, eventually, run, small_job, submit, submit_local, up};

/// The folder of the small job's checkpoint at a step, of its first generation.
fn checkpoint(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("store/jobs/small/checkpoints/{step:012}-g1"))
}

fn ask(dir: &Path, args: &[&str]) -> Finished {
    let mut command = cluster();
    run(command.args(args).arg("--dir").arg(dir))
}

/// A cluster in the folder `run`, where the small job has left the checkpoints of three steps.
fn trained(folder: &Path) -> (PathBuf, Running) {
    let dir = folder.join("run");
    let sets = ["stop.max_steps=15", "resources.ranks=2"];
    run(&mut submit_local(&small_job(folder, ""), &dir, &sets)).expect_code(0);
    let up = up(&dir, &[]);
    (dir, up)
}

#[test]
fn one_that_is_damaged_or_gone_hides_none_of_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let (dir, _up) = trained(folder.path());
    ask(&dir, &["checkpoint", "verify", "small"]).expect_code(0);
    std::fs::remove_file(checkpoint(&dir, 5).join("manifest.json")).expect("removed");
    std::fs::write(checkpoint(&dir, 10).join("manifest.json"), "{").expect("written");

    let verified = ask(&dir, &["checkpoint", "verify", "small"]).expect_code(9);
    let verdicts: Vec<&str> =
        verified.stdout.lines().filter(|line| line.starts_with("step ")).collect();
    for (verdict, expected) in
        verdicts.iter().zip(["step 5: DAMAGED", "step 10: DAMAGED", "step 15: ok"])
    {
        assert!(verdict.starts_with(expected), "{verified:?}");
    }
    assert_eq!(verdicts.len(), 3, "{verified:?}");
    assert!(verified.stdout.contains("000000000005-g1/manifest.json` is not in"), "{verified:?}");
    assert!(verified.stderr.contains("2 checkpoint(s) of `small` are damaged"), "{verified:?}");

    let verified = ask(&dir, &["checkpoint", "verify", "small", "--json"]).expect_code(9);
    let told: Vec<serde_json::Value> =
        verified.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let verdicts: Vec<(Option<u64>, Option<bool>)> =
        told.iter().map(|line| (line["step"].as_u64(), line["report"]["ok"].as_bool())).collect();
    let expected = [(Some(5), Some(false)), (Some(10), Some(false)), (Some(15), Some(true))];
    assert_eq!(verdicts, [&expected[..], &[(None, None)]].concat(), "and the error: {told:?}");
    assert_eq!(told[3]["class"], "corrupt", "{told:?}");

    // What is gone is not there; what is there is not what was written.
    let weights = folder.path().join("weights.safetensors");
    let weights = weights.to_str().expect("UTF-8");
    let export = |step: &str, to: &str| {
        ask(&dir, &["checkpoint", "export", "small", "--step", step, "-o", to])
    };
    export("5", weights).expect_code(3);
    export("10", weights).expect_code(9);
    export("7", weights).expect_code(3);
    ask(&dir, &["checkpoint", "diff", "small", "--from", "5"]).expect_code(3);
    ask(&dir, &["checkpoint", "diff", "small", "--from", "10"]).expect_code(9);
    assert!(!Path::new(weights).exists(), "nothing half-written");

    let taken = folder.path().to_str().expect("UTF-8");
    let refused = export("15", taken).expect_code(2);
    assert!(refused.stderr.contains("is a folder, expected a file"), "{refused:?}");
    let refused = export("15", &format!("{taken}/no/such/w")).expect_code(2);
    assert!(refused.stderr.contains("there is no folder `"), "{refused:?}");
    assert!(!folder.path().join("no").exists(), "nothing was made");
    export("15", weights).expect_code(0);

    // The whole store is elsewhere, or not mounted here: nothing is said of the checkpoints.
    std::fs::rename(dir.join("store"), dir.join("elsewhere")).expect("renamed");
    for command in [
        &["checkpoint", "verify", "small"][..],
        &["checkpoint", "diff", "small"],
        &["checkpoint", "gc", "small"],
        &["checkpoint", "export", "small", "-o", weights],
    ] {
        let missing = ask(&dir, command).expect_code(3);
        assert!(missing.stderr.contains("store` does not exist"), "{missing:?}");
    }
    std::fs::rename(dir.join("elsewhere"), dir.join("store")).expect("renamed");
}

/// Every file among the small job's checkpoints.
fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let entries = |folder: &Path| std::fs::read_dir(folder).expect("a folder").flatten();
    let folders = entries(&dir.join("store/jobs/small/checkpoints"));
    folders.flat_map(|folder| entries(&folder.path())).map(|file| file.path()).collect()
}

#[test]
fn what_no_manifest_names_is_shown_and_deleted_once_the_job_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let _up = up(&dir, &[]);
    let job = small_job(folder.path(), "[resources]\nranks = 2\n");
    let mut following = submit(&job, &dir, &["stop.max_steps=1000000"]);
    following.wait_for("a checkpoint", |event| event["event"] == "checkpoint");
    let refused = ask(&dir, &["checkpoint", "gc", "small", "--delete"]).expect_code(4);
    assert!(refused.stderr.contains("while a job goes on only the leader deletes"), "{refused:?}");
    ask(&dir, &["stop", "small"]).expect_code(0);
    following.finish().expect_code(8);

    let gc = |more: &[&str]| ask(&dir, &[&["checkpoint", "gc", "small"], more].concat());
    // Until the ranks are known to have ended, it is refused, too.
    eventually("nothing is left to write", || {
        let deleted = gc(&["--delete"]);
        assert!([0, 4].contains(&deleted.code), "{deleted:?}");
        (deleted.code == 0).then_some(())
    });
    let named = files(&dir);
    assert!(named.len() >= 3, "a manifest and two shards: {named:?}");
    let manifest = named.iter().find(|file| file.ends_with("manifest.json")).expect("there");
    let orphan = manifest.with_file_name("rank-00001-0123456789abcdef.safetensors");
    std::fs::write(&orphan, [7; 2048]).expect("written");

    let shown = gc(&[]).expect_code(0).stdout;
    assert!(shown.contains("/rank-00001-0123456789abcdef.safetensors"), "{shown}");
    assert!(shown.contains("--delete would delete 1 objects, 2.0 KiB"), "{shown}");
    assert!(orphan.exists(), "only shown");
    let deleted = gc(&["--delete", "--json"]).expect_code(0);
    assert_eq!(deleted.stdout.lines().count(), 1, "{deleted:?}");
    let document = deleted.last_json();
    assert_eq!((&document["bytes"], &document["deleted"]), (&2048.into(), &true.into()));
    assert_eq!(files(&dir), named, "that one is gone, and nothing else");
    assert_eq!(gc(&[]).expect_code(0).stdout.trim(), "every object is named by a manifest");
    ask(&dir, &["checkpoint", "verify", "small"]).expect_code(0);
}
