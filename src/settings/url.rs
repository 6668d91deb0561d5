//! Broker URLs as Celery users write them.
//!
//! Read by hand as kombu reads them with Python's `urlsplit`, which no URL crate agrees with: the
//! last `@` ends the user information, `;` separates brokers, and user, password, path and
//! parameters are percent-encoded. Neither `Display` nor `Debug` nor an error shows a password.

use std::fmt;
use std::net::Ipv6Addr;
use std::ops::Deref;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::value::Secret;

/// How the broker is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// AMQP 0-9-1, as `RabbitMQ` speaks it.
    Amqp,
    /// One Redis server.
    Redis,
    /// A Redis server that Sentinels know the address of.
    Sentinel,
}

/// Where the broker listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A name or an IP address (IPv6 without its brackets) and a port.
    Tcp {
        /// Not resolved yet.
        host: String,
        /// From 1.
        port: u16,
    },
    /// The path of a socket.
    Unix(PathBuf),
}

/// `ssl_cert_reqs`: what is asked of the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertReqs {
    /// It must be there and valid.
    Required,
    /// It must be valid if it is there.
    Optional,
    /// Nothing.
    None,
}

/// A URL's `ssl_*` parameters; `None` where one is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SslParams {
    /// `ssl_cert_reqs`
    pub cert_reqs: Option<CertReqs>,
    /// `ssl_ca_certs`: PEM file.
    pub ca_certs: Option<PathBuf>,
    /// `ssl_certfile`: PEM file.
    pub certfile: Option<PathBuf>,
    /// `ssl_keyfile`: PEM file.
    pub keyfile: Option<PathBuf>,
    /// `ssl_check_hostname`
    pub check_hostname: Option<bool>,
}

/// One broker's URL. `Display` and `Debug` write it in canonical form with `***` for the password.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    /// From the scheme.
    pub transport: Transport,
    /// The scheme says so, or an `ssl_*` parameter is there, as in kombu.
    pub tls: bool,
    /// Empty hosts are `localhost`, absent ports the transport's.
    pub address: Address,
    /// AMQP: `guest` where absent.
    pub username: Option<String>,
    /// AMQP: `guest` where absent.
    pub password: Option<Secret>,
    /// AMQP only: `/` where absent.
    pub vhost: String,
    /// Redis and Sentinel only.
    pub db: u32,
    /// Parameters that say more about TLS.
    pub ssl: SslParams,
}

/// One broker or several that are tried in turn, or the members of one Sentinel set. Never empty.
///
/// Members of a Sentinel set all carry database, credentials and TLS of the first, which kombu uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerUrls(Vec<BrokerUrl>);

/// What is wrong with a list of URLs, and with which of them.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No URL at all.
    #[error("expected a broker URL such as redis://localhost:6379/0, or several separated by `;`")]
    Empty,
    /// Sentinels are asked for one master; other brokers are tried in turn.
    #[error("sentinel:// URLs cannot be mixed with other brokers")]
    Mixed,
    /// The only one.
    #[error("{0}")]
    Single(Problem),
    /// One of several.
    #[error("URL {position} of {count}: {problem}")]
    OneOf {
        /// From 1.
        position: usize,
        /// How many there are.
        count: usize,
        /// What is wrong with it.
        problem: Problem,
    },
}

