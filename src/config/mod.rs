//! The configuration: layered sources, validation, and secrets that cannot be printed. Only [`load()`] and its
//! variants,
//! [`Config::validate`] and [`BrokerConfig::urls`] do I/O: they block while they read a file. Nothing here logs.
//!
//! [`load()`] merges the sources, [`Config`] is the validated result, and [`LoadedConfig::report`] shows the source of
//! each value. The first invalid value is returned as a [`ConfigError`], whose text is one line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

pub mod broker_url;
mod choice;
mod defaults;
mod environment;
mod error;
mod layer;
mod limits;
mod load;
mod reload;
mod schema;
mod secret;
#[cfg(test)]
mod tests;
mod types;
mod validate;
mod worker_groups;

use broker_url::Transport;
pub use broker_url::{BrokerUrl, BrokerUrls};
pub use choice::{Level, LogFormat, LoginMethod};
pub use error::ConfigError;
#[doc(hidden)]
pub use load::load_from;
#[cfg(feature = "cli")]
pub(crate) use load::load_probe;
pub(crate) use load::printable_path;
pub use load::{LoadedConfig, Overrides, load};
pub use reload::{ReloadReport, plan_reload};
pub use schema::{Setting, settings};
pub use secret::Secret;
pub(crate) use secret::printable;
pub use types::{FanoutPrefix, Hostnames};
pub use worker_groups::WorkerGroups;

use limits::TEN_YEARS;
use types::{
    Buckets, Count, DurationRange, DurationSecs, Factor, Fanout, Globs, Listen, Name, OneOf, SaveInterval, Size, Urls,
    ZeroIsNever, checked, optional,
};
use worker_groups::Groups;

/// The validated configuration. `Default` has the built-in defaults.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// The connection to the broker.
    pub broker: BrokerConfig,
    /// The events that workers are asked to send and that are counted.
    pub events: EventsConfig,
    /// The limits, timeouts and storage of the state.
    pub state: StateConfig,
    /// The buckets, label sets and self-metrics.
    pub metrics: MetricsConfig,
    /// The HTTP server.
    pub http: HttpConfig,
    /// The exporter's log.
    pub log: LogConfig,
}

/// `[broker]`: the connection, and options of each transport.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct BrokerConfig {
    /// Brokers that are tried in turn, or the members of one Sentinel set. Use [`BrokerConfig::urls`], which takes
    /// `url_file` into account.
    #[serde(deserialize_with = "checked::<Urls, _, _>")]
    pub url: BrokerUrls,
    /// A file that contains the URLs. It takes precedence over `url` and is read again on every connection attempt.
    pub url_file: Option<PathBuf>,
    /// Timeout of one connection attempt, from 1 ms to 10 years.
    #[serde(deserialize_with = "checked::<DurationRange<1, TEN_YEARS>, _, _>")]
    pub connect_timeout: Duration,
    /// Longest delay between two connection attempts, from 100 ms to 10 years.
    #[serde(deserialize_with = "checked::<DurationRange<100, TEN_YEARS>, _, _>")]
    pub reconnect_backoff_max: Duration,
    /// Options of TLS, on either transport.
    pub tls: BrokerTlsConfig,
    /// Options of `RabbitMQ`.
    pub amqp: AmqpConfig,
    /// Options of Redis and Sentinel.
    pub redis: RedisConfig,
}

/// `[broker.tls]`. The URL's `ssl_*` parameters have the same meaning and take precedence.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct BrokerTlsConfig {
    /// `None`: the URL's scheme or an `ssl_*` parameter turns TLS on. `Some(true)`: TLS is on, both to Sentinels and to
    /// their master. `Some(false)`: a URL that requires TLS is an error.
    pub enabled: Option<bool>,
    /// PEM file with trusted root certificates. `None`: the system's roots.
    pub ca_file: Option<PathBuf>,
    /// PEM file with the client certificate.
    pub cert_file: Option<PathBuf>,
    /// PEM file with the client certificate's key. `None`: the key is in `cert_file`.
    pub key_file: Option<PathBuf>,
    /// Whether the server's certificate must name the host in the URL.
    pub check_hostname: bool,
    /// Whether any server certificate is accepted.
    pub insecure_skip_verify: bool,
}

