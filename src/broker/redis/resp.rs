//! A connection that speaks Redis' protocol: to a Redis server or a Sentinel, with or without TLS.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::Error;
use crate::broker::dial::dial;
use crate::broker::pace::Paced;
use crate::settings::Secret;
use crate::settings::url::Address;
use crate::tls;

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 64 << 10;
/// Room for reading: below what allocators take from the system at each call.
pub(super) const READ_SIZE: usize = 64 << 10;

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How a server is reached and who we are to it.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) username: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) tls: Option<tls::Client>,
    /// For the handshake of TLS.
    pub(super) limit: Duration,
}

impl Access {
    /// Connects and authenticates.
    pub(super) async fn open(&self, address: &Address) -> Result<Connection, Error> {
        let mut connection = self.connect(address).await.map_err(|error| Error::from(&error))?;
        if let Some(password) = &self.password {
            let user = self.username.as_deref();
            let command: Vec<&str> = ["AUTH"].into_iter().chain(user).chain([password.expose()]).collect();
            connection.request(&command).await.map_err(|error| error.without(password.expose()))?;
        }
        Ok(connection)
    }

    async fn connect(&self, address: &Address) -> io::Result<Connection> {
        match address {
            Address::Tcp { host, port } => {
                let stream = dial(host, *port).await?;
                let peer = stream.peer_addr()?;
                let stream = Paced::new(stream);
                let stream: Box<dyn Stream> = match &self.tls {
                    Some(tls) => Box::new(tls.handshake(host, stream, self.limit).await?),
                    None => Box::new(stream),
                };
                Ok(Connection { peer: Some(peer), ..Connection::new(stream) })
            }
            Address::Unix(path) => Ok(Connection::new(Box::new(Paced::new(UnixStream::connect(path).await?)))),
        }
    }
}

/// An open connection, and what has come in on it and is not taken out yet.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    pub(super) buffer: BytesMut,
    /// The other end, of TCP: of the addresses that a name may have.
    pub(super) peer: Option<SocketAddr>,
}

impl Connection {
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(READ_SIZE), peer: None }
    }

    /// Sends a command and waits for its answer: its texts, at most four.
    pub(super) async fn request(&mut self, command: &[&str]) -> Result<Vec<String>, Error> {
        self.send(command).await?;
        loop {
            if let Scan::Whole(frame) = Frame::scan(&self.buffer)? {
                let answer = self.buffer.split_to(frame.length);
                let texts: Vec<String> = frame.texts().iter().map(|range| text(&answer, range)).collect();
                return match frame.kind {
                    b'-' => Err(Error::Refused(format!("{}: {}", command[0], complaint(&texts.concat())))),
                    _ => Ok(texts),
                };
            }
            if self.buffer.len() > MAX_ANSWER {
                return Err(foreign());
            }
            self.read().await?;
        }
    }

    pub(super) async fn send(&mut self, command: &[&str]) -> Result<(), Error> {
        let sending = async {
            self.stream.write_all(&encode(command)).await?;
            self.stream.flush().await
        };
        sending.await.map_err(|error| Error::from(&error))
    }

    /// Waits for bytes. Cancelling loses nothing.
    pub(super) async fn read(&mut self) -> Result<(), Error> {
        // Doubling keeps the copying of a large message's beginning linear.
        self.buffer.reserve(READ_SIZE.max(self.buffer.len()));
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err(Error::Lost("the server closed the connection".to_owned())),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::from(&error)),
        }
    }
}

/// What a server says of a command, without the arguments that it repeats of one it does not know.
pub(super) fn complaint(text: &str) -> &str {
    text.split_once(", with args").map_or(text, |(complaint, _)| complaint)
}

fn encode(command: &[&str]) -> Vec<u8> {
    let mut frame = format!("*{}\r\n", command.len());
    for word in command {
        for piece in ["$", &word.len().to_string(), "\r\n", word, "\r\n"] {
            frame.push_str(piece);
        }
    }
    frame.into_bytes()
}

/// A whole frame: what kind it is, and its first texts. Arrays within arrays count as one.
///
/// Read by a loop, not by recursion, and bounded: redis-protocol's decoder, which fred uses, lets a server that nests
/// arrays overflow our stack.
#[derive(Debug, PartialEq)]
pub(super) struct Frame {
    /// The first byte: `*` of an array, `-` of an error.
    pub(super) kind: u8,
    texts: [Range<usize>; 4],
    count: usize,
    /// In bytes.
    pub(super) length: usize,
}

/// What stands at the start of a buffer.
#[derive(Debug, PartialEq)]
pub(super) enum Scan {
    Whole(Frame),
    /// The rest is still to come; where the text that is under way will be.
    Partial(Option<Range<usize>>),
}

/// Elements of a frame at most, those of arrays within it included: enough for the answer to ROLE.
const MAX_ELEMENTS: usize = 4096;
/// Bytes of a line at most: only errors and status are long.
const MAX_LINE: usize = 4096;

impl Frame {
    /// Where its first texts are, at most four of them.
    pub(super) fn texts(&self) -> &[Range<usize>] {
        &self.texts[..self.count]
    }

