//! TLS and passwords of the HTTP server, from a file in the format of Prometheus' exporter-toolkit
//! (<https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md>).
//!
//! The file is read at the start, and again when it or a file that it names has changed. Until a changed file is valid,
//! the last valid one applies.

mod file;
mod users;
mod watcher;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;

pub(super) use users::{Access, Users};
pub(super) use watcher::watch;

/// What a web configuration file sets.
#[derive(Debug, Default)]
pub struct WebConfig {
    /// `None`: plain HTTP.
    pub(super) tls: Option<Arc<ServerConfig>>,
    /// `None`: anyone may read.
    pub(super) users: Option<Users>,
    /// For a client on the same host.
    identity: Option<Identity>,
    /// The file. `None`: there is none.
    path: Option<PathBuf>,
    /// Differs if the content of a file differs.
    hash: u64,
}

/// The server's own certificate.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The path of the certificate.
    pub cert_file: PathBuf,
    /// The path of its key.
    pub key_file: PathBuf,
    /// Whether clients need a certificate.
    pub requires_client_certificate: bool,
}

/// A web configuration file cannot be used. The text is one line without secrets.
#[derive(Debug, thiserror::Error)]
#[error("http.web_config_file = \"{path}\": {reason}")]
pub struct WebConfigError {
    path: String,
    reason: String,
}

impl WebConfig {
    /// Reads a file and the files that it names. Without a path, HTTP is plain and open. Blocks.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read or is invalid.
    pub fn load(path: Option<&Path>) -> Result<Self, WebConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        file::WebConfigFile::read(path).load()
    }

    /// The server's certificate. `None`: plain HTTP.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The scheme of the server's URLs.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        if self.identity.is_some() { "https" } else { "http" }
    }
}
