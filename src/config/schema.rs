//! The table of all keys: how each is parsed from the environment, formatted and reloaded.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::secret::{Secret, printable};
use super::types::{FanoutPrefix, Hostnames, Level, LogFormat, format_size};
use super::{BrokerUrls, Config};

/// How text from the environment is parsed, and whether the value may be printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueKind {
    /// A string, taken as it is: `0123` is not a number.
    Text,
    /// Like `Text`, but never printed.
    Secret,
    /// A boolean, a number, or a string with a unit.
    Scalar,
    /// A list of strings, comma-separated or as a TOML array.
    Strings,
    /// A list of numbers, comma-separated or as a TOML array.
    Numbers,
}

/// One key, named `section.key`.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kind: ValueKind,
    /// Whether the key is unset by default.
    pub(super) optional: bool,
    /// Copies the value from the second configuration to the first on reload. `None`: a change requires a restart.
    pub(super) apply_live: Option<fn(&mut Config, &Config)>,
    /// Formats the value as TOML, with secrets masked. `None` if the key is unset.
    pub(super) format: fn(&Config) -> Option<String>,
    /// Whether the value is the same in both configurations.
    pub(super) eq: fn(&Config, &Config) -> bool,
}

impl Key {
    const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    const fn format(mut self, format: fn(&Config) -> Option<String>) -> Self {
        self.format = format;
        self
    }

    /// The section: `state` for `state.max_tasks`.
    pub(super) fn section(&self) -> &'static str {
        self.name.rsplit_once('.').map_or("", |(section, _)| section)
    }
}

macro_rules! key {
    ($kind:ident, $head:ident $(. $tail:ident)+) => {
        Key {
            name: concat!(stringify!($head) $(, ".", stringify!($tail))+),
            kind: ValueKind::$kind,
            optional: false,
            apply_live: None,
            format: |config| config.$head$(.$tail)+.format(),
            eq: |a, b| a.$head$(.$tail)+ == b.$head$(.$tail)+,
        }
    };
}

/// A key that a reload applies.
macro_rules! live_key {
    ($kind:ident, $head:ident $(. $tail:ident)+) => {
        Key {
            apply_live: Some(|old, new| old.$head$(.$tail)+.clone_from(&new.$head$(.$tail)+)),
            ..key!($kind, $head $(. $tail)+)
        }
    };
}

/// All keys, section by section.
pub(super) static KEYS: &[Key] = &[
    key!(Secret, broker.url),
    key!(Text, broker.url_file).optional(),
    live_key!(Scalar, broker.connect_timeout),
    live_key!(Scalar, broker.reconnect_backoff_max),
    key!(Scalar, broker.tls.enabled).optional(),
    key!(Text, broker.tls.ca_file).optional(),
    key!(Text, broker.tls.cert_file).optional(),
    key!(Text, broker.tls.key_file).optional(),
    key!(Scalar, broker.tls.check_hostname),
    key!(Scalar, broker.tls.insecure_skip_verify),
    key!(Scalar, broker.amqp.heartbeat),
    key!(Text, broker.amqp.queue).optional(),
    key!(Scalar, broker.amqp.message_ttl).optional(),
    key!(Scalar, broker.amqp.queue_expires).optional().format(|config| config.broker.amqp.effective_expires().format()),
    key!(Scalar, broker.amqp.queue_max_bytes).format(|config| size(config.broker.amqp.queue_max_bytes)),
    key!(Scalar, broker.amqp.prefetch_count)
        .optional()
        .format(|config| config.broker.amqp.effective_prefetch_count().format()),
    key!(Text, broker.redis.global_keyprefix),
    key!(Text, broker.redis.fanout_prefix),
    key!(Scalar, broker.redis.fanout_patterns),
    key!(Text, broker.redis.master_name).optional(),
    key!(Text, broker.redis.sentinel_username).optional(),
    key!(Secret, broker.redis.sentinel_password).optional(),
    key!(Scalar, broker.redis.sentinel_fanout_compat),
    live_key!(Scalar, events.enable_events),
    live_key!(Scalar, events.enable_interval),
    key!(Text, events.exchange),
    key!(Text, events.control_exchange),
    key!(Strings, events.hostnames).optional(),
    key!(Scalar, events.buffer_max_bytes).format(|config| size(config.events.buffer_max_bytes as u64)),
    key!(Scalar, events.message_max_bytes).format(|config| size(config.events.message_max_bytes as u64)),
    key!(Scalar, state.max_workers),
    key!(Scalar, state.max_tasks),
    live_key!(Scalar, state.worker_timeout).format(|config| zero_if_none(config.state.worker_timeout)),
    live_key!(Scalar, state.purge_offline_workers).format(|config| zero_if_none(config.state.purge_offline_workers)),
    key!(Scalar, state.persistent),
    key!(Text, state.db),
    key!(Scalar, state.state_save_interval).format(|config| zero_if_none(config.state.state_save_interval)),
    key!(Numbers, metrics.task_runtime_metric_buckets),
    key!(Scalar, metrics.max_label_sets),
    key!(Scalar, metrics.self_metrics),
    key!(Text, http.listen),
    key!(Scalar, http.max_connections),
    live_key!(Scalar, http.request_timeout),
    live_key!(Scalar, http.idle_timeout),
    live_key!(Text, log.level),
    key!(Text, log.format),
];

