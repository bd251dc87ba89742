//! The receiving side: the gRPC service that peers stream their messages to.
//!
//! Invariant: a message is parsed only after its sender showed the cluster token, named this
//! cluster, and is a member other than this node; raft sees it only if its own addresses agree with
//! its envelope and it is of a kind that peers exchange here.
//!
//! A node that lost its folder and comes back under its old id may have forgotten its vote, and two
//! leaders could be elected in one term. So a peer remembers the identity of the folder it first
//! heard from under an id and refuses any other; the refused node stops itself.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use api::NodeId;
use api::connect::TOKEN_KEY;
use api::pb::raft_server::{Raft, RaftServer};
use api::pb::{RaftAck, RaftFrame};
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use tonic::{Request, Response, Status, Streaming};

use super::handle::{Input, MESSAGE_UNIT_BYTES, MESSAGE_UNITS, Shared};
use super::options::RaftOptions;
use super::snapshot::SNAPSHOT_BYTES_MAX;
use crate::token::{TokenCheck, refused};

/// gRPC metadata key of the sender's folder identity.
pub(super) const FOLDER_KEY: &str = "cohort-raft-folder";
/// Largest frame: a snapshot and its envelope. Appends are far smaller (see [`super::driver`]).
pub(super) const FRAME_BYTES_MAX: usize = SNAPSHOT_BYTES_MAX + (1 << 20);

const _: () = assert!(
    FRAME_BYTES_MAX <= MESSAGE_UNITS as usize * MESSAGE_UNIT_BYTES,
    "a frame must fit into the room for messages, or it would wait for ever"
);
const _: () = assert!(
    coordinator_core::transaction::TRANSACTION_BYTES_MAX < FRAME_BYTES_MAX / 2,
    "an append carries at least one whole transaction"
);

/// Receives the messages of peers; add it to the tonic server with [`RaftService::into_server`].
#[derive(Clone)]
pub struct RaftService {
    shared: Arc<Shared>,
    node: NodeId,
    peers: Arc<BTreeSet<u64>>,
    cluster_id: Arc<str>,
    token: TokenCheck,
}

impl fmt::Debug for RaftService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RaftService").field("node", &self.node).finish_non_exhaustive()
    }
}

impl RaftService {
    pub(super) fn new(shared: Arc<Shared>, options: &RaftOptions) -> Self {
        let peers = options.voters().into_iter().filter(|id| *id != options.node.0);
        Self {
            shared,
            node: options.node,
            peers: Arc::new(peers.collect()),
            cluster_id: options.cluster_id.as_str().into(),
            token: TokenCheck::new(options.token.clone()),
        }
    }

    /// The tonic service, accepting frames as large as a snapshot.
    pub fn into_server(self) -> RaftServer<Self> {
        RaftServer::new(self).max_decoding_message_size(FRAME_BYTES_MAX)
    }

    /// Checks everything about a frame that can be checked without reading its message.
    ///
    /// Another cluster's node must be told so, and not that its folder was lost: the folder comes
    /// last.
    fn check_envelope(&self, frame: &RaftFrame, identity: u64) -> Result<(), Status> {
        if frame.cluster_id != *self.cluster_id {
            return Err(Status::failed_precondition(format!(
                "this coordinator belongs to cluster `{}`, the sender to `{}`: check `cluster.id` \
                 and the addresses in `coordinator.members` of both",
                self.cluster_id, frame.cluster_id
            )));
        }
        let from = NodeId(frame.from);
        if frame.to != self.node.0 || !self.peers.contains(&frame.from) {
            return Err(Status::failed_precondition(format!(
                "a message from {from} to {} reached {}: `coordinator.members` differs between \
                 the two",
                NodeId(frame.to),
                self.node
            )));
        }
        match self.shared.peer_identity(from) {
            Some(known) if known != identity => Err(Status::data_loss(format!(
                "{} knows {from} by folder {known:016x}, but it now shows folder {identity:016x}",
                self.node
            ))),
            _ => Ok(()),
        }
    }
}

/// Parses the message of a frame whose envelope was checked.
fn open(frame: &RaftFrame) -> Result<Message, Status> {
    let message = Message::parse_from_bytes(&frame.message)
        .map_err(|cause| Status::invalid_argument(format!("not a raft message: {cause}")))?;
    if message.from != frame.from || message.to != frame.to || !is_exchanged(&message) {
        return Err(Status::invalid_argument(format!(
            "unexpected raft message {:?} from {} to {}",
            message.get_msg_type(),
            NodeId(message.from),
            NodeId(message.to)
        )));
    }
    Ok(message)
}

/// The kinds that peers send each other here. Others (forwarded proposals, leadership transfers,
/// read requests) are never sent, and some of them panic in raft-rs when malformed.
fn is_exchanged(message: &Message) -> bool {
    matches!(
        message.get_msg_type(),
        MessageType::MsgAppend
            | MessageType::MsgAppendResponse
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse
            | MessageType::MsgSnapshot
    )
}

#[tonic::async_trait]
impl Raft for RaftService {
    async fn step(
        &self,
        request: Request<Streaming<RaftFrame>>,
    ) -> Result<Response<RaftAck>, Status> {
        let shown = request
            .metadata()
            .get(TOKEN_KEY)
            .ok_or_else(|| refused("no cluster token was shown"))?;
        if !self.token.accepts(shown.as_bytes()) {
            return Err(refused("the cluster token that was shown is not this cluster's"));
        }
        let identity = request.metadata().get(FOLDER_KEY).and_then(|value| value.to_str().ok());
        let identity: u64 = identity
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| Status::invalid_argument(format!("`{FOLDER_KEY}` is not a number")))?;
        let mut frames = request.into_inner();
        loop {
            let frame = tokio::select! {
                frame = frames.message() => frame?,
                // Open streams would hold up the server's shutdown.
                _ = self.shared.stopped() => {
                    return Err(Status::unavailable("this coordinator has stopped"));
                }
            };
            let Some(frame) = frame else { return Ok(Response::new(RaftAck {})) };
            self.check_envelope(&frame, identity)?;
            let message = Box::new(open(&frame)?);
            // Waiting here holds up this peer's stream only, by flow control; the raft thread and
            // the other peers go on.
            let permit = self.shared.message_room(frame.message.len()).await;
            let permit =
                permit.ok_or_else(|| Status::unavailable("this coordinator has stopped"))?;
            let input = Input::Message { identity, message, _room: permit };
            if !self.shared.send(input) {
                return Err(Status::unavailable("this coordinator has stopped"));
            }
        }
    }
}
