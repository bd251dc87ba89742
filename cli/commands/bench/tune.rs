//! `bench collective --tune`: measures the algorithms and writes the table that selects among them.

use std::path::Path;

use super::plan::Plan;
use crate::error::{CliError, Result};

/// Measures every algorithm for each case of the plan and writes the fastest ones to `file`.
///
/// # Errors
/// Always: there is one algorithm per operation, so nothing to select.
pub fn run(_: &Plan, file: &Path) -> Result<()> {
    let file = file.display();
    Err(CliError::usage(format!(
        "--tune `{file}`: not available in this build, which has one algorithm per operation"
    )))
}
