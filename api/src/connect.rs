//! How processes of a cluster reach each other: addresses, certificates and the cluster token.
//!
//! All certificates of a cluster carry the DNS name [`CERTIFICATE_NAME`], so that a host may be
//! reached by any address. With TLS both sides show a certificate of the cluster's authority.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};

use crate::config::TlsSection;
use crate::ids::Secret;

/// The DNS name in every certificate of a cluster.
pub const CERTIFICATE_NAME: &str = "cohort";
/// The gRPC metadata key that carries the cluster token.
pub const TOKEN_KEY: &str = "cohort-token";
/// The gRPC metadata key in which a coordinator that does not lead names the leader's address.
pub const LEADER_KEY: &str = "cohort-leader";

/// A peer that does not answer a connection attempt for this long is tried again or given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections are probed this often, so that a vanished host is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A probe unanswered for this long ends the connection.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Larger PEM files are some other file by mistake.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// Certificates or a token that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A file cannot be read.
    #[error("{what} `{}`: {source}", path.display())]
    Unreadable {
        /// Its role.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The certificates do not fit together.
    #[error("tls.ca, tls.certificate and tls.key do not form an identity: {0}")]
    Tls(#[from] tonic::transport::Error),
    /// The token is not one.
    #[error("token file `{}` is empty or holds more than one printable line", path.display())]
    Token {
        /// Which file.
        path: PathBuf,
    },
}

fn read_pem(what: &'static str, path: &Path) -> Result<Vec<u8>, ConnectError> {
    let unreadable = |source| ConnectError::Unreadable { what, path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if bytes > PEM_BYTES_MAX {
        let source = std::io::Error::other("too large to be a PEM file");
        return Err(unreadable(source));
    }
    std::fs::read(path).map_err(unreadable)
}

fn identity(tls: &TlsSection) -> Result<(Certificate, Identity), ConnectError> {
    let ca = Certificate::from_pem(read_pem("tls.ca", &tls.ca)?);
    let certificate = read_pem("tls.certificate", &tls.certificate)?;
    let key = read_pem("tls.key", &tls.key)?;
    Ok((ca, Identity::from_pem(certificate, key)))
}

/// How to reach a coordinator: with mutual TLS when certificates are configured.
pub fn endpoint(address: SocketAddr, tls: &TlsSection) -> Result<Endpoint, ConnectError> {
    let scheme = if tls.is_enabled() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    if !tls.is_enabled() {
        return Ok(endpoint);
    }
    let (ca, identity) = identity(tls)?;
    let config =
        ClientTlsConfig::new().ca_certificate(ca).identity(identity).domain_name(CERTIFICATE_NAME);
    Ok(endpoint.tls_config(config)?)
}

/// The server's side: clients without a certificate of the cluster's authority are refused. `None`
/// when no certificates are configured.
pub fn server_tls(tls: &TlsSection) -> Result<Option<ServerTlsConfig>, ConnectError> {
    if !tls.is_enabled() {
        return Ok(None);
    }
    let (ca, identity) = identity(tls)?;
    Ok(Some(ServerTlsConfig::new().identity(identity).client_ca_root(ca)))
}

/// Reads the cluster token: one line of printable ASCII.
pub fn read_token(path: &Path) -> Result<Secret, ConnectError> {
    let text = String::from_utf8(read_pem("token file", path)?).unwrap_or_default();
    let token = text.trim_end_matches(['\r', '\n']);
    let printable = token.bytes().all(|b| b.is_ascii_graphic());
    if token.is_empty() || !printable {
        return Err(ConnectError::Token { path: path.to_owned() });
    }
    Ok(Secret::new(token))
}

/// The token as gRPC metadata, marked sensitive so that it is never logged or compressed.
pub fn token_metadata(token: &Secret) -> Option<MetadataValue<Ascii>> {
    let mut value = MetadataValue::try_from(token.reveal()).ok()?;
    value.set_sensitive(true);
    Some(value)
}
