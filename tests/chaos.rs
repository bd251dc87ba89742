//! Faults on purpose, through the shipped binary: what they do to a cluster, that they are undone,
//! and what is refused.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Instant;

use common::moto::{self, Moto};
use common::{Running, cluster, eventually, free_ports, repository, roles, run, small_job, up};
use nix::sys::signal::Signal;
use serde_json::Value;

/// The small job on one or two ranks, long enough to be disturbed.
fn submit(folder: &Path, dir: &Path, steps: u64) {
    let job = small_job(folder, "");
    let mut command = cluster();
    command.arg("submit").arg(job).arg("--dir").arg(dir);
    let steps = format!("stop.max_steps={steps}");
    for set in ["resources.ranks={ min = 1, max = 2 }", "recovery.max_failures=100", steps.as_str()]
    {
        command.args(["--set", set]);
    }
    run(&mut command).expect_code(0);
}

fn documents(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[test]
fn a_job_that_is_struck_again_and_again_succeeds() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let _cluster = up(&dir, &[]);
    submit(folder.path(), &dir, 800);
    let mut follow = cluster();
    follow.args(["follow", "small", "--json", "--dir"]).arg(&dir);
    let mut follow = Running::start(&mut follow);
    follow.wait_for_step(3);
    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--seed", "1", "--faults", "kill,freeze", "--json"]);
    strikes.args(["--duration", "10s", "--every", "1s", "--dir"]).arg(&dir);
    let ended = run(&mut strikes).expect_code(0);
    let documents = documents(&ended.stdout);
    assert_eq!(documents[0]["event"], "plan");
    let faults: Vec<&Value> = documents.iter().filter(|d| d["event"] == "fault").collect();
    let last = documents.last().expect("the end");
    assert_eq!(last["event"], "end", "{ended:?}");
    assert_eq!(
        last["struck"].as_u64().zip(last["missed"].as_u64()).map(|(s, m)| s + m),
        Some(faults.len() as u64),
        "{ended:?}"
    );
    assert!(last["struck"].as_u64() >= Some(1), "{ended:?}");
    assert!(last["restarts"].as_u64() >= Some(1), "{ended:?}");
    assert!(last["goodput"].as_f64() > Some(0.0), "{ended:?}");
    // As planned: the same seed, the same faults in the same order.
    let planned = documents[0]["strikes"].as_array().expect("a plan");
    for (fault, planned) in faults.iter().zip(planned) {
        assert_eq!(&fault["strike"], planned, "{ended:?}");
    }
    follow.finish().expect_code(0);
    let mut show = cluster();
    show.args(["job", "small", "--json", "--dir"]).arg(&dir);
    let job = run(&mut show).expect_code(0).last_json();
    assert_eq!(job["status"]["phase"], "succeeded", "{job}");
}

#[test]
fn what_is_stopped_for_good_goes_on_when_the_run_is_broken_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    // Nobody else ends what is stopped.
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, "[worker]\nstopped_rank_timeout = \"0s\"\n").expect("written");
    let _cluster = up(&dir, &["--config", config.to_str().expect("UTF-8")]);
    // Without an end of its own: the run is broken off while the job goes on.
    submit(folder.path(), &dir, 1_000_000);
    let mut follow = cluster();
    follow.args(["follow", "small", "--json", "--dir"]).arg(&dir);
    Running::start(&mut follow).wait_for_step(3);
    // Ctrl-C, the end of the terminal, Ctrl-\.
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let mut strikes = cluster();
        strikes.args(["chaos", "run", "--faults", "stop,slow", "--json", "--every", "100ms"]);
        strikes.args(["--duration", "1h", "--dir"]).arg(&dir);
        let mut strikes = Running::start(&mut strikes);
        let fault = strikes.wait_for("a stop", |event| {
            event["event"] == "fault"
                && event["strike"]["kind"] == "stop"
                && !event["pid"].is_null()
        });
        let struck = fault["pid"].as_i64().expect("a number");
        eventually("it stands still", || (state(struck) == Some('T')).then_some(()));
        strikes.signal(signal);
        let ended = strikes.finish().expect_code(130);
        let last = ended.last_json();
        assert_eq!((&last["event"], &last["broken_off"]), (&"end".into(), &true.into()), "{last}");
        eventually(&format!("process {struck} goes on after {signal}"), || {
            let state = state(struck).expect("the very process that was stopped");
            (state != 'T').then_some(())
        });
    }
}

