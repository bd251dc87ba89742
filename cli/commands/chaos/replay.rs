//! `cluster chaos replay`: what a spot trace leaves of a job, worked out or tried.

use std::path::Path;
use std::time::Duration;

use chaos::{Policy, Trace, classes, simulate};

use super::spot;
use crate::args::{ChaosReplay, Costs, Global, Scale};
use crate::error::{CliError, Result};
use crate::output;

/// Largest trace file: beyond any published one.
const TRACE_BYTES_MAX: u64 = 64 << 20;
/// A trace up to this long is replayed at true scale unless told otherwise.
const TRUE_SCALE_MAX: Duration = Duration::from_secs(600);
/// Nodes of a replay at true scale unless told otherwise: what a small machine can run.
const NODES_DEFAULT: u32 = 4;

/// Reads the trace, and replays it one way or the other.
pub async fn replay(global: &Global, args: &ChaosReplay) -> Result<()> {
    let speed = args.speed.unwrap_or(1.0);
    if !(speed.is_finite() && speed > 0.0) {
        let text = format!("--speed {speed}: expected a number greater than 0");
        return Err(CliError::usage(text));
    }
    if let Some(span) = args.costs.checkpoint.filter(|span| span.0 < Duration::from_secs(1)) {
        return Err(CliError::usage(format!("--checkpoint {span}: expected at least 1s")));
    }
    let trace = read(&args.trace)?;
    let takes_ms = trace.end_ms() as f64 / speed;
    let by_length =
        if takes_ms <= TRUE_SCALE_MAX.as_millis() as f64 { Scale::True } else { Scale::Simulate };
    let asked = args.scale.or(args.simulate.then_some(Scale::Simulate));
    let scale = asked.unwrap_or(by_length);
    refuse_idle(args, scale, asked.is_some())?;
    match scale {
        Scale::Simulate => {
            let trace = args.max_nodes.map_or_else(|| trace.clone(), |max| trace.scaled_to(max));
            show(global, &args.trace, &trace, &policies(&args.costs));
            Ok(())
        }
        Scale::True => {
            let trace = trace.scaled_to(args.max_nodes.unwrap_or(NODES_DEFAULT));
            if trace.statistics().peak == 0 {
                return Err(CliError::usage("the trace never has a node: nothing would run"));
            }
            spot::replay(global, args, &trace).await
        }
    }
}

/// Refuses options that say nothing to the way that the trace is replayed: whoever gives them expects
/// something that does not happen.
fn refuse_idle(args: &ChaosReplay, scale: Scale, is_asked: bool) -> Result<()> {
    let costs = &args.costs;
    let given = |options: &[(&'static str, bool)]| -> Vec<&'static str> {
        options.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    };
    let (idle, this, other) = match scale {
        Scale::Simulate => (
            given(&[
                ("--job", args.job.is_some()),
                ("--speed", args.speed.is_some()),
                ("--notice", args.notice.is_some()),
                ("--seed", args.seed.is_some()),
            ]),
            "simulate",
            "true",
        ),
        Scale::True => (
            given(&[
                ("--detect", costs.detect.is_some()),
                ("--shrink", costs.shrink.is_some()),
                ("--grow", costs.grow.is_some()),
                ("--noticed", costs.noticed.is_some()),
                ("--restart", costs.restart.is_some()),
                ("--checkpoint", costs.checkpoint.is_some()),
                ("--step", costs.step.is_some()),
            ]),
            "true",
            "simulate",
        ),
    };
    if idle.is_empty() {
        return Ok(());
    }
    let why = if is_asked { "" } else { ", which a trace of this length gets by default" };
    let text =
        format!("{}: for --scale {other} only, and this is --scale {this}{why}", idle.join(", "));
    Err(CliError::usage(text).with_hint(format!("leave it out, or give --scale {other}")))
}

fn read(path: &Path) -> Result<Trace> {
    let unreadable =
        |why: String| CliError::usage(format!("cannot read `{}`: {why}", path.display()));
    let metadata = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?;
    if metadata.len() > TRACE_BYTES_MAX {
        let limit = output::bytes(TRACE_BYTES_MAX);
        return Err(unreadable(format!("it has {} bytes, at most {limit}", metadata.len())));
    }
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?;
    Trace::parse(&text).map_err(|e| CliError::usage(format!("`{}`: {e}", path.display())))
}

/// The rows of the table, Cohort's with the given costs.
fn policies(costs: &Costs) -> Vec<Policy> {
    let mut policies = classes();
    for policy in &mut policies {
        let set = |field: &mut Duration, span: &Option<api::units::Span>| {
            if let Some(span) = span {
                *field = span.0;
            }
        };
        set(&mut policy.step, &costs.step);
        if !policy.name.starts_with("cohort") {
            continue;
        }
        set(&mut policy.detect, &costs.detect);
        set(&mut policy.shrink, &costs.shrink);
        set(&mut policy.grow, &costs.grow);
        set(&mut policy.restart, &costs.restart);
        set(&mut policy.checkpoint, &costs.checkpoint);
        if let Some(noticed) = &mut policy.noticed {
            set(noticed, &costs.noticed);
        }
    }
    policies
}

fn show(global: &Global, path: &Path, trace: &Trace, policies: &[Policy]) {
    let is = trace.statistics();
    let outcomes: Vec<_> =
        policies.iter().map(|policy| (policy, simulate(trace, policy))).collect();
    if global.json {
        let rows: Vec<_> = outcomes
            .iter()
            .map(|(policy, outcome)| {
                serde_json::json!({
                    "policy": policy, "outcome": outcome, "goodput": outcome.goodput(),
                })
            })
            .collect();
        output::json(&serde_json::json!({ "trace": path, "statistics": is, "policies": rows }));
        return;
    }
    output::line(&format!(
        "{}: {:.1} h, {:.1} of {} nodes in the mean, {:.2} drops an hour, without nodes {:.0} % of \
         the time",
        path.display(),
        is.hours,
        is.mean,
        is.peak,
        is.drops as f64 / is.hours,
        is.zero * 100.0
    ));
    let rows = outcomes.iter().map(|(policy, outcome)| {
        let share = |seconds: f64| match outcome.available > 0.0 {
            true => format!("{:.2} %", seconds / outcome.available * 100.0),
            false => "-".into(),
        };
        let goodput = outcome.goodput().map_or_else(|| "-".into(), |part| format!("{part:.3}"));
        vec![policy.name.clone(), goodput, share(outcome.stalled), share(outcome.lost)]
    });
    output::table(&["policy", "goodput", "stalled", "lost"], rows.collect(), "no policies");
}
