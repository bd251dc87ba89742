//! A trace at true scale: a coordinator and, for every node of the trace, a worker of one slot, each
//! a process of its own; workers are killed and started as the trace says while an elastic job runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api::JobSpec;
use api::config::{ClusterConfig, Member, TlsSection};
use api::records::{JobRecord, Phase};
use api::units::Span;
use chaos::{Random, Trace};
use coordinator::ClusterClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::job::{self, Watch};
use crate::args::{ChaosReplay, Global};
use crate::certificates::ensure_token;
use crate::commands::roles::DIES_WITH;
use crate::commands::submit::load_job;
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::follow::outcome;
use crate::output;
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// For a coordinator to lead, and for a job to stop.
const GUARD: Duration = Duration::from_secs(60);
/// Between two attempts to reach the coordinator that is starting.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Attempts to remove the folder.
const REMOVALS_MAX: u32 = 40;
/// As long as a trace may be.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 86_400);

/// Runs a job on nodes that come and go, and says what became of their time.
pub async fn replay(global: &Global, args: &ChaosReplay, trace: &Trace) -> Result<()> {
    let speed = args.speed.unwrap_or(1.0);
    let last = Duration::try_from_secs_f64(trace.end_ms() as f64 / 1e3 / speed);
    if !last.is_ok_and(|last| last <= LONGEST) {
        let text = format!("--speed {speed}: the trace would take more than ten years");
        return Err(CliError::usage(text));
    }
    // A job that cannot be used leaves nothing behind.
    let peak = trace.statistics().peak;
    let given = args.job.as_deref().map(|path| load_job(path, &overrides(peak))).transpose()?;
    let mut signals = Signals::new()?;
    let folder = make_folder()?;
    let ended = tokio::select! {
        ended = replay_in(global, args, given, trace, &folder) => Some(ended),
        () = signals.wait() => None,
    };
    // All processes have ended with the future that held them.
    let kept = match &ended {
        Some(Err(_)) => Some(folder.as_path()),
        _ => {
            remove(&folder).await;
            None
        }
    };
    match (ended, kept) {
        (Some(Err(error)), Some(folder)) => {
            Err(error.with_hint(format!("logs and state are left in `{}`", folder.display())))
        }
        (Some(ended), _) => ended,
        (None, _) => std::process::exit(EXIT_INTERRUPTED),
    }
}

async fn replay_in(
    global: &Global,
    args: &ChaosReplay,
    given: Option<JobSpec>,
    trace: &Trace,
    folder: &Path,
) -> Result<()> {
    let spec = match given {
        Some(spec) => spec,
        None => light_job(folder, trace.statistics().peak)?,
    };
    let speed = args.speed.unwrap_or(1.0);
    let (config_file, access) = configure(folder)?;
    let mut coordinator = start(&config_file, folder, "coordinator", &["coordinator"])?;
    let client = connect(&access, &mut coordinator).await?;
    client.submit(&spec).await?;
    let mut nodes = Nodes {
        config_file,
        folder: folder.to_owned(),
        living: BTreeMap::new(),
        leaving: Vec::new(),
        started: 0,
        node_seconds: 0.0,
        random: Random::new(args.seed.unwrap_or(1)),
        notice: args.notice.map(|span| span.0),
    };
    let mut watch = Watch::new(&client, &spec.name);
    let begun = Instant::now();
    let at = |milliseconds: u64| begun + Duration::from_secs_f64(milliseconds as f64 / 1e3 / speed);
    let mut has_ended = false;
    for (start_ms, _, count) in trace.stretches() {
        has_ended = wait(global, begun, at(start_ms), &mut watch, &mut nodes).await?;
        if has_ended {
            break;
        }
        nodes.become_so_many(count).await?;
        let fields = serde_json::json!({ "event": "nodes", "nodes": count });
        tell(global, begun, &format!("{count} nodes"), fields)?;
    }
    if !has_ended {
        has_ended = wait(global, begun, at(trace.end_ms()), &mut watch, &mut nodes).await?;
    }
    let node_seconds = nodes.node_seconds_until(Instant::now());
    if !has_ended {
        client.stop_job(&spec.name).await?;
    }
    let late = |_| CliError::internal(format!("the job did not stop within {GUARD:?}"));
    let job = tokio::time::timeout(GUARD, watch.end()).await.map_err(late)??;
    nodes.kill_all().await;
    conclude(global, &job, node_seconds)?;
    match job.status.phase {
        Phase::Failed => outcome(&job.spec.name, &job.status).map_err(CliError::told_by_result),
        _ => Ok(()),
    }
}