/// What is wrong with one URL.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Problem {
    /// `localhost:6379`
    #[error("no scheme: expected {SCHEMES} (in a password `;` is written %3B)")]
    NoScheme,
    /// One of Celery's that we do not speak, or none of Celery's.
    #[error("{0}:// is not supported: expected {SCHEMES}")]
    Scheme(String),
    /// A delimiter in a user name or password, or behind the host.
    #[error(
        "an `@` or `#` after the host: within user name, password, path and parameters \
         `/` is written %2F, `?` %3F, `#` %23, `@` %40"
    )]
    Stray,
    /// Also what a delimiter in a password leads to.
    #[error(
        "the port is not a number from 1 to 65535 (in a user name or password \
         `/` is written %2F, `?` %3F, `#` %23; an IPv6 address stands in brackets)"
    )]
    Port,
    /// Blanks, brackets, control characters, or no IPv6 address within brackets.
    #[error("the host is neither a name nor an IPv4 address nor an IPv6 address in brackets")]
    Host,
    /// `redis://localhost/name`
    #[error("the database is not a number: expected a path such as /0")]
    Database,
    /// `redis+socket://host/path`
    #[error("expected the path of a socket: redis+socket:///path?virtual_host=0")]
    Socket,
    /// Percent-encoded bytes that are no text.
    #[error("not valid UTF-8 once percent-decoded")]
    Utf8,
    /// A parameter that is not heeded here.
    #[error("unknown parameter {name}: accepted are {accepted}; all else is a setting of its own")]
    Parameter {
        /// As written.
        name: String,
        /// The parameters of this scheme.
        accepted: &'static str,
    },
    /// A parameter with an impossible value.
    #[error("{name}: expected {accepted}")]
    Value {
        /// As written.
        name: String,
        /// What it may be.
        accepted: &'static str,
    },
}

const SCHEMES: &str = "amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel";
const SSL_PARAMETERS: &str = "ssl_cert_reqs, ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_check_hostname";

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
        }
    }
}

impl FromStr for BrokerUrl {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let (scheme, rest) = text.split_once("://").ok_or(Problem::NoScheme)?;
        let (transport, tls, port) = match scheme.to_ascii_lowercase().as_str() {
            "amqp" | "pyamqp" | "librabbitmq" => (Transport::Amqp, false, Some(5672)),
            "amqps" => (Transport::Amqp, true, Some(5671)),
            "redis" => (Transport::Redis, false, Some(6379)),
            "rediss" => (Transport::Redis, true, Some(6379)),
            "redis+socket" => (Transport::Redis, false, None),
            "sentinel" => (Transport::Sentinel, false, Some(26379)),
            other => return Err(unknown_scheme(other)),
        };
        let parts = Parts::split(rest)?;
        let ssl = if port.is_some() { parts.ssl()? } else { SslParams::default() };
        let amqp = transport == Transport::Amqp;
        let guest = || amqp.then(|| "guest".to_owned());
        let (user, password) = parts.credentials()?;
        Ok(Self {
            transport,
            tls: tls || ssl != SslParams::default(),
            address: match port {
                Some(port) => parts.tcp(port)?,
                None => parts.unix()?,
            },
            username: user.or_else(guest),
            password: password.or_else(guest).map(Secret::from),
            vhost: if amqp { parts.vhost()? } else { "/".to_owned() },
            db: match (amqp, port) {
                (true, _) => 0,
                (false, Some(_)) => database(parts.path)?,
                (false, None) => parts.virtual_host()?,
            },
            ssl,
        })
    }
}

fn unknown_scheme(scheme: &str) -> Problem {
    let looks_like_one = scheme.len() <= 40 && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c));
    if looks_like_one { Problem::Scheme(scheme.to_owned()) } else { Problem::NoScheme }
}

/// A URL behind its scheme, cut at the delimiters and still encoded.
struct Parts<'a> {
    userinfo: &'a str,
    host_and_port: &'a str,
    path: &'a str,
    query: &'a str,
}

impl<'a> Parts<'a> {
    fn split(rest: &'a str) -> Result<Self, Problem> {
        let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        // Celery would go on with half of the password as the host: not worth following.
        if tail.contains(['@', '#']) {
            return Err(Problem::Stray);
        }
        let (userinfo, host_and_port) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        Ok(Self { userinfo, host_and_port, path, query })
    }

    fn credentials(&self) -> Result<(Option<String>, Option<String>), Problem> {
        let (user, password) = self.userinfo.split_once(':').unwrap_or((self.userinfo, ""));
        let filled = |text: &str| Ok(Some(decode(text)?).filter(|text| !text.is_empty()));
        Ok((filled(user)?, filled(password)?))
    }

