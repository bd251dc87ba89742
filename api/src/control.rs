//! A rank's or replica's end of its control socket: standard input is one end of a socket pair whose other end
//! the worker holds. JSON, one document a line, both ways.
//!
//! A thread of its own reads orders, so that an abort reaches a blocked collective at once. End of
//! file means that the worker is gone: a rank without a worker has nobody to report to and nobody
//! to clean it up, so it leaves at once.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::flight::FlightLog;
use crate::ids::Generation;
use crate::session::{MESSAGE_BYTES_MAX, RankLine, RankOrder, RankReport};
use crate::stacks::{StackFrame, TELLING_THREAD};

/// The control socket cannot be used, or broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("control socket: {0}")]
pub struct ControlError(pub String);

/// Exit code of a rank whose worker is gone.
const EXIT_ORPHANED: i32 = 10;

/// Called with the reason when the worker orders an abort.
type AbortHook = Box<dyn Fn(&str) + Send>;
/// Gives the last operations, so many at most; called when the worker asks for the flight log.
type FlightHook = Box<dyn Fn(usize) -> FlightLog + Send>;
/// What the threads of this process are in, and what is missing of it.
type StacksHook = fn() -> (Vec<(u32, Vec<StackFrame>)>, String);

/// Both directions of the control socket; cheap to clone.
#[derive(Clone)]
pub struct Control {
    writer: Arc<Mutex<UnixStream>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// The generation that reports are of.
    generation: AtomicU64,
    stop: AtomicBool,
    pause: AtomicBool,
    interrupted: AtomicBool,
    abort: Mutex<Option<AbortHook>>,
    flight: Mutex<Option<FlightHook>>,
    stacks: Mutex<Option<StacksHook>>,
}

/// A task must not outlive its worker, whatever ends the worker: the kernel kills it then.
///
/// It fires when the *thread* that spawned the task ends, so the worker spawns from one that lives
/// as long as itself.
pub fn die_with_parent() -> Result<(), ControlError> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| ControlError(format!("cannot set the parent-death signal: {e}")))
}

/// Orders that the rank waits for: the assignment, the peers, the next generation.
pub struct Orders {
    receiver: Receiver<RankOrder>,
}

impl Control {
    /// Takes standard input as the control socket and begins to read orders.
    pub fn from_stdin() -> Result<(Self, Orders), ControlError> {
        let owned = std::io::stdin().as_fd().try_clone_to_owned();
        let socket = UnixStream::from(owned.map_err(|e| ControlError(e.to_string()))?);
        // Anything that is not a socket has no peer: the rank was started by hand.
        if socket.peer_addr().is_err() {
            return Err(ControlError(
                "standard input is not a socket: `cluster rank` is started by a worker, not by \
                 hand; use `cluster submit`"
                    .into(),
            ));
        }
        Self::over(socket, || std::process::exit(EXIT_ORPHANED))
    }

