//! A private stream of a GPU and its events.

#![allow(unsafe_code, reason = "calls of the CUDA driver")]

use std::ffi::c_void;
use std::rc::Rc;

use crate::error::CollectiveError;
use crate::nccl::device::Device;
use crate::nccl::ffi::{
    CUDA_NOT_READY, EVENT_DISABLE_TIMING, Handle, STREAM_NON_BLOCKING, SUCCESS,
};
use crate::nccl::library::Libraries;
use crate::nccl::memory::{DeviceBuffer, PinnedMemory};

/// A stream of another library, to be joined with a group's own.
#[derive(Clone, Copy, Debug)]
pub struct ForeignStream(Handle);

impl ForeignStream {
    /// From a `CUstream` or `cudaStream_t`.
    ///
    /// # Safety
    /// The stream belongs to the GPU of every group that gets it, and is not destroyed before the
    /// last call with it has returned.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self(Handle(stream))
    }
}

/// The compute work that a group's communication is ordered against.
#[derive(Clone, Copy, Debug)]
pub enum Compute {
    /// One stream.
    Stream(ForeignStream),
    /// Every stream of the GPU's primary context, for a tensor library that keeps its streams to
    /// itself. Needs a driver for CUDA 12.5. It covers the streams of every rank in the process
    /// that shares the GPU, so such ranks (only tests have them) would wait for each other.
    Context,
}

/// A stream without implicit ordering; made and used by one thread, in the context it entered.
pub(super) struct Stream {
    device: Device,
    stream: Handle,
}

/// A point in a stream; of the same thread as the stream.
pub(super) struct Event {
    device: Device,
    event: Handle,
    /// Events are recorded and queried by the thread that made them.
    stays: std::marker::PhantomData<Rc<()>>,
}

impl Event {
    pub(super) fn new(device: &Device) -> Result<Self, CollectiveError> {
        let libraries = device.libraries();
        let mut event = Handle::NULL;
        // SAFETY: writes one handle, destroyed once, in `Drop`.
        let code = unsafe { (libraries.cuda().event_create)(&mut event, EVENT_DISABLE_TIMING) };
        libraries.check_cuda("cuEventCreate", code)?;
        Ok(Self { device: device.clone(), event, stays: std::marker::PhantomData })
    }

