//! One coordinator and a scripted worker over gRPC: a job's whole life, its logs and events, retries,
//! and where secrets are not.

mod support;

use api::events::JobEvent;
use api::ids::Step;
use api::pb;
use api::records::{EndpointSpec, KIND_CHECKPOINT, KIND_ENDPOINT, KIND_JOB, KIND_MODEL, Phase};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, RankOrder, RankReport, StopCause, WorkerMessage,
};
use api::{ExitClass, Rank};
use coordinator::EventStream;
use support::{
    FakeWorker, Group, TOKEN, checkpoint, folder_holds, guard, hello, inventory, metrics, name,
    rank_address, rpc, spec, with_token,
};
use tokio_stream::StreamExt as _;
use tonic::Code;

async fn next_event(events: &mut EventStream) -> Option<JobEvent> {
    guard("an event", events.next()).await.map(|event| event.expect("an event"))
}

/// Reads events until `wanted` accepts one.
async fn until(events: &mut EventStream, wanted: impl Fn(&JobEvent) -> bool) -> JobEvent {
    loop {
        let event = next_event(events).await.expect("the stream goes on");
        if wanted(&event) {
            return event;
        }
    }
}

fn is_phase(event: &JobEvent, phase: Phase) -> bool {
    matches!(event, JobEvent::Status(status) if status.phase == phase)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_lives_from_submit_to_its_model_and_no_secret_is_kept() {
    let mut group = Group::start(1).await;
    let client = group.client().await;
    let mut worker =
        FakeWorker::attach(group.address(1), hello("w1", 2, Vec::new())).await.expect("attaches");
    let job = name("digits");

    let record = client.submit(&spec("digits", 2)).await.expect("accepted");
    assert_eq!(record.spec.name, job);
    let mut events = client.watch(&job).await.expect("watches");
    let first = next_event(&mut events).await.expect("an event");
    assert!(matches!(first, JobEvent::Status(_)), "{first:?}");

    let (tasks, secret) = worker.run_gang(2).await;
    assert_eq!(secret.len(), 64, "256 bits in hex");
    until(&mut events, |event| is_phase(event, Phase::Running)).await;

    let mut followed = client.logs(&job, None, true).await.expect("follows");
    worker.log(&tasks[0], 0, &["zero", "one"]).await;
    worker.log(&tasks[1], 0, &["of the other rank"]).await;
    // Said again after a lost acknowledgement, and one that is new; then two are missing.
    worker.log(&tasks[0], 1, &["one", "two"]).await;
    let sequence = worker.log(&tasks[0], 5, &["five"]).await;
    worker.say(WorkerMessage::Heartbeat).await;
    worker.acknowledged(sequence).await;
    let mut lines = Vec::new();
    while lines.len() < 6 {
        let line = guard("a line", followed.next()).await.expect("more").expect("a line");
        lines.push(format!("r{} {} {} {}", line.rank, line.sequence, line.stream, line.text));
    }
    lines.retain(|line| line.starts_with("r0"));
    assert_eq!(lines[..3], ["r0 0 stdout zero", "r0 1 stdout one", "r0 2 stdout two"]);
    assert!(lines[3].starts_with("r0 3 gap 2 lines are missing"), "{lines:?}");
    assert_eq!(lines[4], "r0 5 stdout five");
    let only = client.logs(&job, Some(1), false).await.expect("reads");
    let only: Vec<_> = guard("the lines of one rank", only.collect::<Vec<_>>()).await;
    let texts: Vec<_> = only.into_iter().map(|line| line.expect("a line").text).collect();
    assert_eq!(texts, ["of the other rank"]);

    worker.report(&tasks[0], RankReport::Step(metrics(1))).await;
    until(&mut events, |event| matches!(event, JobEvent::Step(m) if m.step == Step(1))).await;

    let fact = checkpoint(&tasks[0], 50);
    let sequence = worker.report(&tasks[0], RankReport::Checkpoint(fact.clone())).await;
    worker.acknowledged(sequence).await;
    let checkpoints = client.checkpoints(&job).await.expect("lists");
    let facts: Vec<_> = checkpoints.into_iter().map(|(_, record)| record.fact).collect();
    assert_eq!(facts, [fact], "acknowledged before it was recorded");
    let (told, order) = worker.deliver().await;
    assert_eq!((told, order), (tasks[0].clone(), RankOrder::Committed { step: Step(50) }));

    worker.finish(&tasks).await;
    let mut last = None;
    while let Some(event) = next_event(&mut events).await {
        last = Some(event);
    }
    assert!(is_phase(&last.expect("an event"), Phase::Succeeded));
    assert!(guard("the end of the lines", followed.next()).await.is_none());
    let (_, record) = client.job(&job).await.expect("exists");
    assert!(record.status.model.is_some());
    assert_eq!(client.models().await.expect("lists").len(), 1);
    // A late watcher: how it ended first, then what the window still holds, then the end again.
    let late = client.watch(&job).await.expect("watches");
    let late: Vec<_> = guard("the late events", late.collect::<Vec<_>>()).await;
    let late: Vec<_> = late.into_iter().map(|event| event.expect("an event")).collect();
    assert!(
        is_phase(&late[0], Phase::Succeeded) && is_phase(&late[late.len() - 1], Phase::Succeeded)
    );
    assert!(late.iter().any(|event| matches!(event, JobEvent::Step(m) if m.step == Step(1))));

    let address = group.address(1);
    for kind in [KIND_JOB, KIND_CHECKPOINT, KIND_MODEL, KIND_ENDPOINT] {
        for json in raw_records(address, kind).await {
            let text = String::from_utf8(json).expect("JSON");
            assert!(!text.contains(&secret) && !text.contains(TOKEN), "a secret in {kind}: {text}");
        }
    }
    group.stop_all().await;
    // The search itself works: the job's name is on disk, the secrets are not.
    assert!(folder_holds(group.dir.path(), b"digits"));
    assert!(!folder_holds(group.dir.path(), secret.as_bytes()), "the gang's secret is on disk");
    assert!(!folder_holds(group.dir.path(), TOKEN.as_bytes()), "the token is on disk");
}

async fn raw_records(address: std::net::SocketAddr, kind: &str) -> Vec<Vec<u8>> {
    let request = pb::ListRequest { kind: kind.to_owned(), id_prefix: String::new() };
    let listed = rpc(address).await.list(with_token(request)).await.expect("lists").into_inner();
    listed.records.into_iter().map(|record| record.json).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_answered_again_and_another_request_of_that_name_is_not() {
    let mut group = Group::start(1).await;
    let mut rpc = rpc(group.address(1)).await;
    let submit = |request_id: &str, ranks: u32| {
        let spec_json = serde_json::to_vec(&spec("a", ranks)).expect("serialises");
        with_token(pb::SubmitRequest { request_id: request_id.to_owned(), spec_json })
    };
    let first = rpc.submit(submit("x", 1)).await.expect("accepted").into_inner();
    let again = rpc.submit(submit("x", 1)).await.expect("a retry is harmless").into_inner();
    assert_eq!((first.kind, first.id), (again.kind, again.id));
    let taken = rpc.submit(submit("y", 1)).await.expect_err("taken");
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");
    let unnamed = rpc.submit(submit("", 1)).await.expect_err("no request id");
    assert_eq!(unnamed.code(), Code::InvalidArgument, "{unnamed}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_refused_in_one_clear_message() {
    let mut group = Group::start(1).await;
    let client = group.client().await;
    client.submit(&spec("digits", 1)).await.expect("accepted");

    let missing = client.job(&name("digit")).await.expect_err("mistyped");
    assert_eq!(missing.exit_class(), ExitClass::NotFound);
    assert!(missing.to_string().contains("did you mean `digits`?"), "{missing}");
    let missing = client.stop_job(&name("digit")).await.expect_err("mistyped");
    assert_eq!(missing.exit_class(), ExitClass::NotFound);
    let missing = client.logs(&name("digit"), None, true).await.expect_err("mistyped");
    assert_eq!(missing.exit_class(), ExitClass::NotFound);
    let missing = client.watch(&name("zzz")).await.expect_err("unknown");
    assert_eq!(missing.exit_class(), ExitClass::NotFound);

    let mut unknown = spec("other", 1);
    unknown.algorithm = "divination".into();
    let invalid = client.submit(&unknown).await.expect_err("unknown algorithm");
    assert_eq!(invalid.exit_class(), ExitClass::Usage);
    assert!(invalid.to_string().contains("divination"), "{invalid}");
    let mut crowded = spec("other", 1);
    crowded.resources.ranks = api::job::Ranks::Fixed(9.try_into().expect("not zero"));
    let invalid = client.submit(&crowded).await.expect_err("more ranks than lanes");
    assert!(invalid.to_string().contains("batch.lanes = 8"), "{invalid}");
    assert_eq!(client.jobs().await.expect("lists").len(), 1, "a refused job was recorded");

    let conflict = client.resume(&name("digits")).await.expect_err("it has not ended");
    assert_eq!(conflict.exit_class(), ExitClass::Conflict, "{conflict}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_breaks_the_protocol_loses_its_session_only() {
    let mut group = Group::start(1).await;
    let address = group.address(1);
    let attach = |worker: &'static str| FakeWorker::attach(address, hello(worker, 1, Vec::new()));

    let mut garbled = attach("w1").await.expect("attaches");
    garbled.say_raw(b"{\"message\":\"nonsense\"}".to_vec()).await;
    let refused = garbled.order().await.expect_err("closed");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");

    let mut twice = attach("w2").await.expect("attaches");
    twice.say(WorkerMessage::Hello(Box::new(hello("w2", 1, Vec::new())))).await;
    let refused = twice.order().await.expect_err("closed");
    assert!(refused.message().contains("second hello"), "{refused}");

    // The coordinator goes on.
    let mut healthy = attach("w3").await.expect("attaches");
    let sequence = healthy.say(WorkerMessage::Heartbeat).await;
    healthy.acknowledged(sequence).await;
    let client = group.client().await;
    let workers = client.workers().await.expect("lists");
    assert!(workers.iter().any(|worker| worker.name == name("w3") && worker.attached));
    client.submit(&spec("a", 1)).await.expect("accepted");
    assert!(matches!(healthy.order().await.expect("an order"), CoordinatorMessage::Start { .. }));
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_coordinator_goes_on_where_it_was() {
    let mut group = Group::start(1).await;
    let address = group.address(1);
    let job = name("a");
    let mut worker =
        FakeWorker::attach(address, hello("w1", 1, Vec::new())).await.expect("attaches");
    group.client().await.submit(&spec("a", 1)).await.expect("accepted");
    let (tasks, _) = worker.run_gang(1).await;
    let fact = checkpoint(&tasks[0], 50);
    let sequence = worker.report(&tasks[0], RankReport::Checkpoint(fact.clone())).await;
    worker.acknowledged(sequence).await;
    let mut events = group.client().await.watch(&job).await.expect("watches");
    assert!(is_phase(&next_event(&mut events).await.expect("an event"), Phase::Running));

    group.stop(1).await;
    group.restart(1).await;
    let mut worker =
        FakeWorker::attach(address, hello("w1", 1, inventory(&tasks))).await.expect("attaches");
    worker.finish(&tasks).await;
    let starts = |order: &CoordinatorMessage| matches!(order, CoordinatorMessage::Start { .. });
    assert!(!worker.early().iter().any(starts), "a running rank was started again");
    let (_, record) = group.client().await.job(&job).await.expect("exists");
    assert_eq!((record.status.phase, record.status.restarts), (Phase::Succeeded, 0));
    assert_eq!(record.status.checkpoint, Some(fact));
    // The watcher's stream outlived the restart.
    until(&mut events, |event| is_phase(event, Phase::Succeeded)).await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_resume_and_deploy_reach_the_worker() {
    let mut group = Group::start(1).await;
    let client = group.client().await;
    let job = name("a");
    let mut worker =
        FakeWorker::attach(group.address(1), hello("w1", 1, Vec::new())).await.expect("attaches");
    client.submit(&spec("a", 1)).await.expect("accepted");
    let (tasks, first_secret) = worker.run_gang(1).await;
    let fact = checkpoint(&tasks[0], 50);
    worker.report(&tasks[0], RankReport::Checkpoint(fact.clone())).await;
    assert!(matches!(worker.deliver().await.1, RankOrder::Committed { .. }));

    let record = client.stop_job(&job).await.expect("stops");
    assert_eq!(record.status.phase, Phase::Stopping);
    assert!(matches!(worker.deliver().await.1, RankOrder::Stop { .. }));
    worker.report(&tasks[0], RankReport::Stopped { step: Step(50), why: StopCause::Order }).await;
    let sequence = worker.exited(&tasks[0], ExitCause::Completed).await;
    worker.acknowledged(sequence).await;
    let (_, record) = client.job(&job).await.expect("exists");
    assert_eq!(record.status.phase, Phase::Stopped);

    client.resume(&job).await.expect("resumes");
    let (task, assignment) = worker.start().await;
    assert!(task.generation > tasks[0].generation, "a generation was used twice");
    assert_eq!(assignment.restore, Some(fact));
    let second_secret = assignment.secret.reveal();
    assert!(second_secret.len() == 64 && second_secret != first_secret);
    let address = rank_address(Rank(0));
    let fingerprint = "cpu/test".to_owned();
    worker.report(&task, RankReport::Listening { address, fingerprint }).await;
    assert!(matches!(worker.deliver().await.1, RankOrder::Peers { .. }));
    worker.report(&task, RankReport::Running { step: Step(50), holds_state: true }).await;
    worker.finish(&[task]).await;

    let listen = "127.0.0.1:0".parse().expect("an address");
    let spec = EndpointSpec { name: name("a-endpoint"), model: name("b"), listen };
    let missing = client.deploy(&spec).await.expect_err("no such model");
    assert_eq!(missing.exit_class(), ExitClass::NotFound, "{missing}");
    client.deploy(&EndpointSpec { model: job, ..spec.clone() }).await.expect("accepted");
    let order = worker.order().await.expect("an order");
    let CoordinatorMessage::Start { task, assignment } = order else { panic!("{order:?}") };
    assert!(matches!(*assignment, Assignment::Serve(_)));
    let fingerprint = String::new();
    worker.report(&task, RankReport::Listening { address, fingerprint }).await;
    let endpoint = client.wait_for_endpoint(&spec.name).await.expect("answers");
    assert_eq!(endpoint.status.address, Some(address));
    group.stop_all().await;
}
