//! One non-blocking connection that carries bytes.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::socket::MsgFlags;
use socket2::SockRef;

/// A connection, shared by the rank's thread and whoever aborts the group.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    socket: Arc<TcpStream>,
}

impl Wire {
    /// Bytes go over the socket as they are.
    pub(crate) fn plain(socket: TcpStream) -> Self {
        Self { socket: Arc::new(socket) }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Reads what is there; nothing if there is nothing yet, 0 at the end.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&*self.socket).read(buffer) {
                Ok(read) => return Ok(Some(read)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes what can be taken now; how much, which may be nothing.
    pub(crate) fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        // Without this flag a write to a dead peer would raise SIGPIPE where a process has reset it.
        let flags = MsgFlags::MSG_NOSIGNAL.bits();
        loop {
            match SockRef::from(&*self.socket).send_vectored_with_flags(slices, flags) {
                Ok(written) => return Ok(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Bytes that were taken off the socket wait to be read.
    pub(crate) fn has_buffered(&self) -> bool {
        false
    }

    /// Bytes that were written have not reached the kernel.
    pub(crate) fn has_unwritten(&self) -> bool {
        false
    }

    /// Hands the kernel what it takes of them.
    pub(crate) fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that the connection is already gone.
        let _ = self.socket.shutdown(how);
    }
}
