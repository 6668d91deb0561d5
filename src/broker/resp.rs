//! A connection that speaks Redis' protocol: to a Redis server or a Sentinel, with or without TLS.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use redis_protocol::resp2::decode::decode_range;
use redis_protocol::resp2::types::RangeFrame;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::Error;
use crate::settings::Secret;
use crate::settings::url::Address;
use crate::tls;

/// Room for reading: below what allocators take from the system at each call.
const READ_SIZE: usize = 64 << 10;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
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
        let stream = self.stream(address).await.map_err(|error| Error::from(&error))?;
        let mut connection = Connection { stream, buffer: BytesMut::with_capacity(READ_SIZE) };
        if let Some(password) = &self.password {
            let user = self.username.as_deref();
            let command: Vec<&str> = ["AUTH"].into_iter().chain(user).chain([password.expose()]).collect();
            connection.request(&command).await?;
        }
        Ok(connection)
    }

    async fn stream(&self, address: &Address) -> io::Result<Box<dyn Stream>> {
        match address {
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                match &self.tls {
                    Some(tls) => Ok(Box::new(tls.handshake(host, stream, self.limit).await?)),
                    None => Ok(Box::new(stream)),
                }
            }
            Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        }
    }
}

/// An open connection, and what has come in on it and is not taken out yet.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    pub(super) buffer: BytesMut,
}

impl Connection {
    /// Sends a command and waits for its answer: the text of it, or of each part where there are several.
    pub(super) async fn request(&mut self, command: &[&str]) -> Result<Vec<String>, Error> {
        self.send(command).await?;
        loop {
            if let Some((frame, length)) = decode(&self.buffer)? {
                let head = self.buffer.split_to(length);
                return match &frame {
                    RangeFrame::Error(range) => Err(Error::Refused(format!("{}: {}", command[0], text(&head, *range)))),
                    RangeFrame::Array(parts) => Ok(parts.iter().filter_map(|part| part_text(part, &head)).collect()),
                    single => Ok(part_text(single, &head).into_iter().collect()),
                };
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

fn encode(command: &[&str]) -> Vec<u8> {
    let mut frame = format!("*{}\r\n", command.len());
    for word in command {
        for piece in ["$", &word.len().to_string(), "\r\n", word, "\r\n"] {
            frame.push_str(piece);
        }
    }
    frame.into_bytes()
}

/// The first whole frame in `buffer`, and its length.
pub(super) fn decode(buffer: &[u8]) -> Result<Option<(RangeFrame, usize)>, Error> {
    decode_range(buffer).map_err(|error| Error::Lost(format!("the server's answer is not understood: {error}")))
}

/// What stands in `range` of `buffer`.
pub(super) fn text(buffer: &[u8], (start, end): (usize, usize)) -> String {
    String::from_utf8_lossy(&buffer[start..end]).into_owned()
}

fn part_text(frame: &RangeFrame, buffer: &[u8]) -> Option<String> {
    match frame {
        RangeFrame::BulkString(range) | RangeFrame::SimpleString(range) => Some(text(buffer, *range)),
        _ => None,
    }
}
