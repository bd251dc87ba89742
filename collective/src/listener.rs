//! Where a rank waits for its peers, before it knows who they are.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::Duration;

use api::Rank;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpCongestion;
use socket2::{SockRef, TcpKeepalive};

use crate::abort::AbortHandle;
use crate::carrier::Carrier;
use crate::communicator::GroupOptions;
use crate::connect::{Connection, Formation};
use crate::error::CollectiveError;
use crate::frame::FrameCodec;
use crate::group::ProcessGroup;
use crate::handshake::Identity;
use crate::link::Link;
use crate::peers::Peers;
use crate::tcp_options::{STREAMS_MAX, TcpOptions};
use crate::wire::Wire;

/// Most ranks of one group: a rank holds at least two descriptors per peer …
const WORLD_SIZE_MAX: u32 = 480;
/// … and a process commonly may have 1,024, some of which it needs for other things.
const DESCRIPTORS_MAX: usize = 960;
/// Most characters of a group's name.
const GROUP_CHARS_MAX: usize = 256;
/// Most bytes of the name of a host.
const HOST_BYTES_MAX: usize = 1024;
/// A host that vanished is found after 10 s + 4 · 5 s, on the connection for last words, which is
/// idle. A stopped process on a living host is not taken for dead: its kernel still answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 4;
/// A congestion control that every Linux has and every process may choose, and that sends at once.
const UNPACED: &str = "reno";

/// A bound socket: its address is told to the peers before the group forms.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    abort: AbortHandle,
    tcp: TcpOptions,
}

impl Listener {
    /// Listens on a free port of an address.
    ///
    /// # Errors
    /// If the address is not this host's, or there are no ports or descriptors.
    pub fn bind(address: IpAddr) -> Result<Self, CollectiveError> {
        let failed = |source| CollectiveError::socket(format!("listen on `{address}`"), source);
        let socket = TcpListener::bind((address, 0)).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        Ok(Self { socket, address, abort: AbortHandle::new()?, tcp: TcpOptions::default() })
    }

    /// Makes connections with other options.
    pub fn with_tcp(self, tcp: TcpOptions) -> Self {
        Self { tcp, ..self }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks off the group before, during and after [`Listener::connect`], from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// Forms the group with the peers' listeners, which are given in rank order and include this
    /// rank's own. A world of one opens no connection.
    ///
    /// # Errors
    /// [`CollectiveError::WrongSecret`] or [`CollectiveError::Refused`] if a lower rank is not who
    /// it should be; [`CollectiveError::ConnectTimeout`] naming whoever is missing;
    /// [`CollectiveError::InvalidOptions`]; [`CollectiveError::Aborted`].
    pub fn connect(
        self,
        options: GroupOptions,
        peers: &[SocketAddr],
    ) -> Result<ProcessGroup, CollectiveError> {
        check(&options, &self.tcp, peers)?;
        let (abort, address, tcp) = (self.abort.clone(), self.address, self.tcp.clone());
        let identity = Identity::new(&options, &tcp);
        let codec = FrameCodec { generation: options.generation, group: identity.group };
        let links = if options.world_size == 1 {
            vec![None]
        } else {
            let connections = self.form(&identity, peers, options.connect_timeout)?;
            abort.watch(codec, connections.iter().flatten().cloned().collect())?;
            connections
                .into_iter()
                .zip(peers)
                .enumerate()
                .map(|(rank, (connection, address))| {
                    connection.map(|both| Link::new(Rank(rank as u32), *address, both))
                })
                .collect()
        };
        let mut peers = Peers::new(options.rank.0, options.generation, codec, links, abort).with(
            options.reduction,
            tcp,
            address.ip(),
        );
        // Whoever goes on hears why this rank does not.
        let carrier =
            Carrier::agree(&mut peers, &options).inspect_err(|error| peers.give_up(error))?;
        Ok(ProcessGroup::new(peers, carrier, options, address.ip()))
    }

    /// Authenticated connections by rank; none at this rank's place.
    pub(crate) fn form(
        self,
        identity: &Identity,
        peers: &[SocketAddr],
        timeout: Duration,
    ) -> Result<Vec<Option<Connection>>, CollectiveError> {
        let tls = self.tcp.tls.as_deref();
        let formation = Formation::new(identity, peers, &self.socket, &self.abort, tls, timeout);
        let connections = formation.run()?;
        let wires = connections.iter().flatten().flat_map(|c| c.data.iter().chain([&c.words]));
        for stream in wires.map(Wire::socket) {
            let failed = |source| CollectiveError::socket("set up a connection to a peer", source);
            stream.set_nodelay(true).map_err(failed)?;
            if stream.peer_addr().is_ok_and(|peer| peer.ip() == self.address.ip()) {
                // Best effort: what paces for a network finds none between ranks of one host.
                let _ = setsockopt(stream, TcpCongestion, &OsString::from(UNPACED));
            }
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_RETRIES);
            SockRef::from(stream).set_tcp_keepalive(&keepalive).map_err(failed)?;
        }
        Ok(connections)
    }
}

fn check(
    options: &GroupOptions,
    tcp: &TcpOptions,
    peers: &[SocketAddr],
) -> Result<(), CollectiveError> {
    let world = options.world_size;
    let message = if world == 0 || world > WORLD_SIZE_MAX {
        format!("a world of {world} ranks, expected 1 to {WORLD_SIZE_MAX}")
    } else if tcp.streams == 0 || tcp.streams > STREAMS_MAX {
        format!("{} streams per peer, expected 1 to {STREAMS_MAX}", tcp.streams)
    } else if world as usize * (1 + tcp.streams) > DESCRIPTORS_MAX {
        format!(
            "{} streams to each of {world} ranks take more than {DESCRIPTORS_MAX} descriptors",
            tcp.streams
        )
    } else if options.rank.0 >= world {
        format!("{} is not below the world size of {world}", options.rank)
    } else if peers.len() != world as usize {
        format!("{} addresses of peers, expected one for each of {world} ranks", peers.len())
    } else if options.group.chars().count() > GROUP_CHARS_MAX {
        format!("its name is longer than {GROUP_CHARS_MAX} characters")
    } else if options.host.as_ref().is_some_and(|host| host.len() > HOST_BYTES_MAX) {
        format!("the name of its host is longer than {HOST_BYTES_MAX} bytes")
    } else if world > 1 && options.secret.reveal().is_empty() {
        "the secret is empty".to_owned()
    } else {
        return Ok(());
    };
    let group = options.group.chars().take(GROUP_CHARS_MAX).collect();
    Err(CollectiveError::InvalidOptions { group, message })
}
