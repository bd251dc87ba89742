//! The promise: the final weights depend on the job, not on the number of ranks, on a rank's death
//! or on the death of everything. Through the shipped binary, on the examples' real data.

mod common;

use std::path::PathBuf;

use common::{Running, cluster, repository, run, submit_local, weights_digest};
use nix::sys::signal::{Signal, kill};

/// The rust-lm example, shortened so that CI can afford it, and long enough that what is killed early
/// in it is killed before its end.
const RUST_LM: [&str; 6] = [
    "hyperparameters.width=32",
    "hyperparameters.heads=2",
    "hyperparameters.sequence_length=32",
    "stop.max_steps=80",
    "checkpoint.every_steps=5",
    "batch.global=16",
];

fn rust_lm() -> PathBuf {
    repository("examples/rust-lm/job.toml")
}

fn sets(ranks: u32) -> Vec<String> {
    let ranks = format!("resources.ranks={ranks}");
    RUST_LM.iter().map(|&s| s.to_owned()).chain([ranks]).collect()
}

fn digest_with(ranks: u32) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let sets = sets(ranks);
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut command = submit_local(&rust_lm(), &folder.path().join("run"), &sets);
    weights_digest(&run(&mut command).expect_code(0))
}

#[test]
fn any_number_of_ranks_and_any_death_give_the_same_weights() {
    let expected = digest_with(1);
    for ranks in [2, 3, 4] {
        assert_eq!(digest_with(ranks), expected, "{ranks} ranks");
    }
    assert_eq!(digest_after_killing_a_rank(), expected, "a rank killed mid-run");
    assert_eq!(digest_after_killing_everything(), expected, "everything killed, then resumed");
}

fn digest_after_killing_a_rank() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let sets = sets(2);
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut running = Running::start(&mut submit_local(&rust_lm(), folder.path(), &sets));
    running.wait_for_step(12);
    let ranks = running.ranks();
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    kill(ranks[1].1, Signal::SIGKILL).expect("killed");
    let finished = running.finish().expect_code(0);
    let last = finished.last_json();
    assert_eq!(last["restarts"], 1, "one restart: {last}");
    assert_eq!(last["generation"], 2, "one new generation: {last}");
    assert_eq!(last["first_cause"]["rank"], 1, "the killed rank is named: {last}");
    assert_eq!(last["first_cause"]["cause"]["signal"], 9, "with its signal: {last}");
    weights_digest(&finished)
}

fn digest_after_killing_everything() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let sets = sets(2);
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let mut running = Running::start(&mut submit_local(&rust_lm(), folder.path(), &sets));
    // Checkpoints are written behind the steps: what counts is the one that is committed.
    let committed = running.wait_for_checkpoint(15);
    assert_eq!(running.ranks().len(), 2);
    running.kill_all();
    let mut resume = cluster();
    resume.args(["resume", "rust-lm", "--local", "--json", "--dir"]).arg(folder.path());
    let mut resumed = Running::start(&mut resume);
    let first = resumed.wait_for("a step", |event| event["event"] == "step");
    assert!(first["step"].as_u64() > Some(committed), "resumed from a checkpoint: {first}");
    weights_digest(&resumed.finish().expect_code(0))
}

#[test]
fn the_image_classifier_gives_the_same_weights_on_any_number_of_ranks() {
    let digest = |ranks: u32| {
        let folder = tempfile::tempdir().expect("a folder");
        let ranks = format!("resources.ranks={ranks}");
        let sets = [ranks.as_str(), "stop.max_steps=10", "stop.max_epochs=1"];
        let job = repository("examples/digits/job.toml");
        weights_digest(&run(&mut submit_local(&job, folder.path(), &sets)).expect_code(0))
    };
    let expected = digest(1);
    for ranks in [2, 3, 5, 8] {
        assert_eq!(digest(ranks), expected, "{ranks} ranks");
    }
}
