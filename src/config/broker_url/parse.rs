//! Parses broker URLs as kombu does (`kombu.utils.url.url_to_parts`).

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use super::parameters::Parameters;
use super::{Address, BrokerUrl, BrokerUrls, Transport, UrlError, UrlErrorKind};
use crate::config::secret::Secret;

const AMQP_PORT: u16 = 5672;
const AMQPS_PORT: u16 = 5671;

impl FromStr for BrokerUrls {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let texts: Vec<_> = text.split(';').map(str::trim).filter(|url| !url.is_empty()).collect();
        let count = texts.len();
        let url_error = |index: usize, kind| match count {
            1 => UrlError::Single(kind),
            _ => UrlError::OneOf { position: index + 1, count, kind },
        };
        // All schemes are checked first. An unescaped `;` in a password splits the URL, and its first half could
        // otherwise be reported as an unknown parameter, which would print a part of the password.
        if let Some(kind) = text_error(text.trim()) {
            return Err(UrlError::Single(kind));
        }
        if let Some(index) = texts.iter().position(|url| !url.contains("://")) {
            let kind = only_host(texts[index]).filter(|_| count == 1).unwrap_or(UrlErrorKind::NoScheme);
            return Err(url_error(index, kind));
        }
        let mut urls = Vec::with_capacity(count);
        for (index, text) in texts.into_iter().enumerate() {
            urls.push(text.parse().map_err(|kind| url_error(index, kind))?);
        }
        match urls.iter().filter(|url: &&BrokerUrl| url.transport == Transport::Sentinel).count() {
            _ if count == 0 => Err(UrlError::Empty),
            0 => Ok(Self(urls)),
            sentinels if sentinels == count => Ok(Self(one_sentinel_set(urls))),
            _ => Err(UrlError::Mixed),
        }
    }
}

/// Mistakes that the environment and files of variables invite.
fn text_error(text: &str) -> Option<UrlErrorKind> {
    let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    match text.split_once('=') {
        _ if text.starts_with(['"', '\'']) => Some(UrlErrorKind::Quoted),
        Some((name, value)) if is_name(name) && value.contains("://") => Some(UrlErrorKind::Assignment),
        _ => None,
    }
}

/// The error for a host without a scheme, if the text cannot be a secret: `localhost` or an IP address, maybe with a
/// port.
fn only_host(text: &str) -> Option<UrlErrorKind> {
    let (host, port) = text.split_once(':').unwrap_or((text, "0"));
    let is_host = host == "localhost" || host.parse::<Ipv4Addr>().is_ok();
    (is_host && unsigned::<u16>(port).is_some()).then(|| UrlErrorKind::OnlyHost(text.to_owned()))
}

fn one_sentinel_set(urls: Vec<BrokerUrl>) -> Vec<BrokerUrl> {
    let first = urls[0].clone();
    let member = |url: BrokerUrl| BrokerUrl { address: url.address, ..first.clone() };
    urls.into_iter().map(member).collect()
}

impl FromStr for BrokerUrl {
    type Err = UrlErrorKind;

    fn from_str(text: &str) -> Result<Self, UrlErrorKind> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlErrorKind::NoScheme)?;
        let (transport, tls, port) = match scheme.to_ascii_lowercase().as_str() {
            "amqp" | "pyamqp" | "librabbitmq" => (Transport::Amqp, false, Some(AMQP_PORT)),
            "amqps" => (Transport::Amqp, true, Some(AMQPS_PORT)),
            "redis" => (Transport::Redis, false, Some(6379)),
            "rediss" => (Transport::Redis, true, Some(6379)),
            "redis+socket" => (Transport::Redis, false, None),
            "sentinel" => (Transport::Sentinel, false, Some(26379)),
            other => return Err(unknown_scheme(other)),
        };
        let raw = RawUrl::split(rest)?;
        let parameters = Parameters::parse(raw.query, transport, port.is_none())?;
        let tls = tls || parameters.tls;
        let port = if tls && port == Some(AMQP_PORT) { Some(AMQPS_PORT) } else { port };
        let is_amqp = transport == Transport::Amqp;
        let guest = || is_amqp.then(|| "guest".to_owned());
        let (user, password) = raw.credentials()?;
        Ok(Self {
            transport,
            tls,
            address: match port {
                Some(port) => raw.tcp(port)?,
                None => raw.unix()?,
            },
            username: user.or_else(guest),
            password: password.or_else(guest).map(Secret::from),
            vhost: if is_amqp { raw.vhost()? } else { "/".to_owned() },
            db: match (is_amqp, port) {
                (true, _) => 0,
                (false, Some(_)) => database(raw.path)?,
                (false, None) => database(parameters.virtual_host.as_deref().unwrap_or_default())?,
            },
            ssl: parameters.ssl,
            heartbeat: parameters.heartbeat,
            connect_timeout: parameters.connect_timeout,
            login_method: parameters.login_method,
            parameters_without_effect: parameters.without_effect,
        })
    }
}

