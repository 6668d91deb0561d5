//! The log of the daemon: events with fields on standard error, its level changeable while it runs.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

use crate::settings::{Level, Log, LogFormat};

/// Changes the level.
pub struct Logging(reload::Handle<Targets, Registry>);

impl Logging {
    /// Starts the log. Only this program's own events are written: its libraries' may hold what is nobody's business.
    #[must_use]
    pub fn start(log: &Log) -> Self {
        let (filter, handle) = reload::Layer::new(targets(log.level));
        let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
        let layer = match log.format {
            LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
        };
        tracing_subscriber::registry().with(layer.with_filter(filter)).init();
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string);
            let message = panic.payload_as_str();
            tracing::error!(place, message, thread = std::thread::current().name(), "a thread panicked");
        }));
        Self(handle)
    }

    /// Changes the level.
    pub fn set_level(&self, level: Level) {
        // Fails only when the subscriber is gone, and with it the log.
        let _ = self.0.reload(targets(level));
    }
}

fn targets(level: Level) -> Targets {
    let level = match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    Targets::new().with_target("flower_exporter", level)
}