/// `[broker.amqp]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct AmqpConfig {
    /// The heartbeat interval, in whole seconds from 1 to 65535. The connection is closed if nothing is received for
    /// twice this time.
    #[serde(deserialize_with = "checked::<DurationSecs, _, _>")]
    pub heartbeat: Duration,
    /// How to log in. The URL's `login_method` takes precedence.
    #[serde(deserialize_with = "checked::<OneOf, _, _>")]
    pub login_method: LoginMethod,
    /// The name of a durable queue, from 1 to 218 bytes. `None`: an exclusive queue that is deleted with the
    /// connection.
    #[serde(deserialize_with = "optional::<Name, _, _>")]
    pub queue: Option<String>,
    /// `x-message-ttl`, from 1 ms to 30 days: the age at which the broker drops an unread message. `None`: no limit.
    #[serde(deserialize_with = "optional::<DurationRange<1, MAX_EXPIRY>, _, _>")]
    pub message_ttl: Option<Duration>,
    /// `x-expires` as configured, from 1 ms to 30 days. See [`AmqpConfig::effective_expires`].
    #[serde(deserialize_with = "optional::<DurationRange<1, MAX_EXPIRY>, _, _>")]
    pub queue_expires: Option<Duration>,
    /// `x-max-length-bytes` of the exporter's queue, from 64 KiB to 1 TiB. The broker drops the oldest messages first.
    #[serde(deserialize_with = "checked::<Size<{ 64 << 10 }, { 1 << 40 }>, _, _>")]
    pub queue_max_bytes: u64,
    /// The prefetch count as configured, from 2 to 65535. See [`AmqpConfig::effective_prefetch_count`].
    #[serde(deserialize_with = "optional::<Count<2, 65_535>, _, _>")]
    pub prefetch_count: Option<u16>,
}

/// 30 days in milliseconds. `RabbitMQ` requires TTL and expiry in milliseconds to be below 2^32.
const MAX_EXPIRY: u64 = 30 * 24 * 3_600_000;

/// `[broker.redis]`. The names are those of kombu's transport options.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RedisConfig {
    /// The prefix of every key and channel.
    pub global_keyprefix: String,
    /// The prefix of fanout channels.
    #[serde(deserialize_with = "checked::<Fanout, _, _>")]
    pub fanout_prefix: FanoutPrefix,
    /// Whether a fanout channel's name includes the routing key.
    pub fanout_patterns: bool,
    /// The name of the master in the Sentinels' configuration. Required for `sentinel://` URLs.
    pub master_name: Option<String>,
    /// User name for the Sentinels, as opposed to the master.
    pub sentinel_username: Option<String>,
    /// Password for the Sentinels, as opposed to the master.
    pub sentinel_password: Option<Secret>,
    /// Whether to subscribe and publish also to the channels that kombu before 5.4 uses with Sentinel.
    pub sentinel_fanout_compat: bool,
}

