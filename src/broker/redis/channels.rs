//! Channel names, as `kombu.transport.redis` builds them.

use crate::config::{BrokerUrl, Config, FanoutPrefix};

/// The channels to subscribe to: patterns, or plain names without kombu's `fanout_patterns`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Channels {
    Patterns(Vec<String>),
    Plain(Vec<String>),
}

/// The names of a fanout exchange: one, prefixed with `/{db}.` unless configured otherwise. With
/// `sentinel_fanout_compat` also the name that kombu before 5.4 uses on Sentinel, including the braces.
pub(super) fn fanout_names(config: &Config, url: &BrokerUrl, exchange: &str) -> Vec<String> {
    let redis = &config.broker.redis;
    let template = match &redis.fanout_prefix {
        FanoutPrefix::On => "/{db}.",
        FanoutPrefix::Custom(text) => text,
        FanoutPrefix::Off => "",
    };
    let prefix = template.replace("{db}", &url.db.to_string());
    let mut prefixes = vec![prefix.as_str()];
    if redis.sentinel_fanout_compat && prefix != template {
        prefixes.push(template);
    }
    prefixes.into_iter().map(|prefix| format!("{}{prefix}{exchange}", redis.global_keyprefix)).collect()
}

impl Channels {
    pub(super) fn new(config: &Config, url: &BrokerUrl) -> Self {
        let names = fanout_names(config, url, &config.events.exchange);
        if !config.broker.redis.fanout_patterns {
            return Self::Plain(names);
        }
        Self::Patterns(names.iter().map(|name| format!("{}/*", escape_glob(name))).collect())
    }

    pub(super) fn names(&self) -> &[String] {
        match self {
            Self::Patterns(names) | Self::Plain(names) => names,
        }
    }

    /// One command for all channels: its replies come before any message.
    pub(super) fn command(&self) -> Vec<&str> {
        let verb = if matches!(self, Self::Patterns(_)) { "PSUBSCRIBE" } else { "SUBSCRIBE" };
        [verb].into_iter().chain(self.names().iter().map(String::as_str)).collect()
    }
}

fn escape_glob(name: &str) -> String {
    let escape = |character| matches!(character, '*' | '?' | '[' | ']' | '\\').then_some('\\');
    name.chars().flat_map(|character| escape(character).into_iter().chain([character])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BrokerUrls;

    fn channels(url: &str, change: impl FnOnce(&mut Config)) -> Channels {
        let mut config = Config::default();
        change(&mut config);
        let urls: BrokerUrls = url.parse().unwrap();
        Channels::new(&config, urls.iter().next().unwrap())
    }

    #[test]
    fn channels_have_the_names_that_kombu_gives_them() {
        let pattern = |text: &str| Channels::Patterns(vec![text.to_owned()]);
        assert_eq!(channels("redis://h", |_| ()), pattern("/0.celeryev/*"));
        assert_eq!(
            channels("redis://h/3", |c| c.broker.redis.global_keyprefix = "a*".into()),
            pattern(r"a\*/3.celeryev/*")
        );
        let custom = FanoutPrefix::Custom("x{db}[y]".to_owned());
        assert_eq!(channels("redis://h/7", |c| c.broker.redis.fanout_prefix = custom), pattern(r"x7\[y\]celeryev/*"));
        assert_eq!(channels("redis://h", |c| c.broker.redis.fanout_prefix = FanoutPrefix::Off), pattern("celeryev/*"));
        assert_eq!(
            channels("redis://h/1", |c| c.broker.redis.fanout_patterns = false),
            Channels::Plain(vec!["/1.celeryev".to_owned()])
        );
    }

    #[test]
    fn compat_adds_the_name_that_kombu_used_before_5_4() {
        let names = |prefix| {
            channels("sentinel://h/2", |config| {
                config.broker.redis.sentinel_fanout_compat = true;
                config.broker.redis.fanout_prefix = prefix;
            })
        };
        assert_eq!(names(FanoutPrefix::On).names(), ["/2.celeryev/*", "/{db}.celeryev/*"]);
        assert_eq!(names(FanoutPrefix::Custom("x.".to_owned())).names(), ["x.celeryev/*"]);
    }
}
