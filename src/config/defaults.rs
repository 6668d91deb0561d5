//! The built-in default of every key.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::broker_url::BrokerUrls;
use super::{
    AmqpConfig, BrokerConfig, BrokerTlsConfig, EventsConfig, FanoutPrefix, HttpConfig, LoginMethod, MetricsConfig,
    RedisConfig, StateConfig,
};

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            url: BrokerUrls::default(),
            url_file: None,
            connect_timeout: Duration::from_secs(5),
            reconnect_backoff_max: Duration::from_secs(5),
            tls: BrokerTlsConfig::default(),
            amqp: AmqpConfig::default(),
            redis: RedisConfig::default(),
        }
    }
}

impl Default for BrokerTlsConfig {
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

impl Default for AmqpConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(10),
            login_method: LoginMethod::default(),
            queue: None,
            message_ttl: None,
            queue_expires: None,
            queue_max_bytes: 256 << 20,
            prefetch_count: None,
        }
    }
}

impl Default for RedisConfig {
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

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            enable_events: true,
            enable_interval: Duration::from_secs(5),
            exchange: "celeryev".to_owned(),
            control_exchange: "celery".to_owned(),
            hostnames: None,
            buffer_max_bytes: 64 << 20,
            message_max_bytes: 16 << 20,
        }
    }
}

impl Default for StateConfig {
    fn default() -> Self {
        Self {
            max_workers: 5000,
            max_tasks: 100_000,
            worker_timeout: Some(Duration::from_secs(60)),
            purge_offline_workers: Some(Duration::from_secs(2 * 3600)),
            purge_stopped_workers: None,
            persistent: false,
            db: PathBuf::from("/var/lib/flower-exporter/state"),
            state_save_interval: Some(Duration::from_millis(250)),
        }
    }
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self {
            task_runtime_metric_buckets: vec![
                0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
            ],
            max_label_sets: 100_000,
            self_metrics: false,
            zero_first: Duration::ZERO,
            created: false,
            worker_groups: None,
            native_histogram_bucket_factor: None,
            exemplars: false,
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9555)),
            web_config_file: None,
            max_connections: 64,
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
        }
    }
}
