//! A rank: what the process that a test starts does.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{Write, stdin, stdout};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use api::{Generation, Rank, Secret};
use collective::{
    AbortHandle, CollectiveError, Communicator, GroupOptions, Listener, ProcessGroup, Queue,
    ReduceOp, Reduction, Transport,
};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::case::Case;
use crate::census::Census;
use crate::message::{Command, Failure, Report, now};
use crate::mismatch::Mismatch;
use crate::random::Random;
use crate::step::{Memory, OPERATIONS, Step};

/// The test that is a rank where [`MARK`] is set.
pub const ENTRY: &str = "rank::rank";
pub const MARK: &str = "COHORT_FAULTS_RANK";

/// Longer than any formation takes that can succeed, shorter than the harness waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Elements of the all-reduce that is checked: several windows of shared memory.
const SUM_LEN: usize = 100_000;
/// Calls under way in a queue.
const QUEUED: usize = 4;

#[test]
#[ignore = "a process of the other tests"]
fn rank() {
    if std::env::var_os(MARK).is_some() {
        // Also where it is stopped when the harness is killed.
        set_pdeathsig(Signal::SIGKILL).unwrap();
        // Ends the framework's line.
        println!();
        Member::new().serve();
    }
}

fn report(report: &Report) {
    let mut output = stdout().lock();
    writeln!(output, "{}", serde_json::to_string(report).unwrap()).unwrap();
}

/// A rank and the group it is in.
struct Member {
    commands: Receiver<Command>,
    /// Of the group that forms or is formed.
    abort: Arc<Mutex<Option<AbortHandle>>>,
    /// Since when it listens.
    listener: Option<(Listener, Duration)>,
    group: Option<ProcessGroup>,
    memory: Memory,
}

impl Member {
    fn new() -> Self {
        let (sender, commands) = mpsc::channel();
        let abort = Arc::new(Mutex::new(None::<AbortHandle>));
        let to_abort = Arc::clone(&abort);
        thread::spawn(move || {
            for line in stdin().lines() {
                match serde_json::from_str(&line.unwrap()).unwrap() {
                    Command::Abort { reason } => {
                        // A group that another's abort has already ended is gone.
                        let handle = to_abort.lock().unwrap_or_else(PoisonError::into_inner);
                        handle.iter().for_each(|handle| handle.abort(&reason));
                    }
                    command => sender.send(command).unwrap(),
                }
            }
            std::process::exit(0);
        });
        Self { commands, abort, listener: None, group: None, memory: Memory::new() }
    }

    fn serve(mut self) {
        report(&Report::Ready);
        while let Ok(command) = self.commands.recv() {
            let answer = self.obey(command);
            report(&answer);
        }
    }

    fn obey(&mut self, command: Command) -> Report {
        match command {
            Command::Listen { address } => {
                let since = now();
                let listener = Listener::bind(address).unwrap();
                let address = listener.address();
                self.set_abort(Some(listener.abort_handle()));
                self.listener = Some((listener, since));
                Report::Listening { address }
            }
            Command::Form { generation, rank, peers, transport } => {
                let (listener, since) = self.listener.take().unwrap();
                let world_size = peers.len() as u32;
                let options = options(generation, rank, world_size, &transport);
                match listener.connect(options, &peers) {
                    Ok(group) => {
                        let transport = group.transport().to_owned();
                        self.group = Some(group);
                        Report::Formed { took: now() - since, transport }
                    }
                    Err(error) => {
                        self.set_abort(None);
                        Report::Unformed { error: error.to_string() }
                    }
                }
            }
            Command::Repeat { seed } => self.fail(|group, memory| {
                let case = Case::draw(seed);
                if case.queued { repeat_queued(group, &case) } else { repeat(group, memory, &case) }
            }),
            Command::Differ { seed } => self.fail(|group, memory| differ(group, memory, seed)),
            Command::Abort { .. } => unreachable!("obeyed where commands are read"),
            Command::Sum => {
                sum(self.group.as_mut().unwrap());
                Report::Summed
            }
            Command::Leave => {
                self.set_abort(None);
                self.group = None;
                Report::Left
            }
            Command::Count => Report::Counted(Census::take()),
        }
    }

