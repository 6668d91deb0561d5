//! Configurations: loading one results in a report that loads as the same configuration, or in a one-line error.
//! Neither contains a password.
//!
//! An input is the file, the environment (`NAME=value` lines) and the URL file, separated by lines `%%`. `{file}`
//! stands for the path of the URL file, and `{secret}` for a password.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{SECRET, assert_no_secret, plant};
use flower_exporter::config::{ConfigError, LoadedConfig, Overrides, load_from};

/// Runs one input. Returns whether it is a valid configuration.
///
/// # Panics
/// Panics on a finding.
pub fn run(input: &[u8]) -> bool {
    let input = String::from_utf8_lossy(input);
    let mut parts = input.split("\n%%\n");
    let mut part = || parts.next().unwrap_or_default();
    let (file, environment, urls) = (part(), part(), part());
    FILES.with(|Files { config, urls: url_file }| {
        url_file.write(&plant(urls));
        let prepare = |text: &str| plant_values(text).replace("{file}", &url_file.path.to_string_lossy());
        match load(config, &prepare(file), &prepare(environment)) {
            Ok(loaded) => {
                let report = loaded.report();
                assert_no_secret(&report);
                assert_no_secret(&format!("{loaded:?}"));
                let reloaded = load(config, &report, "").expect("the report is a configuration file");
                assert_eq!(values(&loaded), values(&reloaded));
                true
            }
            Err(error) => {
                let error = format!("{error}");
                assert!(!error.contains(char::is_control), "error has more than one line: {error}");
                assert_no_secret(&error);
                false
            }
        }
    })
}

fn load(file: &Scratch, text: &str, environment: &str) -> Result<LoadedConfig, ConfigError> {
    file.write(text);
    let variables = environment.lines().filter_map(|line| line.split_once('='));
    // The variable for the path of the file would replace the file under test.
    let variables = variables.filter(|(name, _)| !name.ends_with("_CONFIG"));
    let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
    load_from(&Overrides::default(), variables, &file.path)
}

/// Plants the secret in the values of the keys that contain one. It skips files with multi-line strings, where a line
/// that looks like such a key may be part of the value of another key.
fn plant_values(text: &str) -> String {
    if text.contains("\"\"\"") || text.contains("'''") {
        return text.to_owned();
    }
    text.split_inclusive('\n').map(plant_value).collect()
}

fn plant_value(line: &str) -> String {
    let Some((name, value)) = line.split_once('=') else { return line.to_owned() };
    let key = name.trim().to_ascii_lowercase();
    let last = key.rsplit(['.', '_']).next().unwrap_or_default();
    let value = match key.rsplit("__").next() {
        // Lists of URLs are not supported here, nor are escapes, which may be separators.
        _ if last == "url" && !line.contains([',', '\\']) => plant(value),
        Some(key) if key.ends_with("sentinel_password") => value.replace("{secret}", SECRET),
        _ => return line.to_owned(),
    };
    format!("{name}={value}")
}

/// The report without the sources of the values and without the warnings, which come first.
fn values(loaded: &LoadedConfig) -> Vec<String> {
    let (report, warnings) = (loaded.report(), loaded.warnings().len());
    let lines = report.lines().skip(warnings);
    lines.map(|line| line.rsplit_once("  # ").map_or(line, |(value, _)| value).to_owned()).collect()
}

thread_local! {
    static FILES: Files = Files { config: Scratch::new(), urls: Scratch::new() };
}

struct Files {
    config: Scratch,
    urls: Scratch,
}

/// A temporary file without a name. It disappears with the process.
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let file = tempfile::tempfile().expect("a temporary file");
        let path = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
        Self { file, path }
    }

    fn write(&self, text: &str) {
        self.file
            .set_len(0)
            .and_then(|()| self.file.write_all_at(text.as_bytes(), 0))
            .expect("writing a temporary file succeeds");
    }
}
