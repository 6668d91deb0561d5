//! The records of a saved state: they are rejected, or they restore a state that works like any other.
//!
//! An input is a list of records. A record is its table (0 the header, 1 a worker, 2 a label set, 3 a task), its key,
//! its length in two bytes (little-endian), and its bytes.

use std::time::Duration;

use super::{exposition, samples};
use flower_exporter::celery::event;
use flower_exporter::config::WorkerGroups;
use flower_exporter::metrics::SeriesOptions;
use flower_exporter::metrics::encode::Format;
use flower_exporter::state::{Arrival, Corrupt, Delta, Limits, RecordBatch, Restorer, State};

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(input: &[u8]) {
    let records = records(input);
    for limits in [limits(false), limits(true)] {
        if let Ok(state) = restore(&records, &limits) {
            assert_works(state, &limits);
        }
    }
}

fn assert_works(mut state: State, limits: &Limits) {
    let text = exposition(&state, Format::Text);
    assert!(samples(&text).values().all(|value| *value >= 0.0), "{text}");

    state.require_full_save();
    let mut reloaded = restore(&saved(&state.take_changes()), limits).expect("saved records can be restored");
    assert_eq!(exposition(&reloaded, Format::Text), text);
    for state in [&mut state, &mut reloaded] {
        for task in state.tasks(0, 10) {
            let _ = state.find_task(&task.uuid);
            apply_lifecycle(state, &task.uuid, task.worker.as_deref().unwrap_or("w"));
        }
        let _ = state.workers(Duration::ZERO);
    }
    assert_eq!(exposition(&reloaded, Format::Text), exposition(&state, Format::Text));
    state.record_gap();
    let _ = state.take_changes();
}

/// Inputs that restore everything, for the fuzzer to begin with, by name: without and with worker groups.
///
/// # Panics
/// Panics if a record is longer than an input can describe.
#[must_use]
pub fn examples() -> [(&'static str, Vec<u8>); 2] {
    [("workers", false), ("groups", true)].map(|(name, is_grouped)| {
        let limits = limits(is_grouped);
        let mut state = State::new(&limits);
        state.track_changes();
        state.set_time(1_764_000_000_000);
        for (worker, uuid) in [("w", "a"), ("w2", "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11"), ("x", "b"), ("beyond", "c")]
        {
            apply(&mut state, &format!(r#"{{"type":"worker-heartbeat","hostname":"{worker}","active":1,"freq":2}}"#));
            apply_lifecycle(&mut state, uuid, worker);
            apply(&mut state, &task_event("received", uuid, worker, "n2"));
        }
        let input = saved(&state.take_changes()).into_iter().flat_map(|(table, key, record)| {
            let key = u8::try_from(key).expect("few records");
            let length = u16::try_from(record.len()).expect("short records").to_le_bytes();
            [vec![table, key], length.to_vec(), record].concat()
        });
        let input: Vec<u8> = input.collect();
        assert!(restore(&records(&input), &limits).is_ok(), "{name}");
        (name, input)
    })
}

/// Applies the events of a task's lifecycle.
fn apply_lifecycle(state: &mut State, uuid: &str, worker: &str) {
    for kind in ["received", "started", "retried", "received", "revoked", "started", "succeeded"] {
        apply(state, &task_event(kind, uuid, worker, "n"));
    }
}

fn task_event(kind: &str, uuid: &str, worker: &str, name: &str) -> String {
    let event = serde_json::json!({
        "type": format!("task-{kind}"), "hostname": worker, "uuid": uuid, "timestamp": 3.0, "name": name, "runtime": 1,
    });
    event.to_string()
}

fn apply(state: &mut State, event: &str) {
    event::decode(event.as_bytes(), false, |event| {
        state.apply(event.expect("an event"), Arrival::in_order(Duration::from_secs(1)));
    });
}

fn limits(is_grouped: bool) -> Limits {
    let worker_groups = WorkerGroups::new(vec!["g=w*".to_owned()]).ok().filter(|_| is_grouped);
    Limits {
        max_workers: 3,
        max_tasks: 4,
        series: SeriesOptions { max_label_sets: 6, bounds: vec![0.5, 1.0], worker_groups, ..SeriesOptions::default() },
    }
}

/// Table, key, bytes.
type Record = (u8, u32, Vec<u8>);

fn records(mut input: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let [table, key, low, high, rest @ ..] = input {
        let (record, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
        records.push((*table, u32::from(*key), record.to_vec()));
        input = rest;
    }
    records
}

fn restore(records: &[Record], limits: &Limits) -> Result<State, Corrupt> {
    let table = |wanted: u8| records.iter().filter(move |(table, ..)| *table == wanted);
    let mut restorer = Restorer::start(limits, table(0).next().map_or(&[], |(.., header)| header))?;
    table(1).try_for_each(|(_, key, record)| restorer.worker(*key, record))?;
    table(2).try_for_each(|(_, key, record)| restorer.task_series(*key, record))?;
    table(3).try_for_each(|(_, key, record)| restorer.task(*key, record))?;
    Ok(restorer.finish())
}

fn saved(delta: &Delta) -> Vec<Record> {
    let records = |table: u8, batch: &RecordBatch| -> Vec<Record> {
        batch.iter().filter_map(|(key, record)| Some((table, key, record?.to_vec()))).collect()
    };
    let header = vec![(0, 0, delta.header.clone())];
    [header, records(1, &delta.workers), records(2, &delta.task_series), records(3, &delta.tasks)].concat()
}