/// `[events]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EventsConfig {
    /// Whether to broadcast `enable_events` to the workers. If false, the exporter sends no control message at all.
    pub enable_events: bool,
    /// Time between two such broadcasts, from 100 ms to 10 years.
    #[serde(deserialize_with = "checked::<DurationRange<100, TEN_YEARS>, _, _>")]
    pub enable_interval: Duration,
    /// Celery's `event_exchange`, from 1 to 218 bytes.
    #[serde(deserialize_with = "checked::<Name, _, _>")]
    pub exchange: String,
    /// Celery's `control_exchange`, from 1 to 218 bytes. The exporter appends `.pidbox`.
    #[serde(deserialize_with = "checked::<Name, _, _>")]
    pub control_exchange: String,
    /// The workers whose events are counted. `None`: all workers.
    #[serde(deserialize_with = "optional::<Globs, _, _>")]
    pub hostnames: Option<Hostnames>,
    /// Capacity of the buffer for received messages in bytes, from 64 KiB to 1 TiB.
    #[serde(deserialize_with = "checked::<Size<{ 64 << 10 }, { 1 << 40 }>, _, _>")]
    pub buffer_max_bytes: usize,
    /// Size of the largest message that is decoded in bytes, from 1 KiB to 1 GiB.
    #[serde(deserialize_with = "checked::<Size<{ 1 << 10 }, { 1 << 30 }>, _, _>")]
    pub message_max_bytes: usize,
}

/// `[state]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct StateConfig {
    /// The maximum number of workers in memory, from 1 to 1,000,000.
    #[serde(deserialize_with = "checked::<Count<1, 1_000_000>, _, _>")]
    pub max_workers: usize,
    /// The maximum number of tasks in memory, from 1 to 100,000,000.
    #[serde(deserialize_with = "checked::<Count<1, 100_000_000>, _, _>")]
    pub max_tasks: usize,
    /// Time without an event after which a worker is offline, up to 10 years. `None` (configured as 0): never.
    #[serde(deserialize_with = "checked::<ZeroIsNever, _, _>")]
    pub worker_timeout: Option<Duration>,
    /// Time without an event after which a worker's series are removed, up to 10 years. `None` (configured as 0):
    /// never.
    #[serde(deserialize_with = "checked::<ZeroIsNever, _, _>")]
    pub purge_offline_workers: Option<Duration>,
    /// The same for a worker that sent `worker-offline`, from 1 ms to 10 years. Unset: as `purge_offline_workers`.
    #[serde(deserialize_with = "optional::<DurationRange<1, TEN_YEARS>, _, _>")]
    pub purge_stopped_workers: Option<Duration>,
    /// Whether the state is saved and survives a restart.
    pub persistent: bool,
    /// The file of the saved state.
    pub db: PathBuf,
    /// Time between two saves, up to 10 years, or up to 3600 if configured as a number of seconds. `None` (configured
    /// as 0): the state is saved only at shutdown and on request.
    #[serde(deserialize_with = "checked::<SaveInterval, _, _>")]
    pub state_save_interval: Option<Duration>,
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MetricsConfig {
    /// Upper bounds of the runtime histogram in seconds: from 1 to 100 finite numbers in ascending order, without
    /// `+Inf`.
    #[serde(deserialize_with = "checked::<Buckets, _, _>")]
    pub task_runtime_metric_buckets: Vec<f64>,
    /// The maximum number of (worker, task) label sets, from 1 to 10,000,000. Further ones are counted as task
    /// `(other)`.
    #[serde(deserialize_with = "checked::<Count<1, 10_000_000>, _, _>")]
    pub max_label_sets: usize,
    /// Whether `/metrics` includes the exporter's own metrics.
    pub self_metrics: bool,
    /// How long a new counter or histogram shows 0 before it shows its value, up to 1 hour. 0: it shows its value at
    /// once.
    #[serde(deserialize_with = "checked::<DurationRange<0, 3_600_000>, _, _>")]
    pub zero_first: Duration,
    /// Whether `/metrics` includes the `_created` samples of Python's client.
    pub created: bool,
    /// Groups of workers whose tasks are counted under the group's name. Unset: each worker's are counted under its own.
    #[serde(deserialize_with = "optional::<Groups, _, _>")]
    pub worker_groups: Option<WorkerGroups>,
    /// The growth from one bucket of native histograms to the next, above 1. Unset: there are none.
    #[serde(deserialize_with = "optional::<Factor, _, _>")]
    pub native_histogram_bucket_factor: Option<f64>,
    /// Whether samples have exemplars with the task id.
    pub exemplars: bool,
}

