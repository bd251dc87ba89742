//! Gangs of threads over real sockets that train a tiny model on the processor.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use algorithms::LocalChannels;
use api::control::Control;
use api::session::{RankLine, RankOrder, RankReport, StopCause};
use api::units::{ByteSize, Span};
use api::{Generation, JobSpec, Rank, Secret, Step};
use checkpoint::{ManifestInfo, Store};
use collective::{FlightRecorder, GroupOptions, Listener, ProcessGroup};

use super::*;
use crate::checkpoints::Checkpoints;
use crate::device;
use crate::optimizer::{Optimizer, OptimizerState};
use crate::parameters::Table;
use crate::place::Place;
use crate::train::{Bound, End, Trainer};

/// Where the gangs of these tests begin, and where they end.
const JOINED: u64 = 2;
const LAST: u64 = 5;

/// Everything in it is due at step 3, after the newcomers' first.
const JOB: &str = "name = \"tiny\"\nalgorithm = \"transformer\"\nseed = 5\n\
    [hyperparameters]\nlayers = 2\nwidth = 8\nheads = 1\nsequence_length = 8\n\
    validation_fraction = 0.25\n\
    [batch]\nglobal = 12\nlanes = 6\n[checkpoint]\nevery_steps = 3\n[evaluate]\nevery_steps = 3\n\
    [recovery]\njoin_behind_above = \"0B\"\n[stop]\nmax_steps = 5\n";

/// A folder with the job's data.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let text = "the quick brown fox jumps over the lazy dog\n".repeat(40);
    std::fs::write(folder.path().join("text.txt"), text).expect("writable");
    folder
}

fn held(folder: &Path) -> Held {
    let data = folder.join("text.txt");
    let text = format!("{JOB}[channels]\ntrain = {{ uri = \"file://{}\" }}\n", data.display());
    let mut spec = JobSpec::parse(&text, "test", folder, &[]).expect("a job");
    let algorithm = algorithms::algorithm(&spec.algorithm).expect("known");
    spec.resolve(&algorithm.schema()).expect("legal");
    let channels = LocalChannels::from([("train".to_owned(), data)]);
    let problem = algorithm.open(&spec, &channels).expect("opens");
    let table = Table::of(&problem.model);
    let optimizer = Optimizer::from_hyperparameters(&spec.hyperparameters, LAST);
    let device = device::open(spec.resources.device, 0).expect("the processor");
    let (state, progress) = (None, Progress::default());
    Held { spec, problem, table, optimizer, device, last_step: LAST, state, progress }
}

fn copy(state: &TrainState) -> TrainState {
    let TrainState { step, values, optimizer: OptimizerState { m, v } } = state;
    let optimizer = OptimizerState { m: m.clone(), v: v.clone() };
    TrainState { step: *step, values: values.clone(), optimizer }
}

fn bits(state: &TrainState) -> (Step, Vec<u32>) {
    let buffers = [&state.values, &state.optimizer.m, &state.optimizer.v];
    (state.step, buffers.into_iter().flatten().map(|value| value.to_bits()).collect())
}

/// A state and what goes with it.
type Saved = (TrainState, Progress);

/// What a gang begins from.
struct Gang<'a> {
    folder: &'a Path,
    world: u32,
    newcomers: Vec<u32>,
    step: u64,
    last: u64,
}

/// What a rank held when it left, why it left, and what it said.
struct Left {
    held: Held,
    ended: Result<End, String>,
    said: Vec<RankReport>,
}

