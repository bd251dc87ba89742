//! The simulator against arithmetic by hand, and its figures on the samples against those computed
//! from the published traces by another program.

use std::time::Duration;

use chaos::{Keeps, Outcome, Policy, Trace, classes, samples, simulate};

fn trace(seconds: u64, counts: &[u32]) -> Trace {
    let gap = format!("{{\"metadata\": {{\"gap_seconds\": {seconds}}}, \"data\": {counts:?}}}");
    Trace::parse(&gap).expect("a trace")
}

fn policy(keeps: Keeps) -> Policy {
    Policy {
        name: "by hand".into(),
        detect: Duration::from_secs(1),
        shrink: Duration::from_secs(9),
        grow: Duration::from_secs(3),
        noticed: None,
        restart: Duration::from_secs(20),
        step: Duration::from_secs(5),
        checkpoint: Duration::from_secs(60),
        save: Duration::ZERO,
        keeps,
    }
}

#[test]
fn in_memory_only_the_step_under_way_is_lost() {
    let outcome = simulate(&trace(100, &[4, 3, 4]), &policy(Keeps::Memory));
    let expected = Outcome {
        available: 1_100.0,
        // 20 s to begin, 10 s to shrink, 3 s to grow.
        stalled: 20.0 * 4.0 + 10.0 * 3.0 + 3.0 * 4.0,
        lost: 5.0 * 4.0,
        useful: 1_100.0 - 122.0 - 20.0,
        changes: 3,
    };
    assert_eq!(outcome, expected);
}

#[test]
fn from_a_checkpoint_all_work_since_is_lost() {
    let outcome = simulate(&trace(100, &[4, 3]), &policy(Keeps::Checkpoint));
    // 80 s of work on 4 nodes, 60 of which a checkpoint holds; then 90 s on 3, 60 of them held.
    assert_eq!(outcome.useful, 60.0 * 4.0 + 60.0 * 3.0);
    assert_eq!(outcome.lost, 20.0 * 4.0 + 30.0 * 3.0);
}

#[test]
fn nobody_left_loses_memory_too_unless_it_was_announced() {
    let counts = trace(100, &[2, 0, 2]);
    let outcome = simulate(&counts, &policy(Keeps::Memory));
    assert_eq!(outcome.available, 400.0, "time without nodes is left out");
    assert_eq!(outcome.useful, 60.0 * 2.0 + 80.0 * 2.0);
    let noticed = Policy { noticed: Some(Duration::from_secs(1)), ..policy(Keeps::Memory) };
    assert_eq!(simulate(&counts, &noticed).lost, 0.0);
}

#[test]
fn a_change_during_a_stall_begins_it_anew_and_never_counts_twice() {
    let slow = Policy { shrink: Duration::from_secs(300), ..policy(Keeps::Memory) };
    let outcome = simulate(&trace(100, &[4, 3, 2]), &slow);
    assert_eq!(outcome.stalled, 20.0 * 4.0 + 100.0 * 3.0 + 100.0 * 2.0);
    // Only the first of the two losses met a step under way.
    assert_eq!(outcome.lost, 5.0 * 4.0);
    let sum = outcome.useful + outcome.lost + outcome.stalled;
    assert!((outcome.available - sum).abs() < 1e-9, "{outcome:?}");
}

#[test]
fn a_cheap_change_during_a_dear_stall_forgives_nothing_of_it() {
    let dear = Policy { restart: Duration::from_secs(60), ..policy(Keeps::Memory) };
    // 10 s of the stall, and 50 of the next 100, although to grow costs 3; then 3 of the last.
    let outcome = simulate(&trace(10, &[1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]), &dear);
    assert_eq!(outcome.stalled, 10.0 + 50.0 * 2.0 + 3.0 * 3.0);
    // All go in the middle of a stall, and what comes begins with its own.
    let outcome = simulate(&trace(10, &[1, 0, 2, 2, 2, 2, 2, 2, 2]), &dear);
    assert_eq!(outcome.stalled, 10.0 + 60.0 * 2.0);
}

#[test]
fn a_checkpoint_that_stops_the_steps_is_charged_each_time() {
    let policy = Policy { save: Duration::from_secs(2), ..policy(Keeps::Memory) };
    let outcome = simulate(&trace(200, &[4]), &policy);
    // 20 s to begin, 60 of work, 2 to save, 60, 2, and 56 that a survivor holds.
    assert_eq!((outcome.stalled, outcome.useful), (24.0 * 4.0, 176.0 * 4.0));
}

#[test]
fn no_nodes_no_goodput() {
    assert_eq!(simulate(&trace(60, &[0, 0]), &policy(Keeps::Memory)).goodput(), None);
}

/// Rows as [`classes`] lists them; columns as [`samples`] does. From the published traces: the mean
/// of the three zones, then HH, HL, LH and LL.
const PUBLISHED: [[f64; 5]; 6] = [
    [0.733, 0.0, 0.0, 0.0, 0.0],
    [0.871, 0.0, 0.089, 0.0, 0.610],
    [0.968, 0.598, 0.742, 0.482, 0.914],
    [0.991, 0.892, 0.929, 0.868, 0.974],
    [0.998, 0.974, 0.983, 0.976, 0.991],
    [1.000, 0.996, 0.997, 0.995, 0.999],
];

#[test]
fn samples_give_the_order_and_about_the_figures_of_the_published_traces() {
    // How far a row may lie off: the fewer events decide it, the more chance there is in it.
    let tolerances = [0.12, 0.12, 0.06, 0.02, 0.01, 0.005];
    let traces: Vec<Trace> =
        samples(1).iter().map(|sample| sample.trace().expect("a trace")).collect();
    let rows: Vec<Vec<f64>> = classes()
        .iter()
        .map(|policy| {
            let goodput = |trace| simulate(trace, policy).goodput().expect("nodes");
            traces.iter().map(goodput).collect()
        })
        .collect();
    for (row, (expected, tolerance)) in rows.iter().zip(PUBLISHED.iter().zip(tolerances)) {
        for (found, expected) in row.iter().zip(expected) {
            assert!((found - expected).abs() <= tolerance, "{rows:#.3?}: {found} {expected}");
        }
    }
    for (slower, faster) in rows[..6].iter().zip(&rows[1..6]) {
        assert!(slower.iter().zip(faster).all(|(slow, fast)| slow <= fast), "{rows:#.3?}");
    }
    // What is measured: at least this much on days of a zone, and on the hours.
    for row in &rows[6..] {
        assert!(row[0] >= 0.995 && row[1..].iter().all(|hour| *hour >= 0.97), "{rows:#.4?}");
    }
}
