//! The command line: one struct per command. The files are the interface; flags select files and
//! override little.

use std::net::SocketAddr;
use std::path::PathBuf;

use api::units::Span;
use clap::{Args, Parser, Subcommand, ValueEnum};

mod chaos;

pub use chaos::{ChaosCommand, ChaosReplay, ChaosRun, ChaosSample, Costs, Scale};

/// Train across processes and machines, survive interruptions, serve what was trained.
#[derive(Debug, Parser)]
#[command(name = "cluster", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print JSON documents, one a line, instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
    /// Folder of the cluster to talk to; `cluster up` makes it.
    #[arg(long, global = true, env = "COHORT_DIR", value_name = "PATH")]
    pub dir: Option<PathBuf>,
    /// cluster.toml of the cluster to talk to, or of the role to run.
    #[arg(long, global = true, env = "COHORT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Log more: -v info, -vv debug, -vvv trace. COHORT_LOG takes a filter.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole cluster on this machine, in the foreground.
    Up(Up),
    /// Send a job; with --local, run it to its end on this machine without a cluster.
    Submit(Submit),
    /// List jobs.
    Jobs,
    /// Show one job: state, why, where, and what failed first.
    Job(JobName),
    /// Print what a job's ranks wrote.
    Logs(Logs),
    /// Watch a job until it ends.
    Follow(JobName),
    /// Show what each rank of a job is doing, who waits for whom, and what failed ranks did last.
    Flight(Flight),
    /// Stop a job or an endpoint; a job's state is saved first.
    Stop(Stop),
    /// Go on with a stopped or failed job from its last committed checkpoint.
    Resume(Resume),
    /// List workers.
    Workers,
    /// Have a worker's tasks leave it, and place no more on it: others take over their work; where
    /// nobody can, their state is saved and the job waits.
    Drain(Drain),
    /// Let a drained worker take tasks again.
    Undrain(WorkerName),
    /// List a job's checkpoints.
    Checkpoints(Checkpoints),
    /// Verify a job's checkpoints, compare two (`diff`), export one as a weights file, or find what no
    /// manifest names (`gc`).
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// List models.
    Models,
    /// List endpoints.
    Endpoints,
    /// Serve a registered model on the cluster.
    Deploy(Deploy),
    /// Serve a model from this process.
    Serve(Serve),
    /// Ask a model: a folder or file, a registered model, or an endpoint.
    Predict(Predict),
    /// Prepare data.
    #[command(subcommand)]
    Data(DataCommand),
    /// List the built-in algorithms, or describe one.
    Algorithms(Algorithms),
    /// Show the coordinators and who leads.
    Status,
    /// Make a certificate authority, certificates and a token for a cluster of several hosts.
    Certs(Certs),
    /// Run one coordinator, as configured.
    Coordinator,
    /// Run one worker, as configured.
    Worker(WorkerArgs),
    /// Measure this machine.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Strike a cluster with faults, or replay how spot nodes come and go.
    #[command(subcommand)]
    Chaos(ChaosCommand),
    /// One rank of a job; started by a worker.
    #[command(hide = true)]
    Rank,
    /// One replica of an endpoint; started by a worker.
    #[command(hide = true)]
    Replica,
    /// Test memory, arithmetic and devices of this host; started by a worker.
    #[command(hide = true)]
    SelfTest,
    /// One rank of `bench collective`; started by it.
    #[command(hide = true)]
    BenchRank,
}

/// `cluster up`.
#[derive(Debug, Args)]
pub struct Up {
    /// Workers to run: 1 to 64.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Coordinators to run: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub coordinators: u32,
    /// Ranks each worker may run at once; 0: one per core, shared among the workers.
    #[arg(long, default_value_t = 0)]
    pub slots: u32,
    /// Port of the first coordinator; the others follow. 0: any free ones.
    #[arg(long, default_value_t = 7070)]
    pub port: u16,
}

