//! Processes of this host, as /proc shows them: ranks, and the roles of a cluster.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use api::config::ClusterConfig;
use clap::Parser;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::args::{Cli, Command};

/// A process, told apart from a later one with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: Pid,
    start_ticks: u64,
}

/// What /proc/PID/stat says.
struct Stat {
    state: char,
    parent: u32,
    start_ticks: u64,
}

fn stat(pid: Pid) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces: the fields go on after its closing bracket.
    let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

impl Process {
    /// A living process.
    pub fn of(pid: Pid) -> Option<Self> {
        let stat = stat(pid).filter(|stat| stat.state != 'Z')?;
        Some(Self { pid, start_ticks: stat.start_ticks })
    }

    /// Its state's letter, such as `S` or `T`; none once it is gone.
    fn state(&self) -> Option<char> {
        let stat = stat(self.pid).filter(|stat| stat.start_ticks == self.start_ticks)?;
        (stat.state != 'Z').then_some(stat.state)
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        self.state().is_some()
    }

    /// Whether a signal has stopped it.
    pub fn is_stopped(&self) -> bool {
        self.state() == Some('T')
    }

    /// Sends a signal; to a process that is gone, nothing.
    ///
    /// # Errors
    /// `ESRCH` when it is gone, `EPERM` when it is another user's.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        if !self.is_alive() {
            return Err(Errno::ESRCH);
        }
        kill(self.pid, signal)
    }
}

fn processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
}

/// The value of a variable in a process's environment.
fn variable(pid: Pid, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut pairs = environment.split(|byte| *byte == 0);
    let prefix = format!("{name}=");
    let value = pairs.find_map(|pair| pair.strip_prefix(prefix.as_bytes()))?;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// Living rank processes whose parent is `parent`, with the rank they were started as, by rank.
pub fn rank_processes(parent: u32) -> Vec<(u32, Pid)> {
    let mut ranks: Vec<(u32, Pid)> = processes()
        .filter(|pid| stat(*pid).is_some_and(|stat| stat.parent == parent && stat.state != 'Z'))
        .filter_map(|pid| Some((variable(pid, "RANK")?.parse().ok()?, pid)))
        .collect();
    ranks.sort_unstable();
    ranks
}

/// Living ranks of a job below any of `parents`, with their number, by number.
pub fn ranks_of(job: &str, parents: &[Process]) -> Vec<(u32, Process)> {
    let below = parents.iter().flat_map(|parent| rank_processes(parent.pid.as_raw() as u32));
    let mut ranks: Vec<(u32, Process)> = below
        .filter(|(_, pid)| variable(*pid, "COHORT_JOB").as_deref() == Some(job))
        .filter_map(|(rank, pid)| Some((rank, Process::of(pid)?)))
        .collect();
    ranks.sort_unstable();
    ranks
}

/// Roles of one cluster that run on this host, each by process number.
#[derive(Clone, Debug, Default)]
pub struct Roles {
    /// The process that is all roles at once: `cluster up`, or `cluster submit --local`.
    pub whole: Option<Process>,
    /// Workers that are processes of their own.
    pub workers: Vec<Process>,
    /// Coordinators that are processes of their own.
    pub coordinators: Vec<Process>,
}

impl Roles {
    /// Those of the cluster with these coordinators. `whole` is the process that its folder names.
    pub fn find(coordinators: &[SocketAddr], whole: u32) -> Self {
        let mut roles = Self::default();
        for pid in processes() {
            let Some(process) = Process::of(pid) else { continue };
            let Some(cli) = command_line(pid) else { continue };
            match cli.command {
                Command::Up(_) | Command::Submit(_) | Command::Resume(_)
                    if pid.as_raw() as u32 == whole =>
                {
                    roles.whole = Some(process);
                }
                Command::Worker(_) if is_member(pid, &cli, coordinators) => {
                    roles.workers.push(process);
                }
                Command::Coordinator if is_member(pid, &cli, coordinators) => {
                    roles.coordinators.push(process);
                }
                _ => {}
            }
        }
        roles.workers.sort_unstable();
        roles.coordinators.sort_unstable();
        roles
    }

    /// The processes that start ranks.
    pub fn parents(&self) -> Vec<Process> {
        self.whole.iter().chain(&self.workers).copied().collect()
    }
}

/// What a process was asked to do, if it is this binary.
fn command_line(pid: Pid) -> Option<Cli> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    // A binary that was replaced while it runs has " (deleted)" behind its name.
    let name = program.file_name()?.to_str()?;
    if name.split(' ').next() != Some("cluster") {
        return None;
    }
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = line.split(|byte| *byte == 0).map(|word| OsStringExt::from_vec(word.to_vec()));
    let mut words: Vec<std::ffi::OsString> = words.collect();
    words.pop();
    Cli::try_parse_from(words).ok()
}

/// Whether the role's configuration names these coordinators.
fn is_member(pid: Pid, cli: &Cli, coordinators: &[SocketAddr]) -> bool {
    // An absent flag is read from our own environment by the parser: theirs comes first.
    let path = variable(pid, "COHORT_CONFIG").map(PathBuf::from);
    let path = cli.global.config.clone().filter(|_| has_flag(pid, "--config")).or(path);
    let Some(path) = path else { return false };
    let folder = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    let Ok(config) = ClusterConfig::load(&folder.join(path)) else { return false };
    let mut theirs: Vec<SocketAddr> =
        config.coordinator.members.iter().map(|member| member.address).collect();
    let mut ours = coordinators.to_vec();
    theirs.sort_unstable();
    ours.sort_unstable();
    theirs == ours
}

fn has_flag(pid: Pid, flag: &str) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word.starts_with(flag.as_bytes()))
}

/// The process that listens on a TCP port of this host.
pub fn listener(port: u16) -> Option<Process> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .flat_map(|path| {
            let table = fs::read_to_string(path).unwrap_or_default();
            table.lines().filter_map(|line| listening_inode(line, port)).collect::<Vec<_>>()
        })
        .collect();
    processes().find_map(|pid| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let links = open.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut sockets = links.filter(|link| inodes.iter().any(|inode| is_socket(link, inode)));
        sockets.next().and_then(|_| Process::of(pid))
    })
}

fn is_socket(link: &Path, inode: &str) -> bool {
    link.to_str() == Some(&format!("socket:[{inode}]"))
}

/// The inode in a line of /proc/net/tcp, if it is a socket that listens on `port`.
fn listening_inode(line: &str, port: u16) -> Option<String> {
    /// Of the kernel's include/net/tcp_states.h.
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, hex) = fields.get(1)?.rsplit_once(':')?;
    let is_it = u16::from_str_radix(hex, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
    is_it.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_no_later_one_of_the_same_number() {
        let me = Process::of(Pid::this()).expect("it runs");
        assert!(me.is_alive() && !me.is_stopped());
        let other = Process { start_ticks: me.start_ticks + 1, ..me };
        assert_eq!(other.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }

    #[test]
    fn who_listens_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        assert_eq!(listener(port), Process::of(Pid::this()));
    }
}
