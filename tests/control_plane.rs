//! Coordinators and workers as processes of their own, and what a job loses when one of them ends:
//! nothing when it is the leader, the steps since the last checkpoint at most when it is a worker,
//! and not even those, nor a failure, when it was asked to end.

mod common;

use std::path::Path;

use common::{
    Running, cluster, eventually, free_ports, roles, run, small_job, submit_local, up,
    weights_digest,
};
use nix::sys::signal::Signal;
use serde_json::Value;

fn write_config(folder: &Path, name: &str, node: usize, ports: &[u16]) -> std::path::PathBuf {
    roles::write_config(folder, name, node, ("127.0.0.1", ports), "")
}

/// A worker with one slot.
fn start_worker(folder: &Path, name: &str, ports: &[u16]) -> Running {
    roles::start_worker(folder, name, 1, ports)
}

/// The job goes on from a checkpoint of the moment in which it was interrupted, which the leader
/// counts as no failure: it allows none.
const INTERRUPTED: [&str; 2] = ["stop.max_steps=300", "checkpoint.every_steps=1000"];

fn interrupted_job(folder: &Path) -> std::path::PathBuf {
    small_job(folder, "[resources]\nranks = 2\n[recovery]\nmax_failures = 0\n")
}

/// The weights of [`interrupted_job`] when nothing disturbs it.
fn undisturbed_digest(folder: &Path) -> String {
    let job = interrupted_job(folder);
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &INTERRUPTED));
    weights_digest(&undisturbed.expect_code(0))
}

/// Fails unless the one interruption left no trace in what became of [`interrupted_job`].
fn assert_undisturbed(folder: &Path, status: &Value) {
    assert_eq!(status["phase"], "succeeded", "{status}");
    assert_eq!(status["failures"], 0, "{status}");
    assert_eq!(status["first_cause"], Value::Null, "{status}");
    assert_eq!(status["restarts"], 1, "{status}");
    assert_eq!(status["model"]["sha256"], undisturbed_digest(folder).as_str(), "{status}");
}

#[test]
fn a_worker_is_stopped_politely_and_its_job_goes_on_when_it_is_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    roles::make_certificates(folder);
    let ports = free_ports(1);
    let client = write_config(folder, "c1", 1, &ports);
    let mut command = cluster();
    let coordinator = Running::start(command.arg("coordinator").arg("--config").arg(&client));
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--config").arg(&client))
    };
    let first = start_worker(folder, "w1", &ports);
    let second = start_worker(folder, "w2", &ports);
    eventually("two workers", || (ask(&["workers"]).stdout.lines().count() == 2).then_some(()));

    let mut submit = cluster();
    submit.arg("submit").arg(interrupted_job(folder)).args(["--json", "--follow"]);
    for set in INTERRUPTED {
        submit.arg("--set").arg(set);
    }
    let mut following = Running::start(submit.arg("--config").arg(&client));
    following.wait_for_step(30);
    second.signal(Signal::SIGTERM);
    let left = second.finish().expect_code(0);
    assert!(!left.stderr.contains("no coordinator took"), "{left:?}");
    let waiting = following.wait_for("the job waits", |event| {
        event["event"] == "status" && event["phase"] == "queued" && event["generation"] == 1
    });
    let saved = waiting["checkpoint"]["step"].as_u64().expect("the state was saved");
    assert!(saved >= 30, "{waiting}");
    assert!(waiting["reason"].as_str().is_some_and(|r| r.contains("`w2` left")), "{waiting}");

    let second = start_worker(folder, "w2", &ports);
    let next = following.wait_for("a step", |event| event["event"] == "step");
    assert_eq!(next["step"].as_u64(), Some(saved + 1), "{next}");
    following.finish().expect_code(0);
    assert_undisturbed(folder, &ask(&["job", "small"]).expect_code(0).last_json()["status"]);

    for part in [first, second, coordinator] {
        part.signal(Signal::SIGTERM);
        part.finish().expect_code(0);
    }
}