/// A process's state as /proc has it; none once it is gone.
fn state(pid: i64) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// The living processes that a process has started.
fn children(parent: nix::unistd::Pid) -> Vec<i64> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i64>().ok());
    let is_child = |pid: &i64| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

fn assert_gone(processes: &[i64]) {
    assert_eq!(processes.len(), 3, "a coordinator and two workers");
    for pid in processes {
        eventually(&format!("process {pid} is gone"), || {
            state(*pid).is_none_or(|state| state == 'Z').then_some(())
        });
    }
}

/// A replay at true scale of two nodes that stay, which lasts until it is ended.
fn endless_replay(folder: &Path) -> std::process::Command {
    let trace = folder.join("trace.json");
    let text = "{\"metadata\": {\"gap_seconds\": 3600}, \"data\": [2]}";
    std::fs::write(&trace, text).expect("written");
    let mut replay = cluster();
    replay.args(["chaos", "replay", "--json", "--scale", "true"]).arg(&trace);
    replay.env("TMPDIR", folder);
    replay
}

#[test]
fn a_replay_that_is_killed_leaves_no_process_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut replay = Running::start(&mut endless_replay(folder.path()));
    replay.wait_for("its job runs", |event| event["event"] == "job" && event["phase"] == "running");
    let started = children(replay.pid());
    replay.kill();
    assert_gone(&started);
}

#[test]
fn a_replay_that_nobody_reads_any_more_ends_with_all_it_has_started() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut replay = endless_replay(folder.path());
    replay.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut replay = replay.spawn().expect("it starts");
    let mut reader = BufReader::new(replay.stdout.take().expect("piped"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("it prints");
    assert!(line.contains("\"nodes\":2"), "{line}");
    let started = children(nix::unistd::Pid::from_raw(replay.id() as i32));
    drop(reader);
    let ended = replay.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(141), "as SIGPIPE would end it: {ended:?}");
    assert_gone(&started);
}

#[test]
fn a_replay_whose_job_has_failed_says_so_by_its_code() {
    let folder = tempfile::tempdir().expect("a folder");
    // What it reads is this command's own: the ranks have no such file, and no other attempt helps.
    let job = small_job(folder.path(), "");
    let text = std::fs::File::open(folder.path().join("text.txt")).expect("written");
    let spec = std::fs::read_to_string(&job).expect("written");
    let spec = spec.replace("file://text.txt", "file:///proc/self/fd/0");
    std::fs::write(&job, spec).expect("written");
    let mut replay = endless_replay(folder.path());
    // A minute, if it does not fail.
    let ended = replay.args(["--speed", "60", "--job"]).arg(job).stdin(text).output();
    let ended = ended.expect("it starts");
    assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    let told = documents(&String::from_utf8_lossy(&ended.stdout));
    let last = told.last().expect("the end");
    assert_eq!((&last["event"], &last["phase"]), (&"end".into(), &"failed".into()), "{last}");
    let mut fast = endless_replay(folder.path());
    let refused = run(fast.args(["--speed", "1e-20"])).expect_code(2);
    assert!(refused.stderr.contains("more than ten years"), "{refused:?}");
}

fn is_stopped(pid: nix::unistd::Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('T')
}

