//! `cluster chaos sample`: sample traces as files.

use crate::args::{ChaosSample, Global};
use crate::error::{CliError, Result};
use crate::output;

/// Writes the samples of a seed.
pub fn write(global: &Global, args: &ChaosSample) -> Result<()> {
    let unwritable = |path: &std::path::Path, error| {
        CliError::usage(format!("cannot write `{}`: {error}", path.display()))
    };
    std::fs::create_dir_all(&args.output).map_err(|e| unwritable(&args.output, e))?;
    let mut rows = Vec::new();
    for sample in chaos::samples(args.seed) {
        let path = args.output.join(sample.file);
        std::fs::write(&path, &sample.text).map_err(|e| unwritable(&path, e))?;
        let trace = sample.trace().map_err(|e| CliError::internal(e.to_string()))?;
        let is = trace.statistics();
        if global.json {
            output::json(&serde_json::json!({ "file": path, "statistics": is }));
        }
        rows.push(vec![
            path.display().to_string(),
            format!("{:.0} h", is.hours),
            format!("{:.1} of {}", is.mean, is.peak),
            format!("{:.2}", is.drops as f64 / is.hours),
            format!("{:.0} %", is.zero * 100.0),
        ]);
    }
    if !global.json {
        let header = ["file", "length", "nodes in the mean", "drops an hour", "without nodes"];
        output::table(&header, rows, "no samples");
    }
    Ok(())
}
