//! The network of a worker that has a network namespace of its own: links down and up again.
//!
//! Done with `nsenter` and `ip`, which need root. Routes that are not the kernel's own go when a link
//! goes down; they are noted before and put back after.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use crate::error::{CliError, Result};
use crate::processes::Process;

/// Links of a namespace that are down; up again when dropped.
pub struct Cut {
    /// Held open: the namespace must outlive its worker until it is mended.
    namespace: File,
    /// The links, each with the routes over it.
    links: Vec<(String, Vec<String>)>,
}

/// Whether a process has another network than this one.
pub fn is_apart(process: &Process) -> bool {
    let theirs = fs::read_link(format!("/proc/{}/ns/net", process.pid)).ok();
    theirs.is_some() && theirs != fs::read_link("/proc/self/ns/net").ok()
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
        let gone = |e| CliError::internal(format!("process {} has no network: {e}", process.pid));
        let namespace = File::open(format!("/proc/{}/ns/net", process.pid)).map_err(gone)?;
        let table = fs::read_to_string(format!("/proc/{}/net/dev", process.pid)).map_err(gone)?;
        // Two lines of header, then `name: counters`.
        let names = table.lines().skip(2).filter_map(|line| line.split(':').next());
        let names: Vec<String> =
            names.map(|name| name.trim().to_owned()).filter(|name| name != "lo").collect();
        let mut cut = Self { namespace, links: Vec::new() };
        for name in names {
            let routes = cut.ip(&["route", "show", "dev", &name])?;
            let routes = routes.lines().filter(|route| !route.contains("proto kernel"));
            let routes = routes.map(str::to_owned).collect();
            cut.ip(&["link", "set", "dev", &name, "down"])?;
            cut.links.push((name, routes));
        }
        if cut.links.is_empty() {
            let text = format!("the namespace of process {} has no link", process.pid);
            return Err(CliError::internal(text));
        }
        Ok(cut)
    }

    /// `ip` in the namespace; gives what it printed.
    fn ip(&self, arguments: &[&str]) -> Result<String> {
        let failed = |why: String| {
            CliError::internal(format!("`ip {}` in a namespace: {why}", arguments.join(" ")))
        };
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={path}")).arg("ip").args(arguments).stdin(Stdio::null());
        let ended = command.output().map_err(|e| failed(e.to_string()))?;
        if !ended.status.success() {
            return Err(failed(String::from_utf8_lossy(&ended.stderr).trim().to_owned()));
        }
        Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        for (name, routes) in &self.links {
            let up = self.ip(&["link", "set", "dev", name, "up"]);
            let back = routes.iter().map(|route| {
                let mut words = vec!["route", "replace"];
                words.extend(route.split_whitespace());
                words.extend(["dev", name]);
                self.ip(&words)
            });
            for error in std::iter::once(up).chain(back).filter_map(|done| done.err()) {
                eprintln!("error: {error}");
            }
        }
    }
}
