//! What the client prefers, by `Accept` and `Accept-Encoding` (RFC 9110, 12.5).

use crate::metrics::text::Format;

/// `OpenMetrics` where it is preferred, the text format otherwise: also for clients that accept neither.
pub(super) fn format(accept: &str) -> Format {
    let (mut text, mut open_metrics) = (Preference::NONE, Preference::NONE);
    for (place, item) in items(accept).enumerate() {
        let preference = |specific| Preference { q: item.q, specific, earlier: usize::MAX - place };
        match item.name.as_str() {
            "application/openmetrics-text" if item.parameter("version").is_none_or(|version| version == "1.0.0") => {
                open_metrics = open_metrics.or(preference(true));
            }
            "text/plain" => text = text.or(preference(true)),
            "text/*" | "*/*" => text = text.or(preference(false)),
            _ => {}
        }
    }
    if open_metrics.q > 0 && open_metrics > text { Format::OpenMetrics } else { Format::Text }
}

/// Whether gzip may be used.
pub(super) fn accepts_gzip(accept_encoding: &str) -> bool {
    let q = |name: &str| items(accept_encoding).find(|item| item.name == name).map(|item| item.q);
    q("gzip").or_else(|| q("x-gzip")).or_else(|| q("*")).is_some_and(|q| q > 0)
}

/// Compared by weight, then a specific name over a wildcard, then the earlier one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Preference {
    q: u16,
    specific: bool,
    earlier: usize,
}

impl Preference {
    const NONE: Self = Self { q: 0, specific: false, earlier: 0 };

    fn or(self, other: Self) -> Self {
        self.max(other)
    }
}

struct Item {
    name: String,
    parameters: Vec<(String, String)>,
    /// Thousandths.
    q: u16,
}

impl Item {
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
    fn open_metrics_only_where_it_is_preferred() {
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
    fn gzip_only_where_it_is_accepted() {
        for (accepted, expected) in [
            ("", false),
            ("identity", false),
            ("gzip", true),
            ("GZIP;q=0.1, br", true),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("br, *;q=0.5", true),
            ("gzip;q=nonsense", false),
        ] {
            assert_eq!(accepts_gzip(accepted), expected, "{accepted}");
        }
    }
}
