//! Connections: accepted, watched, and bounded in number and time.
//!
//! hyper's own header timeout also runs while a kept-alive connection rests between two scrapes, so the time limits are
//! kept here, by what the connection is doing.

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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::Endpoints;
use super::body::Payload;

/// Bytes of a request's head at most.
const MAX_HEAD: usize = 16 << 10;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waiting for a request.
    Resting,
    /// A request has begun to come, or the connection is new: nobody connects for nothing.
    Head,
    /// A response is being made or sent.
    Responding,
    /// The response is made; the rest of it is being sent.
    Flushing,
}

/// A connection's phase and when it began, seen from outside.
#[derive(Debug)]
struct Watch(watch::Sender<(Phase, Instant)>);

impl Watch {
    fn enter(&self, phase: Phase) {
        self.0.send_replace((phase, Instant::now()));
    }

    fn pass(&self, from: Phase, to: Phase) {
        if self.0.borrow().0 == from {
            self.enter(to);
        }
    }

    /// Since when there has been no complete request; `None` while there is one.
    fn waiting_since(&self) -> Option<Instant> {
        let (phase, since) = *self.0.borrow();
        matches!(phase, Phase::Resting | Phase::Head).then_some(since)
    }
}

#[derive(Debug)]
struct Connection {
    watch: Watch,
    close: Notify,
}

impl Connection {
    fn new() -> Self {
        let (sender, _) = watch::channel((Phase::Head, Instant::now()));
        Self { watch: Watch(sender), close: Notify::new() }
    }
}

/// The connections there are.
#[derive(Debug, Default)]
struct Table {
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    one_ended: Notify,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for one more: closes the connection that has waited longest without a complete request; if each has
    /// one, waits until one ends, which the time limits see to.
    async fn make_room(&self, max: usize) {
        loop {
            let ended = self.one_ended.notified();
            {
                let mut connections = self.lock();
                if connections.len() < max {
                    return;
                }
                let waiting = connections.iter().filter_map(|(id, each)| Some((each.watch.waiting_since()?, *id)));
                if let Some(closed) = waiting.min().and_then(|(_, id)| connections.remove(&id)) {
                    closed.close.notify_one();
                    return;
                }
            }
            ended.await;
        }
    }
}

/// A connection's place in the table, which it leaves however it ends.
struct Place {
    table: Arc<Table>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.lock().remove(&self.id);
        self.table.one_ended.notify_waiters();
    }
}

/// Serves until told to stop, then finishes the responses in flight.
pub async fn serve(listener: TcpListener, endpoints: Arc<Endpoints>, mut stop: watch::Receiver<bool>) {
    let table = Arc::new(Table::default());
    let max = endpoints.settings.borrow().http.max_connections;
    let mut next_id = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                tokio::select! {
                    () = table.make_room(max) => {}
                    _ = stop.wait_for(|stop| *stop) => break,
                }
                next_id += 1;
                let connection = Arc::new(Connection::new());
                table.lock().insert(next_id, Arc::clone(&connection));
                let place = Place { table: Arc::clone(&table), id: next_id };
                tokio::spawn(run(stream, place, connection, Arc::clone(&endpoints), stop.clone()));
                // The new connection reads its request before the next one may take its place.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while !table.lock().is_empty() {
        let ended = table.one_ended.notified();
        if !table.lock().is_empty() {
            ended.await;
        }
    }
}

/// Serves one connection over any stream. For the fuzz targets.
#[doc(hidden)]
pub async fn serve_one(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    endpoints: Arc<Endpoints>,
    stop: watch::Receiver<bool>,
) {
    let place = Place { table: Arc::default(), id: 0 };
    run(stream, place, Arc::new(Connection::new()), endpoints, stop).await;
}

async fn run(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    _place: Place,
    connection: Arc<Connection>,
    endpoints: Arc<Endpoints>,
    mut stop: watch::Receiver<bool>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        connection.watch.enter(Phase::Responding);
        let (endpoints, connection) = (Arc::clone(&endpoints), Arc::clone(&connection));
        async move {
            let response = endpoints.respond(request).await?;
            Ok::<_, std::convert::Infallible>(response.map(|payload| Tracked { payload, connection }))
        }
    });
    let io = TokioIo::new(Watched { stream, connection: Arc::clone(&connection) });
    let mut serving =
        std::pin::pin!(http1::Builder::new().half_close(true).max_buf_size(MAX_HEAD).serve_connection(io, service));
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = &mut serving => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
                break;
            }
            () = expired(&connection, &endpoints) => break,
            () = connection.close.notified() => break,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Ends when the connection has been in its phase for longer than it may.
async fn expired(connection: &Connection, endpoints: &Endpoints) {
    let mut phases = connection.watch.0.subscribe();
    loop {
        let (phase, since) = *phases.borrow_and_update();
        let http = endpoints.settings.borrow().http.clone();
        let limit = if phase == Phase::Resting { http.idle_timeout } else { http.request_timeout };
        tokio::select! {
            () = sleep_until(since + limit) => return,
            _ = phases.changed() => {}
        }
    }
}

/// A stream that knows when a request begins and when a response has been sent.
struct Watched<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.connection.watch.pass(Phase::Resting, Phase::Head);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.connection.watch.pass(Phase::Flushing, Phase::Resting);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// A body that tells when hyper is done with it.
struct Tracked {
    payload: Payload,
    connection: Arc<Connection>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.connection.watch.pass(Phase::Responding, Phase::Flushing);
    }
}

impl Body for Tracked {
    type Data = <Payload as Body>::Data;
    type Error = <Payload as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.payload).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.payload.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.payload.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::ingest::Asker;
    use crate::settings::Settings;
    use crate::telemetry::{Health, Telemetry};

    #[tokio::test]
    async fn a_connection_leaves_its_place_however_it_ends() {
        let (_stop, stopped) = watch::channel(false);
        let settings = watch::channel(Arc::new(Settings::default())).1;
        let asker = Asker::new(channel().0, channel().0);
        let endpoints = Endpoints::new(asker, settings, Telemetry::new().unwrap().into(), Health::default().into());
        let (table, connection) = (Arc::new(Table::default()), Arc::new(Connection::new()));
        table.lock().insert(1, Arc::clone(&connection));
        let place = Place { table: Arc::clone(&table), id: 1 };
        let running = tokio::spawn(run(tokio::io::duplex(1).0, place, connection, endpoints.into(), stopped));
        running.abort();
        assert!(running.await.is_err());
        assert!(table.lock().is_empty());
    }
}
