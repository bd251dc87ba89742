//! The same bits after many deaths: ranks are killed at random while their number moves between 1 and
//! 8. The long version is `benches/kills.py`.
//!
//! One seed says whom it strikes and after how many steps; to repeat a run: `COHORT_SEED=<seed>`.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use chaos::Random;
use common::{Finished, Running, Task, repository, small_job, submit_local, weights_digest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// More than ten epochs; without a checkpoint, so that what a rank needs can only come from the others.
const SETS: [&str; 4] = [
    "checkpoint.every_steps=0",
    "evaluate.every_steps=0",
    "recovery.max_failures=50",
    "stop.max_steps=400",
];
/// How many die at once, in an order that the seed gives.
const AT_ONCE: [usize; 5] = [1, 1, 1, 2, RANKS_MAX - 1];
const RANKS_MAX: usize = 8;
/// Steps from the moment that ranks run until some of them are killed, at most.
const STEPS_MAX: u64 = 20;

#[test]
fn a_transformer_keeps_its_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = small_job(folder.path(), "");
    same_after_kills(&job, folder.path(), &[]);
}

#[test]
fn an_image_classifier_keeps_its_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    same_after_kills(
        &repository("examples/digits/job.toml"),
        folder.path(),
        &["stop.max_epochs=99"],
    );
}

fn same_after_kills(job: &Path, folder: &Path, more: &[&str]) {
    let seed = std::env::var("COHORT_SEED").map_or(1, |text| text.parse().expect("a number"));
    println!("COHORT_SEED={seed}");
    let start = |name: &str, ranks: &str| {
        let sets = [&SETS[..], more, &[ranks]].concat();
        Running::start(&mut submit_local(job, &folder.join(name), &sets))
    };
    let undisturbed = start("undisturbed", "resources.ranks=1").finish().expect_code(0);
    let mut disturbed = Disturbed {
        running: start("disturbed", "resources.ranks={ min = 1, max = 8 }"),
        random: Random::new(seed),
        seen: Seen::default(),
    };
    let mut rounds = AT_ONCE.to_vec();
    while !rounds.is_empty() {
        let next = disturbed.random.below(rounds.len() as u64) as usize;
        disturbed.strike(rounds.remove(next));
    }
    let (finished, seen) = disturbed.finish();
    let ends = (seen.sizes.first(), seen.sizes.last());
    assert_eq!(ends, (Some(&1), Some(&RANKS_MAX)), "{:?}", seen.sizes);
    assert_eq!(weights_digest(&finished), weights_digest(&undisturbed), "COHORT_SEED={seed}");
    let (last, expected) = (finished.last_json(), undisturbed.last_json());
    assert_eq!(last["restarts"], last["regroups"], "never from the beginning: {last}");
    // Each epoch that was gone through is one that was fed every sample exactly once, or the job fails.
    assert!(expected["samples"]["epochs_verified"].as_u64() >= Some(3), "{expected}");
    assert_eq!(last["samples"], expected["samples"], "the sample ledger");
}

/// What the job has said of itself.
#[derive(Default)]
struct Seen {
    /// Of the last status.
    generation: u64,
    gang: Vec<Task>,
    runs: bool,
    step: u64,
    /// How many ranks there were.
    sizes: BTreeSet<usize>,
}

impl Seen {
    fn note(&mut self, event: &Value) {
        if event["event"] == "step" {
            self.step = event["step"].as_u64().expect("a step");
        }
        if event["event"] != "status" {
            return;
        }
        self.generation = event["generation"].as_u64().expect("a generation");
        self.runs = event["phase"] == "running";
        let task = |place: &Value| {
            let own = (self.generation, place["rank"].as_u64().expect("a rank") as u32);
            let started_as = &place["started_as"];
            match (started_as["generation"].as_u64(), started_as["rank"].as_u64()) {
                (Some(generation), Some(rank)) => (generation, rank as u32),
                _ => own,
            }
        };
        self.gang = event["gang"].as_array().into_iter().flatten().map(task).collect();
        if !self.gang.is_empty() {
            self.sizes.insert(self.gang.len());
        }
    }
}

/// A job, and what strikes it.
struct Disturbed {
    running: Running,
    random: Random,
    seen: Seen,
}

impl Disturbed {
    /// Some steps after ranks run again kills so many of them at once.
    ///
    /// Not newcomers: where one dies no other is started for ten seconds, and the job is over by then.
    fn strike(&mut self, count: usize) {
        let Self { running, random, seen } = self;
        let before = seen.generation;
        let mut members = loop {
            running.wait_for("ranks that run", |event| {
                seen.note(event);
                // One has to be left that holds the state.
                seen.runs && seen.generation > before && seen.gang.len() > count
            });
            let due = seen.step + random.between(1, STEPS_MAX);
            running.wait_for("a step", |event| {
                seen.note(event);
                seen.step >= due
            });
            let tasks = running.tasks().into_iter();
            let members = tasks.filter(|(task, _)| seen.gang.contains(task));
            let members: Vec<Pid> = members.map(|(_, pid)| pid).collect();
            // Fewer live where what was read is from before the last deaths.
            if members.len() > count {
                break members;
            }
        };
        for _ in 0..count {
            let victim = members.swap_remove(random.below(members.len() as u64) as usize);
            kill(victim, Signal::SIGKILL).expect("it runs");
        }
    }

    fn finish(mut self) -> (Finished, Seen) {
        let seen = &mut self.seen;
        self.running.wait_for("its end", |event| {
            seen.note(event);
            event["event"] == "status" && event["phase"] == "succeeded"
        });
        (self.running.finish().expect_code(0), self.seen)
    }
}
