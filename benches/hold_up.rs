//! How long a save holds up the event path: what changed is encoded between two messages, the rest happens elsewhere.
//!
//! `cargo bench --bench save` holds 100,000 tasks and 10,000 label pairs, lets 20,000 events a second come in (5,000
//! between two saves, in batches of six), and tells how long the encoding took; then the same for all of the state at once,
//! which happens at the start and after a failed save.

use std::time::{Duration, Instant};

use flower_exporter::celery::event;
use flower_exporter::state::{Limits, State};
use serde_json::{Value, json};

const WORKERS: usize = 200;
const NAMES: usize = 50;
const TASKS: usize = 100_000;
/// At 20,000 a second, four saves a second.
const EVENTS_PER_SAVE: usize = 5_000;
const SAVES: usize = 200;
const KINDS: [&str; 4] = ["task-sent", "task-received", "task-started", "task-succeeded"];

fn main() {
    let buckets = vec![0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
    let mut state = State::new(&Limits { max_workers: 5_000, max_tasks: TASKS, max_label_pairs: 100_000, buckets });
    state.keep_changes();
    let mut events = (0..).map(nth);
    feed(&mut state, &mut events, TASKS * KINDS.len());
    drop(state.take_changes());
    println!("{} tasks and {} label pairs held", state.task_count(), state.series().pair_count());

    let mut took = Vec::new();
    let mut bytes = 0;
    for _ in 0..SAVES {
        feed(&mut state, &mut events, EVENTS_PER_SAVE);
        let began = Instant::now();
        let changes = state.take_changes();
        took.push(began.elapsed());
        bytes = changes.tasks.bytes() + changes.pairs.bytes() + changes.workers.bytes();
    }
    report(&format!("after {EVENTS_PER_SAVE} events ({} KiB)", bytes >> 10), &mut took);

    let mut took = Vec::new();
    for _ in 0..20 {
        state.save_all();
        let began = Instant::now();
        let changes = state.take_changes();
        took.push(began.elapsed());
        bytes = changes.tasks.bytes() + changes.pairs.bytes() + changes.workers.bytes();
    }
    report(&format!("all at once ({} KiB)", bytes >> 10), &mut took);
}

fn feed(state: &mut State, events: &mut impl Iterator<Item = Value>, count: usize) {
    for _ in 0..count / 6 {
        let batch: Vec<Value> = events.by_ref().take(6).collect();
        let body = serde_json::to_vec(&batch).unwrap_or_default();
        event::decode(&body, false, |event| {
            if let Ok(event) = event {
                state.apply(&event, Duration::from_secs(1));
            }
        });
    }
}

/// Tasks in all stages, on all pairs of worker and name in turn.
fn nth(number: usize) -> Value {
    let kind = number % KINDS.len();
    let task = number / KINDS.len();
    let worker = if kind == 0 { "gen1@web".to_owned() } else { format!("celery@worker-{}", task % WORKERS) };
    json!({
        "type": KINDS[kind], "hostname": worker, "uuid": format!("00000000-0000-4000-8000-{task:012x}"),
        "name": format!("project.app.tasks.{}", task / WORKERS % NAMES), "timestamp": 1.7e9 + number as f64 / 2e4,
        "eta": null, "runtime": 0.25,
    })
}

fn report(what: &str, took: &mut [Duration]) {
    took.sort_unstable();
    let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
    println!("{what}: median {median:?}, at most {most:?}");
}
