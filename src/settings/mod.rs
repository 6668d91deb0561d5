//! What the operator decides: layers, checks, and secrets that cannot be printed.
//!
//! Later wins: built-in default, TOML file, environment, command line. [`load()`] reads them,
//! [`Settings`] is the checked result and [`Loaded::report`] says where each value came from.
//! A mistake is one [`Error`] of one line that names the source, the key and what is accepted.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

pub mod cli;
mod load;
mod schema;
#[cfg(test)]
mod tests;
pub mod url;
mod value;

#[doc(hidden)]
pub use load::load_from;
pub(crate) use load::masked;
pub use load::{Error, Loaded, ReloadPlan, load, reload};
pub use url::{BrokerUrl, BrokerUrls};
pub use value::{FanoutPrefix, Hostnames, Level, LogFormat, Secret};

use value::{
    Buckets, Count, Fanout, Globs, Listen, Name, Never, OneOf, Size, TEN_YEARS, Urls, WholeSeconds, Within, checked,
    optional,
};

/// Everything that can be set, checked; `Default` holds the built-in values.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where the events come from.
    pub broker: Broker,
    /// Which events are asked for and counted.
    pub events: Events,
    /// What is remembered, for how long and where.
    pub state: State,
    /// The shape of the series.
    pub metrics: Metrics,
    /// The scrape endpoint.
    pub http: Http,
    /// The exporter's own log.
    pub log: Log,
}

/// `[broker]`: the connection and what belongs to one transport only.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Broker {
    /// Brokers tried in turn, or the members of one Sentinel set.
    /// Use [`Broker::urls`], which heeds `url_file`.
    #[serde(deserialize_with = "checked::<Urls, _, _>")]
    pub url: BrokerUrls,
    /// A file that holds the URL instead, read again on every attempt. Wins over `url`.
    pub url_file: Option<PathBuf>,
    /// Time for one attempt to connect, from 1 ms.
    #[serde(deserialize_with = "checked::<Within<1, TEN_YEARS>, _, _>")]
    pub connect_timeout: Duration,
    /// Longest pause between two attempts, from 100 ms.
    #[serde(deserialize_with = "checked::<Within<100, TEN_YEARS>, _, _>")]
    pub reconnect_max: Duration,
    /// Encryption, on either transport.
    pub tls: Tls,
    /// `RabbitMQ` only.
    pub amqp: Amqp,
    /// Redis and Sentinel only.
    pub redis: Redis,
}

/// `[broker.tls]`; the URL's `ssl_*` parameters mean the same.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// `None`: as the URL says, by its scheme or an `ssl_*` parameter. `Some(true)` turns TLS on, for Sentinels and
    /// their master too.
    pub enabled: Option<bool>,
    /// PEM file of trusted roots; the system's when `None`.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the client certificate.
    pub cert_file: Option<PathBuf>,
    /// PEM file of the client certificate's key; that of the certificate when `None`.
    pub key_file: Option<PathBuf>,
    /// Whether the certificate must name the host in the URL.
    pub check_hostname: bool,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
}

/// `[broker.amqp]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Amqp {
    /// Whole seconds from 1 to 65535; a silent peer is given up after twice this.
    #[serde(deserialize_with = "checked::<WholeSeconds, _, _>")]
    pub heartbeat: Duration,
    /// `None`: an exclusive queue for this connection. A name: a durable queue, 1 to 248 bytes.
    #[serde(deserialize_with = "optional::<Name, _, _>")]
    pub queue: Option<String>,
    /// Age at which the broker drops an unread message, 1 ms to 30 days; `None` keeps it.
    #[serde(deserialize_with = "optional::<Within<1, MAX_EXPIRY>, _, _>")]
    pub queue_ttl: Option<Duration>,
    /// As set, 1 ms to 30 days; see [`Amqp::effective_expires`].
    #[serde(deserialize_with = "optional::<Within<1, MAX_EXPIRY>, _, _>")]
    pub queue_expires: Option<Duration>,
    /// `x-max-length-bytes` of our queue: bytes from 64 KiB to 1 TiB, oldest dropped first.
    #[serde(deserialize_with = "checked::<Size<{ 64 << 10 }, { 1 << 40 }>, _, _>")]
    pub queue_max_bytes: u64,
    /// As set, from 1 to 65535; see [`Amqp::effective_prefetch`].
    #[serde(deserialize_with = "optional::<Count<1, 65_535>, _, _>")]
    pub prefetch: Option<u16>,
}

