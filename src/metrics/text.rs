//! Prometheus' text format 0.0.4 and `OpenMetrics` 1.0, written piece by piece.

use std::sync::Arc;

use prometheus::proto::{MetricFamily, MetricType};

use super::Snapshot;
use super::family::{Family, Kind};
use super::label;

/// The two formats served.
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

/// The exposition of a snapshot, written in pieces so that no scrape needs megabytes at once.
#[derive(Debug)]
pub struct Exposition {
    snapshot: Arc<Snapshot>,
    format: Format,
    bounds: Vec<String>,
    /// What comes after the six families, already in `format`.
    appendix: String,
    family: usize,
    row: usize,
}

impl Exposition {
    /// `own` are further families, for example those of a Registry; they come after the six.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, format: Format, own: &[MetricFamily]) -> Self {
        let mut bounds: Vec<String> = snapshot.bounds.iter().map(|bound| label::bound(*bound)).collect();
        bounds.push(label::bound(f64::INFINITY));
        let mut appendix = Vec::new();
        for family in own {
            write_family(&mut appendix, format, family);
        }
        if format == Format::OpenMetrics {
            appendix.extend_from_slice(b"# EOF\n");
        }
        let appendix = String::from_utf8_lossy(&appendix).into_owned();
        Self { snapshot, format, bounds, appendix, family: 0, row: 0 }
    }

    /// Appends at least `bytes` to `out`, unless the end comes first; then it returns false.
    pub fn write(&mut self, out: &mut Vec<u8>, bytes: usize) -> bool {
        let full = out.len() + bytes;
        while let Some(&family) = Family::ALL.get(self.family) {
            if self.row == 0 {
                write_head(out, self.format, family.name(), family.help(), family.kind());
            }
            let rows = match family {
                Family::Online | Family::Executing => self.snapshot.workers.len(),
                _ => self.snapshot.pairs.len(),
            };
            while self.row < rows {
                self.write_row(out, family);
                self.row += 1;
                if out.len() >= full {
                    return true;
                }
            }
            self.family += 1;
            self.row = 0;
        }
        out.extend_from_slice(std::mem::take(&mut self.appendix).as_bytes());
        false
    }

    fn write_row(&self, out: &mut Vec<u8>, family: Family) {
        let (pairs, workers) = (&self.snapshot.pairs, &self.snapshot.workers);
        match family {
            Family::Events => self.write_events(out),
            Family::Runtime => self.write_runtime(out),
            Family::PrefetchTime => gauge(out, family, &pairs[self.row].label, pairs[self.row].prefetch_time),
            Family::Prefetched => gauge(out, family, &pairs[self.row].label, pairs[self.row].prefetched),
            Family::Online => gauge(out, family, &workers[self.row].label, workers[self.row].online.map(u8::from)),
            Family::Executing => gauge(out, family, &workers[self.row].label, workers[self.row].executing),
        }
    }

    fn write_events(&self, out: &mut Vec<u8>) {
        let pair = &self.snapshot.pairs[self.row];
        let (task, worker) = pair.label.split_at(pair.split as usize);
        for (id, count) in self.snapshot.events_of(self.row) {
            let type_label = &self.snapshot.types[usize::from(*id)];
            sample(out, Family::Events.name(), "", &[task, ",", type_label, worker], *count as f64);
        }
    }

    fn write_runtime(&self, out: &mut Vec<u8>) {
        let pair = &self.snapshot.pairs[self.row];
        let Some(place) = pair.runtime else { return };
        let (counts, sum) = self.snapshot.histogram(place);
        let name = Family::Runtime.name();
        let mut total = 0;
        for (count, bound) in counts.iter().zip(&self.bounds) {
            total += count;
            sample(out, name, "_bucket", &["le=\"", bound, "\",", &pair.label], total as f64);
        }
        sample(out, name, "_count", &[&pair.label], total as f64);
        sample(out, name, "_sum", &[&pair.label], sum);
    }
}

fn gauge(out: &mut Vec<u8>, family: Family, label: &str, value: Option<impl Into<f64>>) {
    if let Some(value) = value {
        sample(out, family.name(), "", &[label], value.into());
    }
}

fn write_head(out: &mut Vec<u8>, format: Format, name: &str, help: &str, kind: Kind) {
    let name = match format {
        Format::OpenMetrics if kind == Kind::Counter => name.strip_suffix("_total").unwrap_or(name),
        _ => name,
    };
    for piece in ["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind.as_str(), "\n"] {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// One line: `name` + `suffix`, the pieces of the label text, the value.
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

/// Whole numbers without a point, as the prometheus crate writes them.
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

/// A counter or gauge family of the exporter's own, as its Registry gathers it.
fn write_family(out: &mut Vec<u8>, format: Format, family: &MetricFamily) {
    let kind = match family.get_field_type() {
        MetricType::COUNTER => Kind::Counter,
        _ => Kind::Gauge,
    };
    let name = family.name();
    write_head(out, format, name, family.help(), kind);
    for metric in family.get_metric() {
        let mut labels = String::new();
        for pair in metric.get_label() {
            if !labels.is_empty() {
                labels.push(',');
            }
            label::append(&mut labels, pair.name(), pair.value());
        }
        let value = match kind {
            Kind::Counter => metric.get_counter().get_value(),
            _ => metric.get_gauge().get_value(),
        };
        sample(out, name, "", &[&labels], value);
    }
}