impl Gang<'_> {
    fn joining(&self) -> Option<Joining> {
        let ranks = |is_new: bool| {
            let all = (0..self.world).filter(|rank| self.newcomers.contains(rank) == is_new);
            all.map(Rank).collect::<Vec<Rank>>()
        };
        let (step, holders, newcomers) = (Step(self.step), ranks(false), ranks(true));
        (!newcomers.is_empty()).then_some(Joining { step, holders, newcomers })
    }

    /// One rank to its end; `order` has come before it begins.
    fn rank(
        &self,
        group: ProcessGroup,
        rank: u32,
        from: &Saved,
        order: Option<&RankOrder>,
    ) -> Left {
        let mut held = held(self.folder);
        held.last_step = self.last;
        held.progress = from.1.clone();
        if !self.newcomers.contains(&rank) {
            held.state = Some(copy(&from.0));
        }
        let place = Place {
            generation: Generation(2),
            rank: Rank(rank),
            world_size: self.world,
            restore: None,
            secret: Secret::new("of the test"),
            elapsed: Span::millis(0),
        };
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (control, _orders) = Control::over(ours, || {}).expect("a thread");
        if let Some(order) = order {
            let mut line = serde_json::to_vec(order).expect("JSON");
            line.push(b'\n');
            std::io::Write::write_all(&mut theirs, &line).expect("it listens");
            while !control.pause_requested() && !control.stop_requested() {
                thread::yield_now();
            }
        }
        let uri = format!("file://{}", self.folder.join("store").display());
        let store = Store::open(&Default::default(), &uri).expect("a folder");
        let info = ManifestInfo {
            fingerprint: "of the test".into(),
            data_digest: String::new(),
            spec_digest: String::new(),
            lanes: held.spec.batch.lanes.get(),
            metrics: Default::default(),
            samples: None,
        };
        let checkpoints = Checkpoints::start(&held.spec, &place, store, info, None, &control);
        let checkpoints = checkpoints.expect("a saver");
        let bound = Bound::new(&held, &place, Box::new(group), checkpoints, self.joining());
        let recorder = FlightRecorder::new(place.generation, place.rank, place.world_size);
        let mut trainer = Trainer::new(bound.expect("a thread"), control, &recorder);
        let ended = trainer.run(&mut held).map_err(|error| error.to_string());
        drop(trainer);
        theirs.set_nonblocking(true).expect("a socket");
        let mut text = Vec::new();
        let read = theirs.read_to_end(&mut text).map_err(|error| error.kind());
        assert!(matches!(read, Ok(_) | Err(ErrorKind::WouldBlock)), "{read:?}");
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let said = lines.map(|line| serde_json::from_slice::<RankLine>(line).expect("a report"));
        Left { held, ended, said: said.map(|line| line.report).collect() }
    }

    /// Every rank in a thread of its own, which `body` gives its group.
    fn run<R: Send>(&self, body: impl Fn(u32, ProcessGroup) -> R + Sync) -> Vec<R> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let listeners: Vec<Listener> =
            (0..self.world).map(|_| Listener::bind(local).expect("a port")).collect();
        let peers: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
        let (peers, body) = (&peers, &body);
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.world)
                .zip(listeners)
                .map(|(rank, listener)| {
                    let options = GroupOptions {
                        job: "tiny".parse().expect("a name"),
                        group: "data".into(),
                        generation: Generation(2),
                        rank: Rank(rank),
                        world_size: self.world,
                        secret: Secret::new("of the test"),
                        connect_timeout: Duration::from_secs(20),
                        reduction: Default::default(),
                        transport: Default::default(),
                        host: None,
                    };
                    scope.spawn(move || body(rank, listener.connect(options, peers).expect("met")))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        })
    }
}

/// One rank alone from step `from` to step `to`.
fn alone(from: Option<Saved>, to: u64) -> Saved {
    let folder = folder();
    let from = from.unwrap_or_else(|| {
        let held = held(folder.path());
        let mut state = held.blank_state();
        state.values = held.table.initial(held.spec.seed);
        (state, Progress::default())
    });
    let (folder, step) = (folder.path(), from.0.step.0);
    let gang = Gang { folder, world: 1, newcomers: Vec::new(), step, last: to };
    let mut left = gang.run(|rank, group| gang.rank(group, rank, &from, None));
    let Left { held, ended, .. } = left.remove(0);
    assert_eq!(ended, Ok(End::Finished));
    (held.state.expect("its own"), held.progress)
}

fn copied((state, progress): &Saved) -> Saved {
    (copy(state), progress.clone())
}

#[test]
fn who_joins_behind_a_step_changes_no_bit() {
    let begun = alone(None, JOINED);
    let (expected, progress) = alone(Some(copied(&begun)), LAST);
    for (world, newcomers) in
        [(2, &[1][..]), (2, &[0]), (3, &[1]), (3, &[0, 2]), (4, &[0, 1]), (5, &[1, 2, 4])]
    {
        let folder = folder();
        let (folder, newcomers) = (folder.path(), newcomers.to_vec());
        let gang = Gang { folder, world, newcomers, step: JOINED, last: LAST };
        let left = gang.run(|rank, group| gang.rank(group, rank, &begun, None));
        for (rank, Left { held, ended, said }) in (0..).zip(left) {
            let what = format!("rank {rank} of {world}, {:?} joined", gang.newcomers);
            assert_eq!(ended, Ok(End::Finished), "{what}");
            let state = held.state.expect("a state");
            assert!(bits(&state) == bits(&expected), "other bits: {what}");
            assert_eq!(held.progress, progress, "{what}");
            let step = Step(JOINED);
            let has_told = said.contains(&RankReport::Running { step, holds_state: true });
            assert_eq!(has_told, gang.newcomers.contains(&rank), "{what}: {said:?}");
        }
    }
}

#[test]
fn the_beginning_is_a_state_like_any_other() {
    let (expected, _) = alone(None, 2);
    let begun = alone(None, 0);
    let folder = folder();
    let folder = folder.path();
    let gang = Gang { folder, world: 2, newcomers: vec![0], step: 0, last: 2 };
    for left in gang.run(|rank, group| gang.rank(group, rank, &begun, None)) {
        assert_eq!(left.ended, Ok(End::Finished));
        assert!(bits(&left.held.state.expect("a state")) == bits(&expected));
    }
}

