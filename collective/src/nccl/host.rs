//! The crate's [`crate::Communicator`] over NCCL: host buffers staged through the GPU.
//!
//! For code that works on host memory and must run over NCCL unchanged: tests, small models,
//! control data. Reductions are in the fixed order of the specification unless
//! [`Reduction::Fast`] is asked for.
//!
//! `contract.rs` has the methods, this file what they are made of.
//!
//! NCCL does not compare what ranks call, so every collective is preceded by an all-gather of 24
//! bytes that does: ranks that make different collectives get an error, both. A send tells its
//! receiver what it is. What this cannot see is a rank that makes *no* call, or a send where others
//! make a collective: that waits until an abort.

use std::collections::VecDeque;

use api::Rank;

use crate::buffer::ElementType;
use crate::call::{CALL_BYTES, Call, CallSite, Operation};
use crate::checks::{Outcome, check_average, invalid};
use crate::chunk::chunk_range;
use crate::communicator::{ReduceOp, Reduction};
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};
use crate::nccl::batch::{Pending, Step};
use crate::nccl::calls::Calls;
use crate::nccl::group::NcclGroup;
use crate::nccl::memory::{DeviceBuffer, DeviceMemory, PinnedMemory};
use crate::nccl::ordered::{DevicePartial, Request, Staged};

/// A call and its number.
pub(super) const SITE_BYTES: usize = CALL_BYTES + 8;
/// Sends that may be under way before another one waits for the oldest.
const SENDS_MAX: usize = 16;

