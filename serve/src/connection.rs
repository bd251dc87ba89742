//! Connections: accepted, bounded in number and in how long their peers may keep them waiting.
//!
//! HTTP/1.1 only, so that one connection is one exchange at a time and its deadlines are those of
//! the exchange. It knows nothing of models; reading bodies has its own deadline (`body`).

use std::io;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Time for the head of a request to arrive, which includes the silence between two requests of one
/// connection: as long as load balancers commonly keep an idle one.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);
/// Time a peer may not read a single byte of its answer before its connection is dropped.
const STALL_MAX: Duration = Duration::from_secs(30);
/// What one connection may buffer while it reads; heads beyond it are refused.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Pause after an accept that failed for want of file descriptors or memory: others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What bounds the connections of one server.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Connections at once; more wait in the kernel's backlog.
    pub connections_max: usize,
    /// Time running requests get once the server stops.
    pub drain_timeout: Duration,
    /// See [`HEAD_DEADLINE`].
    pub head_deadline: Duration,
    /// See [`STALL_MAX`].
    pub stall_max: Duration,
}

impl ConnectionLimits {
    /// With the deadlines that every server has.
    pub fn new(connections_max: usize, drain_timeout: Duration) -> Self {
        let (head_deadline, stall_max) = (HEAD_DEADLINE, STALL_MAX);
        Self { connections_max, drain_timeout, head_deadline, stall_max }
    }
}

/// When serving ends.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// Accept nobody any more, let running requests finish.
    pub shutdown: CancellationToken,
    /// The server is of no use any more: let running requests finish, but go on telling whoever
    /// asks meanwhile.
    pub broken: CancellationToken,
}

/// Serves until one of the endings; returns when the last connection has ended or the drain time
/// is over.
pub async fn serve(listener: TcpListener, router: Router, limits: ConnectionLimits, end: Ending) {
    let mut listener = Some(listener);
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = JoinSet::new();
    let finish = CancellationToken::new();
    let mut drained_by = None;
    loop {
        if drained_by.is_some() && connections.is_empty() {
            return;
        }
        tokio::select! {
            (stream, place) = accept(listener.as_ref(), &places) => {
                let connection = Connection { stream, finish: finish.clone(), _place: place };
                connections.spawn(connection.serve(router.clone(), limits.clone()));
            }
            // Reaped as they end; a connection that panicked has logged it.
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            () = end.shutdown.cancelled(), if listener.is_some() => {
                listener = None;
                finish.cancel();
                drained_by.get_or_insert(Instant::now() + limits.drain_timeout);
            }
            () = end.broken.cancelled(), if drained_by.is_none() => {
                finish.cancel();
                drained_by = Some(Instant::now() + limits.drain_timeout);
            }
            () = until(drained_by) => {
                tracing::warn!(
                    connections = connections.len(),
                    "requests were still running after the drain time"
                );
                return;
            }
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn accept(
    listener: Option<&TcpListener>,
    places: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    let (Some(listener), Ok(place)) = (listener, Arc::clone(places).acquire_owned().await) else {
        return std::future::pending().await;
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

struct Connection {
    stream: TcpStream,
    /// Answer what is running, then close.
    finish: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(self, router: Router, limits: ConnectionLimits) {
        // Pieces of a streamed answer are small and should not wait for one another; it works
        // without.
        let _ = self.stream.set_nodelay(true);
        // One that comes while the server ends gets its one answer.
        let is_last = self.finish.is_cancelled();
        let stream = Unstalled { inner: self.stream, stall_max: limits.stall_max, stalled: None };
        let exchange = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_deadline)
            .max_buf_size(READ_BUFFER_BYTES)
            .keep_alive(!is_last)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        let mut exchange = pin!(exchange);
        let ended = tokio::select! {
            ended = exchange.as_mut() => ended,
            () = self.finish.cancelled(), if !is_last => {
                exchange.as_mut().graceful_shutdown();
                exchange.await
            }
        };
        if let Err(error) = ended {
            // The peer's doing, whatever it was: it left, stalled or spoke no HTTP.
            tracing::debug!(%error, "a connection broke");
        }
    }
}

/// A connection that fails when its peer stops reading for too long.
struct Unstalled<S> {
    inner: S,
    stall_max: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: Unpin> Unstalled<S> {
    fn bounded(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stall_max = self.stall_max;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall_max)));
        match stalled.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                let message = format!("the peer read nothing for {} seconds", stall_max.as_secs());
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bounded(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.bounded(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    // A socket's flush and shutdown never wait for the peer.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Nothing here takes long; a hang fails instead of blocking the run.
    const GUARD: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_peer_that_reads_is_waited_for_and_one_that_stops_is_not() {
        let (near, mut far) = tokio::io::duplex(16);
        let stall_max = Duration::from_millis(50);
        let mut near = Unstalled { inner: near, stall_max, stalled: None };
        let written = near.write_all(&[1; 64]);
        let mut buffer = [0; 64];
        let read = far.read_exact(&mut buffer);
        let (written, read) = tokio::join!(written, read);
        written.expect("the peer reads");
        read.expect("all of it");
        let error = tokio::time::timeout(GUARD, near.write_all(&[1; 64])).await.expect("in time");
        assert_eq!(error.expect_err("the peer stopped").kind(), io::ErrorKind::TimedOut);
    }

    struct Running {
        address: std::net::SocketAddr,
        end: Ending,
        served: tokio::task::JoinHandle<()>,
    }

    /// A server of one connection at a time, impatient.
    async fn start(router: Router) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let limits = ConnectionLimits {
            connections_max: 1,
            drain_timeout: GUARD,
            head_deadline: Duration::from_millis(100),
            stall_max: Duration::from_millis(100),
        };
        let end = Ending::default();
        let served = tokio::spawn(serve(listener, router, limits, end.clone()));
        Running { address, end, served }
    }

    async fn ask(address: std::net::SocketAddr) -> String {
        let asked = async {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("closed after a while");
            answer
        };
        tokio::time::timeout(GUARD, asked).await.expect("in time")
    }

    #[tokio::test]
    async fn whoever_sends_no_head_makes_room_for_the_next() {
        let running = start(Router::new().route("/", get(|| async { "hello" }))).await;
        let silent = TcpStream::connect(running.address).await.expect("connected");
        let mut half = TcpStream::connect(running.address).await.expect("connected");
        half.write_all(b"GET / HTTP/1.1\r\nho").await.expect("sent");
        assert!(ask(running.address).await.ends_with("hello"));
        drop((silent, half));
        running.end.shutdown.cancel();
        tokio::time::timeout(GUARD, running.served).await.expect("in time").expect("no panic");
    }

    #[tokio::test]
    async fn whoever_stops_reading_loses_the_stream() {
        // Far more than the buffers of two sockets hold.
        let endless = || async {
            let chunk = Bytes::from(vec![b'x'; 64 << 10]);
            Body::from_stream(futures::stream::repeat(chunk).map(Ok::<_, io::Error>))
        };
        let router =
            Router::new().route("/", get(|| async { "hello" })).route("/endless", get(endless));
        let running = start(router).await;
        let mut stalled = TcpStream::connect(running.address).await.expect("connected");
        stalled.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
        assert!(ask(running.address).await.ends_with("hello"), "its place is free again");
        drop(stalled);
        running.end.shutdown.cancel();
        tokio::time::timeout(GUARD, running.served).await.expect("in time").expect("no panic");
    }
}
