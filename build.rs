//! Stamps the version with the commit and the target: `0.1.0 (9916b9c1d2e3, x86_64-unknown-linux-gnu)`.

use std::env;
use std::fs;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FLOWER_EXPORTER_COMMIT");
    let commit = told().or_else(published).or_else(checked_out).unwrap_or_default();
    let commit = &commit[..commit.len().min(12)];
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let build = if commit.is_empty() { target } else { format!("{commit}, {target}") };
    println!("cargo::rustc-env=FLOWER_EXPORTER_REVISION={commit}");
    println!("cargo::rustc-env=FLOWER_EXPORTER_VERSION={} ({build})", env!("CARGO_PKG_VERSION"));
}

/// By whoever builds where there is no repository, such as in a container.
fn told() -> Option<String> {
    env::var("FLOWER_EXPORTER_COMMIT").ok().filter(|commit| is_hash(commit))
}

/// What `cargo publish` leaves in the crate.
fn published() -> Option<String> {
    let info = fs::read_to_string(".cargo_vcs_info.json").ok()?;
    // A build of the checkout may follow in the same target directory, as after `cargo publish --dry-run`.
    println!("cargo::rerun-if-changed=.cargo_vcs_info.json");
    let (_, rest) = info.split_once("\"sha1\"")?;
    rest.split('"').nth(1).filter(|commit| is_hash(commit)).map(str::to_owned)
}

/// The commit of the checkout, if this is one: a crate that lies in somebody else's repository is none.
fn checked_out() -> Option<String> {
    let git = |arguments: &[&str]| {
        let done = Command::new("git").args(arguments).output().ok().filter(|done| done.status.success())?;
        String::from_utf8(done.stdout).ok().map(|text| text.trim().to_owned())
    };
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    println!("cargo::rerun-if-changed={}", git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    git(&["rev-parse", "HEAD"]).filter(|commit| is_hash(commit))
}

fn is_hash(text: &str) -> bool {
    text.len() >= 7 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
