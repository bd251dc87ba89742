//! The operations on device memory, checked and spelled as calls of NCCL.
//!
//! Pure. [`Calls`] collects what is to run as one NCCL group: NCCL then starts all of it at once,
//! which spares launches and is what makes sends and receives between many ranks free of deadlock.

use std::ops::Range;

use api::Rank;

use crate::communicator::ReduceOp;
use crate::error::CollectiveError;
use crate::nccl::memory::DeviceBuffer;

/// One call of NCCL. Ranks are the `int` that NCCL takes.
#[derive(Clone, Debug)]
pub(super) enum NcclCall {
    AllReduce { input: DeviceBuffer, output: DeviceBuffer, op: ReduceOp },
    Reduce { input: DeviceBuffer, output: DeviceBuffer, op: ReduceOp, root: i32 },
    ReduceScatter { input: DeviceBuffer, output: DeviceBuffer, op: ReduceOp },
    AllGather { input: DeviceBuffer, output: DeviceBuffer },
    Broadcast { input: DeviceBuffer, output: DeviceBuffer, root: i32 },
    Send { buffer: DeviceBuffer, to: i32 },
    Recv { buffer: DeviceBuffer, from: i32 },
}

impl NcclCall {
    /// The function of NCCL.
    pub(super) fn symbol(&self) -> &'static str {
        match self {
            Self::AllReduce { .. } => "ncclAllReduce",
            Self::Reduce { .. } => "ncclReduce",
            Self::ReduceScatter { .. } => "ncclReduceScatter",
            Self::AllGather { .. } => "ncclAllGather",
            Self::Broadcast { .. } => "ncclBroadcast",
            Self::Send { .. } => "ncclSend",
            Self::Recv { .. } => "ncclRecv",
        }
    }
}

/// Operations that run as one: nothing orders them among each other, so none may read what another
/// writes.
///
/// Every operation may be in place: an all-reduce and a broadcast with one buffer for both, a
/// gather with its input where its result goes, a scatter of any kind with its output where this
/// rank's part lies. All-to-all may not. Other overlaps are refused.
#[derive(Clone, Debug)]
pub struct Calls {
    rank: u32,
    world: u32,
    calls: Vec<NcclCall>,
}

type Checked = Result<(), CollectiveError>;

fn wrong<R>(call: &str, message: impl Into<String>) -> Result<R, CollectiveError> {
    Err(CollectiveError::InvalidDeviceCall { call: call.into(), message: message.into() })
}

impl Calls {
    /// No operation yet, for this rank of a group.
    pub(super) fn new(rank: u32, world: u32) -> Self {
        Self { rank, world, calls: Vec::new() }
    }

    /// The calls, without those of no elements: every rank leaves out the same.
    pub(super) fn into_calls(self) -> Vec<NcclCall> {
        self.calls
    }

