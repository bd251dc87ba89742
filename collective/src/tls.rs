//! Certificates of ranks, and the encryption of one connection.
//!
//! The certificates are the cluster's, as `cluster certs` makes them: every host has one of
//! the cluster's authority, and all carry one name, so that a host may be reached by any address.
//! Which job and which rank the other side is, the handshake of ranks proves inside the encrypted
//! connection.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::connect::CERTIFICATE_NAME;
use nix::sys::socket::MsgFlags;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, Connection, RootCertStore, ServerConfig};
use socket2::SockRef;

/// Larger PEM files are some other file by mistake.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// Encrypted bytes that wait for the socket: as much as a write takes at once.
const UNWRITTEN_BYTES_MAX: usize = 256 << 10;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{what} `{}`: {source}", path.display())]
    File {
        /// Its role.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no PEM file of its role.
    #[error("the {what} is not PEM: {source}")]
    Pem {
        /// Its role.
        what: &'static str,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// It holds nothing of its role.
    #[error("the {what} holds none")]
    Empty {
        /// Its role.
        what: &'static str,
    },
    /// The certificates do not fit together.
    #[error("authority, certificate and key do not form an identity: {0}")]
    Identity(String),
}

/// A certificate with its key, and the authority that must have signed that of every peer.
pub struct TlsMaterial {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key stays out of logs.
        f.debug_struct("TlsMaterial").finish_non_exhaustive()
    }
}

impl TlsMaterial {
    /// From the contents of PEM files: the authority's certificates, this host's chain, its key.
    ///
    /// # Errors
    /// [`TlsError`], other than `File`.
    pub fn from_pem(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let authorities = certificates("authority's certificate", ca)?;
        let chain = certificates("certificate", certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|source| TlsError::Pem { what: "key", source })?;
        let unfit = |error: &dyn fmt::Display| TlsError::Identity(error.to_string());
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|error| unfit(&error))?;
        }
        let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| unfit(&error))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| unfit(&error))?;
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unfit(&error))?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|error| unfit(&error))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unfit(&error))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(|error| unfit(&error))?;
        // No connection is ever resumed.
        server.send_tls13_tickets = 0;
        let name = ServerName::try_from(CERTIFICATE_NAME).map_err(|error| unfit(&error))?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), name })
    }

    /// The same from files.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        Self::from_pem(
            &read_pem("tls.ca", ca)?,
            &read_pem("tls.certificate", certificate)?,
            &read_pem("tls.key", key)?,
        )
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem { what, source })?;
    if found.is_empty() { Err(TlsError::Empty { what }) } else { Ok(found) }
}

fn read_pem(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::File { what, path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > PEM_BYTES_MAX {
        return Err(failed(io::Error::other("too large to be a PEM file")));
    }
    std::fs::read(path).map_err(failed)
}

/// One encrypted connection. Nothing blocks: what the socket does not take waits here.
pub(crate) struct Session {
    connection: Connection,
    /// Decrypted bytes that nobody has read.
    readable: usize,
    ended: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("readable", &self.readable).finish_non_exhaustive()
    }
}

/// The socket without a signal where the peer is gone.
struct Silent<'a>(&'a TcpStream);

impl Read for Silent<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&mut &*self.0).read(buffer)
    }
}

impl Write for Silent<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        SockRef::from(self.0).send_with_flags(bytes, MsgFlags::MSG_NOSIGNAL.bits())
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        SockRef::from(self.0).send_vectored_with_flags(slices, MsgFlags::MSG_NOSIGNAL.bits())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Session {
    pub(crate) fn connecting(material: &TlsMaterial) -> io::Result<Self> {
        let connection =
            rustls::ClientConnection::new(material.client.clone(), material.name.clone());
        Ok(Self::new(Connection::Client(connection.map_err(failed)?)))
    }

    pub(crate) fn accepting(material: &TlsMaterial) -> io::Result<Self> {
        let connection = rustls::ServerConnection::new(material.server.clone());
        Ok(Self::new(Connection::Server(connection.map_err(failed)?)))
    }

    fn new(mut connection: Connection) -> Self {
        connection.set_buffer_limit(Some(UNWRITTEN_BYTES_MAX));
        Self { connection, readable: 0, ended: false }
    }

    /// Decrypted bytes wait to be read.
    pub(crate) fn has_buffered(&self) -> bool {
        self.readable > 0
    }

    /// Encrypted bytes wait for the socket.
    pub(crate) fn has_unwritten(&self) -> bool {
        self.connection.wants_write()
    }

    /// Both sides have shown their certificates.
    pub(crate) fn is_established(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// Reads what is there; nothing if there is nothing yet, 0 at the end.
    pub(crate) fn read(
        &mut self,
        socket: &TcpStream,
        buffer: &mut [u8],
    ) -> io::Result<Option<usize>> {
        loop {
            match self.connection.reader().read(buffer) {
                Ok(0) => return Ok(Some(0)),
                Ok(read) => {
                    self.readable = self.readable.saturating_sub(read);
                    return Ok(Some(read));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // The end of the stream says enough: what ranks tell each other has its own marks.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Some(0)),
                Err(error) => return Err(error),
            }
            if self.ended {
                return Ok(Some(0));
            }
            match self.connection.read_tls(&mut Silent(socket)) {
                Ok(read) => self.ended = read == 0,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            match self.connection.process_new_packets() {
                Ok(state) => self.readable = state.plaintext_bytes_to_read(),
                Err(error) => {
                    // What is wrong is told to the peer, now or not at all.
                    let _ = self.flush(socket);
                    return Err(failed(error));
                }
            }
            self.flush(socket)?;
        }
    }

    /// Encrypts what there is room for, and hands on what the socket takes; how much was encrypted.
    pub(crate) fn write(
        &mut self,
        socket: &TcpStream,
        slices: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        self.flush(socket)?;
        if self.has_unwritten() && self.is_established() {
            return Ok(0);
        }
        let written = self.connection.writer().write_vectored(slices)?;
        self.flush(socket)?;
        Ok(written)
    }

    /// Hands on what the socket takes.
    pub(crate) fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Silent(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// An error of the protocol, told apart from those of the socket by its kind.
fn failed(error: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, Refusal(error))
}

/// What a peer's side of the encryption is refused for.
#[derive(Debug)]
struct Refusal(rustls::Error);

impl std::error::Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            rustls::Error::InvalidMessage(_) => {
                write!(f, "it does not encrypt, but this rank has certificates ({})", self.0)
            }
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
                write!(f, "its certificate is not of this cluster's authority ({})", self.0)
            }
            rustls::Error::AlertReceived(_) => {
                write!(f, "it does not accept this host's certificate ({})", self.0)
            }
            other => write!(f, "the encryption failed ({other})"),
        }
    }
}
