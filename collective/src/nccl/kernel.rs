//! The arithmetic of the fixed-order sum on a GPU: `sum.ptx`, compiled by the driver when a group
//! forms.

#![allow(unsafe_code, reason = "loading and launching kernels by the CUDA driver")]

use std::ffi::{CString, c_void};
use std::rc::Rc;

use crate::buffer::ElementType;
use crate::communicator::ReduceOp;
use crate::error::CollectiveError;
use crate::nccl::device::Device;
use crate::nccl::ffi::Handle;
use crate::nccl::memory::DeviceBuffer;
use crate::nccl::stream::Stream;

const PTX: &str = include_str!("sum.ptx");
/// Threads per block: a multiple of a warp, small enough for every GPU.
const BLOCK_THREADS: u32 = 256;
/// Blocks at most: enough to fill a GPU; threads stride over what is left.
const BLOCKS_MAX: usize = 4096;

/// What a kernel is there for; the rest is combined on the host.
pub(super) const fn has_kernel(element: ElementType, op: ReduceOp) -> bool {
    match op {
        ReduceOp::Sum => !matches!(element, ElementType::Bf16 | ElementType::F16),
        ReduceOp::Avg => matches!(element, ElementType::F32 | ElementType::F64),
        // PTX has maxima that keep a NaN, but only from sm_80 on and with another NaN's bits.
        ReduceOp::Max | ReduceOp::Min => false,
    }
}

/// The loaded kernels; of the thread that loaded them.
pub(super) struct Kernels {
    device: Device,
    module: Handle,
    sums: Vec<(ElementType, Handle)>,
    divisions: Vec<(ElementType, Handle)>,
    /// Launched by the thread that owns the stream.
    stays: std::marker::PhantomData<Rc<()>>,
}

impl Kernels {
    /// Compiles them for this GPU, in its current context.
    pub(super) fn load(device: &Device) -> Result<Self, CollectiveError> {
        let libraries = device.libraries();
        let text = terminated(PTX)?;
        let mut module = Handle::NULL;
        // SAFETY: the text ends with NUL, as the driver asks for PTX; writes one handle, unloaded
        // once, in `Drop`.
        let code = unsafe { (libraries.cuda().module_load)(&mut module, text.as_ptr().cast()) };
        libraries.check_cuda("cuModuleLoadData", code)?;
        let mut kernels = Self {
            device: device.clone(),
            module,
            sums: Vec::new(),
            divisions: Vec::new(),
            stays: std::marker::PhantomData,
        };
        for element in ElementType::ALL {
            if has_kernel(element, ReduceOp::Sum) {
                kernels.sums.push((element, kernels.function(&format!("sum_{element}"))?));
            }
            if has_kernel(element, ReduceOp::Avg) {
                kernels.divisions.push((element, kernels.function(&format!("divide_{element}"))?));
            }
        }
        Ok(kernels)
    }

    fn function(&self, name: &str) -> Result<Handle, CollectiveError> {
        let libraries = self.device.libraries();
        let name = terminated(name)?;
        let mut function = Handle::NULL;
        // SAFETY: a loaded module and a NUL-terminated name; writes one handle, which lives as long
        // as the module.
        let code = unsafe {
            (libraries.cuda().module_function)(&mut function, self.module, name.as_ptr())
        };
        libraries.check_cuda("cuModuleGetFunction", code)?;
        Ok(function)
    }

    /// Enqueues `into = left + right`; the three may be the same.
    ///
    /// # Safety
    /// The buffers stay alive until an event recorded afterwards is done.
    pub(super) unsafe fn sum(
        &self,
        stream: &Stream,
        into: &DeviceBuffer,
        left: &DeviceBuffer,
        right: &DeviceBuffer,
    ) -> Result<(), CollectiveError> {
        let function = find(&self.sums, into, &[left, right])?;
        let (mut into_at, mut left_at, mut right_at) =
            (into.address(), left.address(), right.address());
        let mut count = into.len() as u64;
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut into_at).cast(),
            (&raw mut left_at).cast(),
            (&raw mut right_at).cast(),
            (&raw mut count).cast(),
        ];
        // SAFETY: `sum_T` takes three addresses and a count, all of 64 bits, and touches `count`
        // elements at each, which `find` has compared; alive as the caller promises.
        unsafe { self.launch(stream, function, into.len(), &mut arguments) }
    }

    /// Enqueues `buffer = buffer / by`.
    ///
    /// # Safety
    /// The buffer stays alive until an event recorded afterwards is done.
    pub(super) unsafe fn divide(
        &self,
        stream: &Stream,
        buffer: &DeviceBuffer,
        by: u32,
    ) -> Result<(), CollectiveError> {
        let function = find(&self.divisions, buffer, &[])?;
        #[allow(clippy::cast_precision_loss, reason = "as the CPU does it: a rank count")]
        let (mut single, mut double) = (by as f32, f64::from(by));
        let divisor: *mut c_void = match buffer.element() {
            ElementType::F64 => (&raw mut double).cast(),
            _ => (&raw mut single).cast(),
        };
        let (mut address, mut count) = (buffer.address(), buffer.len() as u64);
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut address).cast(), divisor, (&raw mut count).cast()];
        // SAFETY: `divide_T` takes an address, a T (f32 or f64, chosen above as `find` chose the
        // function) and a count, and touches `count` elements; alive as the caller promises.
        unsafe { self.launch(stream, function, buffer.len(), &mut arguments) }
    }

    /// # Safety
    /// `arguments` point to values of the types that the function takes, and what it touches stays
    /// alive until an event recorded afterwards is done.
    unsafe fn launch(
        &self,
        stream: &Stream,
        function: Handle,
        count: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CollectiveError> {
        let blocks = count.div_ceil(BLOCK_THREADS as usize).clamp(1, BLOCKS_MAX) as u32;
        let libraries = self.device.libraries();
        // SAFETY: a function of a loaded module; the driver copies the arguments before it returns.
        let code = unsafe {
            (libraries.cuda().launch)(
                function,
                blocks,
                1,
                1,
                BLOCK_THREADS,
                1,
                1,
                0,
                stream.handle(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        libraries.check_cuda("cuLaunchKernel", code)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once, by the thread whose stream runs the kernels, after
        // the stream is idle or given up (see `owner.rs`).
        unsafe { (self.device.libraries().cuda().module_unload)(self.module) };
    }
}

fn find(
    functions: &[(ElementType, Handle)],
    into: &DeviceBuffer,
    operands: &[&DeviceBuffer],
) -> Result<Handle, CollectiveError> {
    let wrong = |message| CollectiveError::InvalidDeviceCall { call: "sum".into(), message };
    let fits =
        |buffer: &&DeviceBuffer| buffer.element() == into.element() && buffer.len() == into.len();
    if !operands.iter().all(fits) {
        return Err(wrong(format!("{operands:?} do not fit {into:?}")));
    }
    let function = functions.iter().find(|(element, _)| *element == into.element());
    function.map(|(_, handle)| *handle).ok_or_else(|| wrong(format!("no kernel for {into:?}")))
}

fn terminated(text: &str) -> Result<CString, CollectiveError> {
    CString::new(text)
        .map_err(|error| CollectiveError::unavailable("sum kernels", error.to_string()))
}
