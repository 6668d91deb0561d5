//! The parameters of a broker URL (`?name=value`), as kombu reads them: it takes some itself, and passes those of a Unix
//! socket on to redis-py.

use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::{CertReqs, LoginMethod, SslParams, Transport, UrlErrorKind};
use crate::config::choice::Choice;
use crate::config::limits::TEN_YEARS;

/// What the parameters of a URL set.
#[derive(Default)]
pub(super) struct Parameters {
    pub(super) tls: bool,
    pub(super) ssl: SslParams,
    pub(super) heartbeat: Option<Duration>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) login_method: Option<LoginMethod>,
    /// `virtual_host`, on a Unix socket only.
    pub(super) virtual_host: Option<String>,
    pub(super) without_effect: Vec<String>,
}

/// Parameters that kombu takes on each transport but Unix sockets.
const ACCEPTED: &str = "heartbeat, connect_timeout, login_method, ssl, insist, ssl_cert_reqs, ssl_ca_certs, ssl_ca_path, \
                        ssl_ca_data, ssl_certfile, ssl_keyfile or ssl_check_hostname";

/// Parameters that redis-py takes for a Unix socket, and that do not change which events arrive. kombu replaces `db` by
/// `virtual_host`, and the credentials by those before the path.
const UNIX_WITHOUT_EFFECT: [&str; 17] = [
    "client_name",
    "db",
    "decode_responses",
    "encoding",
    "encoding_errors",
    "health_check_interval",
    "lib_name",
    "lib_version",
    "password",
    "protocol",
    "retry_on_error",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_read_size",
    "socket_timeout",
    "username",
];

/// Parameters that the exporter refuses, with what to write instead. Apart from the first ones, kombu refuses them too.
const REFUSED: [(&str, &str); 25] = [
    (
        "credential_provider",
        "set broker.url_file to a file with the URL, and rewrite the file when the credentials change; it is read again \
         on every connection attempt",
    ),
    ("ssl_password", "decrypt the key, and set broker.tls.key_file to the decrypted file"),
    ("ssl_ciphers", "remove it; the exporter uses the cipher suites of TLS 1.2 and 1.3 that are considered secure"),
    ("ssl_validate_ocsp", NO_OCSP),
    ("ssl_validate_ocsp_stapled", NO_OCSP),
    ("ssl_ocsp_context", NO_OCSP),
    ("ssl_ocsp_expected_cert", NO_OCSP),
    ("ssl_min_version", "remove it; TLS 1.2 is the minimum"),
    ("db", DATABASE),
    ("virtual_host", DATABASE),
    ("userid", CREDENTIALS),
    ("username", CREDENTIALS),
    ("password", CREDENTIALS),
    ("read_timeout", TIMEOUT),
    ("write_timeout", TIMEOUT),
    ("socket_timeout", TIMEOUT),
    ("socket_connect_timeout", TIMEOUT),
    ("socket_keepalive", OPTION),
    ("health_check_interval", OPTION),
    ("retry_on_timeout", OPTION),
    ("max_connections", OPTION),
    ("frame_max", OPTION),
    ("master_name", "set broker.redis.master_name"),
    ("global_keyprefix", "set broker.redis.global_keyprefix"),
    ("fanout_prefix", "set broker.redis.fanout_prefix"),
];
const NO_OCSP: &str = "remove it; the exporter does not check OCSP";
const DATABASE: &str = "write the virtual host or database as the path of the URL, such as redis://host/3";
const CREDENTIALS: &str = "write user name and password before the host: redis://user:password@host";
const TIMEOUT: &str = "set broker.connect_timeout";
const OPTION: &str = "remove it; Celery accepts it only in broker_transport_options, and the exporter does not need it";

impl Parameters {
    /// Parses a query, which is still percent-encoded.
    pub(super) fn parse(query: &str, transport: Transport, is_unix: bool) -> Result<Self, UrlErrorKind> {
        let mut parameters = Self::default();
        for (name, value) in pairs(query)? {
            let known =
                if is_unix { parameters.set_unix(&name, &value) } else { parameters.set(&name, &value, transport)? };
            if !known {
                return Err(refused(name, is_unix));
            }
        }
        Ok(parameters)
    }

    /// Whether the parameter is known.
    fn set_unix(&mut self, name: &str, value: &str) -> bool {
        match name {
            "virtual_host" => self.virtual_host = Some(value.to_owned()),
            _ if UNIX_WITHOUT_EFFECT.contains(&name) => self.without_effect.push(name.to_owned()),
            _ => return false,
        }
        true
    }

