//! `cluster bench collective` through the shipped binary: real processes, small sizes.

mod common;

use std::path::Path;

use common::{Finished, Running, cluster, eventually, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Finished {
    run(cluster().args(["bench", "collective"]).args(arguments))
}

fn small(arguments: &[&str]) -> Finished {
    let few = ["--ranks", "2", "--iterations", "3", "--warmup", "1"];
    bench(&[&few[..], arguments].concat())
}

fn rows(report: &Value) -> Vec<Value> {
    report["rows"].as_array().expect("rows").clone()
}

#[test]
fn every_operation_is_measured_over_tcp() {
    let finished = small(&["--transport", "tcp", "--sizes", "4KiB,40004B", "--json"]);
    let report = finished.expect_code(0).last_json();
    assert_eq!(
        (report["dtype"].as_str(), report["reduction"].as_str(), report["loop"].as_str()),
        (Some("f32"), Some("deterministic"), Some("barrier"))
    );
    let rows = rows(&report);
    let seen: Vec<(&str, u64)> = rows
        .iter()
        .map(|row| (row["op"].as_str().expect("an op"), row["bytes"].as_u64().expect("bytes")))
        .collect();
    let mut expected = Vec::new();
    for op in ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"] {
        // 10,001 elements do not divide among two ranks.
        let second = if op == "all_to_all" { 40_000 } else { 40_004 };
        expected.extend([(op, 4096), (op, second)]);
    }
    expected.push(("barrier", 0));
    assert_eq!(seen, expected);
    for row in &rows {
        let figure = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        assert_eq!((row["ranks"].as_u64(), row["transport"].as_str()), (Some(2), Some("tcp")));
        assert_eq!(row["iterations"].as_u64(), Some(3));
        assert!(figure("median_rank0") > 0.0, "{row}");
        assert!(figure("latency") <= figure("p10") && figure("p10") <= figure("median"), "{row}");
        assert!(figure("median") <= figure("p90"), "{row}");
        let rate = figure("bytes") / figure("median");
        assert!((figure("algorithm_bandwidth") - rate).abs() <= 1e-6 * rate, "{row}");
    }
    let bus = |row: &Value| row["bus_bandwidth"].as_f64().expect("a figure");
    assert_eq!(bus(&rows[0]), rows[0]["algorithm_bandwidth"].as_f64().expect("a figure"));
}

#[test]
fn processes_are_measured_as_if_on_several_hosts() {
    let finished = bench(&[
        "--ops",
        "all_reduce,broadcast,barrier",
        "--sizes",
        "300KiB",
        "--ranks",
        "3,4",
        "--hosts",
        "2",
        "--iterations",
        "3",
        "--json",
    ]);
    let report = finished.expect_code(0).last_json();
    let rows = rows(&report);
    assert_eq!(rows.len(), 2 * 3, "{report}");
    assert!(rows.iter().all(|row| row["transport"] == "shm+tcp"), "{report}");
}

#[test]
fn bare_limits_stand_beside_the_figures() {
    let arguments = ["--ops", "all_reduce,broadcast,barrier", "--sizes", "64KiB", "--floor"];
    let report = small(&[&arguments[..], &["--json"]].concat()).expect_code(0).last_json();
    for row in rows(&report) {
        assert!(row["floor"]["median"].as_f64() > Some(0.0), "{row}");
        assert!(row["floor"]["ratio"].as_f64() > Some(0.0), "{row}");
    }
    let copy = &report["copy"][0];
    assert!(copy["one"].as_f64() > Some(0.0) && copy["together"].as_f64() > Some(0.0), "{copy}");
    let printed = small(&arguments).expect_code(0);
    for text in ["copying memory", "OPERATION", "BARE EXCHANGE", "all_reduce", "64KiB"] {
        assert!(printed.stdout.contains(text), "`{text}` is missing: {printed:?}");
    }
    // Progress is for people and goes to the other stream.
    assert!(printed.stderr.contains("1/3 all_reduce, 64KiB, 2 ranks"), "{printed:?}");
}

