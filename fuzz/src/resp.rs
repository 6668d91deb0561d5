//! Bytes from a Redis server: messages or an error, the same ones however the bytes are split, in bounded memory.
//!
//! The first byte of an input sets the behavior of the server: bit 0 confirms the subscription first, and bit 1 repeats
//! the tail of the input. The second byte sets the size of the pieces and the length of the tail.

use std::alloc::System;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use cap::Cap;
use flower_exporter::broker::{BrokerError, EventReceiver};
use flower_exporter::celery::DecodeError;
use flower_exporter::config::Config;
use flower_exporter::inbox::{Encoding, Message};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const MAX_MESSAGE: usize = 1024;
/// Memory limit of a subscription with messages of at most that size, in bytes: for what the allocator provides, and for
/// what the kernel maps, to which the receiver reads.
const MEMORY_LIMIT: usize = 768 << 10;
/// Bytes that a server sends if it repeats its tail.
const ENDLESS_LEN: usize = 512 << 10;
/// The size of a page of memory, in bytes. Where pages are larger, the check of mapped memory is weaker.
const PAGE: usize = 4 << 10;
const CONFIRMED: &[u8] = b"*3\r\n$10\r\npsubscribe\r\n$13\r\n/0.celeryev/*\r\n:1\r\n";
/// Bytes that are kept of a message that exceeds the limit.
const SAMPLE_LEN: usize = 64;

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(input: &[u8]) {
    if let [behavior, piece, bytes @ ..] = input {
        let mut sent = if behavior & 1 == 0 { Vec::new() } else { CONFIRMED.to_vec() };
        sent.extend_from_slice(bytes);
        let tail = usize::from(*piece).min(bytes.len());
        if behavior & 2 != 0 && tail > 0 {
            assert_bounded_memory(&sent, &bytes[bytes.len() - tail..]);
        } else {
            // A long input in tiny pieces takes too long.
            assert_independent_of_pieces(&sent, (usize::from(*piece) + 1).max(sent.len() / 256));
        }
    }
}

/// Asserts that the messages and the final error are the same in pieces and at once.
fn assert_independent_of_pieces(sent: &[u8], piece: usize) {
    let (full, full_end) = read(Server::new(sent, &[], usize::MAX));
    let (pieces, pieces_end) = read(Server::new(sent, &[], piece));
    if !sent.starts_with(CONFIRMED) && full_end.is_subscribed {
        // Only a confirmation that arrives alone is followed by a PING before anything else.
        assert!(pieces_end.is_subscribed);
        return;
    }
    let large = |messages: &[Received]| messages.iter().filter(|received| received.too_large).count();
    // In pieces, every string that is too large is reported as a message, even where no message is expected.
    if large(&full) == large(&pieces) {
        assert_eq!(full, pieces);
        assert_eq!(full_end, pieces_end);
    }
}

/// Asserts that an endless stream needs bounded memory. The allocator aborts the process above the limit.
fn assert_bounded_memory(sent: &[u8], tail: &[u8]) {
    let mut server = Server::new(sent, tail, usize::MAX);
    let (mapped, peak) = (mapped_memory(), Arc::<AtomicUsize>::default());
    server.peak_mapped = Some(Arc::clone(&peak));
    let limit = |bytes| ALLOCATOR.set_limit(bytes).expect("the limit is above the current allocation");
    limit(ALLOCATOR.allocated() + MEMORY_LIMIT);
    receive(server, |_| ());
    limit(usize::MAX);
    assert!(peak.load(Ordering::Relaxed) <= mapped + MEMORY_LIMIT, "too much memory was mapped");
}

/// The memory that this process has mapped, in bytes.
fn mapped_memory() -> usize {
    let mut text = [0; 32];
    let length =
        File::open("/proc/self/statm").and_then(|mut file| file.read(&mut text)).expect("the size of this process");
    let pages =
        std::str::from_utf8(&text[..length]).ok().and_then(|text| text.split(' ').next()?.parse::<usize>().ok());
    pages.expect("a number of pages") * PAGE
}

#[derive(Debug, PartialEq)]
struct Received {
    bytes: Vec<u8>,
    too_large: bool,
}

impl Received {
    fn new(message: &Message) -> Self {
        let too_large =
            matches!(&message.encoding, Encoding::Undecodable(failure) if failure.reason == DecodeError::TooLarge);
        let kept = if too_large { SAMPLE_LEN.min(message.bytes.len()) } else { message.bytes.len() };
        Self { bytes: message.bytes[..kept].to_vec(), too_large }
    }
}

/// How a connection ended.
#[derive(Debug, PartialEq)]
struct End {
    is_subscribed: bool,
    error: String,
}

fn read(server: Server) -> (Vec<Received>, End) {
    let mut received = Vec::new();
    let end = receive(server, |message| received.push(Received::new(message)));
    (received, end)
}

/// Passes all messages to `on_message` until the connection ends.
fn receive(server: Server, mut on_message: impl FnMut(&Message)) -> End {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    let mut is_subscribed = false;
    let subscription = async {
        let mut receiver = EventReceiver::redis_from_stream(server, &CONFIG).await?;
        is_subscribed = true;
        loop {
            receiver.next().await?.messages.iter().for_each(&mut on_message);
        }
    };
    let end: Result<Infallible, BrokerError> = RUNTIME.with(|runtime| runtime.block_on(subscription));
    let Err(error) = end;
    End { is_subscribed, error: error.to_string() }
}

static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let mut config = Config::default();
    config.events.message_max_bytes = MAX_MESSAGE;
    config
});

/// The server's end of the connection. It sends fixed bytes and ignores what it receives.
struct Server {
    bytes: Vec<u8>,
    position: usize,
    piece: usize,
    /// The most memory that was mapped at a read, in bytes.
    peak_mapped: Option<Arc<AtomicUsize>>,
}

impl Server {
    /// Sends `bytes`, repeats `tail` up to [`ENDLESS_LEN`] bytes, and closes the connection. A confirmation arrives alone.
    fn new(bytes: &[u8], tail: &[u8], piece: usize) -> Self {
        let mut bytes = bytes.to_vec();
        if !tail.is_empty() {
            bytes.extend(tail.repeat(ENDLESS_LEN / tail.len()));
        }
        Self { bytes, position: 0, piece, peak_mapped: None }
    }
}

impl AsyncRead for Server {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(peak) = &self.peak_mapped {
            peak.fetch_max(mapped_memory(), Ordering::Relaxed);
        }
        let mut end = self.bytes.len().min(self.position + self.piece.min(buffer.remaining()));
        if self.position < CONFIRMED.len() && self.bytes.starts_with(CONFIRMED) {
            end = end.min(CONFIRMED.len());
        }
        buffer.put_slice(&self.bytes[self.position..end]);
        self.position = end;
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
