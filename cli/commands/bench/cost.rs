//! `bench collective --cost`: what a fixed order of sums costs beside the fastest one. Both groups
//! are held by the same processes and measured in turn, so that the machine's drift hits both.

use serde::Serialize;

use super::collective::{Timer, name, time};
use super::gang::Gang;
use super::plan::{Op, Order, Plan};
use super::progress::Progress;
use super::protocol::Work;
use super::samples::quantile;
use crate::args::Global;
use crate::error::Result;
use crate::output;

/// Turns of both; the ratio is the middle one of theirs.
const TURNS: u32 = 7;
/// The groups, by their place in the gang.
const ORDERS: [Order; 2] = [Order::Deterministic, Order::Fast];

/// What was measured.
#[derive(Debug, Serialize)]
struct Costs {
    dtype: &'static str,
    #[serde(rename = "loop")]
    pacing: &'static str,
    cost: Vec<Cost>,
}

/// One case. Times in seconds; medians over the turns.
#[derive(Debug, Serialize)]
struct Cost {
    op: Op,
    bytes: u64,
    ranks: u32,
    transport: String,
    deterministic: f64,
    fast: f64,
    /// Deterministic over fast: 1 is free, 2 is twice the time.
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
}

/// Measures and prints.
pub fn run(global: &Global, plan: &Plan) -> Result<()> {
    let cost = measure(plan)?;
    if global.json {
        let (dtype, pacing) = (plan.element.name(), plan.pacing.name());
        output::json(&Costs { dtype, pacing, cost });
        return Ok(());
    }
    let header =
        ["operation", "bytes", "ranks", "transport", "deterministic", "fast", "ratio", "range"];
    let rows = cost.iter().map(|cost| {
        vec![
            cost.op.to_string(),
            api::units::ByteSize(cost.bytes).to_string(),
            cost.ranks.to_string(),
            cost.transport.clone(),
            time(cost.deterministic),
            time(cost.fast),
            format!("{:.2}", cost.ratio),
            format!("{:.2}–{:.2}", cost.ratio_min, cost.ratio_max),
        ]
    });
    output::table(&header, rows.collect(), "nothing measured");
    Ok(())
}

fn measure(plan: &Plan) -> Result<Vec<Cost>> {
    let cases: usize = plan.worlds.iter().map(|world| plan.cases(*world).len()).sum();
    let timer = Timer::sharing(ORDERS.len() * cases);
    let mut progress = Progress::new(cases);
    let mut costs = Vec::new();
    for world in &plan.worlds {
        let mut gang = Gang::start(*world, plan, &ORDERS.map(|order| plan.group(order)))?;
        for case in plan.cases(*world) {
            progress.begin(&name(case, *world));
            gang.prepare(|_| Work::collective(case.op, case.bytes, plan.element))?;
            let mut calls = [0; 2];
            for (group, calls) in calls.iter_mut().enumerate() {
                *calls = timer.calls(&mut gang, plan, group)?.div_ceil(TURNS);
            }
            let (mut medians, mut ratios) = ([Vec::new(), Vec::new()], Vec::new());
            for _ in 0..TURNS {
                let mut turn = [0.0; 2];
                for group in 0..ORDERS.len() {
                    turn[group] = gang.measure(group, calls[group], plan.pacing)?.median();
                    medians[group].push(turn[group]);
                }
                ratios.push(turn[0] / turn[1]);
            }
            medians.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
            ratios.sort_by(f64::total_cmp);
            costs.push(Cost {
                op: case.op,
                bytes: case.bytes,
                ranks: *world,
                transport: gang.transport.clone(),
                deterministic: quantile(&medians[0], 0.5),
                fast: quantile(&medians[1], 0.5),
                ratio: quantile(&ratios, 0.5),
                ratio_min: quantile(&ratios, 0.0),
                ratio_max: quantile(&ratios, 1.0),
            });
        }
        gang.leave();
    }
    Ok(costs)
}
