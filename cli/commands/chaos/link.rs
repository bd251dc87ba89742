//! The network of a worker that has a network namespace of its own: links down and up again.
//!
//! Done with `nsenter` and `ip`, which need root. Routes that are not the kernel's own and IPv6 addresses
//! go when a link goes down; they are noted before and put back after.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{CliError, Result};
use crate::processes::Process;

/// Tries to take a link up again: nothing else mends it.
const UP_TRIES: u32 = 3;

/// Runs `ip` in a namespace; gives what it printed.
type Ip = Box<dyn Fn(&[&str]) -> Result<String> + Send>;

/// Links of a namespace that are down; up again when dropped.
pub struct Cut {
    ip: Ip,
    links: Vec<Link>,
}

/// One of them.
struct Link {
    name: String,
    /// What goes with it: arguments of `ip` that put it back.
    lost: Vec<String>,
}

/// Tells the network namespaces of processes apart; none for a process that is gone.
pub fn namespace(process: &Process) -> Option<PathBuf> {
    namespace_of(&process.pid.to_string())
}

fn namespace_of(process: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}

/// Whether a process has a network that is neither this one's nor the host's: whoever runs chaos inside
/// a namespace must not be able to cut off the host.
pub fn is_apart(process: &Process) -> bool {
    let theirs = namespace(process);
    theirs.is_some() && theirs != namespace_of("self") && theirs != namespace_of("1")
}

/// What cutting needs and this host lacks, if anything.
pub fn lacking() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root");
    }
    let has = |program: &str| {
        let mut version = Command::new(program);
        version.arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    (!has("nsenter") || !has("ip")).then_some("it needs the programs `nsenter` and `ip`")
}

impl Cut {
    /// Takes down every link of the process's namespace but loopback.
    pub fn begin(process: &Process) -> Result<Self> {
        let of = format!("/proc/{}", process.pid);
        let gone = |e| CliError::internal(format!("process {} has no network: {e}", process.pid));
        // Held open: the namespace must outlive its worker until it is mended.
        let namespace = File::open(format!("{of}/ns/net")).map_err(gone)?;
        let table = fs::read_to_string(format!("{of}/net/dev")).map_err(gone)?;
        // Two lines of header, then `name: counters`.
        let names = table.lines().skip(2).filter_map(|line| line.split(':').next());
        let names: Vec<&str> = names.map(str::trim).filter(|name| *name != "lo").collect();
        if names.is_empty() {
            let text = format!("the namespace of process {} has no link", process.pid);
            return Err(CliError::internal(text));
        }
        let families: &[&str] = match fs::exists(format!("{of}/net/if_inet6")) {
            Ok(true) => &["-4", "-6"],
            _ => &["-4"],
        };
        Self::take_down(Box::new(move |arguments| run_ip(&namespace, arguments)), &names, families)
    }

    fn take_down(ip: Ip, names: &[&str], families: &[&str]) -> Result<Self> {
        let mut cut = Self { ip, links: Vec::new() };
        for name in names {
            let lost = lost_with(&cut.ip, name, families)?;
            // Before it is down: what fails half-way may have been done.
            cut.links.push(Link { name: (*name).to_owned(), lost });
            (cut.ip)(&["link", "set", "dev", name, "down"])?;
        }
        Ok(cut)
    }
}

/// What goes with a link and does not come back by itself.
fn lost_with(ip: &Ip, name: &str, families: &[&str]) -> Result<Vec<String>> {
    let mut lost = Vec::new();
    for family in families {
        // First the addresses, from which routes may begin. IPv4's stay.
        if *family == "-6" {
            let show = ["-6", "-o", "address", "show", "dev", name, "scope", "global", "permanent"];
            let shown = ip(&show)?;
            let addresses = shown.lines().filter_map(|line| {
                line.split_whitespace().skip_while(|word| *word != "inet6").nth(1)
            });
            lost.extend(
                addresses.map(|address| format!("-6 address replace {address} dev {name} nodad")),
            );
        }
        let shown = ip(&[family, "route", "show", "dev", name])?;
        // The kernel makes its own again, and routers tell theirs.
        let is_ours =
            |route: &&str| !["proto kernel", "proto ra"].iter().any(|p| route.contains(p));
        let routes = shown.lines().filter(is_ours).map(|route| {
            let words =
                route.split_whitespace().filter(|word| !["linkdown", "dead"].contains(word));
            let route = words.collect::<Vec<_>>().join(" ");
            format!("{family} route replace {route} dev {name}")
        });
        lost.extend(routes);
    }
    Ok(lost)
}

