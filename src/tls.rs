//! TLS towards the broker: one rustls configuration for every connection, from `broker.tls` and the URL's `ssl_*`
//! parameters, and what to set when the server or we do not like it.

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

use crate::settings::url::CertReqs;
use crate::settings::{self, BrokerUrl};

/// A file that TLS needs cannot be used, told in one line.
#[derive(Debug, thiserror::Error)]
#[error("{key}{path}: {problem}")]
pub struct Error {
    /// The setting, or the URL's parameter.
    key: &'static str,
    /// ` = "file"`; nothing where none is set.
    path: String,
    problem: String,
}

/// How we are known to the server, and what we ask of it. Read from the files anew for every attempt to connect.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    identity: Arc<Identity>,
    verifies: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Client").field("verifies", &self.verifies).finish_non_exhaustive()
    }
}

impl Client {
    /// What `settings` and the URL ask for; where both say something, the URL wins.
    ///
    /// # Errors
    /// A file that cannot be read, holds no PEM, or a key that does not fit its certificate.
    pub fn new(url: &BrokerUrl, settings: &settings::Tls) -> Result<Self, Error> {
        let ssl = &url.ssl;
        let provider = Arc::new(ring::default_provider());
        let verifies = match ssl.cert_reqs {
            Some(asked) => asked != CertReqs::None,
            None => !settings.insecure_skip_verify,
        };
        let check_hostname = ssl.check_hostname.unwrap_or(settings.check_hostname);
        let file = |parameter, from_url: &Option<PathBuf>, key, from_settings: &Option<PathBuf>| {
            let file = |key, path: &PathBuf| File { key, path: path.clone() };
            from_url.as_ref().map(|path| file(parameter, path)).or(from_settings.as_ref().map(|path| file(key, path)))
        };
        let roots = file("ssl_ca_certs", &ssl.ca_certs, "broker.tls.ca_file", &settings.ca_file);
        let certificate = file("ssl_certfile", &ssl.certfile, "broker.tls.cert_file", &settings.cert_file);
        let key = file("ssl_keyfile", &ssl.keyfile, "broker.tls.key_file", &settings.key_file);

        let chain = if verifies { Some(chain_verifier(roots.as_ref(), &provider)?) } else { None };
        let identity =
            Arc::new(Identity { key: certified(certificate, key, &provider)?, asked: AtomicBool::new(false) });
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error { key: "broker.tls", path: String::new(), problem: error.to_string() })?;
        let builder = match chain {
            Some(chain) if check_hostname => builder.with_webpki_verifier(chain),
            chain => {
                let algorithms = provider.signature_verification_algorithms;
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain, algorithms }))
            }
        };
        let config = Arc::new(builder.with_client_cert_resolver(Arc::clone(&identity) as Arc<dyn ResolvesClientCert>));
        Ok(Self { config, identity, verifies })
    }

    /// For the transports that shake hands themselves.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// Whether the server's certificate is looked at.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.verifies
    }

    /// Shakes hands on a connection to `host`, which may take `limit`.
    ///
    /// # Errors
    /// Those of the connection, rustls' own within them: see [`explain`].
    pub async fn handshake<S>(&self, host: &str, stream: S, limit: Duration) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(server_name(host)).map_err(io::Error::other)?.to_owned();
        within(limit, TlsConnector::from(self.config()).connect(name, stream)).await
    }

    /// What may be behind a connection that the server has cut. With TLS 1.3 a client without a certificate learns that
    /// it needed one when its handshake is long over, and not always in words.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        let asked = self.identity.asked.load(Ordering::Relaxed);
        asked.then_some(if self.identity.key.is_some() {
            "the server asked for a client certificate and may not accept the one in broker.tls.cert_file"
        } else {
            "the server asked for a client certificate: set broker.tls.cert_file and broker.tls.key_file"
        })
    }
}

/// The part of a host that a certificate can name: no zone of an IPv6 address.
#[must_use]
pub fn server_name(host: &str) -> &str {
    host.split('%').next().unwrap_or(host)
}

/// Gives a handshake most of the time for the whole attempt: a server that waits for something other than TLS says
/// nothing, and the attempt shall not end without saying where.
///
/// # Errors
/// The handshake's own, and that it took too long.
pub async fn within<T>(limit: Duration, handshake: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let too_late = || io::Error::new(io::ErrorKind::TimedOut, rustls::Error::HandshakeNotComplete);
    timeout(limit.mul_f64(0.8), handshake).await.unwrap_or_else(|_| Err(too_late()))
}

