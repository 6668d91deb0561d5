//! Verifies the server's certificate: by its chain, or because it is itself among the trusted certificates.
//!
//! OpenSSL accepts a trusted certificate whatever it is. webpki refuses a self-signed certificate that is its own CA, and
//! certificates of X.509 version 1. Many brokers have such a certificate.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{
    WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;
use x509_parser::x509::X509Version;

#[derive(Debug)]
pub(super) struct ServerVerifier {
    /// If false, any certificate is accepted.
    pub(super) verify: bool,
    /// `None`: only the trusted certificates themselves are accepted.
    pub(super) chain: Option<Arc<WebPkiServerVerifier>>,
    /// The certificates that the user trusts, among them the server's own, maybe. Not those of the system.
    pub(super) trusted: Vec<CertificateDer<'static>>,
    pub(super) check_hostname: bool,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        if !self.verify {
            return Ok(ServerCertVerified::assertion());
        }
        let unknown = || Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        let verified = self
            .chain
            .as_ref()
            .map_or_else(unknown, |chain| chain.verify_server_cert(certificate, intermediates, name, ocsp, now));
        match verified {
            // The name is checked last, so the chain is valid.
            Err(Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) if !self.check_hostname => {
                Ok(ServerCertVerified::assertion())
            }
            Err(Error::InvalidCertificate(_)) if self.trusted.contains(certificate) => {
                verify_trusted(certificate, self.check_hostname.then_some(name), now)
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match key_of_version_1(certificate) {
            None => verify_tls12_signature(message, certificate, signature, &self.algorithms),
            Some(key) => verify_signature(message, &key, signature, &self.algorithms),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match key_of_version_1(certificate) {
            None => verify_tls13_signature(message, certificate, signature, &self.algorithms),
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether the bytes are a certificate of any version.
pub(super) fn is_certificate(certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate).is_ok()
}

/// Checks the validity and the name of a certificate that the user trusts. Its issuer and purpose do not matter.
fn verify_trusted(
    certificate: &CertificateDer<'_>,
    name: Option<&ServerName<'_>>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    let bad_encoding = || Error::InvalidCertificate(CertificateError::BadEncoding);
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| bad_encoding())?;
    let now = ASN1Time::from_timestamp(i64::try_from(now.as_secs()).map_err(|_| bad_encoding())?)
        .map_err(|_| bad_encoding())?;
    let validity = parsed.validity();
    if now < validity.not_before {
        return Err(Error::InvalidCertificate(CertificateError::NotValidYet));
    }
    if now > validity.not_after {
        return Err(Error::InvalidCertificate(CertificateError::Expired));
    }
    match name {
        // Version 1 has no extensions, and so no names that TLS defines.
        Some(name) if parsed.version() != X509Version::V1 => verify_name(certificate, &parsed, name)?,
        _ => {}
    }
    Ok(ServerCertVerified::assertion())
}

/// Without a `subjectAltName`, the common name counts, as in OpenSSL.
fn verify_name(certificate: &CertificateDer<'_>, parsed: &X509Certificate, name: &ServerName<'_>) -> Result<(), Error> {
    if matches!(parsed.subject_alternative_name(), Ok(None)) {
        let is_match = |common_name: &str| match common_name.strip_prefix("*.") {
            Some(domain) => name.to_str().split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(domain)),
            None => common_name.eq_ignore_ascii_case(&name.to_str()),
        };
        let mut common_names = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        if common_names.any(is_match) {
            return Ok(());
        }
    }
    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)
}

/// The public key of a certificate of X.509 version 1, which webpki cannot parse.
fn key_of_version_1(certificate: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let key = || SubjectPublicKeyInfoDer::from(parsed.public_key().raw.to_vec());
    (parsed.version() == X509Version::V1).then(key)
}

/// Verifies a signature of TLS 1.2 by a public key.
fn verify_signature(
    message: &[u8],
    key: &SubjectPublicKeyInfoDer<'_>,
    signature: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<HandshakeSignatureValid, Error> {
    let bad_signature = Error::InvalidCertificate(CertificateError::BadSignature);
    let key = webpki::RawPublicKeyEntity::try_from(key)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let candidates = algorithms.mapping.iter().filter(|(scheme, _)| *scheme == signature.scheme);
    let mut candidates = candidates.flat_map(|(_, algorithms)| algorithms.iter());
    if candidates.any(|algorithm| key.verify_signature(*algorithm, message, signature.signature()).is_ok()) {
        Ok(HandshakeSignatureValid::assertion())
    } else {
        Err(bad_signature)
    }
}
