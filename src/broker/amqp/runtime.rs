//! tokio as lapin's runtime, with streams that are read at a pace: lapin takes the type of its streams from its runtime.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use async_compat::Compat;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::broker::pace::Paced;

/// The tokio runtime that this is called on.
pub(super) fn paced() -> Runtime<RuntimeParts<Tokio, PacedTokio>> {
    Runtime::new(RuntimeParts::new(Tokio::current(), PacedTokio(Tokio::current())))
}

/// tokio's reactor, but for the streams.
#[derive(Clone, Debug)]
pub(super) struct PacedTokio(Tokio);

impl Reactor for PacedTokio {
    type TcpStream = Compat<Paced<TcpStream>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, period: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(period)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Compat::new(Paced::new(connecting.await?.into_inner()))) }
    }
}
