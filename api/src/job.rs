//! job.toml: what to train, on what data, with which resources, and when to stop.
//!
//! [`JobSpec`] is the file after `--set`, defaults and path resolution: immutable, recorded, the only
//! form the rest of the code takes.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::document::{self, DocumentError};
use crate::ids::{Name, Step};
use crate::schema::{AlgorithmSchema, SchemaError, Value};
use crate::units::{ByteSize, Span};

/// Lanes of the fixed reduction tree unless the job says otherwise.
pub const LANES_DEFAULT: u32 = 8;
/// Most lanes a job may ask for: partial sums are kept per open subtree, log2(lanes) of them.
pub const LANES_MAX: u32 = 1024;
/// Shortest `stop.max_wait`: placing a job on free slots takes some milliseconds, a busy leader more.
const MAX_WAIT_MIN: Span = Span::seconds(1);

/// A job, resolved and checked against everything that needs no tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The job's name, unique in the cluster.
    pub name: Name,
    /// Which built-in algorithm trains; `cluster algorithms` lists them.
    pub algorithm: String,
    /// Everything random in the job is a pure function of it.
    #[serde(default)]
    pub seed: u64,
    /// Named inputs.
    #[serde(default)]
    pub channels: BTreeMap<String, Channel>,
    /// Settings of the algorithm and the optimiser; the schema gives types, ranges and defaults.
    #[serde(default)]
    pub hyperparameters: BTreeMap<String, Value>,
    /// How samples are grouped into steps.
    #[serde(default)]
    pub batch: Batch,
    /// What it runs on.
    #[serde(default)]
    pub resources: Resources,
    /// How the work is divided over ranks.
    #[serde(default)]
    pub parallel: Parallel,
    /// When state is saved and how much of it is kept.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// When the job ends.
    #[serde(default)]
    pub stop: StopConditions,
    /// How often validation runs.
    #[serde(default)]
    pub evaluate: Evaluate,
    /// What happens when a rank dies.
    #[serde(default)]
    pub recovery: Recovery,
    /// Free key = value pairs for people and tools.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// One data channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Channel {
    /// `file://` or `s3://`, a file or a folder; in job.toml a relative path is taken from the
    /// job file's folder.
    pub uri: String,
    /// The data's form, such as `text/csv`; guessed from the name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
}

/// How samples are grouped: global batch = lanes × microbatches per lane × microbatch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Samples per optimiser step, whatever the number of ranks.
    pub global: NonZeroU32,
    /// Lanes of the fixed reduction tree; ranks own whole lanes, so it bounds the ranks.
    pub lanes: NonZeroU32,
    /// Samples computed at once; absent: global / lanes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub microbatch: Option<NonZeroU32>,
}

impl Default for Batch {
    fn default() -> Self {
        let lanes = const { NonZeroU32::new(LANES_DEFAULT).expect("not zero") };
        Self { global: const { NonZeroU32::new(64).expect("not zero") }, lanes, microbatch: None }
    }
}

impl Batch {
    /// Samples computed at once.
    pub fn microbatch_size(&self) -> u32 {
        self.microbatch.map_or(self.global.get() / self.lanes.get(), NonZeroU32::get)
    }

    /// Microbatches that one lane adds one after another.
    pub fn microbatches_per_lane(&self) -> u32 {
        self.global.get() / self.lanes.get() / self.microbatch_size().max(1)
    }

    /// Microbatches per step.
    pub fn microbatches(&self) -> u32 {
        self.lanes.get() * self.microbatches_per_lane()
    }
}

/// The kind of device a rank computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The host's processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, opened at run time.
    Cuda,
}

/// How many processes a gang has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number of ranks of at least 1, or { min = 1, max = 8 }")]
pub enum Ranks {
    /// Always this many.
    Fixed(NonZeroU32),
    /// As many as there are slots for, within bounds; the result does not depend on it.
    Elastic(Elastic),
}

/// Bounds of an elastic gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elastic {
    /// With fewer the job waits in the queue, its state saved.
    pub min: NonZeroU32,
    /// It never grows beyond.
    pub max: NonZeroU32,
}

impl Ranks {
    /// Fewest ranks that the job runs on.
    pub fn min(self) -> u32 {
        match self {
            Self::Fixed(ranks) | Self::Elastic(Elastic { min: ranks, .. }) => ranks.get(),
        }
    }

