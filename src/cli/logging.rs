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
use tracing::field::Field;
use tracing::{Event, Subscriber};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{JsonFields, Writer, debug_fn};
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
        let (text, fields) = (format().with_target(false), debug_fn(write_field).delimited(" "));
        let layer = match log.format {
            // The journal adds the time.
            LogFormat::Text if is_journal() => {
                lines.with_ansi(false).fmt_fields(fields).event_format(Journal(text.without_time())).boxed()
            }
            LogFormat::Text => {
                let is_terminal = io::IsTerminal::is_terminal(&io::stderr());
                lines.with_ansi(is_terminal).fmt_fields(fields).event_format(text).boxed()
            }
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

/// Writes the message, or a field as in logfmt: a value with blanks, quotes or equals signs is in quotes.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let text = format!("{value:?}");
    if field.name() == "message" {
        return text.chars().try_for_each(|c| match c {
            // A hostname must not be able to forge a line.
            c if c.is_control() => write!(writer, "{}", c.escape_default()),
            c => writer.write_char(c),
        });
    }
    let needs_quotes =
        text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control() || "\"=".contains(c));
    if needs_quotes && !is_quoted(&text) {
        write!(writer, "{}={text:?}", field.name())
    } else {
        write!(writer, "{}={text}", field.name())
    }
}

/// Whether the text is one quoted string, as `Debug` writes strings.
fn is_quoted(text: &str) -> bool {
    let Some(inner) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) else { return false };
    let mut is_escaped = false;
    let is_string = inner.chars().all(|c| {
        let ends = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        !ends && !c.is_control()
    });
    is_string && !is_escaped
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A writer to memory.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn values_with_blanks_are_quoted() {
        let memory = Memory::default();
        let lines = tracing_subscriber::fmt::layer().with_writer({
            let memory = memory.clone();
            move || memory.clone()
        });
        let lines = lines.with_ansi(false).fmt_fields(debug_fn(write_field).delimited(" "));
        let layer = lines.event_format(format().with_target(false).without_time());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let (error, quoted) = (format_args!("refused (os error 111)"), format_args!(r#""a" is not "b""#));
            tracing::info!(text = "a b", error = %error, quoted = %quoted, empty = %"", "first line\nforged");
            tracing::info!(number = 7, flag = true, plain = %"redis://h:1/0", equals = %"a=b", tail = %"a\\", "second");
        });
        let written = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let expected = [
            r#" INFO first line\nforged text="a b" error="refused (os error 111)" quoted="\"a\" is not \"b\"" empty="""#,
            r#" INFO second number=7 flag=true plain=redis://h:1/0 equals="a=b" tail=a\"#,
        ];
        assert_eq!(written.lines().collect::<Vec<_>>(), expected);
    }
}
