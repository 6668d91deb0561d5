//! Adaptive polling of a busy socket, as in the NAPI of Linux network drivers.
//!
//! A wakeup for a single message involves two or three threads and costs far more than processing the message. NAPI
//! solves the same problem for network cards: under load, a driver disables interrupts and polls the card at intervals,
//! and enables interrupts again once it finds nothing. Here the reactor's readiness notifications are the interrupts:
//!
//! 1. A socket starts registered with tokio's reactor, and every message wakes the reader.
//! 2. If reads follow each other faster than one per [`POLL_INTERVAL`] for more than [`BURST`] reads, the socket is
//!    deregistered. It is then polled once per interval, and each read returns all messages since the previous one.
//! 3. If a poll finds no data, or a write would block, the socket is registered again.
//!
//! Polling adds at most one interval of latency, which is far below a scrape interval. Unread data stays in the receive
//! buffer, so TCP's flow control is unaffected.

use std::io::{self, ErrorKind, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// The time between two reads of a polled socket.
const POLL_INTERVAL: Duration = Duration::from_millis(25);
/// The number of reads that may follow each other without a delay, so that requests and replies are not delayed. An
/// idle socket regains one read per interval.
const BURST: u32 = 50;
/// The largest read of a polled socket, in bytes. A read that returns less than this, and less than the buffer has room
/// for, has emptied the socket.
const BULK_READ: usize = 64 << 10;

/// A socket that can be deregistered from tokio's reactor.
pub(in crate::broker) trait Socket: AsyncRead + AsyncWrite + Unpin + Sized {
    /// The same socket without the reactor, in non-blocking mode.
    type Polled: Read + Write + Unpin;

    /// Removes the socket from the reactor.
    fn deregister(self) -> io::Result<Self::Polled>;

    /// Registers the socket. Must be called on a tokio runtime.
    fn register(socket: Self::Polled) -> io::Result<Self>;
}

impl Socket for TcpStream {
    type Polled = std::net::TcpStream;

    fn deregister(self) -> io::Result<Self::Polled> {
        self.into_std()
    }

    fn register(socket: Self::Polled) -> io::Result<Self> {
        Self::from_std(socket)
    }
}

impl Socket for UnixStream {
    type Polled = std::os::unix::net::UnixStream;

    fn deregister(self) -> io::Result<Self::Polled> {
        self.into_std()
    }

    fn register(socket: Self::Polled) -> io::Result<Self> {
        Self::from_std(socket)
    }
}

enum State<S: Socket> {
    /// The reactor wakes the reader.
    Registered(S),
    /// A timer wakes the reader.
    Polled(S::Polled),
    /// Registering or deregistering failed, and the socket is closed.
    Failed,
}

/// A socket whose reads are coalesced under load. Writes are never delayed.
pub(in crate::broker) struct CoalescingSocket<S: Socket> {
    state: State<S>,
    runtime: Handle,
    /// Completes when the socket may be read again. It is a task, which is canceled with its runtime. A timer that
    /// outlives its runtime panics, and lapin's thread may poll this socket after the runtime's end.
    poll_timer: Option<JoinHandle<()>>,
    /// When the next read would be due if there were an interval between all reads so far.
    next_due: Instant,
    /// A writer waits for room in the send buffer. Only a registered socket can wake it.
    write_blocked: bool,
}

impl<S: Socket> CoalescingSocket<S> {
    /// Takes a registered socket. Must be called on a tokio runtime.
    pub(in crate::broker) fn new(socket: S) -> Self {
        Self {
            state: State::Registered(socket),
            runtime: Handle::current(),
            poll_timer: None,
            next_due: Instant::now(),
            write_blocked: false,
        }
    }

    /// Accounts for a read of `count` bytes into a buffer with room for `room` bytes, and starts the poll timer if the
    /// socket has been read too often.
    fn after_read(&mut self, count: usize, room: usize) -> io::Result<()> {
        if count == 0 || count >= room.min(BULK_READ) {
            return Ok(());
        }
        let now = Instant::now();
        self.next_due = self.next_due.max(now) + POLL_INTERVAL;
        if self.next_due > now + POLL_INTERVAL * BURST && !self.write_blocked {
            self.deregister()?;
            let next_poll = self.next_due - POLL_INTERVAL * BURST;
            // The timer must be created on the runtime, so it is created within the task.
            self.poll_timer = Some(self.runtime.spawn(async move { sleep_until(next_poll).await }));
        }
        Ok(())
    }

    fn deregister(&mut self) -> io::Result<()> {
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Registered(socket) => State::Polled(socket.deregister()?),
            other => other,
        };
        Ok(())
    }

    fn register(&mut self) -> io::Result<&mut S> {
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Polled(socket) => {
                let _context = self.runtime.enter();
                State::Registered(S::register(socket)?)
            }
            other => other,
        };
        match &mut self.state {
            State::Registered(socket) => Ok(socket),
            _ => Err(ErrorKind::NotConnected.into()),
        }
    }
}

/// The result of an operation on a non-blocking socket. `None` if it would have blocked.
fn unless_blocked(result: io::Result<usize>) -> Option<io::Result<usize>> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
        result => Some(result),
    }
}

