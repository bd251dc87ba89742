//! Plans are the same for the same seed, on every machine: golden files beside this one. Run with
//! UPDATE_GOLDEN=1 to write them again, and read the diff.

use std::path::Path;
use std::time::Duration;

use chaos::{FaultKind, Plan, PlanOptions, Role, Targets};

fn options(seed: u64, faults: &[FaultKind]) -> PlanOptions {
    PlanOptions {
        seed,
        duration: Duration::from_secs(60),
        every: Duration::from_secs(5),
        faults: faults.to_vec(),
        targets: Targets { ranks: 4, workers: 2, links: 2, coordinators: 3 },
    }
}

#[test]
fn a_seed_decides_all_faults() {
    let everything = options(7, &FaultKind::ALL);
    let mut ranks = options(1, &[FaultKind::Kill, FaultKind::Freeze]);
    ranks.targets.workers = 0;
    for (name, options) in [("everything", everything), ("kill_and_freeze_ranks", ranks)] {
        let printed = Plan::new(&options).to_string();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/plans/{name}.txt"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &printed).expect("written");
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(printed, kept, "{name}: another plan than before for the same seed");
    }
}

#[test]
fn another_seed_gives_another_plan_and_the_same_one_the_same() {
    let plan = |seed| Plan::new(&options(seed, &FaultKind::ALL));
    assert_eq!(plan(3), plan(3));
    assert_ne!(plan(3), plan(4));
}

#[test]
fn faults_come_as_often_as_asked_within_the_duration_and_meet_only_those_there_are() {
    let mut long = options(5, &[FaultKind::Kill, FaultKind::Slow]);
    long.duration = Duration::from_secs(20_000);
    let plan = Plan::new(&long);
    // 4,000 expected; the standard deviation of a Poisson process is the root of that.
    assert!((3_800..4_200).contains(&plan.strikes.len()), "{}", plan.strikes.len());
    assert!(plan.strikes.iter().all(|strike| strike.at_ms < 20_000_000));
    assert!(plan.strikes.windows(2).all(|pair| pair[0].at_ms <= pair[1].at_ms));
    for strike in &plan.strikes {
        let among = match strike.target.role {
            Role::Rank => 4,
            Role::Worker => 2,
            other => panic!("{other} cannot be killed or slowed"),
        };
        assert!(strike.target.place < among, "{strike}");
        let is_slow = strike.fault.kind == FaultKind::Slow;
        assert_eq!(is_slow, strike.fault.lasts.is_some(), "{strike}");
        assert_eq!(is_slow, strike.fault.stopped_percent > 0, "{strike}");
    }
}

#[test]
fn nobody_to_strike_gives_an_empty_plan() {
    let mut nobody = options(1, &[FaultKind::Kill, FaultKind::KillCoordinator]);
    nobody.targets = Targets { ranks: 0, workers: 0, links: 0, coordinators: 0 };
    assert_eq!(Plan::new(&nobody).strikes, []);
    assert_eq!(Plan::new(&options(1, &[])).strikes, []);
}

#[test]
fn names_of_faults_are_read_back_and_others_are_refused() {
    for kind in FaultKind::ALL {
        assert_eq!(kind.name().parse(), Ok(kind));
    }
    let error = "explode".parse::<FaultKind>().expect_err("no fault").to_string();
    assert!(error.starts_with("`explode` is no fault: expected kill, stop"), "{error}");
    assert_eq!("worker".parse(), Ok(Role::Worker));
    assert!("disk".parse::<Role>().is_err());
}
