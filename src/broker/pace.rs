//! Reading at a pace: when messages trickle in, a few milliseconds' worth of them are read at once.
//!
//! To be woken up for a message, over two or three threads, costs far more than to process it. So a socket that is
//! read often is not watched any more but looked at forty times a second, as drivers of network cards do, until
//! nothing is found there. The server keeps what is not read yet, and nobody looks at the metrics that often.

use std::io::{self, ErrorKind, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// Between two readings that emptied the socket.
const PAUSE: Duration = Duration::from_millis(25);
/// So many may follow each other without a pause, after as many pauses without a reading: questions and answers do.
const AT_ONCE: u32 = 50;
/// A reading of less than this, and less than there was room for, has emptied the socket.
const LARGE: usize = 64 << 10;

/// A socket that tokio's reactor can let go of.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Sized {
    /// The same, not watched and not blocking.
    type Unwatched: Read + Write + Unpin;

    fn unwatch(self) -> io::Result<Self::Unwatched>;

    /// To be called on a tokio runtime.
    fn watch(socket: Self::Unwatched) -> io::Result<Self>;
}

impl Socket for TcpStream {
    type Unwatched = std::net::TcpStream;

    fn unwatch(self) -> io::Result<Self::Unwatched> {
        self.into_std()
    }

    fn watch(socket: Self::Unwatched) -> io::Result<Self> {
        Self::from_std(socket)
    }
}

impl Socket for UnixStream {
    type Unwatched = std::os::unix::net::UnixStream;

    fn unwatch(self) -> io::Result<Self::Unwatched> {
        self.into_std()
    }

    fn watch(socket: Self::Unwatched) -> io::Result<Self> {
        Self::from_std(socket)
    }
}

enum State<S: Socket> {
    Watched(S),
    Unwatched(S::Unwatched),
    /// It could not change from one to the other.
    Broken,
}

/// A socket that is read at a pace, and written to without.
pub(super) struct Paced<S: Socket> {
    state: State<S>,
    runtime: Handle,
    /// A task, since it is cancelled with its runtime, while a timer that outlives it panics: lapin's thread may.
    pause: Option<JoinHandle<()>>,
    /// When all readings so far would have been due, had there been a pause between each two.
    due: Instant,
    /// A writer waits for room: whoever is not watched is not told of it.
    is_full: bool,
}

impl<S: Socket> Paced<S> {
    /// To be called on a tokio runtime.
    pub(super) fn new(socket: S) -> Self {
        Self {
            state: State::Watched(socket),
            runtime: Handle::current(),
            pause: None,
            due: Instant::now(),
            is_full: false,
        }
    }

    /// So much was read into so much room: is it time for a pause?
    fn has_read(&mut self, count: usize, room: usize) -> io::Result<()> {
        if count == 0 || count >= room.min(LARGE) {
            return Ok(());
        }
        let now = Instant::now();
        self.due = self.due.max(now) + PAUSE;
        if self.due > now + PAUSE * AT_ONCE && !self.is_full {
            self.unwatch()?;
            let end = self.due - PAUSE * AT_ONCE;
            // A timer, too, must be made on the runtime.
            self.pause = Some(self.runtime.spawn(async move { sleep_until(end).await }));
        }
        Ok(())
    }

    fn unwatch(&mut self) -> io::Result<()> {
        self.state = match std::mem::replace(&mut self.state, State::Broken) {
            State::Watched(socket) => State::Unwatched(socket.unwatch()?),
            other => other,
        };
        Ok(())
    }

    fn watch(&mut self) -> io::Result<&mut S> {
        self.state = match std::mem::replace(&mut self.state, State::Broken) {
            State::Unwatched(socket) => {
                let _on = self.runtime.enter();
                State::Watched(S::watch(socket)?)
            }
            other => other,
        };
        match &mut self.state {
            State::Watched(socket) => Ok(socket),
            _ => Err(ErrorKind::NotConnected.into()),
        }
    }
}

/// What a socket that does not block has done; none where it would have to wait.
fn at_once(done: io::Result<usize>) -> Option<io::Result<usize>> {
    match done {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
        done => Some(done),
    }
}

impl<S: Socket> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        if let Some(pause) = &mut self.pause {
            // Over, or cancelled: there is nothing more to wait for.
            let _ = ready!(Pin::new(pause).poll(context));
            self.pause = None;
        }
        if let State::Unwatched(socket) = &mut self.state
            && let Some(read) = at_once(socket.read(buffer.initialize_unfilled_to(room.min(LARGE))))
        {
            let count = read?;
            buffer.advance(count);
            return Poll::Ready(self.has_read(count, room));
        }
        ready!(Pin::new(self.watch()?).poll_read(context, buffer))?;
        Poll::Ready(self.has_read(buffer.filled().len() - before, room))
    }
}

