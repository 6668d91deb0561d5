//! Encodes families as length-delimited messages of `io.prometheus.client.MetricFamily` (`metrics.proto` of
//! `prometheus/client_model`), the only format with start timestamps that Prometheus asks for by itself.
//!
//! A family begins with its length, so a first pass over the series only measures.

use prometheus::proto;

use super::FAILED;
use super::message::{Message, varint_len};
use crate::metrics::Snapshot;
use crate::metrics::exemplars::Exemplars;
use crate::metrics::family::{Family, MetricType};

/// Numbers of the fields of a family.
mod field {
    pub(super) const NAME: u32 = 1;
    pub(super) const HELP: u32 = 2;
    pub(super) const TYPE: u32 = 3;
    pub(super) const METRIC: u32 = 4;
}

/// The head of a family, without its metrics.
fn head(name: &str, help: &str, metric_type: MetricType) -> Message {
    let mut head = Message::default();
    head.bytes(field::NAME, name.as_bytes());
    head.bytes(field::HELP, help.as_bytes());
    head.number(
        field::TYPE,
        match metric_type {
            MetricType::Counter => 0,
            MetricType::Gauge => 1,
            MetricType::Histogram => 4,
        },
    );
    head
}

/// The encoded labels of a snapshot, each encoded once although it is written for every family and measured before.
#[derive(Debug, Default)]
struct Labels {
    bytes: Vec<u8>,
    /// Where each part ends: those of the workers, of the event types, and two of each label set, before and after the
    /// place of the event type.
    ends: Vec<usize>,
    workers: usize,
    event_types: usize,
}

impl Labels {
    fn new(snapshot: &Snapshot) -> Self {
        let workers = snapshot.workers.iter().map(|worker| &*worker.labels);
        let event_types = snapshot.event_types.iter().map(|event_type| &**event_type);
        let series = snapshot.task_series.iter().flat_map(|series| {
            let (task, worker) = series.labels.split_at(series.split as usize);
            [task, worker.trim_start_matches(',')]
        });
        let (mut message, mut ends) = (Message::default(), Vec::new());
        for text in workers.chain(event_types).chain(series) {
            message.labels(text);
            ends.push(message.0.len());
        }
        let (workers, event_types) = (snapshot.workers.len(), snapshot.event_types.len());
        Self { bytes: message.0, ends, workers, event_types }
    }

    /// So many parts.
    fn parts(&self, first: usize, count: usize) -> &[u8] {
        let start = first.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[first + count - 1]]
    }

    fn worker(&self, index: usize) -> &[u8] {
        self.parts(index, 1)
    }

    fn event_type(&self, id: usize) -> &[u8] {
        self.parts(self.workers + id, 1)
    }

    fn series(&self, index: usize) -> &[u8] {
        self.parts(self.workers + self.event_types + 2 * index, 2)
    }

    fn series_parts(&self, index: usize) -> [&[u8]; 2] {
        let first = self.workers + self.event_types + 2 * index;
        [self.parts(first, 1), self.parts(first + 1, 1)]
    }
}

/// Encodes the six families of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    labels: Labels,
    message: Message,
}

impl Encoder {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        Self { labels: Labels::new(snapshot), message: Message::default() }
    }

    /// Appends the length of a family with all its metrics, and its head.
    pub(super) fn write_head(&mut self, out: &mut Vec<u8>, snapshot: &Snapshot, family: Family, count: usize) {
        let head = head(family.name(), family.help(), family.metric_type());
        let mut length = head.0.len();
        for index in 0..count {
            self.for_each_metric(snapshot, family, index, |metric| length += delimited_len(metric));
        }
        let mut prefix = Message::default();
        prefix.varint(length as u64);
        out.extend_from_slice(&prefix.0);
        out.extend_from_slice(&head.0);
    }

    /// Appends the metrics of a worker or label set.
    pub(super) fn write_metrics(&mut self, out: &mut Vec<u8>, snapshot: &Snapshot, family: Family, index: usize) {
        self.for_each_metric(snapshot, family, index, |metric| write_metric(out, metric));
    }

    fn for_each_metric(&mut self, snapshot: &Snapshot, family: Family, index: usize, mut each: impl FnMut(&[u8])) {
        let Self { labels, message } = self;
        let gauge = match family {
            Family::Online => (snapshot.workers[index].online.map(u8::from).map(f64::from), labels.worker(index)),
            Family::Executing => (snapshot.workers[index].executing, labels.worker(index)),
            Family::PrefetchTime => (snapshot.task_series[index].prefetch_time, labels.series(index)),
            Family::Prefetched => (snapshot.task_series[index].prefetched.map(f64::from), labels.series(index)),
            Family::Events => return write_events(message, labels, snapshot, index, each),
            Family::Runtime => return write_runtime(message, labels, snapshot, index, each),
        };
        if let (Some(value), labels) = gauge {
            message.start(&[labels]);
            message.gauge(value);
            each(&message.0);
        }
    }
}

