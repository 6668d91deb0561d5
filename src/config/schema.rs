//! The table of all keys: how each is parsed from the environment, formatted and reloaded.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::choice::{Level, LogFormat, LoginMethod};
use super::secret::{Secret, printable};
use super::types::{FanoutPrefix, Hostnames, format_size};
use super::worker_groups::WorkerGroups;
use super::{BrokerUrls, Config};

/// The prefix of the environment variables.
pub(super) const PREFIX: &str = "FLOWER_EXPORTER_";

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
    /// What the value means, in one sentence. The documents are generated from it.
    pub(super) description: &'static str,
    /// What the documents call the type.
    pub(super) type_name: &'static str,
    /// Whether the key is unset by default.
    pub(super) optional: bool,
    /// An example, as TOML, of a key that the example file does not set.
    pub(super) example: Option<&'static str>,
    /// Whether a reload applies a change. Otherwise, it requires a restart.
    pub(super) live: bool,
    /// Copies the value from the second configuration to the first.
    pub(super) copy: fn(&mut Config, &Config),
    /// Formats the value as TOML, with secrets masked. `None` if the key is unset.
    pub(super) format: fn(&Config) -> Option<String>,
    /// Whether the value is the same in both configurations.
    pub(super) eq: fn(&Config, &Config) -> bool,
}

impl Key {
    const fn optional(mut self, example: &'static str) -> Self {
        self.optional = true;
        self.example(example)
    }

    const fn example(mut self, example: &'static str) -> Self {
        self.example = Some(example);
        self
    }

    const fn live(mut self) -> Self {
        self.live = true;
        self
    }

    const fn size(mut self, format: fn(&Config) -> Option<String>) -> Self {
        self.type_name = "size";
        self.format(format)
    }

    const fn format(mut self, format: fn(&Config) -> Option<String>) -> Self {
        self.format = format;
        self
    }

    /// The environment variable that sets the key.
    pub(super) fn variable(&self) -> String {
        format!("{PREFIX}{}", self.name.replace('.', "__").to_uppercase())
    }

    /// The section: `state` for `state.max_tasks`.
    pub(super) fn section(&self) -> &'static str {
        self.name.rsplit_once('.').map_or("", |(section, _)| section)
    }
}

