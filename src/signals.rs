//! signal-hook to one stream of intents.

use std::io;

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook_tokio::Signals;

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// SIGTERM, SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
    /// SIGUSR1.
    Save,
}

/// The signals as they come.
pub struct Intents(Signals);

impl Intents {
    /// Takes the signals over.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> io::Result<Self> {
        Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).map(Self)
    }

    /// The next one.
    pub async fn next(&mut self) -> Intent {
        match self.0.next().await {
            Some(SIGHUP) => Intent::Reload,
            Some(SIGUSR1) => Intent::Save,
            _ => Intent::Stop,
        }
    }
}