#[test]
fn the_cost_of_a_fixed_order_is_a_ratio() {
    let arguments = ["--cost", "--ranks", "3", "--sizes", "4KiB", "--iterations", "7"];
    let finished = bench(&[&arguments[..], &["--warmup", "1", "--json"]].concat());
    let report = finished.expect_code(0).last_json();
    let cost = &report["cost"][0];
    let figure = |name: &str| cost[name].as_f64().unwrap_or_else(|| panic!("{name}: {cost}"));
    assert!(figure("deterministic") > 0.0 && figure("fast") > 0.0, "{cost}");
    assert!(figure("ratio_min") <= figure("ratio") && figure("ratio") <= figure("ratio_max"));
}

#[test]
fn other_types_and_the_plain_loop() {
    for dtype in ["f64", "i64", "u8", "bf16", "f16", "i32"] {
        let arguments = ["--dtype", dtype, "--sizes", "24KiB", "--loop", "plain", "--json"];
        let report = small(&arguments).expect_code(0).last_json();
        assert_eq!((report["dtype"].as_str(), rows(&report).len()), (Some(dtype), 6));
    }
}

/// Tunes with few calls.
fn tune(file: &Path, arguments: &[&str]) -> Value {
    let file = file.to_string_lossy();
    let few = ["--tune", &file, "--sizes", "1KiB,64KiB", "--iterations", "5", "--warmup", "1"];
    bench(&[&few[..], arguments, &["--json"]].concat()).expect_code(0).last_json()
}

#[test]
fn a_tuned_table_holds_the_fastest_and_is_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("table.json");
    let tuned = tune(&file, &["--ranks", "2"]);
    let seen: Vec<(Value, Value)> =
        rows(&tuned).iter().map(|row| (row["op"].clone(), row["bytes"].clone())).collect();
    let expected = [("all_reduce", 1 << 10), ("all_reduce", 64 << 10)];
    let lanes = expected.map(|(_, bytes)| ("reduce_lanes", bytes));
    let expected = [expected, lanes].concat();
    assert_eq!(seen, expected.into_iter().map(|(o, b)| (o.into(), b.into())).collect::<Vec<_>>());
    for row in rows(&tuned) {
        let times = row["times"].as_array().expect("times");
        let median = |time: &Value| time["median"].as_f64().expect("a median");
        let fastest = times.iter().map(median).fold(f64::INFINITY, f64::min);
        let chosen = times.iter().find(|time| time["algorithm"] == row["chosen"]).map(median);
        assert_eq!(times.len(), 4, "{row}");
        assert!(fastest > 0.0 && chosen.is_some_and(|chosen| chosen <= fastest * 1.11), "{row}");
    }
    let written = std::fs::read_to_string(&file).expect("written");
    let written: Value = serde_json::from_str(&written).expect("JSON");
    assert_eq!(written["rules"], tuned["rules"]);

    let path = file.to_string_lossy();
    let arguments = ["--algorithms", &path, "--ops", "all_reduce,reduce_lanes", "--json"];
    let used = small(&[&arguments[..], &["--sizes", "4KiB"]].concat()).expect_code(0).last_json();
    let transports: Vec<Value> = rows(&used).iter().map(|row| row["transport"].clone()).collect();
    assert_eq!(transports, ["tcp", "tcp"]);

    // The older table is replaced. Three ranks do not combine by pairs; fast sums may take a ring.
    let fast = tune(&file, &["--ranks", "3", "--reduction", "fast", "--ops", "all_reduce"]);
    for row in rows(&fast) {
        let times = row["times"].as_array().expect("times");
        let names: Vec<&Value> = times.iter().map(|time| &time["algorithm"]).collect();
        assert_eq!(names, ["direct", "scatter", "ring"]);
    }
    let written = std::fs::read_to_string(&file).expect("written");
    let written: Value = serde_json::from_str(&written).expect("JSON");
    assert_eq!(written["rules"], fast["rules"]);
}

