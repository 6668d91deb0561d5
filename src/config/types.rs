//! The types of settings, how each is parsed, and the error for an invalid value.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::de::{Deserializer, Error};
use serde::{Deserialize, de};

use super::broker_url::{BrokerUrls, UrlError};
use super::choice::Choice;
use super::limits::TEN_YEARS;
use super::secret::printable;

/// An unvalidated TOML value. The command line always provides text, and the environment
/// what the `ValueKind` of the key implies.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Raw {
    Flag(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Numbers(Vec<f64>),
    Texts(Vec<String>),
    #[serde(skip)]
    Other,
}

/// Parses a raw value into a `T`. The error states what is accepted.
pub(super) trait FromRaw<T> {
    fn from_raw(raw: Raw) -> Result<T, String>;
}

/// For serde's `deserialize_with`: a value that `C` parses.
pub(super) fn checked<'de, C: FromRaw<T>, T, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    C::from_raw(Raw::deserialize(from).unwrap_or(Raw::Other)).map_err(D::Error::custom)
}

/// Like [`checked`], for a key that may be unset.
pub(super) fn optional<'de, C: FromRaw<T>, T, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    struct Visitor<C, T>(std::marker::PhantomData<(C, T)>);
    impl<'de, C: FromRaw<T>, T> de::Visitor<'de> for Visitor<C, T> {
        type Value = Option<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a value")
        }
        fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            checked::<C, T, D>(from).map(Some)
        }
    }
    from.deserialize_option(Visitor::<C, T>(std::marker::PhantomData))
}

fn parse_duration(raw: Raw) -> Option<Duration> {
    let seconds = match raw {
        Raw::Int(seconds) => return u64::try_from(seconds).ok().map(Duration::from_secs),
        Raw::Float(seconds) => seconds,
        Raw::Text(text) => match text.trim().parse() {
            Ok(seconds) => seconds,
            Err(_) => return humantime::parse_duration(text.trim()).ok(),
        },
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

const EXPECTED_DURATION: &str = r#"expected a duration such as "500ms", "10m" or a number of seconds"#;

/// A duration from `MIN` to `MAX` milliseconds.
pub(super) struct DurationRange<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> FromRaw<Duration> for DurationRange<MIN, MAX> {
    fn from_raw(raw: Raw) -> Result<Duration, String> {
        let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
        parse_duration(raw).filter(|value| (min..=max).contains(value)).ok_or_else(|| {
            let (min, max) = (humantime::format_duration(min), humantime::format_duration(max));
            format!("{EXPECTED_DURATION}, from {min} to {max}")
        })
    }
}

/// A duration in whole seconds from 1 to 65535: AMQP negotiates the heartbeat as a 16-bit number of seconds.
pub(super) struct DurationSecs;

impl FromRaw<Duration> for DurationSecs {
    fn from_raw(raw: Raw) -> Result<Duration, String> {
        parse_duration(raw)
            .filter(|value| value.subsec_nanos() == 0 && (1..=65_535).contains(&value.as_secs()))
            .ok_or_else(|| r#"expected whole seconds from 1 to 65535, such as "10s" or 10"#.to_owned())
    }
}

/// A duration up to 10 years, where 0 means never.
pub(super) struct ZeroIsNever;

impl FromRaw<Option<Duration>> for ZeroIsNever {
    fn from_raw(raw: Raw) -> Result<Option<Duration>, String> {
        parse_duration(raw)
            .filter(|value| *value <= Duration::from_millis(TEN_YEARS))
            .map(|value| Some(value).filter(|value| !value.is_zero()))
            .ok_or_else(|| format!("{EXPECTED_DURATION}, up to 10years; 0 means never"))
    }
}

/// A duration where 0 means never. A large number without a unit is an error, because Flower's setting is in
/// milliseconds.
pub(super) struct SaveInterval;

/// The largest value without a unit, in seconds.
const MAX_SAVE_INTERVAL_SECONDS: f64 = 3600.0;

impl FromRaw<Option<Duration>> for SaveInterval {
    fn from_raw(raw: Raw) -> Result<Option<Duration>, String> {
        let number = match &raw {
            Raw::Int(seconds) => Some(*seconds as f64),
            Raw::Float(seconds) => Some(*seconds),
            Raw::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        if let Some(number) = number.filter(|number| *number > MAX_SAVE_INTERVAL_SECONDS) {
            return Err(format!(
                "{EXPECTED_DURATION} up to 3600; Flower's setting is in milliseconds: write \"{number}ms\""
            ));
        }
        parse_duration(raw)
            .filter(|value| *value <= Duration::from_millis(TEN_YEARS))
            .map(|value| Some(value).filter(|value| !value.is_zero()))
            .ok_or_else(|| format!("{EXPECTED_DURATION}, up to 10years; 0 saves only at shutdown and on SIGUSR1"))
    }
}

/// A whole number from `MIN` to `MAX`.
pub(super) struct Count<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64, T: TryFrom<u64>> FromRaw<T> for Count<MIN, MAX> {
    fn from_raw(raw: Raw) -> Result<T, String> {
        match raw {
            Raw::Int(value) => within(u64::try_from(value).ok(), MIN, MAX),
            _ => None,
        }
        .ok_or_else(|| format!("expected a whole number from {MIN} to {MAX}"))
    }
}

/// A number of bytes from `MIN` to `MAX`.
pub(super) struct Size<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64, T: TryFrom<u64>> FromRaw<T> for Size<MIN, MAX> {
    fn from_raw(raw: Raw) -> Result<T, String> {
        let value = match raw {
            Raw::Int(bytes) => u64::try_from(bytes).ok(),
            Raw::Text(text) => parse_size(&text),
            _ => None,
        };
        within(value, MIN, MAX).ok_or_else(|| {
            let (min, max) = (format_size(MIN), format_size(MAX));
            format!(r#"expected a size such as "64MiB", "100kB" or a number of bytes, from {min} to {max}"#)
        })
    }
}

fn within<T: TryFrom<u64>>(value: Option<u64>, min: u64, max: u64) -> Option<T> {
    let value = value.filter(|value| (min..=max).contains(value))?;
    T::try_from(value).ok()
}

const UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
    ("", 1),
];

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()))?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Bytes in the largest binary unit that divides them.
pub(super) fn format_size(bytes: u64) -> String {
    match UNITS[..4].iter().find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor)) {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => bytes.to_string(),
    }
}

