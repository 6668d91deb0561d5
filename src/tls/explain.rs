//! Explains why TLS failed, in one sentence with the setting to change.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

/// Explains an error of rustls, and names the setting to change. `None` if TLS did not fail: another I/O error.
#[must_use]
pub fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match error {
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::InvalidCertificate(reason) => explain_certificate(reason),
        Error::InvalidMessage(_) => {
            format!("the server does not use TLS on this port {OTHER_PORT}")
        }
        Error::HandshakeNotComplete => {
            format!("handshake timed out: the server may not use TLS on this port {OTHER_PORT}")
        }
        Error::PeerIncompatible(_) => "the server supports neither TLS 1.3 nor TLS 1.2 with a cipher suite that is \
                                       considered secure (ECDHE with AES-GCM or ChaCha20): enable one at the server"
            .to_owned(),
        Error::NoCertificatesPresented => "the server has sent no certificate: configure one at the server".to_owned(),
        _ => "the server violated the TLS protocol: check that the port belongs to the broker, and the server's log"
            .to_owned(),
    })
}

const OTHER_PORT: &str = "(use its TLS port, or a URL without TLS: redis://, amqp://)";

/// The server ended the handshake.
fn explain_alert(alert: AlertDescription) -> String {
    let reason = match alert {
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            "requires a client certificate: set broker.tls.cert_file and broker.tls.key_file"
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied => {
            "does not accept the client certificate: set broker.tls.cert_file to one that a CA of the server has signed"
        }
        AlertDescription::CertificateRevoked | AlertDescription::CertificateExpired => {
            "does not accept the client certificate, which has expired or was revoked: renew broker.tls.cert_file"
        }
        AlertDescription::ProtocolVersion => "supports neither TLS 1.2 nor 1.3: enable one at the server",
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => {
            "found no common cipher suite, or requires a client certificate: see the server's log, and \
             broker.tls.cert_file"
        }
        AlertDescription::UnrecognisedName => "does not know the host name: use one of its names in the URL",
        other => return format!("the server ended the handshake with alert {}: see the server's log", u8::from(other)),
    };
    format!("the server {reason}")
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, InvalidPurpose, InvalidPurposeContext, NotValidForName,
        NotValidForNameContext, NotValidYet, NotValidYetContext, Other, Revoked, UnhandledCriticalExtension,
        UnknownIssuer, UnsupportedSignatureAlgorithmContext, UnsupportedSignatureAlgorithmForPublicKeyContext,
    };
    let explanation = match reason {
        UnknownIssuer => {
            "has an unknown issuer: set broker.tls.ca_file (or ssl_ca_certs in the URL) to the CA that signed it, or \
             to the certificate itself"
        }
        Expired | ExpiredContext { .. } => "has expired: renew it at the broker",
        NotValidYet | NotValidYetContext { .. } => {
            "is not valid yet: check the clock of this host, and the certificate"
        }
        NotValidForName => {
            "is for another host name; use one of its names in the URL, or set broker.tls.check_hostname = false (or \
             ssl_check_hostname=false)"
        }
        NotValidForNameContext { expected, presented } => {
            // rustls formats a name as `DnsName("h")` or `IpAddress(::1)`.
            let plain =
                |name: &String| name.replace("DnsName(", "").replace("IpAddress(", "").replace(['"', '(', ')'], "");
            let names: Vec<_> = presented.iter().map(plain).collect();
            let names = if names.is_empty() { "no host name".to_owned() } else { names.join(", ") };
            return format!(
                "the server's certificate is for another host name: for {names}, not for {}; use one of its names in the \
                 URL, or set broker.tls.check_hostname = false (or ssl_check_hostname=false)",
                expected.to_str()
            );
        }
        Revoked => "was revoked: renew it at the broker",
        InvalidPurpose | InvalidPurposeContext { .. } => {
            "is not meant for servers (extendedKeyUsage): issue one with serverAuth, or add it to broker.tls.ca_file"
        }
        BadSignature
        | UnsupportedSignatureAlgorithmContext { .. }
        | UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "has a signature that cannot be verified, because it is wrong or uses an outdated algorithm such as SHA-1: \
             issue another one with SHA-256, or add the certificate itself to broker.tls.ca_file"
        }
        UnhandledCriticalExtension => "has a critical extension that is not supported: issue one without it",
        Other(error) => match error.0.downcast_ref::<webpki::Error>() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                "is the certificate of a CA: add the certificate itself to broker.tls.ca_file (or ssl_ca_certs), or issue \
                 a separate one for the server"
            }
            Some(webpki::Error::UnsupportedCertVersion) => {
                "is of X.509 version 1: add the certificate itself to broker.tls.ca_file (or ssl_ca_certs), or issue one \
                 of version 3 with a subjectAltName"
            }
            _ => CANNOT_BE_VERIFIED,
        },
        _ => CANNOT_BE_VERIFIED,
    };
    format!("the server's certificate {explanation}")
}

const CANNOT_BE_VERIFIED: &str = "cannot be verified: issue another one, or add the certificate itself to \
                                  broker.tls.ca_file (or ssl_ca_certs)";
