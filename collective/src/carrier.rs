//! What carries the calls of a group, and how its ranks agree on it.

use crate::call::{Call, CallSite, Operation};
use crate::communicator::{GroupOptions, Transport};
use crate::error::CollectiveError;
use crate::hosts::Hosts;
use crate::mixed::Mixed;
use crate::peers::Peers;
use crate::shared::Shared;

/// Most bytes that a rank tells while a group forms.
const TOLD_BYTES_MAX: usize = 4096;

/// What carries calls, beside the connections, which there always are.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// The connections alone.
    Sockets,
    /// All ranks are on one host.
    Memory(Shared),
    /// Memory inside a host, connections between hosts.
    Mixed(Mixed),
}

impl Carrier {
    /// The same on all ranks: memory on every host that has several of them and lets them share it,
    /// or connections for all.
    pub(crate) fn agree(
        peers: &mut Peers,
        options: &GroupOptions,
    ) -> Result<Self, CollectiveError> {
        if peers.world == 1 || options.transport == Transport::Tcp {
            return Ok(Self::Sockets);
        }
        let host = options.host.clone().or_else(this_host);
        let names = tell(peers, 0, host.unwrap_or_default().as_bytes())?;
        let hosts = Hosts::of(&names, peers.rank);
        let only_memory = options.transport == Transport::Shared;
        let reason = if hosts.are_apart() || (only_memory && !hosts.is_one()) {
            "its ranks name other hosts".to_owned()
        } else {
            match Shared::join(peers, hosts.here())? {
                Ok(shared) if hosts.is_one() => return Ok(Self::Memory(shared)),
                Ok(shared) => return Ok(Self::Mixed(Mixed::new(shared, hosts))),
                Err(reason) => reason,
            }
        };
        if only_memory {
            let message = format!("shared memory was asked for, but {reason}");
            return Err(CollectiveError::InvalidOptions { group: options.group.clone(), message });
        }
        if !hosts.are_apart() {
            let (group, rank) = (&options.group, peers.rank);
            tracing::warn!(%group, rank, %reason, "no shared memory: TCP is used");
        }
        Ok(Self::Sockets)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Sockets => "tcp",
            Self::Memory(_) => "shm",
            Self::Mixed(_) => "shm+tcp",
        }
    }
}

/// Exchanges a few bytes while the group forms, before any call.
pub(crate) fn tell(
    peers: &mut Peers,
    number: u64,
    mine: &[u8],
) -> Result<Vec<Vec<u8>>, CollectiveError> {
    let site = CallSite { call: Call::plain(Operation::Join), number };
    peers.gather_bytes(site, mine, TOLD_BYTES_MAX)
}

/// What is the same for processes that can see each other's descriptors: the running kernel and the
/// process namespace. Absent where the system does not tell.
fn this_host() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.display()))
}
