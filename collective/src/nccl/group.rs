//! A group of ranks over NCCL: the handle through which one thread works with it.

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::buffer::ElementType;
use crate::communicator::Communicator;
use crate::error::CollectiveError;
use crate::nccl::batch::{Batch, Command, Pending, Reply, Step, owner_gone};
use crate::nccl::calls::Calls;
use crate::nccl::connect::meet;
use crate::nccl::device::Device;
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
    pub(super) aborts: Vec<AbortHandle>,
    pub(super) commands: SyncSender<Command>,
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
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

    pub(super) fn start(
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

    /// What is begun from now on runs after the compute work enqueued so far.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`] if the driver is too old for it, and what broke the group;
    /// this holds for the next method too.
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

    /// Elements of the group's scratch memory, whose contents nobody keeps across calls.
    ///
    /// Steps on one stream follow each other, so what was begun before does not mind; an outgrown
    /// one lives as long as a batch uses it.
    pub(super) fn scratch(
        &mut self,
        element: ElementType,
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

    pub(super) fn ask<R>(
        &mut self,
        command: impl FnOnce(Reply<R>) -> Command,
    ) -> Result<R, CollectiveError> {
        let (done, answer) = sync_channel(1);
        self.tell(command(done))?;
        answer.recv().unwrap_or_else(|_| Err(owner_gone(&self.options.group)))
    }

    pub(super) fn tell(&self, command: Command) -> Result<(), CollectiveError> {
        self.commands.send(command).map_err(|_| owner_gone(&self.options.group))
    }
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
