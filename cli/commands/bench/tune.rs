//! `bench collective --tune FILE`: every algorithm in turn, in groups that the same processes hold,
//! and the table of the fastest ones.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use collective::{Algorithm, Measurement, Question, Rule, Selection, SelectionError};
use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use super::collective::{Timer, name, time};
use super::gang::Gang;
use super::plan::{Case, Op, Order, Plan};
use super::progress::Progress;
use super::protocol::{GroupPlan, Work};
use super::samples::quantile;
use crate::args::Global;
use crate::error::{CliError, Result};
use crate::output;

/// The timed calls of all algorithms take about as long.
const TUNE_TIME: Duration = Duration::from_secs(20);
/// Turns of every algorithm; its time is the middle one of theirs.
const TURNS: u32 = 5;

/// What was measured and chosen.
#[derive(Debug, Serialize)]
struct Tuned<'a> {
    dtype: &'static str,
    reduction: &'static str,
    #[serde(rename = "loop")]
    pacing: &'static str,
    file: &'a Path,
    rows: Vec<Row>,
    rules: &'a [Rule],
}

/// One case. Times in seconds.
#[derive(Debug, Serialize)]
struct Row {
    op: Op,
    bytes: u64,
    ranks: u32,
    times: Vec<Time>,
    /// What the table says.
    chosen: Algorithm,
    /// What the built-in table says.
    default: Algorithm,
    /// The time of the default over that of the chosen: 2 is in half the time.
    gain: f64,
}

#[derive(Debug, Serialize)]
struct Time {
    algorithm: Algorithm,
    median: f64,
}

/// Measures, writes and prints.
pub fn run(global: &Global, plan: &Plan, file: &Path) -> Result<()> {
    // Before a minute is spent on measuring.
    check(file)?;
    let mut measured = Vec::new();
    let mut rows = measure(plan, &mut measured)?;
    let table = Selection::tuned(&measured).map_err(|e| CliError::usage(format!("--tune: {e}")))?;
    write(&table, file)?;
    for row in &mut rows {
        row.decide(&table, plan.order);
    }
    let (dtype, reduction) = (plan.element.name(), plan.order.name());
    let pacing = plan.pacing.name();
    let tuned = Tuned { dtype, reduction, pacing, file, rows, rules: table.rules() };
    if global.json {
        output::json(&tuned);
    } else {
        tuned.print();
    }
    Ok(())
}

fn measure(plan: &Plan, measured: &mut Vec<Measurement>) -> Result<Vec<Row>> {
    let cases: usize = plan.worlds.iter().map(|world| plan.cases(*world).len()).sum();
    let measurements: usize = plan
        .worlds
        .iter()
        .map(|world| plan.cases(*world).len() * candidates(*world, plan.order).len())
        .sum();
    let timer = Timer::within(TUNE_TIME, measurements);
    let mut progress = Progress::new(cases);
    let mut rows = Vec::new();
    for world in &plan.worlds {
        let algorithms = candidates(*world, plan.order);
        let groups: Vec<GroupPlan> =
            algorithms.iter().map(|algorithm| only(*algorithm, plan.order)).collect();
        let mut gang = Gang::start(*world, plan, &groups)?;
        for case in plan.cases(*world) {
            progress.begin(&name(case, *world));
            let medians = in_turn(&mut gang, plan, case, &timer, groups.len())?;
            let times = algorithms.iter().zip(medians);
            let times: Vec<Time> =
                times.map(|(algorithm, median)| Time { algorithm: *algorithm, median }).collect();
            let row = Row::new(case, *world, times);
            measured.extend(row.measurements());
            rows.push(row);
        }
        gang.leave();
    }
    Ok(rows)
}

/// The median time in each group: they take turns, so that the machine's drift hits all.
fn in_turn(
    gang: &mut Gang,
    plan: &Plan,
    case: Case,
    timer: &Timer,
    groups: usize,
) -> Result<Vec<f64>> {
    gang.prepare(|_| Work::collective(case.op, case.bytes, plan.element))?;
    let calls = (0..groups)
        .map(|group| Ok(timer.calls(gang, plan, group)?.div_ceil(TURNS)))
        .collect::<Result<Vec<_>>>()?;
    let mut medians = vec![Vec::new(); groups];
    for _ in 0..TURNS {
        for (group, medians) in medians.iter_mut().enumerate() {
            medians.push(gang.measure(group, calls[group], plan.pacing)?.median());
        }
    }
    let middle = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        quantile(&times, 0.5)
    };
    Ok(medians.into_iter().map(middle).collect())
}

/// What can carry a reduction among so many ranks.
fn candidates(world: u32, order: Order) -> Vec<Algorithm> {
    let can = |algorithm: &Algorithm| {
        (world.is_power_of_two() || !algorithm.is_by_pairs())
            && (order == Order::Fast || *algorithm != Algorithm::Ring)
    };
    Algorithm::ALL.into_iter().filter(can).collect()
}

/// A group that knows one algorithm.
fn only(algorithm: Algorithm, order: Order) -> GroupPlan {
    let rules = Selection::only(algorithm).rules().to_vec();
    GroupPlan { name: algorithm.name().to_owned(), order, rules }
}

