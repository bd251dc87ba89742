//! The operations of a group on device memory, one by one.

use api::Rank;

use crate::buffer::ElementType;
use crate::buffer::{Buffer, BufferMut};
use crate::communicator::ReduceOp;
use crate::error::CollectiveError;
use crate::nccl::batch::{Pending, Step};
use crate::nccl::calls::Calls;
use crate::nccl::group::NcclGroup;
use crate::nccl::memory::{DeviceBuffer, PinnedMemory};

impl NcclGroup {
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
        let flag = self.scratch(ElementType::I32, 1)?;
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

    fn begin(
        &mut self,
        name: &'static str,
        add: impl FnOnce(&mut Calls) -> Result<(), CollectiveError>,
    ) -> Result<Pending, CollectiveError> {
        let mut calls = self.calls();
        add(&mut calls)?;
        self.submit(name, vec![Step::Nccl(calls.into_calls())], None)
    }
}

fn check_bytes(call: &str, buffer: &DeviceBuffer, bytes: usize) -> Result<(), CollectiveError> {
    if bytes != buffer.bytes() {
        let message = format!("{bytes} bytes of host memory for {buffer:?}");
        return Err(CollectiveError::InvalidDeviceCall { call: call.to_owned(), message });
    }
    Ok(())
}
