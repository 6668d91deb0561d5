//! The records of a saved state: refused, or taken, and then a state like any other.
//!
//! An input is a list of records: what it is (0 the header, 1 a worker, 2 a pair, 3 a task), its number, its length in two bytes
//! (the low one first), and its bytes.

use std::time::Duration;

use flower_exporter::celery::event;
use flower_exporter::metrics::text::Format;
use flower_exporter::state::{Changes, Corrupt, Limits, Restoring, Rows, State};
use super::{exposition, samples};

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(input: &[u8]) {
    let records = records(input);
    let Ok(mut state) = restore(&records) else { return };
    let text = exposition(&state, Format::Text);
    assert!(samples(&text).values().all(|value| *value >= 0.0), "{text}");

    state.save_all();
    let mut again = restore(&saved(&state.take_changes())).expect("what was saved can be read");
    assert_eq!(exposition(&again, Format::Text), text);
    for state in [&mut state, &mut again] {
        for task in state.tasks(0, 10) {
            let _ = state.find_task(&task.uuid);
            live(state, &task.uuid, task.worker.as_deref().unwrap_or("w"));
        }
        let _ = state.workers(Duration::ZERO);
    }
    assert_eq!(exposition(&again, Format::Text), exposition(&state, Format::Text));
    state.gap();
    let _ = state.take_changes();
}

/// The life of a task, as its worker tells it.
fn live(state: &mut State, uuid: &str, worker: &str) {
    for kind in ["received", "started", "retried", "received", "revoked", "started", "succeeded"] {
        let event = serde_json::json!({
            "type": format!("task-{kind}"), "hostname": worker, "uuid": uuid, "timestamp": 3.0, "name": "n", "runtime": 1,
        });
        event::decode(event.to_string().as_bytes(), false, |event| {
            state.apply(&event.expect("an event"), Duration::from_secs(1));
        });
    }
}

/// What, number, bytes.
type Record = (u8, u32, Vec<u8>);

fn records(mut input: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let [what, number, low, high, rest @ ..] = input {
        let (record, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
        records.push((*what, u32::from(*number), record.to_vec()));
        input = rest;
    }
    records
}

fn restore(records: &[Record]) -> Result<State, Corrupt> {
    let limits = Limits { max_workers: 3, max_tasks: 4, max_label_pairs: 6, buckets: vec![0.5, 1.0] };
    let of = |wanted: u8| records.iter().filter(move |(what, ..)| *what == wanted);
    let mut restoring = Restoring::start(&limits, of(0).next().map_or(&[], |(.., header)| header))?;
    of(1).try_for_each(|(_, number, record)| restoring.worker(*number, record))?;
    of(2).try_for_each(|(_, number, record)| restoring.pair(*number, record))?;
    of(3).try_for_each(|(_, number, record)| restoring.task(*number, record))?;
    Ok(restoring.finish())
}

fn saved(changes: &Changes) -> Vec<Record> {
    let rows = |what: u8, rows: &Rows| -> Vec<Record> {
        rows.iter().filter_map(|(number, record)| Some((what, number, record?.to_vec()))).collect()
    };
    let header = vec![(0, 0, changes.header.clone())];
    [header, rows(1, &changes.workers), rows(2, &changes.pairs), rows(3, &changes.tasks)].concat()
}
