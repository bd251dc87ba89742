//! A gang that does not move is looked at: who holds it up is found by the flight logs, named with what
//! its threads were in, and replaced; a rank that is merely slow is named, or replaced, as the job says.
//! Through the shipped binary.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{
    Finished, Running, cluster, eventually, run, small_job, submit, submit_local, up,
    up_with_slots, weights_digest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A cluster whose workers do not look for stopped ranks themselves: the watchdog has to find them.
fn blind_cluster(folder: &Path, extra: &[&str]) -> (Running, PathBuf) {
    let config = folder.join("cluster.toml");
    std::fs::write(&config, "[worker]\nstopped_rank_timeout = \"0s\"\n").expect("written");
    let dir = folder.join("cluster");
    let config = config.to_str().expect("UTF-8");
    let up = up(&dir, &[&["--workers", "1", "--config", config], extra].concat());
    (up, dir)
}

fn ask(dir: &Path, args: &[&str]) -> Finished {
    let mut command = cluster();
    run(command.args(args).arg("--dir").arg(dir))
}

fn pid_of(ranks: &[(u32, Pid)], rank: u32) -> Pid {
    ranks.iter().find(|(known, _)| *known == rank).expect("it runs").1
}

fn is_running(event: &Value, generation: u64) -> bool {
    event["event"] == "status"
        && event["phase"] == "running"
        && event["generation"].as_u64() >= Some(generation)
}

fn history(job: &Value) -> Vec<&str> {
    let moments = job["status"]["history"].as_array().expect("a history");
    moments.iter().filter_map(|moment| moment["text"].as_str()).collect()
}

#[test]
fn the_rank_that_the_others_wait_for_is_found_named_and_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    // Longer than a busy machine keeps a rank waiting.
    let job = small_job(folder.path(), "[resources]\nranks = 2\n[recovery]\nhang_min = \"3s\"\n");
    let steps = ["stop.max_steps=300", "checkpoint.every_steps=0"];
    let undisturbed = run(&mut submit_local(&job, &folder.path().join("undisturbed"), &steps));
    let expected = weights_digest(&undisturbed.expect_code(0));

    let (up, dir) = blind_cluster(folder.path(), &[]);
    let mut following = submit(&job, &dir, &steps);
    following.wait_for_step(20);
    let ranks = up.ranks();
    let (survivor, victim) = (pid_of(&ranks, 0), pid_of(&ranks, 1));
    kill(victim, Signal::SIGSTOP).expect("it runs");
    let status = following.wait_for("the next generation", |event| is_running(event, 2));
    let cause = &status["first_cause"];
    assert_eq!(cause["rank"], 1, "{status}");
    let reason = cause["cause"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("the gang hangs, and this rank holds it up"), "{reason}");
    assert!(reason.contains(&format!("its process {victim} is stopped by a signal")), "{reason}");
    assert_eq!(status["regroups"], 1, "in place: {status}");
    following.finish().expect_code(0);

    let job = ask(&dir, &["job", "small", "--json"]).expect_code(0).last_json();
    assert_eq!(job["status"]["model"]["sha256"], expected.as_str(), "{job}");
    assert!(history(&job).iter().any(|text| text.contains("this rank holds it up")), "{job}");
    let text = ask(&dir, &["job", "small"]).expect_code(0).stdout;
    assert!(text.contains("rank 1 on") && text.contains("the gang hangs"), "{text}");

    // A stopped process cannot say what its threads are in: the kernel did.
    let report = ask(&dir, &["flight", "small", "--json"]).expect_code(0).last_json();
    let dumps = report["stacks"].as_array().expect("a list");
    assert_eq!(dumps.len(), 1, "of the one that was replaced: {report}");
    let dump = &dumps[0];
    assert_eq!((&dump["rank"], &dump["generation"]), (&1.into(), &1.into()), "{dump}");
    assert_eq!(dump["pid"], victim.as_raw(), "not {survivor}: {dump}");
    assert!(dump["absent"].as_str().is_some_and(|why| why.contains("is stopped")), "{dump}");
    let threads = dump["threads"].as_array().expect("a list");
    assert_eq!(threads[0]["id"], victim.as_raw(), "{dump}");
    assert!(threads.iter().all(|thread| thread["state"] == "stopped by a signal"), "{dump}");
    assert!(threads.iter().any(|thread| thread["name"] == "control"), "{dump}");
    let text = ask(&dir, &["flight", "small"]).expect_code(0).stdout;
    let named = format!("threads of rank 1 of generation 1 on {}, process {victim}", host());
    assert!(text.contains(&named), "{text}");
    assert!(text.contains("stopped by a signal"), "{text}");
    // Of a generation in which nobody was replaced there are none.
    let asked = ask(&dir, &["flight", "small", "--generation", "2", "--json"]);
    assert!(asked.code != 0 || asked.last_json()["stacks"] == serde_json::json!([]), "{asked:?}");
}

fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name").trim().to_owned()
}

