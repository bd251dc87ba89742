//! Survivors survive: a rank that dies costs the others neither process nor memory, and the result
//! not a bit. Through the shipped binary.

mod common;

use common::{Running, cluster, eventually, repository, run, submit_local, weights_digest};
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

fn start((job, sets): (&str, &[&str]), folder: &std::path::Path, extra: &[&str]) -> Running {
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
}

#[test]
fn an_elastic_gang_shrinks_at_once_and_grows_again() {
    let (expected, _) = undisturbed(TRANSFORMER);
    let folder = tempfile::tempdir().expect("a folder");
    let elastic = ["resources.ranks={ min = 1, max = 3 }", "stop.max_steps=120"];
    let mut running = start(TRANSFORMER, folder.path(), &elastic);
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
            assert!(reason.contains("3 failures without progress"), "{reason}");
            assert!(reason.contains("killed by signal 9"), "{reason}");
            break;
        }
        assert!(generation < 50, "{status}");
    }
    let ended = running.finish();
    assert_ne!(ended.code, 0, "{ended:?}");
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
