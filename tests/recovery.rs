//! Survivors survive: a rank that dies costs the others neither process nor memory, and the result
//! not a bit. Through the shipped binary.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{
    Running, cluster, eventually, free_ports, repository, roles, run, small_job, submit,
    submit_local, up_with_slots, weights_digest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A short transformer and a short classifier that checkpoint at their end only: what a rank needs
/// after a fault can only come from the others.
const TRANSFORMER: (&str, &[&str]) = (
    "examples/rust-lm/job.toml",
    &[
        "hyperparameters.width=32",
        "hyperparameters.heads=2",
        "hyperparameters.sequence_length=32",
        "stop.max_steps=120",
        "checkpoint.every_steps=0",
        "evaluate.every_steps=50",
        "batch.global=16",
        "recovery.max_failures=10",
    ],
);
const CLASSIFIER: (&str, &[&str]) = (
    "examples/digits/job.toml",
    &[
        "stop.max_steps=60",
        "checkpoint.every_steps=0",
        "evaluate.every_steps=20",
        "recovery.max_failures=10",
    ],
);

fn start((job, sets): (&str, &[&str]), folder: &Path, extra: &[&str]) -> Running {
    let sets: Vec<&str> = sets.iter().chain(extra).copied().collect();
    Running::start(&mut submit_local(&repository(job), folder, &sets))
}

/// What the weights are made of, and what was told of them: metrics and the sample ledger.
fn undisturbed(job: (&str, &[&str])) -> (String, Value) {
    let folder = tempfile::tempdir().expect("a folder");
    let finished = start(job, folder.path(), &["resources.ranks=1"]).finish().expect_code(0);
    let last = finished.last_json();
    assert!(last["samples"]["epochs_verified"].is_u64(), "{last}");
    (weights_digest(&finished), json!([last["metrics"], last["samples"]]))
}

fn is_running(event: &Value, generation: u64) -> bool {
    event["event"] == "status"
        && event["phase"] == "running"
        && event["generation"].as_u64() >= Some(generation)
}

/// The processes of the ranks, once there are so many.
fn processes(running: &Running, count: usize) -> Vec<Pid> {
    eventually("the ranks", || {
        let ranks = running.ranks();
        (ranks.len() == count).then(|| ranks.into_iter().map(|(_, pid)| pid).collect())
    })
}

#[test]
fn survivors_keep_their_process_and_the_result_its_bits() {
    for job in [TRANSFORMER, CLASSIFIER] {
        let (expected, metrics) = undisturbed(job);
        let folder = tempfile::tempdir().expect("a folder");
        let mut running = start(job, folder.path(), &["resources.ranks=3"]);
        let (mut generation, mut step) = (1, 3);
        // The first rank, which reports and writes; the last one; the one between.
        for victim in [0, 2, 1] {
            running.wait_for_step(step);
            let before = processes(&running, 3);
            kill(before[victim], Signal::SIGKILL).expect("it runs");
            generation += 1;
            let status =
                running.wait_for("the next generation", |event| is_running(event, generation));
            assert_eq!(status["generation"], generation, "one for each death: {status}");
            assert_eq!(status["regroups"], generation - 1, "in place: {status}");
            assert_eq!(status["first_cause"]["cause"]["signal"], 9, "{status}");
            let after = processes(&running, 3);
            let stayed = before.iter().filter(|pid| after.contains(pid)).count();
            assert_eq!(stayed, 2, "{before:?} became {after:?}");
            step = status["furthest"].as_u64().expect("a step") + 3;
        }
        let finished = running.finish().expect_code(0);
        let last = finished.last_json();
        assert_eq!(weights_digest(&finished), expected, "{}", job.0);
        let told = json!([last["metrics"], last["samples"]]);
        assert_eq!(told, metrics, "metrics and the sample ledger are handed on");
    }
}

