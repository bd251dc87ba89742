//! Writes a large object into a folder around the operating system's cache.
//!
//! What is written behind training must not take the processors from it. Copying a checkpoint into
//! the page cache costs as much processor time as hashing it in every way, and throws out of it what
//! training reads. So each block is copied once, into memory aligned as the disk wants it, hashed
//! there while the processor's cache holds it, and given to the disk. A file system that cannot do
//! that is written to as usual.
//!
//! What is visible and when is as in the library: a file `<name>#<n>` is synced, then renamed.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What a disk's block is at most; memory, place in the file and length are multiples of it.
const ALIGNMENT: usize = 4096;
/// Copied, hashed and written at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Threads that wait for the disk.
const WRITERS: usize = 2;
/// Blocks on their way; with the one being filled, the memory that writing takes.
const BLOCKS: usize = 2 * WRITERS + 1;
/// Names that are tried for the file while it is written.
const NAMES: u32 = 1000;

/// Asked before every call of the system, with its name: an error is that of the call. In tests each
/// call fails; otherwise it says whether the object is still wanted.
pub(crate) type Before<'a> = &'a (dyn Fn(&'static str) -> io::Result<()> + Sync);

/// Writes `pieces`, and then what `end` gives, to `path`; returns the BLAKE3 of all, hex. Makes the
/// folders down from `root`. On an error nothing is left.
pub(crate) fn write_file(
    root: &Path,
    path: &Path,
    pieces: &[Bytes],
    end: impl FnOnce() -> io::Result<Bytes>,
    before: Before<'_>,
) -> io::Result<String> {
    let folder = path.parent().unwrap_or(root);
    if !folder.is_dir() {
        before("mkdir")?;
        std::fs::create_dir_all(folder)?;
    }
    before("open")?;
    let (file, staging) = create(path)?;
    let staging = Staging(Some(staging));
    let hash = write_blocks(&file, pieces, end, before)?;
    before("sync")?;
    file.sync_all()?;
    drop(file);
    before("rename")?;
    staging.publish(path)?;
    // A name is safe when its folder is: all of them, since a try that failed may have made some.
    for folder in folder.ancestors().take_while(|folder| folder.starts_with(root)) {
        before("sync of a folder")?;
        File::open(folder)?.sync_all()?;
    }
    Ok(hash)
}

/// A file while it is written; removed unless it is published.
struct Staging(Option<PathBuf>);

impl Staging {
    fn publish(mut self, path: &Path) -> io::Result<()> {
        if let Some(staging) = &self.0 {
            std::fs::rename(staging, path)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // Never listed; what is left is removed with its generation.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A new file of a name that counts as being written.
fn create(path: &Path) -> io::Result<(File, PathBuf)> {
    for number in 1..=NAMES {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("#{number}"));
        let name = PathBuf::from(name);
        match OpenOptions::new().write(true).create_new(true).open(&name) {
            Ok(file) => {
                // Asked for afterwards: where it is refused, a file would have been made all the same.
                let _ = set_direct(&file, true);
                return Ok((file, name));
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    let problem = format!("{NAMES} unfinished files of this name exist");
    Err(io::Error::new(ErrorKind::AlreadyExists, problem))
}

/// Has the file go around the system's cache, or through it.
fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, is_direct);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Memory that a disk can read by itself.
struct Block {
    memory: Vec<u8>,
    first: usize,
    filled: usize,
    /// Its place in the file.
    at: u64,
}

impl Block {
    fn new() -> Self {
        let memory = vec![0; BLOCK_BYTES + ALIGNMENT];
        let first = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, first, filled: 0, at: 0 }
    }

    /// Takes what it has room for.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BLOCK_BYTES - self.filled);
        let start = self.first + self.filled;
        self.memory[start..start + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        taken
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.first..self.first + self.filled]
    }

    /// Its bytes, and zeros up to a whole block of the disk.
    fn padded(&mut self) -> &[u8] {
        let end = self.filled.next_multiple_of(ALIGNMENT);
        let memory = &mut self.memory[self.first..self.first + end];
        memory[self.filled..].fill(0);
        memory
    }
}

fn write_blocks(
    file: &File,
    pieces: &[Bytes],
    end: impl FnOnce() -> io::Result<Bytes>,
    before: Before<'_>,
) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let (filled, to_write) = sync_channel::<Block>(WRITERS);
    let (free, freed) = sync_channel::<io::Result<Block>>(BLOCKS);
    for _ in 0..BLOCKS {
        // As many as the channel holds.
        let _ = free.send(Ok(Block::new()));
    }
    let to_write = Mutex::new(to_write);
    let bytes = thread::scope(|scope| {
        for free in vec![free; WRITERS] {
            let to_write = &to_write;
            scope.spawn(move || write_all(file, to_write, &free, before));
        }
        let bytes = fill_blocks(pieces, end, &mut hasher, &filled, &freed);
        drop(filled);
        bytes
    })?;
    // What the writers came to say last.
    freed.into_iter().try_for_each(|block| block.map(drop))?;
    before("truncate")?;
    file.set_len(bytes)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Copies all bytes into blocks and hands them to the writers; returns how many bytes there are.
fn fill_blocks(
    pieces: &[Bytes],
    end: impl FnOnce() -> io::Result<Bytes>,
    hasher: &mut blake3::Hasher,
    filled: &SyncSender<Block>,
    freed: &Receiver<io::Result<Block>>,
) -> io::Result<u64> {
    let gone = || io::Error::new(ErrorKind::BrokenPipe, "the threads that write are gone");
    let next = |at: u64| -> io::Result<Block> {
        let block = freed.recv().map_err(|_| gone())??;
        Ok(Block { filled: 0, at, ..block })
    };
    let mut at = 0;
    let mut block = next(at)?;
    let mut take = |mut rest: &[u8]| -> io::Result<()> {
        while !rest.is_empty() {
            rest = &rest[block.fill(rest)..];
            if block.filled == BLOCK_BYTES {
                hasher.update(block.bytes());
                at += BLOCK_BYTES as u64;
                let whole = std::mem::replace(&mut block, next(at)?);
                filled.send(whole).map_err(|_| gone())?;
            }
        }
        Ok(())
    };
    pieces.iter().try_for_each(|piece| take(piece))?;
    take(&end()?)?;
    hasher.update(block.bytes());
    let bytes = at + block.filled as u64;
    if block.filled > 0 {
        filled.send(block).map_err(|_| gone())?;
    }
    Ok(bytes)
}

/// Writes blocks until no more come.
fn write_all(
    file: &File,
    to_write: &Mutex<Receiver<Block>>,
    free: &SyncSender<io::Result<Block>>,
    before: Before<'_>,
) {
    loop {
        // A lock that a panic left is that of a receiver all the same.
        let next = to_write.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut block) = next else { return };
        let at = block.at;
        let written = before("write").and_then(|()| write_at(file, block.padded(), at));
        // There is room for every block.
        let _ = free.send(written.map(|()| block));
    }
}

fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    match file.write_all_at(bytes, at) {
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
            // The file system takes the flag and not what comes of it.
            set_direct(file, false)?;
            file.write_all_at(bytes, at)
        }
        written => written,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn pieces(lengths: &[usize]) -> Vec<Bytes> {
        let piece = |length: &usize| (0..*length).map(|i| (i * 31 % 251) as u8).collect();
        lengths.iter().map(piece).map(|bytes: Vec<u8>| bytes.into()).collect()
    }

    const ALL: Before<'static> = &|_| Ok(());

    #[test]
    fn a_file_of_any_length_has_exactly_its_bytes_in_folders_that_were_not_there() {
        let root = tempfile::tempdir().expect("a folder");
        for (index, lengths) in [
            &[0][..],
            &[1],
            &[4096],
            &[100, 4096, 1 << 20, 7],
            &[BLOCK_BYTES],
            &[3 * BLOCK_BYTES + 1, 5],
            &[17 * BLOCK_BYTES - 3],
        ]
        .iter()
        .enumerate()
        {
            let path = root.path().join(format!("a/b{index}/c"));
            let end = Bytes::from_static(b"the end");
            let pieces = pieces(lengths);
            let hash = write_file(root.path(), &path, &pieces, || Ok(end.clone()), ALL);
            let expected = [pieces.concat(), end.to_vec()].concat();
            assert_eq!(hash.expect("written"), crate::manifest::digest(&expected));
            assert!(std::fs::read(&path).expect("there") == expected, "{lengths:?}");
        }
    }

    #[test]
    fn an_unfinished_file_is_in_nobodys_way_and_a_failed_one_leaves_nothing() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("x");
        std::fs::write(root.path().join("x#1"), "of a killed writer").expect("written");
        let failing = || Err(io::Error::other("no checksums"));
        let failed = write_file(root.path(), &path, &pieces(&[5 << 20]), failing, ALL);
        assert_eq!(failed.expect_err("fails").to_string(), "no checksums");
        let names = || {
            let entries = std::fs::read_dir(root.path()).expect("listed");
            let mut names: Vec<_> =
                entries.map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(), ["x#1"]);
        write_file(root.path(), &path, &pieces(&[5 << 20]), || Ok(Bytes::new()), ALL)
            .expect("written");
        assert_eq!(names(), ["x", "x#1"]);
    }

    #[test]
    fn what_the_disk_refuses_is_an_error() {
        // Writing to it fails with "no space left on device".
        let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
            eprintln!("skipped: this system has no /dev/full");
            return;
        };
        let outcome = write_blocks(&full, &pieces(&[40 << 20]), || Ok(Bytes::new()), ALL);
        assert_eq!(outcome.expect_err("full").kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn whatever_call_fails_or_is_the_last_nothing_half_written_is_visible() {
        let pieces = pieces(&[3 << 20, 77]);
        let whole = pieces.concat();
        let mut failed = Vec::new();
        for fatal in 0.. {
            let root = tempfile::tempdir().expect("a folder");
            let path = root.path().join("a/b/x");
            let calls = AtomicUsize::new(0);
            let last = Mutex::new("");
            let before = |what| match calls.fetch_add(1, Ordering::SeqCst) >= fatal {
                false => Ok(()),
                // Nothing after it succeeds either, as after a kill.
                true => {
                    let mut last = last.lock().expect("no panic");
                    *last = if last.is_empty() { what } else { *last };
                    Err(io::Error::other("on purpose"))
                }
            };
            let outcome = write_file(root.path(), &path, &pieces, || Ok(Bytes::new()), &before);
            let visible = std::fs::read(&path);
            assert!(visible.as_ref().map_or(true, |bytes| *bytes == whole), "call {fatal}");
            if outcome.is_ok() {
                assert!(visible.is_ok());
                break;
            }
            let what = *last.lock().expect("no panic");
            // Renamed already: whole, though not known to be safe.
            assert_eq!(visible.is_ok(), what == "sync of a folder", "{what}");
            let left = std::fs::read_dir(path.parent().expect("a parent"));
            let left = left.map_or(0, Iterator::count);
            assert_eq!(left, usize::from(visible.is_ok()), "{what}");
            failed.push(what);
            // The next try is in nobody's way.
            write_file(root.path(), &path, &pieces, || Ok(Bytes::new()), ALL).expect("written");
            assert!(std::fs::read(&path).expect("there") == whole);
        }
        println!("failed at {failed:?}");
        for what in ["mkdir", "open", "write", "truncate", "sync", "rename", "sync of a folder"] {
            assert!(failed.contains(&what), "{what} was not tried");
        }
    }

    #[test]
    fn a_file_system_that_knows_only_its_cache_is_written_to_as_usual() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, _) = create(&folder.path().join("x")).expect("made");
        // What a refusal leaves.
        set_direct(&file, false).expect("changed");
        let pieces = pieces(&[3 << 20, 77]);
        write_blocks(&file, &pieces, || Ok(Bytes::new()), ALL).expect("written");
        assert!(std::fs::read(folder.path().join("x#1")).expect("there") == pieces.concat());
    }
}
