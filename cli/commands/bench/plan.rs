//! What to measure, read from the command line once; the rest takes only this.

use std::fmt;

use api::units::ByteSize;
use collective::nccl::{Libraries, LibraryPaths};
use collective::{ElementType, Reduction, Selectable, Selection, Transport};
use serde::{Deserialize, Serialize};

use super::protocol::GroupPlan;
use crate::args::BenchCollective;
use crate::error::{CliError, Result};

/// Each rank is a process of this machine.
const RANKS_MAX: u32 = 64;
/// Every rank holds two buffers of this many bytes.
const BYTES_MAX: u64 = 1 << 30;
/// Bytes of the whole buffer unless --sizes says otherwise.
const SIZES: [u64; 4] = [4 << 10, 64 << 10, 1 << 20, 64 << 20];
/// Those of `--tune`: where one algorithm takes over from another, and some on either side.
const TUNE_SIZES: [u64; 8] =
    [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
/// Ranks of `--cost`: those that the fixed tree divides well, and those that it does not.
const COST_RANKS: [u32; 6] = [2, 3, 4, 5, 6, 7];

/// A set of words that a flag takes.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident ($what:literal) { $($variant:ident = $word:literal),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $(#[serde(rename = $word)] $variant),*
        }

        impl $name {
            /// Every one, in the order of the help.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As it is typed and printed.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }

            fn parse(flag: &str, text: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|one| one.name() == text).ok_or_else(|| {
                    let known = [$($word),*].join(", ");
                    let what = $what;
                    CliError::usage(format!("{flag}: unknown {what} `{text}`, expected {known}"))
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

words! {
    /// An operation that can be measured.
    Op("operation") {
        AllReduce = "all_reduce", ReduceScatter = "reduce_scatter", AllGather = "all_gather",
        AllToAll = "all_to_all", Broadcast = "broadcast", Barrier = "barrier",
        ReduceLanes = "reduce_lanes"
    }
}

words! {
    /// What carries the data.
    Carrier("transport") { Auto = "auto", Shm = "shm", Tcp = "tcp", Nccl = "nccl" }
}

words! {
    /// The order of sums.
    Order("reduction") { Deterministic = "deterministic", Fast = "fast" }
}

words! {
    /// What is between two timed calls.
    Pacing("loop") { Barrier = "barrier", Plain = "plain" }
}

impl Op {
    /// Whether it adds.
    pub fn sums(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::ReduceLanes)
    }

    /// What a table of algorithms says of it, if it has a choice.
    pub fn selectable(self) -> Option<Selectable> {
        match self {
            Self::AllReduce => Some(Selectable::AllReduce),
            Self::ReduceLanes => Some(Selectable::ReduceLanes),
            _ => None,
        }
    }

    /// Bytes that each process must send and receive, per byte of the buffer: what the bus
    /// bandwidth counts, as nccl-tests define it.
    pub fn bus_factor(self, ranks: u32) -> f64 {
        let others = f64::from(ranks - 1) / f64::from(ranks);
        match self {
            Self::AllReduce | Self::ReduceLanes => 2.0 * others,
            Self::ReduceScatter | Self::AllGather | Self::AllToAll => others,
            Self::Broadcast => 1.0,
            Self::Barrier => 0.0,
        }
    }
}

impl Carrier {
    /// What a group is asked for.
    ///
    /// # Errors
    /// If this build cannot carry data so.
    pub fn transport(self) -> Result<Transport> {
        match self {
            Self::Auto => Ok(Transport::Auto),
            Self::Shm => Ok(Transport::Shared),
            Self::Tcp => Ok(Transport::Tcp),
            Self::Nccl => {
                let reason = match Libraries::open(&LibraryPaths::from_environment()) {
                    Ok(libraries) => format!(
                        "NCCL {} is here, but this command measures shared memory and TCP only",
                        libraries.nccl_version()
                    ),
                    Err(error) => error.to_string(),
                };
                Err(CliError::usage(format!("--transport nccl: {reason}"))
                    .with_hint("`--transport shm` or `tcp` needs no NCCL"))
            }
        }
    }
}

impl From<Order> for Reduction {
    fn from(order: Order) -> Self {
        match order {
            Order::Deterministic => Self::Deterministic,
            Order::Fast => Self::Fast,
        }
    }
}

/// One operation on one size.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The operation.
    pub op: Op,
    /// Bytes of the whole buffer; none for a barrier.
    pub bytes: u64,
}

/// What to measure.
#[derive(Debug)]
pub struct Plan {
    /// The operations, each with each size.
    pub ops: Vec<Op>,
    /// Bytes of the whole buffer.
    pub sizes: Vec<u64>,
    /// Numbers of processes.
    pub worlds: Vec<u32>,
    /// What carries the data.
    pub carrier: Carrier,
    /// Hosts that the processes are as if on, if they are not all on one.
    pub hosts: Option<u32>,
    /// Type of an element.
    pub element: ElementType,
    /// Order of sums.
    pub order: Order,
    /// Which algorithm carries which reduction over TCP.
    pub selection: Selection,
    /// What is between two timed calls.
    pub pacing: Pacing,
    /// Timed calls per case, if they were given.
    pub iterations: Option<u32>,
    /// Calls before them, if they were given.
    pub warmup: Option<u32>,
}

impl Plan {
    /// Reads the command line.
    ///
    /// # Errors
    /// If a flag's value is not one that can be measured; the message says what is expected.
    pub fn new(args: &BenchCollective) -> Result<Self> {
        let element: ElementType =
            args.dtype.parse().map_err(|e| CliError::usage(format!("--dtype: {e}")))?;
        let carrier = carrier(args)?;
        let ops = match args.ops.is_empty() {
            true if args.cost => vec![Op::AllReduce],
            true if args.tune.is_some() => vec![Op::AllReduce, Op::ReduceLanes],
            true => Op::ALL.iter().copied().filter(|op| *op != Op::ReduceLanes).collect(),
            false => each(&args.ops, |op| Op::parse("--ops", op))?,
        };
        if let Some(op) = ops.iter().find(|op| args.tune.is_some() && op.selectable().is_none()) {
            return Err(CliError::usage(format!(
                "--tune: {op} has no choice of algorithms, expected all_reduce or reduce_lanes"
            )));
        }
        if let Some(op) = ops.iter().find(|op| args.cost && !op.sums()) {
            return Err(CliError::usage(format!(
                "--cost: {op} adds nothing, expected all_reduce, reduce_scatter or reduce_lanes"
            )));
        }
        let worlds = match args.ranks.is_empty() {
            true if args.cost => COST_RANKS.to_vec(),
            true => vec![2, 4],
            false => each(&args.ranks, ranks)?,
        };
        let sizes = match args.sizes.is_empty() {
            true if args.tune.is_some() => TUNE_SIZES.to_vec(),
            true => SIZES.to_vec(),
            false => each(&args.sizes, |text| bytes(text, element))?,
        };
        let selection = match &args.algorithms {
            Some(path) => Selection::load(path)
                .map_err(|error| CliError::usage(format!("--algorithms: {error}")))?,
            None => Selection::default(),
        };
        if let Some(hosts) = args.hosts {
            check_hosts(hosts, carrier, &worlds)?;
        }
        Ok(Self {
            ops,
            sizes,
            worlds,
            carrier,
            hosts: args.hosts,
            element,
            order: Order::parse("--reduction", &args.reduction)?,
            selection,
            pacing: Pacing::parse("--loop", &args.pacing)?,
            iterations: args.iterations,
            warmup: args.warmup,
        })
    }

    /// A group that adds in an order.
    pub fn group(&self, order: Order) -> GroupPlan {
        let rules = self.selection.rules().to_vec();
        GroupPlan { name: order.name().to_owned(), order, rules }
    }

    /// Each operation with each size; a barrier has none.
    pub fn cases(&self, world: u32) -> Vec<Case> {
        let mut cases = Vec::new();
        for op in &self.ops {
            if *op == Op::Barrier {
                cases.push(Case { op: *op, bytes: 0 });
                continue;
            }
            // Every rank's part of an all-to-all is as long: what does not divide is left out.
            let unit = self.element.bytes() as u64
                * if *op == Op::AllToAll { u64::from(world) } else { 1 };
            let fit = |bytes: &u64| Case { op: *op, bytes: (bytes / unit).max(1) * unit };
            cases.extend(self.sizes.iter().map(fit));
        }
        cases
    }
}

/// A table of algorithms is for TCP, which `auto` then means.
fn carrier(args: &BenchCollective) -> Result<Carrier> {
    let carrier = Carrier::parse("--transport", &args.transport)?;
    carrier.transport()?;
    let flag = match (&args.tune, &args.algorithms) {
        (Some(_), _) => "--tune",
        (_, Some(_)) => "--algorithms",
        _ => return Ok(carrier),
    };
    match carrier {
        Carrier::Auto | Carrier::Tcp => Ok(Carrier::Tcp),
        other => Err(CliError::usage(format!(
            "{flag} is about TCP, found --transport {other}: leave it out, or say tcp"
        ))),
    }
}

fn check_hosts(hosts: u32, carrier: Carrier, worlds: &[u32]) -> Result<()> {
    if carrier != Carrier::Auto {
        return Err(CliError::usage(format!(
            "--hosts: memory inside a host and TCP between hosts is --transport auto, found \
             {carrier}"
        )));
    }
    match worlds.iter().min() {
        Some(least) if (1..=*least).contains(&hosts) => Ok(()),
        _ => Err(CliError::usage(format!(
            "--hosts: `{hosts}` is not a number of hosts for {} processes: expected 1 to as many",
            worlds.iter().min().unwrap_or(&0)
        ))),
    }
}

fn each<T>(texts: &[String], read: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    texts.iter().map(|text| read(text.trim())).collect()
}

fn ranks(text: &str) -> Result<u32> {
    text.parse().ok().filter(|ranks| (2..=RANKS_MAX).contains(ranks)).ok_or_else(|| {
        CliError::usage(format!(
            "--ranks: `{text}` is not a number of processes, expected 2 to {RANKS_MAX}"
        ))
    })
}

fn bytes(text: &str, element: ElementType) -> Result<u64> {
    let size: ByteSize = text.parse().map_err(|e| CliError::usage(format!("--sizes: {e}")))?;
    let one = element.bytes() as u64;
    if (one..=BYTES_MAX).contains(&size.0) && size.0.is_multiple_of(one) {
        return Ok(size.0);
    }
    let (least, most) = (ByteSize(one), ByteSize(BYTES_MAX));
    Err(CliError::usage(format!(
        "--sizes: `{text}` is not a whole number of {element} elements of {least} each, expected \
         {least} to {most}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bus_carries_what_nccl_tests_say() {
        for (op, two, four) in [
            (Op::AllReduce, 1.0, 1.5),
            (Op::ReduceScatter, 0.5, 0.75),
            (Op::AllGather, 0.5, 0.75),
            (Op::AllToAll, 0.5, 0.75),
            (Op::Broadcast, 1.0, 1.0),
        ] {
            assert_eq!((op.bus_factor(2), op.bus_factor(4)), (two, four), "{op}");
        }
    }

    #[test]
    fn sizes_are_whole_elements() {
        assert_eq!(bytes("64KiB", ElementType::F32).unwrap(), 65_536);
        for bad in ["0B", "6B", "2GiB", "4 parsecs", ""] {
            assert!(bytes(bad, ElementType::F32).is_err(), "{bad:?} was accepted");
        }
        for bad in ["0", "1", "65", "-2", "two"] {
            assert!(ranks(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