    /// Most ranks that the job runs on.
    pub fn max(self) -> u32 {
        match self {
            Self::Fixed(ranks) | Self::Elastic(Elastic { max: ranks, .. }) => ranks.get(),
        }
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(ranks) => write!(f, "{ranks}"),
            Self::Elastic(Elastic { min, max }) => write!(f, "{min}-{max}"),
        }
    }
}

/// What a job runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// What ranks compute on.
    pub device: DeviceKind,
    /// Processes of the gang: a number, or `{ min, max }` for a job that runs on what there is.
    pub ranks: Ranks,
    /// Threads each rank computes with; part of the numeric fingerprint.
    pub threads_per_rank: NonZeroU32,
}

impl Default for Resources {
    fn default() -> Self {
        let one = const { NonZeroU32::new(1).expect("not zero") };
        Self { device: DeviceKind::Cpu, ranks: Ranks::Fixed(one), threads_per_rank: one }
    }
}

/// The order in which gradients are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// A fixed tree over lanes: the same bits for any number of ranks.
    #[default]
    Deterministic,
    /// Whatever order is fastest for the ranks at hand.
    Fast,
}

/// Whether a resume under another numeric fingerprint is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Determinism {
    /// Refused: the result would no longer be the job's result bit for bit.
    #[default]
    Strict,
    /// Allowed, with a warning.
    Relaxed,
}

/// How the work is divided over ranks. Tensor and pipeline axes come later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// Data-parallel replicas; absent: all ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<NonZeroU32>,
    /// Summation order of gradients.
    pub reduction: Reduction,
    /// Whether another numeric fingerprint may resume the job.
    pub determinism: Determinism,
}

/// Compression of checkpoint shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are: trained weights hardly compress.
    #[default]
    None,
    /// zstd, level 1.
    Zstd,
}

/// When state is saved and how much of it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointPolicy {
    /// Steps between checkpoints; 0: only at the end.
    pub every_steps: u64,
    /// Newest committed checkpoints kept; the leader deletes older ones.
    pub keep: NonZeroU32,
    /// Checkpoints at steps that this divides are kept for good; 0: none.
    pub keep_every_steps: u64,
    /// The best ones by a metric, kept beside these; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<KeepBest>,
    /// Compression of the shards.
    pub compression: Compression,
    /// What becomes of a checkpoint that is due while the one before is still being written.
    pub when_behind: WhenBehind,
    /// Tensors that have not changed since the checkpoint before are referred to, not written again.
    pub incremental: bool,
}

/// What becomes of a checkpoint that is due while the one before is still being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBehind {
    /// Training waits until it is written.
    #[default]
    Wait,
    /// It is left out, and training goes on.
    Skip,
}

/// Which checkpoints are kept for what they are worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepBest {
    /// A metric of the same step, such as `validation:loss`; a checkpoint without it is never best.
    pub metric: String,
    /// Whether the least or the largest is best.
    pub mode: BestMode,
    /// How many are kept.
    #[serde(default = "KeepBest::one")]
    pub count: NonZeroU32,
}

/// Which value of a metric is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BestMode {
    /// The least, as of a loss.
    Min,
    /// The largest, as of an accuracy.
    Max,
}

impl KeepBest {
    const fn one() -> NonZeroU32 {
        const { NonZeroU32::new(1).expect("not zero") }
    }
}

impl CheckpointPolicy {
    /// Whether a checkpoint stays however old it is.
    pub fn is_kept_for_good(&self, step: Step) -> bool {
        self.keep_every_steps > 0 && step.0.is_multiple_of(self.keep_every_steps)
    }
}

impl Default for CheckpointPolicy {
    fn default() -> Self {
        Self {
            every_steps: 100,
            keep: const { NonZeroU32::new(3).expect("not zero") },
            keep_every_steps: 0,
            keep_best: None,
            compression: Compression::None,
            when_behind: WhenBehind::Wait,
            incremental: false,
        }
    }
}

/// What happens when the loss or the gradient is no longer a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// The job fails.
    #[default]
    Stop,
    /// The step changes nothing and training goes on with the next one, up to a number in a row.
    Skip,
}