    pub(super) fn scan(buffer: &[u8]) -> Result<Scan, Error> {
        let mut frame = Self { kind: 0, texts: [const { 0..0 }; 4], count: 0, length: 0 };
        let (mut pending, mut seen) = (1, 0);
        while pending > 0 {
            let Some((kind, line)) = line(buffer, frame.length)? else { return Ok(Scan::Partial(None)) };
            if seen == 0 {
                frame.kind = kind;
            }
            (pending, seen) = (pending - 1, seen + 1);
            frame.length = line.end + 2;
            match kind {
                b'+' | b'-' | b':' => frame.add(line),
                b'*' => pending += length(&buffer[line])?.unwrap_or(0),
                b'$' => {
                    if let Some(size) = length(&buffer[line])? {
                        let text = frame.length..frame.length.checked_add(size).ok_or_else(foreign)?;
                        frame.length = text.end.checked_add(2).ok_or_else(foreign)?;
                        if buffer.len() < frame.length {
                            return Ok(Scan::Partial(Some(text)));
                        }
                        frame.add(text);
                    }
                }
                _ => return Err(foreign()),
            }
            if pending > MAX_ELEMENTS || seen > MAX_ELEMENTS {
                return Err(foreign());
            }
        }
        Ok(Scan::Whole(frame))
    }

    fn add(&mut self, text: Range<usize>) {
        if let Some(place) = self.texts.get_mut(self.count) {
            *place = text;
            self.count += 1;
        }
    }
}

pub(super) fn foreign() -> Error {
    Error::Lost("the answer is not in Redis' protocol: is that a Redis server?".to_owned())
}

/// The line at `start`: its first byte, and where the rest of it is.
fn line(buffer: &[u8], start: usize) -> Result<Option<(u8, Range<usize>)>, Error> {
    let rest = &buffer[start.min(buffer.len())..];
    let Some(kind) = rest.first() else { return Ok(None) };
    match rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n') {
        Some(end) if end >= 2 && rest[end - 1] == b'\r' => Ok(Some((*kind, start + 1..start + end - 1))),
        None if rest.len() < MAX_LINE && b"+-:*$".contains(kind) => Ok(None),
        _ => Err(foreign()),
    }
}

/// A number of bytes or elements; none where it says -1, for null.
fn length(line: &[u8]) -> Result<Option<usize>, Error> {
    match std::str::from_utf8(line) {
        Ok("-1") => Ok(None),
        Ok(text) => text.parse().map(Some).map_err(|_| foreign()),
        Err(_) => Err(foreign()),
    }
}

/// What stands in `range` of `buffer`.
pub(super) fn text(buffer: &[u8], range: &Range<usize>) -> String {
    String::from_utf8_lossy(&buffer[range.clone()]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(buffer: &str) -> Vec<&str> {
        match Frame::scan(buffer.as_bytes()).unwrap() {
            Scan::Whole(frame) => frame.texts().iter().map(|range| &buffer[range.clone()]).collect(),
            Scan::Partial(_) => panic!("partial: {buffer:?}"),
        }
    }

    #[test]
    fn whole_frames() {
        assert_eq!(texts("+OK\r\n"), ["OK"]);
        assert_eq!(texts("-NOPERM no\r\n"), ["NOPERM no"]);
        assert_eq!(texts("*-1\r\n"), Vec::<&str>::new());
        assert_eq!(texts("*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\nrest"), ["subscribe", "x", "1"]);
        assert_eq!(texts("*3\r\n$6\r\nmaster\r\n:0\r\n*1\r\n*2\r\n$1\r\nh\r\n$-1\r\n"), ["master", "0", "h"]);
        assert_eq!(texts("*2\r\n$4\r\npong\r\n$0\r\n\r\n"), ["pong", ""]);
    }

    #[test]
    fn every_beginning_is_partial() {
        let whole = "*4\r\n$8\r\npmessage\r\n$2\r\n/*\r\n$3\r\n/ab\r\n$10\r\n0123456789\r\n";
        for end in 0..whole.len() {
            assert!(matches!(Frame::scan(&whole.as_bytes()[..end]), Ok(Scan::Partial(_))), "{end}");
        }
        let text = whole.find("0123").unwrap();
        assert_eq!(Frame::scan(&whole.as_bytes()[..text + 3]).unwrap(), Scan::Partial(Some(text..text + 10)));
    }

    #[test]
    fn what_is_no_redis_is_refused() {
        let nested = "*1\r\n".repeat(1_000_000);
        let wide = format!("*1000000\r\n{}", ":1\r\n".repeat(10));
        let endless = format!("+{}", "x".repeat(MAX_LINE));
        for buffer in ["AMQP\0\0", "HTTP/1.1 400\r\n", "*x\r\n", "$99999999999999999999\r\n", &nested, &wide, &endless]
        {
            assert!(Frame::scan(buffer.as_bytes()).is_err(), "{buffer:.40}");
        }
        assert!(Frame::scan(format!("${}\r\n", usize::MAX).as_bytes()).is_err());
    }
}