#[test]
fn two_that_die_at_once_and_one_that_dies_while_the_others_recover() {
    let (expected, _) = undisturbed(TRANSFORMER);
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = start(TRANSFORMER, folder.path(), &["resources.ranks=4"]);
    running.wait_for_step(5);
    let before = processes(&running, 4);
    kill(before[0], Signal::SIGKILL).expect("it runs");
    kill(before[3], Signal::SIGKILL).expect("it runs");
    // The recovery has begun: another survivor goes.
    running.wait_for("the next generation", |event| {
        event["event"] == "status" && event["generation"].as_u64() >= Some(2)
    });
    kill(before[1], Signal::SIGKILL).expect("it runs");
    let finished = running.finish().expect_code(0);
    let last = finished.last_json();
    assert_eq!(last["restarts"], last["regroups"], "always in place: {last}");
    assert_eq!(weights_digest(&finished), expected);
}

#[test]
fn a_rank_that_is_stopped_is_found_named_and_replaced() {
    let (expected, _) = undisturbed(TRANSFORMER);
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = start(TRANSFORMER, folder.path(), &["resources.ranks=2"]);
    running.wait_for_step(5);
    let before = processes(&running, 2);
    kill(before[1], Signal::SIGSTOP).expect("it runs");
    let status = running.wait_for("the next generation", |event| is_running(event, 2));
    let cause = status["first_cause"]["cause"]["reason"].as_str().unwrap_or_default();
    let named = format!("its process {} was stopped by a signal", before[1]);
    assert!(cause.contains(&named), "{status}");
    assert_eq!(status["regroups"], 1, "{status}");
    let finished = running.finish().expect_code(0);
    assert_eq!(weights_digest(&finished), expected);
    // Where the time went, and why.
    let last = finished.last_json();
    let goodput = &last["goodput"];
    assert!(goodput["steps"].as_u64() >= Some(100), "{goodput}");
    assert!(goodput["useful_ms"].as_u64() > Some(0) && goodput["lost_ms"].as_u64() > Some(0));
    let history = last["history"].as_array().expect("a list");
    let why = |moment: &Value| moment["text"].as_str().is_some_and(|text| text.contains(&named));
    assert!(history.iter().any(why), "{history:#?}");
    // What it was in when it was found is kept beside the flight logs.
    let kept = folder.path().join("store/jobs/rust-lm/flight/g1/r1.stacks.json");
    let dump: Value = serde_json::from_slice(&std::fs::read(&kept).expect("kept")).expect("JSON");
    assert_eq!(dump["pid"], before[1].as_raw(), "{dump}");
    assert!(dump["absent"].as_str().is_some_and(|why| why.contains(&named)), "{dump}");
    assert_eq!(dump["threads"][0]["state"], "stopped by a signal", "{dump}");
}

#[test]
fn a_drained_rank_hands_its_work_over_and_no_step_is_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let extra = "[resources]\nranks = 2\n[recovery]\nmax_failures = 0\n";
    let job = small_job(folder, extra);
    // None is due before the end: what the newcomer gets can only come from the rank that stays.
    let sets = ["stop.max_steps=300", "checkpoint.every_steps=0"];
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let dir = folder.join("cluster");
    let _up = up_with_slots(&dir, 1, &["--workers", "3"]);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--dir").arg(&dir)).expect_code(0)
    };
    let workers = || ask(&["workers", "--json"]).stdout.lines().count();
    eventually("three workers", || (workers() == 3).then_some(()));
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--dir"]).arg(&dir);
    for set in sets {
        submit.args(["--set", set]);
    }
    let mut following = Running::start(&mut submit);
    following.wait_for_step(30);
    let shown = ask(&["job", "small", "--json"]).last_json();
    let worker = |rank: usize| {
        let worker = shown["status"]["gang"][rank]["worker"].as_str();
        worker.expect("a worker").to_owned()
    };
    let (drained, stays) = (worker(1), worker(0));
    assert_ne!(drained, stays, "one slot each: {shown}");
    ask(&["drain", &drained, "--deadline", "1m"]);
    let status = following.wait_for("the next generation", |event| is_running(event, 2));
    let gang = status["gang"].as_array().expect("a gang");
    let places: Vec<&str> = gang.iter().filter_map(|place| place["worker"].as_str()).collect();
    assert_eq!(places.len(), 2, "{status}");
    assert!(places.contains(&stays.as_str()) && !places.contains(&drained.as_str()), "{status}");
    assert_eq!((&status["regroups"], &status["restarts"]), (&1.into(), &1.into()), "{status}");
    following.finish().expect_code(0);

    let shown = ask(&["job", "small", "--json"]).last_json();
    let status = &shown["status"];
    assert_eq!(status["model"]["sha256"], expected.as_str(), "{status}");
    assert_eq!((&status["failures"], &status["first_cause"]), (&0.into(), &Value::Null));
    let goodput = &status["goodput"];
    assert_eq!(goodput["steps_redone"], 0, "{goodput}");
    assert_eq!(goodput["lost_ms"], 0, "{goodput}");
    assert_eq!(goodput["steps"], 300, "each step once: {goodput}");
    let cause = format!("`{drained}` is draining: drained by a user");
    let history = status["history"].as_array().expect("a history");
    let names = |moment: &Value| moment["text"].as_str().is_some_and(|text| text.contains(&cause));
    assert!(history.iter().any(names), "{history:#?}");
    let text = ask(&["job", "small"]).stdout;
    assert!(text.contains(&cause), "{text}");
    assert!(text.contains("300 steps, 0 of them computed again"), "{text}");
}