    /// Whether everything before its last recording has finished.
    pub(super) fn is_done(&self) -> Result<bool, CollectiveError> {
        let libraries = self.device.libraries();
        // SAFETY: a valid event.
        is_ready(libraries, "cuEventQuery", unsafe { (libraries.cuda().event_query)(self.event) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; the driver lets what waits for it finish.
        unsafe { (self.device.libraries().cuda().event_destroy)(self.event) };
    }
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Self, CollectiveError> {
        let libraries = device.libraries();
        let mut stream = Handle::NULL;
        // SAFETY: writes one handle, destroyed once, in `Drop`.
        let code = unsafe { (libraries.cuda().stream_create)(&mut stream, STREAM_NON_BLOCKING) };
        libraries.check_cuda("cuStreamCreate", code)?;
        Ok(Self { device: device.clone(), stream })
    }

    pub(super) fn handle(&self) -> Handle {
        self.stream
    }

    fn libraries(&self) -> &Libraries {
        self.device.libraries()
    }

    /// Whether everything enqueued has finished.
    pub(super) fn is_idle(&self) -> Result<bool, CollectiveError> {
        // SAFETY: a valid stream.
        let code = unsafe { (self.libraries().cuda().stream_query)(self.stream) };
        is_ready(self.libraries(), "cuStreamQuery", code)
    }

    /// Marks what is enqueued so far.
    pub(super) fn record(&self, event: &Event) -> Result<(), CollectiveError> {
        // SAFETY: a valid event and a valid stream of the same context.
        let code = unsafe { (self.libraries().cuda().event_record)(event.event, self.stream) };
        self.libraries().check_cuda("cuEventRecord", code)
    }

    /// What is enqueued from now on runs after the compute work enqueued so far.
    pub(super) fn wait_for(&self, compute: Compute, event: &Event) -> Result<(), CollectiveError> {
        let (libraries, cuda) = (self.libraries(), self.libraries().cuda());
        let recorded = match compute {
            // SAFETY: a valid event; the stream is valid as `ForeignStream::from_raw` demands.
            Compute::Stream(stream) => unsafe { (cuda.event_record)(event.event, stream.0) },
            Compute::Context => {
                let record = Libraries::newer_driver(cuda.context_record, "cuCtxRecordEvent")?;
                // SAFETY: the event belongs to this context, which `device` keeps.
                unsafe { record(self.device.context(), event.event) }
            }
        };
        libraries.check_cuda("cuEventRecord", recorded)?;
        // SAFETY: a valid stream and a recorded event.
        let code = unsafe { (cuda.stream_wait)(self.stream, event.event, 0) };
        libraries.check_cuda("cuStreamWaitEvent", code)
    }

    /// Compute work enqueued from now on runs after what is enqueued here so far.
    pub(super) fn release(&self, compute: Compute, event: &Event) -> Result<(), CollectiveError> {
        let (libraries, cuda) = (self.libraries(), self.libraries().cuda());
        self.record(event)?;
        let waiting = match compute {
            // SAFETY: a recorded event; the stream is valid as `ForeignStream::from_raw` demands.
            Compute::Stream(stream) => unsafe { (cuda.stream_wait)(stream.0, event.event, 0) },
            Compute::Context => {
                let wait = Libraries::newer_driver(cuda.context_wait, "cuCtxWaitEvent")?;
                // SAFETY: a recorded event of this context, which `device` keeps.
                unsafe { wait(self.device.context(), event.event) }
            }
        };
        libraries.check_cuda("cuStreamWaitEvent", waiting)
    }

    /// Enqueues a copy; of the length of the shorter.
    ///
    /// # Safety
    /// Both buffers stay alive until an event recorded afterwards is done.
    pub(super) unsafe fn copy(
        &self,
        from: &DeviceBuffer,
        to: &DeviceBuffer,
    ) -> Result<(), CollectiveError> {
        let bytes = from.bytes().min(to.bytes());
        // SAFETY: both hold that many bytes of device memory, for as long as the caller promises.
        let code = unsafe {
            (self.libraries().cuda().copy_on_device)(
                to.address(),
                from.address(),
                bytes,
                self.stream,
            )
        };
        self.libraries().check_cuda("cuMemcpyDtoDAsync", code)
    }

    /// Enqueues a copy of the bytes from `offset` on into a buffer.
    ///
    /// # Safety
    /// Both stay alive until an event recorded afterwards is done, and nobody writes `from` before.
    pub(super) unsafe fn copy_to_device(
        &self,
        from: &PinnedMemory,
        offset: usize,
        to: &DeviceBuffer,
    ) -> Result<(), CollectiveError> {
        check_staged(from, offset, to)?;
        // SAFETY: inside of the pinned memory, as just checked; alive as the caller promises.
        let code = unsafe {
            let source = from.start().add(offset).cast_const().cast();
            (self.libraries().cuda().copy_to_device)(to.address(), source, to.bytes(), self.stream)
        };
        self.libraries().check_cuda("cuMemcpyHtoDAsync", code)
    }

    /// Enqueues a copy of a buffer to the bytes from `offset` on.
    ///
    /// # Safety
    /// Both stay alive until an event recorded afterwards is done, and nobody looks at `to` before.
    pub(super) unsafe fn copy_to_host(
        &self,
        from: &DeviceBuffer,
        to: &PinnedMemory,
        offset: usize,
    ) -> Result<(), CollectiveError> {
        check_staged(to, offset, from)?;
        // SAFETY: inside of the pinned memory, as just checked; alive as the caller promises.
        let code = unsafe {
            let target = to.start().add(offset).cast();
            (self.libraries().cuda().copy_to_host)(
                target,
                from.address(),
                from.bytes(),
                self.stream,
            )
        };
        self.libraries().check_cuda("cuMemcpyDtoHAsync", code)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; the driver lets what is enqueued finish.
        unsafe { (self.device.libraries().cuda().stream_destroy)(self.stream) };
    }
}

fn is_ready(libraries: &Libraries, call: &str, code: i32) -> Result<bool, CollectiveError> {
    match code {
        SUCCESS => Ok(true),
        CUDA_NOT_READY => Ok(false),
        code => libraries.check_cuda(call, code).map(|()| true),
    }
}

fn check_staged(
    stage: &PinnedMemory,
    offset: usize,
    buffer: &DeviceBuffer,
) -> Result<(), CollectiveError> {
    let end = offset.checked_add(buffer.bytes());
    if end.is_none_or(|end| end > stage.bytes()) {
        let message = format!("{buffer:?} from byte {offset} on are not inside of {stage:?}");
        return Err(CollectiveError::InvalidDeviceCall { call: "stage".into(), message });
    }
    Ok(())
}
