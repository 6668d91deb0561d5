//! Accepts connections, and limits their number and the time that each may take.
//!
//! hyper's own header timeout also runs while a keep-alive connection is idle between two scrapes. So this module
//! tracks the phase of each connection and enforces a timeout per phase.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Request;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;

use super::Endpoints;
use super::body::ResponseBody;
use crate::observability::LogThrottle;

/// The delay after a connection could not be accepted.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// The largest request head, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waiting for a request.
    Idle,
    /// Receiving a request's head. A new connection starts in this phase, because a client connects to send a request.
    Head,
    /// Generating and sending a response.
    Responding,
    /// Sending the rest of a response that has been generated completely.
    Flushing,
}

/// The phase of a connection and when it began.
#[derive(Debug)]
struct PhaseTracker(watch::Sender<(Phase, Instant)>);

impl PhaseTracker {
    fn enter(&self, phase: Phase) {
        self.0.send_replace((phase, Instant::now()));
    }

    /// Enters `to` if the current phase is `from`.
    fn advance(&self, from: Phase, to: Phase) {
        if self.0.borrow().0 == from {
            self.enter(to);
        }
    }

    /// Since when the connection has waited for a complete request. `None` while a request is being processed.
    fn waiting_since(&self) -> Option<Instant> {
        let (phase, since) = *self.0.borrow();
        matches!(phase, Phase::Idle | Phase::Head).then_some(since)
    }
}

#[derive(Debug)]
struct Connection {
    tracker: PhaseTracker,
    /// Notified to close the connection.
    close: Notify,
}

impl Connection {
    fn new() -> Self {
        let (phase_tx, _) = watch::channel((Phase::Head, Instant::now()));
        Self { tracker: PhaseTracker(phase_tx), close: Notify::new() }
    }
}

/// The open connections by ID.
#[derive(Debug, Default)]
struct ConnectionRegistry {
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    connection_closed: Notify,
}

impl ConnectionRegistry {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a connection if there are `max` of them. Closes the connection that has waited longest for a
    /// complete request. If all connections are processing one, waits until one of them ends, at the latest by its
    /// timeout.
    async fn make_room(&self, max: usize) {
        loop {
            let closed = self.connection_closed.notified();
            {
                let mut connections = self.lock();
                if connections.len() < max {
                    return;
                }
                if close_longest_waiting(&mut connections) {
                    return;
                }
            }
            closed.await;
        }
    }

    /// Frees a file descriptor: closes the connection that has waited longest for a complete request. If there is none,
    /// waits until another connection ends, or for [`ACCEPT_RETRY_DELAY`].
    async fn free_descriptor(&self) {
        let closed = self.connection_closed.notified();
        close_longest_waiting(&mut self.lock());
        // A connection has ended, or the delay has passed. Either way, the caller tries again.
        let _ = timeout(ACCEPT_RETRY_DELAY, closed).await;
    }
}

/// Closes the connection that has waited longest for a complete request. Returns whether there is one.
fn close_longest_waiting(connections: &mut HashMap<u64, Arc<Connection>>) -> bool {
    let waiting = connections.iter().filter_map(|(id, each)| Some((each.tracker.waiting_since()?, *id)));
    let longest = waiting.min().and_then(|(_, id)| connections.remove(&id));
    longest.inspect(|connection| connection.close.notify_one()).is_some()
}

/// Removes a connection from the registry when dropped, even if its task is canceled or panics.
struct RegistryGuard {
    registry: Arc<ConnectionRegistry>,
    id: u64,
}

impl Drop for RegistryGuard {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
        self.registry.connection_closed.notify_waiters();
    }
}

/// Serves until `stop` is true, and then finishes the responses in flight.
pub async fn serve(listener: TcpListener, endpoints: Arc<Endpoints>, mut stop: watch::Receiver<bool>) {
    let registry = Arc::new(ConnectionRegistry::default());
    let max = endpoints.config.borrow().http.max_connections;
    let mut next_id = 0;
    let mut accept_log = LogThrottle::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                tokio::select! {
                    () = registry.make_room(max) => {}
                    _ = stop.wait_for(|stop| *stop) => break,
                }
                next_id += 1;
                let connection = Arc::new(Connection::new());
                registry.lock().insert(next_id, Arc::clone(&connection));
                let guard = RegistryGuard { registry: Arc::clone(&registry), id: next_id };
                tokio::spawn(accept(stream, guard, connection, Arc::clone(&endpoints), stop.clone()));
                // Let the new connection read its request before the next one can evict it.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                if let Some(suppressed) = accept_log.check(&error.to_string()) {
                    tracing::warn!(%error, suppressed, "failed to accept connection");
                }
                if is_out_of_descriptors(&error) {
                    registry.free_descriptor().await;
                } else {
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
    drop(listener);
    while !registry.lock().is_empty() {
        let closed = registry.connection_closed.notified();
        if !registry.lock().is_empty() {
            closed.await;
        }
    }
}

/// Whether the process or the system has too many open files.
fn is_out_of_descriptors(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error).contains(&error.raw_os_error().unwrap_or_default())
}

/// Serves one connection over any stream. For the fuzz targets.
#[doc(hidden)]
pub async fn serve_one(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    endpoints: Arc<Endpoints>,
    stop: watch::Receiver<bool>,
) {
    let guard = RegistryGuard { registry: Arc::default(), id: 0 };
    run(stream, guard, Arc::new(Connection::new()), endpoints, stop).await;
}

