//! The crate's [`Communicator`] over NCCL: host buffers staged through the GPU.
//!
//! For code that works on host memory and must run over NCCL unchanged: tests, small models,
//! control data. Reductions are in the fixed order of the specification unless
//! [`Reduction::Fast`] is asked for.
//!
//! NCCL does not compare what ranks call, so every collective is preceded by an all-gather of 24
//! bytes that does: ranks that make different collectives get an error, both. A send tells its
//! receiver what it is. What this cannot see is a rank that makes *no* call, or a send where others
//! make a collective: that waits until an abort.

use std::collections::VecDeque;

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::buffer::{Buffer, BufferMut, ElementType};
use crate::call::{CALL_BYTES, Call, CallSite, Operation};
use crate::chunk::chunk_range;
use crate::communicator::{Communicator, Partial, ReduceOp};
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};
use crate::nccl::batch::{Pending, Step};
use crate::nccl::calls::NcclCall;
use crate::nccl::element::DeviceElement;
use crate::nccl::group::NcclGroup;
use crate::nccl::memory::{DeviceBuffer, DeviceMemory, PinnedMemory};
use crate::nccl::ordered::{DevicePartial, Request, Staged};

/// A call and its number.
const SITE_BYTES: usize = CALL_BYTES + 8;
/// Sends that may be under way before another one waits for the oldest.
const SENDS_MAX: usize = 16;
/// Most bytes per rank in `gather_bytes`, as the contract says.
const GATHER_BYTES_MAX: usize = 4 << 20;
/// And of all ranks together.
const GATHER_TOTAL_BYTES_MAX: usize = 256 << 20;

/// In which order sums are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// The fixed tree order: bits depend on the data only.
    #[default]
    Ordered,
    /// NCCL's own: faster, bits depend on the number of ranks and on the machine. A NaN may vanish
    /// in a maximum.
    Fast,
}

/// A process group over NCCL for host memory.
#[derive(Debug)]
pub struct NcclCommunicator {
    group: NcclGroup,
    /// Carries what goes to a lower rank. NCCL runs the operations of a communicator one after
    /// another, so two ranks that first send to each other need one for each direction. (Neighbours
    /// in a line may; three ranks that each first send to both others wait for an abort.)
    down: Option<NcclGroup>,
    reduction: Reduction,
    number: u64,
    sent: Vec<u64>,
    received: Vec<u64>,
    sends: VecDeque<(Pending, DeviceMemory)>,
    spare: Vec<PinnedMemory>,
    memory: Option<DeviceMemory>,
    failed: Option<CollectiveError>,
}

type Outcome<R> = Result<R, CollectiveError>;

impl NcclCommunicator {
    /// Over a group; every rank makes it.
    ///
    /// # Errors
    /// What [`NcclGroup::split`] says: a second communicator carries what goes to lower ranks.
    pub fn new(mut group: NcclGroup, reduction: Reduction) -> Outcome<Self> {
        let world = group.world_size();
        let down = match world {
            1 => None,
            _ => {
                let name = format!("{}-down", group.options.group);
                group.split(&name, Some(0), group.rank().0)?
            }
        };
        Ok(Self {
            group,
            down,
            reduction,
            number: 0,
            sent: vec![0; world as usize],
            received: vec![0; world as usize],
            sends: VecDeque::new(),
            spare: Vec::new(),
            memory: None,
            failed: None,
        })
    }

    /// The group, for operations on device memory between those on host memory.
    pub fn group(&mut self) -> &mut NcclGroup {
        &mut self.group
    }

