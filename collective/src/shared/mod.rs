//! Shared memory between the ranks of one host: how they come to share it, and who may.
//!
//! Ranks that name the same host agree over their connections: the lowest makes the memory and tells
//! its process id and descriptor, the others open it through `/proc`, which the kernel allows to
//! processes of one user in one process namespace. Whoever cannot says so, and all use TCP. The
//! connections stay: they carry errors, the ends of processes and small control data, and a rank that
//! waits in shared memory looks at them.

mod counter;
mod moves;
mod reduce;
mod rounds;
mod segment;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::call::{Call, CallSite, Operation};
use crate::communicator::{GroupOptions, Transport};
use crate::error::CollectiveError;
use crate::handshake::fresh_nonce;
use crate::peers::Peers;
use counter::Patience;
use segment::{Layout, NONCE_BYTES, Segment};

/// Most bytes that a rank tells while a group forms.
const TOLD_BYTES_MAX: usize = 4096;

/// This rank's end of the memory.
#[derive(Debug)]
pub(crate) struct Shared {
    segment: Segment,
    rank: usize,
    ranks: usize,
    /// Rounds so far; the same on all ranks between two calls.
    round: u32,
    patience: Patience,
    /// The call before this one, and a digest of all calls so far: what diverged earlier is found.
    last: CallSite,
    history: u64,
}

impl Shared {
    /// Shares memory with all ranks if all are on this host and may; none where TCP must do.
    pub(crate) fn join(
        peers: &mut Peers,
        options: &GroupOptions,
    ) -> Result<Option<Self>, CollectiveError> {
        if peers.world == 1 || options.transport == Transport::Tcp {
            return Ok(None);
        }
        let host = options.host.clone().or_else(this_host);
        let hosts = tell(peers, 0, host.unwrap_or_default().as_bytes())?;
        let together = hosts.iter().all(|host| !host.is_empty() && *host == hosts[0]);
        let shared =
            if together { share(peers)? } else { Err("its ranks name other hosts".into()) };
        match shared {
            Ok(shared) => Ok(Some(shared)),
            Err(reason) if options.transport == Transport::Shared => {
                let message = format!("shared memory was asked for, but {reason}");
                Err(CollectiveError::InvalidOptions { group: options.group.clone(), message })
            }
            Err(reason) => {
                if together {
                    let (group, rank) = (&options.group, peers.rank);
                    tracing::warn!(%group, rank, %reason, "no shared memory: TCP is used");
                }
                Ok(None)
            }
        }
    }

    fn new(segment: Segment, rank: usize, ranks: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let call = Call::plain(Operation::Join);
        Self {
            segment,
            rank,
            ranks,
            round: 0,
            patience: Patience::new(ranks, cores),
            last: CallSite { call, number: 0 },
            history: 0,
        }
    }
}

/// All ranks share this rank's or another's memory, or all know why not.
fn share(peers: &mut Peers) -> Result<Result<Shared, String>, CollectiveError> {
    let (rank, ranks) = (peers.rank as usize, peers.world as usize);
    let layout = Layout::new(ranks);
    let mut made: Option<(Segment, OwnedFd)> = None;
    let mut told = Vec::new();
    let mut trouble = None;
    if rank == 0 {
        let attempt = fresh_nonce().and_then(|nonce| Ok((Segment::create(layout, &nonce)?, nonce)));
        match attempt {
            Ok(((segment, file), nonce)) => {
                told.extend_from_slice(&nonce);
                let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
                told.extend_from_slice(place.as_bytes());
                made = Some((segment, file));
            }
            Err(error) => trouble = Some(format!("r0 cannot make it: {error}")),
        }
    }
    let all = tell(peers, 1, &told)?;
    let mut segment = None;
    if let (Some((nonce, place)), None) = (all[0].split_first_chunk::<NONCE_BYTES>(), &trouble) {
        let opened = match made.take() {
            Some((own, file)) => Segment::allocate(&file, layout, rank).map(|()| (own, Some(file))),
            None => open(place, layout, nonce, rank).map(|segment| (segment, None)),
        };
        match opened {
            Ok(found) => segment = Some(found),
            Err(error) => trouble = Some(format!("r{rank} cannot open it: {error}")),
        }
    }
    // The descriptor stays open until everyone has told how it went.
    let troubles = tell(peers, 2, trouble.unwrap_or_default().as_bytes())?;
    let trouble = troubles.iter().find(|trouble| !trouble.is_empty());
    Ok(match (segment, trouble) {
        (Some((segment, _)), None) => Ok(Shared::new(segment, rank, ranks)),
        (_, trouble) => {
            let trouble = trouble.map(|text| String::from_utf8_lossy(text).into_owned());
            Err(trouble.unwrap_or_else(|| "r0 did not make it".to_owned()))
        }
    })
}

fn open(
    place: &[u8],
    layout: Layout,
    nonce: &[u8; NONCE_BYTES],
    rank: usize,
) -> io::Result<Segment> {
    let place = std::str::from_utf8(place).map_err(io::Error::other)?;
    // Only ever a descriptor of a process: the path came from another process.
    let numbers = place.strip_prefix("/proc/").and_then(|rest| rest.split_once("/fd/"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !numbers.is_some_and(|(process, file)| digits(process) && digits(file)) {
        return Err(io::Error::other("its place is not a process's descriptor"));
    }
    let file = File::options().read(true).write(true).open(place)?;
    let segment = Segment::open(&file, layout, nonce)?;
    Segment::allocate(&file, layout, rank)?;
    Ok(segment)
}

/// Exchanges a few bytes while the group forms, before any call.
fn tell(peers: &mut Peers, number: u64, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
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