fn write_events(
    message: &mut Message,
    labels: &Labels,
    snapshot: &Snapshot,
    index: usize,
    mut each: impl FnMut(&[u8]),
) {
    let [task, worker] = labels.series_parts(index);
    let failed = snapshot.exemplars(index).and_then(Exemplars::failed);
    for event in snapshot.task_events(index) {
        let id = usize::from(event.id());
        message.start(&[task, labels.event_type(id), worker]);
        let exemplar = failed.filter(|_| event.count > 0 && *snapshot.event_types[id] == *FAILED);
        message.counter(event.count as f64, exemplar, event.created());
        each(&message.0);
    }
}

fn write_runtime(
    message: &mut Message,
    labels: &Labels,
    snapshot: &Snapshot,
    index: usize,
    mut each: impl FnMut(&[u8]),
) {
    let Some(histogram) = snapshot.task_series[index].runtime else { return };
    let (counts, sum, created) = snapshot.histogram(histogram);
    let exemplars = snapshot.exemplars(index);
    let mut total = 0;
    let bounds = snapshot.bounds.iter().copied().chain([f64::INFINITY]);
    let buckets = counts.iter().zip(bounds).enumerate().map(|(index, (count, bound))| {
        total += count;
        let exemplar = exemplars.filter(|_| *count > 0).and_then(|exemplars| exemplars.bucket(index));
        (bound, total, exemplar)
    });
    message.start(&[labels.series(index)]);
    message.histogram((counts.iter().sum(), sum, created), buckets, snapshot.native.get(histogram as usize));
    each(&message.0);
}

fn delimited_len(metric: &[u8]) -> usize {
    1 + varint_len(metric.len() as u64) + metric.len()
}

fn write_metric(out: &mut Vec<u8>, metric: &[u8]) {
    let mut prefix = Message(std::mem::take(out));
    prefix.bytes(field::METRIC, metric);
    *out = prefix.0;
}

/// Appends a family of a `prometheus::Registry`. Its counters and histograms start with the exporter, at `started`.
pub(super) fn write_registered(out: &mut Vec<u8>, family: &proto::MetricFamily, started: u64) {
    let metric_type = MetricType::of(family);
    let mut body = head(family.name(), family.help(), metric_type).0;
    for metric in family.get_metric() {
        let mut message = Message::default();
        for label in metric.get_label() {
            message.label(label.name(), label.value().as_bytes());
        }
        match metric_type {
            MetricType::Counter => message.counter(metric.get_counter().get_value(), None, started),
            MetricType::Gauge => message.gauge(metric.get_gauge().get_value()),
            MetricType::Histogram => {
                let histogram = metric.get_histogram();
                let buckets = histogram.get_bucket().iter();
                let buckets = buckets.map(|bucket| (bucket.upper_bound(), bucket.cumulative_count(), None));
                let totals = (histogram.get_sample_count(), histogram.get_sample_sum(), started);
                message.histogram(totals, buckets, None);
            }
        }
        write_metric(&mut body, &message.0);
    }
    let mut prefix = Message::default();
    prefix.varint(body.len() as u64);
    out.extend_from_slice(&prefix.0);
    out.extend_from_slice(&body);
}
