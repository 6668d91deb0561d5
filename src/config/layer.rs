//! The values of one source, and the error for a key that does not exist.

use figment::util::nest;
use figment::value::{Dict, Empty, Map, Tag, Value};
use figment::{Metadata, Profile, Provider};

use super::ConfigError;
use super::schema::{self, Key};

/// Keys that had another name before the first release.
const RENAMED: [(&str, &str); 6] = [
    ("broker.reconnect_max", "broker.reconnect_backoff_max"),
    ("broker.amqp.prefetch", "broker.amqp.prefetch_count"),
    ("broker.amqp.queue_ttl", "broker.amqp.message_ttl"),
    ("events.max_backlog", "events.buffer_max_bytes"),
    ("events.max_message", "events.message_max_bytes"),
    ("metrics.max_label_pairs", "metrics.max_label_sets"),
];

/// The values of one source. The source's name in the metadata appears in the report and in errors.
pub(super) struct Layer {
    pub(super) metadata: Metadata,
    pub(super) values: Dict,
}

impl Layer {
    pub(super) fn from_key(source: String, key: &Key, value: Value) -> Self {
        let values = nest(key.name, unset_if_empty(key, value)).into_dict().unwrap_or_default();
        Self { metadata: Metadata::named(source), values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        self.metadata.clone()
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

pub(super) fn unset_if_empty(key: &Key, value: Value) -> Value {
    match value.as_str() {
        Some("") if key.optional => Value::Empty(Tag::Default, Empty::None),
        _ => value,
    }
}

pub(super) fn unknown_key(subject: &str, key: &str) -> ConfigError {
    if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == key) {
        return ConfigError::RenamedKey { subject: subject.to_owned(), old: key.to_owned(), new };
    }
    let section = key.rsplit_once('.').map_or("", |(section, _)| section);
    ConfigError::UnknownKey {
        subject: subject.to_owned(),
        key: key.escape_debug().to_string(),
        accepted: schema::children(section).join(", "),
    }
}