/// Names a scheme in the error only if it looks like one: other text may be part of a password.
fn unknown_scheme(scheme: &str) -> UrlErrorKind {
    let is_plausible = scheme.len() <= 40 && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c));
    if is_plausible { UrlErrorKind::Scheme(scheme.to_owned()) } else { UrlErrorKind::NoScheme }
}

/// A URL without its scheme, split at the delimiters and still percent-encoded.
struct RawUrl<'a> {
    userinfo: &'a str,
    host_and_port: &'a str,
    path: &'a str,
    query: &'a str,
}

impl<'a> RawUrl<'a> {
    fn split(rest: &'a str) -> Result<Self, UrlErrorKind> {
        let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        // A password with an unescaped delimiter. Celery would take a part of the password as the host.
        if tail.contains(['@', '#']) {
            return Err(UrlErrorKind::UnescapedDelimiter);
        }
        let (userinfo, host_and_port) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        Ok(Self { userinfo, host_and_port, path, query })
    }

    fn credentials(&self) -> Result<(Option<String>, Option<String>), UrlErrorKind> {
        let (user, password) = self.userinfo.split_once(':').unwrap_or((self.userinfo, ""));
        let non_empty = |text: &str| Ok(Some(decode(text)?).filter(|text| !text.is_empty()));
        Ok((non_empty(user)?, non_empty(password)?))
    }

    fn tcp(&self, default_port: u16) -> Result<Address, UrlErrorKind> {
        let text = self.host_and_port;
        let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
            let (host, port) = bracketed.split_once(']').ok_or(UrlErrorKind::Host)?;
            (ipv6_host(host)?, port)
        } else {
            let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            (host_name(host)?, port)
        };
        let port = match (port.is_empty(), port.strip_prefix(':')) {
            (true, _) | (_, Some("")) => default_port,
            (_, Some(port)) => match unsigned(port).ok_or(UrlErrorKind::Port)? {
                0 => default_port,
                port => port,
            },
            (_, None) => return Err(UrlErrorKind::Host),
        };
        Ok(Address::Tcp { host, port })
    }

    fn unix(&self) -> Result<Address, UrlErrorKind> {
        if !self.host_and_port.is_empty() || self.path.len() < 2 {
            return Err(UrlErrorKind::Socket);
        }
        Ok(Address::Unix(decode(self.path)?.into()))
    }

    fn vhost(&self) -> Result<String, UrlErrorKind> {
        let name = decode(self.path.strip_prefix('/').unwrap_or(self.path))?;
        Ok(if name.is_empty() { "/".to_owned() } else { name })
    }
}

/// A host name or an IPv4 address. Empty means `localhost`.
fn host_name(text: &str) -> Result<String, UrlErrorKind> {
    match decode(text)? {
        empty if empty.is_empty() => Ok("localhost".to_owned()),
        name if name.chars().all(|c| c.is_alphanumeric() || "-._".contains(c)) => Ok(name),
        _ => Err(UrlErrorKind::Host),
    }
}

/// An IPv6 address, optionally with a zone: `fe80::1%25eth0`.
fn ipv6_host(text: &str) -> Result<String, UrlErrorKind> {
    let host = decode(text)?;
    let (address, zone) = host.split_once('%').unwrap_or((&host, "0"));
    let valid = address.parse::<Ipv6Addr>().is_ok() && host_name(zone).is_ok_and(|name| name == zone);
    valid.then(|| host.clone()).ok_or(UrlErrorKind::Host)
}

/// Parses digits only. Rust's own parser also accepts a sign.
fn unsigned<T: FromStr>(text: &str) -> Option<T> {
    let is_numeric = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_numeric)
}

/// A database number. As in kombu, an empty path and `/` are 0, and surplus leading slashes are ignored.
fn database(path: &str) -> Result<u32, UrlErrorKind> {
    match path.trim_start_matches('/') {
        "" => Ok(0),
        digits => unsigned(digits).ok_or(UrlErrorKind::Database),
    }
}

fn decode(text: &str) -> Result<String, UrlErrorKind> {
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| UrlErrorKind::Utf8)?;
    Ok(decoded.into_owned())
}
