//! The fuzz targets, one module each, and their shared helpers.
//!
//! `fuzz_targets/` passes them to libFuzzer. The exporter's tests run the seeds through them (`tests/fuzz_seeds.rs`).

pub mod broker_url;
pub mod config;
pub mod envelope;
pub mod event;
pub mod http_head;
pub mod resp;
pub mod saved_state;

use std::collections::BTreeMap;
use std::sync::Arc;

use flower_exporter::metrics::SnapshotBuilder;
use flower_exporter::metrics::encode::{Exposition, Format};
use flower_exporter::state::State;

/// The password that must not be printed.
pub const SECRET: &str = "pl4nted";

const PLACEHOLDER: &str = "{secret}";

/// Replaces `{secret}` with [`SECRET`] where a list of URLs has a password: after `scheme://user:` if an `@` follows,
/// and in an element that is not a URL, because an unescaped `;` splits a password.
#[must_use]
pub fn plant(urls: &str) -> String {
    let plant_one = |url: &str| match url.split_once(PLACEHOLDER) {
        Some((before, after)) if is_password(before, after) => format!("{before}{SECRET}{after}"),
        _ => url.to_owned(),
    };
    urls.split_inclusive(';').map(plant_one).collect()
}

fn is_password(before: &str, after: &str) -> bool {
    match before.split_once("://") {
        Some((_, user)) => user.contains(':') && after.contains('@'),
        None => !after.contains("://"),
    }
}

/// Asserts that a text does not contain the secret, in any letter case.
///
/// # Panics
/// Panics if it does.
pub fn assert_no_secret(text: &str) {
    assert!(!text.to_ascii_lowercase().contains(SECRET), "printed a secret: {text}");
}

/// The exposition of a state, copied in small steps and encoded in small pieces.
///
/// # Panics
/// Panics if it is not UTF-8.
#[must_use]
pub fn exposition(state: &State, format: Format) -> String {
    let series = state.series();
    let mut builder = SnapshotBuilder::new(series);
    while !builder.step(series, 2) {}
    let mut exposition = Exposition::new(Arc::new(builder.finish(series)), format, &[]);
    let mut text = Vec::new();
    while exposition.write(&mut text, 100) {}
    String::from_utf8(text).expect("labels are UTF-8")
}

/// Parses the samples of an exposition.
///
/// # Panics
/// Panics if it violates the format or contains a series twice.
#[must_use]
pub fn samples(exposition: &str) -> BTreeMap<&str, f64> {
    assert!(exposition.ends_with('\n'));
    let mut samples = BTreeMap::new();
    for line in exposition.lines().filter(|line| !line.starts_with("# ")) {
        let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
        let (name, labels) = series.split_once('{').expect("every series has labels");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        assert_valid_labels(labels);
        assert!(line.len() < 4096, "unbounded label: {line}");
        let value = value.parse().expect("a number");
        assert!(samples.insert(series, value).is_none(), "duplicate series: {line}");
    }
    samples
}

/// Asserts that a label set is `name="value",…}`, with the escapes of the text format.
fn assert_valid_labels(labels: &str) {
    let mut rest = labels;
    loop {
        let (name, value) = rest.split_once("=\"").expect("a label has a value in quotes");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase()), "{labels}");
        rest = value;
        while !rest.starts_with('"') {
            let mut characters = rest.chars();
            let escaped = characters.next() == Some('\\');
            assert!(!escaped || matches!(characters.next(), Some('\\' | '"' | 'n')), "{labels}");
            rest = characters.as_str();
        }
        rest = &rest[1..];
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => break,
        }
    }
    assert_eq!(rest, "}", "{labels}");
}
