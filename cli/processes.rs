//! Processes of this host, as /proc shows them: ranks, and the roles of a cluster.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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

    /// The file that it runs; none where that may not be known.
    pub fn program(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid)).ok()
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

/// All processes of this user on this host that hold a socket which a connection to one of `addresses`
/// reaches; a server may share it among several.
pub fn listeners(addresses: &[SocketAddr]) -> Vec<Process> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let tables = tables.iter().flatten();
    let listening: Vec<(SocketAddr, String)> =
        tables.flat_map(|table| table.lines().filter_map(listening)).collect();
    let sockets: Vec<PathBuf> = addresses
        .iter()
        .flat_map(|address| reached(&listening, *address))
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let holds = |pid: &Pid| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|it| sockets.contains(&it))
    };
    let mut found: Vec<Process> = processes().filter(holds).filter_map(Process::of).collect();
    found.sort_unstable();
    found
}

/// The inodes of the sockets that a connection to `address` reaches: those of that very address, or else
/// those of any.
fn reached(listening: &[(SocketAddr, String)], address: SocketAddr) -> Vec<&str> {
    let is_any = |at: &SocketAddr| {
        let reaches = at.is_ipv6() || address.is_ipv4();
        reaches && at.ip().is_unspecified() && at.port() == address.port()
    };
    let at = |wanted: &dyn Fn(&SocketAddr) -> bool| -> Vec<&str> {
        let found = listening.iter().filter(|(at, _)| wanted(at));
        found.map(|(_, inode)| inode.as_str()).collect()
    };
    let exact = at(&|at| *at == address);
    if exact.is_empty() { at(&is_any) } else { exact }
}

/// Address and inode in a line of /proc/net/tcp or tcp6, if it is a socket that listens.
fn listening(line: &str) -> Option<(SocketAddr, String)> {
    /// Of the kernel's include/net/tcp_states.h.
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of four bytes, each as this machine reads it.
    let words: Option<Vec<u32>> = (0..address.len())
        .step_by(8)
        .map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok())
        .collect();
    let bytes: Vec<u8> = words?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(four) => IpAddr::from(four),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    let inode = fields.get(9).filter(|_| fields.get(3) == Some(&LISTEN))?;
    Some((SocketAddr::new(address, port), (*inode).to_owned()))
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
    fn who_listens_is_found_and_nobody_else_of_that_port() {
        let me = Process::of(Pid::this()).expect("it runs");
        for bound in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may have no IPv6.
            let Ok(socket) = std::net::TcpListener::bind(bound) else { continue };
            let address = socket.local_addr().expect("bound");
            assert_eq!(listeners(&[address]), [me]);
            let other = SocketAddr::from(([127, 0, 0, 2], address.port()));
            assert_eq!(listeners(&[other]), []);
        }
        // Who listens on all addresses is reached on each.
        let socket = std::net::TcpListener::bind("0.0.0.0:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        let address = SocketAddr::from(([127, 0, 0, 2], port));
        assert_eq!(listeners(&[address]), [me]);
        // All that share the socket are found.
        let shared = socket.try_clone().expect("cloned");
        let mut child = std::process::Command::new("sleep")
            .arg("3600")
            .stdin(std::os::fd::OwnedFd::from(shared))
            .spawn()
            .expect("it starts");
        let other = Process::of(Pid::from_raw(child.id() as i32)).expect("it runs");
        let mut both = [me, other];
        both.sort_unstable();
        assert_eq!(listeners(&[address]), both);
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }

    #[test]
    fn addresses_of_tables_are_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 \
                    1000 0 4242 1 0000000000000000 100 0 0 10 0";
        let found = listening(line).expect("it listens");
        if cfg!(target_endian = "little") {
            assert_eq!(found, ("127.0.0.1:8080".parse().expect("an address"), "4242".into()));
        }
        assert_eq!(listening(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening("  sl  local_address rem_address   st"), None);
    }
}