/// Waits until a time, telling what the job does; true when the job has ended.
async fn wait(
    global: &Global,
    begun: Instant,
    until: Instant,
    watch: &mut Watch,
    nodes: &mut Nodes,
) -> Result<bool> {
    loop {
        let status = tokio::select! {
            biased;
            () = tokio::time::sleep_until(until) => return Ok(false),
            failed = nodes.failed() => return Err(failed),
            status = watch.status() => status,
        };
        let fields = serde_json::json!({
            "event": "job", "phase": status.phase, "generation": status.generation,
            "ranks": status.gang.len(),
        });
        tell(global, begun, &job::line(&status), fields)?;
        if status.phase.is_terminal() {
            return Ok(true);
        }
    }
}

/// Prints what happens. Ends the replay where nobody can read it: the processes end with it.
fn tell(global: &Global, begun: Instant, text: &str, mut fields: serde_json::Value) -> Result<()> {
    let seconds = begun.elapsed().as_secs_f64();
    if global.json {
        fields["at_ms"] = ((seconds * 1e3) as u64).into();
        return output::try_line(&fields.to_string());
    }
    output::try_line(&format!("{seconds:8.3} s  {text}"))
}

/// Goodput of the nodes, which counts the time before a node's rank runs and after its job's last
/// record, beside the job's own, which does not.
fn conclude(global: &Global, job: &JobRecord, node_seconds: f64) -> Result<()> {
    let book = &job.status.goodput;
    let good = (book.useful_ms + book.communication_ms) as f64 / 1e3;
    let goodput = (node_seconds > 0.0).then(|| good / node_seconds);
    if global.json {
        let mut document = job::document(job);
        document["event"] = "end".into();
        document["node_seconds"] = node_seconds.into();
        document["goodput_of_nodes"] = goodput.into();
        return output::try_line(&document.to_string());
    }
    job::show(job);
    output::try_line("")?;
    let part = goodput.map_or_else(|| "-".into(), |part| format!("{part:.3}"));
    output::try_line(&format!("goodput of the nodes: {part} of {node_seconds:.1} node-seconds"))
}

/// What a replay changes of its job: any number of ranks up to `peak`, and no end of its own.
fn overrides(peak: u32) -> Vec<String> {
    vec![
        format!("resources.ranks={{ min = 1, max = {peak} }}"),
        "stop.max_steps=1000000".into(),
        // Losses are what is tried here, not a reason to give up.
        "recovery.max_failures=1000".into(),
    ]
}

/// A transformer of half a million weights on a text of its own. Its steps take a few tenths of a
/// second: of a step of a few milliseconds, what ranks say to each other between steps is a good part.
fn light_job(folder: &Path, peak: u32) -> Result<JobSpec> {
    let text: String = (0..400)
        .map(|line| {
            format!("fn step_{}(rank: usize) -> usize {{ rank + {} }}\n", line % 37, line % 11)
        })
        .collect();
    let job = "name = \"replay\"\nalgorithm = \"transformer\"\nseed = 1\n\
         [channels]\ntrain = { uri = \"file://text.txt\" }\n\
         [hyperparameters]\nlayers = 2\nwidth = 128\nheads = 4\nsequence_length = 128\n\
         [batch]\nglobal = 32\n[checkpoint]\nevery_steps = 50\n[stop]\nmax_steps = 1\n";
    let path = folder.join("job.toml");
    let written =
        std::fs::write(folder.join("text.txt"), text).and_then(|()| std::fs::write(&path, job));
    written.map_err(|e| CliError::usage(format!("cannot write to `{}`: {e}", folder.display())))?;
    let mut overrides = overrides(peak);
    overrides.push(format!("batch.lanes={}", peak.next_power_of_two().max(8)));
    load_job(&path, &overrides)
}