#[test]
fn an_elastic_gang_shrinks_at_once_and_grows_again() {
    // The two go on while the third starts: it has to be there before their end.
    let sets = [TRANSFORMER.1, &["stop.max_steps=300"]].concat();
    let job = (TRANSFORMER.0, &sets[..]);
    let (expected, _) = undisturbed(job);
    let folder = tempfile::tempdir().expect("a folder");
    let elastic = ["resources.ranks={ min = 1, max = 3 }"];
    let mut running = start(job, folder.path(), &elastic);
    running.wait_for_step(5);
    let before = processes(&running, 3);
    kill(before[1], Signal::SIGKILL).expect("it runs");
    let status = running.wait_for("fewer ranks", |event| is_running(event, 2));
    assert_eq!(status["gang"].as_array().map(Vec::len), Some(2), "{status}");
    let status = running.wait_for("three again", |event| {
        is_running(event, 3) && event["gang"].as_array().map(Vec::len) == Some(3)
    });
    assert_eq!(status["failures"], 0, "to grow is no failure: {status}");
    let finished = running.finish().expect_code(0);
    assert_eq!(weights_digest(&finished), expected);
}

#[test]
fn newcomers_get_the_state_behind_a_step_that_the_others_make() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let extra = "[resources]\nranks = { min = 1, max = 3 }\n\
                 [recovery]\nmax_failures = 10\njoin_behind_above = \"0B\"\n";
    let job = small_job(folder, extra);
    // Nothing is due that would have the state sent at once.
    let sets = ["stop.max_steps=600", "checkpoint.every_steps=0"];
    let alone = [&sets[..], &["resources.ranks=1"]].concat();
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &alone));
    let undisturbed = undisturbed.expect_code(0);
    let expected = weights_digest(&undisturbed);

    let dir = folder.join("cluster");
    let up = up_with_slots(&dir, 3, &["--workers", "1"]);
    let mut following = submit(&job, &dir, &sets);
    let mut generation = 0;
    // One newcomer beside two that hold the state, then two beside one.
    for victims in [&[1][..], &[0, 2]] {
        let status = following.wait_for("three ranks", |event| {
            is_running(event, generation + 1) && event["gang"].as_array().map(Vec::len) == Some(3)
        });
        generation = status["generation"].as_u64().expect("a generation");
        following.wait_for_step(status["furthest"].as_u64().expect("a step") + 3);
        let ranks = processes(&up, 3);
        victims.iter().for_each(|rank| kill(ranks[*rank], Signal::SIGKILL).expect("it runs"));
    }
    following.wait_for("three again", |event| {
        is_running(event, generation + 1) && event["gang"].as_array().map(Vec::len) == Some(3)
    });
    following.finish().expect_code(0);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--dir").arg(&dir)).expect_code(0)
    };
    let shown = ask(&["job", "small", "--json"]).last_json();
    let model = &shown["status"]["model"];
    assert_eq!(model["sha256"], expected.as_str(), "{shown}");
    assert_eq!(model["samples"], undisturbed.last_json()["samples"], "{shown}");
    let logs = ask(&["logs", "small", "--json"]).stdout;
    let sent = logs.lines().filter(|line| line.contains("the state of step ")).count();
    assert!(sent >= 2, "{sent} states went behind a step: {logs}");
    assert!(logs.contains("to be sent behind the next step to r"), "{logs}");
}

