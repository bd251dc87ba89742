//! The `Cluster` service: what the `cluster` command asks. Any coordinator answers; one that does
//! not lead passes the call on to the leader.
//!
//! Writes are answered after their commit. Reads come from the leader's applied records: a leader
//! that was just cut off may answer from them until it notices, an election timeout at most.

use std::error::Error as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use api::document::nearest;
use api::events::JobEvent;
use api::pb::cluster_client::ClusterClient;
use api::pb::cluster_server::Cluster;
use api::pb::{self, Record};
use api::records::{EndpointSpec, JobRecord, JobStatus, KIND_ENDPOINT, KIND_JOB, KIND_MODEL};
use api::{Generation, JobSpec, Name, Rank};
use coordinator_core::{Input, Records, Versioned};
use futures::Stream;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::coordinator::Validate;
use crate::flight::{FlightDesk, WantedStacks};
use crate::leadership::{Leadership, Leaderships};
use crate::log_stream::{LogSources, Workload};
use crate::peers::{FORWARDED_KEY, Peers};
use crate::status::leadership_lost;
use crate::watch::FeedReader;

/// Largest answer: a listing of every record of a large cluster.
pub(crate) const REPLY_BYTES_MAX: usize = 64 << 20;
/// What framing adds to a listing, at most.
const REPLY_MARGIN: usize = 1 << 20;
/// Largest specification: files are limited to the same size.
const SPEC_BYTES_MAX: usize = 1 << 20;
/// Longest request id a client may choose: 128 bits in hex take 32.
const REQUEST_ID_MAX: usize = 64;
/// A call waits this long for a leader to be elected.
const LEADER_WAIT: Duration = Duration::from_secs(3);
/// Items that may wait for a slow reader of a stream.
const STREAM_ITEMS_MAX: usize = 64;
/// Names compared when one is not found.
const NEAREST_AMONG_MAX: usize = 1000;

/// The service.
pub(crate) struct ClusterService {
    pub(crate) leaderships: Leaderships,
    pub(crate) peers: Arc<Peers>,
    pub(crate) logs: LogSources,
    pub(crate) desk: Arc<FlightDesk>,
    pub(crate) validate: Validate,
}

/// Who answers a call.
enum Route {
    Here(Leadership),
    There(ClusterClient<Channel>),
}

