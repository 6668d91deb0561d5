//! Measures how long saves and scrapes delay events: `cargo bench --bench latency`.
//!
//! Between two messages, the ingest loop encodes changes for a save and copies values for a scrape. All other work of
//! both runs on other threads. The saves have 100,000 tasks and 10,000 label sets, and 20,000 events per second, which
//! is 5,000 events per save. They are measured for the changes, and for the full state, which is saved at the start and
//! after a failed save. The scrapes have 20,000 label sets, and each step of the copy is measured.

mod workload;

use std::time::{Duration, Instant};

use flower_exporter::ingest::COPY_BUDGET;
use flower_exporter::metrics::SnapshotBuilder;
use flower_exporter::state::State;
use workload::{Deployment, TYPICAL, ingest, state};

const TASKS: usize = 100_000;
const TASKS_PER_SAVE: usize = 5_000 / 4;

fn main() {
    saves();
    scrapes();
}

fn saves() {
    let deployment = Deployment { workers: 200, ..TYPICAL };
    let mut state = state();
    state.track_changes();
    let mut tasks = 0;
    let mut feed = |state: &mut State, count| {
        ingest(state, &deployment.bodies(tasks, count));
        tasks += count;
    };
    for _ in 0..TASKS / TASKS_PER_SAVE {
        feed(&mut state, TASKS_PER_SAVE);
    }
    drop(state.take_changes());
    println!("{} tasks, {} label sets", state.task_count(), state.series().label_set_count());
    let durations = std::iter::repeat_with(|| {
        feed(&mut state, TASKS_PER_SAVE);
        save(&mut state)
    });
    report("save of the changes", durations.take(200).collect());
    let durations = std::iter::repeat_with(|| {
        state.require_full_save();
        save(&mut state)
    });
    report("save of the full state", durations.take(20).collect());
}

fn save(state: &mut State) -> Duration {
    let started = Instant::now();
    let delta = state.take_changes();
    let elapsed = started.elapsed();
    drop(delta);
    elapsed
}

fn scrapes() {
    let deployment = Deployment { workers: 400, ..TYPICAL };
    let mut state = state();
    ingest(&mut state, &deployment.bodies(0, 20_000));
    println!("{} label sets", state.series().label_set_count());
    let durations = (0..200).flat_map(|_| scrape(&state));
    report("step of a scrape's copy", durations.collect());
}

/// The duration of each step. The first includes the start of the copy, and the last its completion.
fn scrape(state: &State) -> Vec<Duration> {
    let mut started = Instant::now();
    let mut builder = SnapshotBuilder::new(state.series());
    let mut durations = Vec::new();
    while !builder.step_for(state.series(), COPY_BUDGET) {
        durations.push(started.elapsed());
        started = Instant::now();
    }
    let snapshot = builder.finish(state.series());
    durations.push(started.elapsed());
    drop(snapshot);
    durations
}

fn report(name: &str, mut durations: Vec<Duration>) {
    durations.sort_unstable();
    let (median, max) = (durations[durations.len() / 2], durations[durations.len() - 1]);
    println!("{name}: median {median:.2?}, maximum {max:.2?} of {}", durations.len());
}
