//! A `Collector` of the prometheus crate for the six families, for programs that embed the exporter.

use std::collections::HashMap;
use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::Snapshot;
use super::family::{Family, MetricType};
use super::snapshot::{TaskValues, WorkerValues};

/// Collects the six families from a [`Snapshot`] per gathering.
pub struct FlowerCollector {
    take_snapshot: Box<dyn Fn() -> Option<Arc<Snapshot>> + Send + Sync>,
    descs: Vec<Desc>,
}

impl FlowerCollector {
    /// Creates a collector that calls `take_snapshot` at each gathering. `None` (the exporter has stopped or did not
    /// answer in time) results in no series.
    #[must_use]
    pub fn new(take_snapshot: impl Fn() -> Option<Arc<Snapshot>> + Send + Sync + 'static) -> Self {
        let desc = |family: &Family| {
            let labels = family.labels().iter().map(|label| (*label).to_owned()).collect();
            Desc::new(family.name().to_owned(), family.help().to_owned(), labels, HashMap::new()).ok()
        };
        Self { take_snapshot: Box::new(take_snapshot), descs: Family::ALL.iter().filter_map(desc).collect() }
    }
}

impl Collector for FlowerCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let Some(snapshot) = (self.take_snapshot)() else { return Vec::new() };
        let families = Family::ALL.into_iter().map(|family| snapshot.family(family));
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

impl Snapshot {
    fn family(&self, family: Family) -> proto::MetricFamily {
        let metrics = match family {
            Family::Events => self.event_metrics(),
            Family::Runtime => self.task_metrics(|sample| sample.runtime.map(|index| self.runtime_metric(index))),
            Family::PrefetchTime => self.task_metrics(|sample| sample.prefetch_time.map(gauge)),
            Family::Prefetched => self.task_metrics(|sample| sample.prefetched.map(f64::from).map(gauge)),
            Family::Online => self.worker_metrics(|worker| worker.online.map(u8::from).map(f64::from)),
            Family::Executing => self.worker_metrics(|worker| worker.executing),
        };
        let mut gathered = proto::MetricFamily::default();
        gathered.set_name(family.name().to_owned());
        gathered.set_help(family.help().to_owned());
        gathered.set_field_type(match family.metric_type() {
            MetricType::Counter => proto::MetricType::COUNTER,
            MetricType::Gauge => proto::MetricType::GAUGE,
            MetricType::Histogram => proto::MetricType::HISTOGRAM,
        });
        gathered.set_metric(metrics);
        gathered
    }

    fn event_metrics(&self) -> Vec<proto::Metric> {
        let mut metrics = Vec::with_capacity(self.events.len());
        for (index, values) in self.task_series.iter().enumerate() {
            let (task, worker) = values.labels.split_at(values.split as usize);
            for event in self.task_events(index) {
                let mut counter = proto::Counter::default();
                counter.set_value(event.count as f64);
                let mut metric = proto::Metric::default();
                metric.set_label(labels(&format!("{task},{}{worker}", self.event_types[usize::from(event.id())])));
                metric.set_counter(counter);
                metrics.push(metric);
            }
        }
        metrics
    }

    fn task_metrics(&self, value: impl Fn(&TaskValues) -> Option<proto::Metric>) -> Vec<proto::Metric> {
        let metric = |values: &TaskValues| {
            let mut metric = value(values)?;
            metric.set_label(labels(&values.labels));
            Some(metric)
        };
        self.task_series.iter().filter_map(metric).collect()
    }

    fn worker_metrics(&self, value: impl Fn(&WorkerValues) -> Option<f64>) -> Vec<proto::Metric> {
        let metric = |worker: &WorkerValues| {
            let mut metric = gauge(value(worker)?);
            metric.set_label(labels(&worker.labels));
            Some(metric)
        };
        self.workers.iter().filter_map(metric).collect()
    }

    fn runtime_metric(&self, index: u32) -> proto::Metric {
        let (counts, sum, _) = self.histogram(index);
        let mut total = 0;
        let mut buckets = Vec::with_capacity(self.bounds.len());
        for (count, bound) in counts.iter().zip(self.bounds.iter()) {
            total += count;
            let mut bucket = proto::Bucket::default();
            bucket.set_cumulative_count(total);
            bucket.set_upper_bound(*bound);
            buckets.push(bucket);
        }
        let mut histogram = proto::Histogram::default();
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum);
        histogram.set_bucket(buckets);
        let mut metric = proto::Metric::default();
        metric.set_histogram(histogram);
        metric
    }
}

fn gauge(value: f64) -> proto::Metric {
    let mut gauge = proto::Gauge::default();
    gauge.set_value(value);
    let mut metric = proto::Metric::default();
    metric.set_gauge(gauge);
    metric
}

/// Parses an escaped label text (`name="value",…`) into labels.
fn labels(text: &str) -> Vec<proto::LabelPair> {
    let mut pairs = Vec::with_capacity(3);
    let mut rest = text;
    while let Some((name, after)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut characters = after.char_indices();
        let mut end = after.len();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    end = at + 1;
                    break;
                }
                '\\' => match characters.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, other)) => value.push(other),
                    None => {}
                },
                other => value.push(other),
            }
        }
        let mut pair = proto::LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value);
        pairs.push(pair);
        rest = after[end..].strip_prefix(',').unwrap_or(&after[end..]);
    }
    pairs
}
