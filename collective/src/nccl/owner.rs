//! The thread that owns a communicator, its stream and everything enqueued there.
//!
//! NCCL wants the calls of a communicator in the same order on every rank, one at a time. So one
//! thread makes them all, in the order in which a bounded channel brings them. It never blocks
//! inside NCCL or CUDA: communicators are non-blocking, completion is an event that it queries, and
//! at most [`STEPS_MAX`] steps are enqueued, fewer than a GPU's launch queue holds. Whatever
//! it waits for, it looks at the abort flag and at NCCL's asynchronous error each time round; so an
//! abort pushed by another thread ends every wait within a millisecond or two, and the abort of the
//! communicator itself is made here (see `comm.rs`).

#![allow(unsafe_code, reason = "the buffers of what is enqueued are kept alive here")]

use std::collections::{HashMap, VecDeque};
use std::ffi::c_int;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::abort::AbortHandle;
use crate::error::CollectiveError;
use crate::nccl::batch::{Batch, Command, Reply, Step};
use crate::nccl::comm::Comm;
use crate::nccl::device::Device;
use crate::nccl::ffi::{Handle, IN_PROGRESS, SUCCESS, UniqueId};
use crate::nccl::kernel::Kernels;
use crate::nccl::memory::{DeviceBuffer, PinnedMemory};
use crate::nccl::pause::Pause;
use crate::nccl::stream::{Compute, Event, Stream};

/// Steps enqueued and not finished: a launch queue of CUDA holds 1024 kernels, and a launch that
/// finds it full blocks. (A longer batch runs alone.)
const STEPS_MAX: usize = 512;
/// How long leaving a group waits for what still runs and for its peers, before it aborts.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(10);
/// How long the kernels of an aborted communicator may take to end before their memory is given up.
const STALE_WAIT: Duration = Duration::from_secs(5);

/// What an owner thread needs to begin.
pub(super) struct Setup {
    pub group: String,
    pub device: Device,
    pub rank: u32,
    pub world: u32,
    pub max_ctas: Option<u32>,
    pub shrinkable: bool,
    pub connect_timeout: Duration,
    /// This group's handle first; the others belong to the groups it was made from.
    pub aborts: Vec<AbortHandle>,
    pub origin: Origin,
}

/// Where the communicator comes from.
pub(super) enum Origin {
    /// The ranks that hold this id form it.
    Id(UniqueId),
    /// It was split off or shrunk from another.
    Made(Comm),
}

/// What a group can do once it has formed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Formed {
    pub kernels: bool,
}

/// A batch on the stream. It owns the memory that the GPU uses until the event is done.
pub(super) struct Flight {
    pub(super) event: Event,
    pub(super) batch: Batch,
    pub(super) done: Reply<Option<PinnedMemory>>,
}

pub(super) struct Owner {
    pub(super) setup: Setup,
    pub(super) comm: Option<Comm>,
    pub(super) in_flight: VecDeque<Flight>,
    /// Batches that failed while the GPU may still have used their memory.
    pub(super) stale: Vec<(Event, Batch)>,
    pub(super) registered: HashMap<u64, (Handle, DeviceBuffer)>,
    pub(super) registrations: u64,
    events: Vec<Event>,
    pub(super) failed: Option<CollectiveError>,
    pub(super) kernels: Option<Kernels>,
    stream: Stream,
}

