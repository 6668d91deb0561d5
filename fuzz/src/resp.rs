//! What a Redis server sends: messages, or an error; the same ones in whatever pieces it comes, in bounded memory.
//!
//! Of an input, the first byte says how the server behaves (see `Server`), the second one how large the pieces are.

use std::alloc::System;
use std::io;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use cap::Cap;
use flower_exporter::broker::{Message, Subscription, Wire};
use flower_exporter::celery::Reject;
use flower_exporter::settings::Settings;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const MAX_MESSAGE: usize = 1024;
/// What a subscription may need with messages of that size, whatever the server sends.
const ROOM: usize = 768 << 10;
/// Bytes of an endless server.
const ENDLESS: usize = 512 << 10;
const CONFIRMED: &[u8] = b"*3\r\n$10\r\npsubscribe\r\n$13\r\n/0.celeryev/*\r\n:1\r\n";
/// Bytes that are kept of a message that is too large.
const SAMPLE: usize = 64;

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(input: &[u8]) {
    if let [behaviour, piece, bytes @ ..] = input {
        let mut sent = if behaviour & 1 == 0 { Vec::new() } else { CONFIRMED.to_vec() };
        sent.extend_from_slice(bytes);
        let tail = usize::from(*piece).min(bytes.len());
        if behaviour & 2 != 0 && tail > 0 {
            endless(&sent, &bytes[bytes.len() - tail..]);
        } else {
            // A long input in the smallest of pieces takes too long.
            alike(&sent, (usize::from(*piece) + 1).max(sent.len() / 256));
        }
    }
}

/// In pieces or at once: the same messages, and the same end.
fn alike(sent: &[u8], piece: usize) {
    let (whole, whole_end) = read(Server::new(sent, &[], usize::MAX));
    let (pieces, pieces_end) = read(Server::new(sent, &[], piece));
    let large = |messages: &[Heard]| messages.iter().filter(|heard| heard.too_large).count();
    // In pieces, any text that is too large counts as a message of its own, also where no message is.
    if large(&whole) == large(&pieces) {
        assert_eq!(whole, pieces);
        assert_eq!(whole_end, pieces_end);
    }
}

/// What goes on and on takes no more memory: what takes more aborts.
fn endless(sent: &[u8], tail: &[u8]) {
    let server = Server::new(sent, tail, usize::MAX);
    let limit = |bytes| ALLOCATOR.set_limit(bytes).expect("less is allocated");
    limit(ALLOCATOR.allocated() + ROOM);
    receive(server, |_| ());
    limit(usize::MAX);
}

#[derive(Debug, PartialEq)]
struct Heard {
    bytes: Vec<u8>,
    too_large: bool,
}

impl Heard {
    fn of(message: &Message) -> Self {
        let too_large = matches!(&message.wire, Wire::Refused(refusal) if refusal.reason == Reject::TooLarge);
        let kept = if too_large { SAMPLE.min(message.bytes.len()) } else { message.bytes.len() };
        Self { bytes: message.bytes[..kept].to_vec(), too_large }
    }
}

fn read(server: Server) -> (Vec<Heard>, String) {
    let mut heard = Vec::new();
    let end = receive(server, |message| heard.push(Heard::of(message)));
    (heard, end)
}

/// Hands out all messages until the end, and returns what that was.
fn receive(server: Server, mut each: impl FnMut(&Message)) -> String {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    let listening = async {
        let mut subscription = Subscription::redis_over(server, &SETTINGS).await?;
        loop {
            subscription.next().await?.messages.iter().for_each(&mut each);
        }
    };
    RUNTIME.with(|runtime| {
        let end: Result<(), flower_exporter::broker::Error> = runtime.block_on(listening);
        end.map_or_else(|error| error.to_string(), |()| String::new())
    })
}

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let mut settings = Settings::default();
    settings.events.max_message = MAX_MESSAGE;
    settings
});

/// The server's end of the connection, which says what it says and does not listen.
struct Server {
    bytes: Vec<u8>,
    at: usize,
    piece: usize,
}

impl Server {
    /// It sends `bytes`, then `tail` again and again if that is not empty, and hangs up.
    fn new(bytes: &[u8], tail: &[u8], piece: usize) -> Self {
        let mut bytes = bytes.to_vec();
        if !tail.is_empty() {
            bytes.extend(tail.repeat(ENDLESS / tail.len()));
        }
        Self { bytes, at: 0, piece }
    }
}

impl AsyncRead for Server {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let end = self.bytes.len().min(self.at + self.piece.min(buffer.remaining()));
        buffer.put_slice(&self.bytes[self.at..end]);
        self.at = end;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Server {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