#[test]
fn ranks_say_what_their_threads_are_in_while_they_wait() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = small_job(folder.path(), "[resources]\nranks = 2\n[recovery]\nhang_min = \"0s\"\n");
    let (up, dir) = blind_cluster(folder.path(), &[]);
    let endless = ["stop.max_steps=1000000", "checkpoint.every_steps=0"];
    let mut following = submit(&job, &dir, &endless);
    following.wait_for_step(3);
    let ranks = up.ranks();
    kill(pid_of(&ranks, 1), Signal::SIGSTOP).expect("it runs");
    // Rank 0 is on its way to where it has to wait.
    let report = eventually("rank 0 waits in a collective", || {
        let asked = ask(&dir, &["flight", "small", "--stacks", "--json"]).expect_code(0);
        let report = asked.last_json();
        let stacks = report["stacks"].as_array().expect("a list").clone();
        let waits = stacks
            .iter()
            .find(|dump| dump["rank"] == 0)
            .is_some_and(|dump| frames(dump).iter().any(|frame| frame.contains("collective/src/")));
        (waits && stacks.len() == 2).then_some(report)
    });
    let waiting = &report["stacks"][0];
    assert_eq!(waiting["absent"], "", "{waiting}");
    let frames = frames(waiting);
    // In the step or after it, as the other was when it was stopped.
    for expected in ["steps (trainer/src/train.rs:", "read_orders (api/src/control.rs:"] {
        assert!(frames.iter().any(|frame| frame.starts_with(expected)), "{expected}: {frames:#?}");
    }
    let stopped = &report["stacks"][1];
    assert!(stopped["absent"].as_str().is_some_and(|why| why.contains("is stopped")), "{stopped}");
    let text = ask(&dir, &["flight", "small", "--stacks", "--rank", "0"]).expect_code(0).stdout;
    assert!(text.contains("threads of rank 0 of generation 1"), "{text}");
    assert!(text.contains("(trainer/src/train.rs:"), "{text}");
    // It costs a process nothing to have been asked.
    kill(pid_of(&ranks, 1), Signal::SIGCONT).expect("it runs");
    following.wait_for_step(20);
    assert_eq!(up.ranks(), ranks);
    ask(&dir, &["flight", "small", "--stacks", "--generation", "1"]).expect_code(2);
}

/// All functions on the stacks of a dump, with their files and lines.
fn frames(dump: &Value) -> Vec<String> {
    let threads = dump["threads"].as_array().expect("a list");
    let frames = threads.iter().flat_map(|thread| thread["frames"].as_array().expect("a list"));
    let text = |frame: &Value, key: &str| frame[key].as_str().unwrap_or_default().to_owned();
    frames
        .map(|frame| {
            format!("{} ({}:{})", text(frame, "function"), text(frame, "file"), frame["line"])
        })
        .collect()
}

/// A process that gets a fifth of its time, in slices that are short against a step.
struct Slowed {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Slowed {
    fn begin(pid: Pid) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // It may be replaced meanwhile, and be gone.
            while !stopped.load(Ordering::Relaxed) && kill(pid, Signal::SIGSTOP).is_ok() {
                std::thread::sleep(Duration::from_millis(8));
                let _ = kill(pid, Signal::SIGCONT);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(std::thread::JoinHandle::join));
    }
}

#[test]
fn a_slow_rank_is_named_and_replaced_where_the_job_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    // Steps of some ten milliseconds and more: several slices each.
    let extra = "[resources]\nranks = 2\n[recovery]\nstraggler_min = \"1s\"\n";
    let job = small_job(folder.path(), extra);
    let sets = ["stop.max_steps=1000000", "checkpoint.every_steps=0", "batch.global=64"];
    // With the workers' own look for stopped processes: this one is none, even where a busy machine
    // gives it next to no time.
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, "[worker]\nstopped_rank_timeout = \"60s\"\n").expect("written");
    let config = config.to_str().expect("UTF-8");
    let dir = folder.path().join("cluster");
    let up = up_with_slots(&dir, 3, &["--workers", "1", "--config", config]);

    let mut following = submit(&job, &dir, &[&sets[..], &["name=\"told\""]].concat());
    following.wait_for_step(3);
    let ranks = up.ranks();
    let slowed = Slowed::begin(pid_of(&ranks, 1));
    let named = |event: &Value| {
        let text = event["text"].as_str().unwrap_or_default();
        event["rank"] == 1 && text.contains("times as slow as the median of the ranks")
    };
    following.wait_for("the slow rank is named", named);
    drop(slowed);
    let shown = ask(&dir, &["job", "told", "--json"]).expect_code(0).last_json();
    let told = "recovery.stragglers = \"replace\" would replace it";
    assert!(history(&shown).iter().any(|text| text.contains(told)), "{shown}");
    assert_eq!(shown["status"]["restarts"], 0, "{shown}");
    assert_eq!(up.ranks(), ranks, "told is all");
    ask(&dir, &["stop", "told"]).expect_code(0);
    following.finish();

    let replace = ["name=\"replaced\"", "recovery.stragglers=\"replace\""];
    let mut following = submit(&job, &dir, &[&sets[..], &replace].concat());
    following.wait_for_step(3);
    let ranks = up.ranks();
    let slow = pid_of(&ranks, 1);
    let _slowed = Slowed::begin(slow);
    let status = following.wait_for("another takes its place", |event| is_running(event, 2));
    assert_eq!(status["failures"], 0, "to replace is no failure: {status}");
    assert_eq!(status["regroups"], 1, "between two steps: {status}");
    let shown = ask(&dir, &["job", "replaced", "--json"]).expect_code(0).last_json();
    assert_eq!(shown["status"]["goodput"]["steps_redone"], 0, "{shown}");
    assert!(history(&shown).iter().any(|text| text.contains("is replaced")), "{shown}");
    eventually("the slow process is gone", || {
        let pids = up.ranks().into_iter().map(|(_, pid)| pid).collect::<Vec<_>>();
        (!pids.contains(&slow) && pids.contains(&pid_of(&ranks, 0))).then_some(())
    });
}
