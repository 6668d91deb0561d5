//! What holds up the event path: `cargo bench --bench hold_up`.
//!
//! Between two messages, what changed is encoded for a save, and numbers are copied for a scrape; all the rest of both
//! happens elsewhere. For saves there are 100,000 tasks and 10,000 label pairs, and 20,000 events a second come in, 5,000
//! between two saves; then the same for all of the state at once, which happens at the start and after a failed
//! save. For scrapes there are 20,000 label pairs; each slice of a copy is timed.

mod workload;

use std::time::{Duration, Instant};

use flower_exporter::ingest::SLICE;
use flower_exporter::metrics::Copying;
use flower_exporter::state::State;
use workload::{Cluster, ingest, state};

const TASKS: usize = 100_000;
const TASKS_PER_SAVE: usize = 5_000 / 4;

fn main() {
    saves();
    scrapes();
}

fn saves() {
    let cluster = Cluster { workers: 200, names: 50 };
    let mut state = state();
    state.keep_changes();
    let mut tasks = 0;
    let mut feed = |state: &mut State, count| {
        ingest(state, &cluster.bodies(tasks, count));
        tasks += count;
    };
    for _ in 0..TASKS / TASKS_PER_SAVE {
        feed(&mut state, TASKS_PER_SAVE);
    }
    drop(state.take_changes());
    println!("{} tasks, {} label pairs", state.task_count(), state.series().pair_count());
    let took = std::iter::repeat_with(|| {
        feed(&mut state, TASKS_PER_SAVE);
        save(&mut state)
    });
    report("a save of what changed", took.take(200).collect());
    let took = std::iter::repeat_with(|| {
        state.save_all();
        save(&mut state)
    });
    report("a save of everything", took.take(20).collect());
}

fn save(state: &mut State) -> Duration {
    let began = Instant::now();
    let changes = state.take_changes();
    let took = began.elapsed();
    drop(changes);
    took
}

fn scrapes() {
    let cluster = Cluster { workers: 400, names: 50 };
    let mut state = state();
    ingest(&mut state, &cluster.bodies(0, 20_000));
    println!("{} label pairs", state.series().pair_count());
    let slices = (0..200).flat_map(|_| scrape(&state));
    report("a slice of a scrape's copy", slices.collect());
}

/// How long each slice took, the first with the start and the last with the end.
fn scrape(state: &State) -> Vec<Duration> {
    let mut began = Instant::now();
    let mut copying = Copying::start(state.series());
    let mut slices = Vec::new();
    while !copying.proceed_for(state.series(), SLICE) {
        slices.push(began.elapsed());
        began = Instant::now();
    }
    let snapshot = copying.finish(state.series());
    slices.push(began.elapsed());
    drop(snapshot);
    slices
}

fn report(what: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
    println!("{what}: median {median:.2?}, at most {most:.2?} of {}", took.len());
}