/// `[http]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct HttpConfig {
    /// A web configuration file of Prometheus' exporter-toolkit, for TLS and passwords. Unset: plain HTTP, open to all.
    pub web_config_file: Option<PathBuf>,
    /// The address to listen on. With port 0, the operating system chooses the port.
    #[serde(deserialize_with = "checked::<Listen, _, _>")]
    pub listen: SocketAddr,
    /// The maximum number of open connections, from 1 to 10,000.
    #[serde(deserialize_with = "checked::<Count<1, 10_000>, _, _>")]
    pub max_connections: usize,
    /// Timeout of each phase of a request (head, response, flush), from 1 ms to 10 years.
    #[serde(deserialize_with = "checked::<DurationRange<1, TEN_YEARS>, _, _>")]
    pub request_timeout: Duration,
    /// Time after which an idle keep-alive connection is closed, from 1 ms to 10 years.
    #[serde(deserialize_with = "checked::<DurationRange<1, TEN_YEARS>, _, _>")]
    pub idle_timeout: Duration,
}

/// `[log]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LogConfig {
    /// The least severe level that is logged.
    #[serde(deserialize_with = "checked::<OneOf, _, _>")]
    pub level: Level,
    /// The format of a log line.
    #[serde(deserialize_with = "checked::<OneOf, _, _>")]
    pub format: LogFormat,
}

impl Config {
    /// The configuration for connections to `url`, whose parameters take precedence.
    #[must_use]
    pub fn for_url(&self, url: &BrokerUrl) -> Self {
        let mut config = self.clone();
        config.broker.connect_timeout = self.broker.connect_timeout_for(url);
        let amqp = &mut config.broker.amqp;
        amqp.heartbeat = url.heartbeat.unwrap_or(amqp.heartbeat);
        amqp.login_method = url.login_method.unwrap_or(amqp.login_method);
        amqp.queue = amqp.queue.take().filter(|_| url.transport == Transport::Amqp);
        config
    }
}

impl StateConfig {
    /// Time without an event after which the series of a worker that sent `worker-offline` are removed. `None`: never.
    #[must_use]
    pub fn effective_purge_stopped(&self) -> Option<Duration> {
        self.purge_stopped_workers.or(self.purge_offline_workers)
    }
}

impl BrokerConfig {
    /// The URLs in force: the current content of `url_file` (at most 64 KiB) if it is set, otherwise `url`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or does not contain broker URLs, or if other settings contradict the
    /// URLs. The error names the file but does not contain its content.
    pub fn urls(&self) -> Result<BrokerUrls, ConfigError> {
        let urls = match &self.url_file {
            Some(path) => load::read_urls(path)?,
            None => self.url.clone(),
        };
        validate::validate_urls(self, &urls)?;
        Ok(urls)
    }

    /// The timeout of a connection attempt to `url`.
    #[must_use]
    pub fn connect_timeout_for(&self, url: &BrokerUrl) -> Duration {
        url.connect_timeout.unwrap_or(self.connect_timeout)
    }

    /// Whether connections to `url` use TLS.
    #[must_use]
    pub fn tls_for(&self, url: &BrokerUrl) -> bool {
        url.tls || self.tls.enabled == Some(true)
    }
}

impl AmqpConfig {
    /// How long the queue exists without a consumer: `queue_expires` if set, otherwise 60 s, or 1 h for a named queue.
    #[must_use]
    pub fn effective_expires(&self) -> Duration {
        let default = if self.queue.is_some() { 3600 } else { 60 };
        self.queue_expires.unwrap_or(Duration::from_secs(default))
    }

    /// The maximum number of unacknowledged messages: `prefetch_count` if set, otherwise 1,000, or 10,000 for a named
    /// queue.
    #[must_use]
    pub fn effective_prefetch_count(&self) -> u16 {
        let default = if self.queue.is_some() { 10_000 } else { 1000 };
        self.prefetch_count.unwrap_or(default)
    }
}
