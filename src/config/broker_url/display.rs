//! Prints broker URLs in canonical form, with credentials masked. Apart from those, the result parses to the same URL.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Address, BrokerUrl, BrokerUrls, SslParams, Transport};
use crate::config::secret::Secret;

const USER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const PATH: &AsciiSet = &USER.remove(b'/');

/// Writes the address as it stands in a URL.
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
            // In `redis://secret@host`, the user name is usually a password whose colon was forgotten.
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
        let seconds = |duration: Option<Duration>| duration.map(|duration| duration.as_secs_f64().to_string());
        let [reqs, ca_certs, ca_path, ca_data, certfile, keyfile, check_hostname] = self.ssl.parameters();
        let parameters = [
            ("heartbeat", seconds(self.heartbeat)),
            ("connect_timeout", seconds(self.connect_timeout)),
            ("login_method", self.login_method.map(|method| method.to_string())),
            reqs,
            ca_certs,
            ca_path,
            ca_data,
            certfile,
            keyfile,
            check_hostname,
        ];
        let mut separator = '?';
        for (name, value) in parameters {
            if let Some(value) = value {
                write!(f, "{separator}{name}={}", utf8_percent_encode(&value, PATH))?;
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

impl SslParams {
    /// The parameters with their values.
    fn parameters(&self) -> [(&'static str, Option<String>); 7] {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        [
            ("ssl_cert_reqs", self.cert_reqs.map(|reqs| format!("{reqs:?}").to_lowercase())),
            ("ssl_ca_certs", path(&self.ca_certs)),
            ("ssl_ca_path", path(&self.ca_path)),
            ("ssl_ca_data", self.ca_data.clone()),
            ("ssl_certfile", path(&self.certfile)),
            ("ssl_keyfile", path(&self.keyfile)),
            ("ssl_check_hostname", self.check_hostname.map(|check| check.to_string())),
        ]
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
