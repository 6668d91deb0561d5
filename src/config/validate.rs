//! Checks that take several keys into account.

use super::broker_url::{Address, BrokerUrl, BrokerUrls, Transport};
use super::{BrokerConfig, Config, ConfigError};

impl Config {
    /// Checks what the values of single keys do not show: keys that contradict each other, and a URL file that cannot
    /// be read.
    ///
    /// # Errors
    /// Returns an error if two keys contradict each other, or if the URL file cannot be used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let is_amqp = self.broker.urls()?.iter().any(|url| url.transport == Transport::Amqp);
        let acknowledges_after_saves = is_amqp && self.broker.amqp.queue.is_some() && self.state.persistent;
        if acknowledges_after_saves && self.state.state_save_interval.is_none() {
            return Err(invalid(
                "state.state_save_interval",
                " = 0",
                "with broker.amqp.queue and state.persistent, messages are acknowledged when they are saved: expected a \
                 duration above 0",
            ));
        }
        Ok(())
    }
}

/// Checks URLs against the other keys of `[broker]`.
pub(super) fn validate_urls(broker: &BrokerConfig, urls: &BrokerUrls) -> Result<(), ConfigError> {
    let url_key = if broker.url_file.is_some() { "broker.url_file" } else { "broker.url" };
    if urls.iter().any(|url| url.transport == Transport::Sentinel) && broker.redis.master_name.is_none() {
        return Err(invalid(
            "broker.redis.master_name",
            "",
            "required for sentinel:// URLs: expected the master's name",
        ));
    }
    let is_unix = |url: &BrokerUrl| matches!(url.address, Address::Unix(_));
    match broker.tls.enabled {
        Some(false) if urls.iter().any(|url| url.tls) => {
            let reason = format!(
                "{url_key} requires TLS (amqps://, rediss:// or an ssl_ parameter): enable TLS, or use a URL without it"
            );
            Err(invalid("broker.tls.enabled", " = false", &reason))
        }
        Some(true) if urls.iter().any(is_unix) => Err(invalid(
            "broker.tls.enabled",
            " = true",
            "TLS is not supported on redis+socket://: expected a URL with a host",
        )),
        _ => Ok(()),
    }
}

fn invalid(subject: &str, value: &str, reason: &str) -> ConfigError {
    ConfigError::Value { subject: subject.to_owned(), value: value.to_owned(), reason: reason.to_owned() }
}