fn run_ip(namespace: &File, arguments: &[&str]) -> Result<String> {
    let failed = |why: String| {
        CliError::internal(format!("`ip {}` in a namespace: {why}", arguments.join(" ")))
    };
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={path}")).arg("ip").args(arguments).stdin(Stdio::null());
    // Ctrl-C is for us: it must not end what takes a link down or up again.
    command.process_group(0);
    let ended = command.output().map_err(|e| failed(e.to_string()))?;
    if !ended.status.success() {
        return Err(failed(String::from_utf8_lossy(&ended.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}

impl Drop for Cut {
    fn drop(&mut self) {
        let mut errors = Vec::new();
        for Link { name, .. } in &self.links {
            let mut tries = (0..UP_TRIES).map(|_| (self.ip)(&["link", "set", "dev", name, "up"]));
            let failed = tries.try_fold(None, |_, tried| match tried {
                Ok(_) => Err(()),
                Err(error) => Ok(Some(error)),
            });
            errors.extend(failed.ok().flatten());
        }
        // A route may need another, to its gateway for instance, that is listed after it: as long as
        // some go, the others are tried again.
        let mut left: Vec<&String> = self.links.iter().flat_map(|link| &link.lost).collect();
        loop {
            let before = left.len();
            let mut failed = Vec::new();
            left.retain(|words| {
                let done = (self.ip)(&words.split_whitespace().collect::<Vec<_>>());
                let has_failed = done.is_err();
                failed.extend(done.err());
                has_failed
            });
            if left.is_empty() || left.len() == before {
                errors.extend(failed);
                break;
            }
        }
        for error in errors {
            // Nobody may read it any more; the next one is tried all the same.
            let _ = writeln!(std::io::stderr(), "error: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::Child;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A namespace with one link: what is set, in the words that set it.
    #[derive(Default)]
    struct Network {
        is_down: bool,
        has: BTreeSet<&'static str>,
        /// Calls that fail, each once, having done what they do.
        interrupted: Vec<&'static str>,
    }

    const ADDRESS: &str = "-6 address replace fd00::2/64 dev eth0 nodad";
    const GATEWAY: &str = "-4 route replace 10.0.0.1 scope link dev eth0";
    const DEFAULT: &str = "-4 route replace default via 10.0.0.1 dev eth0";
    const DEFAULT_6: &str = "-6 route replace default via fd00::1 metric 1024 pref medium dev eth0";

    impl Network {
        fn shared() -> Arc<Mutex<Self>> {
            let has = BTreeSet::from([ADDRESS, GATEWAY, DEFAULT, DEFAULT_6]);
            Arc::new(Mutex::new(Self { has, ..Self::default() }))
        }

        /// As the kernel does: what goes with a link, and what needs what.
        fn call(&mut self, words: &str) -> Result<String> {
            let refused = |why: &str| Err(CliError::internal(why));
            let shown = match words {
                "link set dev eth0 down" => {
                    self.is_down = true;
                    self.has.clear();
                    ""
                }
                "link set dev eth0 up" => {
                    self.is_down = false;
                    ""
                }
                "-4 route show dev eth0" => {
                    "default via 10.0.0.1 \n10.0.0.1 scope link linkdown \n\
                     10.0.0.0/24 proto kernel scope link src 10.0.0.2 \n"
                }
                "-6 -o address show dev eth0 scope global permanent" => {
                    "2: eth0    inet6 fd00::2/64 scope global \\       valid_lft forever\n"
                }
                "-6 route show dev eth0" => {
                    "fd00::/64 proto kernel metric 256 pref medium\n\
                     default via fd00::1 metric 1024 pref medium\n\
                     default via fe80::1 proto ra metric 100 expires 1700sec\n"
                }
                _ => {
                    let known = [ADDRESS, GATEWAY, DEFAULT, DEFAULT_6];
                    let Some(words) = known.into_iter().find(|known| *known == words) else {
                        return refused(words);
                    };
                    let needed = match words {
                        DEFAULT => Some(GATEWAY),
                        DEFAULT_6 => Some(ADDRESS),
                        _ => None,
                    };
                    if self.is_down || needed.is_some_and(|needed| !self.has.contains(needed)) {
                        return refused("Nexthop has invalid gateway");
                    }
                    self.has.insert(words);
                    ""
                }
            };
            if let Some(at) = self.interrupted.iter().position(|one| *one == words) {
                self.interrupted.remove(at);
                return refused("ended by a signal");
            }
            Ok(shown.to_owned())
        }
    }

    fn cut(network: &Arc<Mutex<Network>>) -> Result<Cut> {
        let network = network.clone();
        let ip = move |words: &[&str]| network.lock().expect("no panic").call(&words.join(" "));
        Cut::take_down(Box::new(ip), &["eth0"], &["-4", "-6"])
    }

    fn assert_whole(network: &Mutex<Network>) {
        let network = network.lock().expect("no panic");
        assert!(!network.is_down);
        assert_eq!(network.has, BTreeSet::from([ADDRESS, GATEWAY, DEFAULT, DEFAULT_6]));
    }

    #[test]
    fn all_that_went_with_a_link_is_put_back_in_an_order_that_works() {
        let network = Network::shared();
        let cut = cut(&network).expect("it goes down");
        assert!(network.lock().expect("no panic").is_down);
        drop(cut);
        assert_whole(&network);
    }

    /// A process in a namespace of its own, where this machine lets us make one.
    fn apart() -> Option<(Child, Process)> {
        if let Some(why) = lacking() {
            eprintln!("SKIPPED: {why}");
            return None;
        }
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = unshare.spawn().ok()?;
        let process = Process::of(nix::unistd::Pid::from_raw(child.id() as i32))?;
        while !is_apart(&process) {
            if child.try_wait().expect("a child").is_some() {
                eprintln!("SKIPPED: no namespace can be made here");
                return None;
            }
            std::thread::yield_now();
        }
        Some((child, process))
    }

    #[test]
    fn a_kernel_s_network_is_what_it_was() {
        let Some((mut child, process)) = apart() else { return };
        let namespace = File::open(format!("/proc/{}/ns/net", process.pid)).expect("it runs");
        let ip = |words: &str| run_ip(&namespace, &words.split_whitespace().collect::<Vec<_>>());
        if ip("link add v0 type veth peer name v1").is_err() {
            eprintln!("SKIPPED: this kernel has no links to make");
        } else {
            for words in [
                "link set v1 up",
                "link set v0 up",
                "address add 10.9.0.2/32 dev v0",
                "route add 10.9.0.1 dev v0 scope link",
                "route add default via 10.9.0.1 dev v0",
                "-6 address add fd00:9::2/64 dev v0 nodad",
                "-6 route add default via fd00:9::1 dev v0",
            ] {
                ip(words).expect(words);
            }
            let shown = || {
                ["-4 route show", "-6 route show default", "-o address show dev v0 scope global"]
                    .map(|words| ip(words).expect(words))
            };
            let before = shown();
            assert!(before[1].contains("fd00:9::1") && before[2].contains("fd00:9::2"));
            let cut = Cut::begin(&process).expect("it goes down");
            assert_eq!(shown()[0], "");
            assert!(ip("-o link show v0").expect("shown").contains("state DOWN"));
            drop(cut);
            assert_eq!(shown(), before);
        }
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }

    #[test]
    fn a_command_that_is_interrupted_leaves_no_link_down() {
        for words in ["link set dev eth0 down", "link set dev eth0 up", GATEWAY] {
            let network = Network::shared();
            network.lock().expect("no panic").interrupted.push(words);
            drop(cut(&network));
            assert_whole(&network);
        }
    }
}
