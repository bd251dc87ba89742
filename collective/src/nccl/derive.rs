//! What an owner thread makes of its communicator: smaller groups, and registrations of memory.

#![allow(unsafe_code, reason = "registered memory is kept alive here")]

use crate::error::CollectiveError;
use crate::nccl::comm::{Comm, SHRINK_SINCE};
use crate::nccl::ffi::IN_PROGRESS;
use crate::nccl::memory::DeviceBuffer;
use crate::nccl::owner::{Flight, Owner};

impl Owner {
    pub(super) fn split(
        &mut self,
        color: Option<u32>,
        key: u32,
    ) -> Result<Option<Comm>, CollectiveError> {
        self.drain(None);
        let (comm, most) = (self.healthy()?, self.setup.max_ctas);
        let call = "ncclCommSplit";
        let child = comm.split(color, key, most, |code| self.settle(comm, call, code, true))?;
        if let Some(child) = &child {
            self.settle(child, call, IN_PROGRESS, true)?;
        }
        Ok(child)
    }

    pub(super) fn shrink(
        &mut self,
        excluded: &[u32],
        after_failure: bool,
    ) -> Result<Option<Comm>, CollectiveError> {
        let libraries = self.setup.device.libraries();
        // First of all: without the function nothing is to be stopped.
        libraries.newer(libraries.nccl().shrink, "ncclCommShrink", SHRINK_SINCE)?;
        if after_failure {
            let error = CollectiveError::unavailable("this group", "it is being shrunk");
            let error = self.failed.get_or_insert(error).clone();
            for Flight { event, batch, done } in self.in_flight.drain(..) {
                let _ = done.send(Err(error.clone()));
                self.stale.push((event, batch));
            }
        } else {
            self.drain(None);
            self.healthy()?;
        }
        let Some(comm) = &self.comm else {
            return Err(self.failed.clone().unwrap_or_else(|| self.gone()));
        };
        let (most, call) = (self.setup.max_ctas, "ncclCommShrink");
        let settled = |code| self.settle(comm, call, code, true);
        let child = comm.shrink(excluded, after_failure, most, settled)?;
        if let Some(child) = &child {
            self.settle(child, call, IN_PROGRESS, true)?;
        }
        if after_failure {
            self.retire();
        }
        Ok(child)
    }

    pub(super) fn revoke(&mut self) -> Result<(), CollectiveError> {
        let Some(comm) = &self.comm else {
            return Err(self.failed.clone().unwrap_or_else(|| self.gone()));
        };
        let code = comm.revoke()?;
        self.settle(comm, "ncclCommRevoke", code, true)?;
        self.setup.shrinkable = true;
        self.fail(CollectiveError::unavailable("this group", "it was revoked"));
        self.retire();
        Ok(())
    }

    pub(super) fn register(&mut self, buffer: DeviceBuffer) -> Result<u64, CollectiveError> {
        let comm = self.healthy()?;
        // SAFETY: `registered` keeps the buffer until `deregister`, or until `abort` or `close`
        // have ended the communicator.
        let handle = unsafe { comm.register(&buffer)? };
        self.registrations += 1;
        self.registered.insert(self.registrations, (handle, buffer));
        Ok(self.registrations)
    }

    pub(super) fn deregister(&mut self, number: u64) {
        // What is enqueued may use the registration.
        self.drain(None);
        let Some((handle, buffer)) = self.registered.remove(&number) else { return };
        let Some(comm) = &self.comm else { return };
        if let Err(error) = comm.deregister(handle) {
            tracing::warn!(group = %self.setup.group, %error, "cannot end a registration");
            // NCCL may still know the memory.
            std::mem::forget(buffer);
        }
    }
}
