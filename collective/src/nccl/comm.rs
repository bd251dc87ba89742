//! A raw NCCL communicator: one owner, one abort.
//!
//! [`Comm`] is neither `Clone` nor `Copy`, and every call needs the value itself. It ends in one of
//! two ways: [`Comm::destroy`] takes it and forgets it, or its `Drop` aborts it, which is the only
//! place in this crate that calls `ncclCommAbort`. So a communicator is aborted at most once, never
//! after it was destroyed, and always by the thread that owns it, between two other calls.

#![allow(unsafe_code, reason = "calls of NCCL")]

use std::ffi::c_int;

use crate::error::CollectiveError;
use crate::nccl::calls::NcclCall;
use crate::nccl::element::{nccl_op, nccl_type};
use crate::nccl::ffi::{
    Config, Handle, IN_PROGRESS, REVOKE_DEFAULT, SHRINK_ABORT, SHRINK_DEFAULT, SPLIT_NO_COLOR,
    SUCCESS, UniqueId,
};
use crate::nccl::library::Libraries;
use crate::nccl::memory::DeviceBuffer;
use crate::nccl::stream::Stream;
use crate::nccl::version::NcclVersion;

/// The first version with `ncclCommShrink`.
pub(super) const SHRINK_SINCE: NcclVersion = NcclVersion::new(2, 27, 3);

/// A communicator. All its calls return at once; [`Comm::state`] tells when one has finished.
pub(super) struct Comm {
    libraries: Libraries,
    raw: Handle,
}

/// A new id for a group that is to form.
pub(super) fn unique_id(libraries: &Libraries) -> Result<UniqueId, CollectiveError> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: as nccl.h declares it; writes one id.
    let code = unsafe { (libraries.nccl().unique_id)(&mut id) };
    libraries.check_nccl("ncclGetUniqueId", code, Handle::NULL)?;
    Ok(id)
}

impl Comm {
    /// Begins to form a group on the GPU whose context is current.
    pub(super) fn begin(
        libraries: &Libraries,
        id: UniqueId,
        world: c_int,
        rank: c_int,
        max_ctas: Option<u32>,
    ) -> Result<Self, CollectiveError> {
        let mut config = Config::non_blocking(max_ctas);
        let mut raw = Handle::NULL;
        // SAFETY: as nccl.h declares it. It writes the handle before it returns, also when the
        // initialisation goes on, and copies the configuration.
        let code = unsafe { (libraries.nccl().init)(&mut raw, world, id, rank, &mut config) };
        if code != IN_PROGRESS {
            libraries.check_nccl("ncclCommInitRankConfig", code, Handle::NULL)?;
        }
        Ok(Self { libraries: libraries.clone(), raw })
    }

    /// The `ncclResult_t` of what it did last: success, in progress or an error.
    pub(super) fn state(&self) -> Result<c_int, CollectiveError> {
        let mut state = SUCCESS;
        // SAFETY: a communicator that is neither destroyed nor aborted; writes one integer.
        let code = unsafe { (self.libraries.nccl().async_error)(self.raw, &mut state) };
        self.check("ncclCommGetAsyncError", code)?;
        Ok(state)
    }

    /// The error of a call, with what NCCL knows of it.
    pub(super) fn check(&self, call: &str, code: c_int) -> Result<(), CollectiveError> {
        self.libraries.check_nccl(call, code, self.raw)
    }

    /// Enqueues calls as one; the result may be that it is in progress.
    ///
    /// # Safety
    /// The buffers stay alive until an event that is recorded afterwards is done.
    pub(super) unsafe fn issue(
        &self,
        calls: &[NcclCall],
        stream: &Stream,
    ) -> Result<c_int, CollectiveError> {
        if let [call] = calls {
            // SAFETY: the caller keeps the buffers.
            return Ok(unsafe { self.call(call, stream) });
        }
        let nccl = self.libraries.nccl();
        // SAFETY: a group belongs to the calling thread; it is ended below on every path.
        self.check("ncclGroupStart", unsafe { (nccl.group_start)() })?;
        let mut refused = Ok(());
        for call in calls {
            // SAFETY: the caller keeps the buffers.
            let code = unsafe { self.call(call, stream) };
            if code != IN_PROGRESS && code != SUCCESS {
                refused = self.check(call.symbol(), code);
                break;
            }
        }
        // SAFETY: ends the group that was started above, on the same thread.
        let code = unsafe { (nccl.group_end)() };
        refused.map(|()| code)
    }

