//! Shared memory between the ranks of one host.

use crate::communicator::GroupOptions;
use crate::error::CollectiveError;
use crate::peers::Peers;

/// The memory of a host's ranks.
#[derive(Debug)]
pub(crate) struct Shared(std::convert::Infallible);

impl Shared {
    pub(crate) fn join(_: &mut Peers, _: &GroupOptions) -> Result<Option<Self>, CollectiveError> {
        Ok(None)
    }
}
