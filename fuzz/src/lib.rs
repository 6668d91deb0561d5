//! The fuzz targets, a module each, and what they share.
//!
//! `fuzz_targets/` gives them to libFuzzer. The exporter's own tests run the seeds through them (tests/fuzz_seeds.rs).

pub mod broker_url;
pub mod envelope;
pub mod event;
pub mod http_head;
pub mod resp;
pub mod settings;
pub mod snapshot;

use std::collections::BTreeMap;
use std::sync::Arc;

use flower_exporter::metrics::Copying;
use flower_exporter::metrics::text::{Exposition, Format};
use flower_exporter::state::State;

/// The text that must not be printed.
pub const SECRET: &str = "pl4nted";

const PLACE: &str = "{secret}";

/// Puts [`SECRET`] where a list of URLs says `{secret}` and that is part of a password: behind `scheme://user:` if an
/// `@` follows, and in a piece that is no URL, as a `;` in a password leaves behind.
#[must_use]
pub fn plant(urls: &str) -> String {
    let piece = |piece: &str| match piece.split_once(PLACE) {
        Some((before, after)) if is_password(before, after) => format!("{before}{SECRET}{after}"),
        _ => piece.to_owned(),
    };
    urls.split_inclusive(';').map(piece).collect()
}

fn is_password(before: &str, after: &str) -> bool {
    match before.split_once("://") {
        Some((_, user)) => user.contains(':') && after.contains('@'),
        None => !after.contains("://"),
    }
}

/// Panics if the secret is in a text, in letters of either case.
///
/// # Panics
/// See above.
pub fn assert_no_secret(text: &str) {
    assert!(!text.to_ascii_lowercase().contains(SECRET), "a secret is printed: {text}");
}

/// The exposition of a state, copied and written in small pieces.
///
/// # Panics
/// Where it is not UTF-8.
#[must_use]
pub fn exposition(state: &State, format: Format) -> String {
    let series = state.series();
    let mut copying = Copying::start(series);
    while !copying.proceed(series, 2) {}
    let mut exposition = Exposition::new(Arc::new(copying.finish(series)), format, &[]);
    let mut text = Vec::new();
    while exposition.write(&mut text, 100) {}
    String::from_utf8(text).expect("labels are UTF-8")
}

/// The samples of an exposition.
///
/// # Panics
/// Where it breaks the format, or has a series twice.
#[must_use]
pub fn samples(exposition: &str) -> BTreeMap<&str, f64> {
    assert!(exposition.ends_with('\n'));
    let mut samples = BTreeMap::new();
    for line in exposition.lines().filter(|line| !line.starts_with("# ")) {
        let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
        let (name, labels) = series.split_once('{').expect("each of ours has labels");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        check_labels(labels);
        assert!(line.len() < 4096, "a label is not bounded: {line}");
        let value = value.parse().expect("a number");
        assert!(samples.insert(series, value).is_none(), "twice: {line}");
    }
    samples
}

/// `name="value",…}`, with the escapes of the text format.
fn check_labels(labels: &str) {
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
