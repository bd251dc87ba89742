//! Drives the shipped binary: runs commands, follows their JSON events, and kills processes.
//!
//! Every wait has a generous guard, so that a hang is a failure and never a stuck run. States are
//! waited for by reading events or, where there are none, by asking until they are there.

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod moto;
pub mod roles;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Longest any single wait may take on a slow, shared machine.
pub const GUARD: Duration = Duration::from_secs(300);

/// The shipped binary.
pub fn cluster() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cluster"));
    command.env_remove("COHORT_DIR").env_remove("COHORT_CONFIG").env_remove("COHORT_LOG");
    command
}

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Ports that were free a moment ago.
pub fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    held.iter().map(|l| l.local_addr().expect("bound").port()).collect()
}

/// A finished command.
#[derive(Debug)]
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Its last line as JSON.
    pub fn last_json(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Fails unless it ended with `code`.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Finished {
    let child = Running::start(command);
    child.finish()
}

/// A running command whose standard output is read line by line.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    stderr: Option<std::thread::JoinHandle<String>>,
}

impl Running {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let stdout = child.stdout.take().expect("piped");
        let mut errors = child.stderr.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = errors.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, lines, seen: Vec::new(), stderr: Some(stderr) }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Waits for the first JSON line that `wanted` accepts.
    pub fn wait_for(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + GUARD;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(error) => {
                    self.kill();
                    let stderr = self.stderr.take().and_then(|t| t.join().ok());
                    let why = match error {
                        RecvTimeoutError::Timeout => "no such event in time",
                        RecvTimeoutError::Disconnected => "the command ended first",
                    };
                    panic!("{what}: {why}\nseen: {:#?}\nstderr: {stderr:?}", self.seen);
                }
            };
            let value = serde_json::from_str::<Value>(&line).unwrap_or(Value::Null);
            self.seen.push(line);
            if wanted(&value) {
                return value;
            }
        }
    }

    /// Waits until `step` steps have been applied.
    pub fn wait_for_step(&mut self, step: u64) -> Value {
        self.wait_for(&format!("step {step}"), |event| {
            event["event"] == "step" && event["step"].as_u64() >= Some(step)
        })
    }

    /// Waits until the checkpoint of `step`, or a later one, is committed; its step.
    pub fn wait_for_checkpoint(&mut self, step: u64) -> u64 {
        let recorded = self.wait_for(&format!("a checkpoint of step {step} or later"), |event| {
            event["event"] == "checkpoint" && event["step"].as_u64() >= Some(step)
        });
        recorded["step"].as_u64().expect("a step")
    }

    /// Everything printed so far.
    pub fn seen(&self) -> &[String] {
        &self.seen
    }

    /// Kills it, and it alone, at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Kills it, and waits until its ranks have died with it, by themselves: nothing writes after.
    pub fn kill_all(&mut self) {
        let (parent, ranks) = (self.pid(), self.ranks());
        self.kill();
        eventually("the ranks are gone", || ranks_below(parent).is_empty().then_some(()));
        for (_, rank) in ranks {
            eventually("the rank is gone", || {
                let stat = std::fs::read_to_string(format!("/proc/{rank}/stat"));
                let stat = stat.unwrap_or_default();
                // A process is called a zombie while threads of it still end, and may write.
                let threads = std::fs::read_dir(format!("/proc/{rank}/task"));
                let is_last = threads.map_or(0, Iterator::count) <= 1;
                (stat.is_empty() || stat.contains(") Z ") && is_last).then_some(())
            });
        }
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it runs");
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Finished {
        let deadline = Instant::now() + GUARD;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    self.kill();
                    panic!("no end within {GUARD:?}; seen: {:#?}", self.seen);
                }
            }
        }
        let status = self.child.wait().expect("waited for");
        let stderr = self.stderr.take().expect("read once").join().expect("no panic");
        let code = status.code().unwrap_or(-1);
        Finished { code, stdout: self.seen.join("\n"), stderr }
    }

    /// Its rank processes, by rank: `cluster rank` below it, told apart by their environment.
    pub fn ranks(&self) -> Vec<(u32, Pid)> {
        ranks_below(self.pid())
    }

    /// Its rank processes by what they were started as, a rank of a generation.
    pub fn tasks(&self) -> Vec<(Task, Pid)> {
        tasks_below(self.pid())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A failed test must not leave a cluster behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The generation and the rank that a process was started as.
pub type Task = (u64, u32);

/// The rank processes whose parent is `parent`, by rank.
pub fn ranks_below(parent: Pid) -> Vec<(u32, Pid)> {
    let tasks = tasks_below(parent).into_iter();
    let mut ranks: Vec<(u32, Pid)> = tasks.map(|((_, rank), pid)| (rank, pid)).collect();
    ranks.sort();
    ranks
}

/// The rank processes whose parent is `parent`, by what they were started as.
pub fn tasks_below(parent: Pid) -> Vec<(Task, Pid)> {
    let mut tasks = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The command's name may hold spaces: the fields go on after its closing bracket.
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let (state, ppid) = (fields.first().copied(), fields.get(1).and_then(|f| f.parse().ok()));
        if ppid != Some(parent.as_raw()) || state == Some("Z") {
            continue;
        }
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let number = |name: &str| {
            let mut pairs = environment.split(|byte| *byte == 0);
            let value = pairs.find_map(|pair| pair.strip_prefix(name.as_bytes()))?;
            String::from_utf8_lossy(value).parse::<u64>().ok()
        };
        if let (Some(generation), Some(rank)) = (number("COHORT_GENERATION="), number("RANK=")) {
            tasks.push(((generation, rank as u32), Pid::from_raw(pid)));
        }
    }
    tasks.sort();
    tasks
}