#[test]
fn an_order_at_the_first_boundary_finds_all_with_the_state() {
    let begun = alone(None, JOINED);
    let reason = || "the test's".to_owned();
    for (order, end) in [
        (RankOrder::Pause { reason: reason() }, End::Paused),
        (RankOrder::Stop { reason: reason() }, End::Stopped),
    ] {
        let folder = folder();
        let folder = folder.path();
        let gang = Gang { folder, world: 3, newcomers: vec![0, 1], step: JOINED, last: LAST };
        let left = gang.run(|rank, group| gang.rank(group, rank, &begun, Some(&order)));
        for (rank, Left { held, ended, said }) in (0..).zip(left) {
            assert_eq!(ended, Ok(end), "rank {rank}");
            assert!(bits(&held.state.expect("a state")) == bits(&begun.0), "rank {rank}");
            let (step, why) = (Step(JOINED), StopCause::Order);
            let stops = said.contains(&RankReport::Stopped { step, why });
            assert_eq!(stops, end == End::Stopped && rank == 0, "{said:?}");
        }
    }
}

/// The broadcasts of a state that two hold.
const BROADCASTS: usize = 6;

/// Takes part in the first `sent` broadcasts of a state of `len` elements a buffer, and leaves.
fn leaves_after(mut group: ProcessGroup, sent: usize, own: TrainState) {
    let TrainState { mut values, optimizer: OptimizerState { mut m, mut v }, .. } = own;
    let holders = [Rank(0), Rank(1)];
    let mut left = sent;
    for buffer in [&mut values, &mut m, &mut v] {
        for (holder, range) in parts(buffer.len(), &holders) {
            if left == 0 {
                return;
            }
            left -= 1;
            group.broadcast((&mut buffer[range]).into(), holder).expect("sent or received");
        }
    }
}

#[test]
fn a_transfer_that_breaks_off_costs_nobody_what_it_held() {
    // From the beginning, where no boundary comes first.
    let begun = alone(None, 0);
    for leaver in [1, 2] {
        for sent in [0, 1, BROADCASTS - 1, BROADCASTS] {
            let folder = folder();
            let folder = folder.path();
            let gang = Gang { folder, world: 3, newcomers: vec![2], step: 0, last: LAST };
            let left = gang.run(|rank, group| {
                if rank == leaver {
                    leaves_after(group, sent, copy(&begun.0));
                    return None;
                }
                Some(gang.rank(group, rank, &begun, None))
            });
            for (rank, left) in (0..).zip(left) {
                let Some(Left { held, ended, said }) = left else { continue };
                let what = format!("rank {rank}, {leaver} left after {sent}");
                assert!(ended.is_err(), "{what}");
                assert!(held.progress == begun.1, "{what}");
                match held.state {
                    Some(state) => assert!(bits(&state) == bits(&begun.0), "{what}"),
                    None => assert_eq!(rank, 2, "a holder lost its state: {what}"),
                }
                let has_told =
                    said.contains(&RankReport::Running { step: Step(0), holds_state: true });
                assert!(!has_told || sent == BROADCASTS, "half a state was kept: {what}");
            }
        }
    }
}

#[test]
fn a_state_joins_behind_a_step_where_that_is_worth_it_and_nothing_comes_first() {
    let folder = folder();
    let mut held = held(folder.path());
    let origin = |offers: &[Offer]| crate::recovery::origin(offers, None);
    let decided = |held: &Held, offers: &[Option<u64>], progress: &Progress| {
        let offers: Vec<Offer> = offers.iter().map(|offer| offer.map(Step)).collect();
        Joining::of(&origin(&offers), &offers, held, progress).is_some()
    };
    let progress = Progress::default();
    // Who holds what, in a job that checkpoints and validates every three steps and ends after 5.
    for (offers, expected) in [
        (&[Some(2), None][..], true),
        (&[None, Some(2), Some(2)], true),
        (&[Some(2), Some(2)], false),
        (&[None, None], false),
        // It has fallen behind by a step; its own state is worth keeping until it has the newer one.
        (&[Some(2), Some(1), None], false),
        // A checkpoint and validation are due.
        (&[Some(3), None], false),
        // The last step is made.
        (&[Some(5), None], false),
    ] {
        assert_eq!(decided(&held, offers, &progress), expected, "{offers:?}");
    }
    held.spec.checkpoint.every_steps = 0;
    assert!(!decided(&held, &[Some(3), None], &progress), "validation is due");
    let evaluated = Progress { evaluated: Some(Step(3)), ..Progress::default() };
    assert!(decided(&held, &[Some(3), None], &evaluated), "it has been");
    held.spec.evaluate.every_steps = 0;
    assert!(decided(&held, &[Some(3), None], &progress));
    for (above, expected) in [(held.state_bytes(), false), (held.state_bytes() - 1, true)] {
        held.spec.recovery.join_behind_above = ByteSize(above);
        assert_eq!(decided(&held, &[Some(2), None], &progress), expected, "{above}");
    }
    held.spec.recovery.join_behind_above = api::job::Recovery::default().join_behind_above;
    assert!(!decided(&held, &[Some(2), None], &progress), "a tiny state is sent at once");
}
