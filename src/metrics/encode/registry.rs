//! Encodes the families of a `prometheus::Registry`, such as the exporter's own metrics.

use prometheus::proto;

use super::bucket_bound::format_le;
use super::{Format, sample, write_head};
use crate::metrics::family::MetricType;
use crate::metrics::label_escaping::append_escaped;

/// Appends a counter, gauge or histogram family.
pub(super) fn write_family(out: &mut Vec<u8>, format: Format, family: &proto::MetricFamily) {
    let metric_type = MetricType::of(family);
    let name = family.name();
    write_head(out, format, name, family.help(), metric_type);
    for metric in family.get_metric() {
        let labels = label_set(metric.get_label());
        match metric_type {
            MetricType::Counter => sample(out, name, "", &[&labels], metric.get_counter().get_value()),
            MetricType::Gauge => sample(out, name, "", &[&labels], metric.get_gauge().get_value()),
            MetricType::Histogram => write_histogram(out, name, &labels, metric.get_histogram()),
        }
    }
}

fn label_set(labels: &[proto::LabelPair]) -> String {
    let mut set = String::new();
    for label in labels {
        if !set.is_empty() {
            set.push(',');
        }
        append_escaped(&mut set, label.name(), label.value());
    }
    set
}

fn write_histogram(out: &mut Vec<u8>, name: &str, labels: &str, histogram: &proto::Histogram) {
    let comma = if labels.is_empty() { "" } else { "," };
    let mut bucket = |bound: f64, count: u64| {
        let le = format_le(bound);
        sample(out, name, "_bucket", &[labels, comma, "le=\"", &le, "\""], count as f64);
    };
    for finite in histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite()) {
        bucket(finite.upper_bound(), finite.cumulative_count());
    }
    bucket(f64::INFINITY, histogram.get_sample_count());
    sample(out, name, "_count", &[labels], histogram.get_sample_count() as f64);
    sample(out, name, "_sum", &[labels], histogram.get_sample_sum());
}

#[cfg(test)]
mod tests {
    use prometheus::core::Collector;
    use prometheus::{Histogram, HistogramOpts};

    use super::*;

    #[test]
    fn a_histogram_ends_with_an_inf_bucket_count_and_sum() {
        let histogram = Histogram::with_opts(HistogramOpts::new("x", "Help.").buckets(vec![0.5, 1.0])).unwrap();
        for value in [0.25, 0.75, 4.0] {
            histogram.observe(value);
        }
        let mut out = Vec::new();
        write_family(&mut out, Format::Text, &histogram.collect()[0]);
        let text = String::from_utf8(out).unwrap();
        let expected = "# HELP x Help.\n# TYPE x histogram\nx_bucket{le=\"0.5\"} 1\nx_bucket{le=\"1.0\"} 2\n\
                        x_bucket{le=\"+Inf\"} 3\nx_count 3\nx_sum 5\n";
        assert_eq!(text, expected);
    }
}
