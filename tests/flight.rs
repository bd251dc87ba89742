//! `cluster flight` says which rank the others wait for while the job hangs, and what the survivors
//! were doing when it has failed.

mod common;

use std::path::Path;

use common::{Finished, Running, cluster, eventually, run, small_job, up};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// Long enough to be looked at; no test lets it end.
const ENDLESS: [&str; 2] = ["stop.max_steps=1000000", "checkpoint.every_steps=1000000"];

fn ask(dir: &Path, args: &[&str]) -> Finished {
    let mut command = cluster();
    run(command.args(args).arg("--dir").arg(dir))
}

/// Submits the job of `ranks` ranks, which no failure restarts, and follows it.
fn follow_job(folder: &Path, dir: &Path, ranks: u32) -> Running {
    // However long it is looked at while a rank is frozen, nobody calls that a hang.
    let recovery = "[recovery]\nmax_failures = 0\nhang_min = \"0s\"\n";
    let extra = format!("[resources]\nranks = {ranks}\n{recovery}");
    let mut submit = cluster();
    submit.arg("submit").arg(small_job(folder, &extra)).args(["--json", "--follow", "--dir"]);
    submit.arg(dir);
    for set in ENDLESS {
        submit.arg("--set").arg(set);
    }
    Running::start(&mut submit)
}

fn findings<'a>(report: &'a Value, kind: &str) -> Vec<&'a Value> {
    let all = report["findings"].as_array().expect("a list");
    all.iter().filter(|finding| finding["finding"] == kind).collect()
}

#[test]
fn a_frozen_rank_is_named_and_the_survivors_of_a_killed_one_leave_their_logs() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, "[worker]\nstopped_rank_timeout = \"0s\"\n").expect("written");
    let config = config.to_str().expect("UTF-8");
    let up = up(&dir, &["--workers", "1", "--config", config]);
    ask(&dir, &["flight", "small"]).expect_code(3);
    let mut following = follow_job(folder.path(), &dir, 2);
    following.wait_for_step(3);

    // Healthy: every rank answers.
    let report = ask(&dir, &["flight", "small", "--json"]).expect_code(0).last_json();
    for rank in [0, 1] {
        let flight = &report["ranks"][rank];
        assert_eq!(flight["source"], "live", "{report}");
        assert!(flight["log"]["recorded"].as_u64() > Some(3), "{report}");
        assert_eq!(flight["log"]["groups"][0]["name"], "data", "{report}");
        let tag = flight["log"]["tag"].as_str().expect("a tag");
        assert!(tag.contains("step"), "{tag}");
    }
    assert!(findings(&report, "silent").is_empty(), "{report}");
    let table = ask(&dir, &["flight", "small", "--rank", "1"]).expect_code(0).stdout;
    assert!(table.contains("reduce-lanes f32"), "{table}");
    ask(&dir, &["flight", "small", "--rank", "2"]).expect_code(3);
    ask(&dir, &["flight", "small", "--generation", "9"]).expect_code(2);

    // Frozen: rank 0 answers although it is blocked, and the rank that it waits for is named.
    let ranks = up.ranks();
    let pid = |rank: u32| ranks.iter().find(|(known, _)| *known == rank).expect("it runs").1;
    kill(pid(1), Signal::SIGSTOP).expect("it runs");
    let report = eventually("rank 0 waits", || {
        let report = ask(&dir, &["flight", "small", "--json"]).expect_code(0).last_json();
        // A signal is on its way for a while, in which the rank still answers.
        let found = ["waiting", "silent"].iter().all(|kind| !findings(&report, kind).is_empty());
        found.then_some(report)
    });
    assert_eq!(findings(&report, "silent")[0]["rank"], 1, "{report}");
    let waiting = findings(&report, "waiting")[0];
    assert_eq!(waiting["ranks"], serde_json::json!([0]), "{report}");
    assert_eq!(waiting["behind"][0]["rank"], 1, "{report}");
    let text = ask(&dir, &["flight", "small"]).expect_code(0).stdout;
    assert!(text.contains("rank 1 has no flight log: its process "), "{text}");
    assert!(text.contains("is stopped by a signal"), "{text}");
    assert!(text.contains("group `data`: rank 0 waits in #"), "{text}");

    // Killed, with no restart left: the survivor's log was kept.
    kill(pid(1), Signal::SIGKILL).expect("it runs");
    following.finish().expect_code(7);
    let report = eventually("the survivor's log", || {
        let asked = ask(&dir, &["flight", "small", "--json"]);
        (asked.code == 0).then(|| asked.last_json())
    });
    assert_eq!(report["phase"], "failed", "{report}");
    assert_eq!(report["ranks"][0]["source"], "kept", "{report}");
    assert!(!report["ranks"][0]["log"]["ending"].is_null(), "{report}");
    let silent = findings(&report, "silent")[0];
    assert_eq!(silent["rank"], 1, "{report}");
    assert!(silent["why"].as_str().is_some_and(|why| why.contains("SIGKILL")), "{report}");
    assert!(!findings(&report, "waiting").is_empty(), "{report}");
    let kept = dir.join("store/jobs/small/flight/g1/r0.json");
    assert!(kept.exists(), "{}", kept.display());
}

#[test]
fn a_job_that_has_not_run_and_one_that_does_not_exist_say_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let _up = up(&dir, &["--workers", "1"]);
    // More ranks than slots: it never runs.
    let mut following = follow_job(folder.path(), &dir, 8);
    following.wait_for("queued", |event| event["phase"] == "queued");
    let asked = ask(&dir, &["flight", "small"]).expect_code(4);
    assert!(asked.stderr.contains("job `small` has not run yet"), "{asked:?}");
    let asked = ask(&dir, &["flight", "smal"]).expect_code(3);
    assert!(asked.stderr.contains("did you mean `small`?"), "{asked:?}");
}
