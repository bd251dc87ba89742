//! One piece of memory that all ranks of a host map: its layout, and the only raw pointers to it.
//!
//! ```text
//! page 0           magic, nonce of the group
//! controls         512 bytes per rank: three counters on lines of their own, two round headers
//! windows          per rank: two halves to stage in, two halves for results
//! mailboxes        per ordered pair of ranks, those for one rank together: 512 bytes each with two
//!                  counters and two headers; then two slots each
//! ```
//! It is an anonymous file without a name: nothing is left of it when the last process that maps it
//! is gone, however that ended, and the size of `/dev/shm` does not bound it. Each rank allocates its
//! own windows, so their pages lie on its NUMA node and a lack of memory is an error here, not a
//! signal later.

#![allow(unsafe_code, reason = "memory shared between processes has no safe form")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::counter::Counter;

/// Bytes of a page as the layout counts them; windows begin on multiples of it.
const PAGE: usize = 4096;
/// Bytes of a rank's control block, and of a mailbox's.
const CONTROL_BYTES: usize = 512;
/// A counter has two cache lines of its own: processors fetch lines in pairs.
const COUNTER_STRIDE: usize = 128;
/// Where the round headers begin in a control block.
const HEADERS_AT: usize = 3 * COUNTER_STRIDE;
/// Bytes of a round header.
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of the group's nonce.
pub(crate) const NONCE_BYTES: usize = 32;
const MAGIC: [u8; 8] = *b"CHRTSHM2";
/// Most bytes of all windows of a host: more ranks get smaller ones.
const WINDOWS_BYTES: usize = 64 << 20;
/// A window fits a second-level cache beside the rank's own data.
const WINDOW_MOST: usize = 96 << 10;
const WINDOW_LEAST: usize = 64 << 10;
/// Two to stage, two for results.
const WINDOWS_PER_RANK: usize = 4;
/// Bytes of all slots of mailboxes of a host: more ranks get smaller ones …
const MAIL_BYTES: usize = 16 << 20;
const SLOT_MOST: usize = 64 << 10;
const SLOT_LEAST: usize = PAGE;
/// … and still more get none.
const MAIL_RANKS_MAX: usize = 45;

/// Which of a rank's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Rounds whose data it has staged.
    Staged = 0,
    /// Rounds of which it has read what the others staged, and published its result.
    Folded = 1,
    /// Rounds of which it has read the others' results.
    Copied = 2,
}

/// Which of a mailbox's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mail {
    /// Pieces that the sender has put there.
    Sent = 0,
    /// Pieces that the receiver has read.
    Taken = 1,
}

/// Where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    ranks: usize,
    window: usize,
    /// Bytes of a slot of a mailbox; 0: there are none.
    slot: usize,
}

impl Layout {
    /// The layout for that many ranks on one host.
    pub(crate) fn new(ranks: usize) -> Self {
        let fair = WINDOWS_BYTES / (WINDOWS_PER_RANK * ranks.max(1));
        let window = fair.clamp(WINDOW_LEAST, WINDOW_MOST) / PAGE * PAGE;
        let slot = match ranks {
            2..=MAIL_RANKS_MAX => MAIL_BYTES / (2 * ranks * ranks),
            _ => 0,
        };
        let slot = if slot == 0 { 0 } else { slot.clamp(SLOT_LEAST, SLOT_MOST) / PAGE * PAGE };
        Self { ranks, window, slot }
    }

    fn windows_at(self) -> usize {
        PAGE + (self.ranks * CONTROL_BYTES).next_multiple_of(PAGE)
    }

    fn rank_windows_at(self, rank: usize) -> usize {
        assert!(rank < self.ranks, "a rank of the segment");
        self.windows_at() + rank * WINDOWS_PER_RANK * self.window
    }

    /// Bytes of the mailboxes for one rank.
    fn mail_bytes(self) -> usize {
        match self.slot {
            0 => 0,
            slot => (self.ranks * CONTROL_BYTES).next_multiple_of(PAGE) + self.ranks * 2 * slot,
        }
    }

    fn mail_at(self, to: usize) -> usize {
        assert!(to < self.ranks, "a rank of the segment");
        self.rank_windows_at(0)
            + self.ranks * WINDOWS_PER_RANK * self.window
            + to * self.mail_bytes()
    }

    fn bytes(self) -> usize {
        self.windows_at() + self.ranks * (WINDOWS_PER_RANK * self.window + self.mail_bytes())
    }
}