    fn tcp(&self, default_port: u16) -> Result<Address, Problem> {
        let text = self.host_and_port;
        let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
            let (host, port) = bracketed.split_once(']').ok_or(Problem::Host)?;
            (ipv6(host)?, port)
        } else {
            let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            (name(host)?, port)
        };
        let port = match (port.is_empty(), port.strip_prefix(':')) {
            (true, _) | (_, Some("")) => default_port,
            (_, Some(port)) => number(port).filter(|port| *port > 0).ok_or(Problem::Port)?,
            (_, None) => return Err(Problem::Host),
        };
        Ok(Address::Tcp { host, port })
    }

    fn unix(&self) -> Result<Address, Problem> {
        if !self.host_and_port.is_empty() || self.path.len() < 2 {
            return Err(Problem::Socket);
        }
        Ok(Address::Unix(decode(self.path)?.into()))
    }

    fn vhost(&self) -> Result<String, Problem> {
        let name = decode(self.path.strip_prefix('/').unwrap_or(self.path))?;
        Ok(if name.is_empty() { "/".to_owned() } else { name })
    }

    /// `name=value` pairs as Python's `parse_qsl` has them: `+` is a blank.
    fn parameters(&self) -> impl Iterator<Item = Result<(&'a str, String), Problem>> {
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((name, decode(&value.replace('+', " "))?))
        })
    }

    fn virtual_host(&self) -> Result<u32, Problem> {
        let mut db = 0;
        for parameter in self.parameters() {
            match parameter? {
                ("virtual_host", value) => db = database(&value)?,
                (name, _) => return Err(unknown_parameter(name, "virtual_host")),
            }
        }
        Ok(db)
    }

    fn ssl(&self) -> Result<SslParams, Problem> {
        let mut ssl = SslParams::default();
        for parameter in self.parameters() {
            let (name, value) = parameter?;
            let invalid = |accepted| Problem::Value { name: name.to_owned(), accepted };
            let path = || Some(PathBuf::from(&value)).filter(|path| !path.as_os_str().is_empty());
            match name {
                "ssl_ca_certs" => ssl.ca_certs = path(),
                "ssl_certfile" => ssl.certfile = path(),
                "ssl_keyfile" => ssl.keyfile = path(),
                "ssl_check_hostname" => {
                    let value = value.to_ascii_lowercase().parse();
                    ssl.check_hostname = Some(value.map_err(|_| invalid("true or false"))?);
                }
                "ssl_cert_reqs" => {
                    let value = cert_reqs(&value);
                    ssl.cert_reqs = Some(value.ok_or_else(|| invalid("required, optional or none"))?);
                }
                _ => return Err(unknown_parameter(name, SSL_PARAMETERS)),
            }
        }
        Ok(ssl)
    }
}

fn unknown_parameter(name: &str, accepted: &'static str) -> Problem {
    Problem::Parameter { name: name.escape_debug().to_string(), accepted }
}

fn cert_reqs(text: &str) -> Option<CertReqs> {
    match text.to_ascii_lowercase().trim_start_matches("cert_") {
        "required" => Some(CertReqs::Required),
        "optional" => Some(CertReqs::Optional),
        "none" => Some(CertReqs::None),
        _ => None,
    }
}

fn name(text: &str) -> Result<String, Problem> {
    match decode(text)? {
        empty if empty.is_empty() => Ok("localhost".to_owned()),
        name if name.chars().all(|c| c.is_alphanumeric() || "-._".contains(c)) => Ok(name),
        _ => Err(Problem::Host),
    }
}

/// An address, perhaps with a zone: `fe80::1%25eth0`.
fn ipv6(text: &str) -> Result<String, Problem> {
    let host = decode(text)?;
    let (address, zone) = host.split_once('%').unwrap_or((&host, "0"));
    let valid = address.parse::<Ipv6Addr>().is_ok() && name(zone).is_ok_and(|name| name == zone);
    valid.then(|| host.clone()).ok_or(Problem::Host)
}

/// Digits alone: Rust would take a sign as well.
fn number<T: FromStr>(text: &str) -> Option<T> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// kombu takes `""`, `/` and `/0` for 0, and one more slash than needed.
fn database(path: &str) -> Result<u32, Problem> {
    match path.trim_start_matches('/') {
        "" => Ok(0),
        digits => number(digits).ok_or(Problem::Database),
    }
}

