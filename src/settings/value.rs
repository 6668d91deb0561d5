//! The types a setting can have, how each is read and what is said when it is not one.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::de::{Deserializer, Error};
use serde::{Deserialize, de};

use super::url::BrokerUrls;

/// A value as TOML has it. Environment and command line deliver text where the key may be text.
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

/// Reads a `T` from a raw value; the error says what would be accepted.
pub(super) trait Check<T> {
    fn check(raw: Raw) -> Result<T, String>;
}

/// serde's `deserialize_with` for a value that `C` checks.
pub(super) fn checked<'de, C: Check<T>, T, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    C::check(Raw::deserialize(from).unwrap_or(Raw::Other)).map_err(D::Error::custom)
}

/// As [`checked`], for a key that may be unset.
pub(super) fn optional<'de, C: Check<T>, T, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    struct Visitor<C, T>(std::marker::PhantomData<(C, T)>);
    impl<'de, C: Check<T>, T> de::Visitor<'de> for Visitor<C, T> {
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

/// The longest duration, in milliseconds: what is longer is a slip of the pen.
pub(super) const TEN_YEARS: u64 = 315_576_000_000;

fn read_duration(raw: Raw) -> Option<Duration> {
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

const A_DURATION: &str = r#"expected a duration such as "500ms", "10m" or a number of seconds"#;

/// A duration from `MIN` to `MAX` milliseconds.
pub(super) struct Within<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Check<Duration> for Within<MIN, MAX> {
    fn check(raw: Raw) -> Result<Duration, String> {
        let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
        read_duration(raw).filter(|value| (min..=max).contains(value)).ok_or_else(|| {
            let (min, max) = (humantime::format_duration(min), humantime::format_duration(max));
            format!("{A_DURATION}, from {min} to {max}")
        })
    }
}

/// AMQP negotiates the heartbeat as 16 bits of seconds.
pub(super) struct WholeSeconds;

impl Check<Duration> for WholeSeconds {
    fn check(raw: Raw) -> Result<Duration, String> {
        read_duration(raw)
            .filter(|value| value.subsec_nanos() == 0 && (1..=65_535).contains(&value.as_secs()))
            .ok_or_else(|| format!("{A_DURATION}, whole seconds from 1 to 65535"))
    }
}

/// A duration in which 0 means never.
pub(super) struct Never;

impl Check<Option<Duration>> for Never {
    fn check(raw: Raw) -> Result<Option<Duration>, String> {
        read_duration(raw)
            .filter(|value| *value <= Duration::from_millis(TEN_YEARS))
            .map(|value| Some(value).filter(|value| !value.is_zero()))
            .ok_or_else(|| format!("{A_DURATION}, up to 10years; 0 means never"))
    }
}

/// A whole number from `MIN` to `MAX`.
pub(super) struct Count<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64, T: TryFrom<u64>> Check<T> for Count<MIN, MAX> {
    fn check(raw: Raw) -> Result<T, String> {
        match raw {
            Raw::Int(value) => within(u64::try_from(value).ok(), MIN, MAX),
            _ => None,
        }
        .ok_or_else(|| format!("expected a whole number from {MIN} to {MAX}"))
    }
}

/// A number of bytes from `MIN` to `MAX`.
pub(super) struct Size<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64, T: TryFrom<u64>> Check<T> for Size<MIN, MAX> {
    fn check(raw: Raw) -> Result<T, String> {
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

/// A name that fits AMQP's 255 bytes with `.pidbox` behind it.
pub(super) struct Name;

impl Check<String> for Name {
    fn check(raw: Raw) -> Result<String, String> {
        match raw {
            Raw::Text(name) if (1..=248).contains(&name.len()) => Ok(name),
            _ => Err("expected a name of 1 to 248 bytes".to_owned()),
        }
    }
}

/// Ascending, finite upper bounds; Flower's users may have put `inf` last.
pub(super) struct Buckets;

impl Check<Vec<f64>> for Buckets {
    fn check(raw: Raw) -> Result<Vec<f64>, String> {
        let Raw::Numbers(mut bounds) = raw else {
            return Err(Self::expected());
        };
        bounds.pop_if(|last| *last == f64::INFINITY);
        let ascending = bounds.iter().all(|bound| bound.is_finite()) && bounds.is_sorted_by(|a, b| a < b);
        if ascending && (1..=100).contains(&bounds.len()) { Ok(bounds) } else { Err(Self::expected()) }
    }
}

impl Buckets {
    fn expected() -> String {
        "expected 1 to 100 ascending numbers of seconds, such as [0.1, 1, 10]".to_owned()
    }
}

/// One URL, `;`-separated ones or a list.
pub(super) struct Urls;

impl Check<BrokerUrls> for Urls {
    fn check(raw: Raw) -> Result<BrokerUrls, String> {
        let text = match raw {
            Raw::Text(text) => text,
            Raw::Texts(list) => list.join(";"),
            _ => String::new(),
        };
        text.parse().map_err(|error: super::url::Error| error.to_string())
    }
}

/// An address to listen on, with the two short forms people write.
pub(super) struct Listen;

impl Check<SocketAddr> for Listen {
    fn check(raw: Raw) -> Result<SocketAddr, String> {
        let Raw::Text(text) = raw else {
            return Err(Self::expected());
        };
        let (host, port) = text.rsplit_once(':').unwrap_or(("", ""));
        let ip = match host {
            "" => Ipv4Addr::UNSPECIFIED,
            "localhost" => Ipv4Addr::LOCALHOST,
            _ => return text.parse().map_err(|_| Self::expected()),
        };
        port.parse().map(|port| SocketAddr::from((ip, port))).map_err(|_| Self::expected())
    }
}

impl Listen {
    fn expected() -> String {
        r#"expected an address and a port, such as "0.0.0.0:9555", "[::]:9555" or ":9555""#.to_owned()
    }
}

/// What stands before the name of a Redis fanout channel (kombu's `fanout_prefix`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FanoutPrefix {
    /// kombu's default: `/{db}.`
    On,
    /// Nothing.
    Off,
    /// A text of the operator's, in which kombu replaces `{db}`.
    Custom(String),
}

pub(super) struct Fanout;

impl Check<FanoutPrefix> for Fanout {
    fn check(raw: Raw) -> Result<FanoutPrefix, String> {
        match raw {
            Raw::Flag(true) => Ok(FanoutPrefix::On),
            Raw::Flag(false) => Ok(FanoutPrefix::Off),
            Raw::Text(text) => Ok(match text.as_str() {
                "true" => FanoutPrefix::On,
                "false" | "" => FanoutPrefix::Off,
                _ => FanoutPrefix::Custom(text),
            }),
            _ => Err(r#"expected true, false or a prefix such as "/{db}.""#.to_owned()),
        }
    }
}

/// Globs of worker hostnames, compiled: `*`, `?`, `[..]`.
#[derive(Clone)]
pub struct Hostnames {
    patterns: Vec<String>,
    set: GlobSet,
}

impl Hostnames {
    /// Whether any of the globs matches the whole hostname.
    #[must_use]
    pub fn matches(&self, hostname: &str) -> bool {
        self.set.is_match(hostname)
    }

    /// The globs as they were written.
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

pub(super) struct Globs;

impl Check<Hostnames> for Globs {
    fn check(raw: Raw) -> Result<Hostnames, String> {
        const EXPECTED: &str = r#"expected globs of worker hostnames, such as ["*@my-pod"]"#;
        let patterns = match raw {
            Raw::Texts(patterns) if !patterns.is_empty() => patterns,
            _ => return Err(EXPECTED.to_owned()),
        };
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            let glob = Glob::new(pattern)
                .map_err(|error| format!("{EXPECTED}; {:?} is none: {}", printable(pattern), error.kind()))?;
            set.add(glob);
        }
        let set = set.build().map_err(|error| format!("{EXPECTED}: {}", error.kind()))?;
        Ok(Hostnames { patterns, set })
    }
}

/// A text for printing. A URL that strayed where none belongs may hold a password, and so may a file's content where its
/// path belongs.
pub(super) fn printable(text: &str) -> &str {
    if text.contains("://") || text.contains("-----BEGIN") || text.contains('\n') { Secret::MASK } else { text }
}

/// A text that is not printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// What is printed in its place.
    pub(super) const MASK: &str = "***";

    /// The text itself, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

/// A setting with a handful of named values.
pub(super) trait Choice: Copy + PartialEq + 'static {
    const ALL: &[(&str, Self)];
}

pub(super) struct OneOf;

impl<T: Choice> Check<T> for OneOf {
    fn check(raw: Raw) -> Result<T, String> {
        let text = if let Raw::Text(text) = raw { text } else { String::new() };
        let found = T::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = T::ALL.iter().map(|(name, _)| *name).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}

macro_rules! choice {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub enum $name { $($(#[$meta])* #[doc = concat!("`", $text, "`")] $variant,)+ }

        impl Choice for $name {
            const ALL: &[(&str, Self)] = &[$(($text, Self::$variant)),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),+ })
            }
        }
    };
}

choice! {
    /// The least severe level that is logged.
    Level {
        Error = "error",
        Warn = "warn",
        #[default]
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

choice! {
    /// How a log line is written.
    LogFormat {
        #[default]
        Text = "text",
        Json = "json",
    }
}