#[test]
fn mistakes_have_one_message_that_says_what_is_expected() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--ops", "all_reduce,sum"], &["--ops", "`sum`", "all_reduce, reduce_scatter"]),
        (&["--sizes", "4 parsecs"], &["--sizes", "`4 parsecs` is not a size", "64KiB"]),
        (&["--sizes", "6B"], &["--sizes: `6B`", "f32", "4B to 1GiB"]),
        (&["--sizes", "0B"], &["--sizes: `0B`"]),
        (&["--ranks", "0"], &["--ranks: `0`", "expected 2 to 64"]),
        (&["--ranks", "2,two"], &["--ranks: `two`", "expected 2 to 64"]),
        (&["--dtype", "f8"], &["--dtype", "`f8`", "expected one of f32"]),
        (&["--transport", "rdma"], &["--transport", "`rdma`", "auto, shm, tcp, nccl"]),
        (&["--reduction", "slow"], &["--reduction", "`slow`", "deterministic, fast"]),
        (&["--loop", "round"], &["--loop", "`round`", "barrier, plain"]),
        (&["--iterations", "0"], &["--iterations", "1..=1000000"]),
        (&["--hosts", "3", "--ranks", "2,4"], &["--hosts: `3`", "2 processes"]),
        (&["--hosts", "2", "--transport", "tcp"], &["--hosts", "--transport auto, found tcp"]),
        (&["--cost", "--ops", "barrier"], &["--cost: barrier adds nothing"]),
        (&["--cost", "--floor"], &["--cost", "--floor"]),
        (&["--cost", "--tune", "t.json"], &["--cost", "--tune"]),
        (&["--tune", "t.json", "--ops", "barrier"], &["--tune: barrier has no choice"]),
        (&["--tune", "t.json", "--transport", "shm"], &["--tune is about TCP", "shm"]),
        (&["--tune", "Cargo.toml"], &["`Cargo.toml` is there and is not a table", "hint:"]),
        (&["--tune", "no/t.json"], &["--tune: cannot write into `no`"]),
        (&["--algorithms", "no.json"], &["--algorithms", "`no.json`: No such file"]),
        (&["--algorithms", "no.json", "--transport", "shm"], &["--algorithms is about TCP"]),
    ];
    for (arguments, expected) in cases {
        let finished = bench(arguments).expect_code(2);
        let errors = finished.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!((errors, finished.stdout.as_str()), (1, ""), "{finished:?}");
        for text in *expected {
            assert!(finished.stderr.contains(text), "`{text}` is missing: {finished:?}");
        }
    }
}

#[test]
fn a_rank_is_not_started_by_hand() {
    let finished = run(cluster().arg("bench-rank")).expect_code(1);
    let said = finished.last_json();
    assert!(said["message"].as_str().is_some_and(|m| m.contains("not by hand")), "{said}");
}

/// Processes that a benchmark has started, once all are there.
fn children(running: &Running, count: usize) -> Vec<i32> {
    let list = format!("/proc/{0}/task/{0}/children", running.pid());
    eventually("the ranks start", || {
        let text = std::fs::read_to_string(&list).unwrap_or_default();
        let pids: Vec<i32> = text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        // Until it has become the binary, a child is a copy of the command and may ignore a signal.
        let ready = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.ends_with(b"bench-rank\0"))
        };
        (pids.len() == count && pids.iter().all(ready)).then_some(pids)
    })
}

/// Measures until it is broken off.
fn endless() -> Running {
    let arguments = ["--ops", "all_reduce", "--sizes", "64KiB", "--ranks", "2"];
    let calls = ["--iterations", "1000000", "--warmup", "1000000"];
    Running::start(cluster().args(["bench", "collective"]).args(arguments).args(calls))
}

#[test]
fn a_rank_that_dies_is_named() {
    let running = endless();
    let ranks = children(&running, 2);
    kill(Pid::from_raw(ranks[1]), Signal::SIGKILL).expect("killed");
    let finished = running.finish().expect_code(1);
    assert!(finished.stderr.contains("rank 1 ended: signal: 9"), "{finished:?}");
}

#[test]
fn ranks_die_with_the_command() {
    let mut running = endless();
    let ranks = children(&running, 2);
    running.kill();
    eventually("the ranks end", || {
        let ended = |pid: &i32| match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        ranks.iter().all(ended).then_some(())
    });
}