/// A name of 1 to 218 bytes: with a dot and a UUID, as in the name of an unnamed queue, it fits into AMQP's 255 bytes.
pub(super) struct Name;

impl FromRaw<String> for Name {
    fn from_raw(raw: Raw) -> Result<String, String> {
        match raw {
            Raw::Text(name) if (1..=218).contains(&name.len()) => Ok(name),
            _ => Err("expected a name of 1 to 218 bytes".to_owned()),
        }
    }
}

/// 1 to 100 finite upper bounds in ascending order. Flower users may have `inf` as the last one, which is dropped.
pub(super) struct Buckets;

impl FromRaw<Vec<f64>> for Buckets {
    fn from_raw(raw: Raw) -> Result<Vec<f64>, String> {
        let Raw::Numbers(mut bounds) = raw else {
            return Err(Self::EXPECTED.to_owned());
        };
        bounds.pop_if(|last| *last == f64::INFINITY);
        let is_ascending = bounds.iter().all(|bound| bound.is_finite()) && bounds.is_sorted_by(|a, b| a < b);
        if is_ascending && (1..=100).contains(&bounds.len()) { Ok(bounds) } else { Err(Self::EXPECTED.to_owned()) }
    }
}

impl Buckets {
    const EXPECTED: &str = "expected 1 to 100 ascending numbers of seconds, such as [0.1, 1, 10]";
}

/// One broker URL, several separated by `;`, or a list.
pub(super) struct Urls;

impl FromRaw<BrokerUrls> for Urls {
    fn from_raw(raw: Raw) -> Result<BrokerUrls, String> {
        let text = match raw {
            Raw::Text(text) => text,
            Raw::Texts(list) => list.join(";"),
            _ => String::new(),
        };
        text.parse().map_err(|error: UrlError| error.to_string())
    }
}

/// An IP address and a port, or one of two short forms: `:9555` and `localhost:9555`.
pub(super) struct Listen;

