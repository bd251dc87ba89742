//! One question to a metadata server: plain HTTP/1.1 on a connection of its own, bounded in time and
//! bytes. No proxy, no redirect, no TLS: the answer must come from this host's own hypervisor.

use std::pin::Pin;
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{ETAG, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

/// A larger answer is not one of a metadata server.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Of an answer that makes no sense, this much is shown.
const FOUND_CHARS_MAX: usize = 80;

/// Why a source of notices tells nothing now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("cannot reach {host}: {source}")]
    Unreachable { host: String, source: std::io::Error },
    #[error("no answer from {host} within {} ms", limit.as_millis())]
    Late { host: String, limit: Duration },
    #[error("{host} speaks no HTTP: {source}")]
    Protocol { host: String, source: hyper::Error },
    #[error("the question cannot be sent: {0}")]
    Question(#[from] hyper::http::Error),
    #[error("`{path}` answers with more than {BODY_BYTES_MAX} bytes")]
    TooLong { path: String },
    #[error("`{path}` answers with status {status}, expected {expected}")]
    Status { path: String, status: u16, expected: &'static str },
    #[error("`{path}` answers `{found}`, expected {expected}")]
    Garbage { path: String, found: String, expected: &'static str },
    #[error("cannot read `{path}`: {source}")]
    File { path: String, source: std::io::Error },
}

impl Trouble {
    pub(crate) fn garbage(path: &str, found: &str, expected: &'static str) -> Self {
        let found = found.chars().take(FOUND_CHARS_MAX).collect();
        Self::Garbage { path: path.to_owned(), found, expected }
    }

    pub(crate) fn status(path: &str, answer: &Answer, expected: &'static str) -> Self {
        Self::Status { path: path.to_owned(), status: answer.status, expected }
    }
}

/// A question.
pub(crate) struct Question<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    pub(crate) headers: &'a [(&'static str, &'a str)],
    pub(crate) body: String,
    /// Time until the whole answer must be here.
    pub(crate) limit: Duration,
}

impl<'a> Question<'a> {
    pub(crate) fn get(
        path: &'a str,
        headers: &'a [(&'static str, &'a str)],
        limit: Duration,
    ) -> Self {
        Self { method: Method::GET, path, headers, body: String::new(), limit }
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) etag: Option<String>,
    pub(crate) body: String,
}

/// Where to ask.
#[derive(Clone, Debug)]
pub(crate) struct MetadataServer {
    /// Host and port.
    host: String,
}

impl MetadataServer {
    /// The configured endpoint, or the provider's own.
    pub(crate) fn new(configured: &str, own: &str) -> Self {
        let endpoint = if configured.is_empty() { own } else { configured };
        let host = endpoint.trim_start_matches("http://").trim_end_matches('/');
        let behind_address = host.rsplit_once(']').map_or(host, |(_, port)| port);
        let has_port = behind_address.contains(':');
        Self { host: if has_port { host.to_owned() } else { format!("{host}:80") } }
    }

    pub(crate) async fn ask(&self, question: Question<'_>) -> Result<Answer, Trouble> {
        let limit = question.limit;
        let late = |_| Trouble::Late { host: self.host.clone(), limit };
        timeout(limit, self.exchange(question)).await.map_err(late)?
    }

    async fn exchange(&self, question: Question<'_>) -> Result<Answer, Trouble> {
        let unreachable = |source| Trouble::Unreachable { host: self.host.clone(), source };
        let protocol = |source| Trouble::Protocol { host: self.host.clone(), source };
        let stream = TcpStream::connect(&self.host).await.map_err(unreachable)?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(protocol)?;
        // It ends with this question, however that ends.
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let mut request =
            Request::builder().method(question.method).uri(question.path).header(HOST, &self.host);
        for (name, value) in question.headers {
            request = request.header(*name, *value);
        }
        let response = sender.send_request(request.body(question.body)?).await;
        let (head, body) = response.map_err(protocol)?.into_parts();
        let bytes = read(body).await.map_err(protocol)?;
        let bytes = bytes.ok_or_else(|| Trouble::TooLong { path: question.path.to_owned() })?;
        let etag = head.headers.get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        let body = String::from_utf8_lossy(&bytes).trim().to_owned();
        Ok(Answer { status: head.status.as_u16(), etag, body })
    }
}

/// The whole body; `None` when it is too long.
async fn read(mut body: Incoming) -> Result<Option<Vec<u8>>, hyper::Error> {
    let mut bytes = Vec::new();
    while let Some(frame) =
        std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
    {
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
        if bytes.len() > BODY_BYTES_MAX {
            return Ok(None);
        }
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::MetadataServer;

    #[test]
    fn an_endpoint_has_a_port() {
        for (configured, expected) in [
            ("", "169.254.169.254:80"),
            ("http://127.0.0.1:8099/", "127.0.0.1:8099"),
            ("http://metadata", "metadata:80"),
            ("http://[fd00:ec2::254]", "[fd00:ec2::254]:80"),
            ("http://[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(MetadataServer::new(configured, "169.254.169.254").host, expected);
        }
    }
}