/// A process group over NCCL for host memory.
#[derive(Debug)]
pub struct NcclCommunicator {
    pub(super) group: NcclGroup,
    /// Carries what goes to a lower rank. NCCL runs the operations of a communicator one after
    /// another, so two ranks that first send to each other need one for each direction. (Neighbours
    /// in a line may; three ranks that each first send to both others wait for an abort.)
    down: Option<NcclGroup>,
    pub(super) reduction: Reduction,
    number: u64,
    pub(super) sent: Vec<u64>,
    pub(super) received: Vec<u64>,
    pub(super) sends: VecDeque<(Pending, DeviceMemory)>,
    pub(super) spare: Vec<PinnedMemory>,
    memory: Option<DeviceMemory>,
    failed: Option<CollectiveError>,
}

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

    pub(super) fn collective<R>(
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
    pub(super) fn run<R>(&mut self, body: impl FnOnce(&mut Self) -> Outcome<R>) -> Outcome<R> {
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
    pub(super) fn stage(&mut self, bytes: usize) -> Outcome<PinnedMemory> {
        match self.spare.iter().position(|stage| stage.bytes() >= bytes) {
            Some(found) => Ok(self.spare.swap_remove(found)),
            None => {
                self.spare.clear();
                PinnedMemory::new(&self.group.device, bytes.next_power_of_two())
            }
        }
    }

    /// Bytes of this communicator's device memory.
    pub(super) fn memory(&mut self, bytes: usize) -> Outcome<DeviceBuffer> {
        match &self.memory {
            Some(memory) if memory.bytes() >= bytes => memory.buffer(ElementType::U8, bytes),
            _ => {
                let memory = DeviceMemory::new(&self.group.device, bytes.next_power_of_two())?;
                self.memory.insert(memory).buffer(ElementType::U8, bytes)
            }
        }
    }

    /// Device memory for several buffers of a type, one after another at aligned places.
    pub(super) fn places(
        &mut self,
        element: ElementType,
        lens: &[usize],
    ) -> Outcome<Vec<DeviceBuffer>> {
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
    pub(super) fn returned(
        &self,
        site: CallSite,
        stage: Option<PinnedMemory>,
    ) -> Outcome<PinnedMemory> {
        match stage {
            Some(stage) => Ok(stage),
            None => invalid(site, "it lost its stage"),
        }
    }

    /// Reduces the bytes of host buffers, by subtree; the result lies in the stage from a byte on.
    pub(super) fn reduce(
        &mut self,
        site: CallSite,
        (tree, op, scatter): (LaneTree, ReduceOp, bool),
        inputs: &[(Subtree, &[u8])],
        len: usize,
    ) -> Outcome<(PinnedMemory, usize)> {
        let Some(element) = site.call.element else {
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
    pub(super) fn reduce_own(
        &mut self,
        site: CallSite,
        (op, scatter): (ReduceOp, bool),
        bytes: &[u8],
        len: usize,
    ) -> Outcome<(PinnedMemory, usize)> {
        check_average(site)?;
        let tree = LaneTree::new(self.group.world);
        let leaf = Subtree { start: self.group.rank, len: 1 };
        self.reduce(site, (tree, op, scatter), &[(leaf, bytes)], len)
    }

    pub(super) fn take(&mut self, (stage, offset): (PinnedMemory, usize), target: &mut [u8]) {
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

    /// Runs calls between a copy from the host to device memory and one from device memory back.
    pub(super) fn through(
        &mut self,
        site: CallSite,
        upload: Option<(DeviceBuffer, &[u8])>,
        calls: Calls,
        download: Option<(DeviceBuffer, &mut [u8])>,
    ) -> Outcome<()> {
        let up = upload.as_ref().map_or(0, |(_, data)| data.len());
        let down = download.as_ref().map_or(0, |(_, data)| data.len());
        // One stage for both: the second copy comes after the first on the stream.
        let mut stage = self.stage(up.max(down))?;
        let mut steps = Vec::new();
        if let Some((to, data)) = upload {
            stage.as_mut_slice()[..up].copy_from_slice(data);
            steps.push(Step::ToDevice { offset: 0, to });
        }
        steps.push(Step::Nccl(calls.into_calls()));
        let mut target = None;
        if let Some((from, data)) = download {
            steps.push(Step::ToHost { from, offset: 0 });
            target = Some(data);
        }
        let pending = self.group.submit("host", steps, Some(stage))?;
        let stage = self.returned(site, pending.wait_stage()?)?;
        if let Some(target) = target {
            target.copy_from_slice(&stage.as_slice()[..down]);
        }
        self.spare.push(stage);
        Ok(())
    }

    /// Gathers every rank's chunk of a buffer.
    pub(super) fn gather_chunks(
        &mut self,
        site: CallSite,
        element: ElementType,
        mine: &[u8],
        output: &mut [u8],
    ) -> Outcome<()> {
        let (world, rank) = (self.group.world, self.group.rank);
        let len = output.len() / element.bytes();
        let whole = self.places(element, &[len])?.remove(0);
        let own = whole.slice(chunk_range(len, world, rank))?;
        let lens: Vec<usize> = (0..world).map(|rank| chunk_range(len, world, rank).len()).collect();
        let mut calls = self.group.calls();
        calls.all_gather_v(&own, &whole, &lens)?;
        self.through(site, Some((own, mine)), calls, Some((whole, output)))
    }

    /// Exchanges parts of these lengths, which the ranks have agreed on.
    pub(super) fn exchange_parts(
        &mut self,
        site: CallSite,
        element: ElementType,
        (input, send): (&[u8], &[usize]),
        (output, receive): (&mut [u8], &[usize]),
    ) -> Outcome<()> {
        let lens = [input.len() / element.bytes(), output.len() / element.bytes()];
        let mut places = self.places(element, &lens)?;
        let (to, from) = (places.remove(0), places.remove(0));
        let mut calls = self.group.calls();
        calls.all_to_all_v(&to, send, &from, receive)?;
        self.through(site, Some((to, input)), calls, Some((from, output)))
    }

    /// What each rank sends to another is what that one receives; else an error on all ranks.
    ///
    /// NCCL would wait, or write beyond a part.
    pub(super) fn agree_on_lengths(
        &mut self,
        site: CallSite,
        send: &[usize],
        receive: &[usize],
    ) -> Outcome<()> {
        let world = self.group.world as usize;
        let words = |lens: &[usize]| -> Vec<u8> {
            lens.iter().flat_map(|len| (*len as u64).to_le_bytes()).collect()
        };
        let (mine, each) = (words(send), vec![1; world]);
        let mut theirs = vec![0; mine.len()];
        let (input, output) = ((&mine[..], &each[..]), (&mut theirs[..], &each[..]));
        self.exchange_parts(site, ElementType::I64, input, output)?;
        let sent: Vec<u64> = words_of(&theirs);
        let differs =
            (sent.iter().zip(receive)).position(|(sent, expected)| *sent != *expected as u64);
        // Every rank learns of it: those that agree would wait for those that do not.
        let verdict =
            differs.map_or([u64::MAX; 3], |from| [from as u64, sent[from], receive[from] as u64]);
        let mut verdicts = vec![0; 24 * world];
        self.gather_equal(site, bytemuck::cast_slice(&verdict), &mut verdicts)?;
        let verdicts = words_of(&verdicts);
        let found = verdicts.chunks_exact(3).zip(0..).find(|(found, _)| found[0] != u64::MAX);
        match found {
            Some((found, to)) => {
                let (from, to) = (Rank(found[0] as u32), Rank(to));
                let (sent, expected) = (found[1], found[2]);
                invalid(
                    site,
                    format!("{from} sends {sent} elements to {to}, which expects {expected}"),
                )
            }
            None => Ok(()),
        }
    }

    /// Gathers as many bytes from every rank.
    pub(super) fn gather_equal(
        &mut self,
        site: CallSite,
        mine: &[u8],
        all: &mut [u8],
    ) -> Outcome<()> {
        let at = self.group.rank as usize * mine.len();
        let whole = self.places(ElementType::U8, &[all.len()])?.remove(0);
        let own = whole.slice(at..at + mine.len())?;
        let mut calls = self.group.calls();
        calls.all_gather(&own, &whole)?;
        self.through(site, Some((own, mine)), calls, Some((whole, all)))
    }

    /// One message from a rank, in the stage that it returns.
    pub(super) fn receive(
        &mut self,
        site: CallSite,
        into: DeviceBuffer,
        from: Rank,
    ) -> Outcome<PinnedMemory> {
        let (stage, rank) = (self.stage(into.bytes())?, self.group.rank);
        let group = self.toward(from.0, rank);
        let mut calls = group.calls();
        calls.recv(&into, from)?;
        let steps = vec![Step::Nccl(calls.into_calls()), Step::ToHost { from: into, offset: 0 }];
        let pending = group.submit("recv", steps, Some(stage))?;
        self.returned(site, pending.wait_stage()?)
    }

    /// The group that carries messages between this rank and another.
    pub(super) fn toward(&mut self, from: u32, to: u32) -> &mut NcclGroup {
        match &mut self.down {
            Some(down) if to < from => down,
            _ => &mut self.group,
        }
    }

    /// Gives up what sends have finished with; waits for the oldest if there are too many.
    pub(super) fn settle_sends(&mut self) -> Outcome<()> {
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

    pub(super) fn check_peer(&self, site: CallSite, peer: Rank) -> Outcome<()> {
        let world = self.group.world;
        if peer.0 >= world {
            return invalid(site, format!("{peer} is not below the world size of {world}"));
        }
        if site.call.operation.is_point_to_point() && peer.0 == self.group.rank {
            return invalid(site, format!("{peer} is this rank itself"));
        }
        Ok(())
    }

    /// A whole buffer is a part for each rank.
    pub(super) fn check_parts(
        &self,
        site: CallSite,
        what: &str,
        whole: usize,
        part: usize,
    ) -> Outcome<()> {
        let world = self.group.world;
        if whole == part.saturating_mul(world as usize) {
            return Ok(());
        }
        invalid(
            site,
            format!("the {what} holds {whole} elements, expected {part} for each of {world} ranks"),
        )
    }

    /// A length for each rank, which tile a buffer.
    pub(super) fn check_lengths(
        &self,
        site: CallSite,
        what: &str,
        lens: &[usize],
        len: usize,
    ) -> Outcome<()> {
        let (world, found) = (self.group.world, lens.len());
        if found != world as usize {
            return invalid(
                site,
                format!("{found} {what} lengths, expected one for each of {world} ranks"),
            );
        }
        let total = lens.iter().try_fold(0usize, |total, len| total.checked_add(*len));
        if total != Some(len) {
            return invalid(
                site,
                format!("the {what} lengths do not add up to the buffer's {len} elements"),
            );
        }
        Ok(())
    }

    pub(super) fn check_chunk(
        &self,
        site: CallSite,
        what: &str,
        found: usize,
        len: usize,
    ) -> Outcome<()> {
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

/// Numbers as ranks exchange them.
pub(super) fn words_of(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok());
    words.map(u64::from_le_bytes).collect()
}

pub(super) fn encode(site: CallSite) -> [u8; SITE_BYTES] {
    let mut bytes = [0; SITE_BYTES];
    bytes[..CALL_BYTES].copy_from_slice(&site.call.encode());
    bytes[CALL_BYTES..].copy_from_slice(&site.number.to_le_bytes());
    bytes
}

pub(super) fn decode(bytes: &[u8]) -> Option<CallSite> {
    let (call, number) = bytes.split_first_chunk::<CALL_BYTES>()?;
    Some(CallSite {
        call: Call::decode(call)?,
        number: u64::from_le_bytes(number.try_into().ok()?),
    })
}

pub(super) fn check_types(site: CallSite, input: ElementType, output: ElementType) -> Outcome<()> {
    if input != output {
        return invalid(site, format!("the input holds {input}, the output {output}"));
    }
    Ok(())
}
