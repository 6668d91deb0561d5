//! Runs the seeds of the fuzz targets, among them what fuzzing has found, without the fuzzer: `cargo test` keeps each
//! finding from coming back. `fuzz/run.sh` searches for new ones.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// The target `resp` limits the memory of the whole process, so the tests run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the target on each file in its directory of seeds.
fn run_seeds(target: &str, run: impl Fn(&[u8])) {
    let _alone = alone();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let seeds = fs::read_dir(&directory).expect("a directory of seeds").map(|entry| entry.expect("a seed").path());
    let mut count = 0;
    for seed in seeds {
        println!("{}", seed.display());
        run(&fs::read(&seed).expect("a readable seed"));
        count += 1;
    }
    assert!(count > 0, "no seeds in {}", directory.display());
}

#[test]
fn broker_url() {
    run_seeds("broker_url", |input| targets::broker_url::run(&String::from_utf8_lossy(input)));
}

#[test]
fn envelope() {
    run_seeds("envelope", targets::envelope::run);
}

#[test]
fn event() {
    run_seeds("event", targets::event::run);
}

#[test]
fn http_head() {
    run_seeds("http_head", targets::http_head::run);
}

#[test]
fn resp() {
    run_seeds("resp", targets::resp::run);
}

#[test]
fn config() {
    run_seeds("config", |input| {
        targets::config::run(input);
    });
}

/// Otherwise the fuzzer would not begin with valid files.
#[test]
fn valid_configuration_seeds_load() {
    let _alone = alone();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/config");
    for name in ["example", "every-optional-key"] {
        assert!(targets::config::run(&fs::read(directory.join(name)).expect("a seed")), "{name} is invalid");
    }
}

#[test]
fn saved_state() {
    run_seeds("saved_state", targets::saved_state::run);
}

/// Otherwise the fuzzer would begin with records of another format, which are rejected at once.
#[test]
fn saved_state_seeds_have_the_current_format() {
    let _alone = alone();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/saved_state");
    for (name, example) in targets::saved_state::examples() {
        let path = directory.join(name);
        if std::env::var_os("WRITE_SEEDS").is_some() {
            fs::write(&path, &example).expect("a writable seed");
        }
        let is_current = fs::read(&path).is_ok_and(|seed| seed == example);
        assert!(is_current, "{} is outdated: run WRITE_SEEDS=1 cargo test --test fuzz_seeds", path.display());
    }
}
