//! The sending side: one task and one stream per peer, reconnecting with growing pauses.
//!
//! It may lose messages (raft repeats them) but tells raft so. The stream shows the cluster token
//! and the identity of this node's folder.

use std::sync::Arc;
use std::time::Duration;

use api::connect::TOKEN_KEY;
use api::pb::RaftFrame;
use api::pb::raft_client::RaftClient;
use api::{NodeId, Secret};
use tokio::time::Instant;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use super::outbox::Outbox;
use super::service::{FOLDER_KEY, FRAME_BYTES_MAX};

/// Pause after the first failure: a restarting peer is back within it.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// Longest pause: a peer that returns is heard from within one election timeout or so.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A stream that lived this long was healthy: the next failure starts with a short pause again.
const HEALTHY: Duration = Duration::from_secs(1);

/// How to reach one peer.
pub(super) struct Peer {
    /// This node.
    pub(super) from: NodeId,
    /// The peer.
    pub(super) to: NodeId,
    /// Its address, with certificates.
    pub(super) endpoint: Endpoint,
    /// What to send.
    pub(super) outbox: Arc<Outbox>,
    /// Shown on every stream.
    pub(super) token: Secret,
    /// Named in every frame.
    pub(super) cluster_id: String,
    /// Identity of this node's folder.
    pub(super) identity: u64,
}

impl Peer {
    /// Sends until the task is aborted.
    pub(super) async fn run(self) {
        let mut pause = RETRY_MIN;
        // Log lines only where something changes: a peer may be down for days.
        let mut last_failure = String::new();
        loop {
            self.outbox.filled().await;
            let started = Instant::now();
            let status = match self.stream().await {
                Ok(()) => Status::unavailable("the peer ended the stream"),
                Err(status) => status,
            };
            if status.code() == Code::DataLoss {
                self.outbox.refuse_folder(status.message().to_owned());
            }
            self.outbox.clear();
            if started.elapsed() >= HEALTHY {
                pause = RETRY_MIN;
                last_failure.clear();
            }
            let failure = format!("{:?}: {}", status.code(), status.message());
            if failure != last_failure {
                tracing::warn!(node = %self.from, peer = %self.to, %failure, "raft peer not reached");
                last_failure = failure;
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(RETRY_MAX);
        }
    }

    /// One stream, from connection to failure. Ends `Ok` only when the peer closes it.
    async fn stream(&self) -> Result<(), Status> {
        // The endpoint bounds the attempt, and its keepalives end a connection to a vanished host.
        let channel = self.endpoint.connect().await.map_err(|e| Status::from_error(e.into()))?;
        let mut client = RaftClient::new(channel).max_encoding_message_size(FRAME_BYTES_MAX);
        let token = api::connect::token_metadata(&self.token)
            .ok_or_else(|| Status::internal("the cluster token cannot be sent"))?;
        let mut request = Request::new(self.frames());
        request.metadata_mut().insert(TOKEN_KEY, token);
        request.metadata_mut().insert(FOLDER_KEY, self.identity.into());
        client.step(request).await?;
        Ok(())
    }

    fn frames(&self) -> impl futures::Stream<Item = RaftFrame> + Send + 'static {
        let outbox = Arc::clone(&self.outbox);
        let empty = RaftFrame {
            from: self.from.0,
            to: self.to.0,
            message: Vec::new(),
            cluster_id: self.cluster_id.clone(),
        };
        futures::stream::unfold((outbox, empty), |(outbox, empty)| async move {
            let message = outbox.pop().await;
            let frame = RaftFrame { message, ..empty.clone() };
            Some((frame, (outbox, empty)))
        })
    }
}
