//! The log of the daemon: events with fields on standard error, its level changeable while it runs.

use std::fmt;
use std::fs;
use std::os::linux::fs::MetadataExt;

use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::settings::{Level, Log, LogFormat};

/// Changes the level.
pub struct Logging(reload::Handle<Targets, Registry>);

impl Logging {
    /// Starts the log. Only this program's own events are written: its libraries' may hold what is nobody's business.
    #[must_use]
    pub fn start(log: &Log) -> Self {
        let (filter, handle) = reload::Layer::new(targets(log.level));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let text = format().with_target(false);
        let layer = match log.format {
            // The journal has a clock of its own.
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

/// Why the program ends: also where no log is kept.
pub fn last_word(why: &str) {
    let priority = if is_journal() { "<3>" } else { "" };
    eprintln!("{priority}flower-exporter: {why}");
}

/// Whether standard error goes to systemd's journal: it names the socket it gave us by device and inode.
fn is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").ok();
    let ours = fs::metadata("/proc/self/fd/2").ok();
    ours.is_some_and(|ours| named == Some(format!("{}:{}", ours.st_dev(), ours.st_ino())))
}

/// Lines as the journal takes them: the priority in front (`sd-daemon(3)`).
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