    fn collective<R>(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut Self, CallSite) -> Outcome<R>,
    ) -> Outcome<R> {
        let site = CallSite { call, number: self.number };
        self.number += 1;
        self.run(|own| {
            own.compare(site)?;
            body(own, site)
        })
    }

    /// Runs a call; its error ends the group.
    fn run<R>(&mut self, body: impl FnOnce(&mut Self) -> Outcome<R>) -> Outcome<R> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        body(self).inspect_err(|error| self.failed = Some(error.clone()))
    }

    /// Every rank makes the same call.
    fn compare(&mut self, site: CallSite) -> Outcome<()> {
        let world = self.group.world as usize;
        if world == 1 {
            return Ok(());
        }
        let (own, all) = (self.group.rank as usize * SITE_BYTES, world * SITE_BYTES);
        let memory = self.memory(all)?;
        let part = memory.slice(own..own + SITE_BYTES)?;
        let mut calls = self.group.calls();
        calls.all_gather(&part, &memory)?;
        let mut stage = self.stage(all)?;
        let bytes = encode(site);
        stage.as_mut_slice()[own..own + SITE_BYTES].copy_from_slice(&bytes);
        let steps = vec![
            Step::ToDevice { offset: own, to: part },
            Step::Nccl(calls.into_calls()),
            Step::ToHost { from: memory, offset: 0 },
        ];
        let stage = self.group.submit("compare", steps, Some(stage))?.wait_stage()?;
        let stage = self.returned(site, stage)?;
        let theirs = stage.as_slice()[..all].chunks_exact(SITE_BYTES).zip((0..).map(Rank));
        let differing = theirs.filter(|(theirs, _)| *theirs != bytes).map(|(theirs, rank)| {
            format!("{rank} called {}", decode(theirs).map_or("?".into(), |site| site.to_string()))
        });
        let differing: Vec<String> = differing.collect();
        self.spare.push(stage);
        if differing.is_empty() {
            return Ok(());
        }
        invalid(
            site,
            format!(
                "{}: all ranks must make the same calls in the same order, with the same type, \
                 length and options",
                differing.join(", ")
            ),
        )
    }

    /// Pinned memory of at least that size.
    fn stage(&mut self, bytes: usize) -> Outcome<PinnedMemory> {
        match self.spare.iter().position(|stage| stage.bytes() >= bytes) {
            Some(found) => Ok(self.spare.swap_remove(found)),
            None => {
                self.spare.clear();
                PinnedMemory::new(&self.group.device, bytes.next_power_of_two())
            }
        }
    }

    /// Bytes of this communicator's device memory.
    fn memory(&mut self, bytes: usize) -> Outcome<DeviceBuffer> {
        match &self.memory {
            Some(memory) if memory.bytes() >= bytes => memory.buffer(DeviceElement::U8, bytes),
            _ => {
                let memory = DeviceMemory::new(&self.group.device, bytes.next_power_of_two())?;
                self.memory.insert(memory).buffer(DeviceElement::U8, bytes)
            }
        }
    }

    /// Device memory for several buffers of a type, one after another at aligned places.
    fn places(&mut self, element: DeviceElement, lens: &[usize]) -> Outcome<Vec<DeviceBuffer>> {
        const ALIGNMENT: usize = 256;
        let unit = ALIGNMENT / element.bytes();
        let starts = lens.iter().scan(0usize, |next, len| {
            let start = *next;
            *next = start + len.next_multiple_of(unit);
            Some(start)
        });
        let starts: Vec<usize> = starts.collect();
        let all = lens.iter().map(|len| len.next_multiple_of(unit)).sum::<usize>();
        self.memory(all * element.bytes())?;
        let Some(memory) = &self.memory else { return Ok(Vec::new()) };
        let whole = memory.buffer(element, all)?;
        starts.iter().zip(lens).map(|(start, len)| whole.slice(*start..start + len)).collect()
    }

    /// The stage that a finished batch gives back.
    fn returned(&self, site: CallSite, stage: Option<PinnedMemory>) -> Outcome<PinnedMemory> {
        match stage {
            Some(stage) => Ok(stage),
            None => invalid(site, "it lost its stage"),
        }
    }

    /// Reduces the bytes of host buffers, by subtree; the result lies in the stage from a byte on.
    fn reduce(
        &mut self,
        site: CallSite,
        (tree, op, scatter): (LaneTree, ReduceOp, bool),
        inputs: &[(Subtree, &[u8])],
        len: usize,
    ) -> Outcome<(PinnedMemory, usize)> {
        let Some(element) = site.call.element.map(DeviceElement::from) else {
            return invalid(site, "it has no elements");
        };
        let mut lens: Vec<usize> =
            inputs.iter().map(|(_, bytes)| bytes.len() / element.bytes()).collect();
        lens.push(len);
        let mut places = self.places(element, &lens)?;
        let Some(result) = places.pop() else { return invalid(site, "no memory") };
        let total = lens.iter().map(|len| len * element.bytes()).sum();
        let mut stage = self.stage(total)?;
        let (mut staged, mut partials) = (Staged::default(), Vec::new());
        let mut offset = 0;
        for ((subtree, bytes), data) in inputs.iter().zip(places) {
            stage.as_mut_slice()[offset..offset + bytes.len()].copy_from_slice(bytes);
            if !data.is_empty() {
                staged.before.push(Step::ToDevice { offset, to: data.clone() });
            }
            offset += bytes.len();
            partials.push(DevicePartial { subtree: *subtree, data });
        }
        if !result.is_empty() {
            staged.after.push(Step::ToHost { from: result.clone(), offset });
        }
        staged.stage = Some(stage);
        let lanes = site.call.operation == Operation::ReduceLanes;
        let pending = match partials.first() {
            Some(only) if self.reduction == Reduction::Fast && !lanes => {
                self.fast(site, &only.data, &result, (op, scatter), staged)?
            }
            _ => {
                let (name, partials, output) = ("reduce", &partials[..], &result);
                self.group.ordered(Request { name, tree, partials, output, op, scatter }, staged)?
            }
        };
        Ok((self.returned(site, pending.wait_stage()?)?, offset))
    }

    /// The same with this rank's one buffer.
    fn reduce_own(
        &mut self,
        site: CallSite,
        (op, scatter): (ReduceOp, bool),
        bytes: &[u8],
        len: usize,
    ) -> Outcome<(PinnedMemory, usize)> {
        check_average(site, op)?;
        let tree = LaneTree::new(self.group.world);
        let leaf = Subtree { start: self.group.rank, len: 1 };
        self.reduce(site, (tree, op, scatter), &[(leaf, bytes)], len)
    }

    fn take(&mut self, (stage, offset): (PinnedMemory, usize), target: &mut [u8]) {
        target.copy_from_slice(&stage.as_slice()[offset..offset + target.len()]);
        self.spare.push(stage);
    }

    fn fast(
        &mut self,
        site: CallSite,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        (op, scatter): (ReduceOp, bool),
        staged: Staged,
    ) -> Outcome<Pending> {
        let (mut calls, world) = (self.group.calls(), self.group.world);
        if scatter {
            let len = site.call.count as usize;
            let lens: Vec<usize> =
                (0..world).map(|rank| chunk_range(len, world, rank).len()).collect();
            calls.reduce_scatter_v(input, output, &lens, op)?;
        } else {
            calls.all_reduce(input, output, op)?;
        }
        let mut steps = staged.before;
        steps.push(Step::Nccl(calls.into_calls()));
        steps.extend(staged.after);
        self.group.submit("reduce", steps, staged.stage)
    }

    /// Runs calls on one device buffer that is read from and written to parts of a host buffer.
    fn through(
        &mut self,
        site: CallSite,
        buffer: &DeviceBuffer,
        upload: Option<(usize, &[u8])>,
        calls: Vec<NcclCall>,
        download: Option<&mut [u8]>,
    ) -> Outcome<()> {
        let bytes = buffer.as_bytes();
        let mut stage = self.stage(bytes.len())?;
        let mut steps = Vec::new();
        if let Some((at, data)) = upload.filter(|(_, data)| !data.is_empty()) {
            stage.as_mut_slice()[at..at + data.len()].copy_from_slice(data);
            steps.push(Step::ToDevice { offset: at, to: bytes.slice(at..at + data.len())? });
        }
        steps.push(Step::Nccl(calls));
        if download.is_some() && !bytes.is_empty() {
            steps.push(Step::ToHost { from: bytes, offset: 0 });
        }
        let pending = self.group.submit("host", steps, Some(stage))?;
        let stage = self.returned(site, pending.wait_stage()?)?;
        if let Some(target) = download {
            target.copy_from_slice(&stage.as_slice()[..target.len()]);
        }
        self.spare.push(stage);
        Ok(())
    }

    /// One message from a rank, in the stage that it returns.
    fn receive(&mut self, site: CallSite, into: DeviceBuffer, from: Rank) -> Outcome<PinnedMemory> {
        let (stage, rank) = (self.stage(into.bytes())?, self.group.rank);
        let group = self.toward(from.0, rank);
        let mut calls = group.calls();
        calls.recv(&into, from)?;
        let steps = vec![Step::Nccl(calls.into_calls()), Step::ToHost { from: into, offset: 0 }];
        let pending = group.submit("recv", steps, Some(stage))?;
        self.returned(site, pending.wait_stage()?)
    }

    /// The group that carries messages between this rank and another.
    fn toward(&mut self, from: u32, to: u32) -> &mut NcclGroup {
        match &mut self.down {
            Some(down) if to < from => down,
            _ => &mut self.group,
        }
    }

    /// Gives up what sends have finished with; waits for the oldest if there are too many.
    fn settle_sends(&mut self) -> Outcome<()> {
        while let Some((oldest, _)) = self.sends.front() {
            let result = match oldest.poll_stage() {
                Some(result) => result,
                None if self.sends.len() < SENDS_MAX => return Ok(()),
                None => match self.sends.pop_front() {
                    Some((oldest, _memory)) => {
                        self.spare.extend(oldest.wait_stage()?);
                        continue;
                    }
                    None => return Ok(()),
                },
            };
            self.spare.extend(result?);
            self.sends.pop_front();
        }
        Ok(())
    }

    fn check_peer(&self, site: CallSite, peer: Rank) -> Outcome<()> {
        let world = self.group.world;
        if peer.0 >= world {
            return invalid(site, format!("{peer} is not below the world size of {world}"));
        }
        if site.call.operation.is_point_to_point() && peer.0 == self.group.rank {
            return invalid(site, format!("{peer} is this rank itself"));
        }
        Ok(())
    }

    fn check_chunk(&self, site: CallSite, what: &str, found: usize, len: usize) -> Outcome<()> {
        let expected = chunk_range(len, self.group.world, self.group.rank).len();
        if found != expected {
            let rank = Rank(self.group.rank);
            return invalid(
                site,
                format!(
                    "the {what} holds {found} elements, expected {expected}: the chunk of {rank}"
                ),
            );
        }
        Ok(())
    }
}

