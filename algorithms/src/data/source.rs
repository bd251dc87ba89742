//! A file or folder being read, and how its faults are named.
//!
//! Not a cache and not a store: remote channels were fetched before. Reading is always bounded.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::error::DataError;

/// A path with the channel it belongs to; no channel when a person named the path on the command
/// line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) channel: Option<&'a str>,
    pub(super) path: &'a Path,
}

impl<'a> Source<'a> {
    /// The path of a job's channel.
    pub(super) fn channel(channel: &'a str, path: &'a Path) -> Self {
        Self { channel: Some(channel), path }
    }

    /// A path outside any job.
    pub(super) fn plain(path: &'a Path) -> Self {
        Self { channel: None, path }
    }

    /// Another path of the same channel.
    pub(super) fn at<'b>(&self, path: &'b Path) -> Source<'b>
    where
        'a: 'b,
    {
        Source { channel: self.channel, path }
    }

    /// The operating system refused.
    pub(super) fn unreadable(&self, source: io::Error) -> DataError {
        let path = self.path.to_owned();
        match self.channel {
            Some(channel) => DataError::Unreadable { channel: channel.to_owned(), path, source },
            None => DataError::Mismatch(format!("cannot read `{}`: {source}", path.display())),
        }
    }

    /// The content is not what it should be.
    pub(super) fn malformed(&self, message: impl Into<String>) -> DataError {
        let (path, message) = (self.path.to_owned(), message.into());
        match self.channel {
            Some(channel) => DataError::Malformed { channel: channel.to_owned(), path, message },
            None => DataError::Mismatch(format!("`{}`: {message}", path.display())),
        }
    }

    /// The operating system refused to write.
    pub(super) fn unwritable(&self, source: &io::Error) -> DataError {
        DataError::Mismatch(format!("cannot write `{}`: {source}", self.path.display()))
    }

    /// Whether the name says that the content is compressed.
    pub(super) fn is_gzip(&self) -> bool {
        self.path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"))
    }

    /// The file, decompressed when its name ends in `.gz`.
    pub(super) fn reader(&self) -> Result<Box<dyn Read>, DataError> {
        let file = File::open(self.path).map_err(|e| self.unreadable(e))?;
        let file = BufReader::with_capacity(1 << 16, file);
        Ok(if self.is_gzip() { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
    }

    /// The whole content, decompressed when the name ends in `.gz`; an error when it is longer than
    /// `limit`. Memory grows with what is really there, never with what a header promises.
    pub(super) fn read(&self, limit: u64) -> Result<Vec<u8>, DataError> {
        self.read_from(self.reader()?, limit)
    }

    /// [`Source::read`] without decompression.
    pub(super) fn read_as_is(&self, limit: u64) -> Result<Vec<u8>, DataError> {
        self.read_from(File::open(self.path).map_err(|e| self.unreadable(e))?, limit)
    }

    fn read_from(&self, reader: impl Read, limit: u64) -> Result<Vec<u8>, DataError> {
        let mut content = Vec::new();
        let mut reader = reader.take(limit.saturating_add(1));
        reader.read_to_end(&mut content).map_err(|e| self.unreadable(e))?;
        if content.len() as u64 > limit {
            return Err(
                self.malformed(format!("has more than {limit} bytes, the most that is read"))
            );
        }
        Ok(content)
    }

    /// Whether the path is a folder; an error when it does not exist.
    pub(super) fn is_folder(&self) -> Result<bool, DataError> {
        Ok(std::fs::metadata(self.path).map_err(|e| self.unreadable(e))?.is_dir())
    }

    /// What the folder holds, hidden entries left out, sorted by name; an error beyond `limit`.
    pub(super) fn entries(&self, limit: usize) -> Result<Vec<PathBuf>, DataError> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(self.path).map_err(|e| self.unreadable(e))? {
            let entry = entry.map_err(|e| self.unreadable(e))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if paths.len() == limit {
                return Err(self.malformed(format!("holds more than {limit} entries")));
            }
            paths.push(entry.path());
        }
        paths.sort();
        Ok(paths)
    }
}

/// Whether `path`'s name, `.gz` aside, ends in one of `extensions` (lower case, without the dot).
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase());
    let name = name.unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.rsplit_once('.').is_some_and(|(_, e)| extensions.contains(&e))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bombs_and_cut_archives_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("zeros.gz");
        let file = File::create(&path).expect("creates");
        let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::best());
        for _ in 0..64 {
            gzip.write_all(&[0; 1 << 16]).expect("writes");
        }
        gzip.finish().expect("ends");
        assert!(std::fs::metadata(&path).expect("exists").len() < 1 << 13, "hardly a bomb");
        let source = Source::channel("train", &path);
        assert_eq!(source.read(1 << 22).expect("exactly the limit").len(), 1 << 22);
        // A copy that was cut off is an error too, never a shorter file.
        let whole = std::fs::read(&path).expect("reads");
        std::fs::write(&path, &whole[..whole.len() - 9]).expect("writes");
        assert!(matches!(source.read(1 << 22), Err(DataError::Unreadable { .. })));
        std::fs::write(&path, &whole).expect("writes");
        let text = source.read((1 << 22) - 1).expect_err("one more").to_string();
        assert!(text.contains("more than 4194303 bytes"), "{text}");
    }
}
