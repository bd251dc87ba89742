//! `cluster bench collective`: every operation, size and number of processes of a plan.

use std::time::Duration;

use serde::Serialize;

use super::cost;
use super::floor::{CopyLimit, exchange};
use super::gang::Gang;
use super::plan::{Case, Op, Plan};
use super::progress::Progress;
use super::protocol::Work;
use super::samples::{Samples, Times};
use super::tune;
use crate::args::{BenchCollective, Global};
use crate::error::Result;
use crate::output;

/// The timed calls of a whole run take about as long.
const RUN_TIME: Duration = Duration::from_secs(25);
/// Those of one case, at least and at most.
const CASE_TIME_MIN: Duration = Duration::from_millis(50);
const CASE_TIME_MAX: Duration = Duration::from_secs(1);
/// The calls before them take about as long.
const WARMUP_TIME: Duration = Duration::from_millis(50);
/// Fewer say nothing, more say nothing new.
const CALLS_MIN: u32 = 5;
const CALLS_MAX: u32 = 20_000;

/// What was measured.
#[derive(Debug, Serialize)]
struct Measured {
    dtype: &'static str,
    reduction: &'static str,
    #[serde(rename = "loop")]
    pacing: &'static str,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    copy: Vec<CopyLimit>,
}

/// One case. Times in seconds, bandwidths in bytes per second.
#[derive(Debug, Serialize)]
struct Row {
    op: Op,
    bytes: u64,
    ranks: u32,
    transport: String,
    #[serde(flatten)]
    times: Times,
    /// Bytes of the buffer per second.
    algorithm_bandwidth: f64,
    /// Bytes each process must send per second.
    bus_bandwidth: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<Floor>,
}

/// The bare exchange of the same bytes, and the copying of as many. Their time over the
/// collective's is a ratio: 1 is as fast, 2 is in half the time.
#[derive(Debug, Serialize)]
struct Floor {
    /// Of the exchange, in seconds.
    median: f64,
    ratio: f64,
    /// Copying the buffer once, in all processes at the same time, in seconds.
    copy: f64,
    copy_ratio: f64,
}

/// Measures and prints.
pub fn run(global: &Global, args: &BenchCollective) -> Result<()> {
    let plan = Plan::new(args)?;
    if args.cost {
        return cost::run(global, &plan);
    }
    if let Some(path) = &args.tune {
        return tune::run(global, &plan, path);
    }
    let measured = measure(&plan, args.floor)?;
    if global.json {
        output::json(&measured);
    } else {
        print(&measured);
    }
    Ok(())
}

fn measure(plan: &Plan, with_floor: bool) -> Result<Measured> {
    let cases: usize = plan.worlds.iter().map(|world| plan.cases(*world).len()).sum();
    let timer = Timer::sharing(if with_floor { 2 * cases } else { cases });
    let mut progress = Progress::new(cases);
    let (mut rows, mut copy) = (Vec::new(), Vec::new());
    for world in &plan.worlds {
        let mut gang = Gang::start(*world, plan, &[plan.group(plan.order)])?;
        if with_floor {
            copy.push(CopyLimit::measure(&mut gang)?);
        }
        for case in plan.cases(*world) {
            progress.begin(&name(case, *world));
            gang.prepare(|_| Work::collective(case.op, case.bytes, plan.element))?;
            let times = timer.time(&mut gang, plan)?.times();
            let floor = if with_floor {
                let median = exchange(&mut gang, plan, case, |g, p| timer.time(g, p))?.median();
                let each = copy.last().map_or(f64::INFINITY, CopyLimit::each);
                let copy = case.bytes as f64 / each;
                let (ratio, copy_ratio) = (median / times.median, copy / times.median);
                Some(Floor { median, ratio, copy, copy_ratio })
            } else {
                None
            };
            let algorithm_bandwidth = case.bytes as f64 / times.median;
            rows.push(Row {
                op: case.op,
                bytes: case.bytes,
                ranks: *world,
                transport: gang.transport.clone(),
                times,
                algorithm_bandwidth,
                bus_bandwidth: algorithm_bandwidth * case.op.bus_factor(*world),
                floor,
            });
        }
        gang.leave();
    }
    let (dtype, reduction) = (plan.element.name(), plan.order.name());
    Ok(Measured { dtype, reduction, pacing: plan.pacing.name(), rows, copy })
}

/// "all_reduce, 64KiB, 4 ranks".
pub fn name(case: Case, world: u32) -> String {
    let size = api::units::ByteSize(case.bytes);
    match case.op {
        Op::Barrier => format!("{}, {world} ranks", case.op),
        op => format!("{op}, {size}, {world} ranks"),
    }
}

