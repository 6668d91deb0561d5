//! TLS to the broker and of the HTTP server: the rustls configuration, the handshake, and errors that name the setting
//! to change.
//! A leaf module: it imports no other module of the crate and does not log. [`TlsConfig::new`] reads files and blocks.

mod explain;
mod server;
mod verifier;

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub use explain::explain;
pub use server::{ServerOptions, server_config};
use verifier::ServerVerifier;

/// The share of the connect timeout that the handshake may take. It ends first, so that the error names the handshake.
const HANDSHAKE_SHARE: f64 = 0.8;

/// A PEM file and the setting that names it.
#[derive(Clone, Debug)]
pub struct PemFile {
    /// The configuration key or URL parameter, for errors.
    pub setting: &'static str,
    /// The path as it may be printed in errors, without secrets.
    pub display: String,
    /// The path.
    pub path: PathBuf,
}

/// The options of [`TlsConfig`].
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// Trusted certificates. If there are none in all three: the system's roots.
    pub ca_file: Option<PemFile>,
    /// A directory of files with trusted certificates.
    pub ca_path: Option<PemFile>,
    /// Trusted certificates, in PEM.
    pub ca_data: Option<String>,
    /// The client certificate.
    pub cert_file: Option<PemFile>,
    /// The key of the client certificate. `None`: it is in `cert_file`.
    pub key_file: Option<PemFile>,
    /// Whether the server's certificate must name the host. Without effect if `verify` is false.
    pub check_hostname: bool,
    /// Whether the server's certificate is verified.
    pub verify: bool,
}

/// TLS cannot be configured. The text is one line without secrets.
#[derive(Debug, thiserror::Error)]
#[error("{setting}{path}: {reason}")]
pub struct TlsError {
    /// The configuration key or URL parameter.
    setting: &'static str,
    /// ` = "path"`, or empty if the setting is unset.
    path: String,
    reason: String,
}

/// The rustls configuration of one connection attempt. A new one is created for every attempt, so that replaced files
/// take effect.
#[derive(Clone)]
pub struct TlsConfig {
    config: Arc<ClientConfig>,
    identity: Arc<ClientIdentity>,
    verifies: bool,
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("TlsConfig").field("verifies", &self.verifies).finish_non_exhaustive()
    }
}

impl TlsConfig {
    /// Reads the files and creates the configuration. Blocks while it reads.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read or contains no PEM, if a key does not match its certificate, or if
    /// there is no usable root certificate.
    pub fn new(options: &TlsOptions) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let trusted = options.trusted_certificates()?;
        let chain = if options.verify { options.chain_verifier(&trusted, &provider)? } else { None };
        let key = client_key(options.cert_file.as_ref(), options.key_file.as_ref(), &provider)?;
        let identity = Arc::new(ClientIdentity { key, was_requested: AtomicBool::new(false) });
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError { setting: "broker.tls", path: String::new(), reason: error.to_string() })?;
        let algorithms = provider.signature_verification_algorithms;
        let (verify, check_hostname) = (options.verify, options.check_hostname);
        let verifier = ServerVerifier { verify, chain, trusted, check_hostname, algorithms };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let config = Arc::new(builder.with_client_cert_resolver(Arc::clone(&identity) as Arc<dyn ResolvesClientCert>));
        Ok(Self { config, identity, verifies: options.verify })
    }

    /// The rustls configuration, for client libraries that perform the handshake themselves.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// Whether the server's certificate is verified.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.verifies
    }

    /// Performs the handshake on a connection to `host`, within a share of `connect_timeout`.
    ///
    /// # Errors
    /// Returns an error if the handshake fails or times out. It may contain a rustls error: see [`explain`].
    pub async fn handshake<S>(&self, host: &str, stream: S, connect_timeout: Duration) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(server_name(host)).map_err(io::Error::other)?.to_owned();
        with_handshake_timeout(connect_timeout, TlsConnector::from(self.config()).connect(name, stream)).await
    }

    /// Why the server closed the connection before it sent anything. In TLS 1.3, the server rejects a client without a
    /// certificate only after the client's handshake has completed, and some servers then just close the connection.
    /// `None` if the server has not asked for a certificate.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        let was_requested = self.identity.was_requested.load(Ordering::Relaxed);
        was_requested.then_some(if self.identity.key.is_some() {
            "the server asked for a client certificate, and does not accept the one in broker.tls.cert_file"
        } else {
            "the server asked for a client certificate: set broker.tls.cert_file and broker.tls.key_file"
        })
    }
}

/// The part of a host that a certificate can name: an IPv6 address without its zone.
#[must_use]
pub fn server_name(host: &str) -> &str {
    host.split('%').next().unwrap_or(host)
}

