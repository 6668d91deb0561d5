//! The program's log: events with fields on standard error. The level can be changed while it runs.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::{Level, LogConfig, LogFormat};

/// Changes the log level.
pub(super) struct Logging(reload::Handle<Targets, Registry>);

impl Logging {
    /// Starts the log. Only the exporter's own events are written, because those of libraries may contain secrets.
    #[must_use]
    pub(super) fn start(log: &LogConfig) -> Self {
        let (filter, handle) = reload::Layer::new(targets(log.level));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let text = format().with_target(false);
        let layer = match log.format {
            // The journal adds the time.
            LogFormat::Text if is_journal() => {
                lines.with_ansi(false).event_format(Journal(text.without_time())).boxed()
            }
            LogFormat::Text => {
                lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).event_format(text).boxed()
            }
            LogFormat::Json => {
                let json = format().json().with_target(false).flatten_event(true);
                let json = json.with_current_span(false).with_span_list(false);
                let lines = lines.fmt_fields(JsonFields::new());
                if is_journal() { lines.event_format(Journal(json)).boxed() } else { lines.event_format(json).boxed() }
            }
        };
        tracing_subscriber::registry().with(layer.with_filter(filter)).init();
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            let message = panic.payload_as_str();
            tracing::error!(location, message, thread = std::thread::current().name(), "thread panicked");
        }));
        Self(handle)
    }

    /// Changes the log level.
    pub(super) fn set_level(&self, level: Level) {
        // Fails only if the subscriber is gone.
        let _ = self.0.reload(targets(level));
    }
}

/// Prints why the program exits, whether or not the log was started.
pub(super) fn print_fatal(reason: &str) {
    let priority = if is_journal() { "<3>" } else { "" };
    eprintln!("{priority}flower-exporter: {reason}");
}

/// Whether standard error is systemd's journal. systemd names the socket in `JOURNAL_STREAM`, by device and inode.
#[cfg(target_os = "linux")]
fn is_journal() -> bool {
    use std::os::linux::fs::MetadataExt;

    let journal = std::env::var("JOURNAL_STREAM").ok();
    let stderr = std::fs::metadata("/proc/self/fd/2").ok();
    stderr.is_some_and(|stderr| journal == Some(format!("{}:{}", stderr.st_dev(), stderr.st_ino())))
}

#[cfg(not(target_os = "linux"))]
fn is_journal() -> bool {
    false
}

/// Formats lines for the journal, with their priority in front (`sd-daemon(3)`).
struct Journal<F>(F);

impl<S, N, F> FormatEvent<S, N> for Journal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            tracing::Level::ERROR => 3,
            tracing::Level::WARN => 4,
            tracing::Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
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
