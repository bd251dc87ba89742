//! Finds the sources of crates at the exact versions of a `Cargo.lock` in cargo's registry folder:
//! text that every machine that built this workspace already has.
//!
//! Nothing is downloaded. cargo has checked every crate against the checksum in the lock file, so
//! the same lock file names the same text on any machine.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::limits::DOCUMENT_BYTES_MAX;
use super::source::Source;
use crate::error::DataError;

/// The part of a `Cargo.lock` that is read.
#[derive(Deserialize)]
struct LockFile {
    #[serde(default)]
    package: Vec<LockedPackage>,
}

#[derive(Deserialize)]
struct LockedPackage {
    name: String,
    version: String,
    /// Absent for members of the workspace.
    source: Option<String>,
}

/// Folders of the crates `names` (`name` or `name@version`) at the versions of `lock_file`, in the
/// order of `names`; a crate that is locked at several versions gives all of them, sorted.
///
/// `registry` is cargo's folder of unpacked crates; absent: `registry/src/*` under `$CARGO_HOME` or
/// `~/.cargo`.
///
/// # Errors
/// Names the crate that is not in the lock file or not unpacked, and says what to run.
pub fn crate_sources(
    lock_file: &Path,
    registry: Option<&Path>,
    names: &[String],
) -> Result<Vec<PathBuf>, DataError> {
    let text = read_document(lock_file)?;
    let origin = lock_file.display().to_string();
    let lock: LockFile = api::document::parse(&text, &origin)
        .map_err(|e| DataError::Mismatch(format!("not a Cargo.lock: {e}")))?;
    let folders = match registry {
        Some(folder) => vec![folder.to_owned()],
        None => registry_folders()?,
    };
    let mut sources = Vec::new();
    for wanted in names {
        for (name, version) in versions(&lock, wanted, lock_file)? {
            let folder = format!("{name}-{version}");
            let found = folders.iter().map(|f| f.join(&folder)).find(|path| path.is_dir());
            sources.push(found.ok_or_else(|| {
                let shown: Vec<String> =
                    folders.iter().map(|f| format!("`{}`", f.display())).collect();
                DataError::Mismatch(format!(
                    "crate `{name}` {version} is not unpacked in {}: run `cargo fetch` in the \
                     folder of `{}`",
                    shown.join(" or "),
                    lock_file.display()
                ))
            })?);
        }
    }
    Ok(sources)
}

/// The names in a list of crates: one per line, `#` begins a comment.
///
/// # Errors
/// When the file cannot be read or names no crate.
pub fn read_crate_names(path: &Path) -> Result<Vec<String>, DataError> {
    let text = read_document(path)?;
    let names = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let names: Vec<String> = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if names.is_empty() {
        return Err(Source::plain(path).malformed("names no crate: expected one name per line"));
    }
    Ok(names)
}

/// A small text file.
pub(super) fn read_document(path: &Path) -> Result<String, DataError> {
    let source = Source::plain(path);
    String::from_utf8(source.read_as_is(DOCUMENT_BYTES_MAX)?)
        .map_err(|_| source.malformed("is not UTF-8 text"))
}

/// Locked registry versions of one wanted crate, sorted by their text.
fn versions<'a>(
    lock: &'a LockFile,
    wanted: &'a str,
    lock_file: &Path,
) -> Result<Vec<(&'a str, &'a str)>, DataError> {
    let (name, version) = match wanted.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (wanted, None),
    };
    let is_wanted = |p: &&LockedPackage| {
        p.name == name
            && version.is_none_or(|version| p.version == version)
            && p.source.as_ref().is_some_and(|source| source.contains("registry"))
    };
    let mut found: Vec<(&str, &str)> =
        lock.package.iter().filter(is_wanted).map(|p| (name, p.version.as_str())).collect();
    // The names become a folder's name: refuse what would leave the registry.
    let is_plain = |text: &str| !text.contains(['/', '\\']) && !text.starts_with('.');
    found.retain(|(name, version)| is_plain(name) && is_plain(version));
    found.sort_unstable();
    if found.is_empty() {
        return Err(Source::plain(lock_file)
            .malformed(format!("locks no crate `{wanted}` from a registry")));
    }
    Ok(found)
}

/// cargo's folders of unpacked crates, one per registry.
fn registry_folders() -> Result<Vec<PathBuf>, DataError> {
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let home = home.ok_or_else(|| {
        DataError::Mismatch("cannot find cargo's folder: neither CARGO_HOME nor HOME is set".into())
    })?;
    let source = home.join("registry/src");
    /// Registries that one cargo home serves; more are not registries.
    const REGISTRIES_MAX: usize = 64;
    let listed = Source::plain(&source).entries(REGISTRIES_MAX).map_err(|e| {
        DataError::Mismatch(format!("{e}: run `cargo fetch`, or set CARGO_HOME to cargo's folder"))
    })?;
    Ok(listed.into_iter().filter(|path| path.is_dir()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"version = 4
[[package]]
name = "a"
version = "1.0.10"
source = "registry+https://example.org/index"
checksum = "x"
[[package]]
name = "b"
version = "2.0.0"
source = "registry+https://example.org/index"
[[package]]
name = "b"
version = "1.0.0"
source = "registry+https://example.org/index"
[[package]]
name = "own"
version = "0.1.0"
"#;

    #[test]
    fn exact_versions_are_found_or_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = folder.path().join("Cargo.lock");
        std::fs::write(&lock, LOCK).expect("writes");
        for name in ["a-1.0.10", "a-1.0.9", "b-1.0.0", "b-2.0.0", "own-0.1.0"] {
            std::fs::create_dir(folder.path().join(name)).expect("creates");
        }
        let find = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
            let name = |p: PathBuf| p.file_name().expect("named").to_string_lossy().into_owned();
            crate_sources(&lock, Some(folder.path()), &names)
                .map(|paths| paths.into_iter().map(name).collect::<Vec<_>>())
                .map_err(|e| e.to_string())
        };
        assert_eq!(find(&["b", "a"]).expect("found"), ["b-1.0.0", "b-2.0.0", "a-1.0.10"]);
        assert_eq!(find(&["b@2.0.0"]).expect("found"), ["b-2.0.0"]);
        for unlocked in ["c", "own", "a@1.0.9", "../a"] {
            let error = find(&[unlocked]).expect_err("not locked");
            assert!(error.contains(&format!("locks no crate `{unlocked}`")), "{error}");
        }
        std::fs::remove_dir(folder.path().join("a-1.0.10")).expect("removes");
        let error = find(&["a"]).expect_err("not unpacked");
        assert!(error.contains("`a` 1.0.10") && error.contains("run `cargo fetch`"), "{error}");
        std::fs::write(&lock, "version =").expect("writes");
        assert!(find(&["a"]).expect_err("no lock file").contains("not a Cargo.lock"));
    }

    #[test]
    fn lists_have_comments() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("crates.txt");
        std::fs::write(&path, "# text\n serde # yes\n\nanyhow\n").expect("writes");
        assert_eq!(read_crate_names(&path).expect("names"), ["serde", "anyhow"]);
        std::fs::write(&path, "# none\n").expect("writes");
        assert!(read_crate_names(&path).is_err());
    }
}
