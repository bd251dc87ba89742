//! The other coordinators, for calls that only the leader can answer. Raft has channels of its own.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use api::config::{Member, TlsSection};
use api::connect::{ConnectError, TOKEN_KEY, endpoint, token_metadata};
use api::pb::cluster_client::ClusterClient;
use api::{NodeId, Secret};
use futures::future::join_all;
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::cluster_service::REPLY_BYTES_MAX;
use crate::raft_node::RaftHandle;

/// Marks a forwarded call, so that two coordinators that each take the other for the leader do not
/// send it back and forth.
pub(crate) const FORWARDED_KEY: &str = "cohort-forwarded";
/// The leader begins to answer a forwarded call within this time: a little more than it gives
/// itself, so that its own message arrives.
const FORWARD_WAIT: Duration = Duration::from_secs(12);
/// A member that does not accept a connection in this time is not counted as answering.
const PROBE_WAIT: Duration = Duration::from_millis(500);

/// How to reach the members of the raft group.
pub(crate) struct Peers {
    pub(crate) node: NodeId,
    pub(crate) members: Vec<Member>,
    tls: TlsSection,
    token: MetadataValue<Ascii>,
    raft: RaftHandle,
    channels: Mutex<HashMap<NodeId, Channel>>,
}

impl Peers {
    /// Connects to nothing yet. `None` when the token is not printable ASCII.
    pub(crate) fn new(
        node: NodeId,
        members: Vec<Member>,
        tls: TlsSection,
        token: &Secret,
        raft: RaftHandle,
    ) -> Option<Self> {
        let token = token_metadata(token)?;
        Some(Self { node, members, tls, token, raft, channels: Mutex::default() })
    }

    /// Where a member listens.
    pub(crate) fn address(&self, node: NodeId) -> Option<SocketAddr> {
        self.members.iter().find(|member| member.node == node).map(|member| member.address)
    }

    /// Where the leader listens, as far as this coordinator knows; never its own address.
    pub(crate) fn leader_address(&self) -> Option<SocketAddr> {
        let leader = self.raft.status().leader.filter(|leader| *leader != self.node)?;
        self.address(leader)
    }

    /// A client of another member, over a channel that is kept.
    pub(crate) fn client(&self, node: NodeId) -> Result<ClusterClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(&node) {
            Some(channel) => channel.clone(),
            None => {
                let channel = self.open(node).map_err(|error| {
                    Status::internal(format!("cannot reach coordinator {node}: {error}"))
                })?;
                channels.entry(node).or_insert(channel).clone()
            }
        };
        Ok(ClusterClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX))
    }

    fn open(&self, node: NodeId) -> Result<Channel, PeerError> {
        let address = self.address(node).ok_or(PeerError::NotAMember)?;
        Ok(endpoint(address, &self.tls)?.connect_lazy())
    }

    /// The call as this coordinator passes it on.
    pub(crate) fn forwarded<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(FORWARD_WAIT);
        request.metadata_mut().insert(TOKEN_KEY, self.token.clone());
        request.metadata_mut().insert(FORWARDED_KEY, MetadataValue::from_static("1"));
        request
    }

    /// Members that accept connections now, this one included.
    pub(crate) async fn answering(&self) -> usize {
        let others = self.members.iter().filter(|member| member.node != self.node);
        let probes = others.map(|member| async {
            let connected = tokio::time::timeout(PROBE_WAIT, TcpStream::connect(member.address));
            matches!(connected.await, Ok(Ok(_)))
        });
        1 + join_all(probes).await.into_iter().filter(|answers| *answers).count()
    }
}

/// Why no channel to a member could be made.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error("it is not among coordinator.members")]
    NotAMember,
    #[error(transparent)]
    Connect(#[from] ConnectError),
}