impl<S: Socket> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let State::Unwatched(socket) = &mut self.state
            && let Some(written) = at_once(socket.write(bytes))
        {
            return Poll::Ready(written);
        }
        let written = Pin::new(self.watch()?).poll_write(context, bytes);
        self.is_full = written.is_pending();
        written
    }

    /// Sockets hold nothing back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.watch()?).poll_shutdown(context)
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

    async fn is_readable(paced: &mut Paced<UnixStream>, buffer: &mut Vec<u8>) -> bool {
        // The pause's task has its turn.
        yield_now().await;
        let mut reading = std::pin::pin!(paced.read_buf(buffer));
        poll_fn(|context| Poll::Ready(reading.as_mut().poll(context).is_ready())).await
    }

    /// A socket that has been read so often that there is a pause.
    async fn tired() -> (Paced<UnixStream>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut paced, mut buffer) = (Paced::new(ours), Vec::new());
        for _ in 0..=AT_ONCE {
            assert!(matches!(paced.state, State::Watched(_)));
            theirs.write_all(b"x").await.unwrap();
            paced.read_buf(&mut buffer).await.unwrap();
        }
        assert!(matches!(paced.state, State::Unwatched(_)));
        (paced, theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn what_trickles_in_is_read_together() {
        let (mut paced, mut theirs) = tired().await;
        let mut buffer = Vec::new();
        for round in 1..=3 {
            theirs.write_all(b"ab").await.unwrap();
            assert!(!is_readable(&mut paced, &mut buffer).await);
            advance(PAUSE / 4).await;
            theirs.write_all(b"c").await.unwrap();
            assert!(!is_readable(&mut paced, &mut buffer).await);
            advance(PAUSE).await;
            assert!(is_readable(&mut paced, &mut buffer).await);
            assert_eq!(buffer, b"abc".repeat(round));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_without_news_is_watched_again_and_soon_read_at_once() {
        let (mut paced, mut theirs) = tired().await;
        let mut buffer = Vec::new();
        advance(PAUSE * (AT_ONCE + 2)).await;
        assert!(!is_readable(&mut paced, &mut buffer).await);
        assert!(matches!(paced.state, State::Watched(_)));
        for _ in 0..AT_ONCE {
            theirs.write_all(b"x").await.unwrap();
            paced.read_buf(&mut buffer).await.unwrap();
            assert!(matches!(paced.state, State::Watched(_)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn much_is_read_without_a_pause() {
        let (mut paced, theirs) = tired().await;
        let theirs = theirs.into_std().unwrap();
        let (sent, mut got) = (4 * LARGE, 0);
        let writer = std::thread::spawn(move || {
            theirs.set_nonblocking(false).unwrap();
            (&theirs).write_all(&vec![b'x'; sent]).unwrap();
            theirs
        });
        let mut buffer = vec![0; 1024];
        while got < sent {
            // Every reading fills the room there is.
            let due = paced.due;
            let count = paced.read(&mut buffer).await.unwrap();
            assert!(paced.due == due || count < buffer.len());
            got += count;
        }
        drop(writer.join().unwrap());
        assert_eq!(paced.read(&mut buffer).await.unwrap(), 0, "the end comes through");
    }

    #[test]
    fn a_pause_ends_with_its_runtime() {
        for is_closed in [true, false] {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (mut paced, theirs) = runtime.block_on(tired());
            runtime.shutdown_background();
            let kept = (!is_closed).then_some(theirs);
            let mut buffer = Vec::new();
            let mut reading = std::pin::pin!(paced.read_buf(&mut buffer));
            let Poll::Ready(end) = reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
                panic!("it waits for ever");
            };
            assert_eq!(end.is_ok_and(|count| count == 0), is_closed);
            drop(kept);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writing_does_not_wait() {
        let (mut paced, mut theirs) = tired().await;
        paced.write_all(b"now").await.unwrap();
        assert!(matches!(paced.state, State::Unwatched(_)));
        let mut got = [0; 3];
        theirs.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"now");
        // More than the socket holds: it is watched until there is room, however much is read meanwhile.
        let all = vec![b'x'; 4 << 20];
        let mut written = 0;
        while let Poll::Ready(count) = poll_fn(|context| {
            Poll::Ready(Pin::new(&mut paced).poll_write(context, &all[written..]).map(Result::unwrap))
        })
        .await
        {
            written += count;
        }
        for _ in 0..2 * AT_ONCE {
            theirs.write_all(b"x").await.unwrap();
            paced.read_u8().await.unwrap();
            assert!(matches!(paced.state, State::Watched(_)));
        }
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).await.map(|_| all.len())
        });
        paced.write_all(&all[written..]).await.unwrap();
        paced.shutdown().await.unwrap();
        assert_eq!(reader.await.unwrap().unwrap(), all.len());
    }
}