#[test]
fn a_cluster_in_one_process_is_interrupted_and_its_job_goes_on_by_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let dir = folder.join("c");
    let up = || {
        let mut command = cluster();
        command.args(["up", "--port", "0", "--slots", "2", "--json", "--dir"]).arg(&dir);
        let mut up = Running::start(&mut command);
        up.wait_for("up", |event| event["event"] == "up");
        up
    };
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--dir").arg(&dir))
    };
    let cut = up();
    let mut submit = cluster();
    submit.arg("submit").arg(interrupted_job(folder)).args(["--json", "--follow"]);
    for set in INTERRUPTED {
        submit.arg("--set").arg(set);
    }
    let mut following = Running::start(submit.arg("--dir").arg(&dir));
    following.wait_for_step(30);
    cut.signal(Signal::SIGINT);
    let left = cut.finish().expect_code(0);
    assert!(!left.stderr.contains("no coordinator took"), "a wait in vain: {left:?}");
    following.kill();

    let again = up();
    let mut follow = cluster();
    let mut following =
        Running::start(follow.args(["follow", "small", "--json", "--dir"]).arg(&dir));
    following
        .wait_for("the end", |event| event["event"] == "status" && event["phase"] == "succeeded");
    assert_undisturbed(folder, &ask(&["job", "small"]).expect_code(0).last_json()["status"]);
    // The ranks' own account: the second generation repeats nothing.
    let logs = ask(&["logs", "small", "--rank", "0"]).expect_code(0);
    let lines = logs.stdout.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON"));
    let later = lines.filter(|line| line["generation"] == 2);
    let texts = later.map(|line| line["text"].as_str().unwrap_or_default().to_owned());
    let steps =
        texts.filter_map(|text| text.strip_prefix("step ")?.split('/').next()?.parse().ok());
    let steps: Vec<u64> = steps.collect();
    assert!(steps.len() > 2 && steps.iter().all(|step| *step > 30), "{logs:?}");
    let nobody = ask(&["logs", "small", "--rank", "99"]).expect_code(3);
    assert!(nobody.stderr.contains("`small` has no rank 99: "), "{nobody:?}");
    again.signal(Signal::SIGINT);
    again.finish().expect_code(0);
}

#[test]
fn the_leader_dies_and_training_does_not_notice() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    roles::make_certificates(folder);
    let ports = free_ports(3);
    let mut coordinators: Vec<Running> = (1..=3)
        .map(|node| {
            let config = write_config(folder, &format!("c{node}"), node, &ports);
            let mut command = cluster();
            Running::start(command.arg("coordinator").arg("--config").arg(config))
        })
        .collect();
    let client = folder.join("c1.toml");
    let workers = ["w1", "w2"].map(|name| start_worker(folder, name, &ports));
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--config").arg(&client))
    };
    let leader = eventually("a leader", || {
        let finished = ask(&["status"]);
        (finished.code == 0)
            .then(|| finished.last_json()["leader"].as_u64())
            .flatten()
            .filter(|node| *node > 0)
    });
    eventually("two workers", || (ask(&["workers"]).stdout.lines().count() == 2).then_some(()));

    // Long enough that the leader's death falls well inside.
    let job = small_job(folder, "[resources]\nranks = 2\n");
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--set", "stop.max_steps=600"]);
    submit.args(["--set", "checkpoint.every_steps=20"]).arg("--config").arg(&client);
    let mut following = Running::start(&mut submit);
    following.wait_for_step(30);
    coordinators[leader as usize - 1].kill();

    let after = eventually("another leader", || {
        let finished = ask(&["status"]);
        (finished.code == 0)
            .then(|| finished.last_json()["leader"].as_u64())
            .flatten()
            .filter(|node| *node > 0 && *node != leader)
    });
    assert_ne!(after, leader);
    let listed = ask(&["jobs"]).expect_code(0);
    let job: Value = serde_json::from_str(&listed.stdout).expect("one job");
    assert_eq!(job["spec"]["name"], "small", "the new leader knows the job: {job}");

    let finished = following.finish().expect_code(0);
    let last = finished.last_json();
    assert_eq!(last["state"], "succeeded", "{last}");
    assert_eq!(last["generation"], 1, "no restart: {last}");
    assert_eq!(last["restarts"], 0, "{last}");

    // The ranks' own account: every step once, in order, in one generation.
    let logs = ask(&["logs", "small", "--rank", "0"]).expect_code(0);
    let mut steps: Vec<u64> = Vec::new();
    for line in logs.stdout.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(line["generation"], 1, "{line}");
        assert_ne!(line["stream"], "gap", "no line is lost: {line}");
        let text = line["text"].as_str().unwrap_or_default();
        if let Some(step) = text.strip_prefix("step ").filter(|t| t.contains(" loss ")) {
            steps.extend(step.split('/').next().and_then(|n| n.parse::<u64>().ok()));
        }
    }
    assert_eq!(steps, (1..=20).map(|n| n * 30).collect::<Vec<_>>(), "{logs:?}");

    for mut part in workers.into_iter().chain(coordinators) {
        // The killed leader has been waited for already.
        if part.pid().as_raw() > 0 && part.is_running() {
            part.signal(Signal::SIGTERM);
            part.finish().expect_code(0);
        }
    }
}

