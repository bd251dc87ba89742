//! How an owner thread leaves its group.

use std::time::Instant;

use crate::error::CollectiveError;
use crate::nccl::comm::Comm;
use crate::nccl::ffi::IN_PROGRESS;
use crate::nccl::owner::{CLOSE_WAIT, Owner};
use crate::nccl::pause::Pause;

impl Owner {
    /// Leaves in good order if everything has finished and the peers agree; else aborts.
    pub(super) fn close(mut self) {
        let deadline = Instant::now() + CLOSE_WAIT;
        self.drain(Some(deadline));
        for number in self.registered.keys().copied().collect::<Vec<_>>() {
            self.deregister(number);
        }
        if self.failed.is_none()
            && self.in_flight.is_empty()
            && self.raised().is_none()
            && let Some(comm) = self.comm.take()
        {
            let finished = self.finish(&comm, deadline);
            match finished.and_then(|()| comm.destroy()) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(group = %self.setup.group, %error, "cannot leave in good order");
                }
            }
        }
        self.fail(self.gone());
        self.abort();
        self.retire();
    }

    fn finish(&self, comm: &Comm, deadline: Instant) -> Result<(), CollectiveError> {
        let mut code = comm.finalize();
        let mut pause = Pause::default();
        while code == IN_PROGRESS {
            if let Some(aborted) = self.raised() {
                return Err(aborted);
            }
            if Instant::now() >= deadline {
                return Err(self.late("ncclCommFinalize", CLOSE_WAIT));
            }
            pause.sleep();
            code = comm.state()?;
        }
        comm.check("ncclCommFinalize", code)
    }
}