/// 30 days in milliseconds: `RabbitMQ` takes TTL and expiry as milliseconds below 2^32.
const MAX_EXPIRY: u64 = 30 * 24 * 3_600_000;

/// `[broker.redis]`: kombu's transport options of the same names.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Redis {
    /// Put before every key and channel.
    pub global_keyprefix: String,
    /// What stands before a fanout channel's name.
    #[serde(deserialize_with = "checked::<Fanout, _, _>")]
    pub fanout_prefix: FanoutPrefix,
    /// Whether the routing key is part of a fanout channel's name.
    pub fanout_patterns: bool,
    /// The master that the Sentinels are asked for.
    pub master_name: Option<String>,
    /// User at the Sentinels themselves.
    pub sentinel_username: Option<String>,
    /// Password at the Sentinels themselves.
    pub sentinel_password: Option<Secret>,
    /// Listen and send also under the names that kombu before 5.4 has on Sentinel.
    pub sentinel_fanout_compat: bool,
}

/// `[events]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Events {
    /// Whether workers are told to send events; off, not one control message is sent.
    pub enable_events: bool,
    /// Time between two such broadcasts, from 100 ms.
    #[serde(deserialize_with = "checked::<Within<100, TEN_YEARS>, _, _>")]
    pub enable_interval: Duration,
    /// Celery's `event_exchange`, 1 to 248 bytes.
    #[serde(deserialize_with = "checked::<Name, _, _>")]
    pub exchange: String,
    /// Celery's `control_exchange`, 1 to 248 bytes: `.pidbox` is put behind it.
    #[serde(deserialize_with = "checked::<Name, _, _>")]
    pub control_exchange: String,
    /// Workers to count; `None` counts all.
    #[serde(deserialize_with = "optional::<Globs, _, _>")]
    pub hostnames: Option<Hostnames>,
    /// Bytes of messages in our queue, from 64 KiB to 1 TiB.
    #[serde(deserialize_with = "checked::<Size<{ 64 << 10 }, { 1 << 40 }>, _, _>")]
    pub max_backlog: usize,
    /// Bytes of the largest message that is decoded, from 1 KiB to 1 GiB.
    #[serde(deserialize_with = "checked::<Size<{ 1 << 10 }, { 1 << 30 }>, _, _>")]
    pub max_message: usize,
}

/// `[state]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Workers held in memory, from 1 to 1,000,000.
    #[serde(deserialize_with = "checked::<Count<1, 1_000_000>, _, _>")]
    pub max_workers: usize,
    /// Tasks held in memory, from 1 to 100,000,000.
    #[serde(deserialize_with = "checked::<Count<1, 100_000_000>, _, _>")]
    pub max_tasks: usize,
    /// Silence after which a worker is offline; `None` (written 0): never.
    #[serde(deserialize_with = "checked::<Never, _, _>")]
    pub worker_timeout: Option<Duration>,
    /// Silence after which a worker's series go; `None` (written 0): never.
    #[serde(deserialize_with = "checked::<Never, _, _>")]
    pub purge_offline_workers: Option<Duration>,
    /// Whether state outlives the process.
    pub persistent: bool,
    /// File of the store.
    pub db: PathBuf,
    /// Time between two compactions of the store, from 100 ms.
    #[serde(deserialize_with = "checked::<Within<100, TEN_YEARS>, _, _>")]
    pub state_save_interval: Duration,
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Upper bounds in seconds, 1 to 100 of them, ascending and finite: `+Inf` is implied.
    #[serde(deserialize_with = "checked::<Buckets, _, _>")]
    pub task_runtime_metric_buckets: Vec<f64>,
    /// (worker, task) pairs before `(other)`, from 1 to 10,000,000.
    #[serde(deserialize_with = "checked::<Count<1, 10_000_000>, _, _>")]
    pub max_label_pairs: usize,
    /// Whether the exporter's own metrics are shown too.
    pub self_metrics: bool,
}

