//! A recipe beside a pack that does not exist yet: `rust.pack.recipe.toml` says how `rust.pack` is
//! made from crates that the machine already has, and which digest must come out.
//!
//! A recipe never replaces a file: one with another digest is an error.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::crates::{crate_sources, read_document};
use super::pack::PackHeader;
use super::packer::{PackOptions, pack};
use super::source::Source;
use crate::error::DataError;

/// The recipe file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    /// Names of crates, packed in this order.
    crates: Vec<String>,
    /// The `Cargo.lock` that gives their versions; relative to the recipe's folder.
    lock: PathBuf,
    /// Extensions of the files that are taken.
    extensions: Vec<String>,
    /// BLAKE3 of the tokens, hex.
    digest: String,
}

/// Makes the pack at `path` when it does not exist and `<path>.recipe.toml` does; `progress` is
/// told bytes done and bytes in all. True when it made one. Without a recipe, nothing happens.
///
/// # Errors
/// When the pack, made or found, is not the one whose digest the recipe gives; it is not kept if it
/// was made.
pub fn ensure_recipe(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<bool, DataError> {
    ensure(path, None, progress)
}

/// [`ensure_recipe`] with cargo's folder of unpacked crates given.
fn ensure(
    path: &Path,
    registry: Option<&Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<bool, DataError> {
    let mut recipe_path = path.as_os_str().to_owned();
    recipe_path.push(".recipe.toml");
    let recipe_path = PathBuf::from(recipe_path);
    if !recipe_path.is_file() {
        return Ok(false);
    }
    let text = read_document(&recipe_path)?;
    let recipe: Recipe = api::document::parse(&text, &recipe_path.display().to_string())
        .map_err(|e| DataError::Mismatch(e.to_string()))?;
    if path.exists() {
        check_digest(path, &recipe_path, &recipe)?;
        return Ok(false);
    }
    let folder = recipe_path.parent().unwrap_or(Path::new("."));
    let lock = folder.join(&recipe.lock);
    let made = path.with_extension(format!("{}.partial", std::process::id()));
    let report = pack(PackOptions {
        inputs: crate_sources(&lock, registry, &recipe.crates)?,
        output: made.clone(),
        tokenizer: None,
        extensions: recipe.extensions.clone(),
        progress,
    })?;
    if report.digest != recipe.digest {
        // Best effort: the error below is what counts.
        let _ = std::fs::remove_file(&made);
        return Err(Source::plain(&recipe_path).malformed(format!(
            "the pack came out with digest `{}`, expected `{}`: either `{}` locks other versions \
             than the recipe was written for (then update `digest`), or the unpacked sources were \
             changed",
            report.digest,
            recipe.digest,
            lock.display()
        )));
    }
    let target = Source::plain(path);
    std::fs::rename(&made, path).map_err(|e| target.unwritable(&e))?;
    tracing::info!(
        path = %path.display(),
        files = report.files,
        tokens = report.tokens,
        digest = report.digest,
        unigram_entropy = report.unigram_entropy,
        "made the pack from its recipe"
    );
    Ok(true)
}

/// Refuses a file that is not the recipe's pack. Only the header is read: opening the channel
/// checks the tokens.
fn check_digest(path: &Path, recipe_path: &Path, recipe: &Recipe) -> Result<(), DataError> {
    let source = Source::plain(path);
    let mut file = File::open(path).map_err(|e| source.unreadable(e))?;
    let header = PackHeader::read(&mut file).map_err(|e| source.unreadable(e))?;
    let found = header.map_err(|m| source.malformed(m))?.digest.to_hex();
    if found.as_str() != recipe.digest {
        return Err(source.malformed(format!(
            "has digest `{found}`, but `{}` expects `{}`: remove the pack to have it made again",
            recipe_path.display(),
            recipe.digest
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{open_tokens, read_crate_names};
    use crate::dataset::Dataset;

    #[test]
    fn a_missing_pack_is_made_once_and_must_have_the_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let source = "source = \"registry+https://example.org/index\"";
        let package = format!("[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n{source}\n");
        std::fs::write(at("Cargo.lock"), package).expect("writes");
        std::fs::create_dir_all(at("src/a-1.0.0")).expect("creates");
        std::fs::write(at("src/a-1.0.0/lib.rs"), "fn main() {}").expect("writes");
        let (path, registry) = (at("a.pack"), at("src"));
        let run = || ensure(&path, Some(&registry), &mut |_, _| {}).map_err(|e| e.to_string());
        let recipe = |digest: &str| {
            let text = format!(
                "crates = [\"a\"]\nlock = \"Cargo.lock\"\nextensions = [\"rs\"]\n\
                 digest = \"{digest}\""
            );
            std::fs::write(at("a.pack.recipe.toml"), text).expect("writes");
        };
        assert_eq!(run(), Ok(false), "no recipe, nothing to do");
        recipe("00");
        let error = run().expect_err("another digest");
        assert!(
            error.contains("expected `00`") && error.contains("locks other versions"),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 3, "left behind");
        recipe(blake3::hash(b"fn main() {}").to_hex().as_str());
        assert_eq!(run(), Ok(true));
        assert_eq!(run(), Ok(false), "made once");
        assert_eq!(open_tokens("train", &path, 4, 256).expect("opens").len(), 2);
        recipe("00");
        assert!(run().expect_err("found another").contains("remove the pack"));
        std::fs::write(at("a.pack.recipe.toml"), "crate = []\n").expect("writes");
        assert!(run().expect_err("unknown key").contains("unknown key `crate`"));
    }

    /// The recipe of `examples/rust-lm` must follow `Cargo.lock`. Every machine that built this
    /// test has the sources.
    #[test]
    fn the_shipped_recipe_gives_its_digest() {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/rust-lm");
        let recipe_path = example.join("data/rust.pack.recipe.toml");
        let text = read_document(&recipe_path).expect("reads");
        let recipe: Recipe = api::document::parse(&text, "recipe").expect("parses");
        assert_eq!(recipe.crates, read_crate_names(&example.join("crates.txt")).expect("reads"));
        let folder = tempfile::tempdir().expect("a folder");
        let lock = example.join("data").join(&recipe.lock);
        let report = pack(PackOptions {
            inputs: crate_sources(&lock, None, &recipe.crates).expect("built, so unpacked"),
            output: folder.path().join("rust.pack"),
            tokenizer: None,
            extensions: recipe.extensions,
            progress: &mut |_, _| {},
        });
        let report = report.expect("packs");
        assert_eq!(report.digest, recipe.digest, "update the recipe: {report:?}");
    }
}