/// Finds a key by its full name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The names of the keys and sections in `section`, or in its nearest existing parent.
pub(super) fn children(section: &str) -> Vec<&'static str> {
    let child = |key: &Key| {
        let rest = match section {
            "" => key.name,
            _ => key.name.strip_prefix(section)?.strip_prefix('.')?,
        };
        rest.split('.').next()
    };
    let mut names: Vec<_> = KEYS.iter().filter_map(child).collect();
    names.dedup();
    match section.rsplit_once('.') {
        _ if !names.is_empty() => names,
        Some((parent, _)) => children(parent),
        None => children(""),
    }
}

/// Whether `name` is a section.
pub(super) fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

/// Formats a TOML string.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[expect(clippy::unnecessary_wraps, reason = "the return type of `Key::format`")]
fn size(bytes: u64) -> Option<String> {
    Some(quoted(&format_size(bytes)))
}

/// Formats a duration where 0 means never.
fn zero_if_none(duration: Option<Duration>) -> Option<String> {
    duration.format().or_else(|| Some("0".to_owned()))
}

/// Formats a value as TOML. `None` if it is unset.
trait FormatToml {
    fn format(&self) -> Option<String>;
}

impl<T: FormatToml> FormatToml for Option<T> {
    fn format(&self) -> Option<String> {
        self.as_ref().and_then(FormatToml::format)
    }
}

macro_rules! format_toml {
    ($($type:ty: |$value:ident| $text:expr;)+) => {
        $(impl FormatToml for $type {
            fn format(&self) -> Option<String> {
                let $value = self;
                Some($text)
            }
        })+
    };
}

format_toml! {
    bool: |flag| flag.to_string();
    u16: |number| number.to_string();
    u64: |number| number.to_string();
    usize: |number| number.to_string();
    Vec<f64>: |numbers| format!("{numbers:?}");
    String: |text| quoted(printable(text));
    PathBuf: |path| quoted(printable(&path.to_string_lossy()));
    Secret: |secret| quoted(&secret.to_string());
    Duration: |duration| quoted(&humantime::format_duration(*duration).to_string());
    BrokerUrls: |urls| quoted(&urls.to_string());
    SocketAddr: |address| quoted(&address.to_string());
    Level: |level| quoted(&level.to_string());
    LogFormat: |format| quoted(&format.to_string());
    Hostnames: |globs| {
        let globs: Vec<_> = globs.patterns().iter().map(|glob| quoted(printable(glob))).collect();
        format!("[{}]", globs.join(", "))
    };
    FanoutPrefix: |prefix| match prefix {
        FanoutPrefix::On => "true".to_owned(),
        FanoutPrefix::Off => "false".to_owned(),
        FanoutPrefix::Custom(text) => quoted(printable(text)),
    };
}