#[test]
fn a_job_that_fails_at_the_same_step_again_and_again_ends_with_that_diagnosis() {
    let folder = tempfile::tempdir().expect("a folder");
    let sets = ["resources.ranks=2", "recovery.max_failures=2", "stop.max_steps=100000"];
    let mut running = start(TRANSFORMER, folder.path(), &sets);
    running.wait_for_step(5);
    // Killed before it can make a step: the job stays where it is.
    let (mut generation, mut killed) = (1, Vec::new());
    loop {
        let victim = eventually("a newcomer", || {
            let ranks = running.ranks();
            ranks.iter().map(|(_, pid)| *pid).rfind(|pid| !killed.contains(pid))
        });
        // Not the one that was there from the beginning.
        kill(victim, Signal::SIGKILL).expect("it runs");
        killed.push(victim);
        generation += 1;
        let status = running.wait_for("what becomes of it", |event| {
            event["event"] == "status"
                && (event["phase"] == "failed" || event["generation"].as_u64() >= Some(generation))
        });
        if status["phase"] == "failed" {
            let reason = status["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("3 failures without progress beyond step "), "{reason}");
            assert!(reason.contains("killed by signal 9"), "{reason}");
            break;
        }
        assert!(generation < 50, "{status}");
    }
    let ended = running.finish();
    assert_ne!(ended.code, 0, "{ended:?}");
}

#[test]
fn what_a_process_writes_that_began_as_a_spare_is_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let up = up_with_slots(&dir, 3, &["--workers", "1"]);
    let extra = "[resources]\nranks = 2\n[recovery]\nspares = 1\n";
    let mut submit = cluster();
    submit.arg("submit").arg(small_job(folder.path(), extra));
    submit.args(["--json", "--follow", "--set", "stop.max_steps=400", "--dir"]).arg(&dir);
    let mut following = Running::start(&mut submit);
    let mut step = 5;
    let mut gang: Vec<Pid> = Vec::new();
    // One after the other, until the first spare is the rank that tells of the steps.
    for generation in [2, 3] {
        following.wait_for_step(step);
        let ranks = processes(&up, 3);
        if gang.is_empty() {
            gang = ranks[..2].to_vec();
        }
        kill(gang.remove(0), Signal::SIGKILL).expect("it runs");
        let status = following.wait_for("the next", |event| is_running(event, generation));
        step = status["furthest"].as_u64().expect("a step") + 3;
    }
    following.finish().expect_code(0);
    let mut logs = cluster();
    let logs = run(logs.args(["logs", "small", "--json", "--dir"]).arg(&dir)).expect_code(0);
    let lines = logs.stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let told = lines.filter(|line| line["rank"].as_u64() >= Some(2));
    let texts: Vec<String> =
        told.map(|line| line["text"].as_str().unwrap_or_default().to_owned()).collect();
    assert!(texts.iter().any(|text| text.starts_with("step 400/400 loss")), "{}", logs.stdout);
}