#[test]
fn a_disk_is_filled_for_a_while_and_then_empty_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let _cluster = up(&dir, &[]);
    submit(folder.path(), &dir, 1_000_000);
    let fill = folder.path().join("fill");
    std::fs::create_dir(&fill).expect("made");
    let bytes: u64 = 3 << 20;
    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--faults", "fill-disk", "--json", "--every", "100ms"]);
    strikes.args(["--duration", "1h", "--fill-bytes", "3MiB", "--fill"]).arg(&fill);
    let mut strikes = Running::start(strikes.arg("--dir").arg(&dir));
    strikes.wait_for("a fault", |event| event["event"] == "fault" && event["missed"].is_null());
    let files = || {
        let entries = std::fs::read_dir(&fill).expect("it is there").flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).collect::<Vec<u64>>()
    };
    eventually("a file of the size that was asked for", || files().contains(&bytes).then_some(()));
    strikes.signal(Signal::SIGTERM);
    assert_eq!(strikes.finish().code, 130);
    assert_eq!(files(), [0u64; 0], "it is gone with the run");
}

#[test]
fn coordinators_are_killed_as_long_as_a_majority_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    roles::make_certificates(folder);
    let ports = free_ports(3);
    let config =
        |node| roles::write_config(folder, &format!("c{node}"), node, ("127.0.0.1", &ports), "");
    let mut coordinators = [1, 2, 3].map(|node| roles::start_coordinator(&config(node)));
    let _worker = roles::start_worker(folder, "w1", 2, &ports);
    let client = config(1);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--config").arg(&client))
    };
    eventually("a worker", || {
        let listed = ask(&["workers"]);
        (listed.code == 0 && listed.stdout.lines().count() == 1).then_some(())
    });
    let mut job = cluster();
    job.arg("submit").arg(small_job(folder, "[resources]\nranks = 2\n"));
    job.args(["--json", "--follow", "--set", "stop.max_steps=1500", "--config"]).arg(&client);
    let mut following = Running::start(&mut job);
    following.wait_for_step(3);

    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--faults", "kill-coordinator", "--json", "--every", "200ms"]);
    strikes.args(["--duration", "1h", "--config"]).arg(&client);
    let ended = run(&mut strikes).expect_code(0);
    let documents = documents(&ended.stdout);
    let end = documents.last().expect("the end");
    assert_eq!((&end["event"], &end["struck"]), (&"end".into(), &1.into()), "{ended:?}");
    let faults = documents.iter().filter(|document| document["event"] == "fault");
    let missed: Vec<&str> = faults.filter_map(|fault| fault["missed"].as_str()).collect();
    assert!(!missed.is_empty(), "{ended:?}");
    assert!(missed.iter().all(|why| why.contains("no majority would be left")), "{missed:?}");
    assert_eq!((&end["phase"], &end["restarts"]), (&"succeeded".into(), &0.into()), "{end}");
    following.finish().expect_code(0);
    let living = coordinators.iter_mut().filter_map(|one| one.is_running().then_some(())).count();
    assert_eq!(living, 2);

    // What was killed comes back to the others when it is started again.
    let gone = coordinators.iter_mut().position(|one| !one.is_running()).expect("one was killed");
    let _back = roles::start_coordinator(&config(gone + 1));
    let alone = roles::write_config(folder, "alone", 1, ("127.0.0.1", &ports[gone..=gone]), "");
    eventually("it answers, and follows or leads", || {
        let mut status = cluster();
        let status = run(status.args(["status", "--json", "--config"]).arg(&alone));
        let status = (status.code == 0).then(|| status.last_json())?;
        (status["node"] == gone as u64 + 1 && status["leader"].as_u64() > Some(0)).then_some(())
    });
}

#[test]
fn the_store_s_server_is_slowed_down_and_goes_on_afterwards() {
    let Some(server) = Moto::start() else { return };
    server.make_bucket("throttled");
    let folder = tempfile::tempdir().expect("a folder");
    let config = moto::config(folder.path(), &server.address, "throttled");
    let dir = folder.path().join("cluster");
    let config = config.to_str().expect("UTF-8");
    let _cluster = up(&dir, &["--config", config]);
    submit(folder.path(), &dir, 300);
    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--faults", "throttle-store", "--json", "--every", "500ms"]);
    strikes.args(["--duration", "1h", "--dir"]).arg(&dir);
    let mut strikes = Running::start(&mut strikes);
    let own = server.pid().as_raw();
    strikes
        .wait_for("its server is struck", |event| event["event"] == "fault" && event["pid"] == own);
    eventually("it is stopped now and then", || is_stopped(server.pid()).then_some(()));
    let ended = strikes.finish().expect_code(0);
    let end = ended.last_json();
    assert_eq!((&end["phase"], &end["restarts"]), (&"succeeded".into(), &0.into()), "{ended:?}");
    eventually("it goes on", || (!is_stopped(server.pid())).then_some(()));
    let mut verify = cluster();
    run(verify.args(["checkpoint", "verify", "small", "--dir"]).arg(&dir)).expect_code(0);
}

