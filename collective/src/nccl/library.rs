//! NCCL and the CUDA driver, opened at run time: where they are missing, that is one clear error.
//!
//! A small loader of our own, because it must look for the name with the version (`libnccl.so.2`,
//! which is all that a runtime package installs) and must never panic over a missing symbol.
//! Libraries stay open until the process ends: both start threads of their own.

#![allow(unsafe_code, reason = "opening a library and naming the type of its symbols")]

use std::ffi::{CStr, OsString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::CollectiveError;
use crate::nccl::ffi::{Config, Handle, SUCCESS, UniqueId};
use crate::nccl::version::{NcclVersion, OLDEST};

/// The environment variable with the path of NCCL, for one that the system's loader does not find.
pub const LIBRARY_VARIABLE: &str = "COHORT_NCCL_LIBRARY";

const NCCL_NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const CUDA_NAMES: [&str; 1] = ["libcuda.so.1"];
const NCCL_ADVICE: &str = "install NCCL (package libnccl2 or nvidia-nccl-cu12/13) or give its path \
                           in COHORT_NCCL_LIBRARY";
const CUDA_ADVICE: &str = "install the NVIDIA driver, or start the container with its GPUs";

/// Where to look; what is not given is looked for by its usual names.
#[derive(Clone, Debug, Default)]
pub struct LibraryPaths {
    /// NCCL.
    pub nccl: Option<PathBuf>,
    /// The CUDA driver.
    pub cuda: Option<PathBuf>,
}

impl LibraryPaths {
    /// What the environment says: [`LIBRARY_VARIABLE`].
    pub fn from_environment() -> Self {
        let nccl = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
        Self { nccl: nccl.map(PathBuf::from), cuda: None }
    }
}

/// NCCL and the CUDA driver, ready for calls; cheap to clone.
#[derive(Clone, Debug)]
pub struct Libraries(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    nccl: NcclFunctions,
    cuda: CudaFunctions,
    version: NcclVersion,
}

impl Libraries {
    /// Opens both, checks NCCL's version and starts the driver.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`], with what was looked for and what to do.
    pub fn open(paths: &LibraryPaths) -> Result<Self, CollectiveError> {
        let mut opened = Opened::find("NCCL", paths.nccl.as_ref(), &NCCL_NAMES, NCCL_ADVICE)?;
        // The version first: an old library is to be called old, not incomplete.
        let version = opened.version()?;
        opened.version = Some(version);
        if let Some(message) = version.refusal() {
            return Err(CollectiveError::unavailable(opened.path(), message));
        }
        let nccl = NcclFunctions::load(&opened)?;
        opened.keep();
        let opened = Opened::find("CUDA driver", paths.cuda.as_ref(), &CUDA_NAMES, CUDA_ADVICE)?;
        let cuda = CudaFunctions::load(&opened)?;
        opened.keep();
        let libraries = Self(Arc::new(Loaded { nccl, cuda, version }));
        // SAFETY: as cuda.h declares it; it may be called any number of times, by any thread.
        let code = unsafe { (libraries.cuda().init)(0) };
        libraries.check_cuda("cuInit", code)?;
        Ok(libraries)
    }

    /// The version of NCCL that was found.
    pub fn nccl_version(&self) -> NcclVersion {
        self.0.version
    }

    pub(super) fn nccl(&self) -> &NcclFunctions {
        &self.0.nccl
    }

    pub(super) fn cuda(&self) -> &CudaFunctions {
        &self.0.cuda
    }

    /// An optional NCCL function, or the error that it needs a newer version.
    pub(super) fn newer<F: Copy>(
        &self,
        function: Option<F>,
        symbol: &str,
        since: NcclVersion,
    ) -> Result<F, CollectiveError> {
        function.ok_or_else(|| {
            let found = self.nccl_version();
            let message = format!("NCCL {found} does not have it, {since} or newer is needed");
            CollectiveError::unavailable(symbol, message)
        })
    }

    /// An optional function of the driver, or the error that it needs a newer one.
    pub(super) fn newer_driver<F: Copy>(
        function: Option<F>,
        symbol: &str,
    ) -> Result<F, CollectiveError> {
        function.ok_or_else(|| {
            let message = "this CUDA driver does not have it, one for CUDA 12.5 or newer is needed";
            CollectiveError::unavailable(symbol, message)
        })
    }

    /// The error of a CUDA call, if its result is one.
    pub(super) fn check_cuda(&self, call: &str, code: c_int) -> Result<(), CollectiveError> {
        if code == SUCCESS {
            return Ok(());
        }
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both write one pointer, to a static string or null, through a valid reference.
        unsafe {
            (self.cuda().error_name)(code, &mut name);
            (self.cuda().error_string)(code, &mut text);
        }
        let message = format!("{}: {}", shown(name), shown(text));
        Err(CollectiveError::Cuda { call: call.to_owned(), code, message })
    }

    /// The error of an NCCL call, if its result is one; `communicator` may know more of it.
    pub(super) fn check_nccl(
        &self,
        call: &str,
        code: c_int,
        communicator: Handle,
    ) -> Result<(), CollectiveError> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the first returns a static string for every integer; the second a string of the
        // calling thread or of the communicator, which is null or valid (callers own it), and it
        // is copied at once.
        let (text, last) =
            unsafe { ((self.nccl().error_string)(code), (self.nccl().last_error)(communicator)) };
        let last = shown(last);
        let separator = if last.is_empty() { "" } else { ": " };
        let message = format!("{}{separator}{last}", shown(text));
        Err(CollectiveError::Nccl { call: call.to_owned(), code, message })
    }
}

