//! What is said of the flight logs of a gang: each scenario with every sentence of its verdict.

use api::finding::{FlightSource, RankFlight};
use api::flight::{FlightCall, FlightDetail, FlightEntry, FlightGroup, FlightLog, FlightState};
use api::{Generation, Rank};
use coordinator_core::flight::findings;

/// When every log was taken.
const TAKEN: u64 = 100_000_000_000;
const G: Generation = Generation(4);

/// A log that is written call by call; the times are tenths of a second before it was taken.
struct Log(FlightLog);

fn log(rank: u32, tag: &str) -> Log {
    let (rank, tag) = (Rank(rank), tag.to_owned());
    let log = FlightLog { generation: G, rank, world_size: 4, tag, taken_ns: TAKEN, ..default() };
    Log(log)
}

fn default() -> FlightLog {
    FlightLog::default()
}

fn all_reduce(count: u64) -> FlightCall {
    FlightCall {
        operation: "all-reduce".into(),
        element: Some("f32".into()),
        reduce: Some("sum".into()),
        count,
        bytes: 4 * count,
        detail: None,
    }
}

fn barrier() -> FlightCall {
    FlightCall { operation: "barrier".into(), ..FlightCall::default() }
}

fn message(operation: &str, count: u64, detail: FlightDetail) -> FlightCall {
    let detail = Some(detail);
    FlightCall { operation: operation.into(), reduce: None, detail, ..all_reduce(count) }
}

impl Log {
    /// Who the members of a group are.
    fn joins(mut self, name: &str, members: &[u32]) -> Self {
        let members = members.iter().copied().map(Rank).collect();
        let name = name.to_owned();
        self.0.groups.push(FlightGroup { name, generation: G, members, ..FlightGroup::default() });
        self
    }

    fn entry(
        mut self,
        name: &str,
        number: u64,
        call: FlightCall,
        state: FlightState,
        ago: u64,
    ) -> Self {
        let begun = TAKEN - ago * 100_000_000;
        let ended = (!state.is_pending()).then_some(begun);
        let entry = FlightEntry {
            group: name.to_owned(),
            generation: G,
            sequence: number,
            call,
            state,
            queued_ns: begun,
            started_ns: Some(begun),
            moving_ns: None,
            ended_ns: ended,
            moved_bytes: 0,
            tag: self.0.tag.clone(),
            error: None,
        };
        if !self.0.groups.iter().any(|group| group.name == name) {
            self = self.joins(name, &[]);
        }
        if !entry.is_message() {
            let group = self.0.groups.iter_mut().find(|group| group.name == name).expect("joined");
            group.called = group.called.max(number + 1);
            if state == FlightState::Completed {
                (group.completed, group.completed_ns) = (Some(number), ended);
            }
        }
        self.0.entries.push(entry);
        self
    }

    fn did(self, name: &str, number: u64, call: FlightCall, ago: u64) -> Self {
        self.entry(name, number, call, FlightState::Completed, ago)
    }

    fn inside(self, name: &str, number: u64, call: FlightCall, ago: u64) -> Self {
        self.entry(name, number, call, FlightState::Started, ago)
    }

    /// The call failed, half a second after it began.
    fn failed(self, name: &str, number: u64, call: FlightCall, why: &str) -> Self {
        let mut log = self.entry(name, number, call, FlightState::Failed, 5);
        let entry = log.0.entries.last_mut().expect("just written");
        entry.ended_ns = Some(TAKEN);
        log.0.ending = Some(why.to_owned());
        log
    }

    fn of_generation(mut self, generation: u64) -> Self {
        self.0.generation = Generation(generation);
        self
    }
}

fn verdict(logs: Vec<Result<Log, &str>>) -> Vec<String> {
    let ranks: Vec<RankFlight> = logs
        .into_iter()
        .enumerate()
        .map(|(rank, log)| RankFlight {
            rank: Rank(rank as u32),
            worker: None,
            host: String::new(),
            source: FlightSource::Live,
            absent: log.as_ref().err().map(|why| (*why).to_owned()).unwrap_or_default(),
            log: log.ok().map(|log| log.0),
        })
        .collect();
    findings(G, &ranks).iter().map(ToString::to_string).collect()
}

/// Three ranks wait in #118; the other says of itself what `fourth` says.
fn three_wait(fourth: Result<Log, &'static str>) -> Vec<String> {
    let waits = |rank| {
        let log = log(rank, "step 17 reduce").did("data", 117, all_reduce(1024), 33);
        Ok(log.inside("data", 118, all_reduce(1024), 32))
    };
    verdict(vec![waits(0), fourth, waits(2), waits(3)])
}

