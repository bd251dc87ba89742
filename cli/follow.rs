//! Watches a job to its end: a bar on a terminal, plain lines otherwise, JSON events with --json.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use api::events::{JobEvent, StepMetrics};
use api::records::{JobStatus, Phase};
use api::{ExitClass, Name};
use coordinator::ClusterClient;
use indicatif::{ProgressBar, ProgressStyle};
use tokio_stream::StreamExt;

use crate::error::{CliError, Result};
use crate::output;

/// Plain lines come at most this often, so that a log file stays readable.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows a job's events until it ends; gives its last status.
pub async fn follow(client: &ClusterClient, job: &Name, json: bool) -> Result<JobStatus> {
    let mut events = client.watch(job).await?;
    let mut view = View::new(json);
    let mut last = None;
    while let Some(event) = events.next().await {
        let event = event?;
        view.show(&event);
        if let JobEvent::Status(status) = event {
            let ended = status.phase.is_terminal();
            last = Some(*status);
            if ended {
                break;
            }
        }
    }
    view.finish();
    last.filter(|status| status.phase.is_terminal()).ok_or_else(|| {
        CliError::new(ExitClass::Unavailable, format!("lost sight of job `{job}`"))
            .with_hint("it goes on without us: `cluster job` shows its state")
    })
}

/// The failure that a job's last status means for this command, if any.
pub fn outcome(job: &Name, status: &JobStatus) -> Result<()> {
    let cause = status.first_cause.as_ref().map(|failure| {
        let rank =
            failure.rank.map_or_else(|| "a worker".into(), |rank| format!("rank {}", rank.0));
        format!("{rank} on {} failed first: {}", failure.worker, failure.cause)
    });
    match status.phase {
        Phase::Failed => {
            let text = format!("job `{job}` failed: {}", status.reason);
            let error = CliError::new(ExitClass::JobFailed, text);
            Err(match cause {
                Some(cause) if !status.reason.contains(&cause) => error.with_hint(cause),
                _ => error,
            })
        }
        Phase::Stopped => Err(CliError::new(
            ExitClass::JobStopped,
            format!("job `{job}` was stopped: {}", status.reason),
        )),
        _ => Ok(()),
    }
}

/// One of the three ways to show events.
enum View {
    Json,
    Bar(ProgressBar, Rate),
    Lines { last: Option<Instant>, said: Option<(Phase, String)> },
}

/// Steps per second over the steps seen by this process.
#[derive(Default)]
struct Rate {
    first: Option<(Instant, u64)>,
}

impl Rate {
    fn update(&mut self, step: u64) -> f64 {
        let (since, first) = *self.first.get_or_insert((Instant::now(), step));
        let elapsed = since.elapsed().as_secs_f64();
        if elapsed > 0.0 { step.saturating_sub(first) as f64 / elapsed } else { 0.0 }
    }
}

impl View {
    fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(0);
            let style =
                ProgressStyle::with_template("{prefix:>9} [{bar:32}] {pos}/{len} {msg} eta {eta}");
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            return Self::Bar(bar, Rate::default());
        }
        Self::Lines { last: None, said: None }
    }

    fn show(&mut self, event: &JobEvent) {
        match self {
            Self::Json => output::json(event),
            Self::Bar(bar, rate) => show_bar(bar, rate, event),
            Self::Lines { last, said } => show_lines(last, said, event),
        }
    }

    fn finish(&self) {
        if let Self::Bar(bar, _) = self {
            bar.abandon();
        }
    }
}

fn show_bar(bar: &ProgressBar, rate: &mut Rate, event: &JobEvent) {
    match event {
        JobEvent::Status(status) => {
            bar.set_prefix(status.phase.to_string());
            if status.phase != Phase::Running {
                bar.set_message(status.reason.clone());
            }
        }
        JobEvent::Step(metrics) => {
            bar.set_length(metrics.last_step.0);
            bar.set_position(metrics.step.0);
            let steps = rate.update(metrics.step.0);
            bar.set_message(format!("loss {:.4}, {steps:.1} step/s", metrics.loss));
        }
        JobEvent::Evaluation(_) | JobEvent::Note { .. } => {
            if let Some(text) = sentence(event) {
                bar.println(text);
            }
        }
        JobEvent::Checkpoint(_) => {}
    }
}

fn show_lines(last: &mut Option<Instant>, said: &mut Option<(Phase, String)>, event: &JobEvent) {
    match event {
        JobEvent::Status(status) => {
            let now = (status.phase, status.reason.clone());
            if said.as_ref() != Some(&now) {
                eprintln!("{}: {}", now.0, now.1);
                *said = Some(now);
            }
        }
        JobEvent::Step(metrics) => {
            let due = last.is_none_or(|at| at.elapsed() >= LINE_INTERVAL);
            if due || metrics.step == metrics.last_step {
                *last = Some(Instant::now());
                eprintln!("{}", step_line(metrics));
            }
        }
        _ => {
            if let Some(text) = sentence(event) {
                eprintln!("{text}");
            }
        }
    }
}

fn step_line(metrics: &StepMetrics) -> String {
    let throughput = if metrics.tokens_per_second > 0.0 {
        format!("{:.0} tokens/s", metrics.tokens_per_second)
    } else {
        format!("{:.0} samples/s", metrics.samples_per_second)
    };
    format!("step {}/{} loss {:.4} {throughput}", metrics.step.0, metrics.last_step.0, metrics.loss)
}

fn sentence(event: &JobEvent) -> Option<String> {
    match event {
        JobEvent::Evaluation(evaluation) => {
            let metrics: Vec<String> = evaluation
                .metrics
                .iter()
                .map(|(name, value)| format!("{name} {value:.4}"))
                .collect();
            Some(format!("step {} {}", evaluation.step.0, metrics.join(" ")))
        }
        JobEvent::Note { generation, rank, text } => Some(match rank {
            Some(rank) => format!("{generation} {rank}: {text}"),
            None => format!("{generation}: {text}"),
        }),
        JobEvent::Checkpoint(fact) => {
            Some(format!("checkpoint at step {} ({})", fact.step.0, output::bytes(fact.bytes)))
        }
        _ => None,
    }
}
