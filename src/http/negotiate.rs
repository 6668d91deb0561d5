//! Content negotiation by `Accept` and `Accept-Encoding` (RFC 9110, section 12.5).

use crate::metrics::encode::Format;

/// Protobuf or `OpenMetrics` if the client prefers it, otherwise the text format, even if the client accepts none.
pub(super) fn format(accept: &str) -> Format {
    let (mut text, mut open_metrics, mut protobuf) = (Preference::NONE, Preference::NONE, Preference::NONE);
    for (position, item) in items(accept).enumerate() {
        let preference = |specific| Preference { q: item.q, specific, earliness: usize::MAX - position };
        match item.name.as_str() {
            "application/openmetrics-text" if item.parameter("version").is_none_or(|version| version == "1.0.0") => {
                open_metrics = open_metrics.max(preference(true));
            }
            "application/vnd.google.protobuf" if item.is_delimited_metric_family() => {
                protobuf = protobuf.max(preference(true));
            }
            "text/plain" => text = text.max(preference(true)),
            "text/*" | "*/*" => text = text.max(preference(false)),
            _ => {}
        }
    }
    let preferred = [(protobuf, Format::Protobuf), (open_metrics, Format::OpenMetrics)];
    let best = preferred.into_iter().filter(|(preference, _)| preference.q > 0 && *preference > text);
    best.max_by_key(|(preference, _)| *preference).map_or(Format::Text, |(_, format)| format)
}

/// Whether the client accepts gzip.
pub(super) fn accepts_gzip(accept_encoding: &str) -> bool {
    let q = |name: &str| items(accept_encoding).find(|item| item.name == name).map(|item| item.q);
    q("gzip").or_else(|| q("x-gzip")).or_else(|| q("*")).is_some_and(|q| q > 0)
}

/// Ordered by weight. With equal weights, a specific name is preferred to a wildcard, and then the earlier item.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Preference {
    q: u16,
    specific: bool,
    earliness: usize,
}

impl Preference {
    const NONE: Self = Self { q: 0, specific: false, earliness: 0 };
}

struct Item {
    name: String,
    parameters: Vec<(String, String)>,
    /// The weight in thousandths, from 0 to 1000.
    q: u16,
}

impl Item {
    /// Whether the parameters are those of Prometheus's protobuf format.
    fn is_delimited_metric_family(&self) -> bool {
        let is = |name, value| self.parameter(name).is_some_and(|found| found.eq_ignore_ascii_case(value));
        is("proto", "io.prometheus.client.MetricFamily") && is("encoding", "delimited")
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

fn items(header: &str) -> impl Iterator<Item = Item> {
    header.split(',').filter_map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().filter(|name| !name.is_empty())?.to_ascii_lowercase();
        let parameters: Vec<(String, String)> = parts
            .filter_map(|part| part.split_once('='))
            .map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().trim_matches('"').to_owned()))
            .collect();
        let q = parameters.iter().find(|(name, _)| name == "q").map_or(1.0, |(_, q)| q.parse().unwrap_or(0.0_f64));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let q = (q.clamp(0.0, 1.0) * 1000.0) as u16;
        Some(Item { name, parameters, q })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_is_used_only_if_preferred() {
        for (accept, expected) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("application/json", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text; version=1.0.0, */*", Format::OpenMetrics),
            ("*/*, application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text; version=0.0.1,text/plain;q=0.1", Format::Text),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;q=0.3, text/plain;version=0.0.4;q=0.5", Format::Text),
            ("text/plain, application/openmetrics-text", Format::Text),
            ("application/vnd.google.protobuf", Format::Text),
            ("application/vnd.google.protobuf;proto=other;encoding=delimited", Format::Text),
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text, */*;q=0.1",
                Format::Text,
            ),
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,\
                 application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::Protobuf,
            ),
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,\
                 application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.4",
                Format::OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                 application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::OpenMetrics,
            ),
        ] {
            assert_eq!(format(accept), expected, "{accept}");
        }
    }

    #[test]
    fn gzip_is_used_only_if_accepted() {
        for (accept_encoding, expected) in [
            ("", false),
            ("identity", false),
            ("gzip", true),
            ("GZIP;q=0.1, br", true),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("br, *;q=0.5", true),
            ("gzip;q=nonsense", false),
        ] {
            assert_eq!(accepts_gzip(accept_encoding), expected, "{accept_encoding}");
        }
    }
}