/// Performs the TLS handshake, if there is one, and serves the connection.
async fn accept(
    stream: TcpStream,
    guard: RegistryGuard,
    connection: Arc<Connection>,
    endpoints: Arc<Endpoints>,
    mut stop: watch::Receiver<bool>,
) {
    let tls = endpoints.web_config.borrow().tls.clone();
    let Some(tls) = tls else { return run(stream, guard, connection, endpoints, stop).await };
    let handshake = async {
        if is_tls(&stream).await? {
            TlsAcceptor::from(tls).accept(stream).await.map(Some)
        } else {
            refuse_plain_http(stream).await
        }
    };
    let accepted = tokio::select! {
        accepted = handshake => accepted,
        () = phase_timeout(&connection, &endpoints) => return,
        () = connection.close.notified() => return,
        _ = stop.wait_for(|stop| *stop) => return,
    };
    match accepted {
        Ok(Some(stream)) => run(stream, guard, connection, endpoints, stop).await,
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "TLS handshake failed"),
    }
}

/// Whether the client begins with a TLS record of a handshake. It waits for the first byte.
async fn is_tls(stream: &TcpStream) -> io::Result<bool> {
    const HANDSHAKE: u8 = 22;
    let mut first = [HANDSHAKE];
    stream.peek(&mut first).await?;
    Ok(first == [HANDSHAKE])
}

/// Answers an HTTP request on a port for HTTPS, as Go's server does. The request is read, because the response would
/// otherwise be lost.
async fn refuse_plain_http<T>(mut stream: TcpStream) -> io::Result<Option<T>> {
    const RESPONSE: &[u8] = b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
        This is an HTTPS server: use https:// in the URL, or scheme: https in the scrape job.\n";
    stream.write_all(RESPONSE).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(MAX_HEAD as u64), &mut tokio::io::sink()).await?;
    Ok(None)
}

async fn run(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    _guard: RegistryGuard,
    connection: Arc<Connection>,
    endpoints: Arc<Endpoints>,
    mut stop: watch::Receiver<bool>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        connection.tracker.enter(Phase::Responding);
        let (endpoints, connection) = (Arc::clone(&endpoints), Arc::clone(&connection));
        async move {
            let response = endpoints.respond(request).await?;
            Ok::<_, std::convert::Infallible>(response.map(|body| TrackedBody { body, connection }))
        }
    });
    let io = TokioIo::new(TrackedStream { stream, connection: Arc::clone(&connection) });
    let mut serving =
        std::pin::pin!(http1::Builder::new().half_close(true).max_buf_size(MAX_HEAD).serve_connection(io, service));
    let mut stopping = false;
    loop {
        tokio::select! {
            served = &mut serving => {
                if let Err(error) = served {
                    tracing::debug!(%error, "connection failed");
                }
                break;
            }
            () = phase_timeout(&connection, &endpoints) => break,
            () = connection.close.notified() => break,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Returns when the connection has exceeded the timeout of its phase.
async fn phase_timeout(connection: &Connection, endpoints: &Endpoints) {
    let mut phase_rx = connection.tracker.0.subscribe();
    loop {
        let (phase, since) = *phase_rx.borrow_and_update();
        let http = endpoints.config.borrow().http.clone();
        let limit = if phase == Phase::Idle { http.idle_timeout } else { http.request_timeout };
        tokio::select! {
            () = sleep_until(since + limit) => return,
            _ = phase_rx.changed() => {}
        }
    }
}

/// A stream that records when a request begins and when a response has been sent.
struct TrackedStream<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S: AsyncRead + Unpin> AsyncRead for TrackedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.connection.tracker.advance(Phase::Idle, Phase::Head);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TrackedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.connection.tracker.advance(Phase::Flushing, Phase::Idle);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// A body that records when hyper has consumed it.
struct TrackedBody {
    body: ResponseBody,
    connection: Arc<Connection>,
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        self.connection.tracker.advance(Phase::Responding, Phase::Flushing);
    }
}

impl Body for TrackedBody {
    type Data = <ResponseBody as Body>::Data;
    type Error = <ResponseBody as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::config::Config;
    use crate::inbox::Inbox;
    use crate::ingest::IngestHandle;
    use crate::observability::{Health, SelfMetrics};

    #[tokio::test]
    async fn aborted_connection_is_removed_from_the_registry() {
        let (_stop_tx, stop_rx) = watch::channel(false);
        let config = watch::channel(Arc::new(Config::default())).1;
        let self_metrics = Arc::new(SelfMetrics::new().unwrap());
        let (inbox, _) = Inbox::new(1, Arc::clone(&self_metrics), Arc::default());
        let ingest = IngestHandle::new(channel().0, inbox);
        let web_config = watch::channel(Arc::default()).1;
        let endpoints = Endpoints::new(ingest, config, web_config, self_metrics, Health::default().into());
        let (registry, connection) = (Arc::new(ConnectionRegistry::default()), Arc::new(Connection::new()));
        registry.lock().insert(1, Arc::clone(&connection));
        let guard = RegistryGuard { registry: Arc::clone(&registry), id: 1 };
        let running = tokio::spawn(run(tokio::io::duplex(1).0, guard, connection, endpoints.into(), stop_rx));
        running.abort();
        assert!(running.await.is_err());
        assert!(registry.lock().is_empty());
    }
}
