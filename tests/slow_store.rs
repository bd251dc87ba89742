//! A store that is slower than checkpoints come: an S3 server whose answers the test holds back. Through
//! the shipped binary.

mod common;

use std::path::Path;

use common::moto::{self, Gate, Moto};
use common::{Finished, Running, cluster, run, small_job, submit_local, up, weights_digest};
use serde_json::Value;

fn ask(dir: &Path, args: &[&str]) -> Finished {
    let mut command = cluster();
    run(command.args(args).arg("--dir").arg(dir))
}

#[test]
fn a_checkpoint_that_is_due_while_one_is_being_written_is_left_out_and_training_goes_on() {
    let Some(server) = Moto::start() else { return };
    server.make_bucket("slow");
    let folder = tempfile::tempdir().expect("a folder");
    let job = small_job(folder.path(), "[resources]\nranks = 2\n");
    let sets = ["stop.max_steps=600", "checkpoint.when_behind=\"skip\""];
    let undisturbed = run(&mut submit_local(&job, &folder.path().join("undisturbed"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let gate = Gate::before(&server.address);
    let config = moto::config(folder.path(), &gate.address, "slow");
    let dir = folder.path().join("cluster");
    let _up = up(&dir, &["--config", config.to_str().expect("UTF-8")]);
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--dir"]).arg(&dir);
    for set in sets {
        submit.args(["--set", set]);
    }
    let mut following = Running::start(&mut submit);
    let step_of = |event: &Value| event["checkpoint"]["step"].as_u64();
    following.wait_for("a checkpoint", |event| step_of(event).is_some());
    gate.hold(true);
    // Where training waited for the store, none of these steps would come.
    let now = following.wait_for("a step", |event| event["event"] == "step");
    let now = now["step"].as_u64().expect("a step");
    following.wait_for_step(now + 40);
    gate.hold(false);
    let next =
        following.wait_for("a checkpoint after that", |event| step_of(event) > Some(now + 40));
    assert_eq!((&next["restarts"], &next["failures"]), (&0.into(), &0.into()), "{next}");
    following.finish().expect_code(0);

    let shown = ask(&dir, &["job", "small", "--json"]).expect_code(0).last_json();
    assert_eq!(shown["status"]["model"]["sha256"], expected.as_str(), "{shown}");
    let logs = ask(&dir, &["logs", "small", "--rank", "0"]).expect_code(0).stdout;
    let told = "no checkpoint, the one before is still being written";
    assert!(logs.contains(told), "{logs}");
    let verified = ask(&dir, &["checkpoint", "verify", "small"]).expect_code(0).stdout;
    assert!(verified.contains("step 600: ok"), "{verified}");
}
