//! Settings: what is in force, or one line that says what is wrong; neither shows a password.
//!
//! An input is the file, the environment (`NAME=value` lines) and the URL file, with a line `%%` between them; `{file}`
//! stands for the path of the latter, `{secret}` for a password.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flower_exporter::settings::cli::Cli;
use flower_exporter::settings::{Error, Loaded, load_from};
use super::{SECRET, assert_no_secret, plant};

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(input: &[u8]) {
    let input = String::from_utf8_lossy(input);
    let mut parts = input.split("\n%%\n");
    let mut part = || parts.next().unwrap_or_default();
    let (file, environment, urls) = (part(), part(), part());
    FILES.with(|Files { settings, urls: url_file }| {
        url_file.write(&plant(urls));
        let prepare = |text: &str| plant_values(text).replace("{file}", &url_file.path.to_string_lossy());
        match load(settings, &prepare(file), &prepare(environment)) {
            Ok(loaded) => {
                let report = loaded.report();
                assert_no_secret(&report);
                assert_no_secret(&format!("{loaded:?}"));
                let again = load(settings, &report, "").expect("the report is a settings file");
                assert_eq!(values(&loaded), values(&again));
            }
            Err(error) => {
                let error = format!("{error}");
                assert!(!error.contains(char::is_control), "more than a line: {error}");
                assert_no_secret(&error);
            }
        }
    });
}

fn load(file: &Scratch, text: &str, environment: &str) -> Result<Loaded, Error> {
    file.write(text);
    let variables = environment.lines().filter_map(|line| line.split_once('='));
    // Another file is another input.
    let variables = variables.filter(|(name, _)| !name.ends_with("_CONFIG"));
    let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
    load_from(&Cli::default(), variables, &file.path)
}

/// Plants the secret in the values of the keys that hold one. Not in texts of several lines, where a line that looks
/// like such a key is part of another one's value.
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
        // A list of URLs, or an escape that may be a separator: not understood here.
        _ if last == "url" && !line.contains([',', '\\']) => plant(value),
        Some(key) if key.ends_with("sentinel_password") => value.replace("{secret}", SECRET),
        _ => return line.to_owned(),
    };
    format!("{name}={value}")
}

/// The report without the sources, and without what it says first: what has no effect.
fn values(loaded: &Loaded) -> Vec<String> {
    let (report, unused) = (loaded.report(), loaded.unused().len());
    let lines = report.lines().skip(unused);
    lines.map(|line| line.rsplit_once("  # ").map_or(line, |(value, _)| value).to_owned()).collect()
}

thread_local! {
    static FILES: Files = Files { settings: Scratch::new(), urls: Scratch::new() };
}

struct Files {
    settings: Scratch,
    urls: Scratch,
}

/// A file without a name, gone with the process.
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
        self.file.set_len(0).and_then(|()| self.file.write_all_at(text.as_bytes(), 0)).expect("room for it");
    }
}
