//! The processes of one world: started, told what to do, listened to, and ended with the command.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use api::Secret;

use super::plan::{Pacing, Plan};
use super::protocol::{Command, GroupPlan, Membership, Report, Work};
use super::samples::Samples;
use crate::error::{CliError, Result};

/// A rank that dies makes the others fail too, and their word may come first: so long a dead one
/// is waited for.
const FIRST_CAUSE_WAIT: Duration = Duration::from_millis(300);
/// Random bytes of the secret among the ranks.
const SECRET_BYTES: usize = 32;

/// The ranks of one world.
pub struct Gang {
    members: Vec<Member>,
    heard: Receiver<(usize, Event)>,
    /// What moves the data.
    pub transport: String,
}

struct Member {
    process: Child,
    orders: ChildStdin,
}

enum Event {
    Report(Report),
    Ended,
}

impl Gang {
    /// Starts `world` processes and forms their groups.
    pub fn start(world: u32, plan: &Plan, plans: &[GroupPlan]) -> Result<Self> {
        let secret = secret()?;
        let (sender, heard) = channel();
        let mut gang = Self { members: Vec::new(), heard, transport: String::new() };
        for rank in 0..world {
            let member = Member::start(rank as usize, sender.clone())?;
            gang.members.push(member);
        }
        let listen = |rank: usize| {
            let rank = rank as u32;
            let (secret, groups) = (secret.clone(), plans.to_vec());
            // Near-equal runs of ranks.
            let host = plan.hosts.map(|hosts| format!("h{}", rank * hosts / world));
            let carrier = plan.carrier;
            Command::Listen(Membership { rank, world, secret, carrier, host, groups })
        };
        let mut groups = vec![Vec::new(); plans.len()];
        let mut bare = Vec::new();
        for report in gang.ask(listen)? {
            let Report::Listening { groups: addresses, bare: address } = report else {
                return Err(confused());
            };
            groups.iter_mut().zip(addresses).for_each(|(group, address)| group.push(address));
            bare.push(address);
        }
        let join = Command::Join { groups, bare };
        for report in gang.ask(|_| join.clone())? {
            let Report::Joined { transport } = report else { return Err(confused()) };
            gang.transport = transport;
        }
        Ok(gang)
    }

    /// Number of processes.
    pub fn world(&self) -> u32 {
        self.members.len() as u32
    }

    /// Makes the buffers of a piece of work, by rank, and checks its result once.
    pub fn prepare(&mut self, work: impl Fn(u32) -> Work) -> Result<()> {
        self.ask(|rank| Command::Prepare(work(rank as u32))).map(|_| ())
    }

    /// Times calls in a group.
    pub fn measure(&mut self, group: usize, calls: u32, pacing: Pacing) -> Result<Samples> {
        let mut by_rank = Vec::new();
        for report in self.ask(|_| Command::Measure { group, calls, pacing })? {
            let Report::Measured { nanoseconds } = report else { return Err(confused()) };
            by_rank.push(nanoseconds);
        }
        Ok(Samples::new(&by_rank))
    }

    /// Bytes per second that the first rank, or all of them together, copy.
    pub fn copy(&mut self, together: bool) -> Result<f64> {
        let ranks = if together { self.members.len() } else { 1 };
        let mut total = 0.0;
        for report in self.ask_first(ranks, |_| Command::Copy { together })? {
            let Report::Copied { bytes_per_second } = report else { return Err(confused()) };
            total += bytes_per_second;
        }
        Ok(total)
    }

    /// Lets the ranks end.
    pub fn leave(mut self) {
        for member in &mut self.members {
            // One that is gone already has left, too.
            let _ = member.tell(&Command::Leave);
        }
        for member in &mut self.members {
            let _ = member.process.wait();
        }
    }

    fn ask(&mut self, order: impl Fn(usize) -> Command) -> Result<Vec<Report>> {
        self.ask_first(self.members.len(), order)
    }

    /// Tells the first ranks and waits for the answer of each, in rank order.
    fn ask_first(&mut self, ranks: usize, order: impl Fn(usize) -> Command) -> Result<Vec<Report>> {
        for (rank, member) in self.members.iter_mut().enumerate().take(ranks) {
            if member.tell(&order(rank)).is_err() {
                return Err(self.first_cause(rank, None));
            }
        }
        let mut answers: Vec<Option<Report>> = (0..ranks).map(|_| None).collect();
        while answers.iter().any(Option::is_none) {
            match self.heard.recv() {
                Ok((rank, Event::Report(Report::Failed { message }))) => {
                    return Err(self.first_cause(rank, Some(message)));
                }
                Ok((rank, Event::Report(report))) => {
                    if let Some(answer) = answers.get_mut(rank) {
                        *answer = Some(report);
                    }
                }
                Ok((rank, Event::Ended)) => return Err(self.first_cause(rank, None)),
                Err(_) => return Err(confused()),
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Names the rank that died without a word, if there is one, else the first that gave up.
    fn first_cause(&mut self, rank: usize, message: Option<String>) -> CliError {
        let (mut said, mut mute) = (Vec::new(), None);
        match message {
            Some(message) => said.push((rank, message)),
            None => mute = Some(rank),
        }
        while mute.is_none() {
            match self.heard.recv_timeout(FIRST_CAUSE_WAIT) {
                Ok((rank, Event::Report(Report::Failed { message }))) => said.push((rank, message)),
                Ok((rank, Event::Ended)) if said.iter().all(|(r, _)| *r != rank) => {
                    mute = Some(rank);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let status = mute.and_then(|rank| Some((rank, self.members.get_mut(rank)?)));
        if let Some((rank, member)) = status {
            let how = member.process.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
            return CliError::internal(format!("rank {rank} ended: {how}"));
        }
        match said.into_iter().next() {
            Some((rank, message)) => CliError::internal(format!("rank {rank}: {message}")),
            None => confused(),
        }
    }
}

impl Drop for Gang {
    fn drop(&mut self) {
        for member in &mut self.members {
            // Ended already, or ends now.
            let _ = member.process.kill();
            let _ = member.process.wait();
        }
    }
}

impl Member {
    fn start(rank: usize, heard: Sender<(usize, Event)>) -> Result<Self> {
        let failed = |e: std::io::Error| CliError::internal(format!("cannot start a rank: {e}"));
        let mut process = std::process::Command::new(std::env::current_exe().map_err(failed)?)
            .arg("bench-rank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(orders), Some(reports)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(CliError::internal("a rank's standard input or output is missing"));
        };
        std::thread::spawn(move || {
            // A line that cannot be read is as good as none: the rank is taken for ended.
            for line in BufReader::new(reports).lines().map_while(std::io::Result::ok) {
                let Ok(report) = serde_json::from_str(&line) else { break };
                if heard.send((rank, Event::Report(report))).is_err() {
                    return;
                }
            }
            let _ = heard.send((rank, Event::Ended));
        });
        Ok(Self { process, orders })
    }

    fn tell(&mut self, order: &Command) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.write_all(&line)?;
        self.orders.flush()
    }
}

fn confused() -> CliError {
    CliError::internal("a rank answered something else than it was asked")
}

/// What the ranks prove to each other that they know.
fn secret() -> Result<Secret> {
    let mut bytes = [0; SECRET_BYTES];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| CliError::internal("the operating system gave no random bytes"))?;
    Ok(Secret::new(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
}
