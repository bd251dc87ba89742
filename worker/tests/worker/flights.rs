//! Questions for flight logs pass through and leave nothing behind; what a rank says last is kept.

use std::fs;

use api::flight::FlightLog;
use api::session::{ExitCause, RankOrder, TaskEvent, WorkerMessage};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::harness::{Coordinator, Host, task};

/// Rank 0 answers questions; rank 1 reads no orders; rank 2 fails and says its last words itself.
const RANKS: &str = r#"
[ $RANK != 1 ] || exec sleep 100000
flight() { say '{"report":"flight","request":'"$1"',"log":{"generation":'$COHORT_GENERATION',"rank":'$RANK',"tag":"step 3"'"$2"'}}'; }
if [ $RANK = 2 ]; then flight 0 ',"ending":"lost r1"'; exit 1; fi
while read -r order; do
  case "$order" in
    *'"order":"flight"'*) flight "$(echo "$order" | sed 's/.*"request":\([0-9]*\).*/\1/')" ;;
  esac
done
"#;

fn question(request: u64) -> RankOrder {
    RankOrder::Flight { request, entries: 10 }
}

#[tokio::test]
async fn questions_pass_through_and_last_words_are_kept() {
    let host = Host::new(RANKS);
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (asked, deaf, failing) = (task(1, 0), task(1, 1), task(1, 2));
    session.start(&asked).await;
    session.started(&asked).await;
    session.deliver(&asked, question(5)).await;
    let WorkerMessage::Flight { request: 5, task: who, log: Some(log), .. } =
        session.message().await
    else {
        panic!("expected the answer to 5")
    };
    assert_eq!((who, log.tag.as_str()), (asked.clone(), "step 3"));
    // One that is not here has no log; it is no exit either.
    let unknown = task(9, 0);
    session.deliver(&unknown, question(6)).await;
    let none = session.message().await;
    assert!(matches!(&none, WorkerMessage::Flight { request: 6, log: None, .. }), "{none:?}");
    // One that reads nothing answers nothing, and is not killed for it.
    session.start(&deaf).await;
    let pid = session.started(&deaf).await;
    for request in 10..2_000 {
        session.deliver(&deaf, question(request)).await;
    }
    session.deliver(&asked, question(7)).await;
    assert!(matches!(session.message().await, WorkerMessage::Flight { request: 7, .. }));
    // Of one that is stopped the worker knows more than that it does not answer.
    let process = Pid::from_raw(pid);
    kill(process, Signal::SIGSTOP).expect("it runs");
    // A signal is on its way for a while: only a process that has stopped is known to be.
    let stopped = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(process), stopped).expect("it is a child of this process");
    session.deliver(&deaf, question(8)).await;
    let WorkerMessage::Flight { request: 8, log: None, why, .. } = session.message().await else {
        panic!("expected the answer to 8")
    };
    assert!(why.contains(&format!("`kill -CONT {pid}`")), "{why}");

    // Killed: one has the time to say what it was doing, the other does not use it.
    for rank in [&asked, &deaf] {
        session.kill(rank, "enough").await;
        let cause = ExitCause::Killed { reason: "enough".into() };
        assert_eq!(session.exited(rank).await, cause);
    }
    session.start(&failing).await;
    session.started(&failing).await;
    let (_, event) = session.fact().await;
    assert!(matches!(event, TaskEvent::Exited { cause: ExitCause::Code { .. } }), "{event:?}");
    session.acknowledge(session.last).await;
    worker.shut_down();
    worker.result().await.expect("a clean end");

    let kept = |rank: u32| -> Option<FlightLog> {
        let path = host.store().join(format!("jobs/digits/flight/g1/r{rank}.json"));
        Some(serde_json::from_slice(&fs::read(path).ok()?).expect("a log"))
    };
    let ending = |rank| kept(rank).and_then(|log| log.ending);
    assert_eq!(ending(0).as_deref(), Some("killed: enough"));
    assert_eq!(kept(1), None);
    assert_eq!(ending(2).as_deref(), Some("lost r1"));
}