/// Runs a group to its end.
pub(super) fn run(mut setup: Setup, commands: &Receiver<Command>, ready: &Reply<Formed>) {
    let device = setup.device.clone();
    // First in, last out: everything of the owner is dropped in the device's context.
    let entered = match device.enter() {
        Ok(entered) => entered,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let origin = std::mem::replace(&mut setup.origin, Origin::Id(UniqueId([0; 128])));
    match Owner::form(setup, origin) {
        Ok(owner) => {
            let formed = Formed { kernels: owner.kernels.is_some() };
            // The asker is gone only if it panicked; then its sender is too, and `serve` ends.
            let _ = ready.send(Ok(formed));
            owner.serve(commands);
        }
        Err(error) => drop(ready.send(Err(error))),
    }
    drop(entered);
}

impl Owner {
    fn form(setup: Setup, origin: Origin) -> Result<Self, CollectiveError> {
        let stream = Stream::new(&setup.device)?;
        let mut owner = Self {
            comm: None,
            in_flight: VecDeque::new(),
            stale: Vec::new(),
            registered: HashMap::new(),
            registrations: 0,
            events: Vec::new(),
            failed: None,
            kernels: None,
            stream,
            setup,
        };
        let comm = match origin {
            Origin::Made(comm) => comm,
            Origin::Id(id) => {
                let setup = &owner.setup;
                let (world, rank) = (setup.world as c_int, setup.rank as c_int);
                Comm::begin(setup.device.libraries(), id, world, rank, setup.max_ctas)?
            }
        };
        // An error from here on drops the communicator, which aborts it.
        owner.settle(&comm, "ncclCommInitRankConfig", IN_PROGRESS, true)?;
        owner.comm = Some(comm);
        owner.kernels = match Kernels::load(&owner.setup.device) {
            Ok(kernels) => Some(kernels),
            Err(error) => {
                let group = &owner.setup.group;
                tracing::warn!(%group, %error, "no sum kernels: fixed-order sums run on the host");
                None
            }
        };
        Ok(owner)
    }

    fn serve(mut self, commands: &Receiver<Command>) {
        let mut pause = Pause::default();
        loop {
            let next = if self.is_idle() {
                commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                pause.receive(commands)
            };
            match next {
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(command) => {
                    pause = Pause::default();
                    self.handle(command);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.look();
        }
        self.close();
    }

    /// Nothing is enqueued, and no communicator waits to be aborted.
    fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && (self.failed.is_none() || self.comm.is_none())
    }

    fn handle(&mut self, command: Command) {
        // An asker that is gone wants no answer.
        match command {
            Command::Run { batch, done } => self.start(batch, done),
            Command::Order { compute, release, done } => {
                let result = self.order(compute, release);
                let _ = done.send(self.fatal(result));
            }
            Command::Split { color, key, done } => {
                let result = self.split(color, key);
                let _ = done.send(self.fatal(result));
            }
            Command::Shrink { excluded, after_failure, done } => {
                let _ = done.send(self.shrink(&excluded, after_failure));
            }
            Command::Revoke { done } => {
                let _ = done.send(self.revoke());
            }
            Command::Register { buffer, done } => {
                let result = self.register(buffer);
                let _ = done.send(self.fatal(result));
            }
            Command::Deregister { number } => self.deregister(number),
            Command::Close => {}
        }
    }

    /// An error of the group itself ends it; one of the arguments or of a missing function not.
    fn fatal<R>(&mut self, result: Result<R, CollectiveError>) -> Result<R, CollectiveError> {
        if let Err(error) = &result
            && !matches!(
                error,
                CollectiveError::Unavailable { .. } | CollectiveError::InvalidDeviceCall { .. }
            )
        {
            self.fail(error.clone());
        }
        result
    }

    /// Enqueues a batch, when there is room for it.
    fn start(&mut self, batch: Batch, done: Reply<Option<PinnedMemory>>) {
        let mut pause = Pause::default();
        let steps = batch.steps.len();
        while !self.in_flight.is_empty() && self.steps_in_flight() + steps > STEPS_MAX {
            pause.sleep();
            self.look();
        }
        let event = self.healthy().map(|_| ()).and_then(|()| self.event());
        let event = match event {
            Ok(event) => event,
            Err(error) => return drop(done.send(Err(error))),
        };
        let enqueued = self.enqueue(&batch).and_then(|()| self.stream.record(&event));
        // Also a batch that failed half-way owns its memory until the stream is idle.
        self.in_flight.push_back(Flight { event, batch, done });
        if let Err(error) = enqueued {
            self.fail(error);
        }
    }

    fn steps_in_flight(&self) -> usize {
        self.in_flight.iter().map(|flight| flight.batch.steps.len()).sum()
    }

    fn enqueue(&self, batch: &Batch) -> Result<(), CollectiveError> {
        let stage = || {
            batch.stage.as_ref().ok_or_else(|| CollectiveError::InvalidDeviceCall {
                call: batch.name.to_owned(),
                message: "copies through host memory, but has none".to_owned(),
            })
        };
        let kernels = || {
            let missing = || CollectiveError::unavailable("sum kernels", "they were not loaded");
            self.kernels.as_ref().ok_or_else(missing)
        };
        for step in &batch.steps {
            // SAFETY: `start` puts the batch, and with it every buffer and the stage, into
            // `in_flight`, whatever comes back from here. It leaves that in two ways only: `look`
            // gives it up once the event recorded after all of its steps is done; `fail` moves it
            // to `stale`, which `retire` drops once the stream is idle and else leaks. Nobody else
            // holds the stage meanwhile: it was moved into the batch.
            unsafe {
                match step {
                    Step::Nccl(calls) => {
                        let comm = self.healthy()?;
                        let code = comm.issue(calls, &self.stream)?;
                        self.settle(comm, batch.name, code, false)?;
                    }
                    Step::Copy { from, to } => self.stream.copy(from, to)?,
                    Step::ToDevice { offset, to } => {
                        self.stream.copy_to_device(stage()?, *offset, to)?;
                    }
                    Step::ToHost { from, offset } => {
                        self.stream.copy_to_host(from, stage()?, *offset)?;
                    }
                    Step::Sum { into, left, right } => {
                        kernels()?.sum(&self.stream, into, left, right)?;
                    }
                    Step::Divide { buffer, by } => kernels()?.divide(&self.stream, buffer, *by)?,
                }
            }
        }
        Ok(())
    }

    /// Looks at the abort flag, the communicator and the oldest batches.
    fn look(&mut self) {
        if let Some(aborted) = self.raised() {
            if self.comm.is_some() {
                self.fail(aborted);
            }
            return;
        }
        let Some(comm) = self.comm.as_ref().filter(|_| self.failed.is_none()) else { return };
        let broken = match comm.state() {
            Ok(SUCCESS | IN_PROGRESS) => None,
            Ok(code) => comm.check(&self.during(), code).err(),
            Err(error) => Some(error),
        };
        if let Some(error) = broken {
            return self.fail(error);
        }
        while let Some(flight) = self.in_flight.front() {
            match flight.event.is_done() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => return self.fail(error),
            }
            if let Some(Flight { event, batch, done }) = self.in_flight.pop_front() {
                self.events.push(event);
                let _ = done.send(Ok(batch.stage));
            }
        }
    }

    /// What is under way, for the error of a group that breaks.
    fn during(&self) -> String {
        let name = self.in_flight.front().map_or("idle", |flight| flight.batch.name);
        format!("`{name}` of NCCL group `{}`", self.setup.group)
    }

    /// Ends the group: everything under way and everything later gets the first error.
    pub(super) fn fail(&mut self, error: CollectiveError) {
        tracing::debug!(group = %self.setup.group, %error, "the NCCL group failed");
        let keep = self.setup.shrinkable && !error.is_aborted();
        let error = self.failed.get_or_insert(error).clone();
        for Flight { event, batch, done } in self.in_flight.drain(..) {
            let _ = done.send(Err(error.clone()));
            self.stale.push((event, batch));
        }
        if !keep {
            self.abort();
        }
    }

    /// Aborts the communicator, if there is one, and gives up the memory of what it ran.
    pub(super) fn abort(&mut self) {
        // Dropping it is the abort; taking it makes this the only one.
        if self.comm.take().is_some() {
            let stale = std::mem::take(&mut self.registered);
            self.retire();
            // Kept until the kernels that might use it are gone, or forgotten with them.
            if self.stale.is_empty() { drop(stale) } else { std::mem::forget(stale) }
        }
    }

    /// Drops what failed once the stream is idle; leaks it if that does not come about.
    pub(super) fn retire(&mut self) {
        let deadline = Instant::now() + STALE_WAIT;
        let mut pause = Pause::default();
        while !self.stale.is_empty() {
            match self.stream.is_idle() {
                Ok(true) => self.stale.clear(),
                Ok(false) if Instant::now() < deadline => pause.sleep(),
                result => {
                    let group = &self.setup.group;
                    tracing::warn!(%group, ?result, "an operation never ends: its memory is lost");
                    std::mem::forget(std::mem::take(&mut self.stale));
                    std::mem::forget(self.kernels.take());
                    return;
                }
            }
        }
    }

    fn order(&mut self, compute: Compute, release: bool) -> Result<(), CollectiveError> {
        self.healthy()?;
        let event = self.event()?;
        if release {
            self.stream.release(compute, &event)?;
        } else {
            self.stream.wait_for(compute, &event)?;
        }
        // A wait keeps what it needs of an event when it is enqueued.
        self.events.push(event);
        Ok(())
    }

    /// Waits until nothing is enqueued, the group has failed or the time is over.
    pub(super) fn drain(&mut self, deadline: Option<Instant>) {
        let mut pause = Pause::default();
        while !self.in_flight.is_empty() && deadline.is_none_or(|end| Instant::now() < end) {
            self.look();
            pause.sleep();
        }
    }

    /// Waits until a call that goes on has ended: for good, or until the connect timeout.
    pub(super) fn settle(
        &self,
        comm: &Comm,
        call: &str,
        code: c_int,
        limited: bool,
    ) -> Result<(), CollectiveError> {
        let (begun, timeout) = (Instant::now(), self.setup.connect_timeout);
        let mut pause = Pause::default();
        let mut state = code;
        while state == IN_PROGRESS {
            if let Some(aborted) = self.raised() {
                return Err(aborted);
            }
            state = comm.state()?;
            if state != IN_PROGRESS {
                break;
            }
            if limited && begun.elapsed() >= timeout {
                return Err(self.late(call, begun.elapsed()));
            }
            pause.sleep();
        }
        comm.check(&format!("{call} of NCCL group `{}`", self.setup.group), state)
    }

    pub(super) fn late(&self, call: &str, waited: Duration) -> CollectiveError {
        let Setup { group, rank, world, .. } = &self.setup;
        let missing = format!(
            "a peer of r{rank} in NCCL group `{group}` of {world} ranks ({call} is still in \
             progress; NCCL does not say which peer)"
        );
        CollectiveError::ConnectTimeout { waited, missing }
    }

    pub(super) fn gone(&self) -> CollectiveError {
        CollectiveError::unavailable(format!("NCCL group `{}`", self.setup.group), "it was left")
    }

    /// The first abort of this group or of one it came from.
    pub(super) fn raised(&self) -> Option<CollectiveError> {
        self.setup.aborts.iter().find_map(AbortHandle::raised)
    }

    pub(super) fn healthy(&self) -> Result<&Comm, CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Some(aborted) = self.raised() {
            return Err(aborted);
        }
        self.comm.as_ref().ok_or_else(|| self.gone())
    }

    fn event(&mut self) -> Result<Event, CollectiveError> {
        self.events.pop().map_or_else(|| Event::new(&self.setup.device), Ok)
    }
}