#[test]
fn a_rank_that_computes_while_the_others_wait() {
    let late = log(1, "step 17 backward").did("data", 117, all_reduce(1024), 32);
    assert_eq!(
        three_wait(Ok(late)),
        ["group `data`: ranks 0, 2, 3 wait in #118 all-reduce f32 × 1024 (sum) for 3.2 s; rank 1 \
          is behind: last completed #117, 3.2 s ago, is in no collective (tag: step 17 backward)"]
    );
}

#[test]
fn a_rank_without_a_log_is_the_first_suspect() {
    assert_eq!(
        three_wait(Err("no answer within 2 s")),
        [
            "rank 1 has no flight log: no answer within 2 s",
            "group `data`: ranks 0, 2, 3 wait in #118 all-reduce f32 × 1024 (sum) for 3.2 s; \
             rank 1 has no flight log"
        ]
    );
}

#[test]
fn a_rank_of_an_older_generation_is_named_and_not_lined_up() {
    let old = log(1, "step 3").did("data", 500, all_reduce(1024), 1).of_generation(3);
    assert_eq!(
        three_wait(Ok(old)),
        [
            "rank 1 is in generation 3, expected 4: it was left behind or is ahead",
            "group `data`: ranks 0, 2, 3 wait in #118 all-reduce f32 × 1024 (sum) for 3.2 s; \
             rank 1 has no flight log"
        ]
    );
}

#[test]
fn a_rank_that_has_not_called_anything_yet() {
    assert_eq!(
        three_wait(Ok(log(1, "reading data"))),
        ["group `data`: ranks 0, 2, 3 wait in #118 all-reduce f32 × 1024 (sum) for 3.2 s; rank 1 \
          is behind: completed none yet, is in no collective (tag: reading data)"]
    );
}

#[test]
fn calls_that_disagree_name_both_from_the_first_on() {
    let other =
        log(1, "step 17").did("data", 117, all_reduce(1024), 33).inside("data", 118, barrier(), 31);
    assert_eq!(
        three_wait(Ok(other)),
        ["group `data`: the calls #118 disagree: ranks 0, 2, 3 called all-reduce f32 × 1024 \
          (sum), rank 1 called barrier; all ranks must make the same calls in the same order"]
    );
}

#[test]
fn a_rank_that_waits_in_another_group_is_followed_there() {
    // Ranks 0 and 1 make up one `tensor` group, 2 and 3 another one of the same name.
    let in_data = |rank, members: &[u32]| {
        let log = log(rank, "step 2").joins("tensor", members).did("tensor", 9, barrier(), 50);
        Ok(log.did("data", 7, barrier(), 41).inside("data", 8, all_reduce(64), 40))
    };
    let stuck = log(1, "step 2 layer 3")
        .joins("tensor", &[0, 1])
        .did("tensor", 9, barrier(), 50)
        .did("data", 7, barrier(), 41)
        .inside("tensor", 10, all_reduce(8), 39);
    let logs = vec![in_data(0, &[0, 1]), Ok(stuck), in_data(2, &[2, 3]), in_data(3, &[2, 3])];
    assert_eq!(
        verdict(logs),
        [
            "group `data`: ranks 0, 2, 3 wait in #8 all-reduce f32 × 64 (sum) for 4.0 s; rank 1 is \
             behind: last completed #7, 4.1 s ago, is in `tensor` #10 all-reduce f32 × 8 (sum) for \
             3.9 s (tag: step 2 layer 3)",
            "group `tensor`: rank 1 waits in #10 all-reduce f32 × 8 (sum) for 3.9 s; rank 0 is \
             behind: last completed #9, 5.0 s ago, is in `data` #8 all-reduce f32 × 64 (sum) for \
             4.0 s (tag: step 2)",
            "group `tensor`: no rank is in a call; ranks 2, 3 have completed #9"
        ]
    );
}

#[test]
fn ranks_at_two_calls_show_who_is_the_last() {
    let first = log(0, "").did("data", 4, barrier(), 9).inside("data", 5, barrier(), 8);
    let second = log(1, "").did("data", 3, barrier(), 12).inside("data", 4, barrier(), 11);
    assert_eq!(
        verdict(vec![Ok(first), Ok(second)]),
        [
            "group `data`: rank 0 waits in #5 barrier for 0.8 s; rank 1 is behind: last completed \
             #3, 1.2 s ago, is in `data` #4 barrier for 1.1 s",
            "group `data`: rank 1 is in #4 barrier for 1.1 s; rank 0 has completed it"
        ]
    );
}