fn decode(text: &str) -> Result<String, Problem> {
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| Problem::Utf8)?;
    Ok(decoded.into_owned())
}

const USER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const PATH: &AsciiSet = &USER.remove(b'/');

/// As in a URL.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => utf8_percent_encode(&path.to_string_lossy(), PATH).fmt(f),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{}]:{port}", host.replace('%', "%25")),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.transport, &self.address, self.tls) {
            (Transport::Amqp, _, false) => "amqp://",
            (Transport::Amqp, _, true) => "amqps://",
            (Transport::Redis, Address::Unix(_), _) => "redis+socket://",
            (Transport::Redis, _, false) => "redis://",
            (Transport::Redis, _, true) => "rediss://",
            (Transport::Sentinel, ..) => "sentinel://",
        })?;
        match (&self.username, &self.password) {
            (None, None) => {}
            // `redis://secret@host`: a Redis user without a password is a password without its colon.
            (Some(_), None) => write!(f, "{}@", Secret::MASK)?,
            (user, Some(password)) => {
                let user = user.as_deref().unwrap_or_default();
                write!(f, "{}:{password}@", utf8_percent_encode(user, USER))?;
            }
        }
        self.address.fmt(f)?;
        match self.transport {
            _ if matches!(self.address, Address::Unix(_)) => return write!(f, "?virtual_host={}", self.db),
            Transport::Amqp => write!(f, "/{}", utf8_percent_encode(&self.vhost, PATH))?,
            Transport::Redis | Transport::Sentinel => write!(f, "/{}", self.db)?,
        }
        self.ssl.fmt(f)
    }
}

impl fmt::Display for SslParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        let reqs = self.cert_reqs.map(|reqs| format!("{reqs:?}").to_lowercase());
        let parameters = [
            ("cert_reqs", reqs),
            ("ca_certs", path(&self.ca_certs)),
            ("certfile", path(&self.certfile)),
            ("keyfile", path(&self.keyfile)),
            ("check_hostname", self.check_hostname.map(|check| check.to_string())),
        ];
        let mut separator = '?';
        for (name, value) in parameters {
            if let Some(value) = value {
                write!(f, "{separator}ssl_{name}={}", utf8_percent_encode(&value, PATH))?;
                separator = '&';
            }
        }
        Ok(())
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Default for BrokerUrls {
    fn default() -> Self {
        Self(vec![BrokerUrl::default()])
    }
}

impl FromStr for BrokerUrls {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let texts: Vec<_> = text.split(';').map(str::trim).filter(|url| !url.is_empty()).collect();
        let count = texts.len();
        let located = |index: usize, problem| match count {
            1 => Error::Single(problem),
            _ => Error::OneOf { position: index + 1, count, problem },
        };
        // First, so that half a password with a `;` in it is not taken for a parameter and named.
        if let Some(index) = texts.iter().position(|url| !url.contains("://")) {
            return Err(located(index, Problem::NoScheme));
        }
        let mut urls = Vec::with_capacity(count);
        for (index, text) in texts.into_iter().enumerate() {
            urls.push(text.parse().map_err(|problem| located(index, problem))?);
        }
        match urls.iter().filter(|url: &&BrokerUrl| url.transport == Transport::Sentinel).count() {
            _ if count == 0 => Err(Error::Empty),
            0 => Ok(Self(urls)),
            sentinels if sentinels == count => Ok(Self(one_sentinel_set(urls))),
            _ => Err(Error::Mixed),
        }
    }
}

fn one_sentinel_set(urls: Vec<BrokerUrl>) -> Vec<BrokerUrl> {
    let first = urls[0].clone();
    let member = |url: BrokerUrl| BrokerUrl { address: url.address, ..first.clone() };
    urls.into_iter().map(member).collect()
}

impl Deref for BrokerUrls {
    type Target = [BrokerUrl];

    fn deref(&self) -> &[BrokerUrl] {
        &self.0
    }
}

impl fmt::Display for BrokerUrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, url) in self.iter().enumerate() {
            write!(f, "{}{url}", if index == 0 { "" } else { ";" })?;
        }
        Ok(())
    }
}
