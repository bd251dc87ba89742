//! A folder filled with a file of bounded size, for a while.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use chaos::Random;

use crate::error::{CliError, Result};

/// What is written at once: a run that is broken off waits for no more than that.
const CHUNK: usize = 1 << 20;

/// A file that only takes room; removed when dropped.
pub struct Filling {
    file: File,
    path: PathBuf,
    left: u64,
    random: Random,
}

impl Filling {
    /// Makes the file, still empty, under a name that no other has. It may grow to `bytes_max`.
    pub fn begin(folder: &Path, bytes_max: u64) -> Result<Self> {
        let unwritable = |path: &Path, e| {
            CliError::usage(format!("cannot make a file in `{}`: {e}", path.display()))
        };
        let pid = std::process::id();
        // Two fillings may overlap.
        for number in 0u32.. {
            let path = folder.join(format!("cohort-chaos-{pid}-{number}.fill"));
            match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let random = Random::new(u64::from(number));
                    return Ok(Self { file, path, left: bytes_max, random });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(unwritable(folder, error)),
            }
        }
        Err(CliError::internal("no name is free for a file"))
    }

    /// Writes until the bound or the end of the disk is reached, letting others run between. A hole
    /// would take no room and a pattern little where the file system compresses, so it writes random
    /// bytes; unsynced ones are enough to take it.
    pub async fn fill(&mut self) {
        let mut chunk = vec![0; CHUNK];
        while self.left > 0 {
            chunk.chunks_exact_mut(8).for_each(|eight| {
                eight.copy_from_slice(&self.random.bits().to_le_bytes());
            });
            let length = (self.left).min(CHUNK as u64);
            // A full disk is what was wanted; any other failure leaves the file as it is.
            let Ok(written) = self.file.write(&chunk[..length as usize]) else { return };
            if written == 0 {
                return;
            }
            self.left -= written as u64;
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            // Nobody may read it any more; what else is to be undone must not wait for that.
            let path = self.path.display();
            let _ = writeln!(std::io::stderr(), "error: cannot remove `{path}`: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_grows_to_its_bound_and_goes_when_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let bytes = 3 * CHUNK as u64 + 5;
        let mut first = Filling::begin(folder.path(), bytes).expect("writable");
        let second = Filling::begin(folder.path(), bytes).expect("another name");
        assert_ne!(first.path, second.path);
        first.fill().await;
        assert_eq!(std::fs::metadata(&first.path).expect("there").len(), bytes);
        drop((first, second));
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 0);
    }
}
