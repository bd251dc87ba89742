//! What `bench collective` and its ranks say to each other: JSON, one document a line, orders on a
//! rank's standard input and reports on its standard output.

use std::net::SocketAddr;

use api::Secret;
use collective::{ElementType, Rule};
use serde::{Deserialize, Serialize};

use super::plan::{Carrier, Op, Order, Pacing};

/// What a rank is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Command {
    /// The first: listen. Answered with [`Report::Listening`].
    Listen(Membership),
    /// Form the groups with these listeners. Answered with [`Report::Joined`].
    Join {
        /// Of each group, in rank order.
        groups: Vec<Vec<SocketAddr>>,
        /// Of the bare exchange, in rank order.
        bare: Vec<SocketAddr>,
    },
    /// Make the buffers of a piece of work, do it once in each group, and compare the result with
    /// what it must be. Answered with [`Report::Ready`].
    Prepare(Work),
    /// Do it again and time each call. Answered with [`Report::Measured`].
    Measure {
        /// In which group.
        group: usize,
        /// Calls.
        calls: u32,
        /// What is between them.
        pacing: Pacing,
    },
    /// Copy memory. Answered with [`Report::Copied`].
    Copy {
        /// Whether all ranks do it at the same time.
        together: bool,
    },
    /// The last.
    Leave,
}

/// A rank's place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Membership {
    /// This process.
    pub rank: u32,
    /// Number of processes.
    pub world: u32,
    /// Proves to each rank that the other belongs here.
    pub secret: Secret,
    /// What carries the data.
    pub carrier: Carrier,
    /// The host that it is as if on, if they are not all on one.
    pub host: Option<String>,
    /// The groups it is in.
    pub groups: Vec<GroupPlan>,
}

/// How the ranks of one group reduce.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupPlan {
    /// Told in errors.
    pub name: String,
    /// Order of sums.
    pub order: Order,
    /// Which algorithm carries which reduction over TCP.
    pub rules: Vec<Rule>,
}

/// What a rank times.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "kebab-case")]
pub enum Work {
    /// A collective.
    Collective {
        /// Which.
        op: Op,
        /// Elements of the whole buffer.
        elements: usize,
        /// Name of their type.
        element: String,
    },
    /// A bare socket exchange with the neighbours on a ring.
    Exchange {
        /// Bytes this rank sends to the next.
        send: u64,
        /// Bytes it receives from the previous.
        receive: u64,
    },
}

impl Work {
    /// A collective over a number of bytes.
    pub fn collective(op: Op, bytes: u64, element: ElementType) -> Self {
        let elements = bytes as usize / element.bytes();
        Self::Collective { op, elements, element: element.name().to_owned() }
    }
}

/// What a rank answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum Report {
    /// It listens.
    Listening {
        /// For each group.
        groups: Vec<SocketAddr>,
        /// For the bare exchange.
        bare: SocketAddr,
    },
    /// It is in its groups.
    Joined {
        /// What moves their data.
        transport: String,
    },
    /// The result was right.
    Ready,
    /// What each call took.
    Measured {
        /// In nanoseconds.
        nanoseconds: Vec<u64>,
    },
    /// How fast memory was copied.
    Copied {
        /// Bytes copied per second; each is read once and written once.
        bytes_per_second: f64,
    },
    /// It gives up.
    Failed {
        /// Why.
        message: String,
    },
}