/// What rustls has against the server, and what to set; `None` where it is not rustls, or the server that objects.
#[must_use]
pub fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let advice = match error {
        rustls::Error::AlertReceived(_) => return None,
        rustls::Error::InvalidCertificate(problem) => return Some(objection(problem)),
        rustls::Error::InvalidMessage(_) => "the server does not speak TLS on this port",
        rustls::Error::HandshakeNotComplete => "the server does not answer: does it speak TLS on this port?",
        _ => return Some(error.to_string()),
    };
    Some(format!("{advice} (use its port for TLS, or a URL without TLS: redis://, amqp://)"))
}

fn objection(problem: &CertificateError) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidForName, NotValidForNameContext, UnknownIssuer};
    match problem {
        UnknownIssuer => {
            "the server's certificate has an unknown issuer: set broker.tls.ca_file (or ssl_ca_certs in the \
                          URL) to the CA that signed it, or verify nothing: broker.tls.insecure_skip_verify = true (or \
                          ssl_cert_reqs=none)"
                .to_owned()
        }
        Expired | ExpiredContext { .. } => {
            "the server's certificate has expired: it must be renewed at the broker (until then, \
             broker.tls.insecure_skip_verify = true verifies nothing)"
                .to_owned()
        }
        NotValidForName | NotValidForNameContext { .. } => format!(
            "the server's certificate is for another host name: {problem}: use one of its names in the URL, or set \
             broker.tls.check_hostname = false (or ssl_check_hostname=false)"
        ),
        _ => format!("{problem}: broker.tls.insecure_skip_verify = true (or ssl_cert_reqs=none) verifies nothing"),
    }
}

/// A file, and the setting that names it.
struct File {
    key: &'static str,
    path: PathBuf,
}

impl File {
    fn failed(&self, problem: impl fmt::Display) -> Error {
        let path = format!(" = \"{}\"", settings::masked(&self.path));
        Error { key: self.key, path, problem: problem.to_string() }
    }

    fn read(&self) -> Result<Vec<u8>, Error> {
        fs::read(&self.path).map_err(|error| self.failed(error))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let text = self.read()?;
        let read: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
        let certificates = read.map_err(|error| self.failed(format_args!("not PEM: {error}")))?;
        if certificates.is_empty() { Err(self.failed("no PEM certificate in it")) } else { Ok(certificates) }
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, Error> {
        PrivateKeyDer::from_pem_slice(&self.read()?).map_err(|error| match error {
            pem::Error::NoItemsFound => self.failed("no unencrypted PEM private key in it"),
            error => self.failed(format_args!("not PEM: {error}")),
        })
    }
}

/// Verifies against the roots in `file`, or the system's.
fn chain_verifier(file: Option<&File>, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, Error> {
    let certificates = match file {
        Some(file) => file.certificates()?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    let mut roots = RootCertStore::empty();
    // The system may hold roots that nobody can read any more; in a file of one's own, one usable is asked for.
    roots.add_parsable_certificates(certificates);
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().map_err(|_| match file {
        Some(file) => file.failed("no certificate in it can be used as a root"),
        None => Error {
            key: "broker.tls.ca_file",
            path: String::new(),
            problem: "unset, and this system has no root certificates: name a file of them".to_owned(),
        },
    })
}

/// The client certificate with its key, which may be in the same file.
fn certified(
    certificate: Option<File>,
    key: Option<File>,
    provider: &CryptoProvider,
) -> Result<Option<Arc<CertifiedKey>>, Error> {
    let (certificate, key) = match (certificate, key) {
        (None, None) => return Ok(None),
        (None, Some(key)) => return Err(key.failed("a key without its certificate: set broker.tls.cert_file too")),
        (Some(certificate), key) => {
            let key = key.unwrap_or_else(|| File { key: certificate.key, path: certificate.path.clone() });
            (certificate, key)
        }
    };
    let chain = certificate.certificates()?;
    let certified = CertifiedKey::from_der(chain, key.private_key()?, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            let path = settings::masked(&certificate.path);
            key.failed(format_args!("not the key of the certificate in \"{path}\" ({})", certificate.key))
        }
        error => key.failed(error),
    })?;
    Ok(Some(Arc::new(certified)))
}

/// Our certificate, and whether the server has asked for one.
#[derive(Debug)]
struct Identity {
    key: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Relaxed);
        self.key.clone()
    }

    fn has_certs(&self) -> bool {
        self.key.is_some()
    }
}

/// Asks less of the server's certificate than rustls does: a chain to a root but any name, or without `chain` nothing.
/// That the server holds the certificate's key is proved all the same.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is looked at last.
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
