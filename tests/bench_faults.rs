//! `cluster bench recovery` and `cluster bench checkpoint` through the shipped binary: small jobs; what is
//! asserted is what happens, not how long it takes.

mod common;

use std::path::Path;

use common::{Finished, cluster, run, small_job};
use serde_json::Value;

fn bench(folder: &Path, arguments: &[&str]) -> Finished {
    let job = small_job(folder, "[resources]\nranks = 2\n");
    let mut bench = cluster();
    run(bench.arg("bench").arg(arguments[0]).arg(job).args(&arguments[1..]).arg("--json"))
}

#[test]
fn each_fault_is_got_over_in_place_and_timed() {
    for (fault, events) in [("kill", &["kill"][..]), ("drain", &["leave", "join"])] {
        let folder = tempfile::tempdir().expect("a folder");
        let finished = bench(folder.path(), &["recovery", "--faults", "2", "--fault", fault]);
        let finished = finished.expect_code(0);
        let reports: Vec<Value> =
            finished.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(reports.iter().map(|report| &report["fault"]).collect::<Vec<_>>(), events);
        for report in reports {
            assert_eq!((&report["faults"], &report["survivors_lost"]), (&2.into(), &0.into()));
            // A kill may cost the step under way, a leave and a join cost none.
            let lost = report["steps_lost_max"].as_u64().expect("a count");
            assert!(lost <= u64::from(fault == "kill"), "{report}");
            let samples = report["samples"].as_array().expect("samples");
            assert_eq!(samples.len(), 2, "{report}");
            for sample in samples {
                let (decided, stall) = (sample["decided"].as_f64(), sample["stall"].as_f64());
                assert!(decided >= Some(0.0) && stall > Some(0.0), "{sample}");
            }
        }
    }
}

#[test]
fn what_a_checkpoint_costs_is_measured_and_nothing_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments =
        ["checkpoint", "--rounds", "1", "--steps", "16", "--every", "4", "--state", "1MB"];
    let report = bench(folder.path(), &arguments).expect_code(0).last_json();
    for what in ["staged", "written", "written_plainly", "read", "read_plainly", "write_ratio"] {
        assert!(report[what]["median"].as_f64() > Some(0.0), "{what}: {report}");
    }
    let training = &report["training"];
    assert_eq!((&training["ranks"], &training["every_steps"]), (&2.into(), &4.into()), "{report}");
    let stalls = training["samples"][0]["stalls"].as_array().expect("stalls");
    // Every fourth of sixteen steps.
    assert_eq!(stalls.len(), 4, "{report}");
    let refused = bench(folder.path(), &["checkpoint", "--every", "0"]).expect_code(2);
    assert!(refused.stderr.contains("--every"), "{refused:?}");
}