/// `cluster submit`.
#[derive(Debug, Args)]
pub struct Submit {
    /// The job file.
    pub job: PathBuf,
    /// Run it here to its end, without a running cluster. Its folder is `.cohort/runs/NAME` unless
    /// --dir names one.
    #[arg(long)]
    pub local: bool,
    /// Watch it until it ends (implied by --local).
    #[arg(long, short)]
    pub follow: bool,
    /// Override a key of the job file, such as `--set resources.ranks=4`. May be repeated.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

/// A job's name.
#[derive(Debug, Args)]
pub struct JobName {
    /// The job.
    pub name: String,
}

/// `cluster logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// The job.
    pub name: String,
    /// Go on until the job ends.
    #[arg(long, short)]
    pub follow: bool,
    /// Only this rank.
    #[arg(long)]
    pub rank: Option<u32>,
}

/// `cluster flight`.
#[derive(Debug, Args)]
pub struct Flight {
    /// The job.
    pub name: String,
    /// Only this rank, with its last operations.
    #[arg(long)]
    pub rank: Option<u32>,
    /// What was kept of an earlier generation; absent: the running one, else the newest kept.
    #[arg(long)]
    pub generation: Option<u64>,
    /// What the threads of the ranks that run are in now.
    #[arg(long, conflicts_with = "generation")]
    pub stacks: bool,
}

/// `cluster stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// The job or endpoint.
    pub name: String,
    /// It is an endpoint.
    #[arg(long)]
    pub endpoint: bool,
}

/// `cluster resume`.
#[derive(Debug, Args)]
pub struct Resume {
    /// The job.
    pub name: String,
    /// Run it here to its end, in the folder that --dir names.
    #[arg(long)]
    pub local: bool,
    /// Watch it until it ends (implied by --local).
    #[arg(long, short)]
    pub follow: bool,
}

/// `cluster drain`.
#[derive(Debug, Args)]
pub struct Drain {
    /// The worker.
    pub worker: String,
    /// Time its tasks get before they are killed, such as 2m; absent: worker.stop_timeout of its
    /// cluster.toml.
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Span>,
}

/// A worker's name.
#[derive(Debug, Args)]
pub struct WorkerName {
    /// The worker.
    pub worker: String,
}

/// `cluster checkpoints`.
#[derive(Debug, Args)]
pub struct Checkpoints {
    /// The job.
    pub job: String,
}

/// `cluster checkpoint …`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Read every byte of a job's checkpoints and compare checksums.
    Verify {
        /// The job.
        job: String,
        /// Only the one at this step.
        #[arg(long)]
        step: Option<u64>,
    },
    /// Say which tensors differ between two checkpoints of a job, and by how much.
    Diff {
        /// The job.
        job: String,
        /// The step of the one; absent: the one before the other.
        #[arg(long, value_name = "STEP")]
        from: Option<u64>,
        /// The step of the other; absent: the newest.
        #[arg(long, value_name = "STEP")]
        to: Option<u64>,
    },
    /// Show objects among a job's checkpoints that no manifest names, with their sizes.
    Gc {
        /// The job.
        job: String,
        /// Delete them; refused while the job goes on, when only the leader deletes.
        #[arg(long)]
        delete: bool,
    },
    /// Write a checkpoint's weights as one safetensors file.
    Export {
        /// The job.
        job: String,
        /// The file to write.
        #[arg(long, short)]
        output: PathBuf,
        /// The step; absent: the newest.
        #[arg(long)]
        step: Option<u64>,
    },
}

/// `cluster deploy`.
#[derive(Debug, Args)]
pub struct Deploy {
    /// The registered model.
    pub model: String,
    /// The endpoint's name; absent: the model's.
    #[arg(long)]
    pub name: Option<String>,
    /// Where its replica listens; port 0: any free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
}

/// `cluster serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// A folder with model.safetensors and model.json, or a registered model.
    pub model: String,
    /// Where to listen; absent: serve.listen of cluster.toml.
    #[arg(long)]
    pub listen: Option<SocketAddr>,
}

