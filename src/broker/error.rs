//! Why a broker cannot be reached or used.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use crate::config::ConfigError;
use crate::tls::{self, TlsError};

/// The broker's settings are invalid, or a file that they name cannot be used. One line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerConfigError {
    /// The URLs are invalid, or another setting contradicts them.
    #[error(transparent)]
    Url(#[from] ConfigError),
    /// A file that TLS needs cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A connection could not be made, or it has ended. The text contains no secret and may be logged.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The server refused a request (credentials, permissions, different arguments), or its reply was unexpected.
    #[error("{0}")]
    Refused(String),
    /// The connection could not be made, or it broke.
    #[error("{0}")]
    Disconnected(String),
    /// The TLS handshake failed.
    #[error("TLS: {0}")]
    Tls(String),
    /// The Redis server is a replica: broadcasts there reach no worker.
    #[error("server is a replica; waiting for a master")]
    Replica,
    /// No response in time.
    #[error("broker did not respond within {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

impl BrokerError {
    /// Redacts a secret that the server echoed.
    pub(super) fn redact(self, secret: &str) -> Self {
        match self {
            Self::Refused(reason) if !secret.is_empty() => Self::Refused(reason.replace(secret, "***")),
            other => other,
        }
    }

    /// The same error with its subject in front.
    pub(super) fn context(self, subject: &str) -> Self {
        match self {
            Self::Refused(reason) => Self::Refused(format!("{subject}: {reason}")),
            Self::Disconnected(reason) => Self::Disconnected(format!("{subject}: {reason}")),
            Self::Tls(reason) => Self::Tls(format!("{subject}: {reason}")),
            Self::Replica => Self::Refused(format!("{subject}: {self}")),
            timeout @ Self::Timeout(_) => timeout,
        }
    }
}

/// The broker's response, or an error if it takes longer than `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    response: impl Future<Output = Result<T, BrokerError>>,
) -> Result<T, BrokerError> {
    timeout(limit, response).await.unwrap_or(Err(BrokerError::Timeout(limit)))
}

impl From<&io::Error> for BrokerError {
    fn from(error: &io::Error) -> Self {
        tls::explain(error).map_or_else(|| Self::Disconnected(error.to_string()), Self::Tls)
    }
}
