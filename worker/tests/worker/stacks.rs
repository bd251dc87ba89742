//! What the threads of a rank are in: in its own words, or in the kernel's where it has none.

use std::fs;

use api::TaskId;
use api::session::{CoordinatorMessage, WorkerMessage};
use api::stacks::StackDump;

use crate::harness::{Attachment, Coordinator, Host, task};

/// Rank 0 says where its only thread is; rank 1 reads no orders.
const RANKS: &str = r#"
[ $RANK != 1 ] || exec sleep 100000
while read -r order; do
  case "$order" in
    *'"order":"stacks"'*) say '{"report":"stacks","threads":[['$$',[{"function":"a::works"}]]],"absent":""}' ;;
  esac
done
"#;

async fn dump(session: &mut Attachment, of: &TaskId, keep: bool) -> Result<StackDump, String> {
    let order = CoordinatorMessage::Stacks { request: 3, task: of.clone(), keep };
    session.order(order).await;
    let WorkerMessage::Stacks { request: 3, task, dump, why } = session.message().await else {
        panic!("expected the answer to 3")
    };
    assert_eq!(task, *of);
    dump.map(|dump| *dump).ok_or(why)
}

#[tokio::test]
async fn a_rank_tells_its_stacks_and_of_one_that_does_not_the_kernel_tells() {
    let host = Host::new(RANKS);
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (asked, deaf) = (task(1, 0), task(1, 1));
    session.start(&asked).await;
    let pid = session.started(&asked).await;
    let told = dump(&mut session, &asked, false).await.expect("it runs");
    assert_eq!((told.pid, told.absent.as_str()), (pid as u32, ""));
    assert_eq!((told.generation, told.rank), (asked.generation, asked.rank));
    assert_eq!(told.threads[0].frames[0].function, "a::works");
    assert!(told.innermost().is_some_and(|text| text.ends_with("was in a::works")), "{told:?}");

    session.start(&deaf).await;
    let pid = session.started(&deaf).await;
    let told = dump(&mut session, &deaf, true).await.expect("it runs");
    assert_eq!((told.pid, told.absent.as_str()), (pid as u32, "it did not answer within 2 s"));
    assert_eq!((told.threads.len(), told.threads[0].state.as_str()), (1, "sleeping"));
    assert!(told.threads[0].frames.is_empty());

    let gone = dump(&mut session, &task(9, 0), true).await.expect_err("it is not here");
    assert!(gone.contains("it is not on its worker"), "{gone}");
    for rank in [&asked, &deaf] {
        session.kill(rank, "enough").await;
        session.exited(rank).await;
    }
    session.acknowledge(session.last).await;
    worker.shut_down();
    worker.result().await.expect("a clean end");
    let path = |rank| host.store().join(format!("jobs/digits/flight/g1/r{rank}.stacks.json"));
    let kept: StackDump =
        serde_json::from_slice(&fs::read(path(1)).expect("kept")).expect("a dump");
    assert_eq!(kept, told);
    assert!(!path(0).exists(), "nobody asked to keep it");
}
