//! A rank as a process, from the harness's side.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, Command as Program, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::census::Census;
use crate::message::{Command, Failure, Report, now};
use crate::rank::{ENTRY, MARK};

/// Far beyond what anything takes on a loaded machine; a test that reaches it hangs.
const HANG: Duration = Duration::from_secs(60);

pub struct Process {
    child: Child,
    commands: ChildStdin,
    reports: Receiver<Report>,
    /// Where it listens.
    address: IpAddr,
    /// What it held before its first group.
    before: Census,
}

impl Process {
    /// Starts a rank, in a network namespace if one is named.
    pub fn start(namespace: Option<&str>, address: IpAddr) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut program = match namespace {
            None => Program::new(own),
            Some(namespace) => {
                let mut program = Program::new("ip");
                program.args(["netns", "exec", namespace]).arg(own);
                program
            }
        };
        program.args(["--exact", ENTRY, "--ignored", "--nocapture", "--test-threads=1"]);
        program.env(MARK, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = program.spawn().unwrap();
        let (commands, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, reports) = mpsc::channel();
        thread::spawn(move || {
            // The test framework has words of its own.
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            for report in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
                // Nobody listens once the test has failed.
                let _ = sender.send(report);
            }
        });
        Self { child, commands, reports, address, before: Census::default() }
    }

    /// Waits until it has started.
    pub fn ready(&mut self) {
        let report = self.hear();
        assert!(matches!(report, Report::Ready), "{report:?}");
        self.before = self.count();
    }

    pub fn tell(&mut self, command: &Command) {
        let line = serde_json::to_string(command).unwrap();
        writeln!(self.commands, "{line}").unwrap();
    }

    #[track_caller]
    pub fn hear(&self) -> Report {
        self.reports.recv_timeout(HANG).expect("a rank hangs or panicked")
    }

    #[track_caller]
    pub fn hear_failure(&self) -> Failure {
        match self.hear() {
            Report::Failed(failure) => failure,
            report => panic!("expected a failure, found {report:?}"),
        }
    }

    /// Lets it listen for the next group; where.
    pub fn listen(&mut self) -> SocketAddr {
        self.tell(&Command::Listen { address: self.address });
        match self.hear() {
            Report::Listening { address } => address,
            report => panic!("expected an address, found {report:?}"),
        }
    }

    #[track_caller]
    pub fn count(&mut self) -> Census {
        self.tell(&Command::Count);
        match self.hear() {
            Report::Counted(census) => census,
            report => panic!("expected a census, found {report:?}"),
        }
    }

    /// Nothing is left of the groups that it was in.
    #[track_caller]
    pub fn assert_clean(&mut self) {
        let deadline = Instant::now() + HANG;
        loop {
            let found = self.count();
            if found == self.before {
                return;
            }
            // The kernel lists a thread for a moment after it was joined; nothing else may linger.
            let lingering = Census { threads: self.before.threads.clone(), ..found.clone() };
            assert_eq!(lingering, self.before, "left behind");
            assert!(Instant::now() < deadline, "left behind: {found:?}");
        }
    }

    /// How many descriptors it has beyond those before its first group.
    pub fn descriptors_of_group(&self, census: &Census) -> usize {
        census.descriptors.len() - self.before.descriptors.len()
    }

    pub fn kill(&mut self) -> Duration {
        let at = now();
        self.child.kill().unwrap();
        at
    }

    /// Stops it, and waits until it has stopped: the signal is on its way for a while.
    pub fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        waitid(Id::Pid(self.pid()), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT).unwrap();
    }

    pub fn go_on(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and cannot be missed if it has.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
