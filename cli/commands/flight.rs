//! `cluster flight`: what the ranks of a job are doing, or were doing when they ended.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::finding::{FlightReport, FlightSource, RankFlight, seconds};
use api::flight::{FlightEntry, FlightLog};
use api::stacks::{StackDump, ThreadStack};
use api::{ExitClass, Name};

use crate::args::{Flight, Global};
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::output;

/// Operations that `--rank` shows; `--json` has all that the rank remembers.
const ENTRIES_SHOWN: usize = 40;

/// `cluster flight JOB`.
pub async fn show(global: &Global, args: &Flight) -> Result<()> {
    let name: Name = args.name.parse()?;
    let (access, _) = Access::find(global)?;
    let mut report = access.connect().await?.flight(&name, args.generation, args.stacks).await?;
    if let Some(rank) = args.rank {
        let count = report.ranks.len();
        report.ranks.retain(|flight| flight.rank.0 == rank);
        report.stacks.retain(|dump| dump.rank.0 == rank);
        if report.ranks.is_empty() {
            let text = format!("job `{name}` has no rank {rank}: it has ranks 0 to {}", count - 1);
            return Err(CliError::new(ExitClass::NotFound, text));
        }
    }
    if global.json {
        output::json(&report);
        return Ok(());
    }
    print(&report);
    if args.rank.is_some() {
        report.ranks.iter().filter_map(|flight| flight.log.as_ref()).for_each(print_entries);
    }
    report.stacks.iter().for_each(print_stacks);
    Ok(())
}

fn print(report: &FlightReport) {
    let rows = report.ranks.iter().map(row).collect();
    let header = ["rank", "host", "gen", "log", "completed", "call", "state", "since", "tag"];
    output::table(&header, rows, "no ranks");
    for text in report.notes.iter().chain(&report.verdict) {
        output::line(text);
    }
}

fn row(flight: &RankFlight) -> Vec<String> {
    let mut row = vec![flight.rank.0.to_string(), host(flight)];
    let Some(log) = &flight.log else {
        row.extend(["-", "none", "-", "-", "-", "-", "-"].map(str::to_owned));
        return row;
    };
    row.push(log.generation.0.to_string());
    row.push(source(flight.source).to_owned());
    let completed = log.last_completed();
    row.push(completed.map_or_else(|| "-".into(), |e| format!("{} #{}", e.group, e.sequence)));
    let since = |time: u64| seconds(nanoseconds(log.ago(time)));
    match log.current() {
        Some(entry) => row.extend([
            format!("{} {entry}", entry.group),
            entry.state.to_string(),
            since(entry.since_ns()),
        ]),
        None => row.extend([
            "-".into(),
            "outside".into(),
            completed.and_then(|entry| entry.ended_ns).map_or_else(|| "-".into(), since),
        ]),
    }
    row.push(log.tag.clone());
    row
}

fn host(flight: &RankFlight) -> String {
    match (flight.host.as_str(), &flight.worker) {
        ("", Some(worker)) => format!("({worker})"),
        ("", None) => "-".into(),
        (host, _) => host.to_owned(),
    }
}

fn source(source: FlightSource) -> &'static str {
    match source {
        FlightSource::Live => "live",
        FlightSource::Kept => "kept",
        FlightSource::None => "none",
    }
}

/// The last operations of one rank, the newest last.
fn print_entries(log: &FlightLog) {
    let surplus = log.entries.len().saturating_sub(ENTRIES_SHOWN);
    let rows = log.entries.iter().skip(surplus).map(|entry| entry_row(log, entry)).collect();
    output::line("");
    output::table(&["ago", "call", "state", "took", "tag", "error"], rows, "no operations yet");
}

fn entry_row(log: &FlightLog, entry: &FlightEntry) -> Vec<String> {
    let took = entry.ended_ns.map(|end| end.saturating_sub(entry.since_ns()));
    vec![
        seconds(nanoseconds(log.ago(entry.queued_ns))),
        format!("{} {entry}", entry.group),
        entry.state.to_string(),
        took.map_or_else(|| "-".into(), |time| format!("{:.3} ms", time as f64 / 1e6)),
        entry.tag.clone(),
        entry.error.clone().unwrap_or_default(),
    ]
}

/// What the threads of one rank were in; threads with the same stack together.
fn print_stacks(dump: &StackDump) {
    let ago = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let ago = ago.saturating_sub(Duration::from_millis(dump.taken_ms));
    let absent = match dump.absent.as_str() {
        "" => String::new(),
        why => format!(" ({why})"),
    };
    output::line("");
    output::line(&format!(
        "threads of rank {} of generation {} on {}, process {}, {} ago{absent}:",
        dump.rank.0,
        dump.generation.0,
        dump.host,
        dump.pid,
        seconds(nanoseconds(ago))
    ));
    let mut alike: Vec<Vec<&ThreadStack>> = Vec::new();
    for thread in &dump.threads {
        let key = |thread: &ThreadStack| (thread.position(), thread.frames.clone());
        match alike.iter_mut().find(|known| known.first().map(|t| key(t)) == Some(key(thread))) {
            Some(known) => known.push(thread),
            None => alike.push(vec![thread]),
        }
    }
    for threads in alike {
        let name = |t: &&ThreadStack| format!("`{}` {} ({} ms)", t.name, t.id, t.cpu_ms);
        let names: Vec<String> = threads.iter().map(name).collect();
        output::line(&format!("  {}: {}", names.join(", "), threads[0].position()));
        threads[0].frames.iter().for_each(|frame| output::line(&format!("    {frame}")));
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