    /// # Safety
    /// As for [`Self::issue`].
    unsafe fn call(&self, call: &NcclCall, stream: &Stream) -> c_int {
        let (nccl, comm, stream) = (self.libraries.nccl(), self.raw, stream.handle());
        // SAFETY: a communicator that is neither destroyed nor aborted and a stream of its
        // GPU. Addresses and counts come from buffers whose lengths `Calls` has compared, so NCCL
        // stays inside of them; they live as long as the caller promises.
        unsafe {
            match call {
                NcclCall::AllReduce { input, output, op } => {
                    let kind = nccl_type(input.element());
                    let (from, to) = (input.address(), output.address());
                    (nccl.all_reduce)(from, to, input.len(), kind, nccl_op(*op), comm, stream)
                }
                NcclCall::Reduce { input, output, op, root } => {
                    let kind = nccl_type(input.element());
                    let (from, to, op) = (input.address(), output.address(), nccl_op(*op));
                    (nccl.reduce)(from, to, input.len(), kind, op, *root, comm, stream)
                }
                NcclCall::ReduceScatter { input, output, op } => {
                    let kind = nccl_type(input.element());
                    let (from, to) = (input.address(), output.address());
                    (nccl.reduce_scatter)(from, to, output.len(), kind, nccl_op(*op), comm, stream)
                }
                NcclCall::AllGather { input, output } => {
                    let kind = nccl_type(input.element());
                    (nccl.all_gather)(
                        input.address(),
                        output.address(),
                        input.len(),
                        kind,
                        comm,
                        stream,
                    )
                }
                NcclCall::Broadcast { input, output, root } => {
                    let kind = nccl_type(output.element());
                    let (from, to) = (input.address(), output.address());
                    (nccl.broadcast)(from, to, output.len(), kind, *root, comm, stream)
                }
                NcclCall::Send { buffer, to } => {
                    let kind = nccl_type(buffer.element());
                    (nccl.send)(buffer.address(), buffer.len(), kind, *to, comm, stream)
                }
                NcclCall::Recv { buffer, from } => {
                    let kind = nccl_type(buffer.element());
                    (nccl.recv)(buffer.address(), buffer.len(), kind, *from, comm, stream)
                }
            }
        }
    }

    /// Makes the communicator of the ranks with the same color, ordered by key; none for none.
    pub(super) fn split(
        &self,
        color: Option<u32>,
        key: u32,
        max_ctas: Option<u32>,
        settle: impl FnOnce(c_int) -> Result<(), CollectiveError>,
    ) -> Result<Option<Self>, CollectiveError> {
        let split = self.libraries.nccl().split;
        let split = self.libraries.newer(split, "ncclCommSplit", NcclVersion::new(2, 18, 1))?;
        let color = color.map_or(SPLIT_NO_COLOR, |color| color as c_int);
        let mut config = Config::non_blocking(max_ctas);
        // SAFETY: a communicator that is neither destroyed nor aborted; the place is valid as
        // `derive` says, and the configuration is copied.
        self.derive(
            |place| unsafe { split(self.raw, color, key as c_int, place, &mut config) },
            settle,
        )
    }

    /// Makes the communicator without these ranks; after a failure it first stops what runs.
    pub(super) fn shrink(
        &self,
        excluded: &[u32],
        after_failure: bool,
        max_ctas: Option<u32>,
        settle: impl FnOnce(c_int) -> Result<(), CollectiveError>,
    ) -> Result<Option<Self>, CollectiveError> {
        let shrink = self.libraries.nccl().shrink;
        let shrink = self.libraries.newer(shrink, "ncclCommShrink", SHRINK_SINCE)?;
        let mut excluded: Vec<c_int> = excluded.iter().map(|rank| *rank as c_int).collect();
        let flags = if after_failure { SHRINK_ABORT } else { SHRINK_DEFAULT };
        let mut config = Config::non_blocking(max_ctas);
        let count = excluded.len() as c_int;
        let ranks = excluded.as_mut_ptr();
        // SAFETY: as for `split`; NCCL copies the list before it returns.
        self.derive(
            |place| unsafe { shrink(self.raw, ranks, count, place, &mut config, flags) },
            settle,
        )
    }