/// Limits a handshake to a share of `connect_timeout`. A server that expects another protocol does not reply to a TLS
/// handshake, and the error should then name TLS.
///
/// # Errors
/// Returns an error if the handshake fails or times out.
pub async fn with_handshake_timeout<T>(
    connect_timeout: Duration,
    handshake: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    let timed_out = || io::Error::new(io::ErrorKind::TimedOut, rustls::Error::HandshakeNotComplete);
    timeout(connect_timeout.mul_f64(HANDSHAKE_SHARE), handshake).await.unwrap_or_else(|_| Err(timed_out()))
}

impl PemFile {
    fn error(&self, reason: impl fmt::Display) -> TlsError {
        TlsError { setting: self.setting, path: format!(" = \"{}\"", self.display), reason: reason.to_string() }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        fs::read(&self.path).map_err(|error| self.error(error))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.read()?).map_err(|reason| self.error(reason))
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.read()?).map_err(|error| match error {
            pem::Error::NoItemsFound => self.error("no unencrypted PEM private key found"),
            error => self.error(format_args!("not PEM: {error}")),
        })
    }
}

impl TlsOptions {
    /// The certificates that the user trusts. Empty: none are set.
    fn trusted_certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let mut trusted = Vec::new();
        if let Some(file) = &self.ca_file {
            trusted.extend(file.certificates()?);
        }
        if let Some(directory) = &self.ca_path {
            let loaded = rustls_native_certs::load_certs_from_paths(None, Some(&directory.path));
            if let Some(error) = loaded.errors.first() {
                return Err(directory.error(error));
            }
            if loaded.certs.is_empty() {
                return Err(directory.error("no PEM certificate found in the directory"));
            }
            trusted.extend(loaded.certs);
        }
        if let Some(text) = &self.ca_data {
            let error = |reason| TlsError { setting: "ssl_ca_data", path: String::new(), reason };
            trusted.extend(certificates(text.as_bytes()).map_err(error)?);
        }
        Ok(trusted)
    }

    /// Verifies certificate chains against the trusted certificates, or against the system's roots if there are none.
    /// `None`: no trusted certificate can be a root.
    fn chain_verifier(
        &self,
        trusted: &[CertificateDer<'static>],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Option<Arc<WebPkiServerVerifier>>, TlsError> {
        let mut roots = RootCertStore::empty();
        // Certificates that rustls cannot parse are skipped. The system's store may contain some. One usable root
        // suffices.
        if trusted.is_empty() {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        } else {
            roots.add_parsable_certificates(trusted.iter().cloned());
        }
        if roots.is_empty() {
            // A certificate of X.509 version 1 is no root, but it may be the server's own.
            return if trusted.iter().any(verifier::is_certificate) { Ok(None) } else { Err(self.no_roots()) };
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
        verifier.map(Some).map_err(|_| self.no_roots())
    }

    fn no_roots(&self) -> TlsError {
        match self.ca_file.as_ref().or(self.ca_path.as_ref()) {
            Some(file) => file.error("no certificate in the file can be used as a root"),
            None => TlsError {
                setting: "broker.tls.ca_file",
                path: String::new(),
                reason: "not set, and the system has no root certificates: set it to a PEM file with the CA".to_owned(),
            },
        }
    }
}

/// The certificates in PEM text, or why there are none.
fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(text).collect();
    let certificates = read.map_err(|error| format!("not PEM: {error}"))?;
    if certificates.is_empty() { Err("no PEM certificate found".to_owned()) } else { Ok(certificates) }
}

/// The client certificate with its key, which may be in the same file.
fn client_key(
    cert_file: Option<&PemFile>,
    key_file: Option<&PemFile>,
    provider: &CryptoProvider,
) -> Result<Option<Arc<CertifiedKey>>, TlsError> {
    let (cert_file, key_file) = match (cert_file, key_file) {
        (None, None) => return Ok(None),
        (None, Some(key_file)) => {
            return Err(key_file.error("a key without its certificate: set broker.tls.cert_file too"));
        }
        (Some(cert_file), key_file) => (cert_file, key_file.unwrap_or(cert_file)),
    };
    Ok(Some(Arc::new(server::certified_key(cert_file, key_file, provider)?)))
}

/// The client certificate, and whether the server has requested one.
#[derive(Debug)]
struct ClientIdentity {
    key: Option<Arc<CertifiedKey>>,
    was_requested: AtomicBool,
}

impl ResolvesClientCert for ClientIdentity {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.was_requested.store(true, Ordering::Relaxed);
        self.key.clone()
    }

    fn has_certs(&self) -> bool {
        self.key.is_some()
    }
}