impl<S: Socket> AsyncRead for CoalescingSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (filled, room) = (buffer.filled().len(), buffer.remaining());
        if let Some(poll_timer) = &mut self.poll_timer {
            // The timer has expired or was cancelled with its runtime. Either way, the socket may be read.
            let _ = ready!(Pin::new(poll_timer).poll(context));
            self.poll_timer = None;
        }
        if let State::Polled(socket) = &mut self.state
            && let Some(read) = unless_blocked(socket.read(buffer.initialize_unfilled_to(room.min(BULK_READ))))
        {
            let count = read?;
            buffer.advance(count);
            return Poll::Ready(self.after_read(count, room));
        }
        ready!(Pin::new(self.register()?).poll_read(context, buffer))?;
        Poll::Ready(self.after_read(buffer.filled().len() - filled, room))
    }
}

impl<S: Socket> AsyncWrite for CoalescingSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let State::Polled(socket) = &mut self.state
            && let Some(written) = unless_blocked(socket.write(bytes))
        {
            return Poll::Ready(written);
        }
        let written = Pin::new(self.register()?).poll_write(context, bytes);
        self.write_blocked = written.is_pending();
        written
    }

    /// A socket has no buffer to flush.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.register()?).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Waker;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::yield_now;
    use tokio::time::advance;

    use super::*;

    async fn is_readable(socket: &mut CoalescingSocket<UnixStream>, buffer: &mut Vec<u8>) -> bool {
        // Let the timer's task run.
        yield_now().await;
        let mut reading = std::pin::pin!(socket.read_buf(buffer));
        poll_fn(|context| Poll::Ready(reading.as_mut().poll(context).is_ready())).await
    }

    /// A socket that has been read often enough to be polled.
    async fn polled_socket() -> (CoalescingSocket<UnixStream>, UnixStream) {
        let (local, mut peer) = UnixStream::pair().unwrap();
        let (mut socket, mut buffer) = (CoalescingSocket::new(local), Vec::new());
        for _ in 0..=BURST {
            assert!(matches!(socket.state, State::Registered(_)));
            peer.write_all(b"x").await.unwrap();
            socket.read_buf(&mut buffer).await.unwrap();
        }
        assert!(matches!(socket.state, State::Polled(_)));
        (socket, peer)
    }

    #[tokio::test(start_paused = true)]
    async fn small_messages_are_read_together() {
        let (mut socket, mut peer) = polled_socket().await;
        let mut buffer = Vec::new();
        for round in 1..=3 {
            peer.write_all(b"ab").await.unwrap();
            assert!(!is_readable(&mut socket, &mut buffer).await);
            advance(POLL_INTERVAL / 4).await;
            peer.write_all(b"c").await.unwrap();
            assert!(!is_readable(&mut socket, &mut buffer).await);
            advance(POLL_INTERVAL).await;
            assert!(is_readable(&mut socket, &mut buffer).await);
            assert_eq!(buffer, b"abc".repeat(round));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_socket_is_registered_again_and_read_without_delay() {
        let (mut socket, mut peer) = polled_socket().await;
        let mut buffer = Vec::new();
        advance(POLL_INTERVAL * (BURST + 2)).await;
        assert!(!is_readable(&mut socket, &mut buffer).await);
        assert!(matches!(socket.state, State::Registered(_)));
        for _ in 0..BURST {
            peer.write_all(b"x").await.unwrap();
            socket.read_buf(&mut buffer).await.unwrap();
            assert!(matches!(socket.state, State::Registered(_)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bulk_data_is_read_without_delay() {
        let (mut socket, peer) = polled_socket().await;
        let peer = peer.into_std().unwrap();
        let (sent, mut received) = (4 * BULK_READ, 0);
        let writer = std::thread::spawn(move || {
            peer.set_nonblocking(false).unwrap();
            (&peer).write_all(&vec![b'x'; sent]).unwrap();
            peer
        });
        let mut buffer = vec![0; 1024];
        while received < sent {
            // Every read fills the buffer.
            let next_due = socket.next_due;
            let count = socket.read(&mut buffer).await.unwrap();
            assert!(socket.next_due == next_due || count < buffer.len());
            received += count;
        }
        drop(writer.join().unwrap());
        assert_eq!(socket.read(&mut buffer).await.unwrap(), 0, "end of stream");
    }

    #[test]
    fn a_read_completes_after_the_runtime_has_ended() {
        for is_closed in [true, false] {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (mut socket, peer) = runtime.block_on(polled_socket());
            runtime.shutdown_background();
            let open_peer = (!is_closed).then_some(peer);
            let mut buffer = Vec::new();
            let mut reading = std::pin::pin!(socket.read_buf(&mut buffer));
            let Poll::Ready(end) = reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
                panic!("the read waits indefinitely");
            };
            assert_eq!(end.is_ok_and(|count| count == 0), is_closed);
            drop(open_peer);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writes_are_not_delayed() {
        let (mut socket, mut peer) = polled_socket().await;
        socket.write_all(b"now").await.unwrap();
        assert!(matches!(socket.state, State::Polled(_)));
        let mut received = [0; 3];
        peer.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"now");
        // A blocked write keeps the socket registered, no matter how often it is read.
        let all = vec![b'x'; 4 << 20];
        let mut written = 0;
        while let Poll::Ready(count) = poll_fn(|context| {
            Poll::Ready(Pin::new(&mut socket).poll_write(context, &all[written..]).map(Result::unwrap))
        })
        .await
        {
            written += count;
        }
        for _ in 0..2 * BURST {
            peer.write_all(b"x").await.unwrap();
            socket.read_u8().await.unwrap();
            assert!(matches!(socket.state, State::Registered(_)));
        }
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).await.map(|_| all.len())
        });
        socket.write_all(&all[written..]).await.unwrap();
        socket.shutdown().await.unwrap();
        assert_eq!(reader.await.unwrap().unwrap(), all.len());
    }
}