/// `cluster predict`.
#[derive(Debug, Args)]
pub struct Predict {
    /// A folder with model.safetensors and model.json, a registered model, or an endpoint.
    pub model: String,
    /// The request: a file (.json, .jsonl, .csv, .png, .jpg or .txt), or `-` for standard input.
    #[arg(long, short, conflicts_with = "text")]
    pub input: Option<PathBuf>,
    /// The request: a text to go on from.
    #[arg(long, short)]
    pub text: Option<String>,
    /// Tokens to generate.
    #[arg(long, default_value_t = 64)]
    pub max_tokens: u32,
    /// 0: always the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f32,
    /// Sample among this many likeliest tokens.
    #[arg(long)]
    pub top_k: Option<u32>,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `cluster data …`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Pack text files into one file of tokens.
    Pack(Pack),
}

/// `cluster data pack`.
#[derive(Debug, Args)]
pub struct Pack {
    /// Files and folders, walked in sorted order.
    pub inputs: Vec<PathBuf>,
    /// The pack to write.
    #[arg(long, short)]
    pub output: PathBuf,
    /// A tokenizer.json; absent: bytes.
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Only files with these extensions, comma-separated; absent: all text files.
    #[arg(long, value_delimiter = ',')]
    pub extensions: Vec<String>,
    /// A file with names of crates, one a line: packs their sources from cargo's registry folder.
    #[arg(long, requires = "lock")]
    pub crates: Option<PathBuf>,
    /// The Cargo.lock that gives the crates' versions.
    #[arg(long)]
    pub lock: Option<PathBuf>,
}

/// `cluster algorithms`.
#[derive(Debug, Args)]
pub struct Algorithms {
    /// The algorithm to describe; absent: list all.
    pub name: Option<String>,
    /// Describe all as the Markdown page of the documentation.
    #[arg(long, conflicts_with = "name")]
    pub markdown: bool,
}

/// `cluster certs`.
#[derive(Debug, Args)]
pub struct Certs {
    /// Folder to write to; an authority that is there already is used again.
    #[arg(long, short)]
    pub output: PathBuf,
    /// Hosts to make certificates for, comma-separated; each gets NAME.pem and NAME.key.
    #[arg(long, value_delimiter = ',', default_value = "host")]
    pub hosts: Vec<String>,
}

/// `cluster worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// The worker's name; absent: worker.name of cluster.toml, else the host's.
    #[arg(long)]
    pub name: Option<String>,
    /// Ranks it may run at once; absent: worker.slots of cluster.toml, else one per core.
    #[arg(long)]
    pub slots: Option<u32>,
}

/// `cluster bench …`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Steps and tokens or samples per second of a job file, on this machine, without checkpoints.
    Train(BenchTrain),
    /// How long a job stands still when one of its ranks dies, leaves or comes, on this machine.
    Recovery(BenchRecovery),
    /// What checkpoints cost a job's steps, and how fast they are written and read, on this machine.
    Checkpoint(BenchCheckpoint),
    /// Time, bandwidth and limits of the collectives, among processes on this machine.
    Collective(BenchCollective),
}

