//! Broker URLs as Celery users write them.
//! Parsing and printing are pure: no I/O, no name resolution. Neither `Display` nor `Debug` nor an error contains a
//! password.
//!
//! The parser follows kombu, which uses Python's `urlsplit`. URL crates differ from it: the last `@` ends the user
//! information, `;` separates brokers, and user name, password, path and parameters are percent-encoded.

mod display;
mod parameters;
mod parse;

use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use super::choice::LoginMethod;
use super::secret::Secret;

/// The protocol of the broker, and how its server is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// AMQP 0-9-1 with `RabbitMQ`'s extensions.
    Amqp,
    /// One Redis server.
    Redis,
    /// A Redis master whose address the Sentinels know.
    Sentinel,
}

/// The address of a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A host and a port.
    Tcp {
        /// A name or an IP address, unresolved. An IPv6 address has no brackets.
        host: String,
        /// From 1 to 65535.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// `ssl_cert_reqs`: how the server's certificate is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CertReqs {
    /// The server must present a valid certificate.
    Required,
    /// The same as `Required`: a TLS server always presents a certificate.
    Optional,
    /// The certificate is not verified.
    None,
}

/// The `ssl_*` parameters of a URL. An absent parameter is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SslParams {
    /// `ssl_cert_reqs`.
    pub cert_reqs: Option<CertReqs>,
    /// `ssl_ca_certs`: a PEM file.
    pub ca_certs: Option<PathBuf>,
    /// `ssl_ca_path`: a directory of PEM files, named by hashes as for OpenSSL.
    pub ca_path: Option<PathBuf>,
    /// `ssl_ca_data`: certificates in PEM.
    pub ca_data: Option<String>,
    /// `ssl_certfile`: a PEM file.
    pub certfile: Option<PathBuf>,
    /// `ssl_keyfile`: a PEM file.
    pub keyfile: Option<PathBuf>,
    /// `ssl_check_hostname`.
    pub check_hostname: Option<bool>,
}

/// The URL of one broker. `Display` and `Debug` write its canonical form, with `***` for the password.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    /// Determined by the scheme.
    pub transport: Transport,
    /// Whether the scheme or a parameter (`ssl`, `ssl_*`) requires TLS, as in kombu.
    pub tls: bool,
    /// An empty host is `localhost`. The default port is 5672 or 5671 for AMQP, 6379 for Redis, 26379 for Sentinel.
    pub address: Address,
    /// For AMQP, the default is `guest`.
    pub username: Option<String>,
    /// For AMQP, the default is `guest`.
    pub password: Option<Secret>,
    /// AMQP only. The default is `/`.
    pub vhost: String,
    /// Redis and Sentinel only. The default is 0.
    pub db: u32,
    /// Options of TLS.
    pub ssl: SslParams,
    /// `heartbeat` in whole seconds, AMQP only. It takes precedence over `broker.amqp.heartbeat`.
    pub heartbeat: Option<Duration>,
    /// `connect_timeout`. It takes precedence over `broker.connect_timeout`.
    pub connect_timeout: Option<Duration>,
    /// `login_method`, AMQP only. It takes precedence over `broker.amqp.login_method`.
    pub login_method: Option<LoginMethod>,
    /// The names of the parameters that Celery accepts and that have no effect here.
    pub parameters_without_effect: Vec<String>,
}

/// One broker, several brokers that are tried in turn, or the members of one Sentinel set. Never empty.
///
/// All members of a Sentinel set have the database, credentials and TLS options of the first, as in kombu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerUrls(Vec<BrokerUrl>);

/// Why a list of URLs is invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UrlError {
    /// The list is empty.
    #[error("expected a broker URL such as redis://localhost:6379/0, or several separated by `;`")]
    Empty,
    /// The list contains Sentinels, which are one set, and other brokers, which are tried in turn.
    #[error("sentinel:// URLs cannot be mixed with other brokers")]
    Mixed,
    /// The only URL is invalid.
    #[error("{0}")]
    Single(UrlErrorKind),
    /// One of several URLs is invalid.
    #[error("URL {position} of {count}: {kind}")]
    OneOf {
        /// The position in the list, from 1.
        position: usize,
        /// The number of URLs in the list.
        count: usize,
        /// Why it is invalid.
        kind: UrlErrorKind,
    },
}