/// When the job ends; at least one of `max_steps` and `max_epochs` must be set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopConditions {
    /// Optimiser steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Passes over the training data, rounded up to whole steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epochs: Option<u64>,
    /// Running time over all generations, after which the job stops with a checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_time: Option<Span>,
    /// Time in the queue in all, at first and after interruptions, after which the job stops and keeps
    /// its checkpoints. Absent: it waits for as long as it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_wait: Option<Span>,
    /// A loss or gradient that is not a number.
    pub divergence: Divergence,
    /// Steps skipped in a row after which the job fails all the same.
    pub max_skips: NonZeroU32,
}

impl Default for StopConditions {
    fn default() -> Self {
        Self {
            max_steps: None,
            max_epochs: None,
            max_time: None,
            max_wait: None,
            divergence: Divergence::Stop,
            max_skips: const { NonZeroU32::new(10).expect("not zero") },
        }
    }
}

/// How often validation runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluate {
    /// Steps between validations; 0: only at the end.
    pub every_steps: u64,
}

/// What happens when a rank dies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recovery {
    /// Failures without progress in between, after which the job fails. Progress is a newly
    /// committed checkpoint, or steps that survivors held in memory.
    pub max_failures: u32,
    /// How long a gang that may run on fewer ranks waits for a replacement of a lost one before it
    /// goes on without; 0: not at all.
    pub wait_for_replacement: Span,
    /// Processes beside the gang that have read the data and built the model, and take a lost
    /// rank's place at once.
    pub spares: u32,
    /// A gang that reports nothing for ten times the longest pause between its steps so far, and at
    /// least this long, hangs: the rank that holds the others up is replaced. 0: never.
    pub hang_min: Span,
    /// What happens about a rank that is slower than its peers step after step.
    pub stragglers: Stragglers,
    /// How long a rank must have been slower, for twenty steps on end at least, before that is worth
    /// a word.
    pub straggler_min: Span,
    /// A state larger than this goes to ranks that join behind the first step with them, which the
    /// others compute without them; a smaller one goes at once, while all wait.
    pub join_behind_above: ByteSize,
}

/// What happens about a rank that is slower than its peers step after step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stragglers {
    /// Nothing.
    Ignore,
    /// It is named in the job's history.
    #[default]
    Tell,
    /// It is named, and replaced as soon as another process can take its place.
    Replace,
}

impl Default for Recovery {
    fn default() -> Self {
        Self {
            max_failures: 3,
            wait_for_replacement: Span::millis(0),
            spares: 0,
            hang_min: Span::seconds(30),
            stragglers: Stragglers::Tell,
            straggler_min: Span::seconds(20),
            // At 10 Gb/s on the wire for 0.9 s: standing still for less costs less than ranks that idle
            // for a step.
            join_behind_above: ByteSize(1 << 30),
        }
    }
}

/// A job file that cannot be used as it stands.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The file is not a job document.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// `--set` is malformed.
    #[error("`--set {text}` is not of the form path=value, such as `--set stop.max_steps=100`")]
    Override {
        /// What was given.
        text: String,
    },
    /// Two settings disagree.
    #[error("{0}")]
    Disagreement(String),
    /// The algorithm's schema does not allow a value.
    #[error(transparent)]
    Schema(#[from] SchemaError),
}

