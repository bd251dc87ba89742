//! Data that make a loss no number: refused where that can be seen, and else the step is named or
//! skipped, as the job says, on every rank alike. Through the shipped binary.

mod common;

use std::path::{Path, PathBuf};

use common::{Finished, cluster, run, submit_local, up, weights_digest};

/// The line, from 0, of the image that is poison.
const POISON: usize = 37;

/// Sixty-four images of 2×2 pixels near the largest negative number, but for one: its distance from
/// their mean is no finite `f32`.
fn write_data(folder: &Path, poison: &str) {
    let mut text = String::new();
    for line in 0..64 {
        let pixel = match line {
            POISON => poison,
            _ if line % 2 == 0 => "-3e38",
            _ => "-2.9e38",
        };
        let label = if line % 2 == 0 { "even" } else { "odd" };
        text.push_str(&format!("{label},{pixel},{pixel},{pixel},{pixel}\n"));
    }
    std::fs::write(folder.join("data.csv"), text).expect("written");
}

/// Two epochs of eight steps, in each of which one meets the poison.
fn write_job(folder: &Path, extra: &str) -> PathBuf {
    let job = format!(
        "name = \"poison\"\nalgorithm = \"image-classification\"\n\
         [channels]\ntrain = {{ uri = \"file://data.csv\" }}\n\
         [hyperparameters]\nwidth = 8\nstages = 1\n\
         [batch]\nglobal = 8\nlanes = 8\n[checkpoint]\nevery_steps = 1\n{extra}"
    );
    let path = folder.join("job.toml");
    std::fs::write(&path, job).expect("written");
    path
}

fn train(folder: &Path, dir: &str, ranks: u32, stop: &str) -> Finished {
    let extra = format!("[resources]\nranks = {ranks}\n[stop]\nmax_epochs = 2\n{stop}");
    run(&mut submit_local(&write_job(folder, &extra), &folder.join(dir), &[]))
}

#[test]
fn a_poisoned_step_ends_the_job_or_is_skipped_and_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    write_data(folder, "3e38");

    // By default the job ends there, at once: the same data would end it again.
    let ended = train(folder, "stops", 2, "").expect_code(7);
    let last = ended.last_json();
    let reason = last["reason"].as_str().expect("a reason");
    assert!(reason.contains("training diverged"), "{reason}");
    assert!(reason.contains("trying again would end the same way"), "{reason}");
    let (_, step) = reason.split_once(" at step ").expect("a step");
    let step: u64 = step.split(':').next().expect("a number").parse().expect("a number");
    assert!((1..=8).contains(&step), "in the first epoch: {reason}");
    assert_eq!(last["restarts"], 0, "{last}");
    let cause = last["first_cause"]["cause"]["message"].as_str().unwrap_or_default();
    assert!(cause.contains(&format!("at step {step}")), "{last}");
    // Whose microbatch it was is the first cause, and the sample is told, whoever spoke first.
    let rank = &last["first_cause"]["rank"];
    let named = format!(
        "in 1 of 8 microbatches, first in that of r{rank} with sample {POISON} of the training data"
    );
    assert!(cause.contains(&named), "{named}: {last}");
    {
        // A cluster in that folder tells the same of it, to programs and to people.
        let dir = folder.join("stops");
        let _up = up(&dir, &[]);
        let ask = |more: &[&str]| {
            let mut command = cluster();
            run(command.args(["job", "poison"]).args(more).arg("--dir").arg(&dir)).expect_code(0)
        };
        let told = ask(&["--json"]).last_json();
        assert_eq!(told["status"]["first_cause"], last["first_cause"], "{told}");
        let text = ask(&[]).stdout;
        assert!(text.contains(&named), "{named}: {text}");
    }

    // Skipped, it changes nothing: twice, on one rank as on two.
    let skip = "divergence = \"skip\"\nmax_skips = 1\n";
    let skipped: Vec<Finished> = [("one", 1), ("two", 2)]
        .map(|(dir, ranks)| train(folder, dir, ranks, skip).expect_code(0))
        .into();
    for finished in &skipped {
        assert_eq!(finished.last_json()["metrics"]["train:skipped_steps"], 2.0, "{finished:?}");
    }
    assert_eq!(weights_digest(&skipped[0]), weights_digest(&skipped[1]));

    // The step is named in the logs.
    let dir = folder.join("two");
    let _up = up(&dir, &[]);
    let mut logs = cluster();
    let logs = run(logs.args(["logs", "poison", "--rank", "0", "--dir"]).arg(&dir)).expect_code(0);
    let named = format!("step {step}/16 skipped: the loss is ");
    assert!(logs.stdout.contains(&named), "{named}: {logs:?}");
}

#[test]
fn numbers_that_are_none_are_refused_before_anything_runs() {
    for poison in ["NaN", "inf", "1e39"] {
        let folder = tempfile::tempdir().expect("a folder");
        write_data(folder.path(), poison);
        let refused = train(folder.path(), "run", 1, "").expect_code(2);
        let expected = format!("line {}: column 2: `{poison}` is not a number", POISON + 1);
        assert!(refused.stderr.contains(&expected), "{refused:?}");
        assert!(!folder.path().join("run").exists(), "nothing was made");
    }
}
