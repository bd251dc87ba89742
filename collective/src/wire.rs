//! One non-blocking connection that carries bytes, encrypted or not.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::MsgFlags;
use socket2::SockRef;

use crate::tls::Session;

/// A connection, shared by the rank's thread and whoever aborts the group.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    socket: Arc<TcpStream>,
    /// Held for a moment only: an abort says its last words through it.
    session: Option<Arc<Mutex<Session>>>,
}

impl Wire {
    /// A non-blocking socket; without a session bytes go over it as they are.
    pub(crate) fn new(socket: TcpStream, session: Option<Session>) -> Self {
        let session = session.map(|session| Arc::new(Mutex::new(session)));
        Self { socket: Arc::new(socket), session }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn session(&self) -> Option<MutexGuard<'_, Session>> {
        let session = self.session.as_ref()?;
        Some(session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads what is there; nothing if there is nothing yet, 0 at the end.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if let Some(mut session) = self.session() {
            return session.read(&self.socket, buffer);
        }
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
        if let Some(mut session) = self.session() {
            return session.write(&self.socket, slices);
        }
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
        self.session().is_some_and(|session| session.has_buffered())
    }

    /// Bytes that were written have not reached the kernel.
    pub(crate) fn has_unwritten(&self) -> bool {
        self.session().is_some_and(|session| session.has_unwritten())
    }

    /// Hands the kernel what it takes of them.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.session().map_or(Ok(()), |mut session| session.flush(&self.socket))
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that the connection is already gone.
        let _ = self.socket.shutdown(how);
    }
}