/// The mapped segment.
#[derive(Debug)]
pub(crate) struct Segment {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the mapping belongs to this value alone and is valid from every thread; what other
// processes do with the memory does not depend on the thread that looks.
unsafe impl Send for Segment {}

impl Segment {
    /// Makes the memory and maps it; the descriptor is for the other ranks to open.
    pub(crate) fn create(
        layout: Layout,
        nonce: &[u8; NONCE_BYTES],
    ) -> std::io::Result<(Self, OwnedFd)> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"cohort-collective", flags)?;
        nix::unistd::ftruncate(&file, layout.bytes() as i64)?;
        // Nobody can shorten it under another's feet.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let head = layout.windows_at() as i64;
        take_memory(&file, 0, head)?;
        let segment = Self::map(&file, layout)?;
        // SAFETY: the first page is mapped and nobody else knows the memory yet.
        unsafe {
            let base = segment.base.as_ptr();
            base.copy_from_nonoverlapping(MAGIC.as_ptr(), MAGIC.len());
            base.add(MAGIC.len()).copy_from_nonoverlapping(nonce.as_ptr(), NONCE_BYTES);
        }
        Ok((segment, file))
    }

    /// Maps what another rank made, if it is the group's.
    pub(crate) fn open(
        file: &File,
        layout: Layout,
        nonce: &[u8; NONCE_BYTES],
    ) -> std::io::Result<Self> {
        if file.metadata()?.len() != layout.bytes() as u64 {
            return Err(std::io::Error::other("it has another size"));
        }
        let segment = Self::map(file, layout)?;
        let mut found = [0; MAGIC.len() + NONCE_BYTES];
        // SAFETY: the first page is mapped, and was written before its descriptor was told.
        unsafe {
            segment.base.as_ptr().copy_to_nonoverlapping(found.as_mut_ptr(), found.len());
        }
        if found[..MAGIC.len()] != MAGIC || found[MAGIC.len()..] != *nonce {
            return Err(std::io::Error::other("it belongs to another group"));
        }
        Ok(segment)
    }

    /// Takes the memory of a rank's own windows and mailboxes, from the node that this thread runs on.
    pub(crate) fn allocate(file: impl AsFd, layout: Layout, rank: usize) -> std::io::Result<()> {
        let (from, len) = (layout.rank_windows_at(rank), WINDOWS_PER_RANK * layout.window);
        take_memory(&file, from as i64, len as i64)?;
        match layout.mail_bytes() {
            0 => Ok(()),
            len => take_memory(&file, layout.mail_at(rank) as i64, len as i64),
        }
    }

    fn map(file: impl AsFd, layout: Layout) -> std::io::Result<Self> {
        let len = NonZeroUsize::new(layout.bytes()).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping of a whole file at an address of the kernel's choice touches no
        // memory of this process; its size is sealed, so every page stays backed.
        let base = unsafe {
            mmap(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file,
                0,
            )?
        };
        Ok(Self { base: base.cast(), layout })
    }

    /// Bytes of one window.
    pub(crate) fn window(&self) -> usize {
        self.layout.window
    }

    /// Bytes of a slot of a mailbox; 0 if there are no mailboxes.
    pub(crate) fn slot(&self) -> usize {
        self.layout.slot
    }

    /// A rank's counter.
    pub(crate) fn counter(&self, rank: usize, progress: Progress) -> Counter<'_> {
        self.counter_at(self.control(rank) + progress as usize * COUNTER_STRIDE)
    }

    /// A counter of the mailbox from one rank to another.
    pub(crate) fn mail_counter(&self, from: usize, to: usize, mail: Mail) -> Counter<'_> {
        self.counter_at(self.mailbox(from, to) + mail as usize * COUNTER_STRIDE)
    }

    fn counter_at(&self, at: usize) -> Counter<'_> {
        // SAFETY: inside the mapping, aligned, and only ever used as atomics by every process; it
        // lives as long as the mapping, which the returned borrow keeps.
        let words = unsafe { &*self.base.as_ptr().add(at).cast::<[AtomicU32; 2]>() };
        Counter { value: &words[0], sleepers: &words[1] }
    }

    /// Writes this rank's header of a round, before the round's counter publishes it.
    ///
    /// # Safety
    /// Nobody may be reading that half: all ranks have folded the round before the last.
    pub(crate) unsafe fn write_header(
        &self,
        rank: usize,
        half: usize,
        header: &[u8; HEADER_BYTES],
    ) {
        // SAFETY: unshared at this moment as the caller promises.
        unsafe { self.write_header_at(self.control(rank), half, header) }
    }

    /// Writes the header of a piece of a message, before the mailbox's counter publishes it.
    ///
    /// # Safety
    /// The receiver has taken the piece that was in that slot.
    pub(crate) unsafe fn write_mail_header(
        &self,
        (from, to): (usize, usize),
        half: usize,
        header: &[u8; HEADER_BYTES],
    ) {
        // SAFETY: unshared at this moment as the caller promises.
        unsafe { self.write_header_at(self.mailbox(from, to), half, header) }
    }

    unsafe fn write_header_at(&self, control: usize, half: usize, header: &[u8; HEADER_BYTES]) {
        let at = control + HEADERS_AT + half % 2 * HEADER_BYTES;
        // SAFETY: inside the mapping; unshared at this moment as the caller promises.
        unsafe {
            self.base.as_ptr().add(at).copy_from_nonoverlapping(header.as_ptr(), HEADER_BYTES);
        }
    }

    /// Reads a rank's header of a round.
    ///
    /// # Safety
    /// The rank has published that round, and this one has not folded it yet.
    pub(crate) unsafe fn header(&self, rank: usize, half: usize) -> [u8; HEADER_BYTES] {
        // SAFETY: not written meanwhile as the caller promises.
        unsafe { self.header_at(self.control(rank), half) }
    }

    /// Reads the header of a piece of a message.
    ///
    /// # Safety
    /// The sender has published the piece, and the receiver has not taken it yet.
    pub(crate) unsafe fn mail_header(
        &self,
        (from, to): (usize, usize),
        half: usize,
    ) -> [u8; HEADER_BYTES] {
        // SAFETY: not written meanwhile as the caller promises.
        unsafe { self.header_at(self.mailbox(from, to), half) }
    }

    unsafe fn header_at(&self, control: usize, half: usize) -> [u8; HEADER_BYTES] {
        let at = control + HEADERS_AT + half % 2 * HEADER_BYTES;
        let mut header = [0; HEADER_BYTES];
        // SAFETY: inside the mapping; not written meanwhile as the caller promises.
        unsafe {
            self.base.as_ptr().add(at).copy_to_nonoverlapping(header.as_mut_ptr(), HEADER_BYTES);
        }
        header
    }

    /// Where a rank stages the data of a round.
    pub(crate) fn stage(&self, rank: usize, half: usize) -> NonNull<u8> {
        self.window_of(rank, half % 2)
    }

    /// Where a rank puts its result of a round.
    pub(crate) fn result(&self, rank: usize, half: usize) -> NonNull<u8> {
        self.window_of(rank, 2 + half % 2)
    }

    fn window_of(&self, rank: usize, index: usize) -> NonNull<u8> {
        let at = self.layout.rank_windows_at(rank) + index * self.layout.window;
        // SAFETY: the layout places every window inside the mapping.
        unsafe { self.base.add(at) }
    }

    /// Where a piece of a message from one rank to another is.
    pub(crate) fn mail(&self, from: usize, to: usize, half: usize) -> NonNull<u8> {
        let controls = (self.layout.ranks * CONTROL_BYTES).next_multiple_of(PAGE);
        assert!(from < self.layout.ranks && self.layout.slot > 0, "a rank that has mailboxes");
        let at = self.layout.mail_at(to) + controls + (2 * from + half % 2) * self.layout.slot;
        // SAFETY: the layout places every slot inside the mapping.
        unsafe { self.base.add(at) }
    }

    fn mailbox(&self, from: usize, to: usize) -> usize {
        assert!(from < self.layout.ranks && self.layout.slot > 0, "a rank that has mailboxes");
        self.layout.mail_at(to) + from * CONTROL_BYTES
    }

    fn control(&self, rank: usize) -> usize {
        assert!(rank < self.layout.ranks, "a rank of the segment");
        PAGE + rank * CONTROL_BYTES
    }
}

/// Allocates a range of the file; a signal in between is no reason to do without.
fn take_memory(file: impl AsFd, from: i64, len: i64) -> std::io::Result<()> {
    loop {
        match fallocate(&file, FallocateFlags::empty(), from, len) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and no borrow of it outlives this value.
        let _ = unsafe { munmap(self.base.cast(), self.layout.bytes()) };
    }
}

const _: () = assert!(HEADERS_AT + 2 * HEADER_BYTES <= CONTROL_BYTES);
const _: () = assert!(2 * MAIL_RANKS_MAX * MAIL_RANKS_MAX * SLOT_LEAST <= MAIL_BYTES);
const _: () = assert!(MAGIC.len() + NONCE_BYTES <= PAGE);