impl JobSpec {
    /// Reads a job file, applies `--set path=value` overrides, resolves relative data paths
    /// against the file's folder, and validates.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, JobError> {
        let text = document::read_text(path)?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Self::parse(&text, &path.display().to_string(), folder, overrides)
    }

    /// [`JobSpec::load`] on text already read.
    pub fn parse(
        text: &str,
        origin: &str,
        folder: &Path,
        overrides: &[String],
    ) -> Result<Self, JobError> {
        // Parsed once as it stands, so that errors in the file carry their line.
        let mut spec: Self = document::parse(text, origin)?;
        if !overrides.is_empty() {
            let mut table: toml::Table = document::parse(text, origin)?;
            for text in overrides {
                apply_override(&mut table, text)?;
            }
            spec = document::from_table(table, &format!("{origin} with --set"))?;
        }
        for channel in spec.channels.values_mut() {
            channel.uri = absolute_uri(&channel.uri, folder);
        }
        spec.validate()?;
        Ok(spec)
    }

    /// Checks every rule that needs only the file; names both values where two disagree.
    pub fn validate(&self) -> Result<(), JobError> {
        let fail = |message: String| Err(JobError::Disagreement(message));
        let (ranks, lanes) = (self.resources.ranks.max(), self.batch.lanes.get());
        if let Ranks::Elastic(Elastic { min, max }) = self.resources.ranks
            && min > max
        {
            return fail(format!(
                "resources.ranks.min = {min} is more than resources.ranks.max = {max}"
            ));
        }
        let global = self.batch.global.get();
        if lanes > LANES_MAX {
            return fail(format!("batch.lanes = {lanes}, expected at most {LANES_MAX}"));
        }
        if ranks > lanes {
            return fail(format!(
                "resources.ranks = {ranks} is more than batch.lanes = {lanes}: a rank owns at \
                 least one whole lane; ask for at most {lanes} ranks or for more lanes"
            ));
        }
        if !global.is_multiple_of(lanes) {
            return fail(format!(
                "batch.global = {global} is not a multiple of batch.lanes = {lanes}"
            ));
        }
        let (per_lane, microbatch) = (global / lanes, self.batch.microbatch_size());
        if !per_lane.is_multiple_of(microbatch) {
            return fail(format!(
                "batch.microbatch = {microbatch} does not divide the {per_lane} samples of a lane \
                 (batch.global = {global} / batch.lanes = {lanes})"
            ));
        }
        if let Some(data) = self.parallel.data
            && Ranks::Fixed(data) != self.resources.ranks
        {
            return fail(format!(
                "parallel.data = {data} does not equal resources.ranks = {}: the product of \
                 the parallel axes must be the number of ranks",
                self.resources.ranks
            ));
        }
        let CheckpointPolicy { every_steps, keep_every_steps, .. } = self.checkpoint;
        if let Some(KeepBest { metric, .. }) = &self.checkpoint.keep_best {
            let evaluations = self.evaluate.every_steps;
            let is_validated = metric.starts_with("validation:");
            if every_steps == 0 || (is_validated && evaluations == 0) {
                return fail(format!(
                    "checkpoint.keep_best.metric = `{metric}` with checkpoint.every_steps = \
                     {every_steps} and evaluate.every_steps = {evaluations}: there is nothing to \
                     choose from before the end"
                ));
            }
            if !["validation:", "train:"].iter().any(|group| metric.starts_with(group)) {
                return fail(format!(
                    "checkpoint.keep_best.metric = `{metric}`, expected one such as \
                     `validation:loss` or `train:loss`"
                ));
            }
        }
        if keep_every_steps > 0
            && (every_steps == 0 || !keep_every_steps.is_multiple_of(every_steps))
        {
            return fail(format!(
                "checkpoint.keep_every_steps = {keep_every_steps} is not a multiple of \
                 checkpoint.every_steps = {every_steps}: there is no checkpoint to keep at most of \
                 these steps"
            ));
        }
        if self.stop.max_steps.is_none() && self.stop.max_epochs.is_none() {
            return fail("nothing ends the job: set stop.max_steps or stop.max_epochs".into());
        }
        if self.stop.max_steps == Some(0) || self.stop.max_epochs == Some(0) {
            return fail("stop.max_steps and stop.max_epochs must be at least 1".into());
        }
        if let Some(wait) = self.stop.max_wait.filter(|wait| *wait < MAX_WAIT_MIN) {
            return fail(format!(
                "stop.max_wait = {wait}: the job would end before it could be placed; expected at \
                 least {MAX_WAIT_MIN}, such as \"2h\", or no such line for a job that waits for \
                 as long as it takes"
            ));
        }
        for (name, channel) in &self.channels {
            if !["file://", "s3://"].iter().any(|scheme| channel.uri.starts_with(scheme)) {
                return fail(format!(
                    "channels.{name}.uri = `{}`, expected file:// or s3://",
                    channel.uri
                ));
            }
        }
        Ok(())
    }

    /// Fills in hyperparameter defaults and checks them, the channels and the metric that checkpoints
    /// are chosen by against the schema.
    pub fn resolve(&mut self, schema: &AlgorithmSchema) -> Result<(), JobError> {
        self.hyperparameters = schema.resolve(&self.hyperparameters)?;
        schema.check_channels(&self.channels)?;
        self.check_best_metric(schema)
    }

    /// A metric that is never reported would keep nothing, and only the end would show it.
    fn check_best_metric(&self, schema: &AlgorithmSchema) -> Result<(), JobError> {
        let Some(KeepBest { metric, .. }) = &self.checkpoint.keep_best else { return Ok(()) };
        let is_validated = self.channels.contains_key("validation") || self.holds_out_data();
        let reported = schema.metrics.iter().map(|reported| reported.name.as_str());
        let (validation, others): (Vec<&str>, Vec<&str>) =
            reported.partition(|name| name.starts_with("validation:"));
        let there = if is_validated { [&others[..], &validation].concat() } else { others };
        if there.contains(&metric.as_str()) {
            return Ok(());
        }
        let problem = match validation.contains(&metric.as_str()) {
            true => format!(
                "checkpoint.keep_best.metric = `{metric}`, but the job validates nothing: set \
                 channels.validation or hyperparameters.validation_fraction, or choose one of {}",
                there.join(", ")
            ),
            false => document::unknown("checkpoint.keep_best.metric", metric, &there),
        };
        Err(JobError::Disagreement(problem))
    }

    /// Whether a part of the training data is validated with, in place of a channel.
    fn holds_out_data(&self) -> bool {
        match self.hyperparameters.get("validation_fraction") {
            Some(Value::Float(fraction)) => *fraction > 0.0,
            _ => false,
        }
    }
}

