//! A store on a disk that is full: what was acknowledged is whole, the first cause is named, and the job
//! goes on once there is room. Through the shipped binary; needs root, to mount a small file system.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    Finished, Running, cluster, run, small_job, submit, submit_local, up, weights_digest,
};
use serde_json::Value;

/// A file system of its own; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None, loudly, where this user may mount nothing.
    fn mount(folder: &Path, bytes: u64) -> Option<Self> {
        std::fs::create_dir_all(folder).expect("made");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(folder);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("SKIPPED: a full disk: no tmpfs can be mounted here; it needs root");
        }
        mounted.then(|| Self(folder.to_owned()))
    }

    /// Takes all room but `left` bytes until the file is removed.
    fn fill(&self, left: u64) -> PathBuf {
        let path = self.0.join("filler");
        let stat = nix::sys::statvfs::statvfs(&self.0).expect("a file system");
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        let bytes = vec![0; usize::try_from(free.saturating_sub(left)).expect("fits")];
        // A job that writes meanwhile takes of the same room: the disk is full then, too.
        match std::fs::write(&path, bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {}
            written => written.expect("written"),
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A cluster whose store is on the disk.
fn up_on(disk: &SmallDisk, folder: &Path, patience: &str) -> (Running, PathBuf) {
    let dir = folder.join("cluster");
    let config = folder.join("cluster.toml");
    let text = format!(
        "[store]\nuri = \"file://{}/store\"\npatience = \"{patience}\"\n",
        disk.0.display()
    );
    std::fs::write(&config, text).expect("written");
    let up = up(&dir, &["--config", config.to_str().expect("UTF-8")]);
    (up, dir)
}

#[test]
fn a_full_store_ends_the_job_with_its_cause_and_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let Some(disk) = SmallDisk::mount(&folder.join("disk"), 64 << 20) else { return };
    let extra = "[resources]\nranks = 2\n[recovery]\nmax_failures = 1\n";
    let job = small_job(folder, extra);
    // None is deleted, so that none makes room for the next.
    let sets = ["stop.max_steps=300", "checkpoint.every_steps=20", "checkpoint.keep=1000"];
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let (_up, dir) = up_on(&disk, folder, "1s");
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--dir").arg(&dir))
    };
    let json = |finished: Finished| finished.expect_code(0).last_json();

    let mut following = submit(&job, &dir, &sets);
    let recorded = |event: &Value| event["checkpoint"]["step"].as_u64() >= Some(40);
    following.wait_for("two checkpoints", recorded);
    let filler = disk.fill(64 << 10);
    let status = following
        .wait_for("its end", |event| event["event"] == "status" && event["phase"] == "failed");
    following.finish().expect_code(7);
    let cause = &status["first_cause"]["cause"];
    assert!(cause.to_string().contains("is full: free some space"), "{status}");
    let shown = ask(&["job", "small"]).expect_code(0).stdout;
    assert!(shown.contains("first cause"), "{shown}");
    assert!(shown.contains("is full: free some space"), "{shown}");

    // Everything that was acknowledged is there and whole.
    let acknowledged = status["checkpoint"]["step"].as_u64().expect("a step");
    assert!(acknowledged >= 40, "{status}");
    let verified = ask(&["checkpoint", "verify", "small"]).expect_code(0).stdout;
    assert!(verified.contains(&format!("step {acknowledged}: ok")), "{verified}");
    let listed = ask(&["checkpoints", "small", "--json"]).expect_code(0).stdout;
    let listed = listed.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let steps: Vec<u64> =
        listed.filter_map(|checkpoint| checkpoint["fact"]["step"].as_u64()).collect();
    assert!(steps.contains(&acknowledged), "{steps:?}");

    // With room again it goes on from there.
    std::fs::remove_file(filler).expect("it is there");
    json(ask(&["resume", "small", "--json"]));
    let mut follow = cluster();
    let following = Running::start(follow.args(["follow", "small", "--json", "--dir"]).arg(&dir));
    following.finish().expect_code(0);
    let shown = json(ask(&["job", "small", "--json"]));
    let goes_on = format!("starting from step {acknowledged}");
    assert!(shown["status"]["history"].to_string().contains(&goes_on), "{shown}");
    assert_eq!(shown["status"]["model"]["sha256"], expected.as_str(), "{shown}");
}

#[test]
fn a_disk_that_is_full_for_a_while_is_waited_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let Some(disk) = SmallDisk::mount(&folder.join("disk"), 64 << 20) else { return };
    // A hang would be called one after less time than the disk is full, which is more than five
    // seconds with this seed, and not for what a busy machine does.
    let extra = "[resources]\nranks = 2\n[recovery]\nmax_failures = 0\nhang_min = \"3s\"\n";
    let job = small_job(folder, extra);
    let sets = ["stop.max_steps=600", "checkpoint.every_steps=5"];
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let (up, dir) = up_on(&disk, folder, "3m");
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--dir").arg(&dir))
    };
    let mut following = submit(&job, &dir, &sets);
    following.wait_for_step(10);
    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--faults", "fill-disk", "--seed", "5", "--json"]);
    strikes.args(["--every", "1s", "--duration", "6s", "--fill-bytes", "1GiB", "--fill"]);
    let ended = run(strikes.arg(&disk.0).arg("--dir").arg(&dir)).expect_code(0);
    assert!(ended.last_json()["struck"].as_u64() >= Some(1), "{ended:?}");
    let left = std::fs::read_dir(&disk.0).expect("it is there").flatten();
    let fillers = left.filter(|entry| entry.file_name().to_string_lossy().ends_with(".fill"));
    assert_eq!(fillers.count(), 0, "what was filled is free again");
    following.finish().expect_code(0);
    let shown = ask(&["job", "small", "--json"]).expect_code(0).last_json();
    assert_eq!(shown["status"]["model"]["sha256"], expected.as_str(), "{shown}");
    assert_eq!(shown["status"]["restarts"], 0, "{shown}");
    ask(&["checkpoint", "verify", "small"]).expect_code(0);
    drop(up);
}