#[test]
fn a_gang_that_computes_and_one_that_moves_data() {
    let computes = |rank| Ok(log(rank, "").did("data", 6, barrier(), 5));
    let ahead = log(2, "").did("data", 7, barrier(), 1);
    assert_eq!(
        verdict(vec![computes(0), computes(1), Ok(ahead)]),
        ["group `data`: no rank is in a call; ranks 0, 1 have completed #6, rank 2 has completed \
          #7"]
    );
    let moves = |rank| Ok(log(rank, "").entry("data", 6, barrier(), FlightState::Moving, 5));
    assert_eq!(
        verdict(vec![moves(0), moves(1)]),
        ["group `data`: all 2 ranks are in #6 barrier for 0.5 s"]
    );
    assert_eq!(verdict(vec![Ok(log(0, "")), Ok(log(1, ""))]), [""; 0]);
}

#[test]
fn a_message_that_was_not_sent_and_one_that_is_on_its_way() {
    let recv = message("recv", 10, FlightDetail::From(0));
    let waits = log(1, "stage 1").inside("pipeline", 5, recv.clone(), 30);
    let computes =
        log(0, "stage 0 forward").did("pipeline", 4, message("send", 10, FlightDetail::To(1)), 35);
    assert_eq!(
        verdict(vec![Ok(computes), Ok(waits)]),
        ["group `pipeline`: rank 1 waits in #5 recv f32 × 10 from rank 0 for 3.0 s; rank 0 is \
          behind: last completed #4, 3.5 s ago, is in no collective (tag: stage 0 forward)"]
    );
    let sent = log(0, "").did("pipeline", 5, message("send", 10, FlightDetail::To(1)), 2);
    let waits = log(1, "").inside("pipeline", 5, recv, 30);
    assert_eq!(
        verdict(vec![Ok(sent), Ok(waits)]),
        ["group `pipeline`: rank 1 is in #5 recv f32 × 10 from rank 0 for 3.0 s; rank 0 has \
          completed it"]
    );
}

#[test]
fn a_message_whose_ends_disagree_between_ranks_numbered_within_their_group() {
    let sends = log(1, "").joins("pipeline", &[1, 3]);
    let sends = sends.inside("pipeline", 0, message("send", 10, FlightDetail::To(1)), 3);
    let takes = log(3, "").joins("pipeline", &[1, 3]);
    let takes = takes.inside("pipeline", 0, message("recv", 11, FlightDetail::From(0)), 3);
    let idle = |rank| Ok(log(rank, ""));
    assert_eq!(
        verdict(vec![idle(0), Ok(sends), idle(2), Ok(takes)]),
        [
            "group `pipeline`: the calls #0 disagree: rank 1 called send f32 × 10 to rank 3, rank \
             3 called recv f32 × 11 from rank 1; all ranks must make the same calls in the same \
             order",
            "group `pipeline`: rank 1 is in #0 send f32 × 10 to rank 3 for 0.3 s",
            "group `pipeline`: rank 3 is in #0 recv f32 × 11 from rank 1 for 0.3 s"
        ]
    );
}

#[test]
fn survivors_of_a_killed_rank() {
    let survivor = |rank, why| {
        let log = log(rank, "step 9 reduce").did("data", 40, barrier(), 30);
        Ok(log.failed("data", 41, all_reduce(16), why))
    };
    let logs = vec![
        survivor(0, "lost r1"),
        Err("killed by signal 9 (SIGKILL); it left no log"),
        survivor(2, "lost r1"),
        survivor(3, "r0 failed"),
    ];
    assert_eq!(
        verdict(logs),
        [
            "rank 1 has no flight log: killed by signal 9 (SIGKILL); it left no log",
            "group `data`: ranks 0, 2, 3 failed in #41 all-reduce f32 × 16 (sum) after 0.5 s; \
             rank 1 has no flight log",
            "ranks 0, 2 ended: lost r1",
            "rank 3 ended: r0 failed"
        ]
    );
}

#[test]
fn logs_that_make_no_sense_are_no_panic() {
    let odd = log(0, "")
        .joins("data", &[7, 9])
        .entry("data", u64::MAX - 1, barrier(), FlightState::Queued, 0)
        .inside("data", 3, message("send", 1, FlightDetail::To(u32::MAX)), 0);
    assert!(!verdict(vec![Ok(odd), Err("gone")]).is_empty());
    assert!(verdict(Vec::new()).is_empty());
}