#[test]
fn a_drained_worker_gives_its_job_away_and_takes_tasks_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let dir = folder.join("cluster");
    let up = up(&dir, &["--workers", "2"]);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--dir").arg(&dir))
    };
    let state = |name: &str| {
        let listed = ask(&["workers"]).expect_code(0).stdout;
        let all = listed.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let found = all.into_iter().find(|worker| worker["name"] == name);
        found.map(|worker| worker["state"].as_str().unwrap_or_default().to_owned())
    };
    eventually("two workers", || (ask(&["workers"]).stdout.lines().count() == 2).then_some(()));
    let missing = ask(&["drain", "w9"]).expect_code(3);
    assert!(missing.stderr.contains("no worker `w9`: there are w1, w2"), "{missing:?}");

    let mut submit = cluster();
    submit.arg("submit").arg(interrupted_job(folder)).args(["--json", "--follow"]);
    for set in INTERRUPTED {
        submit.arg("--set").arg(set);
    }
    let mut following = Running::start(submit.arg("--dir").arg(&dir));
    following.wait_for_step(30);
    let job = ask(&["job", "small"]).expect_code(0).last_json();
    let host = job["status"]["gang"][0]["worker"].as_str().expect("a worker").to_owned();
    let drained = ask(&["drain", &host, "--deadline", "1m"]).expect_code(0).last_json();
    assert_eq!(drained["state"], "draining", "{drained}");
    eventually("it is drained", || (state(&host)? == "drained").then_some(()));
    following.finish().expect_code(0);
    assert_eq!(state(&host).as_deref(), Some("drained"), "until a person takes it back");
    assert_undisturbed(folder, &ask(&["job", "small"]).expect_code(0).last_json()["status"]);

    ask(&["undrain", &host]).expect_code(0);
    eventually("it takes tasks", || (state(&host)? == "attached").then_some(()));
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

#[test]
fn a_job_that_waited_for_as_long_as_it_may_ends_and_says_what_it_lacked() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let dir = folder.join("cluster");
    let up = up(&dir, &[]);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--dir").arg(&dir))
    };
    let job = small_job(folder, "[resources]\nranks = 4\n");
    let mut submit = cluster();
    submit.arg("submit").arg(job).args(["--json", "--follow", "--set", "stop.max_wait=1s"]);
    run(submit.arg("--dir").arg(&dir)).expect_code(8);
    let job = ask(&["job", "small"]).expect_code(0).last_json();
    assert_eq!(job["status"]["phase"], "stopped", "{job}");
    let reason = job["status"]["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("waited ") && reason.contains("stop.max_wait = 1s"), "{reason}");
    assert!(reason.contains("needs 4 slots, 2 slots free on 1 worker"), "{reason}");
    assert!(reason.ends_with("`cluster resume small` queues it anew"), "{reason}");
    ask(&["resume", "small"]).expect_code(0);
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}
