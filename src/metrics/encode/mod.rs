//! Encodes a snapshot in Prometheus' text format 0.0.4, in `OpenMetrics` 1.0 or in protobuf, one piece at a time.
//! It only appends to buffers of the caller, and never holds the whole exposition in memory.

mod bucket_bound;
mod message;
mod protobuf;
mod registry;

use std::sync::Arc;

use prometheus::proto;

use bucket_bound::format_le;

use super::Snapshot;
use super::exemplars::{self, Exemplar, Exemplars};
use super::label_escaping::append_escaped;
use crate::metrics::family::{Family, MetricType};

/// Every integer below this is exact as a float.
const MAX_EXACT: u64 = 1 << 53;

/// The label of the events whose counter has an exemplar.
const FAILED: &str = "type=\"task-failed\"";

/// An exposition format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The text format 0.0.4.
    Text,
    /// `OpenMetrics` 1.0.0.
    OpenMetrics,
    /// Length-delimited messages of `io.prometheus.client.MetricFamily`. It has start timestamps.
    Protobuf,
}

impl Format {
    /// The full `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }
}

/// A part of an exposition: one value of each worker or label set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Samples(Family),
    /// The `_created` samples of a counter or histogram, which are a gauge family in the text format.
    Created(Family),
}

/// The exposition of a snapshot, encoded in pieces to bound the memory of a scrape.
#[derive(Debug)]
pub struct Exposition {
    snapshot: Arc<Snapshot>,
    format: Format,
    /// Whether there are `_created` samples. Protobuf always has start timestamps instead.
    created: bool,
    parts: Vec<Part>,
    /// The text before the labels of each bucket's line.
    bucket_heads: Vec<String>,
    /// The encoded families after the six.
    tail: Vec<u8>,
    protobuf: protobuf::Encoder,
    /// Index of the current part, and of its next worker or label set.
    part: usize,
    next: usize,
}

impl Exposition {
    /// Starts an exposition. The `additional` families, for example those of a `Registry`, follow the six Flower
    /// families.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, format: Format, additional: &[proto::MetricFamily]) -> Self {
        let bounds = snapshot.bounds.iter().copied().chain([f64::INFINITY]);
        let bucket_head = |bound| format!("{}_bucket{{le=\"{}\",", Family::Runtime.name(), format_le(bound));
        let bucket_heads = bounds.map(bucket_head).collect();
        let mut tail = Vec::new();
        for family in additional {
            match format {
                Format::Protobuf => protobuf::write_registered(&mut tail, family, snapshot.started),
                _ => registry::write_family(&mut tail, format, family),
            }
        }
        if format == Format::OpenMetrics {
            tail.extend_from_slice(b"# EOF\n");
        }
        let parts = Family::ALL.into_iter().map(Part::Samples).collect();
        let protobuf = match format {
            Format::Protobuf => protobuf::Encoder::new(&snapshot),
            _ => protobuf::Encoder::default(),
        };
        Self { snapshot, format, created: false, parts, bucket_heads, tail, protobuf, part: 0, next: 0 }
    }

    /// Adds the `_created` samples that Python's client writes.
    #[must_use]
    pub fn with_created(mut self) -> Self {
        self.created = true;
        if self.format == Format::Text {
            let with_created = |family| match Family::created_name(family) {
                Some(_) => vec![Part::Samples(family), Part::Created(family)],
                None => vec![Part::Samples(family)],
            };
            self.parts = Family::ALL.into_iter().flat_map(with_created).collect();
        }
        self
    }

    /// Appends at least `min_bytes` to `out`, unless the exposition ends first. Returns whether there is more.
    pub fn write(&mut self, out: &mut Vec<u8>, min_bytes: usize) -> bool {
        let full = out.len() + min_bytes;
        while let Some(&part) = self.parts.get(self.part) {
            let count = self.count(part);
            if self.next == 0 {
                self.write_part_head(out, part, count);
            }
            while self.next < count {
                self.write_next(out, part);
                self.next += 1;
                if out.len() >= full {
                    return true;
                }
            }
            self.part += 1;
            self.next = 0;
        }
        out.append(&mut self.tail);
        false
    }

    fn count(&self, part: Part) -> usize {
        match part {
            Part::Samples(Family::Online | Family::Executing) => self.snapshot.workers.len(),
            _ => self.snapshot.task_series.len(),
        }
    }

    fn write_part_head(&mut self, out: &mut Vec<u8>, part: Part, count: usize) {
        match (self.format, part) {
            (Format::Protobuf, Part::Samples(family)) => {
                self.protobuf.write_head(out, &self.snapshot, family, count);
            }
            (_, Part::Samples(family)) => {
                write_head(out, self.format, family.name(), family.help(), family.metric_type());
            }
            (_, Part::Created(family)) => {
                let name = Family::created_name(family).unwrap_or_default();
                write_head(out, self.format, name, family.help(), MetricType::Gauge);
            }
        }
    }

    fn write_next(&mut self, out: &mut Vec<u8>, part: Part) {
        match (self.format, part) {
            (Format::Protobuf, Part::Samples(family)) => {
                self.protobuf.write_metrics(out, &self.snapshot, family, self.next);
            }
            (_, Part::Samples(family)) => self.write_samples(out, family),
            (_, Part::Created(family)) => self.write_created(out, family),
        }
    }

    fn write_samples(&self, out: &mut Vec<u8>, family: Family) {
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
        for event in self.snapshot.task_events(self.next) {
            let event_type = &self.snapshot.event_types[usize::from(event.id())];
            let exemplar = self.exemplars().filter(|_| &**event_type == FAILED).and_then(Exemplars::failed);
            line(out, [Family::Events.name(), "{", task, ",", event_type, worker], event.count, exemplar);
            if self.has_created_in_family() {
                created(out, Family::Events, &[task, ",", event_type, worker], event.created());
            }
        }
    }

    fn write_runtime(&self, out: &mut Vec<u8>) {
        let series = &self.snapshot.task_series[self.next];
        let Some(index) = series.runtime else { return };
        let (counts, sum, start) = self.snapshot.histogram(index);
        let name = Family::Runtime.name();
        let mut total = 0;
        let exemplars = self.exemplars();
        for (index, (count, head)) in counts.iter().zip(&self.bucket_heads).enumerate() {
            total += count;
            let exemplar = exemplars.filter(|_| *count > 0).and_then(|exemplars| exemplars.bucket(index));
            line(out, [head, &series.labels], total, exemplar);
        }
        line(out, [name, "_count{", &series.labels], total, None);
        sample(out, name, "_sum", &[&series.labels], sum);
        if self.has_created_in_family() {
            created(out, Family::Runtime, &[&series.labels], start);
        }
    }

    /// The exemplars of the next label set. The text format has none.
    fn exemplars(&self) -> Option<&Exemplars> {
        if self.format == Format::Text { None } else { self.snapshot.exemplars(self.next) }
    }

    /// In `OpenMetrics`, the `_created` samples belong to the family of their counter or histogram.
    fn has_created_in_family(&self) -> bool {
        self.created && self.format == Format::OpenMetrics
    }

    fn write_created(&self, out: &mut Vec<u8>, family: Family) {
        let series = &self.snapshot.task_series[self.next];
        if family == Family::Events {
            let (task, worker) = series.labels.split_at(series.split as usize);
            for event in self.snapshot.task_events(self.next) {
                let event_type = &self.snapshot.event_types[usize::from(event.id())];
                created(out, family, &[task, ",", event_type, worker], event.created());
            }
        } else if let Some(index) = series.runtime {
            created(out, family, &[&series.labels], self.snapshot.histogram(index).2);
        }
    }
}

