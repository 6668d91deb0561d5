//! TLS to the broker: the rustls configuration, the handshake, and errors that name the setting to change.
//! A leaf module: it imports no other module of the crate and does not log. [`TlsConfig::new`] reads files and blocks.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

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
    /// Trusted root certificates. `None`: the system's roots.
    pub ca_file: Option<PemFile>,
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
        let chain_verifier =
            if options.verify { Some(chain_verifier(options.ca_file.as_ref(), &provider)?) } else { None };
        let key = client_key(options.cert_file.as_ref(), options.key_file.as_ref(), &provider)?;
        let identity = Arc::new(ClientIdentity { key, was_requested: AtomicBool::new(false) });
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError { setting: "broker.tls", path: String::new(), reason: error.to_string() })?;
        let builder = match chain_verifier {
            Some(chain_verifier) if options.check_hostname => builder.with_webpki_verifier(chain_verifier),
            chain_verifier => {
                let algorithms = provider.signature_verification_algorithms;
                let verifier = RelaxedVerifier { chain_verifier, algorithms };
                builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
            }
        };
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

    /// A probable reason why the server closed a connection. In TLS 1.3, the server rejects a client without a
    /// certificate only after the client's handshake has completed, and some servers then just close the connection.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        let was_requested = self.identity.was_requested.load(Ordering::Relaxed);
        was_requested.then_some(if self.identity.key.is_some() {
            "the server asked for a client certificate and may not accept the one in broker.tls.cert_file"
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

/// Explains an error of rustls, and names the setting to change. `None` if rustls did not detect the error itself:
/// another I/O error, or an alert from the server.
#[must_use]
pub fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let advice = match error {
        rustls::Error::AlertReceived(_) => return None,
        rustls::Error::InvalidCertificate(reason) => return Some(explain_cert_error(reason)),
        rustls::Error::InvalidMessage(_) => "the server does not use TLS on this port",
        rustls::Error::HandshakeNotComplete => "handshake timed out: the server may not use TLS on this port",
        _ => return Some(error.to_string()),
    };
    Some(format!("{advice} (use its TLS port, or a URL without TLS: redis://, amqp://)"))
}

fn explain_cert_error(reason: &CertificateError) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidForName, NotValidForNameContext, UnknownIssuer};
    match reason {
        UnknownIssuer => {
            "the server's certificate has an unknown issuer: set broker.tls.ca_file (or ssl_ca_certs in the URL) \
             to the CA that signed it, or disable verification with broker.tls.insecure_skip_verify = true (or \
             ssl_cert_reqs=none)"
                .to_owned()
        }
        Expired | ExpiredContext { .. } => {
            "the server's certificate has expired: it must be renewed at the broker (until then, \
             broker.tls.insecure_skip_verify = true disables verification)"
                .to_owned()
        }
        NotValidForName | NotValidForNameContext { .. } => format!(
            "the server's certificate is for another host name: {reason}: use one of its names in the URL, or set \
             broker.tls.check_hostname = false (or ssl_check_hostname=false)"
        ),
        _ => format!("{reason}: broker.tls.insecure_skip_verify = true (or ssl_cert_reqs=none) disables verification"),
    }
}

impl PemFile {
    fn error(&self, reason: impl fmt::Display) -> TlsError {
        TlsError { setting: self.setting, path: format!(" = \"{}\"", self.display), reason: reason.to_string() }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        fs::read(&self.path).map_err(|error| self.error(error))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let text = self.read()?;
        let read: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
        let certificates = read.map_err(|error| self.error(format_args!("not PEM: {error}")))?;
        if certificates.is_empty() { Err(self.error("no PEM certificate found")) } else { Ok(certificates) }
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.read()?).map_err(|error| match error {
            pem::Error::NoItemsFound => self.error("no unencrypted PEM private key found"),
            error => self.error(format_args!("not PEM: {error}")),
        })
    }
}

/// Verifies certificate chains against the roots in `file`, or against the system's roots.
fn chain_verifier(
    file: Option<&PemFile>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let certificates = match file {
        Some(file) => file.certificates()?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    let mut roots = RootCertStore::empty();
    // Certificates that rustls cannot parse are skipped. The system's store may contain some. One usable root suffices.
    roots.add_parsable_certificates(certificates);
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().map_err(|_| match file {
        Some(file) => file.error("no certificate in the file can be used as a root"),
        None => TlsError {
            setting: "broker.tls.ca_file",
            path: String::new(),
            reason: "not set, and the system has no root certificates: set it to a PEM file with the CA".to_owned(),
        },
    })
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
    let chain = cert_file.certificates()?;
    let key = CertifiedKey::from_der(chain, key_file.private_key()?, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => key_file.error(format_args!(
            "the key does not match the certificate in \"{}\" ({})",
            cert_file.display, cert_file.setting
        )),
        error => key_file.error(error),
    })?;
    Ok(Some(Arc::new(key)))
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

/// A verifier that is less strict than that of rustls: it accepts any host name, and without a `chain_verifier` any
/// certificate. The server must still prove that it has the certificate's private key.
#[derive(Debug)]
struct RelaxedVerifier {
    chain_verifier: Option<Arc<WebPkiServerVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for RelaxedVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(chain_verifier) = &self.chain_verifier else { return Ok(ServerCertVerified::assertion()) };
        match chain_verifier.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is checked last, so the chain is valid.
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
