//! Memory of a GPU as typed, shared views, and pinned host memory to stage through.
//!
//! A [`DeviceBuffer`] holds a share of what it points to, so an operation that still runs keeps its
//! memory alive whatever its caller does. Two operations that race on device memory spoil its
//! contents and nothing else: no Rust reference ever points there.

#![allow(unsafe_code, reason = "allocation by the CUDA driver, and slices of pinned memory")]

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::buffer::ElementType;
use crate::error::CollectiveError;
use crate::nccl::device::{Device, Garbage};
use crate::nccl::ffi::{HOST_PORTABLE, Handle};

/// The driver refuses to allocate nothing; this is its own granularity.
const ALLOCATION_BYTES_MIN: usize = 256;

/// Elements of a GPU's memory, kept alive; cheap to clone and to cut.
#[derive(Clone)]
pub struct DeviceBuffer {
    address: u64,
    len: usize,
    element: ElementType,
    keep: Arc<dyn Any + Send + Sync>,
}

impl DeviceBuffer {
    /// Memory that another library allocated, a tensor for example.
    ///
    /// # Safety
    /// From `address` on there are `len` elements of device memory, which the GPU of every group
    /// that gets this buffer can read and write, for as long as `keep` lives.
    pub unsafe fn from_raw(
        address: u64,
        len: usize,
        element: ElementType,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { address, len, element, keep }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What an element is.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidDeviceCall`] if the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, CollectiveError> {
        if range.start > range.end || range.end > self.len {
            let message = format!("{range:?} is not inside of {} elements", self.len);
            return Err(CollectiveError::InvalidDeviceCall { call: "slice".into(), message });
        }
        let address = self.address + (range.start * self.element.bytes()) as u64;
        Ok(Self { address, len: range.len(), element: self.element, keep: self.keep.clone() })
    }

    /// The same memory as bytes.
    pub fn as_bytes(&self) -> Self {
        let (len, element) = (self.bytes(), ElementType::U8);
        Self { address: self.address, len, element, keep: self.keep.clone() }
    }

    /// Whether the two share memory.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let end = |buffer: &Self| buffer.address + buffer.bytes() as u64;
        !self.is_empty()
            && !other.is_empty()
            && self.address < end(other)
            && other.address < end(self)
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {:#x}", self.len, self.element, self.address)
    }
}

/// Memory of a GPU that this crate allocated: for staging and tests.
#[derive(Clone, Debug)]
pub struct DeviceMemory(Arc<Allocation>);

#[derive(Debug)]
struct Allocation {
    device: Device,
    address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// That many bytes, with arbitrary contents, aligned for every element type.
    ///
    /// # Errors
    /// [`CollectiveError::Cuda`] if there is not so much.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, CollectiveError> {
        let libraries = device.libraries();
        let _entered = device.enter()?;
        let mut address = 0;
        // SAFETY: a context is current; writes one address, which `Drop` gives up once.
        let code =
            unsafe { (libraries.cuda().allocate)(&mut address, bytes.max(ALLOCATION_BYTES_MIN)) };
        libraries.check_cuda("cuMemAlloc", code)?;
        Ok(Self(Arc::new(Allocation { device: device.clone(), address, bytes })))
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Its first elements.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidDeviceCall`] if it is shorter.
    pub fn buffer(
        &self,
        element: ElementType,
        len: usize,
    ) -> Result<DeviceBuffer, CollectiveError> {
        if len.checked_mul(element.bytes()).is_none_or(|bytes| bytes > self.bytes()) {
            let message = format!("{len} {element} are not inside of {} bytes", self.bytes());
            return Err(CollectiveError::InvalidDeviceCall { call: "buffer".into(), message });
        }
        Ok(DeviceBuffer { address: self.0.address, len, element, keep: self.0.clone() })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // The last share is gone, and every operation under way holds one.
        self.device.discard(Garbage::Device(self.address));
    }
}

/// Host memory that a GPU copies from and to without a detour.
///
/// One owner and no shares: it is *moved* into an operation and comes back when that has finished,
/// so a slice of it never meets a running copy.
pub(super) struct PinnedMemory {
    device: Device,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory with one owner; the driver frees it from any thread.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// That many bytes, all zero.
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Self, CollectiveError> {
        let libraries = device.libraries();
        let _entered = device.enter()?;
        let allocated = bytes.max(ALLOCATION_BYTES_MIN);
        let mut start = std::ptr::null_mut();
        // SAFETY: a context is current; writes one pointer, which `Drop` gives up once.
        let code =
            unsafe { (libraries.cuda().allocate_host)(&mut start, allocated, HOST_PORTABLE) };
        libraries.check_cuda("cuMemHostAlloc", code)?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| {
            CollectiveError::unavailable("pinned memory", "the driver returned no address")
        })?;
        // SAFETY: the driver just gave out `allocated` bytes from there on, to nobody else.
        unsafe { start.write_bytes(0, allocated) };
        Ok(Self { device: device.clone(), start, bytes })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `bytes` initialised bytes (zeroed by `new`), borrowed from their only owner; no
        // copy of the GPU is under way, for those own `self` (see `owner.rs`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({} bytes)", self.bytes)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // An operation under way would own it.
        self.device.discard(Garbage::Host(Handle(self.start.as_ptr().cast())));
    }
}