/// Appends a `_created` sample: the start timestamp in seconds.
fn created(out: &mut Vec<u8>, family: Family, labels: &[&str], milliseconds: u64) {
    let name = Family::created_name(family).unwrap_or_default();
    sample(out, name, "", labels, milliseconds as f64 / 1000.0);
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

/// Appends one line with labels, a count and, unless the count is 0, an exemplar. `pieces` is the text up to the closing
/// brace.
fn line<const N: usize>(out: &mut Vec<u8>, pieces: [&str; N], count: u64, exemplar: Option<&Exemplar>) {
    for piece in pieces {
        out.extend_from_slice(piece.as_bytes());
    }
    out.extend_from_slice(b"} ");
    if count < MAX_EXACT {
        out.extend_from_slice(itoa::Buffer::new().format(count).as_bytes());
    } else {
        write_value(out, count as f64);
    }
    if let Some(exemplar) = exemplar.filter(|_| count > 0) {
        write_exemplar(out, exemplar);
    }
    out.push(b'\n');
}

/// Appends an exemplar to a line, in `OpenMetrics`.
#[cold]
fn write_exemplar(out: &mut Vec<u8>, exemplar: &Exemplar) {
    let mut label = String::new();
    append_escaped(&mut label, exemplars::LABEL, &exemplar.id());
    out.extend_from_slice(b" # {");
    out.extend_from_slice(label.as_bytes());
    out.extend_from_slice(b"} ");
    write_value(out, exemplar.value);
    out.push(b' ');
    write_value(out, exemplar.time as f64 / 1000.0);
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
    if (whole as f64).total_cmp(&value).is_eq() && whole.unsigned_abs() < MAX_EXACT {
        out.extend_from_slice(itoa::Buffer::new().format(whole).as_bytes());
    } else if value.is_infinite() {
        out.extend_from_slice(if value > 0.0 { b"+Inf" } else { b"-Inf" });
    } else {
        out.extend_from_slice(ryu::Buffer::new().format(value).as_bytes());
    }
}