    /// Reduces over all ranks; the result is on every rank, summed in NCCL's order.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidDeviceCall`] if the arguments do not fit; this holds for every
    /// method below.
    pub fn all_reduce(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Checked {
        let call = "all_reduce";
        check_op(call, input, op)?;
        check_same(call, input, output, input.len())?;
        check_overlap(call, input, output, 0)?;
        if !input.is_empty() {
            let (input, output) = (input.clone(), output.clone());
            self.calls.push(NcclCall::AllReduce { input, output, op });
        }
        Ok(())
    }

    /// Reduces over all ranks; the result is on `root`, and `output` matters only there.
    pub fn reduce(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
        root: Rank,
    ) -> Checked {
        let call = "reduce";
        check_op(call, input, op)?;
        check_same(call, input, output, input.len())?;
        check_overlap(call, input, output, 0)?;
        let root = self.number(call, root)?;
        if !input.is_empty() {
            let (input, output) = (input.clone(), output.clone());
            self.calls.push(NcclCall::Reduce { input, output, op, root });
        }
        Ok(())
    }

    /// Reduces over all ranks; each gets its own part of equal length.
    pub fn reduce_scatter(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Checked {
        let call = "reduce_scatter";
        check_op(call, input, op)?;
        check_same(call, output, input, output.len() * self.world as usize)?;
        check_overlap(call, output, input, self.own_bytes(output))?;
        if !output.is_empty() {
            let (input, output) = (input.clone(), output.clone());
            self.calls.push(NcclCall::ReduceScatter { input, output, op });
        }
        Ok(())
    }

    /// Reduces over all ranks; each gets its own part, of these lengths by rank.
    pub fn reduce_scatter_v(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        lens: &[usize],
        op: ReduceOp,
    ) -> Checked {
        let call = "reduce_scatter_v";
        check_op(call, input, op)?;
        let parts = self.parts(call, input, lens)?;
        check_same(call, input, output, lens[self.rank as usize])?;
        let own = &parts[self.rank as usize];
        check_overlap(call, output, input, (own.start * input.element().bytes()) as u64)?;
        for (root, part) in parts.into_iter().enumerate() {
            let input = input.slice(part)?;
            // What is no root's result is not written.
            let output = if root == self.rank as usize { output.clone() } else { input.clone() };
            self.reduce(&input, &output, op, Rank(root as u32))?;
        }
        Ok(())
    }

    /// Puts every rank's input, of equal length, into `output` in rank order, on every rank.
    pub fn all_gather(&mut self, input: &DeviceBuffer, output: &DeviceBuffer) -> Checked {
        let call = "all_gather";
        check_same(call, input, output, input.len() * self.world as usize)?;
        check_overlap(call, input, output, self.own_bytes(input))?;
        if !input.is_empty() {
            let (input, output) = (input.clone(), output.clone());
            self.calls.push(NcclCall::AllGather { input, output });
        }
        Ok(())
    }

    /// Puts every rank's input, of these lengths by rank, into `output` in rank order, everywhere.
    pub fn all_gather_v(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        lens: &[usize],
    ) -> Checked {
        let call = "all_gather_v";
        let parts = self.parts(call, output, lens)?;
        check_same(call, output, input, lens[self.rank as usize])?;
        let own = &parts[self.rank as usize];
        check_overlap(call, input, output, (own.start * output.element().bytes()) as u64)?;
        for (root, part) in parts.into_iter().enumerate() {
            let part = output.slice(part)?;
            let input = if root == self.rank as usize { input } else { &part };
            self.broadcast(input, &part, Rank(root as u32))?;
        }
        Ok(())
    }

    /// Copies `root`'s input to the output of every rank; the input matters only there.
    pub fn broadcast(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        root: Rank,
    ) -> Checked {
        let call = "broadcast";
        check_same(call, input, output, input.len())?;
        check_overlap(call, input, output, 0)?;
        let root = self.number(call, root)?;
        if !output.is_empty() {
            let (input, output) = (input.clone(), output.clone());
            self.calls.push(NcclCall::Broadcast { input, output, root });
        }
        Ok(())
    }

    /// Puts every rank's input, of equal length, into `root`'s output in rank order; the others
    /// give none.
    pub fn gather(
        &mut self,
        input: &DeviceBuffer,
        output: Option<&DeviceBuffer>,
        root: Rank,
    ) -> Checked {
        let call = "gather";
        let root_number = self.number(call, root)?;
        match output {
            Some(output) if root.0 == self.rank => {
                check_same(call, input, output, input.len() * self.world as usize)?;
                check_overlap(call, input, output, self.own_bytes(input))?;
                for rank in 0..self.world {
                    let part = output.slice(equal_part(rank, input.len()))?;
                    if rank != self.rank || part.address() != input.address() {
                        self.push_recv(part, rank as i32);
                    }
                }
                let own = output.slice(equal_part(self.rank, input.len()))?;
                if own.address() != input.address() {
                    self.push_send(input.clone(), root_number);
                }
            }
            None if root.0 != self.rank => self.push_send(input.clone(), root_number),
            _ => return wrong(call, format!("{root} and only it has an output")),
        }
        Ok(())
    }

    /// Gives every rank its part, of equal length, of `root`'s input; the others give none.
    pub fn scatter(
        &mut self,
        input: Option<&DeviceBuffer>,
        output: &DeviceBuffer,
        root: Rank,
    ) -> Checked {
        let call = "scatter";
        let root_number = self.number(call, root)?;
        match input {
            Some(input) if root.0 == self.rank => {
                check_same(call, output, input, output.len() * self.world as usize)?;
                check_overlap(call, output, input, self.own_bytes(output))?;
                let mut in_place = false;
                for rank in 0..self.world {
                    let part = input.slice(equal_part(rank, output.len()))?;
                    if rank == self.rank && part.address() == output.address() {
                        in_place = true;
                    } else {
                        self.push_send(part, rank as i32);
                    }
                }
                if !in_place {
                    self.push_recv(output.clone(), root_number);
                }
            }
            None if root.0 != self.rank => self.push_recv(output.clone(), root_number),
            _ => return wrong(call, format!("{root} and only it has an input")),
        }
        Ok(())
    }

    /// Sends the i-th part of `input` to rank i and puts what rank i sends into the i-th part of
    /// `output`; all parts are of equal length.
    pub fn all_to_all(&mut self, input: &DeviceBuffer, output: &DeviceBuffer) -> Checked {
        let call = "all_to_all";
        check_same(call, input, output, input.len())?;
        let world = self.world as usize;
        if !input.len().is_multiple_of(world) {
            return wrong(call, format!("{} elements are not {world} equal parts", input.len()));
        }
        let lens = vec![input.len() / world; world];
        self.all_to_all_v(input, &lens, output, &lens)
    }

    /// The same with parts of these lengths by rank.
    pub fn all_to_all_v(
        &mut self,
        input: &DeviceBuffer,
        send_lens: &[usize],
        output: &DeviceBuffer,
        recv_lens: &[usize],
    ) -> Checked {
        let call = "all_to_all_v";
        let (sends, recvs) =
            (self.parts(call, input, send_lens)?, self.parts(call, output, recv_lens)?);
        check_same(call, input, output, output.len())?;
        if input.overlaps(output) {
            return wrong(call, format!("{input:?} and {output:?} overlap"));
        }
        let own = self.rank as usize;
        if send_lens[own] != recv_lens[own] {
            let (sent, received) = (send_lens[own], recv_lens[own]);
            return wrong(call, format!("sends {sent} to itself but receives {received}"));
        }
        for (rank, (send, recv)) in sends.into_iter().zip(recvs).enumerate() {
            self.push_send(input.slice(send)?, rank as i32);
            self.push_recv(output.slice(recv)?, rank as i32);
        }
        Ok(())
    }

    /// Sends to another rank, which must receive as much of the same type.
    pub fn send(&mut self, buffer: &DeviceBuffer, to: Rank) -> Checked {
        let number = self.peer("send", to)?;
        self.push_send(buffer.clone(), number);
        Ok(())
    }

    /// Receives what another rank sends.
    pub fn recv(&mut self, buffer: &DeviceBuffer, from: Rank) -> Checked {
        let number = self.peer("recv", from)?;
        self.push_recv(buffer.clone(), number);
        Ok(())
    }

    /// A send, also to this rank itself if the group holds the receive.
    pub(super) fn push_send(&mut self, buffer: DeviceBuffer, to: i32) {
        if !buffer.is_empty() {
            self.calls.push(NcclCall::Send { buffer, to });
        }
    }

    /// The other side of [`Self::push_send`].
    pub(super) fn push_recv(&mut self, buffer: DeviceBuffer, from: i32) {
        if !buffer.is_empty() {
            self.calls.push(NcclCall::Recv { buffer, from });
        }
    }

    fn number(&self, call: &str, rank: Rank) -> Result<i32, CollectiveError> {
        match i32::try_from(rank.0) {
            Ok(number) if rank.0 < self.world => Ok(number),
            _ => wrong(call, format!("{rank} is not below the world size of {}", self.world)),
        }
    }

    fn peer(&self, call: &str, rank: Rank) -> Result<i32, CollectiveError> {
        if rank.0 == self.rank {
            return wrong(call, format!("{rank} is this rank itself"));
        }
        self.number(call, rank)
    }

    /// Where this rank's equal part begins, in bytes.
    fn own_bytes(&self, part: &DeviceBuffer) -> u64 {
        part.bytes() as u64 * u64::from(self.rank)
    }

    /// Consecutive parts of these lengths, which fill the buffer.
    fn parts(
        &self,
        call: &str,
        buffer: &DeviceBuffer,
        lens: &[usize],
    ) -> Result<Vec<Range<usize>>, CollectiveError> {
        let total = lens.iter().try_fold(0usize, |sum, len| sum.checked_add(*len));
        if lens.len() != self.world as usize || total != Some(buffer.len()) {
            let (world, found) = (self.world, lens.len());
            let message = format!("{found} lengths for {world} ranks and {buffer:?}: {lens:?}");
            return wrong(call, message);
        }
        let mut next = 0;
        Ok(lens
            .iter()
            .map(|len| {
                next += len;
                next - len..next
            })
            .collect())
    }
}

fn equal_part(rank: u32, len: usize) -> Range<usize> {
    rank as usize * len..(rank as usize + 1) * len
}

fn check_op(call: &str, buffer: &DeviceBuffer, op: ReduceOp) -> Checked {
    if op == ReduceOp::Avg && !buffer.element().is_float() {
        return wrong(call, format!("an average of {} would round", buffer.element()));
    }
    Ok(())
}

/// `other` has the same type and that many elements.
fn check_same(call: &str, buffer: &DeviceBuffer, other: &DeviceBuffer, len: usize) -> Checked {
    if buffer.element() != other.element() {
        return wrong(call, format!("{buffer:?} and {other:?} differ in type"));
    }
    if other.len() != len {
        return wrong(call, format!("{other:?} beside {buffer:?}: expected {len} elements"));
    }
    Ok(())
}

/// The two are apart, or `part` lies that many bytes inside of `whole`: in place.
fn check_overlap(call: &str, part: &DeviceBuffer, whole: &DeviceBuffer, at: u64) -> Checked {
    if part.overlaps(whole) && part.address() != whole.address() + at {
        return wrong(call, format!("{part:?} and {whole:?} overlap, but not in place"));
    }
    Ok(())
}