/// A copy of a C string of a library; empty for none.
fn shown(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and both libraries document their messages as NUL-terminated strings that
    // outlive the call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

/// An open library and the name it was found by.
struct Opened {
    library: libloading::Library,
    name: OsString,
    what: &'static str,
    advice: &'static str,
    version: Option<NcclVersion>,
}

impl Opened {
    fn find(
        what: &'static str,
        path: Option<&PathBuf>,
        names: &[&str],
        advice: &'static str,
    ) -> Result<Self, CollectiveError> {
        let candidates: Vec<OsString> = match path {
            Some(path) => vec![path.clone().into_os_string()],
            None => names.iter().map(OsString::from).collect(),
        };
        let mut causes = Vec::new();
        for name in candidates {
            // SAFETY: opening runs the library's constructors. The file is the one that the
            // administrator installed or named for this purpose: NCCL or the driver, whose
            // constructors have no precondition.
            match unsafe { libloading::Library::new(&name) } {
                Ok(library) => return Ok(Self { library, name, what, advice, version: None }),
                Err(error) => causes.push(format!("`{}`: {error}", name.to_string_lossy())),
            }
        }
        let message = format!("cannot open {}; {advice}", causes.join("; "));
        Err(CollectiveError::unavailable(what, message))
    }

    fn path(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    /// A symbol, if the library has it.
    ///
    /// # Safety
    /// `F` is the type of that function, as the library's header declares it.
    unsafe fn optional<F: Copy>(&self, symbol: &str) -> Option<F> {
        // SAFETY: the caller names the type; the copy outlives the borrow because the library is
        // never closed (`keep`), and is not used where loading fails before that.
        unsafe { self.library.get::<F>(symbol.as_bytes()) }.ok().map(|found| *found)
    }

    /// A symbol that must be there.
    ///
    /// # Safety
    /// As for [`Self::optional`].
    unsafe fn required<F: Copy>(&self, symbol: &str) -> Result<F, CollectiveError> {
        // SAFETY: the caller names the type.
        unsafe { self.optional(symbol) }.ok_or_else(|| {
            let version = self.version.map_or(String::new(), |found| format!(" (version {found})"));
            let message = format!(
                "`{}`{version} has no symbol `{symbol}`: it is no usable library; {}",
                self.path(),
                self.advice
            );
            CollectiveError::unavailable(self.what, message)
        })
    }

    /// NCCL's version.
    fn version(&self) -> Result<NcclVersion, CollectiveError> {
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut code = 0;
        // SAFETY: `ncclGetVersion` of nccl.h has this type and writes one integer; it needs no
        // GPU.
        let result = unsafe { self.required::<GetVersion>("ncclGetVersion")?(&mut code) };
        if result != SUCCESS {
            let message = format!("ncclGetVersion failed with code {result}; {OLDEST} is needed");
            return Err(CollectiveError::unavailable(self.path(), message));
        }
        Ok(NcclVersion::from_code(code))
    }

    /// Never closes the library.
    fn keep(self) {
        std::mem::forget(self.library);
    }
}

/// A table of functions: a field, its symbol and its type; some may be missing.
macro_rules! functions {
    (
        $(#[$meta:meta])* $name:ident {
            $($field:ident = $symbol:literal: ($($arg:ty),*) -> $result:ty;)*
        }
        optional {
            $($newer:ident = $newer_symbol:literal: ($($newer_arg:ty),*) -> $newer_result:ty;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub(super) struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> $result,)*
            $(pub $newer: Option<unsafe extern "C" fn($($newer_arg),*) -> $newer_result>,)*
        }

        impl $name {
            fn load(library: &Opened) -> Result<Self, CollectiveError> {
                Ok(Self {
                    // SAFETY: the types below are those of the header, read side by side.
                    $($field: unsafe { library.required($symbol)? },)*
                    // SAFETY: the same.
                    $($newer: unsafe { library.optional($newer_symbol) },)*
                })
            }
        }
    };
}

functions! {
    /// NCCL, as nccl.h declares it.
    NcclFunctions {
        unique_id = "ncclGetUniqueId": (*mut UniqueId) -> c_int;
        init = "ncclCommInitRankConfig":
            (*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
        finalize = "ncclCommFinalize": (Handle) -> c_int;
        destroy = "ncclCommDestroy": (Handle) -> c_int;
        abort = "ncclCommAbort": (Handle) -> c_int;
        async_error = "ncclCommGetAsyncError": (Handle, *mut c_int) -> c_int;
        error_string = "ncclGetErrorString": (c_int) -> *const c_char;
        last_error = "ncclGetLastError": (Handle) -> *const c_char;
        group_start = "ncclGroupStart": () -> c_int;
        group_end = "ncclGroupEnd": () -> c_int;
        all_reduce = "ncclAllReduce": (u64, u64, usize, c_int, c_int, Handle, Handle) -> c_int;
        reduce = "ncclReduce": (u64, u64, usize, c_int, c_int, c_int, Handle, Handle) -> c_int;
        reduce_scatter = "ncclReduceScatter":
            (u64, u64, usize, c_int, c_int, Handle, Handle) -> c_int;
        all_gather = "ncclAllGather": (u64, u64, usize, c_int, Handle, Handle) -> c_int;
        broadcast = "ncclBroadcast": (u64, u64, usize, c_int, c_int, Handle, Handle) -> c_int;
        send = "ncclSend": (u64, usize, c_int, c_int, Handle, Handle) -> c_int;
        recv = "ncclRecv": (u64, usize, c_int, c_int, Handle, Handle) -> c_int;
    }
    optional {
        split = "ncclCommSplit": (Handle, c_int, c_int, *mut Handle, *mut Config) -> c_int;
        shrink = "ncclCommShrink":
            (Handle, *mut c_int, c_int, *mut Handle, *mut Config, c_int) -> c_int;
        revoke = "ncclCommRevoke": (Handle, c_int) -> c_int;
        register = "ncclCommRegister": (Handle, u64, usize, *mut Handle) -> c_int;
        deregister = "ncclCommDeregister": (Handle, Handle) -> c_int;
    }
}

functions! {
    /// The CUDA driver, as cuda.h declares it; a name ending in `_v2` is what the plain name means
    /// there.
    CudaFunctions {
        init = "cuInit": (c_uint) -> c_int;
        error_name = "cuGetErrorName": (c_int, *mut *const c_char) -> c_int;
        error_string = "cuGetErrorString": (c_int, *mut *const c_char) -> c_int;
        device_count = "cuDeviceGetCount": (*mut c_int) -> c_int;
        device = "cuDeviceGet": (*mut c_int, c_int) -> c_int;
        device_uuid = "cuDeviceGetUuid_v2": (*mut [u8; 16], c_int) -> c_int;
        context_retain = "cuDevicePrimaryCtxRetain": (*mut Handle, c_int) -> c_int;
        context_release = "cuDevicePrimaryCtxRelease_v2": (c_int) -> c_int;
        context_push = "cuCtxPushCurrent_v2": (Handle) -> c_int;
        context_pop = "cuCtxPopCurrent_v2": (*mut Handle) -> c_int;
        allocate = "cuMemAlloc_v2": (*mut u64, usize) -> c_int;
        free = "cuMemFree_v2": (u64) -> c_int;
        allocate_host = "cuMemHostAlloc": (*mut *mut c_void, usize, c_uint) -> c_int;
        free_host = "cuMemFreeHost": (*mut c_void) -> c_int;
        copy_to_device = "cuMemcpyHtoDAsync_v2": (u64, *const c_void, usize, Handle) -> c_int;
        copy_to_host = "cuMemcpyDtoHAsync_v2": (*mut c_void, u64, usize, Handle) -> c_int;
        copy_on_device = "cuMemcpyDtoDAsync_v2": (u64, u64, usize, Handle) -> c_int;
        stream_create = "cuStreamCreate": (*mut Handle, c_uint) -> c_int;
        stream_destroy = "cuStreamDestroy_v2": (Handle) -> c_int;
        stream_query = "cuStreamQuery": (Handle) -> c_int;
        stream_wait = "cuStreamWaitEvent": (Handle, Handle, c_uint) -> c_int;
        event_create = "cuEventCreate": (*mut Handle, c_uint) -> c_int;
        event_destroy = "cuEventDestroy_v2": (Handle) -> c_int;
        event_record = "cuEventRecord": (Handle, Handle) -> c_int;
        event_query = "cuEventQuery": (Handle) -> c_int;
        module_load = "cuModuleLoadData": (*mut Handle, *const c_void) -> c_int;
        module_unload = "cuModuleUnload": (Handle) -> c_int;
        module_function = "cuModuleGetFunction": (*mut Handle, Handle, *const c_char) -> c_int;
        launch = "cuLaunchKernel": (
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
            *mut *mut c_void, *mut *mut c_void
        ) -> c_int;
    }
    optional {
        context_record = "cuCtxRecordEvent": (Handle, Handle) -> c_int;
        context_wait = "cuCtxWaitEvent": (Handle, Handle) -> c_int;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        let paths = LibraryPaths { nccl: Some("/nonexistent/libnccl.so.2".into()), cuda: None };
        let error = Libraries::open(&paths).unwrap_err();
        assert!(matches!(error, CollectiveError::Unavailable { .. }), "{error}");
        let shown = error.to_string();
        for part in ["/nonexistent/libnccl.so.2", LIBRARY_VARIABLE, "install NCCL"] {
            assert!(shown.contains(part), "`{part}` is not in: {shown}");
        }
        assert!(!error.is_retryable());
    }

    #[test]
    fn a_library_without_the_symbol_is_named_with_it() {
        // The C library is there on every machine and is no NCCL.
        let paths = LibraryPaths { nccl: Some("libc.so.6".into()), cuda: None };
        let shown = Libraries::open(&paths).unwrap_err().to_string();
        assert!(shown.contains("`libc.so.6` has no symbol `ncclGetVersion`"), "{shown}");
    }
}
