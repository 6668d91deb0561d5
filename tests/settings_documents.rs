//! The example file and docs/configuration.md are what the settings' definitions generate.

use std::fs;
use std::path::Path;

#[allow(dead_code, reason = "the manual page uses the rest")]
#[path = "../examples/manual/settings.rs"]
mod settings;

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect("a file of the repository")
}

const REMEDY: &str = "run: cargo run --example manual -- --write";

#[test]
fn example_file_is_generated() {
    assert_eq!(read("flower-exporter.toml.example"), settings::toml(), "{REMEDY}");
}

#[test]
fn configuration_page_is_generated() {
    let page = read("docs/configuration.md");
    assert_eq!(Some(&page), settings::insert(&page).as_ref(), "{REMEDY}");
}
