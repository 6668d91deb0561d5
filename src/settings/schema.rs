//! Every key, once: what its text in the environment means, whether it changes live, how it is shown.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::value::{FanoutPrefix, Hostnames, Level, LogFormat, Secret, format_size, printable};
use super::{BrokerUrls, Settings};

/// How text from the environment is read, and whether a value may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Raw text: a password `0123` keeps its zero.
    Text,
    /// Raw text that is never printed.
    Secret,
    /// A boolean, a number, or text with a unit.
    Scalar,
    /// Texts, comma-separated or as a TOML array.
    Texts,
    /// Numbers, likewise.
    Numbers,
}

/// One key, named `section.key`.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Its default is to be absent.
    pub(super) optional: bool,
    /// How a reload changes it; any other needs a restart.
    pub(super) adopt: Option<fn(&mut Settings, &Settings)>,
    /// The value as TOML, secrets masked; `None` when unset.
    pub(super) shown: fn(&Settings) -> Option<String>,
    pub(super) same: fn(&Settings, &Settings) -> bool,
}

impl Key {
    const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    const fn shown(mut self, shown: fn(&Settings) -> Option<String>) -> Self {
        self.shown = shown;
        self
    }

    /// `state.max_tasks` is in `state`.
    pub(super) fn section(&self) -> &'static str {
        self.name.rsplit_once('.').map_or("", |(section, _)| section)
    }
}

macro_rules! key {
    ($kind:ident, $head:ident $(. $tail:ident)+) => {
        Key {
            name: concat!(stringify!($head) $(, ".", stringify!($tail))+),
            kind: Kind::$kind,
            optional: false,
            adopt: None,
            shown: |settings| settings.$head$(.$tail)+.shown(),
            same: |a, b| a.$head$(.$tail)+ == b.$head$(.$tail)+,
        }
    };
}

/// A key that a reload changes.
macro_rules! live {
    ($kind:ident, $head:ident $(. $tail:ident)+) => {
        Key {
            adopt: Some(|old, new| old.$head$(.$tail)+.clone_from(&new.$head$(.$tail)+)),
            ..key!($kind, $head $(. $tail)+)
        }
    };
}

/// All keys, section by section.
pub(super) static KEYS: &[Key] = &[
    key!(Secret, broker.url),
    key!(Text, broker.url_file).optional(),
    live!(Scalar, broker.connect_timeout),
    live!(Scalar, broker.reconnect_max),
    key!(Scalar, broker.tls.enabled).optional(),
    key!(Text, broker.tls.ca_file).optional(),
    key!(Text, broker.tls.cert_file).optional(),
    key!(Text, broker.tls.key_file).optional(),
    key!(Scalar, broker.tls.check_hostname),
    key!(Scalar, broker.tls.insecure_skip_verify),
    key!(Scalar, broker.amqp.heartbeat),
    key!(Text, broker.amqp.queue).optional(),
    key!(Scalar, broker.amqp.queue_ttl).optional(),
    key!(Scalar, broker.amqp.queue_expires)
        .optional()
        .shown(|settings| settings.broker.amqp.effective_expires().shown()),
    key!(Scalar, broker.amqp.queue_max_bytes).shown(|settings| size(settings.broker.amqp.queue_max_bytes)),
    key!(Scalar, broker.amqp.prefetch).optional().shown(|settings| settings.broker.amqp.effective_prefetch().shown()),
    key!(Text, broker.redis.global_keyprefix),
    key!(Text, broker.redis.fanout_prefix),
    key!(Scalar, broker.redis.fanout_patterns),
    key!(Text, broker.redis.master_name).optional(),
    key!(Text, broker.redis.sentinel_username).optional(),
    key!(Secret, broker.redis.sentinel_password).optional(),
    key!(Scalar, broker.redis.sentinel_fanout_compat),
    live!(Scalar, events.enable_events),
    live!(Scalar, events.enable_interval),
    key!(Text, events.exchange),
    key!(Text, events.control_exchange),
    key!(Texts, events.hostnames).optional(),
    key!(Scalar, events.max_backlog).shown(|settings| size(settings.events.max_backlog as u64)),
    key!(Scalar, events.max_message).shown(|settings| size(settings.events.max_message as u64)),
    key!(Scalar, state.max_workers),
    key!(Scalar, state.max_tasks),
    live!(Scalar, state.worker_timeout).shown(|settings| never(settings.state.worker_timeout)),
    live!(Scalar, state.purge_offline_workers).shown(|settings| never(settings.state.purge_offline_workers)),
    key!(Scalar, state.persistent),
    key!(Text, state.db),
    key!(Scalar, state.state_save_interval),
    key!(Numbers, metrics.task_runtime_metric_buckets),
    key!(Scalar, metrics.max_label_pairs),
    key!(Scalar, metrics.self_metrics),
    key!(Text, http.listen),
    key!(Scalar, http.max_connections),
    live!(Scalar, http.request_timeout),
    live!(Scalar, http.idle_timeout),
    live!(Text, log.level),
    key!(Text, log.format),
];

/// The key of that name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The keys and sections within `section`, or in the nearest one around it that exists.
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
        Some((outer, _)) => children(outer),
        None => children(""),
    }
}

/// Whether it is the name of a table.
pub(super) fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

/// A TOML string.
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

#[expect(clippy::unnecessary_wraps, reason = "what a key's `shown` returns")]
fn size(bytes: u64) -> Option<String> {
    Some(quoted(&format_size(bytes)))
}

fn never(duration: Option<Duration>) -> Option<String> {
    duration.shown().or_else(|| Some("0".to_owned()))
}

/// A value as TOML text.
trait Shown {
    fn shown(&self) -> Option<String>;
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> Option<String> {
        self.as_ref().and_then(Shown::shown)
    }
}

macro_rules! shown {
    ($($type:ty: |$value:ident| $text:expr;)+) => {
        $(impl Shown for $type {
            fn shown(&self) -> Option<String> {
                let $value = self;
                Some($text)
            }
        })+
    };
}

shown! {
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