#[test]
fn what_cannot_be_done_here_is_refused_and_nothing_is_done() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("cluster");
    let _cluster = up(&dir, &[]);
    let chaos = |arguments: &[&str]| {
        let mut command = cluster();
        command.args(["chaos", "run", "--dir"]).arg(&dir).args(arguments);
        run(&mut command)
    };
    let nothing = chaos(&[]).expect_code(3);
    assert!(nothing.stderr.contains("no job runs: nothing to strike"), "{nothing:?}");
    submit(folder.path(), &dir, 1_000_000);
    for (arguments, expected) in [
        (&["--faults", "kill,cut"][..], "--faults cut: no worker here has a network namespace"),
        (&["--faults", "kill-coordinator"], "all roles of this cluster are one process"),
        (&["--faults", "throttle-store"], "the object store is not a server on this host"),
        (&["--faults", "fill-disk"], "--fill names no folder"),
        (&["--faults", "fill-disk", "--fill", "/no/such"], "`/no/such` is no folder"),
        (&["--roles", "worker"], "no worker of this cluster is a process of its own here"),
        (&["--every", "1ms"], "--every 1ms: expected at least 10ms"),
        (&["--faults", "explode"], "`explode` is no fault: expected kill, stop, freeze"),
        (&["--duration", "soon"], "`soon` is not a duration"),
    ] {
        let refused = chaos(arguments).expect_code(2);
        assert!(refused.stderr.contains(expected), "{arguments:?}: {}", refused.stderr);
    }
    let missing = chaos(&["--job", "other"]).expect_code(3);
    assert!(missing.stderr.contains("other"), "{missing:?}");
    let dry = chaos(&["--dry-run", "--duration", "1h", "--every", "10m", "--seed", "3"]);
    let again = chaos(&["--dry-run", "--duration", "1h", "--every", "10m", "--seed", "3"]);
    assert_eq!(dry.expect_code(0).stdout, again.expect_code(0).stdout);
}

#[test]
fn a_trace_is_worked_out_and_samples_are_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut sample = cluster();
    sample.args(["chaos", "sample", "--output"]).arg(folder.path());
    run(&mut sample).expect_code(0);
    for name in ["sky-16.json", "parcae-hh.txt", "parcae-hl.txt", "parcae-lh.txt", "parcae-ll.txt"]
    {
        let made = std::fs::read(folder.path().join(name)).expect(name);
        let kept = std::fs::read(repository("examples/traces").join(name)).expect(name);
        assert!(made == kept, "{name} is not what the example is");
    }
    let mut simulate = cluster();
    simulate.args(["chaos", "replay", "--simulate"]).arg(folder.path().join("parcae-hh.txt"));
    let table = run(&mut simulate).expect_code(0).stdout;
    for policy in ["restart all, checkpoint every 30 min", "migrate in 20 s", "cohort, noticed"] {
        assert!(table.contains(policy), "{table}");
    }
    let mut simulate = cluster();
    simulate.args(["chaos", "replay", "--simulate", "--json", "--shrink", "1s"]);
    simulate.arg(folder.path().join("sky-16.json"));
    let document = run(&mut simulate).expect_code(0).last_json();
    let goodput: Vec<f64> = document["policies"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["goodput"].as_f64().expect("a number"))
        .collect();
    assert_eq!(goodput.len(), 8, "{document}");
    assert!(goodput[..6].is_sorted(), "{goodput:?}");
    let bad = folder.path().join("bad.txt");
    std::fs::write(&bad, "[0, \"add\", {}]").expect("written");
    let refused = run(cluster().args(["chaos", "replay"]).arg(&bad)).expect_code(2);
    assert!(refused.stderr.contains("bad.txt`: line 1: column 13: missing field"), "{refused:?}");
}

