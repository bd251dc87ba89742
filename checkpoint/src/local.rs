//! A folder as object store: how it is opened, and how what killed writers left is cleaned.
//!
//! The library writes to `<name>#<n>`, syncs, and renames (or links, for put-if-absent), so a
//! reader never sees part of an object; names of that form are never listed. A killed writer
//! leaves such a file behind. It is removed once nobody can still be writing it: when a newer
//! generation of the job has started, or when it is old.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::Generation;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;

use crate::error::{Place, StoreError};

/// A staging file untouched for so long has no living writer: one object takes minutes at most.
const STAGING_AGE: Duration = Duration::from_secs(3600);
/// Folders deeper than this are not ours.
const DEPTH_MAX: usize = 8;

/// Opens a folder, made when absent; returns its canonical path.
pub(crate) fn open(uri: &str, path: &Path) -> Result<(Arc<dyn ObjectStore>, PathBuf), StoreError> {
    if !path.is_absolute() {
        let problem = "expected an absolute path, as in `file:///var/lib/cohort/store`".to_owned();
        return Err(StoreError::Uri { uri: uri.to_owned(), problem });
    }
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreError::Denied { place: Place::Folder(path.to_owned()), code: error.to_string() }
        }
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            let problem = "a file is in its place, expected a folder".to_owned();
            StoreError::Uri { uri: uri.to_owned(), problem }
        }
        _ => StoreError::host(path, &error),
    };
    std::fs::create_dir_all(path).map_err(failed)?;
    let path = std::fs::canonicalize(path).map_err(failed)?;
    let inner = LocalFileSystem::new_with_prefix(&path)
        .map_err(|error| StoreError::Uri { uri: uri.to_owned(), problem: error.to_string() })?
        .with_fsync(true);
    Ok((Arc::new(inner), path))
}

/// Whether the library uses such names for files that are being written.
fn is_staging(name: &OsStr) -> bool {
    let Some((_, suffix)) = name.to_str().and_then(|name| name.split_once('#')) else {
        return false;
    };
    !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit())
}

/// Removes staging files below `folder` that have not been touched for an hour.
pub(crate) fn clean_old(folder: &Path) {
    clean(folder, DEPTH_MAX, &|path| {
        let modified = path.metadata().and_then(|meta| meta.modified());
        modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STAGING_AGE))
    });
}

/// Removes staging files of generations older than `generation` from a job's checkpoint folders:
/// whoever was writing them has been superseded, and its write may fail.
pub(crate) fn clean_superseded(checkpoints: &Path, generation: Generation) {
    clean(checkpoints, 2, &|path| {
        let folder = path.parent().and_then(Path::file_name).and_then(OsStr::to_str);
        let written_by = folder.and_then(|folder| folder.split_once("-g"));
        written_by.is_some_and(|(_, g)| g.parse().is_ok_and(|g: u64| g < generation.0))
    });
}

/// Removes a folder whose objects are gone, with what killed writers left half-written in it. Only
/// staging files go with it: what is not ours stays, and so does the folder then.
pub(crate) fn remove_leftovers(folder: &Path) {
    clean(folder, 1, &|_| true);
    // Somebody else may have been quicker.
    let _ = std::fs::remove_dir(folder);
}

/// The names of the folders in `folder`, sorted; none when it does not exist.
pub(crate) fn subfolders(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |error: io::Error| StoreError::host(folder, &error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        // Gone since it was listed: no folder any more.
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // A name that is no text is not ours.
        names.extend(entry.file_name().into_string().ok().filter(|_| is_folder));
    }
    names.sort();
    Ok(names)
}

/// Best effort: a file that cannot be removed harms nobody, since it is never listed.
fn clean(folder: &Path, depth: usize, is_stale: &dyn Fn(&Path) -> bool) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        if kind.is_dir() && depth > 1 {
            clean(&path, depth - 1, is_stale);
        } else if kind.is_file() && is_staging(&entry.file_name()) && is_stale(&path) {
            match std::fs::remove_file(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed a killed writer's file"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_what_no_living_writer_owns_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let checkpoints = folder.path().join("jobs/a/checkpoints");
        let make = |name: &str| {
            let path = checkpoints.join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            File::create(&path).expect("made");
            path
        };
        let object = make("000000000001-g1/rank-00000-ab.safetensors");
        let superseded = make("000000000001-g1/rank-00000-ab.safetensors#1");
        let current = make("000000000002-g2/manifest.json#12");
        let word = make("000000000001-g1/notes#draft");
        clean_superseded(&checkpoints, Generation(2));
        assert!(object.exists() && current.exists() && word.exists());
        assert!(!superseded.exists());
        clean_old(folder.path());
        assert!(current.exists(), "just written");
        let old = SystemTime::now() - 2 * STAGING_AGE;
        File::options().write(true).open(&current).expect("opens").set_modified(old).expect("set");
        clean_old(folder.path());
        assert!(!current.exists() && object.exists());
    }
}