fn absolute_uri(uri: &str, folder: &Path) -> String {
    let path = match uri.split_once("://") {
        None => uri,
        Some(("file", path)) if !path.starts_with('/') => path,
        Some(_) => return uri.to_owned(),
    };
    let joined = folder.join(path);
    let absolute = std::path::absolute(&joined).unwrap_or(joined);
    format!("file://{}", absolute.display())
}

/// `a.b=value`: the value is read as TOML, and as plain text when it is not.
fn apply_override(table: &mut toml::Table, text: &str) -> Result<(), JobError> {
    let malformed = || JobError::Override { text: text.to_owned() };
    let (path, value) = text.split_once('=').ok_or_else(malformed)?;
    let value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|k| !k.is_empty()).ok_or_else(malformed)?;
    let mut target = table;
    for key in keys {
        target = target
            .entry(key)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(malformed)?;
    }
    target.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = \"a\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 1\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<JobSpec, JobError> {
        let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
        JobSpec::parse(text, "job.toml", Path::new("/data"), &overrides)
    }

    fn error(text: &str, overrides: &[&str]) -> String {
        parse(text, overrides).expect_err("accepted").to_string()
    }

    #[test]
    fn overrides_reach_nested_keys_and_keep_types() {
        let set = ["resources.ranks=3", "batch.global=24", "name=b", "tags.team=vision"];
        let spec = parse(SMALL, &set).expect("valid");
        assert_eq!((spec.resources.ranks.max(), spec.batch.global.get()), (3, 24));
        assert_eq!((spec.name.as_str(), spec.tags["team"].as_str()), ("b", "vision"));
    }

    #[test]
    fn relative_paths_are_taken_from_the_job_file() {
        let text = format!("{SMALL}[channels.train]\nuri = \"file://x.csv\"\n");
        assert_eq!(parse(&text, &[]).expect("valid").channels["train"].uri, "file:///data/x.csv");
    }

    #[test]
    fn disagreements_name_both_values() {
        let ranks = error(SMALL, &["resources.ranks=9"]);
        assert!(ranks.contains("resources.ranks = 9") && ranks.contains("batch.lanes = 8"));
        assert!(error(SMALL, &["batch.global=20"]).contains("not a multiple"));
        assert!(error(SMALL, &["batch.microbatch=3"]).contains("does not divide"));
        assert!(error(SMALL, &["resources.rank=2"]).contains("did you mean `ranks`?"));
        assert!(error(SMALL, &["nonsense"]).contains("path=value"));
        let wait = error(SMALL, &["stop.max_wait=0s"]);
        assert!(wait.starts_with("stop.max_wait = 0s: the job would end before"), "{wait}");
        assert!(error(SMALL, &["stop.max_wait=8hours"]).contains("\"2h\""));
        assert!(parse(SMALL, &["stop.max_wait=2h"]).is_ok());
    }
}
