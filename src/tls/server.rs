//! TLS of the HTTP server: the rustls configuration from a certificate, its key and the CA of the clients.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};

use super::{PemFile, TlsError};

/// What [`server_config`] reads.
#[derive(Debug)]
pub struct ServerOptions<'a> {
    /// The certificate of the server, with the intermediate ones after it.
    pub cert_file: &'a PemFile,
    /// Its key.
    pub key_file: &'a PemFile,
    /// The CA that the certificate of every client must be from. `None`: clients need no certificate.
    pub client_ca_file: Option<&'a PemFile>,
    /// The versions of TLS, at least one.
    pub versions: &'a [&'static SupportedProtocolVersion],
}

/// Reads the files and creates the configuration for HTTP/1.1. Blocks while it reads.
///
/// # Errors
/// Returns an error if a file cannot be read or contains no PEM, if the key does not match the certificate, or if the
/// CA cannot be used.
pub fn server_config(options: &ServerOptions) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(options.versions)
        .map_err(|error| options.cert_file.error(error))?;
    let builder = match options.client_ca_file {
        Some(file) => builder.with_client_cert_verifier(client_verifier(file, &provider)?),
        None => builder.with_no_client_auth(),
    };
    let key = certified_key(options.cert_file, options.key_file, &provider)?;
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn client_verifier(
    file: &PemFile,
    provider: &Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(file.certificates()?);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
    verifier.map_err(|_| file.error("no certificate in the file can be used as a root"))
}

/// A certificate with its key, which may be in the same file.
pub(super) fn certified_key(
    cert_file: &PemFile,
    key_file: &PemFile,
    provider: &rustls::crypto::CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let chain = cert_file.certificates()?;
    CertifiedKey::from_der(chain, key_file.private_key()?, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => key_file.error(format_args!(
            "the key does not match the certificate in \"{}\" ({})",
            cert_file.display, cert_file.setting
        )),
        error => key_file.error(error),
    })
}
