//! The one listener of a coordinator: raft, clients and workers, with mutual TLS when configured.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use api::config::ClusterConfig;
use api::connect::{ConnectError, server_tls};
use api::pb::cluster_server::ClusterServer;
use api::pb::worker_session_server::WorkerSessionServer;
use api::session::MESSAGE_BYTES_MAX;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::cluster_service::{ClusterService, REPLY_BYTES_MAX};
use crate::coordinator::Validate;
use crate::coordinator_error::CoordinatorError;
use crate::flight::FlightDesk;
use crate::leadership::Leaderships;
use crate::log_stream::LogSources;
use crate::peers::Peers;
use crate::raft_node::RaftService;
use crate::session::SessionService;
use crate::token::TokenCheck;

/// Idle connections are probed this often, so that the session of a vanished host ends.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A probe unanswered for this long ends the connection.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams per connection: a follower forwards its clients' streams over one.
const STREAMS_MAX: u32 = 1024;
/// What framing adds to the largest message.
const FRAME_MARGIN: usize = 64 << 10;
/// The running server.
pub(crate) type ServerTask = JoinHandle<Result<(), tonic::transport::Error>>;

/// What the server answers with.
pub(crate) struct Services {
    pub(crate) cluster_id: String,
    pub(crate) token: TokenCheck,
    pub(crate) validate: Validate,
    pub(crate) leaderships: Leaderships,
    pub(crate) peers: Arc<Peers>,
    pub(crate) logs: LogSources,
    pub(crate) desk: Arc<FlightDesk>,
    pub(crate) raft: RaftService,
}

impl Services {
    /// Serves until `shutdown`.
    pub(crate) fn serve(
        self,
        config: &ClusterConfig,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<ServerTask, CoordinatorError> {
        let failed = |error: std::io::Error| CoordinatorError::Serve(error.to_string());
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let questions = Arc::clone(&self.desk.questions);
        let sessions = SessionService {
            cluster_id: self.cluster_id,
            token: self.token.clone(),
            leaderships: self.leaderships.clone(),
            peers: Arc::clone(&self.peers),
            window: Arc::clone(&self.logs.window),
            questions,
            next_session: AtomicU64::new(1),
        };
        let sessions = WorkerSessionServer::new(sessions)
            .max_decoding_message_size(MESSAGE_BYTES_MAX + FRAME_MARGIN)
            .max_encoding_message_size(MESSAGE_BYTES_MAX + FRAME_MARGIN);
        let cluster = ClusterServer::new(ClusterService {
            leaderships: self.leaderships,
            peers: self.peers,
            logs: self.logs,
            desk: self.desk,
            validate: self.validate,
        })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(REPLY_BYTES_MAX);
        let mut server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(STREAMS_MAX);
        if let Some(tls) = server_tls(&config.tls)? {
            server = server
                .tls_config(tls)
                .map_err(|error| CoordinatorError::Connect(ConnectError::Tls(error)))?;
        }
        let router = server
            // Raft checks the token itself: it shows a folder's identity with it.
            .add_service(self.raft.into_server())
            .add_service(InterceptedService::new(cluster, self.token.clone()))
            .add_service(InterceptedService::new(sessions, self.token));
        let stopped = async move { shutdown.cancelled().await };
        Ok(tokio::spawn(router.serve_with_incoming_shutdown(incoming, stopped)))
    }
}