    /// Begins a new communicator made from this one: `begin` calls NCCL with where to put it.
    ///
    /// NCCL may write the handle at any time until this communicator's state is final; so it lies
    /// on the heap, and if `settle` gives up before, it stays there for good.
    fn derive(
        &self,
        begin: impl FnOnce(*mut Handle) -> c_int,
        settle: impl FnOnce(c_int) -> Result<(), CollectiveError>,
    ) -> Result<Option<Self>, CollectiveError> {
        let place = Box::into_raw(Box::new(Handle::NULL));
        settle(begin(place))?;
        // SAFETY: from `Box::into_raw` above, and taken back once: the state is final, so NCCL has
        // written and will not write again.
        let raw = unsafe { *Box::from_raw(place) };
        Ok((!raw.is_null()).then(|| Self { libraries: self.libraries.clone(), raw }))
    }

    /// Stops what runs, on this rank, but keeps the communicator for [`Self::split`] and
    /// [`Self::shrink`].
    pub(super) fn revoke(&self) -> Result<c_int, CollectiveError> {
        let revoke = self.libraries.nccl().revoke;
        let revoke = self.libraries.newer(revoke, "ncclCommRevoke", NcclVersion::new(2, 29, 2))?;
        // SAFETY: a communicator that is neither destroyed nor aborted.
        Ok(unsafe { revoke(self.raw, REVOKE_DEFAULT) })
    }

    /// Registers memory for transfers without a copy.
    ///
    /// # Safety
    /// The buffer stays alive until [`Self::deregister`], or the end of the communicator.
    pub(super) unsafe fn register(&self, buffer: &DeviceBuffer) -> Result<Handle, CollectiveError> {
        let register = self.libraries.nccl().register;
        let since = NcclVersion::new(2, 19, 1);
        let register = self.libraries.newer(register, "ncclCommRegister", since)?;
        let mut handle = Handle::NULL;
        // SAFETY: a communicator that is neither destroyed nor aborted; the memory is that of the
        // buffer; writes one handle before it returns.
        let code = unsafe { register(self.raw, buffer.address(), buffer.bytes(), &mut handle) };
        self.check("ncclCommRegister", code)?;
        Ok(handle)
    }

    /// Ends a registration of this communicator.
    pub(super) fn deregister(&self, handle: Handle) -> Result<(), CollectiveError> {
        let deregister = self.libraries.nccl().deregister;
        let since = NcclVersion::new(2, 19, 1);
        let deregister = self.libraries.newer(deregister, "ncclCommDeregister", since)?;
        // SAFETY: a communicator that is neither destroyed nor aborted, and a handle that it gave
        // out; the owner's map gives each handle up as it comes here.
        let code = unsafe { deregister(self.raw, handle) };
        self.check("ncclCommDeregister", code)
    }

    /// Begins to flush everything; the state tells when it is done.
    pub(super) fn finalize(&self) -> c_int {
        // SAFETY: a communicator that is neither destroyed nor aborted, finalized once by `close`.
        unsafe { (self.libraries.nccl().finalize)(self.raw) }
    }

    /// Frees a communicator that has been finalized.
    pub(super) fn destroy(self) -> Result<(), CollectiveError> {
        // SAFETY: takes `self`, and forgets it below, so nothing uses or aborts the handle again.
        let code = unsafe { (self.libraries.nccl().destroy)(self.raw) };
        let (libraries, call) = (self.libraries.clone(), "ncclCommDestroy");
        std::mem::forget(self);
        if code == IN_PROGRESS { Ok(()) } else { libraries.check_nccl(call, code, Handle::NULL) }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        // SAFETY: the only owner of the handle lets go of it; see the head of this file.
        let code = unsafe { (self.libraries.nccl().abort)(self.raw) };
        tracing::debug!(code, "aborted an NCCL communicator");
    }
}
