//! `cluster data pack`.

use algorithms::data::{PackOptions, crate_sources, pack as make_pack, read_crate_names};

use super::submit::pack_progress;
use crate::args::{Global, Pack};
use crate::error::{CliError, Result};
use crate::output;

/// Packs text files into one file of tokens.
pub fn pack(global: &Global, args: &Pack) -> Result<()> {
    let mut inputs = args.inputs.clone();
    if let (Some(list), Some(lock)) = (&args.crates, &args.lock) {
        let names = read_crate_names(list)?;
        inputs.extend(crate_sources(lock, None, &names)?);
    }
    if inputs.is_empty() {
        return Err(CliError::usage("nothing to pack: name files or folders, or use --crates"));
    }
    let report = make_pack(PackOptions {
        inputs,
        output: args.output.clone(),
        tokenizer: args.tokenizer.clone(),
        extensions: args.extensions.clone(),
        progress: &mut pack_progress(),
    })?;
    if global.json {
        output::json(&report);
    } else {
        output::line(&format!(
            "{}: {} files, {} tokens of {} ({}), digest {}",
            args.output.display(),
            report.files,
            report.tokens,
            report.vocabulary,
            output::bytes(report.bytes),
            report.digest
        ));
        output::line(&format!("unigram entropy: {:.4} nats per token", report.unigram_entropy));
    }
    Ok(())
}
