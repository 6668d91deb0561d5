//! A tokio runtime for lapin whose TCP streams are [`CoalescingSocket`]s. lapin derives the type of its streams from
//! its runtime.

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

use crate::broker::net::CoalescingSocket;

/// The current tokio runtime. Must be called on one.
pub(super) fn coalescing_runtime() -> Runtime<RuntimeParts<Tokio, CoalescingTokio>> {
    Runtime::new(RuntimeParts::new(Tokio::current(), CoalescingTokio(Tokio::current())))
}

/// tokio's reactor, with coalescing streams.
#[derive(Clone, Debug)]
pub(super) struct CoalescingTokio(Tokio);

impl Reactor for CoalescingTokio {
    type TcpStream = Compat<CoalescingSocket<TcpStream>>;
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
        async move { Ok(Compat::new(CoalescingSocket::new(connecting.await?.into_inner()))) }
    }
}
