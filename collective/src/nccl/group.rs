//! A group of ranks over NCCL: the handle through which one thread works with it.

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::buffer::{Buffer, BufferMut};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CollectiveError;
use crate::nccl::batch::{Batch, Command, Pending, Reply, Step, owner_gone};
use crate::nccl::calls::Calls;
use crate::nccl::comm::Comm;
use crate::nccl::connect::meet;
use crate::nccl::device::Device;
use crate::nccl::element::DeviceElement;
use crate::nccl::memory::{DeviceBuffer, DeviceMemory, PinnedMemory};
use crate::nccl::owner::{CLOSE_WAIT, Origin, Setup, run};
use crate::nccl::stream::Compute;

/// Requests that wait for the owner thread; it takes them at once unless the GPU is far behind.
const COMMANDS_MAX: usize = 32;
/// How long dropping a group waits for an owner thread that was told to abort.
const LEAVE_WAIT: Duration = Duration::from_secs(20);
/// How often it tries again to reach one that has much to do.
const LEAVE_PAUSE: Duration = Duration::from_millis(5);

/// How to form a group.
#[derive(Clone, Debug)]
pub struct NcclOptions {
    /// Which of the job's groups: `world`, `data`, `pipeline` …
    pub group: String,
    /// How long to wait until every peer is there.
    pub connect_timeout: Duration,
    /// Most thread blocks per operation (`maxCTAs`); few are needed where ranks share a GPU.
    pub max_ctas: Option<u32>,
    /// Keep a communicator that NCCL found broken, for [`NcclGroup::shrink`], instead of aborting
    /// it at once. What it runs then ends only with the shrink, an abort or the drop.
    pub shrinkable: bool,
}

/// A process group over NCCL, for memory of one GPU.
///
/// One owner thread makes all calls of the communicator, in the order of the calls here; `&mut`
/// makes that one order. Operations are begun, not finished, when a method returns: see
/// [`Pending`]. The first error ends the group, and every later call returns it again. Dropping it
/// leaves in good order, or aborts after ten seconds or while panicking.
pub struct NcclGroup {
    pub(super) options: NcclOptions,
    pub(super) device: Device,
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) generation: Generation,
    /// Whether sums in a fixed order run on the GPU.
    pub(super) kernels: bool,
    /// Memory for partials and small data, grown as needed.
    scratch: Option<DeviceMemory>,
    /// This group's first, then those of the groups it came from.
    aborts: Vec<AbortHandle>,
    commands: SyncSender<Command>,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

/// Memory registered with a group; dropping it ends that.
#[must_use = "dropping it ends the registration"]
pub struct Registration {
    number: u64,
    commands: SyncSender<Command>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // The owner is gone only with the communicator, which ends its registrations.
        let _ = self.commands.send(Command::Deregister { number: self.number });
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({})", self.number)
    }
}

impl NcclGroup {
    /// Forms a group of the ranks of `control`, an existing group over the CPU, each with its GPU.
    ///
    /// Takes what opening the GPU has come to, not a GPU, so that a rank that has none tells the
    /// others. An abort of `control` aborts this group too.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`] if a rank cannot take part, the same on all ranks;
    /// [`CollectiveError::ConnectTimeout`] if NCCL does not connect them in time.
    pub fn connect(
        device: Result<Device, CollectiveError>,
        options: NcclOptions,
        control: &mut dyn Communicator,
    ) -> Result<Self, CollectiveError> {
        let id = meet(&device, control)?;
        let shape = (control.rank().0, control.world_size(), control.generation());
        let aborts = vec![AbortHandle::new()?, control.abort_handle()];
        Self::start(device?, options, shape, aborts, Origin::Id(id))
    }

