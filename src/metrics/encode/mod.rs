//! Encodes a snapshot in Prometheus' text format 0.0.4 or in `OpenMetrics` 1.0, one piece at a time.
//! It only appends to buffers of the caller, and never holds the whole exposition in memory.

mod bucket_bound;
mod registry;

use std::sync::Arc;

use prometheus::proto;

use bucket_bound::format_le;

use super::Snapshot;
use crate::metrics::family::{Family, MetricType};

/// An exposition format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The text format 0.0.4.
    Text,
    /// `OpenMetrics` 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The full `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The exposition of a snapshot, encoded in pieces to bound the memory of a scrape.
#[derive(Debug)]
pub struct Exposition {
    snapshot: Arc<Snapshot>,
    format: Format,
    bounds: Vec<String>,
    /// The encoded text after the six families.
    tail: String,
    /// Index of the current family, and of its next worker or label set.
    family: usize,
    next: usize,
}

impl Exposition {
    /// Starts an exposition. The `additional` families, for example those of a `Registry`, follow the six Flower
    /// families.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, format: Format, additional: &[proto::MetricFamily]) -> Self {
        let mut bounds: Vec<String> = snapshot.bounds.iter().map(|bound| format_le(*bound)).collect();
        bounds.push(format_le(f64::INFINITY));
        let mut tail = Vec::new();
        for family in additional {
            registry::write_family(&mut tail, format, family);
        }
        if format == Format::OpenMetrics {
            tail.extend_from_slice(b"# EOF\n");
        }
        let tail = String::from_utf8_lossy(&tail).into_owned();
        Self { snapshot, format, bounds, tail, family: 0, next: 0 }
    }

    /// Appends at least `min_bytes` to `out`, unless the exposition ends first. Returns whether there is more.
    pub fn write(&mut self, out: &mut Vec<u8>, min_bytes: usize) -> bool {
        let full = out.len() + min_bytes;
        while let Some(&family) = Family::ALL.get(self.family) {
            if self.next == 0 {
                write_head(out, self.format, family.name(), family.help(), family.metric_type());
            }
            let count = match family {
                Family::Online | Family::Executing => self.snapshot.workers.len(),
                _ => self.snapshot.task_series.len(),
            };
            while self.next < count {
                self.write_next(out, family);
                self.next += 1;
                if out.len() >= full {
                    return true;
                }
            }
            self.family += 1;
            self.next = 0;
        }
        out.extend_from_slice(std::mem::take(&mut self.tail).as_bytes());
        false
    }

    fn write_next(&self, out: &mut Vec<u8>, family: Family) {
        let (tasks, workers) = (&self.snapshot.task_series, &self.snapshot.workers);
        match family {
            Family::Events => self.write_events(out),
            Family::Runtime => self.write_runtime(out),
            Family::PrefetchTime => gauge(out, family, &tasks[self.next].labels, tasks[self.next].prefetch_time),
            Family::Prefetched => gauge(out, family, &tasks[self.next].labels, tasks[self.next].prefetched),
            Family::Online => gauge(out, family, &workers[self.next].labels, workers[self.next].online.map(u8::from)),
            Family::Executing => gauge(out, family, &workers[self.next].labels, workers[self.next].executing),
        }
    }

    fn write_events(&self, out: &mut Vec<u8>) {
        let series = &self.snapshot.task_series[self.next];
        let (task, worker) = series.labels.split_at(series.split as usize);
        for (id, count) in self.snapshot.task_events(self.next) {
            let event_type = &self.snapshot.event_types[usize::from(*id)];
            sample(out, Family::Events.name(), "", &[task, ",", event_type, worker], *count as f64);
        }
    }

    fn write_runtime(&self, out: &mut Vec<u8>) {
        let series = &self.snapshot.task_series[self.next];
        let Some(index) = series.runtime else { return };
        let (counts, sum) = self.snapshot.histogram(index);
        let name = Family::Runtime.name();
        let mut total = 0;
        for (count, le) in counts.iter().zip(&self.bounds) {
            total += count;
            sample(out, name, "_bucket", &["le=\"", le, "\",", &series.labels], total as f64);
        }
        sample(out, name, "_count", &[&series.labels], total as f64);
        sample(out, name, "_sum", &[&series.labels], sum);
    }
}

fn gauge(out: &mut Vec<u8>, family: Family, label: &str, value: Option<impl Into<f64>>) {
    if let Some(value) = value {
        sample(out, family.name(), "", &[label], value.into());
    }
}

fn write_head(out: &mut Vec<u8>, format: Format, name: &str, help: &str, metric_type: MetricType) {
    let name = match format {
        Format::OpenMetrics if metric_type == MetricType::Counter => name.strip_suffix("_total").unwrap_or(name),
        _ => name,
    };
    for piece in ["# HELP ", name, " ", help, "\n# TYPE ", name, " ", metric_type.as_str(), "\n"] {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// Appends one line: `name` and `suffix`, the label set in pieces, the value.
fn sample(out: &mut Vec<u8>, name: &str, suffix: &str, labels: &[&str], value: f64) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(suffix.as_bytes());
    if labels.iter().any(|piece| !piece.is_empty()) {
        out.push(b'{');
        for piece in labels {
            out.extend_from_slice(piece.as_bytes());
        }
        out.push(b'}');
    }
    out.push(b' ');
    write_value(out, value);
    out.push(b'\n');
}

/// Appends a value. Integers have no decimal point, as in the prometheus crate.
fn write_value(out: &mut Vec<u8>, value: f64) {
    #[allow(clippy::cast_possible_truncation, reason = "checked by the comparison")]
    let whole = value as i64;
    if (whole as f64).total_cmp(&value).is_eq() && whole.unsigned_abs() < 1 << 53 {
        out.extend_from_slice(itoa::Buffer::new().format(whole).as_bytes());
    } else if value.is_infinite() {
        out.extend_from_slice(if value > 0.0 { b"+Inf" } else { b"-Inf" });
    } else {
        out.extend_from_slice(ryu::Buffer::new().format(value).as_bytes());
    }
}