/// `cluster bench train`.
#[derive(Debug, Args)]
pub struct BenchTrain {
    /// The job file.
    pub job: PathBuf,
    /// Steps to measure, after the warm-up.
    #[arg(long, default_value_t = 10)]
    pub steps: u64,
    /// Steps before measuring.
    #[arg(long, default_value_t = 3)]
    pub warmup: u64,
    /// Override a key of the job file. May be repeated.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

/// `cluster bench recovery`.
#[derive(Debug, Args)]
pub struct BenchRecovery {
    /// The job file.
    pub job: PathBuf,
    /// Faults, one after another.
    #[arg(long, default_value_t = 10)]
    pub faults: usize,
    /// Which rank each fault hits follows from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// What happens to a rank.
    #[arg(long, value_enum, default_value_t = BenchFault::Kill)]
    pub fault: BenchFault,
    /// Fail when the stall is above 1 s in the median or above 3 s at worst (a drain: 1 s at worst),
    /// more than one step is lost (a drain: any), or a survivor's process is replaced.
    #[arg(long)]
    pub check: bool,
    /// Override a key of the job file. May be repeated.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

/// What happens to a rank in `cluster bench recovery`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchFault {
    /// SIGKILL: the process is gone.
    Kill,
    /// SIGSTOP: the process is there and does nothing.
    Stop,
    /// Its worker is drained, as by a spot notice, and then taken back: a rank leaves, a rank joins.
    Drain,
}

/// `cluster bench checkpoint`.
#[derive(Debug, Args)]
pub struct BenchCheckpoint {
    /// A job file: what checkpoints cost its steps is measured too.
    pub job: Option<PathBuf>,
    /// Size of the state that is written and read without a job.
    #[arg(long, default_value = "430MB")]
    pub state: api::units::ByteSize,
    /// Times that everything is measured, the ways that are compared by turns.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Steps between two checkpoints of the job.
    #[arg(long, default_value_t = 10)]
    pub every: u64,
    /// Steps of the job in each round, with checkpoints and again without.
    #[arg(long, default_value_t = 30)]
    pub steps: u64,
    /// Fail when a checkpoint stops the steps for more than 50 ms in the median or makes the job more
    /// than 3 % slower, when writing is slower than 80 % of a plain write, or reading takes more than
    /// 1.2 times as long as a plain read.
    #[arg(long)]
    pub check: bool,
    /// Override a key of the job file. May be repeated.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

/// `cluster bench collective`.
#[derive(Debug, Args)]
pub struct BenchCollective {
    /// Operations, comma-separated: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast,
    /// barrier, reduce_lanes. Absent: all but the last; with --cost, all_reduce; with --tune,
    /// all_reduce and reduce_lanes, which sums gradients.
    #[arg(long, value_delimiter = ',')]
    pub ops: Vec<String>,
    /// Bytes of the whole buffer, comma-separated. Absent: 4KiB,64KiB,1MiB,64MiB; with --tune, eight
    /// from 1KiB to 16MiB.
    #[arg(long, value_delimiter = ',')]
    pub sizes: Vec<String>,
    /// Numbers of processes, comma-separated. Absent: 2,4; with --cost, 2,3,4,5,6,7.
    #[arg(long, value_delimiter = ',')]
    pub ranks: Vec<String>,
    /// What carries the data: auto, shm, tcp or nccl.
    #[arg(long, default_value = "auto")]
    pub transport: String,
    /// As if the processes were on so many hosts: memory inside one, TCP between them. Only with
    /// --transport auto.
    #[arg(long, value_name = "HOSTS")]
    pub hosts: Option<u32>,
    /// Type of an element: f32, f64, i64, u8, bf16, f16 or i32.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// Order of sums: deterministic or fast.
    #[arg(long, default_value = "deterministic")]
    pub reduction: String,
    /// What is between two timed calls: barrier, which is not timed, or plain, nothing.
    #[arg(long = "loop", default_value = "barrier", value_name = "LOOP")]
    pub pacing: String,
    /// Timed calls per case; absent: as many as its share of about 25 seconds allows.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub iterations: Option<u32>,
    /// Calls before the timed ones; absent: about 50 ms of them.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub warmup: Option<u32>,
    /// Also measure the bare limits in the same run: copying memory, and a socket exchange of the
    /// same bytes among the same number of processes.
    #[arg(long)]
    pub floor: bool,
    /// Compare deterministic with fast sums, alternating.
    #[arg(long, conflicts_with_all = ["floor", "reduction"])]
    pub cost: bool,
    /// Measure every algorithm over TCP, in turn, and write the table of the fastest ones: for
    /// worker.algorithms. An older table in FILE is replaced, any other file is left alone.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["floor", "cost", "algorithms"])]
    pub tune: Option<PathBuf>,
    /// Reduce over TCP as a table of algorithms says.
    #[arg(long, value_name = "FILE")]
    pub algorithms: Option<PathBuf>,
}