impl FromRaw<SocketAddr> for Listen {
    fn from_raw(raw: Raw) -> Result<SocketAddr, String> {
        let Raw::Text(text) = raw else {
            return Err(Self::EXPECTED.to_owned());
        };
        let (host, port) = text.rsplit_once(':').unwrap_or(("", ""));
        let ip = match host {
            "" => Ipv4Addr::UNSPECIFIED,
            "localhost" => Ipv4Addr::LOCALHOST,
            _ => return text.parse().map_err(|_| Self::EXPECTED.to_owned()),
        };
        port.parse().map(|port| SocketAddr::from((ip, port))).map_err(|_| Self::EXPECTED.to_owned())
    }
}

impl Listen {
    const EXPECTED: &str = r#"expected an address and a port, such as "0.0.0.0:9555", "[::]:9555" or ":9555""#;
}

/// The prefix of Redis fanout channels (kombu's `fanout_prefix`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FanoutPrefix {
    /// kombu's default, `/{db}.`.
    On,
    /// No prefix.
    Off,
    /// A custom prefix, in which kombu replaces `{db}`.
    Custom(String),
}

/// A boolean or a prefix.
pub(super) struct Fanout;

impl FromRaw<FanoutPrefix> for Fanout {
    fn from_raw(raw: Raw) -> Result<FanoutPrefix, String> {
        match raw {
            Raw::Flag(true) => Ok(FanoutPrefix::On),
            Raw::Flag(false) => Ok(FanoutPrefix::Off),
            Raw::Text(text) => Ok(match text.as_str() {
                // Python users write `True` in the environment.
                "true" | "True" => FanoutPrefix::On,
                "false" | "False" | "" => FanoutPrefix::Off,
                _ => FanoutPrefix::Custom(text),
            }),
            _ => Err(r#"expected true, false or a prefix such as "/{db}.""#.to_owned()),
        }
    }
}

/// A finite number above 1.
pub(super) struct Factor;

impl FromRaw<f64> for Factor {
    fn from_raw(raw: Raw) -> Result<f64, String> {
        let number = match raw {
            #[allow(clippy::cast_precision_loss, reason = "a large factor need not be exact")]
            Raw::Int(number) => number as f64,
            Raw::Float(number) => number,
            _ => f64::NAN,
        };
        Some(number)
            .filter(|number| *number > 1.0 && number.is_finite())
            .ok_or_else(|| "expected a number above 1, such as 1.1".to_owned())
    }
}

/// Compiled globs of worker hostnames, with `*`, `?` and `[..]`.
#[derive(Clone)]
pub struct Hostnames {
    patterns: Vec<String>,
    set: GlobSet,
}

impl Hostnames {
    /// Whether any glob matches the entire hostname.
    #[must_use]
    pub fn matches(&self, hostname: &str) -> bool {
        self.set.is_match(hostname)
    }

    /// The globs as configured.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }
}

impl fmt::Debug for Hostnames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.patterns.fmt(f)
    }
}

impl PartialEq for Hostnames {
    fn eq(&self, other: &Self) -> bool {
        self.patterns == other.patterns
    }
}

/// A list of at least one glob.
pub(super) struct Globs;

impl FromRaw<Hostnames> for Globs {
    fn from_raw(raw: Raw) -> Result<Hostnames, String> {
        const EXPECTED: &str = r#"expected globs of worker hostnames, such as ["*@my-pod"]"#;
        let patterns = match raw {
            Raw::Texts(patterns) if !patterns.is_empty() => patterns,
            _ => return Err(EXPECTED.to_owned()),
        };
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            let glob = Glob::new(pattern).map_err(|error| {
                format!("{EXPECTED}; {:?} is not a valid glob: {}", printable(pattern), error.kind())
            })?;
            set.add(glob);
        }
        let set = set.build().map_err(|error| format!("{EXPECTED}: {}", error.kind()))?;
        Ok(Hostnames { patterns, set })
    }
}

/// The name of a [`Choice`], upper or lower case.
pub(super) struct OneOf;

impl<T: Choice> FromRaw<T> for OneOf {
    fn from_raw(raw: Raw) -> Result<T, String> {
        let text = if let Raw::Text(text) = raw { text } else { String::new() };
        let found = T::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = T::ALL.iter().map(|(name, _)| *name).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}