    /// Whether the parameter is known.
    fn set(&mut self, name: &str, value: &str, transport: Transport) -> Result<bool, UrlErrorKind> {
        let is_amqp = transport == Transport::Amqp;
        match name {
            "heartbeat" => {
                let heartbeat = seconds(value, 65_535.0).ok_or_else(|| invalid(name, "seconds from 0 to 65535"))?;
                // AMQP negotiates whole seconds.
                let heartbeat = Duration::from_secs(heartbeat.as_secs() + u64::from(heartbeat.subsec_nanos() > 0));
                self.heartbeat = Some(heartbeat).filter(|heartbeat| is_amqp && !heartbeat.is_zero());
                if self.heartbeat.is_none() {
                    self.without_effect.push(name.to_owned());
                }
            }
            "connect_timeout" => {
                let timeout = seconds(value, (TEN_YEARS / 1000) as f64).filter(|timeout| !timeout.is_zero());
                self.connect_timeout = Some(timeout.ok_or_else(|| invalid(name, "a number of seconds above 0"))?);
            }
            "login_method" if is_amqp => {
                let method = LoginMethod::ALL.iter().find(|(name, _)| *name == value);
                let (_, method) = method.ok_or_else(|| invalid(name, "PLAIN, AMQPLAIN or EXTERNAL"))?;
                self.login_method = Some(*method);
            }
            // kombu turns TLS on for any text, even `false`.
            "ssl" if is_amqp => self.tls = true,
            "ssl" => {
                return Err(UrlErrorKind::Unsupported {
                    name: name.to_owned(),
                    remedy: "use rediss://, or ssl_cert_reqs=required",
                });
            }
            "insist" | "login_method" => self.without_effect.push(name.to_owned()),
            "credential_provider" if is_amqp => self.without_effect.push(name.to_owned()),
            _ => return self.set_ssl(name, value),
        }
        Ok(true)
    }

    fn set_ssl(&mut self, name: &str, value: &str) -> Result<bool, UrlErrorKind> {
        let ssl = &mut self.ssl;
        match name {
            "ssl_ca_certs" => ssl.ca_certs = Some(PathBuf::from(value)),
            "ssl_ca_path" => ssl.ca_path = Some(PathBuf::from(value)),
            "ssl_ca_data" => ssl.ca_data = Some(value.to_owned()),
            "ssl_certfile" => ssl.certfile = Some(PathBuf::from(value)),
            "ssl_keyfile" => ssl.keyfile = Some(PathBuf::from(value)),
            "ssl_check_hostname" => ssl.check_hostname = Some(!value.eq_ignore_ascii_case("false")),
            "ssl_cert_reqs" => {
                let reqs = cert_reqs(value).ok_or_else(|| {
                    invalid(name, "required, optional or none, or CERT_REQUIRED, CERT_OPTIONAL or CERT_NONE")
                })?;
                ssl.cert_reqs = Some(reqs);
            }
            _ => return Ok(false),
        }
        self.tls = true;
        Ok(true)
    }
}

/// The parameters, decoded as Python's `parse_qsl` does: `+` is a space, and those without a value are left out. Of equal
/// names, the last one counts.
fn pairs(query: &str) -> Result<Vec<(String, String)>, UrlErrorKind> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let (name, value) = (decode_query(name)?, decode_query(value)?);
        if !value.is_empty() {
            pairs.retain(|(earlier, _)| *earlier != name);
            pairs.push((name, value));
        }
    }
    Ok(pairs)
}

fn decode_query(text: &str) -> Result<String, UrlErrorKind> {
    let text = text.replace('+', " ");
    Ok(percent_decode_str(&text).decode_utf8().map_err(|_| UrlErrorKind::Utf8)?.into_owned())
}

/// A number of seconds from 0 to `max`.
fn seconds(text: &str, max: f64) -> Option<Duration> {
    let seconds: f64 = text.trim().parse().ok()?;
    (0.0..=max).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

fn invalid(name: &str, accepted: &'static str) -> UrlErrorKind {
    UrlErrorKind::Value { name: name.to_owned(), accepted }
}

/// The error for an unknown parameter. Its name is part of the error only if it looks like one: other text may be a part
/// of a password.
fn refused(name: String, is_unix: bool) -> UrlErrorKind {
    if let Some((_, remedy)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return UrlErrorKind::Unsupported { name, remedy };
    }
    let is_plausible = name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let name = if is_plausible { name } else { "(not printed)".to_owned() };
    UrlErrorKind::Parameter { name, accepted: if is_unix { "virtual_host" } else { ACCEPTED } }
}

/// kombu's spellings.
fn cert_reqs(text: &str) -> Option<CertReqs> {
    match text {
        "required" | "CERT_REQUIRED" => Some(CertReqs::Required),
        "optional" | "CERT_OPTIONAL" => Some(CertReqs::Optional),
        "none" | "CERT_NONE" => Some(CertReqs::None),
        _ => None,
    }
}