#[test]
fn a_replay_refuses_what_would_say_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let scratch = folder.path().join("scratch");
    std::fs::create_dir(&scratch).expect("made");
    let trace = folder.path().join("trace.json");
    let replay = |gap: u64, arguments: &[&str]| {
        let text = format!("{{\"metadata\": {{\"gap_seconds\": {gap}}}, \"data\": [2, 1]}}");
        std::fs::write(&trace, text).expect("written");
        let mut replay = cluster();
        replay.args(["chaos", "replay"]).arg(&trace).args(arguments).env("TMPDIR", &scratch);
        run(&mut replay).expect_code(2).stderr
    };
    for arguments in [&["--simulate"][..], &["--scale", "simulate"]] {
        let more = ["--speed", "20", "--notice", "10s", "--job", "/no/such", "--seed", "2"];
        let refused = replay(6, &[arguments, &more].concat());
        let expected = "--job, --speed, --notice, --seed: for --scale true only";
        assert!(refused.contains(expected), "{refused}");
    }
    let refused = replay(3600, &["--notice", "10s"]);
    assert!(refused.contains("--notice: for --scale true only"), "{refused}");
    assert!(refused.contains("which a trace of this length gets by default"), "{refused}");
    let refused = replay(6, &["--shrink", "1s"]);
    assert!(refused.contains("--shrink: for --scale simulate only"), "{refused}");
    let refused = replay(6, &["--job", "/no/such"]);
    assert!(refused.contains("cannot read `/no/such`"), "{refused}");
    assert_eq!(std::fs::read_dir(&scratch).expect("there").count(), 0, "no folder is left");
}

#[test]
fn nodes_that_leave_on_notice_take_no_step_with_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace.json");
    let text = "{\"metadata\": {\"gap_seconds\": 6}, \"data\": [2, 1]}";
    std::fs::write(&trace, text).expect("written");
    let mut replay = cluster();
    replay.args(["chaos", "replay", "--json", "--notice", "2m"]).arg(&trace);
    let ended = run(&mut replay).expect_code(0);
    let documents = documents(&ended.stdout);
    let counts: Vec<u64> = documents.iter().filter_map(|d| d["nodes"].as_u64()).collect();
    assert_eq!(counts, [2, 1], "{ended:?}");
    let last = documents.last().expect("the end");
    assert_eq!((&last["phase"], &last["failures"]), (&"stopped".into(), &0.into()), "{last}");
    assert_eq!(last["rank_time"]["steps_redone"], 0, "{last}");
    assert_eq!(last["rank_time"]["lost_ms"], 0, "{last}");
}

#[test]
fn nodes_come_and_go_under_a_job_at_true_scale() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("trace.json");
    let text = "{\"metadata\": {\"gap_seconds\": 6}, \"data\": [2, 1, 2]}";
    std::fs::write(&trace, text).expect("written");
    let mut replay = cluster();
    replay.args(["chaos", "replay", "--json"]).arg(&trace);
    let begin = Instant::now();
    let ended = run(&mut replay).expect_code(0);
    let documents = documents(&ended.stdout);
    let counts: Vec<u64> = documents.iter().filter_map(|d| d["nodes"].as_u64()).collect();
    assert_eq!(counts, [2, 1, 2], "{ended:?}");
    let last = documents.last().expect("the end");
    assert_eq!(last["phase"], "stopped", "{ended:?}");
    let nodes = last["node_seconds"].as_f64().expect("a number");
    // 5 × 6, and what a busy machine takes longer: never more than two at once.
    let bound = 2.0 * begin.elapsed().as_secs_f64();
    assert!((29.0..bound).contains(&nodes), "of at most {bound} node-seconds: {last}");
    let goodput = last["goodput_of_nodes"].as_f64().expect("a number");
    assert!(goodput > 0.0 && goodput <= 1.0, "{last}");
}