/// `[http]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Where `/metrics` is served; port 0 lets the system choose.
    #[serde(deserialize_with = "checked::<Listen, _, _>")]
    pub listen: SocketAddr,
    /// Connections held at a time, from 1 to 10,000.
    #[serde(deserialize_with = "checked::<Count<1, 10_000>, _, _>")]
    pub max_connections: usize,
    /// Time for head and response, from 1 ms.
    #[serde(deserialize_with = "checked::<Within<1, TEN_YEARS>, _, _>")]
    pub request_timeout: Duration,
    /// How long a kept-alive connection may rest, from 1 ms.
    #[serde(deserialize_with = "checked::<Within<1, TEN_YEARS>, _, _>")]
    pub idle_timeout: Duration,
}

/// `[log]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The least severe level that is written.
    #[serde(deserialize_with = "checked::<OneOf, _, _>")]
    pub level: Level,
    /// How a line is written.
    #[serde(deserialize_with = "checked::<OneOf, _, _>")]
    pub format: LogFormat,
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            url: BrokerUrls::default(),
            url_file: None,
            connect_timeout: Duration::from_secs(5),
            reconnect_max: Duration::from_secs(5),
            tls: Tls::default(),
            amqp: Amqp::default(),
            redis: Redis::default(),
        }
    }
}

impl Broker {
    /// The URLs in force: what `url_file` holds at this moment (64 KiB at most), else `url`.
    ///
    /// # Errors
    /// When the file cannot be read or does not hold broker URLs; it is named, its content is not. When other settings
    /// contradict them.
    pub fn urls(&self) -> Result<BrokerUrls, Error> {
        let urls = match &self.url_file {
            Some(path) => load::read_urls(path)?,
            None => self.url.clone(),
        };
        load::check_urls(self, &urls)?;
        Ok(urls)
    }

    /// Whether the broker at `url` is spoken to by TLS.
    #[must_use]
    pub fn tls_for(&self, url: &BrokerUrl) -> bool {
        url.tls || self.tls.enabled == Some(true)
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            enabled: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            check_hostname: true,
            insecure_skip_verify: false,
        }
    }
}

impl Default for Amqp {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(10),
            queue: None,
            queue_ttl: None,
            queue_expires: None,
            queue_max_bytes: 256 << 20,
            prefetch: None,
        }
    }
}

impl Amqp {
    /// How long the queue outlives its consumer: as set, else 60 s, or 1 h for a named queue.
    #[must_use]
    pub fn effective_expires(&self) -> Duration {
        let default = if self.queue.is_some() { 3600 } else { 60 };
        self.queue_expires.unwrap_or(Duration::from_secs(default))
    }

    /// Messages unacknowledged at a time: as set, else 1,000, or 10,000 for a named queue.
    #[must_use]
    pub fn effective_prefetch(&self) -> u16 {
        let default = if self.queue.is_some() { 10_000 } else { 1000 };
        self.prefetch.unwrap_or(default)
    }
}

impl Default for Redis {
    fn default() -> Self {
        Self {
            global_keyprefix: String::new(),
            fanout_prefix: FanoutPrefix::On,
            fanout_patterns: true,
            master_name: None,
            sentinel_username: None,
            sentinel_password: None,
            sentinel_fanout_compat: false,
        }
    }
}

impl Default for Events {
    fn default() -> Self {
        Self {
            enable_events: true,
            enable_interval: Duration::from_secs(5),
            exchange: "celeryev".to_owned(),
            control_exchange: "celery".to_owned(),
            hostnames: None,
            max_backlog: 64 << 20,
            max_message: 16 << 20,
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            max_workers: 5000,
            max_tasks: 100_000,
            worker_timeout: Some(Duration::from_secs(60)),
            purge_offline_workers: Some(Duration::from_secs(2 * 3600)),
            persistent: false,
            db: PathBuf::from("/var/lib/flower-exporter/state"),
            state_save_interval: Duration::from_secs(30),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            task_runtime_metric_buckets: vec![
                0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
            ],
            max_label_pairs: 100_000,
            self_metrics: false,
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9555)),
            max_connections: 64,
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
        }
    }
}