/// cluster.toml of one coordinator on a free port of loopback, and how to reach it.
fn configure(folder: &Path) -> Result<(PathBuf, Access)> {
    let free = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let address = free
        .and_then(|listener| listener.local_addr())
        .map_err(|e| CliError::internal(format!("no port is free: {e}")))?;
    let mut config = ClusterConfig::default();
    config.cluster.dir = folder.join("cluster");
    config.cluster.token_file = folder.join("token");
    // Workers differ in nothing but their name, so their ranks stop as soon as they are told to.
    config.worker.stop_timeout = Span::seconds(10);
    config.coordinator.members = vec![Member { node: config.coordinator.node, address }];
    config.store.uri = format!("file://{}", folder.join("store").display());
    ensure_token(&config.cluster.token_file)?;
    let path = folder.join("cluster.toml");
    let text = toml::to_string(&config)
        .map_err(|e| CliError::internal(format!("cannot write a configuration: {e}")))?;
    std::fs::write(&path, text)
        .map_err(|e| CliError::usage(format!("cannot write `{}`: {e}", path.display())))?;
    let access = Access {
        coordinators: vec![address],
        tls: TlsSection::default(),
        token_file: config.cluster.token_file,
        store_uri: config.store.uri,
        config: Some(path.clone()),
        pid: 0,
    };
    Ok((path, access))
}

/// One role as a process of its own, killed when dropped; what it prints goes to a file.
fn start(config: &Path, folder: &Path, log: &str, arguments: &[&str]) -> Result<Child> {
    let failed = |e: std::io::Error| {
        CliError::internal(format!("cannot start `cluster {}`: {e}", arguments.join(" ")))
    };
    let program = std::env::current_exe().map_err(failed)?;
    let errors = File::create(folder.join(format!("{log}.log"))).map_err(failed)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .arg("--config")
        .arg(config)
        .env_remove("COHORT_DIR")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        // Ctrl-C is for us: what it means for them is ours to say.
        .process_group(0)
        .kill_on_drop(true)
        // Where nothing is dropped.
        .env(DIES_WITH, std::process::id().to_string());
    command.spawn().map_err(failed)
}

