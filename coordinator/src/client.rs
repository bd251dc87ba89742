//! Talks to a cluster: any coordinator, another one when it fails, the same request id each time.
//!
//! Used by the `cluster` command. It decides nothing and keeps nothing but connections.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use api::config::TlsSection;
use api::connect::{TOKEN_KEY, endpoint, token_metadata};
use api::finding::FlightReport;
use api::pb::cluster_client::ClusterClient as Rpc;
use api::pb::{self, Record};
use api::records::{
    CheckpointRecord, EndpointRecord, EndpointSpec, JobRecord, KIND_CHECKPOINT, KIND_ENDPOINT,
    KIND_JOB, KIND_MODEL, ModelRecord, WorkerView,
};
use api::units::Span;
use api::{JobSpec, Name, Secret};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::client_error::{ClientError, is_retryable};
use crate::client_stream::{EventStream, LineStream, follow_events, follow_lines};
use crate::cluster_service::REPLY_BYTES_MAX;
use crate::random::{REQUEST_ID_BYTES, random_hex};

/// One coordinator is given this long to answer: longer than it gives itself, so that its own
/// message arrives.
const ATTEMPT_WAIT: Duration = Duration::from_secs(15);
/// A request is tried again for this long: several elections.
const RETRY_FOR: Duration = Duration::from_secs(20);
/// First pause after every coordinator was tried in vain …
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// … and the longest.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The first contact may take this long per coordinator.
const GREETING_WAIT: Duration = Duration::from_secs(5);
/// An endpoint that was deployed answers within this time, or something is wrong with it.
const ENDPOINT_WAIT: Duration = Duration::from_secs(120);
/// How often a new endpoint is asked about.
const ENDPOINT_POLL: Duration = Duration::from_millis(200);

/// A client of a cluster; cheap to clone.
#[derive(Clone)]
pub struct ClusterClient {
    coordinators: Arc<Vec<(SocketAddr, Channel)>>,
    token: MetadataValue<Ascii>,
    /// Index of the coordinator that answered last.
    preferred: Arc<AtomicUsize>,
}

impl std::fmt::Debug for ClusterClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterClient").field("tried", &self.addresses()).finish_non_exhaustive()
    }
}