/// Why one URL is invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UrlErrorKind {
    /// The URL has no scheme, as in `localhost:6379`. An unescaped `;` in a password has the same effect.
    #[error("no scheme: expected {SCHEMES} (in a password, percent-encode `;` as %3B)")]
    NoScheme,
    /// The URL is only a host, maybe with a port.
    #[error("no scheme before {0}: expected {SCHEMES}")]
    OnlyHost(String),
    /// The URL is in quotes, which some programs pass on.
    #[error("the URL is in quotes: remove them")]
    Quoted,
    /// The text is an assignment, as in a shell script.
    #[error("the URL begins with the name of a variable and `=`: remove them")]
    Assignment,
    /// The scheme is a transport of Celery's that the exporter does not support, or is unknown.
    #[error("{0}:// is not supported: expected {SCHEMES}")]
    Scheme(String),
    /// A delimiter occurs unescaped in a user name or password, or after the host.
    #[error(
        "an `@` or `#` after the host: in user name, password, path and parameters, \
         percent-encode `/` as %2F, `?` as %3F, `#` as %23 and `@` as %40"
    )]
    UnescapedDelimiter,
    /// The port is invalid. An unescaped delimiter in a password has the same effect.
    #[error(
        "the port is not a number up to 65535 (in a user name or password, percent-encode \
         `/` as %2F, `?` as %3F and `#` as %23; write an IPv6 address in brackets)"
    )]
    Port,
    /// The host contains spaces, brackets or control characters, or the text in brackets is not an IPv6 address.
    #[error("the host is not a name, an IPv4 address or an IPv6 address in brackets")]
    Host,
    /// The database is not a number, as in `redis://localhost/name`.
    #[error("the database is not a number: expected a path such as /0")]
    Database,
    /// The socket's path is missing, or there is a host, as in `redis+socket://host/path`.
    #[error("expected the path of a socket: redis+socket:///path?virtual_host=0")]
    Socket,
    /// The percent-encoded bytes are not UTF-8.
    #[error("not valid UTF-8 once percent-decoded")]
    Utf8,
    /// The scheme has no such parameter.
    #[error("unknown parameter {name}: expected {accepted}")]
    Parameter {
        /// As written, if that cannot be a part of a secret.
        name: String,
        /// The parameters of the scheme.
        accepted: &'static str,
    },
    /// The parameter is not supported, and something else replaces it.
    #[error("parameter {name} is not supported: {remedy}")]
    Unsupported {
        /// The parameter.
        name: String,
        /// What to do instead.
        remedy: &'static str,
    },
    /// The value of a parameter is invalid.
    #[error("parameter {name}: expected {accepted}")]
    Value {
        /// The parameter.
        name: String,
        /// The accepted values.
        accepted: &'static str,
    },
}

/// `librabbitmq`, which older Celery versions use, is also accepted.
const SCHEMES: &str = "amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel";

impl Default for BrokerUrl {
    fn default() -> Self {
        Self {
            transport: Transport::Amqp,
            tls: false,
            address: Address::Tcp { host: "localhost".to_owned(), port: 5672 },
            username: Some("guest".to_owned()),
            password: Some("guest".to_owned().into()),
            vhost: "/".to_owned(),
            db: 0,
            ssl: SslParams::default(),
            heartbeat: None,
            connect_timeout: None,
            login_method: None,
            parameters_without_effect: Vec::new(),
        }
    }
}

impl Default for BrokerUrls {
    fn default() -> Self {
        Self(vec![BrokerUrl::default()])
    }
}

impl Deref for BrokerUrls {
    type Target = [BrokerUrl];

    fn deref(&self) -> &[BrokerUrl] {
        &self.0
    }
}
