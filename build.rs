//! Adds the commit and the target to the version: `0.1.0 (9916b9c1d2e3, x86_64-unknown-linux-gnu)`.

use std::env;
use std::fs;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FLOWER_EXPORTER_COMMIT");
    let commit = commit_from_env().or_else(commit_from_crate).or_else(commit_from_git).unwrap_or_default();
    let commit = &commit[..commit.len().min(12)];
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let build = if commit.is_empty() { target } else { format!("{commit}, {target}") };
    println!("cargo::rustc-env=FLOWER_EXPORTER_REVISION={commit}");
    println!("cargo::rustc-env=FLOWER_EXPORTER_VERSION={} ({build})", env!("CARGO_PKG_VERSION"));
}

/// The commit in the environment, for builds without a repository, such as in a container.
fn commit_from_env() -> Option<String> {
    env::var("FLOWER_EXPORTER_COMMIT").ok().filter(|commit| is_hash(commit))
}

/// The commit that `cargo publish` recorded in the crate.
fn commit_from_crate() -> Option<String> {
    let info = fs::read_to_string(".cargo_vcs_info.json").ok()?;
    // A build of the repository may follow in the same target directory, for example after `cargo publish --dry-run`.
    println!("cargo::rerun-if-changed=.cargo_vcs_info.json");
    let (_, rest) = info.split_once("\"sha1\"")?;
    rest.split('"').nth(1).filter(|commit| is_hash(commit)).map(str::to_owned)
}

/// The commit of the repository. A crate vendored into another repository does not count, so build.rs must be tracked.
fn commit_from_git() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned())
    };
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    println!("cargo::rerun-if-changed={}", git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    git(&["rev-parse", "HEAD"]).filter(|commit| is_hash(commit))
}

fn is_hash(text: &str) -> bool {
    text.len() >= 7 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