#[test]
fn bounds_that_make_no_sense_are_refused() {
    for (set, expected) in [
        ("resources.ranks={ min = 3, max = 2 }", "resources.ranks.min = 3 is more than"),
        ("resources.ranks={ min = 1, max = 9 }", "resources.ranks = 9 is more than batch.lanes"),
        ("resources.ranks={ min = 0, max = 2 }", "expected a number of ranks of at least 1"),
        ("resources.ranks=-1", "expected a number of ranks of at least 1"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = cluster();
        command.args(["submit", "--local", "--dir"]).arg(folder.path());
        command.arg(repository(TRANSFORMER.0)).args(["--set", set]);
        let ended = run(&mut command).expect_code(2);
        assert!(ended.stderr.contains(expected), "{set}: {}", ended.stderr);
    }
}

#[test]
fn a_job_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let sets = ["checkpoint.every_steps=20", "checkpoint.keep=3", "stop.max_steps=200"];
    let job = small_job(folder.path(), "");
    let undisturbed = run(&mut submit_local(&job, &folder.path().join("other"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let dir = folder.path().join("run");
    let mut running = Running::start(&mut submit_local(&job, &dir, &sets));
    running.wait_for_checkpoint(60);
    running.kill_all();
    let all = dir.join("store/jobs/small/checkpoints");
    let mut kept: Vec<PathBuf> = std::fs::read_dir(&all)
        .expect("checkpoints")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("manifest.json").exists())
        .collect();
    kept.sort();
    // Bytes of the newest are others, and something of the one before is gone.
    let [.., before, newest] = &kept[..] else { panic!("two checkpoints: {kept:?}") };
    let shard = |path: &Path| {
        let files = std::fs::read_dir(path).expect("files");
        let mut files = files.map(|entry| entry.expect("an entry").path());
        files
            .find(|path| path.extension().is_some_and(|end| end == "safetensors"))
            .expect("a shard")
    };
    let mut bytes = std::fs::read(shard(newest)).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(shard(newest), bytes).expect("written");
    std::fs::remove_file(shard(before)).expect("removed");

    let _up = up_with_slots(&dir, 1, &[]);
    let last = eventually("the job has ended", || {
        let mut job = cluster();
        let job = run(job.args(["job", "small", "--json", "--dir"]).arg(&dir)).expect_code(0);
        let status = &job.last_json()["status"];
        ["succeeded", "failed"].contains(&status["phase"].as_str()?).then(|| status.clone())
    });
    let history = last["history"].to_string();
    assert_eq!(history.matches("going back to the checkpoint at step").count(), 2, "{history}");
    assert!(history.contains("is damaged") && history.contains("is not in"), "{history}");
    assert_eq!(last["model"]["sha256"], expected, "{last}");
}

#[test]
fn a_coordinator_that_stood_still_blames_no_worker() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let job = small_job(folder, "[resources]\nranks = 2\n[recovery]\nmax_failures = 0\n");
    let sets = ["stop.max_steps=1000", "checkpoint.every_steps=0"];
    roles::make_certificates(folder);
    let ports = free_ports(1);
    let config = roles::write_config(folder, "n1", 1, ("127.0.0.1", &ports), "");
    let coordinator = roles::start_coordinator(&config);
    let _workers = ["w1", "w2"].map(|name| roles::start_worker(folder, name, 1, &ports));
    let ask = |arguments: &[&str]| {
        let mut command = cluster();
        run(command.args(arguments).arg("--config").arg(&config))
    };
    eventually("two workers", || {
        (ask(&["workers", "--json"]).stdout.lines().count() == 2).then_some(())
    });
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--config"]).arg(&config);
    for set in sets {
        submit.args(["--set", set]);
    }
    let mut following = Running::start(&mut submit);
    following.wait_for_step(30);
    coordinator.signal(Signal::SIGSTOP);
    // Longer than a lease: that is what is tried.
    std::thread::sleep(Duration::from_secs(4));
    coordinator.signal(Signal::SIGCONT);
    let status = ask(&["job", "small", "--json"]).expect_code(0).last_json()["status"].clone();
    assert_eq!(
        status["phase"], "running",
        "nothing was tried: it is over, or it began anew: {status}"
    );
    following.finish().expect_code(0);
    let status = ask(&["job", "small", "--json"]).expect_code(0).last_json()["status"].clone();
    assert_eq!((&status["restarts"], &status["failures"]), (&0.into(), &0.into()), "{status}");
}