/// Defines `KEYS`, all keys, section by section: a description, the kind and the name of a key, and calls of methods.
macro_rules! keys {
    ($(
        $(#[doc = $description:literal])+
        $kind:ident $head:ident $(. $tail:ident)+ $(=> $($method:ident($($argument:expr)?)),+)?;
    )+) => {
        pub(super) static KEYS: &[Key] = &[$(
            Key {
                name: concat!(stringify!($head) $(, ".", stringify!($tail))+),
                kind: ValueKind::$kind,
                description: concat!($($description),+),
                type_name: type_name(|config| &config.$head$(.$tail)+),
                optional: false,
                example: None,
                live: false,
                copy: |to, from| to.$head$(.$tail)+.clone_from(&from.$head$(.$tail)+),
                format: |config| config.$head$(.$tail)+.format(),
                eq: |a, b| a.$head$(.$tail)+ == b.$head$(.$tail)+,
            }$($(.$method($($argument)?))+)?,
        )+];
    };
}

keys! {
    /// The broker's URL, as in Celery. Several, separated by `;` or as a list, are tried in turn or form one Sentinel
    /// set.
    Secret broker.url => example(r#""amqp://guest:guest@localhost:5672//""#);
    /// A file that contains the URL, for example a mounted secret. It is read again on every connection attempt.
    Text broker.url_file => optional(r#""/run/secrets/broker-url""#);
    /// Timeout of one connection attempt. Attempts repeat indefinitely, with a jittered backoff.
    Scalar broker.connect_timeout => live();
    /// The longest backoff between two connection attempts.
    Scalar broker.reconnect_backoff_max => live();
    /// Whether connections use TLS. Unset: `amqps://`, `rediss://`, `ssl` and an `ssl_` parameter turn it on. It does
    /// not change the port.
    Scalar broker.tls.enabled => optional("true");
    /// PEM file with the trusted root certificates. Unset: the system's roots are trusted.
    Text broker.tls.ca_file => optional(r#""/etc/ssl/broker-ca.pem""#);
    /// PEM file with the client certificate.
    Text broker.tls.cert_file => optional(r#""/etc/ssl/exporter.pem""#);
    /// PEM file with the client certificate's key. Unset: the key is in `cert_file`.
    Text broker.tls.key_file => optional(r#""/etc/ssl/exporter.key""#);
    /// Whether the broker's certificate must be for the host in the URL.
    Scalar broker.tls.check_hostname;
    /// Disables the verification of the broker's certificate: anyone can impersonate the broker.
    Scalar broker.tls.insecure_skip_verify;
    /// The heartbeat interval in whole seconds. The connection is closed if the broker sends nothing for twice this
    /// long.
    Scalar broker.amqp.heartbeat;
    /// How to log in, as Celery's `broker_login_method`: `PLAIN`, `AMQPLAIN`, or `EXTERNAL` for the client certificate.
    Text broker.amqp.login_method;
    /// The name of a durable queue that keeps collecting while the exporter is down. Unset: the queue ends with the
    /// connection.
    Text broker.amqp.queue => optional(r#""flower-exporter""#);
    /// The age at which RabbitMQ drops an unread message. Unset: it keeps them.
    Scalar broker.amqp.message_ttl => optional(r#""1h""#);
    /// RabbitMQ deletes a named queue after this long without a consumer. Unset: 1 h. A queue without a name ends
    /// with its connection.
    Scalar broker.amqp.queue_expires => optional(r#""60s""#), format(|config| config.broker.amqp.effective_expires().format());
    /// The limit of the bytes in the queue (x-max-length-bytes). Beyond it, RabbitMQ drops the oldest messages.
    Scalar broker.amqp.queue_max_bytes => size(|config| size(config.broker.amqp.queue_max_bytes));
    /// The maximum number of unacknowledged messages, at least 2. Unset: 1000, or 10000 for a named queue.
    Scalar broker.amqp.prefetch_count => optional("1000"), format(|config| config.broker.amqp.effective_prefetch_count().format());
    /// The prefix of all keys and channels. It must equal Celery's `broker_transport_options`.
    Text broker.redis.global_keyprefix;
    /// The prefix of channels, `true` for `/{db}.`. It must equal Celery's `broker_transport_options`.
    Text broker.redis.fanout_prefix;
    /// Whether channel names contain the routing key. It must equal Celery's `broker_transport_options`.
    Scalar broker.redis.fanout_patterns;
    /// The name of the master in the Sentinels' configuration, which a `sentinel://` URL requires.
    Text broker.redis.master_name => optional(r#""mymaster""#);
    /// The user name for the Sentinels themselves.
    Text broker.redis.sentinel_username => optional(r#""exporter""#);
    /// The password for the Sentinels themselves.
    Secret broker.redis.sentinel_password => optional(r#""secret""#);
    /// Whether to also use the channel names of kombu before 5.4, like kombu's option of this name.
    Scalar broker.redis.sentinel_fanout_compat;
    /// Whether to broadcast `enable_events` to workers. If false, the exporter sends no control message at all.
    Scalar events.enable_events => live();
    /// Time between two broadcasts.
    Scalar events.enable_interval => live();
    /// Celery's `event_exchange`.
    Text events.exchange;
    /// Celery's `control_exchange`.
    Text events.control_exchange;
    /// Globs of the worker hostnames to count. Unset: all workers are counted.
    Strings events.hostnames => optional(r#"["*@my-pod"]"#);
    /// The limit of the exporter's buffer. Beyond it, messages stay in RabbitMQ's queue, and messages from Redis are
    /// dropped and counted.
    Scalar events.buffer_max_bytes => size(|config| size(config.events.buffer_max_bytes as u64));
    /// Larger messages are skipped and counted.
    Scalar events.message_max_bytes => size(|config| size(config.events.message_max_bytes as u64));
    /// The maximum number of hostnames in memory, both workers and clients.
    Scalar state.max_workers;
    /// The maximum number of tasks in memory. Finished tasks are evicted first.
    Scalar state.max_tasks;
    /// A worker is offline if the exporter receives nothing from it for this long. 0: never.
    Scalar state.worker_timeout => live(), format(|config| zero_if_none(config.state.worker_timeout));
    /// The series of a worker are removed if the exporter receives nothing from it for this long. 0: never.
    Scalar state.purge_offline_workers => live(), format(|config| zero_if_none(config.state.purge_offline_workers));
    /// The same for a worker that stopped on purpose, so that it sent `worker-offline`. Unset: as
    /// `purge_offline_workers`. Where each start has a new hostname, use a short time: at least two scrapes.
    Scalar state.purge_stopped_workers => live(), optional(r#""2m""#);
    /// Whether workers, tasks and metrics survive a restart. Without a named queue, `flower_worker_prefetched_tasks`
    /// starts again at 0.
    Scalar state.persistent;
    /// The file of the saved state.
    Text state.db;
    /// Time between two saves. 0: only at shutdown and on SIGUSR1. A bare number above 3600 is refused: Flower's
    /// setting is in milliseconds.
    Scalar state.state_save_interval => format(|config| zero_if_none(config.state.state_save_interval));
    /// The upper limits of the runtime histogram's buckets in seconds, in ascending order, without `+Inf`.
    Numbers metrics.task_runtime_metric_buckets;
    /// The maximum number of (worker, task) label sets. Further ones are counted under task `(other)`.
    Scalar metrics.max_label_sets;
    /// Whether `/metrics` also contains the exporter's own metrics.
    Scalar metrics.self_metrics;
    /// How long a new counter or histogram shows 0 first, so that `increase()` sees its first events. Twice the scrape
    /// interval is the right value.
    Scalar metrics.zero_first => format(|config| duration_or_zero(config.metrics.zero_first));
    /// Whether `/metrics` contains the `_created` samples of Flower's Python client.
    Scalar metrics.created;
    /// Adds a native histogram of the runtimes, whose buckets grow by at most this factor. Only protobuf contains it.
    Scalar metrics.native_histogram_bucket_factor => optional("1.1");
    /// Whether OpenMetrics and protobuf contain the id of a task for each bucket of the runtimes, and for failures.
    Scalar metrics.exemplars;
    /// Groups of workers, `NAME=GLOB|GLOB`. Tasks are counted under the first group that the hostname matches, so that
    /// fewer series exist. Unset: under the hostname.
    Strings metrics.worker_groups => optional(r#"["web=celery@web-*|celery@api-*", "clients=gen*@*"]"#);
    /// The address of `/metrics` and `/healthz`.
    Text http.listen;
    /// A web configuration file in the format of Prometheus' exporter-toolkit, for TLS and passwords. It is read again
    /// when it changes.
    Text http.web_config_file => optional(r#""/etc/flower-exporter/web-config.yml""#);
    /// The maximum number of connections. At this limit, the one that has waited longest without a complete request
    /// is closed.
    Scalar http.max_connections;
    /// Timeout for the head of a request, and for the response.
    Scalar http.request_timeout => live();
    /// How long a keep-alive connection may be idle. Use a value above the scrape interval.
    Scalar http.idle_timeout => live();
    /// The least severe level that is logged: `error`, `warn`, `info`, `debug` or `trace`.
    Text log.level => live();
    /// The format of log lines: `text`, with fields as in logfmt, or `json`.
    Text log.format;
}

/// One setting, as the documents describe it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Setting {
    /// The full name: `state.max_tasks`.
    pub key: &'static str,
    /// The environment variable that sets it.
    pub variable: String,
    /// The type: `duration`, `size`, `boolean`, …
    pub type_name: &'static str,
    /// The default as TOML. `None`: unset by default.
    pub default: Option<String>,
    /// A value as TOML, for keys that the example file does not set.
    pub example: Option<&'static str>,
    /// Whether a reload applies a change. Otherwise, it requires a restart.
    pub live: bool,
    /// What the value means, in one sentence with backticks around code.
    pub description: &'static str,
}

/// All settings, section by section, for programs that generate documents.
pub fn settings() -> impl Iterator<Item = Setting> {
    let defaults = Config::default();
    KEYS.iter().map(move |key| Setting {
        key: key.name,
        variable: key.variable(),
        type_name: key.type_name,
        default: Some(&defaults).filter(|_| !key.optional).and_then(key.format),
        example: key.example,
        live: key.live,
        description: key.description.trim_start(),
    })
}

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

fn quoted_list(texts: &[String]) -> String {
    let texts: Vec<_> = texts.iter().map(|text| quoted(printable(text))).collect();
    format!("[{}]", texts.join(", "))
}

#[expect(clippy::unnecessary_wraps, reason = "the return type of `Key::format`")]
fn size(bytes: u64) -> Option<String> {
    Some(quoted(&format_size(bytes)))
}

/// Formats a duration that may be 0.
#[expect(clippy::unnecessary_wraps, reason = "the return type of `Key::format`")]
fn duration_or_zero(duration: Duration) -> Option<String> {
    Some(if duration.is_zero() { "0".to_owned() } else { quoted(&humantime::format_duration(duration).to_string()) })
}

/// Formats a duration where 0 means never.
fn zero_if_none(duration: Option<Duration>) -> Option<String> {
    duration.format().or_else(|| Some("0".to_owned()))
}

/// Formats a value as TOML. `None` if it is unset.
trait FormatToml {
    /// What the documents call the type.
    const TYPE: &'static str;

    fn format(&self) -> Option<String>;
}

const fn type_name<T: FormatToml>(_: fn(&Config) -> &T) -> &'static str {
    T::TYPE
}

impl<T: FormatToml> FormatToml for Option<T> {
    const TYPE: &'static str = T::TYPE;

    fn format(&self) -> Option<String> {
        self.as_ref().and_then(FormatToml::format)
    }
}

macro_rules! format_toml {
    ($($type:ty, $name:literal: |$value:ident| $text:expr;)+) => {
        $(impl FormatToml for $type {
            const TYPE: &'static str = $name;

            fn format(&self) -> Option<String> {
                let $value = self;
                Some($text)
            }
        })+
    };
}

format_toml! {
    bool, "boolean": |flag| flag.to_string();
    u16, "integer": |number| number.to_string();
    u64, "integer": |number| number.to_string();
    usize, "integer": |number| number.to_string();
    f64, "number": |number| number.to_string();
    Vec<f64>, "list of numbers": |numbers| format!("{numbers:?}");
    String, "string": |text| quoted(printable(text));
    PathBuf, "path": |path| quoted(printable(&path.to_string_lossy()));
    Secret, "string": |secret| quoted(&secret.to_string());
    Duration, "duration": |duration| quoted(&humantime::format_duration(*duration).to_string());
    BrokerUrls, "URL": |urls| quoted(&urls.to_string());
    SocketAddr, "address": |address| quoted(&address.to_string());
    Level, "string": |level| quoted(&level.to_string());
    LogFormat, "string": |format| quoted(&format.to_string());
    LoginMethod, "string": |method| quoted(&method.to_string());
    Hostnames, "list of strings": |globs| quoted_list(globs.patterns());
    WorkerGroups, "list of strings": |groups| quoted_list(groups.entries());
    FanoutPrefix, "boolean or string": |prefix| match prefix {
        FanoutPrefix::On => "true".to_owned(),
        FanoutPrefix::Off => "false".to_owned(),
        FanoutPrefix::Custom(text) => quoted(printable(text)),
    };
}