/// How often a case is called.
pub struct Timer {
    each_case: Duration,
}

impl Timer {
    /// Shares the time of a run among a number of cases.
    pub fn sharing(cases: usize) -> Self {
        Self::within(RUN_TIME, cases)
    }

    /// Shares another time.
    pub fn within(time: Duration, cases: usize) -> Self {
        let each = time / u32::try_from(cases.max(1)).unwrap_or(u32::MAX);
        Self { each_case: each.clamp(CASE_TIME_MIN, CASE_TIME_MAX) }
    }

    /// Warms up what is prepared, and times it in the first group.
    pub fn time(&self, gang: &mut Gang, plan: &Plan) -> Result<Samples> {
        let calls = self.calls(gang, plan, 0)?;
        gang.measure(0, calls, plan.pacing)
    }

    /// Warms up a group; says how many calls fit into the case's time.
    pub fn calls(&self, gang: &mut Gang, plan: &Plan, group: usize) -> Result<u32> {
        if let (Some(warmup), Some(calls)) = (plan.warmup, plan.iterations) {
            if warmup > 0 {
                gang.measure(group, warmup, plan.pacing)?;
            }
            return Ok(calls);
        }
        // The very first call may fault its pages in; the second tells how many make a warm-up.
        let once = gang.measure(group, 2, plan.pacing)?.times().latency;
        let warmup = plan.warmup.unwrap_or_else(|| fit(WARMUP_TIME, once, 1)).max(1);
        let warm = gang.measure(group, warmup, plan.pacing)?.median();
        Ok(plan.iterations.unwrap_or_else(|| fit(self.each_case, warm, CALLS_MIN)))
    }
}

/// Calls of `each` seconds that fit into a time.
fn fit(time: Duration, each: f64, least: u32) -> u32 {
    ((time.as_secs_f64() / each.max(1e-9)) as u32).clamp(least, CALLS_MAX)
}

fn print(measured: &Measured) {
    for copy in &measured.copy {
        let (one, all) = (rate(copy.one), rate(copy.together));
        output::line(&format!(
            "copying memory: {one} by one process alone, {all} by {} at the same time",
            copy.ranks
        ));
    }
    let mut header = vec![
        "operation",
        "bytes",
        "ranks",
        "transport",
        "median",
        "p10–p90",
        "latency",
        "algorithm bw",
        "bus bw",
    ];
    let with_floor = measured.rows.iter().any(|row| row.floor.is_some());
    if with_floor {
        header.extend(["bare exchange", "bare ÷ median", "copy ÷ median"]);
    }
    let rows = measured.rows.iter().map(cells).collect();
    output::table(&header, rows, "nothing measured");
}

fn cells(row: &Row) -> Vec<String> {
    let moves = row.op != Op::Barrier;
    let or_none = |text: String| if moves { text } else { "–".into() };
    let mut cells = vec![
        row.op.to_string(),
        or_none(api::units::ByteSize(row.bytes).to_string()),
        row.ranks.to_string(),
        row.transport.clone(),
        time(row.times.median),
        format!("{}–{}", time(row.times.p10), time(row.times.p90)),
        time(row.times.latency),
        or_none(rate(row.algorithm_bandwidth)),
        or_none(rate(row.bus_bandwidth)),
    ];
    if let Some(floor) = &row.floor {
        cells.extend([
            time(floor.median),
            format!("{:.2}", floor.ratio),
            or_none(format!("{:.2}", floor.copy_ratio)),
        ]);
    }
    cells
}

/// "12.3 µs", "4.56 ms", "1.20 s".
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// "1.23 GB/s", of a billion bytes.
fn rate(bytes_per_second: f64) -> String {
    format!("{:.2} GB/s", bytes_per_second / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_calls_are_few_and_fast_ones_are_many() {
        assert_eq!(fit(Duration::from_secs(1), 0.01, CALLS_MIN), 100);
        assert_eq!(fit(Duration::from_secs(1), 10.0, CALLS_MIN), CALLS_MIN);
        assert_eq!(fit(Duration::from_secs(1), 0.0, CALLS_MIN), CALLS_MAX);
    }

    #[test]
    fn times_and_rates_read_well() {
        assert_eq!(time(12.34e-6), "12.3 µs");
        assert_eq!(time(4.561e-3), "4.56 ms");
        assert_eq!(rate(1.5e9), "1.50 GB/s");
    }
}