/// Waits, looking again and again, until `condition` gives something.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + GUARD;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {GUARD:?}");
        // Not at once again: the processes that are waited for need the processors.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Text that a small language model can learn, the same on every machine.
pub fn write_text(path: &Path) {
    let mut text = String::new();
    for i in 0..400 {
        text.push_str(&format!(
            "fn step_{}(rank: usize) -> usize {{ rank + {} }}\n",
            i % 37,
            i % 11
        ));
    }
    std::fs::write(path, text).expect("written");
}

/// A small transformer job over [`write_text`]'s text; gives its path.
pub fn small_job(folder: &Path, extra: &str) -> PathBuf {
    write_text(&folder.join("text.txt"));
    let job = format!(
        "name = \"small\"\nalgorithm = \"transformer\"\nseed = 5\n\
         [channels]\ntrain = {{ uri = \"file://text.txt\" }}\n\
         [hyperparameters]\nlayers = 2\nwidth = 32\nheads = 2\nsequence_length = 32\n\
         learning_rate = 0.003\n\
         [batch]\nglobal = 16\nlanes = 8\n[checkpoint]\nevery_steps = 5\n[stop]\nmax_steps = 40\n\
         {extra}"
    );
    let path = folder.join("job.toml");
    std::fs::write(&path, job).expect("written");
    path
}

/// Submits a job to the cluster in the folder `dir`, and follows it.
pub fn submit(job: &Path, dir: &Path, sets: &[&str]) -> Running {
    let mut submit = cluster();
    submit.arg("submit").arg(job).args(["--json", "--follow", "--dir"]).arg(dir);
    for set in sets {
        submit.args(["--set", set]);
    }
    Running::start(&mut submit)
}

/// A cluster in the folder `dir` with one worker of two slots, once it answers; `extra` goes to `up`.
pub fn up(dir: &Path, extra: &[&str]) -> Running {
    up_with_slots(dir, 2, extra)
}

/// [`up`] with so many slots for each worker.
pub fn up_with_slots(dir: &Path, slots: u32, extra: &[&str]) -> Running {
    let mut command = cluster();
    command.args(["up", "--port", "0", "--json", "--slots", &slots.to_string(), "--dir"]);
    command.arg(dir).args(extra);
    let mut up = Running::start(&mut command);
    up.wait_for("up", |event| event["event"] == "up");
    up
}

/// `submit --local --json` of a job in its own folder.
pub fn submit_local(job: &Path, dir: &Path, sets: &[&str]) -> Command {
    let mut command = cluster();
    command.arg("submit").arg(job).arg("--local").arg("--json").arg("--dir").arg(dir);
    for set in sets {
        command.arg("--set").arg(set);
    }
    command
}

/// The SHA-256 of a finished job's weights, checked against the file itself.
pub fn weights_digest(finished: &Finished) -> String {
    use sha2::Digest;
    let last = finished.last_json();
    assert_eq!(last["state"], "succeeded", "{finished:?}");
    let path = last["model"].as_str().expect("a path");
    let bytes = std::fs::read(path).expect("the weights file");
    let digest: String = sha2::Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(last["sha256"], digest.as_str(), "the file is what was reported");
    digest
}