    fn start(
        device: Device,
        options: NcclOptions,
        (rank, world, generation): (u32, u32, Generation),
        aborts: Vec<AbortHandle>,
        origin: Origin,
    ) -> Result<Self, CollectiveError> {
        let setup = Setup {
            group: options.group.clone(),
            device: device.clone(),
            rank,
            world,
            max_ctas: options.max_ctas,
            shrinkable: options.shrinkable,
            connect_timeout: options.connect_timeout,
            aborts: aborts.clone(),
            origin,
        };
        let (commands, received) = sync_channel(COMMANDS_MAX);
        let (ready, formed) = sync_channel(1);
        let (alive, ended) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("nccl-{}", options.group))
            .spawn(move || {
                run(setup, &received, &ready);
                // Dropped when the thread ends, also by a panic: that is the message.
                drop(alive);
            })
            .map_err(|error| CollectiveError::socket("start a thread for NCCL", error))?;
        let formed = formed.recv().unwrap_or_else(|_| Err(owner_gone(&options.group)))?;
        Ok(Self {
            options,
            device,
            rank,
            world,
            generation,
            kernels: formed.kernels,
            scratch: None,
            aborts,
            commands,
            ended,
            thread: Some(thread),
        })
    }

    /// This process.
    pub fn rank(&self) -> Rank {
        Rank(self.rank)
    }

    /// Number of processes.
    pub fn world_size(&self) -> u32 {
        self.world
    }

    /// The gang's incarnation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Breaks off whatever blocks, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.aborts[0].clone()
    }

    /// No operation yet: collect some, then [`Self::run`] them as one.
    pub fn calls(&self) -> Calls {
        Calls::new(self.rank, self.world)
    }

    /// Begins operations as one.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`] if the owner thread has ended; what breaks the group is
    /// told by [`Pending::wait`].
    pub fn run(&mut self, calls: Calls) -> Result<Pending, CollectiveError> {
        self.submit("calls", vec![Step::Nccl(calls.into_calls())], None)
    }

    /// Begins [`Calls::all_reduce`].
    ///
    /// # Errors
    /// As for [`Calls`] and [`Self::run`]; this holds for every method below.
    pub fn all_reduce(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Result<Pending, CollectiveError> {
        self.begin("all_reduce", |calls| calls.all_reduce(input, output, op))
    }

    /// Begins [`Calls::reduce_scatter`].
    pub fn reduce_scatter(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Result<Pending, CollectiveError> {
        self.begin("reduce_scatter", |calls| calls.reduce_scatter(input, output, op))
    }

    /// Begins [`Calls::all_gather`].
    pub fn all_gather(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
    ) -> Result<Pending, CollectiveError> {
        self.begin("all_gather", |calls| calls.all_gather(input, output))
    }

    /// Begins [`Calls::broadcast`].
    pub fn broadcast(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        root: Rank,
    ) -> Result<Pending, CollectiveError> {
        self.begin("broadcast", |calls| calls.broadcast(input, output, root))
    }

    /// Begins [`Calls::gather`].
    pub fn gather(
        &mut self,
        input: &DeviceBuffer,
        output: Option<&DeviceBuffer>,
        root: Rank,
    ) -> Result<Pending, CollectiveError> {
        self.begin("gather", |calls| calls.gather(input, output, root))
    }

    /// Begins [`Calls::scatter`].
    pub fn scatter(
        &mut self,
        input: Option<&DeviceBuffer>,
        output: &DeviceBuffer,
        root: Rank,
    ) -> Result<Pending, CollectiveError> {
        self.begin("scatter", |calls| calls.scatter(input, output, root))
    }

    /// Begins [`Calls::all_to_all`].
    pub fn all_to_all(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
    ) -> Result<Pending, CollectiveError> {
        self.begin("all_to_all", |calls| calls.all_to_all(input, output))
    }

    /// Begins [`Calls::all_to_all_v`].
    pub fn all_to_all_v(
        &mut self,
        input: &DeviceBuffer,
        send_lens: &[usize],
        output: &DeviceBuffer,
        recv_lens: &[usize],
    ) -> Result<Pending, CollectiveError> {
        self.begin("all_to_all_v", |calls| calls.all_to_all_v(input, send_lens, output, recv_lens))
    }

    /// Begins [`Calls::send`].
    pub fn send(&mut self, buffer: &DeviceBuffer, to: Rank) -> Result<Pending, CollectiveError> {
        self.begin("send", |calls| calls.send(buffer, to))
    }

    /// Begins [`Calls::recv`].
    pub fn recv(&mut self, buffer: &DeviceBuffer, from: Rank) -> Result<Pending, CollectiveError> {
        self.begin("recv", |calls| calls.recv(buffer, from))
    }

    /// Begins a barrier: an all-reduce of one element.
    pub fn barrier(&mut self) -> Result<Pending, CollectiveError> {
        let flag = self.scratch(DeviceElement::I32, 1)?;
        self.begin("barrier", |calls| calls.all_reduce(&flag, &flag, ReduceOp::Max))
    }

    /// Copies elements to the GPU, after what was begun before, and waits for it.
    pub fn write(&mut self, to: &DeviceBuffer, from: Buffer<'_>) -> Result<(), CollectiveError> {
        self.write_bytes(to, from.as_bytes())
    }

    /// [`Self::write`] for element types that the host has not.
    pub fn write_bytes(&mut self, to: &DeviceBuffer, from: &[u8]) -> Result<(), CollectiveError> {
        check_bytes("write", to, from.len())?;
        let mut stage = PinnedMemory::new(&self.device, from.len())?;
        stage.as_mut_slice().copy_from_slice(from);
        let steps = vec![Step::ToDevice { offset: 0, to: to.clone() }];
        self.submit("write", steps, Some(stage))?.wait()
    }

    /// Copies elements from the GPU, after what was begun before.
    pub fn read(
        &mut self,
        from: &DeviceBuffer,
        mut to: BufferMut<'_>,
    ) -> Result<(), CollectiveError> {
        check_bytes("read", from, to.as_bytes_mut().len())?;
        to.as_bytes_mut().copy_from_slice(&self.read_bytes(from)?);
        Ok(())
    }

    /// [`Self::read`] for element types that the host has not.
    pub fn read_bytes(&mut self, from: &DeviceBuffer) -> Result<Vec<u8>, CollectiveError> {
        let stage = PinnedMemory::new(&self.device, from.bytes())?;
        let steps = vec![Step::ToHost { from: from.clone(), offset: 0 }];
        let stage = self.submit("read", steps, Some(stage))?.wait_stage()?;
        Ok(stage.map_or_else(Vec::new, |stage| stage.as_slice().to_vec()))
    }

    /// What is begun from now on runs after the compute work enqueued so far.
    pub fn wait_for(&mut self, compute: Compute) -> Result<(), CollectiveError> {
        self.ask(|done| Command::Order { compute, release: false, done })
    }

    /// Compute work enqueued from now on runs after what was begun so far.
    ///
    /// That work runs also if the group fails, on whatever is then in memory: look at the
    /// [`Pending`]s before using its results.
    pub fn release(&mut self, compute: Compute) -> Result<(), CollectiveError> {
        self.ask(|done| Command::Order { compute, release: true, done })
    }

    /// Registers memory, so that transfers need no copy where the hardware can do without.
    pub fn register(&mut self, buffer: &DeviceBuffer) -> Result<Registration, CollectiveError> {
        let number = self.ask(|done| Command::Register { buffer: buffer.clone(), done })?;
        Ok(Registration { number, commands: self.commands.clone() })
    }

    /// Makes a group of the ranks with the same color, ordered by key; none for no color. Every
    /// rank of this group calls it; an abort of this group aborts that one too.
    pub fn split(
        &mut self,
        name: &str,
        color: Option<u32>,
        key: u32,
    ) -> Result<Option<Self>, CollectiveError> {
        for (what, number) in [("color", color.unwrap_or(0)), ("key", key)] {
            if i32::try_from(number).is_err() {
                return invalid("split", format!("{what} {number} is above {}", i32::MAX));
            }
        }
        // Who comes along, so that the new group knows its size and its place.
        let members = self.exchange_split(color, key)?;
        let comm = self.ask(|done| Command::Split { color, key, done })?;
        let Some(comm) = comm else { return Ok(None) };
        let rank = members.iter().position(|rank| *rank == self.rank).unwrap_or(0) as u32;
        self.child(name, comm, (rank, members.len() as u32)).map(Some)
    }

    /// Makes the group without these ranks, which need not be alive and do not call it. After a
    /// failure the group must be [`NcclOptions::shrinkable`]; what it ran is stopped first and ends
    /// with an error, and this group is finished.
    pub fn shrink(
        &mut self,
        name: &str,
        excluded: &[Rank],
        after_failure: bool,
    ) -> Result<Self, CollectiveError> {
        let mut gone: Vec<u32> = excluded.iter().map(|rank| rank.0).collect();
        gone.sort_unstable();
        gone.dedup();
        if gone.is_empty() || gone.contains(&self.rank) || gone.iter().any(|r| *r >= self.world) {
            return invalid("shrink", format!("{gone:?} of {} without this rank", self.world));
        }
        let (before, left) =
            (gone.partition_point(|rank| *rank < self.rank), self.world - gone.len() as u32);
        let request = |done| Command::Shrink { excluded: gone, after_failure, done };
        let Some(comm) = self.ask(request)? else {
            return Err(CollectiveError::unavailable("the shrunk group", "NCCL made none"));
        };
        self.child(name, comm, (self.rank - before as u32, left))
    }

    /// Stops what this rank runs and finishes the group, except for [`Self::shrink`] after a
    /// failure. Needs NCCL 2.29.
    pub fn revoke(&mut self) -> Result<(), CollectiveError> {
        self.ask(|done| Command::Revoke { done })
    }

    fn child(
        &self,
        name: &str,
        comm: Comm,
        (rank, world): (u32, u32),
    ) -> Result<Self, CollectiveError> {
        let mut aborts = vec![AbortHandle::new()?];
        aborts.extend(self.aborts.iter().cloned());
        let options = NcclOptions { group: name.to_owned(), ..self.options.clone() };
        let shape = (rank, world, self.generation);
        Self::start(self.device.clone(), options, shape, aborts, Origin::Made(comm))
    }

    /// The ranks with this rank's color, in the order of the new group.
    fn exchange_split(
        &mut self,
        color: Option<u32>,
        key: u32,
    ) -> Result<Vec<u32>, CollectiveError> {
        let word = |color: Option<u32>| color.map_or(-1, i64::from);
        let world = self.world as usize;
        let all = self.scratch(DeviceElement::I64, 2 * world)?;
        let own = all.slice(2 * self.rank as usize..2 * self.rank as usize + 2)?;
        self.write(&own, (&[word(color), i64::from(key)]).into())?;
        self.all_gather(&own, &all)?.wait()?;
        let mut words = vec![0i64; 2 * world];
        self.read(&all, (&mut words).into())?;
        let mut members: Vec<(i64, u32)> = words
            .chunks_exact(2)
            .zip(0..)
            .filter(|(words, _)| words[0] == word(color))
            .map(|(words, rank)| (words[1], rank))
            .collect();
        members.sort_unstable();
        Ok(members.into_iter().map(|(_, rank)| rank).collect())
    }

    /// Elements of the group's scratch memory, whose contents nobody keeps across calls.
    ///
    /// Steps on one stream follow each other, so what was begun before does not mind; an outgrown
    /// one lives as long as a batch uses it.
    pub(super) fn scratch(
        &mut self,
        element: DeviceElement,
        len: usize,
    ) -> Result<DeviceBuffer, CollectiveError> {
        let bytes = len.checked_mul(element.bytes()).ok_or_else(|| {
            let message = format!("{len} {element} are more than memory can hold");
            CollectiveError::InvalidDeviceCall { call: "scratch".into(), message }
        })?;
        match &self.scratch {
            Some(memory) if memory.bytes() >= bytes => memory.buffer(element, len),
            _ => {
                let memory = DeviceMemory::new(&self.device, bytes.next_power_of_two())?;
                self.scratch.insert(memory).buffer(element, len)
            }
        }
    }

    fn begin(
        &mut self,
        name: &'static str,
        add: impl FnOnce(&mut Calls) -> Result<(), CollectiveError>,
    ) -> Result<Pending, CollectiveError> {
        let mut calls = self.calls();
        add(&mut calls)?;
        self.submit(name, vec![Step::Nccl(calls.into_calls())], None)
    }

    pub(super) fn submit(
        &mut self,
        name: &'static str,
        mut steps: Vec<Step>,
        stage: Option<PinnedMemory>,
    ) -> Result<Pending, CollectiveError> {
        // Every rank leaves out the same.
        steps.retain(|step| !step.is_empty());
        let (done, pending) = Pending::new(&self.options.group);
        self.tell(Command::Run { batch: Batch { name, steps, stage }, done })?;
        Ok(pending)
    }

    fn ask<R>(&mut self, command: impl FnOnce(Reply<R>) -> Command) -> Result<R, CollectiveError> {
        let (done, answer) = sync_channel(1);
        self.tell(command(done))?;
        answer.recv().unwrap_or_else(|_| Err(owner_gone(&self.options.group)))
    }

    fn tell(&self, command: Command) -> Result<(), CollectiveError> {
        self.commands.send(command).map_err(|_| owner_gone(&self.options.group))
    }
}

fn invalid<R>(call: &str, message: String) -> Result<R, CollectiveError> {
    Err(CollectiveError::InvalidDeviceCall { call: call.to_owned(), message })
}

fn check_bytes(call: &str, buffer: &DeviceBuffer, bytes: usize) -> Result<(), CollectiveError> {
    if bytes != buffer.bytes() {
        return invalid(call, format!("{bytes} bytes of host memory for {buffer:?}"));
    }
    Ok(())
}

impl fmt::Debug for NcclGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, rank, world, device, .. } = self;
        write!(f, "NcclGroup({}, r{rank} of {world}, {device:?})", options.group)
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.aborts[0].abort("the thread that used the group panicked");
        }
        let ended = self.leave(Instant::now() + 2 * CLOSE_WAIT) || {
            // It waits inside an operation: an abort ends every wait.
            self.aborts[0].abort("the group was left while it worked");
            self.leave(Instant::now() + LEAVE_WAIT)
        };
        let group = &self.options.group;
        if !ended {
            tracing::error!(%group, "NCCL does not let go of a group: its thread is left behind");
        } else if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(%group, "the owner thread panicked");
        }
    }
}

impl NcclGroup {
    /// Tells the owner thread to leave; whether it has ended by then.
    fn leave(&self, deadline: Instant) -> bool {
        // An error that is not a full channel: the thread has ended already.
        while let Err(TrySendError::Full(_)) = self.commands.try_send(Command::Close) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LEAVE_PAUSE);
        }
        // Nothing is ever sent; the other end is dropped when the thread ends.
        let left = deadline.saturating_duration_since(Instant::now());
        self.ended.recv_timeout(left) != Err(RecvTimeoutError::Timeout)
    }
}