impl ClusterClient {
    /// Contacts a cluster through the first of `addresses` that answers.
    ///
    /// # Errors
    /// `Unreachable` at once when none answers; `Denied` when the token is refused.
    pub async fn connect(
        addresses: &[SocketAddr],
        tls: &TlsSection,
        token: Secret,
    ) -> Result<Self, ClientError> {
        if addresses.is_empty() {
            return Err(ClientError::NoAddress);
        }
        // Ok when this process chose a provider before: tonic takes either.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let token = token_metadata(&token).ok_or_else(|| {
            ClientError::Denied("the cluster token is not one line of printable ASCII".into())
        })?;
        let mut coordinators = Vec::new();
        for address in addresses {
            coordinators.push((*address, endpoint(*address, tls)?.connect_lazy()));
        }
        let client =
            Self { coordinators: Arc::new(coordinators), token, preferred: Arc::default() };
        client.greet().await?;
        Ok(client)
    }

    /// Finds a coordinator that answers and takes the token.
    async fn greet(&self) -> Result<(), ClientError> {
        let mut last = None;
        for index in 0..self.coordinators.len() {
            let mut rpc = self.rpc(index);
            let asked = rpc.status(self.request(pb::StatusRequest {}));
            match timeout(GREETING_WAIT, asked).await.unwrap_or_else(|_| Err(late(GREETING_WAIT))) {
                Ok(_) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(());
                }
                Err(status) if is_retryable(&status) => last = Some(status),
                Err(status) => return Err(ClientError::refused(&status)),
            }
        }
        let last = last.unwrap_or_else(|| Status::unavailable("no coordinator was asked"));
        Err(ClientError::gave_up(&self.addresses(), &last))
    }

    /// Commits a job.
    ///
    /// # Errors
    /// `Conflict` when the name is taken, `Invalid` when the specification is.
    pub async fn submit(&self, spec: &JobSpec) -> Result<JobRecord, ClientError> {
        let spec_json = to_json(spec)?;
        let request = pb::SubmitRequest { request_id: new_request_id()?, spec_json };
        document(self.call(request, async |mut rpc, r| rpc.submit(r).await).await?)
    }

    /// All jobs, each with its record's version.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn jobs(&self) -> Result<Vec<(u64, JobRecord)>, ClientError> {
        self.list(KIND_JOB, "").await
    }

    /// One job and its record's version.
    ///
    /// # Errors
    /// `NotFound` names a job of a similar name.
    pub async fn job(&self, name: &Name) -> Result<(u64, JobRecord), ClientError> {
        self.get(KIND_JOB, name.as_str()).await
    }

    /// All endpoints, each with its record's version.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn endpoints(&self) -> Result<Vec<(u64, EndpointRecord)>, ClientError> {
        self.list(KIND_ENDPOINT, "").await
    }

    /// One endpoint and its record's version.
    ///
    /// # Errors
    /// `NotFound` names an endpoint of a similar name.
    pub async fn endpoint(&self, name: &Name) -> Result<(u64, EndpointRecord), ClientError> {
        self.get(KIND_ENDPOINT, name.as_str()).await
    }

    /// All models, each with its record's version.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn models(&self) -> Result<Vec<(u64, ModelRecord)>, ClientError> {
        self.list(KIND_MODEL, "").await
    }

    /// One model and its record's version.
    ///
    /// # Errors
    /// `NotFound` names a model of a similar name.
    pub async fn model(&self, name: &Name) -> Result<(u64, ModelRecord), ClientError> {
        self.get(KIND_MODEL, name.as_str()).await
    }

    /// A job's committed checkpoints by step, each with its record's version.
    ///
    /// # Errors
    /// See [`ClientError`]; a job that does not exist has none.
    pub async fn checkpoints(
        &self,
        job: &Name,
    ) -> Result<Vec<(u64, CheckpointRecord)>, ClientError> {
        self.list(KIND_CHECKPOINT, &format!("{job}/")).await
    }

    /// Asks a job to write a checkpoint and stop.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when it has ended.
    pub async fn stop_job(&self, name: &Name) -> Result<JobRecord, ClientError> {
        document(self.stop(KIND_JOB, name).await?)
    }

    /// Asks an endpoint to stop.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when it has ended.
    pub async fn stop_endpoint(&self, name: &Name) -> Result<EndpointRecord, ClientError> {
        document(self.stop(KIND_ENDPOINT, name).await?)
    }

    async fn stop(&self, kind: &str, name: &Name) -> Result<Record, ClientError> {
        let request = pb::StopRequest {
            request_id: new_request_id()?,
            kind: kind.to_owned(),
            name: name.to_string(),
        };
        self.call(request, async |mut rpc, r| rpc.stop(r).await).await
    }

    /// Puts a stopped or failed job back into the queue.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when it has not ended or has succeeded.
    pub async fn resume(&self, name: &Name) -> Result<JobRecord, ClientError> {
        let request = pb::ResumeRequest { request_id: new_request_id()?, name: name.to_string() };
        document(self.call(request, async |mut rpc, r| rpc.resume(r).await).await?)
    }

    /// Makes an endpoint that serves a model.
    ///
    /// # Errors
    /// `NotFound` for the model, `Conflict` when the endpoint's name is taken.
    pub async fn deploy(&self, spec: &EndpointSpec) -> Result<EndpointRecord, ClientError> {
        let spec_json = to_json(spec)?;
        let request = pb::DeployRequest { request_id: new_request_id()?, spec_json };
        document(self.call(request, async |mut rpc, r| rpc.deploy(r).await).await?)
    }

    /// Waits until an endpoint has an address, or has ended without one.
    ///
    /// # Errors
    /// `NotFound`, or `EndpointWaits` when it takes too long: the reason says what it waits for.
    pub async fn wait_for_endpoint(&self, name: &Name) -> Result<EndpointRecord, ClientError> {
        let until = Instant::now() + ENDPOINT_WAIT;
        loop {
            let (_, endpoint) = self.endpoint(name).await?;
            let status = &endpoint.status;
            if status.address.is_some() || status.phase.is_terminal() {
                return Ok(endpoint);
            }
            if Instant::now() > until {
                return Err(ClientError::EndpointWaits(format!(
                    "endpoint `{name}` is still {} after {} s: {}; it goes on waiting: free a slot, or \
                     give it up with `cluster stop {name} --endpoint`",
                    status.phase,
                    ENDPOINT_WAIT.as_secs(),
                    status.reason
                )));
            }
            sleep(ENDPOINT_POLL).await;
        }
    }

    /// The workers that the leader holds leases for.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn workers(&self) -> Result<Vec<WorkerView>, ClientError> {
        let reply =
            self.call(pb::WorkersRequest {}, async |mut rpc, r| rpc.workers(r).await).await?;
        reply.workers_json.iter().map(|json| from_json(json)).collect()
    }

    /// Asks the tasks of a worker to leave, within `deadline` where one is given, and lets no more be
    /// placed on it. The worker as it stands then.
    ///
    /// # Errors
    /// `NotFound` names the known workers; `Conflict` when it is away or leaves anyhow.
    pub async fn drain(
        &self,
        worker: &Name,
        deadline: Option<Span>,
    ) -> Result<WorkerView, ClientError> {
        let milliseconds = |span: Span| u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX);
        let deadline_ms = deadline.map(milliseconds);
        let request = pb::DrainRequest { worker: worker.to_string(), deadline_ms };
        let reply = self.call(request, async |mut rpc, r| rpc.drain(r).await).await?;
        from_json(&reply.worker_json)
    }

    /// Lets a drained worker take tasks again. The worker as it stands then.
    ///
    /// # Errors
    /// `NotFound` names the known workers; `Conflict` when it does not drain because of a user.
    pub async fn undrain(&self, worker: &Name) -> Result<WorkerView, ClientError> {
        let request = pb::UndrainRequest { worker: worker.to_string() };
        let reply = self.call(request, async |mut rpc, r| rpc.undrain(r).await).await?;
        from_json(&reply.worker_json)
    }

    /// The raft group as the coordinator that answers sees it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<pb::StatusReply, ClientError> {
        self.call(pb::StatusRequest {}, async |mut rpc, r| rpc.status(r).await).await
    }

    /// A job's log lines, oldest first; with `follow` until the job ends. When the leader is lost
    /// the stream goes on with the next one, without repeating a line.
    ///
    /// # Errors
    /// `NotFound`; later failures arrive as the stream's last item.
    pub async fn logs(
        &self,
        job: &Name,
        rank: Option<u32>,
        follow: bool,
    ) -> Result<LineStream, ClientError> {
        let request = pb::LogsRequest { job: job.to_string(), rank, follow };
        follow_lines(self.clone(), request).await
    }

    /// A job's events: first its status, then the recent window and what follows, until the status
    /// that ends it. When the leader is lost the stream goes on with the next one, without
    /// repeating an event.
    ///
    /// # Errors
    /// `NotFound`; later failures arrive as the stream's last item.
    pub async fn watch(&self, job: &Name) -> Result<EventStream, ClientError> {
        follow_events(self.clone(), pb::WatchRequest { job: job.to_string() }).await
    }

    /// The flight logs of a job's ranks, of one generation if it is given, and what they say; with what
    /// the ranks' threads are in now if `stacks`.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when the job has not run or has no flight log.
    pub async fn flight(
        &self,
        job: &Name,
        generation: Option<u64>,
        stacks: bool,
    ) -> Result<FlightReport, ClientError> {
        let request = pb::FlightRequest { job: job.to_string(), generation, stacks };
        from_json(&self.call(request, async |mut rpc, r| rpc.flight(r).await).await?.json)
    }

    async fn list<T: DeserializeOwned>(
        &self,
        kind: &str,
        id_prefix: &str,
    ) -> Result<Vec<(u64, T)>, ClientError> {
        let request = pb::ListRequest { kind: kind.to_owned(), id_prefix: id_prefix.to_owned() };
        let reply = self.call(request, async |mut rpc, r| rpc.list(r).await).await?;
        let parsed =
            reply.records.into_iter().map(|record| Ok((record.version, document(record)?)));
        parsed.collect()
    }

    async fn get<T: DeserializeOwned>(
        &self,
        kind: &str,
        id: &str,
    ) -> Result<(u64, T), ClientError> {
        let request = pb::GetRequest { kind: kind.to_owned(), id: id.to_owned() };
        let record = self.call(request, async |mut rpc, r| rpc.get(r).await).await?;
        Ok((record.version, document(record)?))
    }

    /// Asks coordinators in turn until one answers, beginning with the one that did last.
    pub(crate) async fn call<Q, A, F, Fut>(&self, request: Q, ask: F) -> Result<A, ClientError>
    where
        Q: Clone,
        F: Fn(Rpc<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let until = Instant::now() + RETRY_FOR;
        let mut pause = PAUSE_MIN;
        loop {
            let first = self.preferred.load(Ordering::Relaxed);
            let mut last = None;
            for offset in 0..self.coordinators.len() {
                let index = (first + offset) % self.coordinators.len();
                let asked = ask(self.rpc(index), self.request(request.clone()));
                match timeout(ATTEMPT_WAIT, asked).await.unwrap_or_else(|_| Err(late(ATTEMPT_WAIT)))
                {
                    Ok(answer) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Ok(answer.into_inner());
                    }
                    Err(status) if is_retryable(&status) => last = Some(status),
                    Err(status) => return Err(ClientError::refused(&status)),
                }
            }
            if Instant::now() + pause > until {
                let last = last.unwrap_or_else(|| Status::unavailable("no coordinator was asked"));
                return Err(ClientError::gave_up(&self.addresses(), &last));
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn rpc(&self, index: usize) -> Rpc<Channel> {
        let (_, channel) = &self.coordinators[index];
        Rpc::new(channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(TOKEN_KEY, self.token.clone());
        request
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.coordinators.iter().map(|(address, _)| *address).collect()
    }
}

fn late(wait: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {} s", wait.as_secs()))
}

fn new_request_id() -> Result<String, ClientError> {
    Ok(random_hex::<REQUEST_ID_BYTES>()?)
}

fn to_json<T: serde::Serialize>(document: &T) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(document).map_err(|error| ClientError::Invalid(error.to_string()))
}

fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(json).map_err(|error| ClientError::Protocol(error.to_string()))
}

fn document<T: DeserializeOwned>(record: Record) -> Result<T, ClientError> {
    from_json(&record.json)
}
