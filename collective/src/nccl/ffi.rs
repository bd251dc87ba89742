//! The C types and constants of the NCCL and CUDA entry points that are used, and no others.
//!
//! From `nccl.h` (2.26.2 to 2.30.7 agree on all of it) and `cuda.h` (12 and 13). A handle is opaque
//! here: nothing in this crate ever looks behind one. A device address is a `u64`, as `CUdeviceptr`
//! is, also where nccl.h has `void *`: on 64-bit machines they are passed alike.

#![allow(unsafe_code, reason = "opaque handles may go to another thread")]

use std::ffi::{c_char, c_int, c_uint, c_void};

/// An opaque pointer that a library gave out: `ncclComm_t`, `CUcontext`, `CUstream`, `CUevent` …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Handle(pub *mut c_void);

// SAFETY: a handle is a number to this crate, never dereferenced. Which thread may pass it to which
// function is for the type that wraps it to argue (`Device`, `Stream`, `Comm`).
unsafe impl Send for Handle {}
// SAFETY: the same.
unsafe impl Sync for Handle {}

impl Handle {
    pub(super) const NULL: Self = Self(std::ptr::null_mut());

    pub(super) fn is_null(self) -> bool {
        self.0.is_null()
    }
}

const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "CUDA runs on 64-bit machines");

/// `ncclUniqueId`: `NCCL_UNIQUE_ID_BYTES` bytes, passed by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

pub(super) const UNIQUE_ID_BYTES: usize = 128;

/// The first 48 bytes of `ncclConfig_t`, which every supported version has in this layout.
///
/// NCCL reads `size` bytes and takes its own defaults for what lies behind. `traffic_class` is
/// named because it lies where the padding of a shorter structure would be.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Config {
    pub size: usize,
    pub magic: c_uint,
    pub version: c_uint,
    pub blocking: c_int,
    pub cga_cluster_size: c_int,
    pub min_ctas: c_int,
    pub max_ctas: c_int,
    pub net_name: *const c_char,
    pub split_share: c_int,
    pub traffic_class: c_int,
}

/// `NCCL_CONFIG_UNDEF_INT`
const UNDEFINED: c_int = c_int::MIN;
/// `NCCL_API_MAGIC`
const MAGIC: c_uint = 0xcafe_beef;
/// The version whose layout [`Config`] has: 2.26.2.
const CONFIG_VERSION: c_uint = 22602;

impl Config {
    /// A communicator whose calls return at once; its state is polled.
    pub(super) fn non_blocking(max_ctas: Option<u32>) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: max_ctas.and_then(|most| c_int::try_from(most).ok()).unwrap_or(UNDEFINED),
            net_name: std::ptr::null(),
            // A child that shared its parent's resources would fall with the parent's abort.
            split_share: 0,
            traffic_class: UNDEFINED,
        }
    }
}

/// `ncclSuccess` and `CUDA_SUCCESS`
pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`: not an error, the state of a call that goes on.
pub(super) const IN_PROGRESS: c_int = 7;

/// `NCCL_SPLIT_NOCOLOR`
pub(super) const SPLIT_NO_COLOR: c_int = -1;
/// `NCCL_SHRINK_DEFAULT`
pub(super) const SHRINK_DEFAULT: c_int = 0;
/// `NCCL_SHRINK_ABORT`
pub(super) const SHRINK_ABORT: c_int = 1;
/// `NCCL_REVOKE_DEFAULT`
pub(super) const REVOKE_DEFAULT: c_int = 0;

/// `CUDA_ERROR_NOT_READY`: not an error, the answer of a query.
pub(super) const CUDA_NOT_READY: c_int = 600;
/// `CU_STREAM_NON_BLOCKING`: no implicit ordering with the legacy default stream.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`: cheaper to record and to query.
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CU_MEMHOSTALLOC_PORTABLE`: pinned for every context.
pub(super) const HOST_PORTABLE: c_uint = 1;

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_configuration_has_the_layout_of_the_header() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, max_ctas), 28);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(offset_of!(Config, traffic_class), 44);
        assert_eq!(size_of::<UniqueId>(), 128);
    }
}