impl Row {
    /// Nothing is chosen yet.
    fn new(case: Case, ranks: u32, times: Vec<Time>) -> Self {
        let Case { op, bytes } = case;
        let (chosen, default) = (Algorithm::Scatter, Algorithm::Scatter);
        Self { op, bytes, ranks, times, chosen, default, gain: 1.0 }
    }

    fn measurements(&self) -> impl Iterator<Item = Measurement> {
        let operation = self.op.selectable();
        self.times.iter().filter_map(move |time| {
            let (algorithm, seconds) = (time.algorithm, time.median);
            let (world, bytes) = (self.ranks, self.bytes);
            Some(Measurement { operation: operation?, world, bytes, algorithm, seconds })
        })
    }

    fn decide(&mut self, table: &Selection, order: Order) {
        let Some(operation) = self.op.selectable() else { return };
        let question = Question {
            operation,
            world: self.ranks,
            bytes: self.bytes as usize,
            pairs: self.ranks.is_power_of_two(),
            reduction: order.into(),
        };
        self.chosen = table.choose(question);
        self.default = Selection::default().choose(question);
        self.gain = match (self.median(self.default), self.median(self.chosen)) {
            (Some(default), Some(chosen)) => default / chosen,
            _ => 1.0,
        };
    }

    fn median(&self, algorithm: Algorithm) -> Option<f64> {
        self.times.iter().find(|time| time.algorithm == algorithm).map(|time| time.median)
    }
}

impl Tuned<'_> {
    fn print(&self) {
        let is_measured =
            |algorithm: &Algorithm| self.rows.iter().any(|row| row.median(*algorithm).is_some());
        let columns: Vec<Algorithm> = Algorithm::ALL.into_iter().filter(is_measured).collect();
        let mut header = vec!["operation", "bytes", "ranks"];
        header.extend(columns.iter().map(|algorithm| algorithm.name()));
        header.extend(["chosen", "default ÷ chosen"]);
        let rows = self.rows.iter().map(|row| {
            let (op, bytes) = (row.op.to_string(), api::units::ByteSize(row.bytes).to_string());
            let mut cells = vec![op, bytes, row.ranks.to_string()];
            let times = columns.iter().map(|algorithm| row.median(*algorithm));
            cells.extend(times.map(|median| median.map_or("–".to_owned(), time)));
            cells.extend([row.chosen.to_string(), format!("{:.2}", row.gain)]);
            cells
        });
        output::table(&header, rows.collect(), "nothing measured");
        output::line(&format!(
            "`{}` holds {} rules; name it in worker.algorithms on every worker",
            self.file.display(),
            self.rules.len()
        ));
    }
}

/// Refuses a file that cannot be written, or that holds something else than a table.
fn check(file: &Path) -> Result<()> {
    match Selection::load(file) {
        Ok(_) => {}
        Err(SelectionError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        Err(error @ SelectionError::File { .. }) => {
            return Err(CliError::usage(format!("--tune: {error}")));
        }
        Err(error) => {
            let text = format!("--tune: `{}` is there and is {error}", file.display());
            return Err(CliError::usage(text).with_hint("name another file, or remove this one"));
        }
    }
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    access(folder, AccessFlags::W_OK).map_err(|error| {
        CliError::usage(format!("--tune: cannot write into `{}`: {error}", folder.display()))
    })
}

/// The whole table or none of it.
fn write(table: &Selection, file: &Path) -> Result<()> {
    let unwritable = |e: &dyn std::fmt::Display| CliError::usage(format!("--tune: {e}"));
    // Beside it, under a name that is nobody else's.
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let temporary = file.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    table.save(&temporary).map_err(|e| unwritable(&e))?;
    let replaced = File::open(&temporary)
        .and_then(|written| written.sync_all())
        .and_then(|()| std::fs::rename(&temporary, file));
    if replaced.is_err() {
        // Best effort: the error that follows is what counts.
        let _ = std::fs::remove_file(&temporary);
    }
    replaced.map_err(|e| unwritable(&format!("cannot write `{}`: {e}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_table_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("table.json");
        check(&file).expect("not there yet");
        write(&Selection::only(Algorithm::Direct), &file).expect("written");
        check(&file).expect("a table");
        write(&Selection::default(), &file).expect("replaced");
        assert_eq!(Selection::load(&file).expect("whole"), Selection::default());
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);

        std::fs::write(&file, "name = \"job\"\n").expect("written");
        let refused = check(&file).expect_err("a job");
        assert!(refused.message().contains("is there and is not a table"), "{refused}");
        let nowhere = check(&folder.path().join("no/table.json")).expect_err("no folder");
        assert!(nowhere.message().contains("cannot write into"), "{nowhere}");
    }

    #[test]
    fn only_what_can_carry_a_sum_is_measured() {
        use Algorithm::{Direct, Scatter};
        assert_eq!(candidates(3, Order::Deterministic), [Direct, Scatter]);
        assert_eq!(candidates(3, Order::Fast), [Direct, Scatter, Algorithm::Ring]);
        assert_eq!(candidates(4, Order::Deterministic).len(), 4);
        assert_eq!(candidates(8, Order::Fast), Algorithm::ALL);
    }
}