fn invalid<R>(site: CallSite, message: impl Into<String>) -> Outcome<R> {
    Err(CollectiveError::InvalidCall { call: site, message: message.into() })
}

fn encode(site: CallSite) -> [u8; SITE_BYTES] {
    let mut bytes = [0; SITE_BYTES];
    bytes[..CALL_BYTES].copy_from_slice(&site.call.encode());
    bytes[CALL_BYTES..].copy_from_slice(&site.number.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<CallSite> {
    let (call, number) = bytes.split_first_chunk::<CALL_BYTES>()?;
    Some(CallSite {
        call: Call::decode(call)?,
        number: u64::from_le_bytes(number.try_into().ok()?),
    })
}

fn check_types(site: CallSite, input: ElementType, output: ElementType) -> Outcome<()> {
    if input != output {
        return invalid(site, format!("the input holds {input}, the output {output}"));
    }
    Ok(())
}

fn check_average(site: CallSite, op: ReduceOp) -> Outcome<()> {
    match site.call.element {
        Some(element) if op == ReduceOp::Avg && !DeviceElement::from(element).is_float() => {
            invalid(
                site,
                format!("an average of {element} would round: expected a float, or a sum"),
            )
        }
        _ => Ok(()),
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn world_size(&self) -> u32 {
        self.group.world_size()
    }

    fn generation(&self) -> Generation {
        self.group.generation()
    }

    fn all_reduce(&mut self, mut buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, buffer.element(), buffer.len()).reducing(op);
        self.collective(call, |own, site| {
            let len = buffer.len();
            let result = own.reduce_own(site, (op, false), buffer.as_bytes_mut(), len)?;
            own.take(result, buffer.as_bytes_mut());
            Ok(())
        })
    }

    fn reduce_scatter(
        &mut self,
        input: Buffer<'_>,
        mut output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceScatter, input.element(), input.len()).reducing(op);
        self.collective(call, |own, site| {
            own.check_chunk(site, "output", output.len(), input.len())?;
            check_types(site, input.element(), output.element())?;
            let result = own.reduce_own(site, (op, true), input.as_bytes(), output.len())?;
            own.take(result, output.as_bytes_mut());
            Ok(())
        })
    }

    fn all_gather(&mut self, input: Buffer<'_>, mut output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, output.element(), output.len());
        self.collective(call, |own, site| {
            own.check_chunk(site, "input", input.len(), output.len())?;
            check_types(site, input.element(), output.element())?;
            let element = DeviceElement::from(output.element());
            let (len, world, rank) = (output.len(), own.group.world, own.group.rank);
            let whole = own.places(element, &[len])?.remove(0);
            let range = chunk_range(len, world, rank);
            let at = range.start * element.bytes();
            let lens: Vec<usize> = (0..world).map(|r| chunk_range(len, world, r).len()).collect();
            let mut calls = own.group.calls();
            calls.all_gather_v(&whole.slice(range)?, &whole, &lens)?;
            let upload = Some((at, input.as_bytes()));
            own.through(site, &whole, upload, calls.into_calls(), Some(output.as_bytes_mut()))
        })
    }

    fn broadcast(&mut self, mut buffer: BufferMut<'_>, root: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Broadcast, buffer.element(), buffer.len());
        self.collective(call.with_detail(root.0), |own, site| {
            own.check_peer(site, root)?;
            let element = DeviceElement::from(buffer.element());
            let whole = own.places(element, &[buffer.len()])?.remove(0);
            let mut calls = own.group.calls();
            calls.broadcast(&whole, &whole, root)?;
            let (calls, bytes) = (calls.into_calls(), buffer.as_bytes_mut());
            if root.0 == own.group.rank {
                own.through(site, &whole, Some((0, bytes)), calls, None)
            } else {
                own.through(site, &whole, None, calls, Some(bytes))
            }
        })
    }

    fn send(&mut self, buffer: Buffer<'_>, to: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Send, buffer.element(), buffer.len()).with_detail(to.0);
        let number = self.sent.get(to.0 as usize).copied().unwrap_or(0);
        let site = CallSite { call, number };
        self.run(|own| {
            own.check_peer(site, to)?;
            own.settle_sends()?;
            let bytes = buffer.as_bytes();
            let all = SITE_BYTES + bytes.len();
            let memory = DeviceMemory::new(&own.group.device, all)?;
            let whole = memory.buffer(DeviceElement::U8, all)?;
            let mut stage = own.stage(all)?;
            stage.as_mut_slice()[..SITE_BYTES].copy_from_slice(&encode(site));
            stage.as_mut_slice()[SITE_BYTES..all].copy_from_slice(bytes);
            let rank = own.group.rank;
            let group = own.toward(rank, to.0);
            let (mut head, mut body) = (group.calls(), group.calls());
            head.send(&whole.slice(0..SITE_BYTES)?, to)?;
            body.send(&whole.slice(SITE_BYTES..all)?, to)?;
            let steps = vec![
                Step::ToDevice { offset: 0, to: whole },
                Step::Nccl(head.into_calls()),
                Step::Nccl(body.into_calls()),
            ];
            // The bytes are in the stage: the buffer may be reused, and the peer may take its time.
            let pending = group.submit("send", steps, Some(stage))?;
            own.sends.push_back((pending, memory));
            own.sent[to.0 as usize] += 1;
            Ok(())
        })
    }

    fn recv(&mut self, mut buffer: BufferMut<'_>, from: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Recv, buffer.element(), buffer.len()).with_detail(from.0);
        let number = self.received.get(from.0 as usize).copied().unwrap_or(0);
        let site = CallSite { call, number };
        self.run(|own| {
            own.check_peer(site, from)?;
            own.settle_sends()?;
            let bytes = buffer.as_bytes_mut();
            let size = bytes.len().max(SITE_BYTES);
            let whole = own.memory(size)?;
            let rank = own.group.rank;
            let head = own.receive(site, whole.slice(0..SITE_BYTES)?, from)?;
            let theirs = decode(&head.as_slice()[..SITE_BYTES]);
            own.spare.push(head);
            let matches = theirs.is_some_and(|theirs| {
                theirs.number == number
                    && theirs.call == Call { operation: Operation::Send, detail: rank, ..call }
            });
            if !matches {
                let theirs = theirs.map_or("?".to_owned(), |site| site.to_string());
                return invalid(site, format!("{from} called {theirs}"));
            }
            if !bytes.is_empty() {
                let body = own.receive(site, whole.slice(0..bytes.len())?, from)?;
                bytes.copy_from_slice(&body.as_slice()[..bytes.len()]);
                own.spare.push(body);
            }
            own.received[from.0 as usize] += 1;
            Ok(())
        })
    }

    fn barrier(&mut self) -> Outcome<()> {
        self.collective(Call::plain(Operation::Barrier), |own, _| own.group.barrier()?.wait())
    }

    fn gather_bytes(&mut self, mine: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.collective(Call::plain(Operation::GatherBytes), |own, site| {
            let (world, rank) = (own.group.world as usize, own.group.rank as usize);
            let most = GATHER_BYTES_MAX.min(GATHER_TOTAL_BYTES_MAX / world);
            if mine.len() > most {
                return invalid(site, format!("{} bytes, at most {most} are allowed", mine.len()));
            }
            let table = own.places(DeviceElement::I64, &[world])?.remove(0);
            let mut calls = own.group.calls();
            calls.all_gather(&table.slice(rank..rank + 1)?, &table)?;
            let (length, mut bytes) = ((mine.len() as u64).to_le_bytes(), vec![0; 8 * world]);
            let upload = Some((8 * rank, length.as_slice()));
            own.through(site, &table, upload, calls.into_calls(), Some(&mut bytes))?;
            let lens: Vec<u64> = bytes
                .chunks_exact(8)
                .filter_map(|length| length.try_into().ok().map(u64::from_le_bytes))
                .collect();
            if let Some((rank, len)) = lens.iter().enumerate().find(|(_, len)| **len > most as u64)
            {
                return invalid(site, format!("r{rank} brings {len} bytes, at most {most}"));
            }
            let lens: Vec<usize> = lens.into_iter().map(|len| len as usize).collect();
            let total = lens.iter().sum();
            let whole = own.places(DeviceElement::U8, &[total])?.remove(0);
            let at: usize = lens[..rank].iter().sum();
            let mut calls = own.group.calls();
            calls.all_gather_v(&whole.slice(at..at + mine.len())?, &whole, &lens)?;
            let mut bytes = vec![0; total];
            own.through(site, &whole, Some((at, mine)), calls.into_calls(), Some(&mut bytes))?;
            let mut rest = bytes.as_slice();
            Ok(lens
                .iter()
                .map(|len| {
                    let (part, tail) = rest.split_at(*len);
                    rest = tail;
                    part.to_vec()
                })
                .collect())
        })
    }

    fn reduce_lanes(
        &mut self,
        tree: &LaneTree,
        partials: &[Partial<'_>],
        mut output: BufferMut<'_>,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceLanes, output.element(), output.len())
            .reducing(ReduceOp::Sum)
            .with_detail(tree.lanes());
        self.collective(call, |own, site| {
            for partial in partials {
                check_types(site, partial.data.element(), output.element())?;
            }
            let inputs: Vec<(Subtree, &[u8])> =
                partials.iter().map(|part| (part.subtree, part.data.as_bytes())).collect();
            let order = (tree.clone(), ReduceOp::Sum, false);
            let result = own.reduce(site, order, &inputs, output.len())?;
            own.take(result, output.as_bytes_mut());
            Ok(())
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        self.group.abort_handle()
    }
}
