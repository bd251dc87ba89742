//! The worker's data folder: there is room, and what is written to it lasts and reads back.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use api::units::ByteSize;
use nix::sys::statvfs::statvfs;

use super::Probe;

/// Free bytes that a rank's records, its log and its scratch need at least.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// Bytes written: several blocks of any file system.
const PROBE_BYTES: usize = 64 << 10;
/// The file, which lies beside the worker's own for a moment.
const FILE: &str = "health-check";

/// Writes to the folder, reads back, and looks how much is free.
pub(super) struct FolderProbe {
    folder: PathBuf,
}

impl FolderProbe {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }
}

impl Probe for FolderProbe {
    fn name(&self) -> &'static str {
        "the data folder"
    }

    fn look(&self) -> Result<(), String> {
        let shown = self.folder.display();
        let room = statvfs(&self.folder).map_err(|errno| format!("`{shown}`: {}", errno.desc()))?;
        let free = room.blocks_available().saturating_mul(room.fragment_size());
        if free < FREE_BYTES_MIN {
            return Err(format!(
                "`{shown}` has {} free, a rank needs {}: make room",
                ByteSize(free),
                ByteSize(FREE_BYTES_MIN)
            ));
        }
        let path = self.folder.join(FILE);
        let written =
            write_and_read(&path).map_err(|error| format!("`{}`: {error}", path.display()));
        let removed = fs::remove_file(&path);
        written?;
        removed.map_err(|error| format!("cannot remove `{}`: {error}", path.display()))
    }
}

/// Writes the file durably and compares what reads back.
fn write_and_read(path: &Path) -> std::io::Result<()> {
    let bytes: Vec<u8> = (0..PROBE_BYTES).map(|index| (index * 31 % 251) as u8).collect();
    let mut file = File::create(path)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    drop(file);
    let mut found = Vec::with_capacity(PROBE_BYTES);
    File::open(path)?.read_to_end(&mut found)?;
    if found != bytes {
        return Err(std::io::Error::other("other bytes were read than written"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_none_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let probe = FolderProbe::new(folder.path().to_owned());
        assert_eq!(probe.look(), Ok(()));
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 0, "nothing is left");
        let missing = folder.path().join("missing");
        let found = FolderProbe::new(missing).look().expect_err("not there");
        assert!(found.contains("missing`: No such file or directory"), "{found}");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("written");
        let found = FolderProbe::new(file).look().expect_err("no folder");
        assert!(found.contains("Not a directory"), "{found}");
    }
}
