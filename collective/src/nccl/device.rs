//! A GPU: its primary context, shared with the tensor library of the same process.

#![allow(unsafe_code, reason = "calls of the CUDA driver")]

use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::error::CollectiveError;
use crate::nccl::ffi::Handle;
use crate::nccl::library::Libraries;

/// A GPU of this machine, with its context; cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<Primary>);

struct Primary {
    libraries: Libraries,
    ordinal: u32,
    context: Handle,
    uuid: [u8; 16],
    garbage: Sender<Garbage>,
}

/// Memory that nobody uses any more.
pub(super) enum Garbage {
    /// From `cuMemAlloc`.
    Device(u64),
    /// From `cuMemHostAlloc`.
    Host(Handle),
}

impl Device {
    /// The GPU of that number among those that the process may see.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`] if there is none of that number,
    /// [`CollectiveError::Cuda`] if the driver refuses it.
    pub fn new(libraries: &Libraries, ordinal: u32) -> Result<Self, CollectiveError> {
        let cuda = libraries.cuda();
        let mut count = 0;
        // SAFETY: as cuda.h declares it; writes one integer.
        let code = unsafe { (cuda.device_count)(&mut count) };
        libraries.check_cuda("cuDeviceGetCount", code)?;
        let number = c_int::try_from(ordinal).ok().filter(|number| *number < count);
        let Some(number) = number else {
            let message = format!("this process sees {count} GPUs (see CUDA_VISIBLE_DEVICES)");
            return Err(CollectiveError::unavailable(format!("GPU {ordinal}"), message));
        };
        let mut device = 0;
        let mut uuid = [0; 16];
        let mut context = Handle::NULL;
        // SAFETY: as cuda.h declares them; each writes one value of that type, and the context is
        // released once, at the end of `reap`.
        unsafe {
            libraries.check_cuda("cuDeviceGet", (cuda.device)(&mut device, number))?;
            libraries.check_cuda("cuDeviceGetUuid", (cuda.device_uuid)(&mut uuid, device))?;
            let code = (cuda.context_retain)(&mut context, device);
            libraries.check_cuda("cuDevicePrimaryCtxRetain", code)?;
        }
        let libraries = libraries.clone();
        let (garbage, received) = channel();
        let reaper = libraries.clone();
        std::thread::Builder::new()
            .name(format!("cuda-free-{ordinal}"))
            .spawn(move || reap(&reaper, device, context, &received))
            .map_err(|error| CollectiveError::socket("start a thread for CUDA", error))?;
        Ok(Self(Arc::new(Primary { libraries, ordinal, context, uuid, garbage })))
    }

    /// Frees memory, soon and on another thread.
    pub(super) fn discard(&self, garbage: Garbage) {
        // The other end is gone only if it could not enter the context: then nothing can be freed.
        let _ = self.0.garbage.send(garbage);
    }

    /// Its number in this process.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// Which GPU it is, whatever its number.
    pub(super) fn uuid(&self) -> [u8; 16] {
        self.0.uuid
    }

    /// The libraries that drive it.
    pub fn libraries(&self) -> &Libraries {
        &self.0.libraries
    }

    pub(super) fn context(&self) -> Handle {
        self.0.context
    }

    /// The calling thread works with this GPU until the guard goes.
    pub(super) fn enter(&self) -> Result<Entered<'_>, CollectiveError> {
        // SAFETY: the context is retained as long as `self`; the guard pops what this pushes, on
        // the same thread, because it is neither `Send` nor outlives `self`.
        let code = unsafe { (self.libraries().cuda().context_push)(self.context()) };
        self.libraries().check_cuda("cuCtxPushCurrent", code)?;
        Ok(Entered { device: self, stays: std::marker::PhantomData })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.0.ordinal)
    }
}

/// Frees memory on a thread of its own until the last `Device` and all memory are gone, then lets
/// go of the context.
///
/// The driver may wait in a free until the whole GPU is idle, so until the peers of a running
/// operation have joined it; a thread that has to look at an abort flag must not.
fn reap(libraries: &Libraries, device: c_int, context: Handle, garbage: &Receiver<Garbage>) {
    let cuda = libraries.cuda();
    // SAFETY: the context is retained until the end of this function.
    let entered = unsafe { (cuda.context_push)(context) };
    if let Err(error) = libraries.check_cuda("cuCtxPushCurrent", entered) {
        tracing::warn!(%error, "memory of a GPU is not freed");
        return;
    }
    for found in garbage {
        // SAFETY: whoever sends it owned it and does not use it again; it was allocated in this
        // context and is freed once, here. An error means that the driver is shutting down or the
        // GPU is broken: then its memory is gone as it is.
        let _ = unsafe {
            match found {
                Garbage::Device(address) => (cuda.free)(address),
                Garbage::Host(Handle(start)) => (cuda.free_host)(start),
            }
        };
    }
    let mut popped = Handle::NULL;
    // SAFETY: pushed and retained above and in `Device::new`; the last user has gone, for every
    // user holds a `Device` and so the sender.
    unsafe {
        (cuda.context_pop)(&mut popped);
        (cuda.context_release)(device);
    }
}

/// A thread's stay in a GPU's context.
pub(super) struct Entered<'a> {
    device: &'a Device,
    /// Contexts are a stack per thread.
    stays: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = Handle::NULL;
        // SAFETY: writes one handle; guards of a thread end in the reverse of their order, so what
        // is popped is what `enter` pushed.
        unsafe { (self.device.libraries().cuda().context_pop)(&mut popped) };
        let _ = self.stays;
    }
}
