//! One rank of `cluster bench collective`: `cluster bench-rank`, a process of its own that does
//! what it is told on standard input until the command is gone.

use std::hint::black_box;
use std::io::{BufRead, StdinLock, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::control::die_with_parent;
use api::{ExitClass, Generation, Rank};
use collective::{Communicator, GroupOptions, Listener, ProcessGroup, Selection, TcpOptions};

use super::buffers::{Collective, collective};
use super::exchange::{Exchange, Neighbours};
use super::plan::{Carrier, Pacing};
use super::protocol::{Command, GroupPlan, Membership, Report, Work};

/// Every rank listens before the first one connects.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Larger than a core's share of any cache.
const COPY_BYTES: usize = 64 << 20;
/// How long copying is measured.
const COPY_TIME: Duration = Duration::from_millis(300);

/// Runs the rank to its end.
pub fn run_rank() -> ExitCode {
    let ended = die_with_parent().map_err(anyhow::Error::from).and_then(|()| serve());
    let Err(error) = ended else { return ExitCode::SUCCESS };
    // The command prints it; if it is gone, nobody would read it.
    let _ = say(&Report::Failed { message: format!("{error:#}") });
    ExitCode::from(ExitClass::Internal.code())
}

fn serve() -> Result<()> {
    let mut orders = std::io::stdin().lock();
    let Some(Command::Listen(membership)) = hear(&mut orders)? else {
        bail!("`cluster bench-rank` is started by `cluster bench collective`, not by hand");
    };
    let mut member = Member::join(membership, &mut orders)?;
    while let Some(order) = hear(&mut orders)? {
        let report = match order {
            Command::Prepare(work) => member.prepare(&work)?,
            Command::Measure { group, calls, pacing } => member.measure(group, calls, pacing)?,
            Command::Copy { together } => member.copy(together)?,
            Command::Leave => return Ok(()),
            Command::Listen(_) | Command::Join { .. } => bail!("an order came twice"),
        };
        say(&report)?;
    }
    // The command has ended without a word.
    Ok(())
}

/// The next order; none when the command is gone.
fn hear(orders: &mut StdinLock<'_>) -> Result<Option<Command>> {
    let mut line = String::new();
    if orders.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).context("an order could not be read")
}

fn say(report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()?;
    Ok(())
}

/// What is timed.
enum Prepared {
    Collective(Box<dyn Collective>),
    Exchange(Exchange),
}

/// A rank in its groups.
struct Member {
    rank: u32,
    world: u32,
    groups: Vec<ProcessGroup>,
    ring: Neighbours,
    prepared: Option<Prepared>,
}

impl Member {
    fn join(membership: Membership, orders: &mut StdinLock<'_>) -> Result<Self> {
        let Membership { rank, world, .. } = membership;
        let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let bare = TcpListener::bind((here, 0)).context("cannot listen")?;
        let listeners =
            membership.groups.iter().map(|plan| listen(here, plan)).collect::<Result<Vec<_>>>()?;
        say(&Report::Listening {
            groups: listeners.iter().map(Listener::address).collect(),
            bare: bare.local_addr()?,
        })?;
        let Some(Command::Join { groups: addresses, bare: ring }) = hear(orders)? else {
            bail!("expected the peers' addresses");
        };
        let ring = Neighbours::connect(&bare, rank, world, &ring)?;
        let mut groups = Vec::with_capacity(listeners.len());
        for ((listener, plan), peers) in
            listeners.into_iter().zip(&membership.groups).zip(&addresses)
        {
            groups.push(form(&membership, plan, listener, peers)?);
        }
        let transport = groups.first().map_or("none", ProcessGroup::transport).to_owned();
        say(&Report::Joined { transport })?;
        Ok(Self { rank, world, groups, ring, prepared: None })
    }

    fn prepare(&mut self, work: &Work) -> Result<Report> {
        // First of all, so that two large pieces of work are never held together.
        self.prepared = None;
        self.prepared = Some(match work {
            Work::Collective { op, elements, element } => {
                let element = element.parse().map_err(anyhow::Error::msg)?;
                let mut buffers = collective(*op, element, *elements, self.rank, self.world);
                for group in &mut self.groups {
                    buffers.fill();
                    buffers.call(group)?;
                    buffers.check()?;
                }
                buffers.clear();
                Prepared::Collective(buffers)
            }
            Work::Exchange { send, receive } => Prepared::Exchange(Exchange::new(*send, *receive)),
        });
        Ok(Report::Ready)
    }

    fn measure(&mut self, group: usize, calls: u32, pacing: Pacing) -> Result<Report> {
        let group = self.groups.get_mut(group).context("no such group")?;
        let prepared = self.prepared.as_mut().context("nothing is prepared")?;
        let mut nanoseconds = Vec::with_capacity(calls as usize);
        group.barrier()?;
        for _ in 0..calls {
            if pacing == Pacing::Barrier {
                group.barrier()?;
            }
            let begin = Instant::now();
            match prepared {
                Prepared::Collective(buffers) => buffers.call(group)?,
                Prepared::Exchange(exchange) => exchange.call(&mut self.ring)?,
            }
            nanoseconds.push(begin.elapsed().as_nanos() as u64);
        }
        Ok(Report::Measured { nanoseconds })
    }

    fn copy(&mut self, together: bool) -> Result<Report> {
        let (from, mut to) = (vec![1u8; COPY_BYTES], vec![2u8; COPY_BYTES]);
        if together {
            self.groups.first_mut().context("no group")?.barrier()?;
        }
        let begin = Instant::now();
        let mut copied = 0u64;
        while begin.elapsed() < COPY_TIME {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
            copied += COPY_BYTES as u64;
        }
        Ok(Report::Copied { bytes_per_second: copied as f64 / begin.elapsed().as_secs_f64() })
    }
}

/// Listens for the peers of one group.
fn listen(here: IpAddr, plan: &GroupPlan) -> Result<Listener> {
    let selection = Selection::new(plan.rules.clone())?;
    Ok(Listener::bind(here)?.with_tcp(TcpOptions { selection, ..TcpOptions::default() }))
}

/// Forms one group.
fn form(
    membership: &Membership,
    plan: &GroupPlan,
    listener: Listener,
    peers: &[SocketAddr],
) -> Result<ProcessGroup> {
    let transport = membership.carrier.transport().map_err(anyhow::Error::msg)?;
    let options = GroupOptions {
        job: "bench".parse()?,
        group: plan.name.clone(),
        generation: Generation(1),
        rank: Rank(membership.rank),
        world_size: membership.world,
        secret: membership.secret.clone(),
        connect_timeout: CONNECT_TIMEOUT,
        reduction: plan.order.into(),
        transport,
        host: membership.host.clone(),
    };
    let group = listener.connect(options, peers)?;
    if membership.carrier == Carrier::Shm && group.transport() != "shm" {
        bail!(
            "--transport shm: the ranks share no memory in this build or on this machine, their \
             group formed over {}",
            group.transport()
        );
    }
    Ok(group)
}
