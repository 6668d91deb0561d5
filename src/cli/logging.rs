//! The program's log: events with fields on standard error. The level can be changed while it runs.
//!
//! A separate thread writes the lines, from a buffer that drops lines when it is full. Standard error that nothing reads
//! therefore stops nothing else.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{Event, Subscriber};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::{Level, LogConfig, LogFormat};
use crate::exporter::Exporter;

/// Maximum number of lines in the buffer.
const MAX_BUFFERED_LINES: usize = 1024;
/// How long to wait at the end until the buffer is written.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);
/// In this time, a line is written or lost.
const WRITE_DELAY: Duration = Duration::from_millis(500);
/// How often to check for lost lines.
const LOST_LINES_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The running log. Dropping it writes the buffer.
pub(super) struct Logging {
    level: reload::Handle<Targets, Registry>,
    writer: NonBlocking,
    /// Lines that standard error refused.
    refused: Arc<AtomicU64>,
    worker: Option<WorkerGuard>,
}

impl Logging {
    /// Starts the log. Only the exporter's own events are written, because those of libraries may contain secrets.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be created.
    pub(super) fn start(log: &LogConfig) -> io::Result<Self> {
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            let message = panic.payload_as_str();
            tracing::error!(location, message, thread = thread::current().name(), "thread panicked");
        }));
        let refused = Arc::new(AtomicU64::new(0));
        let stderr = Stderr { refused: Arc::clone(&refused) };
        let builder = NonBlockingBuilder::default().buffered_lines_limit(MAX_BUFFERED_LINES).thread_name("flower-log");
        // The crate panics if the system refuses the thread.
        let (writer, worker) = catch_unwind(AssertUnwindSafe(|| builder.finish(stderr)))
            .map_err(|_| io::Error::other("failed to start a thread for the log"))?;
        let (filter, level) = reload::Layer::new(targets(log.level));
        let lines = tracing_subscriber::fmt::layer().with_writer(writer.clone());
        let text = format().with_target(false);
        let layer = match log.format {
            // The journal adds the time.
            LogFormat::Text if is_journal() => {
                lines.with_ansi(false).event_format(Journal(text.without_time())).boxed()
            }
            LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).event_format(text).boxed(),
            LogFormat::Json => {
                let json = format().json().with_target(false).flatten_event(true);
                let json = json.with_current_span(false).with_span_list(false);
                let lines = lines.fmt_fields(JsonFields::new());
                if is_journal() { lines.event_format(Journal(json)).boxed() } else { lines.event_format(json).boxed() }
            }
        };
        tracing_subscriber::registry().with(layer.with_filter(filter)).init();
        Ok(Self { level, writer, refused, worker: Some(worker) })
    }

    /// Changes the log level.
    pub(super) fn set_level(&self, level: Level) {
        // Fails only if the subscriber is gone.
        let _ = self.level.reload(targets(level));
    }

    /// Prints why the program exits.
    pub(super) fn print_fatal(&self, reason: &str) {
        // It never fails: a line that does not fit is lost.
        let _ = self.writer.clone().write_all(fatal_line(reason).as_bytes());
    }

    fn lost_lines(&self) -> u64 {
        self.writer.error_counter().dropped_lines() as u64 + self.refused.load(Ordering::Relaxed)
    }

    /// Reports lost lines: as a warning while lines are lost, and in the log once they can be written again.
    pub(super) async fn report_lost_lines(&self, exporter: &Exporter) -> Infallible {
        // The lost lines that are counted, those that are reported in the log, and lost reports.
        let (mut counted, mut logged, mut reports) = (0, 0, 0);
        loop {
            sleep(LOST_LINES_CHECK_INTERVAL).await;
            let lost = self.lost_lines() - reports;
            if lost == counted && lost > logged {
                let before = self.lost_lines();
                tracing::warn!(lost = lost - logged, "log lines were lost");
                sleep(WRITE_DELAY).await;
                match self.lost_lines() - before {
                    0 => logged = lost,
                    more => reports += more,
                }
            }
            exporter.record_lost_log_lines(lost - counted, lost > logged);
            counted = lost;
        }
    }
}

impl Drop for Logging {
    /// `WorkerGuard::drop` may print to standard output, which may block.
    fn drop(&mut self) {
        let (done_tx, done_rx) = channel();
        let worker = self.worker.take();
        let flushing = thread::Builder::new().spawn(move || {
            drop(worker);
            // The receiver is gone after the timeout.
            let _ = done_tx.send(());
        });
        if flushing.is_ok() {
            let _ = done_rx.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Standard error. A line that it refuses counts as lost.
struct Stderr {
    refused: Arc<AtomicU64>,
}

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().write_all(line).is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints why the program exits before the log is started.
pub(super) fn print_fatal(reason: &str) {
    // There is no other place for it.
    let _ = io::stderr().write_all(fatal_line(reason).as_bytes());
}

fn fatal_line(reason: &str) -> String {
    let priority = if is_journal() { "<3>" } else { "" };
    format!("{priority}flower-exporter: {reason}\n")
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