    fn set_abort(&self, handle: Option<AbortHandle>) {
        *self.abort.lock().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    /// Makes calls until one fails, which ends the group.
    fn fail(&mut self, calls: impl FnOnce(ProcessGroup, &mut Memory) -> Failure) -> Report {
        let failure = calls(self.group.take().unwrap(), &mut self.memory);
        self.set_abort(None);
        Report::Failed(failure)
    }
}

impl Failure {
    fn new(begun: Duration, error: &CollectiveError) -> Self {
        let peer = error.peer().map(|rank| rank.0);
        Self { begun, at: now(), peer, error: error.to_string() }
    }
}

fn options(generation: u64, rank: u32, world_size: u32, transport: &str) -> GroupOptions {
    GroupOptions {
        job: "faults".parse().unwrap(),
        group: "world".to_owned(),
        generation: Generation(generation),
        rank: Rank(rank),
        world_size,
        // A real job has one per generation. Here only the generation keeps a stale rank out.
        secret: Secret::new("correct horse battery staple"),
        connect_timeout: CONNECT_TIMEOUT,
        reduction: Reduction::Deterministic,
        transport: match transport {
            "shm" => Transport::Shared,
            "tcp" => Transport::Tcp,
            _ => Transport::Auto,
        },
        // Two ranks are as if on one host.
        host: (transport == "hosts").then(|| format!("h{}", rank / 2)),
    }
}

/// Makes random calls of one operation until one fails.
fn repeat(mut group: ProcessGroup, memory: &mut Memory, case: &Case) -> Failure {
    let mut random = Random::new(case.seed);
    let begun = now();
    let mut calls = || -> Result<Infallible, CollectiveError> {
        let mut step = || Step::draw(case.operation, case.world, &mut random);
        step().run_by_all(&mut group, memory)?;
        report(&Report::Inside);
        loop {
            step().run_by_all(&mut group, memory)?;
        }
    };
    let Err(error) = calls();
    Failure::new(begun, &error)
}

/// The same with several calls of any operations under way.
fn repeat_queued(group: ProcessGroup, case: &Case) -> Failure {
    let mut random = Random::new(case.seed);
    let queue = Queue::start(Box::new(group)).unwrap();
    let mut submit = |mut memory: Memory| {
        let step = Step::draw(random.pick(&OPERATIONS), case.world, &mut random);
        queue
            .submit(move |communicator| step.run_by_all(communicator, &mut memory).map(|()| memory))
    };
    let begun = now();
    let mut works: VecDeque<_> = (0..QUEUED).map(|_| submit(Memory::new())).collect();
    let mut calls = || -> Result<Infallible, CollectiveError> {
        let mut next = || {
            let work = works.pop_front().expect("each that ends is followed by another");
            let (memory, _) = work.wait()?;
            works.push_back(submit(memory));
            Ok(())
        };
        next()?;
        report(&Report::Inside);
        loop {
            next()?;
        }
    };
    let Err(error) = calls();
    Failure::new(begun, &error)
}

/// Makes this rank's calls of a mismatch.
fn differ(mut group: ProcessGroup, memory: &mut Memory, seed: u64) -> Failure {
    let mismatch = Mismatch::draw(seed);
    let steps = mismatch.steps_of(group.rank().0);
    let begun = now();
    let mut calls = || {
        steps.iter().try_for_each(|step| step.run(&mut group, memory))?;
        // A call may be over where others object: the next one says so.
        group.barrier()
    };
    let error = calls().expect_err("the calls differ");
    Failure::new(begun, &error)
}

/// An all-reduce of small whole numbers, whose sums are exact.
fn sum(group: &mut ProcessGroup) {
    let mine = (group.rank().0 + 1) as f32;
    let total = (group.world_size() * (group.world_size() + 1) / 2) as f32;
    let number = |index: usize| (index % 97) as f32;
    let mut buffer: Vec<f32> = (0..SUM_LEN).map(|index| mine * number(index)).collect();
    group.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
    let wrong = (0..SUM_LEN).find(|&index| buffer[index] != total * number(index));
    assert_eq!(wrong, None, "a wrong sum");
}