type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl ClusterService {
    /// This coordinator if it leads, else the leader; waits a while for an election.
    async fn route<T>(&self, request: &Request<T>) -> Result<Route, Status> {
        let was_forwarded = request.metadata().contains_key(FORWARDED_KEY);
        let mut leaderships = self.leaderships.clone();
        let mut status = self.logs.raft.watch_status();
        let found = tokio::time::timeout(LEADER_WAIT, async {
            loop {
                if let Some(leadership) = leaderships.borrow_and_update().clone() {
                    return Ok(Route::Here(leadership));
                }
                let leader = status.borrow_and_update().leader;
                if let Some(leader) = leader.filter(|leader| *leader != self.peers.node) {
                    if was_forwarded {
                        return Err(Status::unavailable("the leader changed: ask again"));
                    }
                    return self.peers.client(leader).map(Route::There);
                }
                let changed = tokio::select! {
                    changed = leaderships.changed() => changed,
                    changed = status.changed() => changed,
                };
                if changed.is_err() {
                    return Err(Status::unavailable("this coordinator is stopping: ask another"));
                }
            }
        });
        match found.await {
            Ok(route) => route,
            Err(_) => Err(self.no_leader().await),
        }
    }

    /// What the leader told. One that cannot be reached is dead or cut off: the caller is told so
    /// once its successor is known, or that there is none.
    async fn told<A>(&self, answer: Result<Response<A>, Status>) -> Result<Response<A>, Status> {
        match answer {
            Err(status) if status.code() == Code::Unavailable && status.source().is_some() => {
                let lost = self.logs.raft.status().leader;
                let mut status = self.logs.raft.watch_status();
                let elected = status.wait_for(|now| now.leader.is_some() && now.leader != lost);
                let is_elected = tokio::time::timeout(LEADER_WAIT, elected)
                    .await
                    .is_ok_and(|elected| elected.is_ok());
                Err(if is_elected {
                    Status::unavailable("the leader was lost, another leads: ask again")
                } else {
                    self.no_leader().await
                })
            }
            answer => answer,
        }
    }

    async fn no_leader(&self) -> Status {
        let (answering, members) = (self.peers.answering().await, self.peers.members.len());
        let majority = members / 2 + 1;
        let what_to_do = if answering < majority {
            format!("start the others, a leader needs {majority} of them")
        } else {
            "an election is under way, ask again".to_owned()
        };
        Status::unavailable(format!(
            "no leader: {answering} of {members} coordinators answer; {what_to_do}"
        ))
    }

    fn records(&self) -> Arc<Records> {
        self.logs.raft.records()
    }

    fn not_found(&self, kind: &str, id: &str) -> Status {
        let records = self.records();
        // A checkpoint's neighbours are those of its own job.
        let prefix = id.split_once('/').map_or("", |(owner, _)| owner);
        let known: Vec<&str> =
            records.list(kind, prefix).take(NEAREST_AMONG_MAX).map(|(key, _)| &*key.id).collect();
        let shown: String = id.chars().take(80).collect();
        Status::not_found(match nearest(&shown, &known) {
            Some(near) => format!("{kind} `{shown}` not found; did you mean `{near}`?"),
            None if known.is_empty() => format!("{kind} `{shown}` not found: there is none yet"),
            None => format!("{kind} `{shown}` not found; `cluster {kind}s` lists all"),
        })
    }

    async fn submit_here(
        &self,
        leadership: Leadership,
        request: pb::SubmitRequest,
    ) -> Result<Record, Status> {
        let id = request_id("submit", &request.request_id)?;
        let spec: JobSpec = parse_spec(&request.spec_json)?;
        spec.validate().map_err(|error| Status::invalid_argument(error.to_string()))?;
        (self.validate)(&spec).map_err(Status::invalid_argument)?;
        let about = (KIND_JOB, spec.name.to_string());
        leadership.request(Input::Submit { spec }, about, id).await
    }

    async fn stop_here(
        &self,
        leadership: Leadership,
        request: pb::StopRequest,
    ) -> Result<Record, Status> {
        let id = request_id("stop", &request.request_id)?;
        let kind = match request.kind.as_str() {
            KIND_JOB => KIND_JOB,
            KIND_ENDPOINT => KIND_ENDPOINT,
            other => {
                let other: String = other.chars().take(80).collect();
                let text = format!("`{other}` cannot be stopped, expected `job` or `endpoint`");
                return Err(Status::invalid_argument(text));
            }
        };
        let name = self.existing(kind, &request.name)?;
        let about = (kind, name.to_string());
        leadership.request(Input::Stop { kind: kind.to_owned(), name }, about, id).await
    }

    async fn resume_here(
        &self,
        leadership: Leadership,
        request: pb::ResumeRequest,
    ) -> Result<Record, Status> {
        let id = request_id("resume", &request.request_id)?;
        let name = self.existing(KIND_JOB, &request.name)?;
        let about = (KIND_JOB, name.to_string());
        leadership.request(Input::Resume { name }, about, id).await
    }

    async fn deploy_here(
        &self,
        leadership: Leadership,
        request: pb::DeployRequest,
    ) -> Result<Record, Status> {
        let id = request_id("deploy", &request.request_id)?;
        let spec: EndpointSpec = parse_spec(&request.spec_json)?;
        self.existing(KIND_MODEL, spec.model.as_str())?;
        let about = (KIND_ENDPOINT, spec.name.to_string());
        leadership.request(Input::Deploy { spec }, about, id).await
    }

    async fn drain_here(
        &self,
        leadership: &Leadership,
        worker: &str,
        input: impl FnOnce(Name) -> Input,
    ) -> Result<pb::DrainReply, Status> {
        let worker = parse_name(worker)?;
        let view = leadership.drain(input(worker.clone()), worker).await?;
        let json = serde_json::to_vec(&view);
        let worker_json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(pb::DrainReply { worker_json })
    }

    /// The name, if there is such a record: the message for a mistyped one names its neighbour.
    fn existing(&self, kind: &str, name: &str) -> Result<Name, Status> {
        match self.records().get(kind, name) {
            Some(_) => parse_name(name),
            None => Err(self.not_found(kind, name)),
        }
    }

    fn list_here(&self, request: &pb::ListRequest) -> Result<pb::ListReply, Status> {
        let records = self.records();
        let mut bytes = 0;
        let mut listed = Vec::new();
        for (key, found) in records.list(&request.kind, &request.id_prefix) {
            bytes += found.json.len() + key.id.len() + key.kind.len() + 16;
            if bytes > REPLY_BYTES_MAX - REPLY_MARGIN {
                return Err(Status::resource_exhausted(format!(
                    "more than {REPLY_BYTES_MAX} bytes of `{}` records: ask with a longer id prefix",
                    key.kind
                )));
            }
            listed.push(wire_record(&key.kind, &key.id, found));
        }
        Ok(pb::ListReply { records: listed })
    }

    fn get_here(&self, request: &pb::GetRequest) -> Result<Record, Status> {
        let records = self.records();
        let found = records.get(&request.kind, &request.id);
        let found = found.ok_or_else(|| self.not_found(&request.kind, &request.id))?;
        Ok(wire_record(&request.kind, &request.id, found))
    }

    fn logs_here(
        &self,
        leadership: &Leadership,
        request: &pb::LogsRequest,
    ) -> Result<Items<pb::LogLine>, Status> {
        let name = parse_name(&request.job)?;
        let workload = Workload::find(&self.records(), &name);
        let workload = workload.ok_or_else(|| self.not_found(KIND_JOB, &request.job))?;
        let (sink, lines) = mpsc::channel(STREAM_ITEMS_MAX);
        let rank = request.rank.map(Rank);
        let over = leadership.over.clone();
        tokio::spawn(self.logs.clone().stream(workload, rank, request.follow, over, sink));
        Ok(Box::pin(ReceiverStream::new(lines)))
    }

    async fn flight_here(
        &self,
        leadership: &Leadership,
        request: &pb::FlightRequest,
    ) -> Result<pb::FlightReply, Status> {
        let name = parse_name(&request.job)?;
        let records = self.records();
        let job = records.read::<JobRecord>(KIND_JOB, name.as_str());
        let Some((_, job)) = job.map_err(|error| Status::internal(error.to_string()))? else {
            if records.get(KIND_ENDPOINT, name.as_str()).is_some() {
                return Err(Status::failed_precondition(format!(
                    "`{name}` is an endpoint: only the ranks of a job have flight logs; `cluster \
                     logs {name}` shows what its replica wrote"
                )));
            }
            return Err(self.not_found(KIND_JOB, &request.job));
        };
        let generation = request.generation.map(Generation);
        let stacks = if request.stacks { WantedStacks::Live } else { WantedStacks::Kept };
        let report = self.desk.report(leadership, &job, generation, stacks).await?;
        let json = serde_json::to_vec(&report);
        Ok(pb::FlightReply { json: json.map_err(|error| Status::internal(error.to_string()))? })
    }

    fn watch_here(
        &self,
        leadership: &Leadership,
        request: &pb::WatchRequest,
    ) -> Result<Items<pb::JobEvent>, Status> {
        let name = parse_name(&request.job)?;
        // Subscribed before the record is read, so that no state falls between the two.
        let reader = leadership.feeds.subscribe(&name);
        let record = self.records().read::<JobRecord>(KIND_JOB, name.as_str());
        let record = record.map_err(|error| Status::internal(error.to_string()))?;
        let (version, record) = record.ok_or_else(|| self.not_found(KIND_JOB, &request.job))?;
        let (sink, events) = mpsc::channel(STREAM_ITEMS_MAX);
        let watcher = Watcher { reader, version, status: record.status, sink };
        tokio::spawn(watcher.run(leadership.over.clone()));
        Ok(Box::pin(ReceiverStream::new(events)))
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type LogsStream = Items<pb::LogLine>;
    type WatchStream = Items<pb::JobEvent>;

    async fn submit(
        &self,
        request: Request<pb::SubmitRequest>,
    ) -> Result<Response<Record>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                self.submit_here(here, request.into_inner()).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.submit(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListReply>, Status> {
        match self.route(&request).await? {
            Route::Here(_) => self.list_here(request.get_ref()).map(Response::new),
            Route::There(mut there) => {
                self.told(there.list(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<Record>, Status> {
        match self.route(&request).await? {
            Route::Here(_) => self.get_here(request.get_ref()).map(Response::new),
            Route::There(mut there) => {
                self.told(there.get(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn stop(&self, request: Request<pb::StopRequest>) -> Result<Response<Record>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                self.stop_here(here, request.into_inner()).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.stop(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn resume(
        &self,
        request: Request<pb::ResumeRequest>,
    ) -> Result<Response<Record>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                self.resume_here(here, request.into_inner()).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.resume(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn workers(
        &self,
        request: Request<pb::WorkersRequest>,
    ) -> Result<Response<pb::WorkersReply>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                let workers = here.workers().await?;
                let workers_json: Result<_, _> = workers.iter().map(serde_json::to_vec).collect();
                let workers_json =
                    workers_json.map_err(|error| Status::internal(error.to_string()))?;
                Ok(Response::new(pb::WorkersReply { workers_json }))
            }
            Route::There(mut there) => {
                self.told(there.workers(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn drain(
        &self,
        request: Request<pb::DrainRequest>,
    ) -> Result<Response<pb::DrainReply>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                let pb::DrainRequest { worker, deadline_ms } = request.into_inner();
                let input = |worker| Input::Drain { worker, deadline_ms };
                self.drain_here(&here, &worker, input).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.drain(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn undrain(
        &self,
        request: Request<pb::UndrainRequest>,
    ) -> Result<Response<pb::DrainReply>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                let worker = request.into_inner().worker;
                let input = |worker| Input::Undrain { worker };
                self.drain_here(&here, &worker, input).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.undrain(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn logs(
        &self,
        request: Request<pb::LogsRequest>,
    ) -> Result<Response<Items<pb::LogLine>>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => self.logs_here(&here, request.get_ref()).map(Response::new),
            Route::There(mut there) => {
                let forwarded = self.peers.forwarded(request.into_inner());
                Ok(self
                    .told(there.logs(forwarded).await)
                    .await?
                    .map(|lines| Box::pin(lines) as Items<_>))
            }
        }
    }

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Items<pb::JobEvent>>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => self.watch_here(&here, request.get_ref()).map(Response::new),
            Route::There(mut there) => {
                let forwarded = self.peers.forwarded(request.into_inner());
                Ok(self
                    .told(there.watch(forwarded).await)
                    .await?
                    .map(|events| Box::pin(events) as Items<_>))
            }
        }
    }

    async fn flight(
        &self,
        request: Request<pb::FlightRequest>,
    ) -> Result<Response<pb::FlightReply>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                self.flight_here(&here, request.get_ref()).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.flight(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn deploy(
        &self,
        request: Request<pb::DeployRequest>,
    ) -> Result<Response<Record>, Status> {
        match self.route(&request).await? {
            Route::Here(here) => {
                self.deploy_here(here, request.into_inner()).await.map(Response::new)
            }
            Route::There(mut there) => {
                self.told(there.deploy(self.peers.forwarded(request.into_inner())).await).await
            }
        }
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusReply>, Status> {
        let status = self.logs.raft.status();
        let members = self
            .peers
            .members
            .iter()
            .map(|member| pb::Member { node: member.node.0, address: member.address.to_string() });
        Ok(Response::new(pb::StatusReply {
            node: status.node.0,
            leader: status.leader.map_or(0, |leader| leader.0),
            term: status.term,
            commit_index: status.commit_index,
            applied_index: status.applied_index,
            members: members.collect(),
        }))
    }
}

/// Sends a job's events to one watcher: the current status, the recent window, then what comes,
/// until the job has ended.
struct Watcher {
    reader: FeedReader,
    version: u64,
    status: JobStatus,
    sink: mpsc::Sender<Result<pb::JobEvent, Status>>,
}

impl Watcher {
    async fn run(mut self, over: CancellationToken) {
        let sink = self.sink.clone();
        tokio::select! {
            () = self.watch() => {}
            () = sink.closed() => {}
            () = over.cancelled() => {
                // A watcher that does not take it finds the stream closed.
                let _ = sink.try_send(Err(leadership_lost()));
            }
        }
    }

    async fn watch(&mut self) {
        let current = JobEvent::Status(Box::new(self.status.clone()));
        if !self.send(&current).await {
            return;
        }
        let mut sent_more = false;
        loop {
            let batch = self.reader.read();
            if batch.is_empty() {
                if self.status.phase.is_terminal() {
                    // The last event tells how it ended, also after a replayed window.
                    if sent_more {
                        self.send(&JobEvent::Status(Box::new(self.status.clone()))).await;
                    }
                    return;
                }
                self.reader.changed().await;
                continue;
            }
            for entry in batch {
                if let JobEvent::Status(status) = &*entry.event {
                    // Older than what was sent first: it would seem to go back in time.
                    if entry.version.is_some_and(|version| version <= self.version) {
                        continue;
                    }
                    self.version = entry.version.unwrap_or(self.version);
                    self.status = (**status).clone();
                    if self.status.phase.is_terminal() {
                        sent_more = true;
                        continue;
                    }
                }
                sent_more = true;
                if !self.send(&entry.event).await {
                    return;
                }
            }
        }
    }

    async fn send(&self, event: &JobEvent) -> bool {
        let event = match serde_json::to_vec(event) {
            Ok(json) => Ok(pb::JobEvent { json }),
            Err(error) => Err(Status::internal(format!("an event is not JSON: {error}"))),
        };
        self.sink.send(event).await.is_ok()
    }
}

fn wire_record(kind: &str, id: &str, found: &Versioned) -> Record {
    Record {
        kind: kind.to_owned(),
        id: id.to_owned(),
        version: found.version,
        json: found.json.to_vec(),
    }
}

fn parse_name(name: &str) -> Result<Name, Status> {
    name.parse().map_err(|error: api::ids::NameError| Status::invalid_argument(error.to_string()))
}

fn parse_spec<T: DeserializeOwned>(json: &[u8]) -> Result<T, Status> {
    if json.len() > SPEC_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "the specification has {} bytes, expected at most {SPEC_BYTES_MAX}",
            json.len()
        )));
    }
    serde_json::from_slice(json).map_err(|error| {
        Status::invalid_argument(format!("the specification cannot be read: {error}"))
    })
}

/// The id under which a request is remembered: apart from the leader's own and per method, so that
/// one client's ids can touch nothing else.
fn request_id(method: &str, id: &str) -> Result<String, Status> {
    let legal =
        !id.is_empty() && id.len() <= REQUEST_ID_MAX && id.bytes().all(|b| b.is_ascii_graphic());
    if !legal {
        return Err(Status::invalid_argument(format!(
            "request_id: expected 1 to {REQUEST_ID_MAX} printable characters"
        )));
    }
    Ok(format!("client-{method}-{id}"))
}
