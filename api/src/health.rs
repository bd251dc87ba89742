//! What worker and self-test agree on about the check of a host.

use std::time::Duration;

/// Longest a check may take; what is not done by then has failed.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
