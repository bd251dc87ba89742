//! `cluster chaos …`.

use std::path::PathBuf;

use api::units::{ByteSize, Span};
use chaos::{FaultKind, Role};
use clap::{Args, Subcommand, ValueEnum};

/// `cluster chaos …`.
#[derive(Debug, Subcommand)]
pub enum ChaosCommand {
    /// Disturb a running cluster on this host by a seed, and say what its job made of it.
    Run(ChaosRun),
    /// Run a job on nodes that come and go as a spot trace says, or work out what is left of one.
    Replay(ChaosReplay),
    /// Write sample traces with the statistics of published ones.
    Sample(ChaosSample),
}

/// `cluster chaos run`.
#[derive(Debug, Args)]
pub struct ChaosRun {
    /// Which faults strike when, and whom, follows from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How long faults go on; what they did is undone then.
    #[arg(long, default_value = "60s")]
    pub duration: Span,
    /// Mean time between two faults.
    #[arg(long, default_value = "5s")]
    pub every: Span,
    /// Kinds to choose from, comma-separated: kill, stop, freeze, slow, cut, fill-disk,
    /// throttle-store, kill-coordinator.
    #[arg(long, value_delimiter = ',', default_value = "kill,freeze")]
    pub faults: Vec<FaultKind>,
    /// Whom kill, stop, freeze and slow strike, comma-separated: rank, worker. A killed worker does
    /// not come back by itself.
    #[arg(long, value_delimiter = ',', default_value = "rank")]
    pub roles: Vec<Role>,
    /// The job whose ranks are struck; absent: the only one that runs.
    #[arg(long)]
    pub job: Option<String>,
    /// Folder that fill-disk fills; a small file system of its own is best.
    #[arg(long, value_name = "PATH")]
    pub fill: Option<PathBuf>,
    /// Most bytes that fill-disk writes.
    #[arg(long, default_value = "64MiB")]
    pub fill_bytes: ByteSize,
    /// Print the plan and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// `cluster chaos replay`.
#[derive(Debug, Args)]
pub struct ChaosReplay {
    /// A trace of SkyPilot's spot-traces (JSON) or Parcae's (an event a line).
    pub trace: PathBuf,
    /// With true scale, the job to run; absent: a light one.
    #[arg(long)]
    pub job: Option<PathBuf>,
    /// true: a worker process per node, for as long as the trace lasts. simulate: arithmetic.
    /// Absent: true where that takes at most ten minutes.
    #[arg(long, value_enum)]
    pub scale: Option<Scale>,
    /// The same as --scale simulate.
    #[arg(long, conflicts_with = "scale")]
    pub simulate: bool,
    /// With true scale, so many times faster than the trace; absent: as fast.
    #[arg(long)]
    pub speed: Option<f64>,
    /// Scale the trace's counts down so that its peak is this. Absent: 4 with true scale, as they
    /// are otherwise.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub max_nodes: Option<u32>,
    /// With true scale, announce each loss with SIGTERM and kill after this time; absent: SIGKILL
    /// at once.
    #[arg(long, value_name = "SPAN")]
    pub notice: Option<Span>,
    /// With true scale, which nodes go follows from it; absent: 1.
    #[arg(long)]
    pub seed: Option<u64>,
    /// What recovery costs.
    #[command(flatten)]
    pub costs: Costs,
}

/// What the simulated job is charged. All but the last two are Cohort's rows alone.
#[derive(Debug, Args)]
pub struct Costs {
    /// From a loss until it is known.
    #[arg(long, value_name = "SPAN")]
    pub detect: Option<Span>,
    /// From then until the survivors go on.
    #[arg(long, value_name = "SPAN")]
    pub shrink: Option<Span>,
    /// For nodes that join.
    #[arg(long, value_name = "SPAN")]
    pub grow: Option<Span>,
    /// For nodes whose loss was announced.
    #[arg(long, value_name = "SPAN")]
    pub noticed: Option<Span>,
    /// To begin when no node was left.
    #[arg(long, value_name = "SPAN")]
    pub restart: Option<Span>,
    /// Training time between two checkpoints, at least a second.
    #[arg(long, value_name = "SPAN")]
    pub checkpoint: Option<Span>,
    /// A step, in every row.
    #[arg(long, value_name = "SPAN")]
    pub step: Option<Span>,
}

/// How a trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scale {
    /// A worker process per node, for as long as the trace lasts.
    True,
    /// Arithmetic.
    Simulate,
}

/// `cluster chaos sample`.
#[derive(Debug, Args)]
pub struct ChaosSample {
    /// Folder to write to; files of the same names are replaced.
    #[arg(long, short)]
    pub output: PathBuf,
    /// Equal seeds give equal files.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}