/// Waits until the coordinator leads.
async fn connect(access: &Access, coordinator: &mut Child) -> Result<ClusterClient> {
    let reach = async {
        loop {
            if let Ok(client) = access.connect().await
                && client.workers().await.is_ok()
            {
                return client;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    };
    tokio::select! {
        reached = tokio::time::timeout(GUARD, reach) => {
            reached.map_err(|_| CliError::internal("the coordinator does not lead"))
        }
        ended = coordinator.wait() => {
            let ended = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
            Err(CliError::internal(format!("the coordinator ended: {ended}")))
        }
    }
}

/// The workers that stand for nodes.
struct Nodes {
    config_file: PathBuf,
    folder: PathBuf,
    /// By number; with when each started.
    living: BTreeMap<u32, (Child, Instant)>,
    /// Told to leave, and here until they have.
    leaving: Vec<Leaving>,
    started: u32,
    /// Of those that are gone.
    node_seconds: f64,
    random: Random,
    notice: Option<Duration>,
}

impl Nodes {
    async fn become_so_many(&mut self, count: u32) -> Result<()> {
        while self.living.len() > count as usize {
            self.lose_one().await;
        }
        while self.living.len() < count as usize {
            self.started += 1;
            let name = format!("n{}", self.started);
            let arguments = ["worker", "--name", &name, "--slots", "1"];
            let child = start(&self.config_file, &self.folder, &name, &arguments)?;
            self.living.insert(self.started, (child, Instant::now()));
        }
        Ok(())
    }

    /// Kills one of them, or tells it to leave and kills it after the time of notice.
    async fn lose_one(&mut self) {
        let numbers: Vec<u32> = self.living.keys().copied().collect();
        let chosen = self.random.choose(&numbers).and_then(|number| self.living.remove(number));
        let Some((mut child, since)) = chosen else { return };
        let Some((notice, pid)) = self.notice.zip(child.id()) else {
            let _ = child.kill().await;
            self.node_seconds += since.elapsed().as_secs_f64();
            return;
        };
        // Its number is still its own: nobody has waited for it.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        let left = Arc::new(OnceLock::new());
        let mark = left.clone();
        let kill = tokio::spawn(async move {
            if tokio::time::timeout(notice, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
            // Nobody else sets it.
            let _ = mark.set(Instant::now());
        });
        self.leaving.push(Leaving { since, left, kill });
    }

    /// Waits until one ends that nobody has killed.
    async fn failed(&mut self) -> CliError {
        let waits = self
            .living
            .iter_mut()
            .map(|(number, (child, _))| Box::pin(async move { (*number, child.wait().await) }));
        let waits: Vec<_> = waits.collect();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        let (number, ended) = first(waits).await;
        let ended = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
        CliError::internal(format!("the worker n{number} ended by itself: {ended}"))
    }

    fn node_seconds_until(&self, now: Instant) -> f64 {
        let living = self.living.values().map(|(_, since)| now - *since);
        let leaving = self.leaving.iter().map(|leaving| leaving.lived_until(now));
        self.node_seconds + living.chain(leaving).map(|span| span.as_secs_f64()).sum::<f64>()
    }

    async fn kill_all(&mut self) {
        for (child, _) in self.living.values_mut() {
            let _ = child.kill().await;
        }
        self.living.clear();
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // Dropping the task drops the process that it holds, which kills it.
        self.leaving.iter().for_each(|leaving| leaving.kill.abort());
    }
}

/// A node that was told to leave. It works and is paid for as long as it is there.
struct Leaving {
    /// When it started.
    since: Instant,
    /// When it had left.
    left: Arc<OnceLock<Instant>>,
    /// Kills it after the time of notice.
    kill: tokio::task::JoinHandle<()>,
}

impl Leaving {
    fn lived_until(&self, now: Instant) -> Duration {
        self.left.get().copied().unwrap_or(now).min(now) - self.since
    }
}

/// A private folder that nobody has used before.
fn make_folder() -> Result<PathBuf> {
    let pid = std::process::id();
    for number in 0u32.. {
        let path = std::env::temp_dir().join(format!("cohort-replay-{pid}-{number}"));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            // Left by a replay of that process number that failed.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                let text = format!("cannot make the folder `{}`: {error}", path.display());
                return Err(CliError::usage(text));
            }
        }
    }
    Err(CliError::internal("no name is free for a folder"))
}

/// Removes it; processes that were killed just now may still write there.
async fn remove(folder: &Path) {
    for _ in 0..REMOVALS_MAX {
        if std::fs::remove_dir_all(folder).is_ok() {
            return;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// The first of some futures to be ready.
async fn first<T, F: Future<Output = T> + Unpin>(mut futures: Vec<F>) -> T {
    std::future::poll_fn(move |context| {
        for future in &mut futures {
            if let ready @ std::task::Poll::Ready(_) = std::pin::Pin::new(future).poll(context) {
                return ready;
            }
        }
        std::task::Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_counts_until_it_has_left() {
        let since = Instant::now();
        let after = |seconds| since + Duration::from_secs(seconds);
        let kill = tokio::spawn(std::future::pending());
        let leaving = Leaving { since, left: Arc::default(), kill };
        assert_eq!(leaving.lived_until(after(7)).as_secs(), 7);
        leaving.left.set(after(9)).expect("set once");
        assert_eq!(leaving.lived_until(after(60)).as_secs(), 9);
        leaving.kill.abort();
    }

    #[tokio::test]
    async fn each_replay_has_a_folder_of_its_own() {
        let folders = [make_folder().expect("made"), make_folder().expect("made")];
        assert_ne!(folders[0], folders[1]);
        for folder in folders {
            std::fs::write(folder.join("file"), "").expect("written");
            remove(&folder).await;
            assert!(!folder.exists());
        }
    }
}