    /// Runs over any socket; `orphaned` is called when its peer is gone.
    pub fn over(
        socket: UnixStream,
        orphaned: impl FnOnce() + Send + 'static,
    ) -> Result<(Self, Orders), ControlError> {
        let reader = socket.try_clone().map_err(|e| ControlError(e.to_string()))?;
        let shared = Arc::new(Shared::default());
        let (sender, receiver) = channel();
        let control = Self { writer: Arc::new(Mutex::new(socket)), shared };
        let for_thread = control.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                read_orders(reader, &for_thread, &sender);
                orphaned();
            })
            .map_err(|e| ControlError(e.to_string()))?;
        Ok((control, Orders { receiver }))
    }

    /// Tells the worker something, as a process of the generation that it is in.
    pub fn report(&self, report: &RankReport) -> Result<(), ControlError> {
        let generation = Generation(self.shared.generation.load(Ordering::Relaxed));
        let line = RankLine { generation, report: report.clone() };
        let mut line = serde_json::to_vec(&line).map_err(|e| ControlError(e.to_string()))?;
        line.push(b'\n');
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.write_all(&line).map_err(|e| ControlError(e.to_string()))
    }

    /// What is reported from now on is of this generation. The first one is that of the assignment.
    pub fn enter(&self, generation: Generation) {
        self.shared.generation.store(generation.0, Ordering::Relaxed);
        // These orders were for the group of before.
        self.shared.pause.store(false, Ordering::Relaxed);
        self.shared.interrupted.store(false, Ordering::Relaxed);
    }

    /// Whether the group of now is broken off by order: what is computed for it is of no use.
    pub fn is_interrupted(&self) -> bool {
        self.shared.interrupted.load(Ordering::Relaxed)
    }

    /// Whether the ranks are to leave their group between two steps.
    pub fn pause_requested(&self) -> bool {
        self.shared.pause.load(Ordering::Relaxed)
    }

    /// Whether the job was asked to stop, since the last order to be part of another generation.
    pub fn stop_requested(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// From now on an abort order calls `hook`, from the thread that reads orders.
    pub fn on_abort(&self, hook: impl Fn(&str) + Send + 'static) {
        *self.shared.abort.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    /// From now on a question for the flight log is answered with what `hook` gives, by the thread
    /// that reads orders: also while every other thread is blocked.
    pub fn on_flight(&self, hook: impl Fn(usize) -> FlightLog + Send + 'static) {
        *self.shared.flight.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    /// From now on a question for the stacks is answered with what `hook` gives. It is called on a
    /// thread of its own: to find the names takes longer than an abort may wait.
    pub fn on_stacks(&self, hook: StacksHook) {
        *self.shared.stacks.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
    }

    fn answer_stacks(&self) {
        let hook = *self.shared.stacks.lock().unwrap_or_else(PoisonError::into_inner);
        let control = self.clone();
        let answer = move || {
            let (threads, absent) = match hook {
                Some(hook) => hook(),
                None => (Vec::new(), "it has just been started".to_owned()),
            };
            if let Err(error) = control.report(&RankReport::Stacks { threads, absent }) {
                tracing::warn!(%error, "the stacks were not taken");
            }
        };
        if let Err(error) = std::thread::Builder::new().name(TELLING_THREAD.into()).spawn(answer) {
            tracing::warn!(%error, "no thread to tell the stacks");
        }
    }

    fn answer_flight(&self, request: u64, entries: u32) {
        let hook = self.shared.flight.lock().unwrap_or_else(PoisonError::into_inner);
        let log = hook.as_ref().map(|hook| Box::new(hook(entries as usize)));
        drop(hook);
        if let Err(error) = self.report(&RankReport::Flight { request, log }) {
            tracing::warn!(%error, "the flight log was not taken");
        }
    }
}

impl Orders {
    /// The next order, if there is one already.
    pub fn try_next(&self) -> Option<RankOrder> {
        self.receiver.try_recv().ok()
    }

    /// The next order that something waits for.
    pub fn next(&self, deadline: Duration) -> Result<RankOrder, ControlError> {
        self.receiver.recv_timeout(deadline).map_err(|error| {
            ControlError(match error {
                RecvTimeoutError::Timeout => {
                    format!("no order within {} s", deadline.as_secs())
                }
                RecvTimeoutError::Disconnected => "the worker closed it".into(),
            })
        })
    }
}

fn read_orders(socket: UnixStream, control: &Control, sender: &Sender<RankOrder>) {
    let mut reader = BufReader::new(socket);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bounded = (&mut reader).take(MESSAGE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line);
        match bounded {
            Ok(n) if n > 0 && line.ends_with(b"\n") => {}
            _ => return,
        }
        match serde_json::from_slice::<RankOrder>(&line) {
            Ok(order) => handle(order, control, sender),
            Err(error) => tracing::error!(%error, "an order could not be read"),
        }
    }
}

fn handle(order: RankOrder, control: &Control, sender: &Sender<RankOrder>) {
    let shared = &control.shared;
    match order {
        RankOrder::Stop { reason } => {
            tracing::info!(%reason, "asked to stop");
            shared.stop.store(true, Ordering::Relaxed);
        }
        RankOrder::Abort { reason } => {
            shared.interrupted.store(true, Ordering::Relaxed);
            if let Some(hook) = &*shared.abort.lock().unwrap_or_else(PoisonError::into_inner) {
                hook(&reason);
            }
        }
        RankOrder::Pause { reason } => {
            tracing::info!(%reason, "asked to pause");
            shared.pause.store(true, Ordering::Relaxed);
        }
        RankOrder::Flight { request, entries } => control.answer_flight(request, entries),
        RankOrder::Stacks => control.answer_stacks(),
        RankOrder::Committed { step } => tracing::debug!(%step, "checkpoint committed"),
        RankOrder::Regroup(regroup) => {
            let reason = regroup.reason.clone();
            // Queued first: whoever is woken looks for it. Under the lock: the one that takes it
            // sets the hook of the next group, which must not be the one that is called.
            let hook = shared.abort.lock().unwrap_or_else(PoisonError::into_inner);
            shared.interrupted.store(true, Ordering::Relaxed);
            // An order to leave was for the group of before. Here and not where the next one is
            // entered: what comes after this order stands.
            shared.stop.store(false, Ordering::Relaxed);
            let _ = sender.send(RankOrder::Regroup(regroup));
            if let Some(hook) = &*hook {
                hook(&reason);
            }
        }
        order @ (RankOrder::Assignment { .. } | RankOrder::Peers { .. }) => {
            if let RankOrder::Assignment { assignment, .. } = &order {
                shared.generation.store(assignment.generation().0, Ordering::Relaxed);
            }
            // The receiver is gone only when the rank is leaving anyway.
            let _ = sender.send(order);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Rank, Secret};
    use crate::session::Regroup;
    use crate::units::Span;

    #[test]
    fn an_order_to_regroup_takes_back_an_order_to_leave_that_came_before() {
        let (mut worker, rank) = UnixStream::pair().expect("a pair of sockets");
        let (control, orders) = Control::over(rank, || ()).expect("a control socket");
        let mut order = |order: RankOrder| {
            let mut line = serde_json::to_vec(&order).expect("an order");
            line.push(b'\n');
            worker.write_all(&line).expect("written");
        };
        let leave = || RankOrder::Stop { reason: "too few".into() };
        let regroup = |generation| {
            RankOrder::Regroup(Box::new(Regroup {
                generation: Generation(generation),
                rank: Rank(0),
                world_size: 1,
                restore: None,
                secret: Secret::new(""),
                elapsed: Span::seconds(0),
                reason: "r1 died".into(),
            }))
        };
        // What follows in the queue tells that what came before was taken in.
        let fence = || RankOrder::Peers { generation: Generation(0), addresses: Vec::new() };
        let taken = || orders.next(Duration::from_secs(60)).expect("an order");

        order(leave());
        order(fence());
        taken();
        assert!(control.stop_requested());
        order(regroup(2));
        order(fence());
        taken();
        taken();
        assert!(!control.stop_requested(), "it was for the group of before");
        // Said before the rank enters the generation that it is told of, and for that one.
        order(regroup(3));
        order(leave());
        order(fence());
        taken();
        taken();
        control.enter(Generation(3));
        assert!(control.stop_requested());
    }
}
