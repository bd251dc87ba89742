//! Shared memory between the ranks of one host: how they come to share it, and who may.
//!
//! Ranks that name the same host agree over their connections: the lowest makes the memory and tells
//! its process id and descriptor, the others open it through `/proc`, which the kernel allows to
//! processes of one user in one process namespace. Whoever cannot says so, and all use TCP. The
//! connections stay: they carry errors, the ends of processes and small control data, and a rank that
//! waits in shared memory looks at them.

mod counter;
mod mail;
mod moves;
mod reduce;
mod rounds;
mod segment;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::call::{Call, CallSite, Operation};
use crate::carrier::tell;
use crate::error::CollectiveError;
use crate::handshake::fresh_nonce;
use crate::peers::Peers;
use counter::Patience;
use mail::Post;
pub(crate) use reduce::{Reducing, Sums};
use segment::{Layout, NONCE_BYTES, Segment};

/// This rank's end of the memory.
#[derive(Debug)]
pub(crate) struct Shared {
    segment: Segment,
    /// The group's rank that is the first of this host: ranks here are counted from it.
    first: usize,
    rank: usize,
    ranks: usize,
    /// Rounds so far; the same on all ranks between two calls.
    round: u32,
    patience: Patience,
    /// Messages between two ranks.
    post: Post,
    /// The call before this one, and a digest of all calls so far: what diverged earlier is found.
    last: CallSite,
    history: u64,
}

impl Shared {
    /// Shares memory with the ranks of this host, as every host does with its own; or all ranks of
    /// the group know why one of them cannot.
    pub(crate) fn join(
        peers: &mut Peers,
        here: Range<u32>,
    ) -> Result<Result<Self, String>, CollectiveError> {
        let (first, ranks) = (here.start as usize, here.len());
        let rank = peers.rank as usize - first;
        let layout = Layout::new(ranks);
        let mut made: Option<(Segment, OwnedFd)> = None;
        let mut told = Vec::new();
        let mut trouble = None;
        if rank == 0 {
            let attempt =
                fresh_nonce().and_then(|nonce| Ok((Segment::create(layout, &nonce)?, nonce)));
            match attempt {
                Ok(((segment, file), nonce)) => {
                    told.extend_from_slice(&nonce);
                    let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
                    told.extend_from_slice(place.as_bytes());
                    made = Some((segment, file));
                }
                Err(error) => trouble = Some(format!("r{first} cannot make it: {error}")),
            }
        }
        let all = tell(peers, 1, &told)?;
        let mut segment = None;
        if let (Some((nonce, place)), None) = (all[first].split_first_chunk(), &trouble) {
            let opened = match made.take() {
                Some((own, file)) => {
                    Segment::allocate(&file, layout, rank).map(|()| (own, Some(file)))
                }
                None => open(place, layout, nonce, rank).map(|segment| (segment, None)),
            };
            match opened {
                Ok(found) => segment = Some(found),
                Err(error) => trouble = Some(format!("r{} cannot open it: {error}", peers.rank)),
            }
        }
        // The descriptor stays open until everyone has told how it went.
        let troubles = tell(peers, 2, trouble.unwrap_or_default().as_bytes())?;
        let trouble = troubles.iter().find(|trouble| !trouble.is_empty());
        Ok(match (segment, trouble) {
            (Some((segment, _)), None) => Ok(Self::new(segment, first, rank, ranks)),
            (_, trouble) => {
                let trouble = trouble.map(|text| String::from_utf8_lossy(text).into_owned());
                Err(trouble.unwrap_or_else(|| format!("r{first} did not make it")))
            }
        })
    }

    fn new(segment: Segment, first: usize, rank: usize, ranks: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let call = Call::plain(Operation::Join);
        Self {
            segment,
            first,
            rank,
            ranks,
            round: 0,
            patience: Patience::new(ranks, cores),
            post: Post::new(ranks),
            last: CallSite { call, number: 0 },
            history: 0,
        }
    }
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
