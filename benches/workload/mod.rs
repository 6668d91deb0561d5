//! The stream that all benchmarks use: what Celery 5 sends of tasks that are sent, received, started and succeed, in batches
//! of six, as they come from one process.

use std::time::Duration;

use base64_simd::STANDARD;
use flower_exporter::celery::{envelope, event};
use flower_exporter::state::{Limits, State};
use serde_json::{Value, json};

/// Events of a message.
pub const BATCH: usize = 6;
/// Events of a task.
const LIFE: usize = 4;

/// A cluster's size.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    pub workers: usize,
    pub names: usize,
}

/// Twenty workers that run fifty kinds of tasks: 1,000 label pairs.
pub const USUAL: Cluster = Cluster { workers: 20, names: 50 };

impl Cluster {
    /// The bodies of the messages of tasks `first..first + tasks`, each a list of events from one hostname.
    pub fn bodies(self, first: usize, tasks: usize) -> Vec<Vec<u8>> {
        let mut batches: Vec<Vec<Value>> = Vec::new();
        for task in first..first + tasks {
            for event in self.life(task) {
                let open = batches
                    .iter_mut()
                    .rev()
                    .take(4 * self.workers)
                    .find(|batch| batch.len() < BATCH && batch[0]["hostname"] == event["hostname"]);
                match open {
                    Some(batch) => batch.push(event),
                    None => batches.push(vec![event]),
                }
            }
        }
        batches.iter().map(|batch| serde_json::to_vec(batch).expect("JSON")).collect()
    }

    fn life(self, task: usize) -> [Value; LIFE] {
        let (worker, name) = (task % self.workers, task / self.workers % self.names);
        let client = format!("gen{}@web-{}", 1000 + worker, worker % 4);
        let worker = format!("celery@worker-{worker:04}.example.com");
        let name = format!("project.application.tasks.number_{name}");
        // Neither in order nor alike at their ends, as random ids.
        let uuid = uuid::Builder::from_random_bytes(
            ((task as u128 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835)).to_be_bytes(),
        );
        let uuid = uuid.into_uuid().to_string();
        let time = 1_750_000_000.123_456 + task as f64 * 0.000_731;
        let common = |kind: &str, hostname: &str, clock: usize, later: f64| {
            json!({
                "hostname": hostname, "utcoffset": 0, "pid": 4242, "clock": 4 * task + clock, "uuid": uuid,
                "timestamp": time + later, "type": kind,
            })
        };
        let with = |mut event: Value, more: Value| {
            if let (Value::Object(event), Value::Object(more)) = (&mut event, more) {
                event.extend(more);
            }
            event
        };
        [
            with(
                common("task-sent", &client, 0, 0.0),
                json!({
                    "root_id": uuid, "parent_id": null, "name": name, "args": "(17, 25)", "kwargs": "{'retry': True}",
                    "retries": 0, "eta": null, "expires": null, "queue": "celery", "exchange": "", "routing_key": "celery",
                }),
            ),
            with(
                common("task-received", &worker, 1, 0.002),
                json!({
                    "name": name, "args": "(17, 25)", "kwargs": "{'retry': True}", "root_id": uuid, "parent_id": null,
                    "retries": 0, "eta": null, "expires": null,
                }),
            ),
            common("task-started", &worker, 2, 0.013),
            with(common("task-succeeded", &worker, 3, 0.055), json!({"result": "42", "runtime": 0.042_137_5})),
        ]
    }
}

/// kombu's envelope around a body, as it comes over Redis.
pub fn enveloped(body: &[u8]) -> Vec<u8> {
    let envelope = json!({
        "body": STANDARD.encode_to_string(body), "content-encoding": "utf-8", "content-type": "application/json",
        "headers": {"hostname": "celery@worker-0001.example.com"},
        "properties": {
            "delivery_mode": 1, "delivery_info": {"exchange": "celeryev", "routing_key": "task.multi"}, "priority": 0,
            "body_encoding": "base64", "delivery_tag": "0b6a3b4e-9d3f-4a53-93a1-7b3c2d1e0f9a",
        },
    });
    serde_json::to_vec(&envelope).expect("JSON")
}

/// A state with the default bounds.
pub fn state() -> State {
    let buckets = vec![0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
    State::new(&Limits { max_workers: 5_000, max_tasks: 100_000, max_label_pairs: 100_000, buckets })
}

/// Decodes enveloped messages and counts their events.
pub fn decode(messages: &[Vec<u8>], buffer: &mut Vec<u8>) -> usize {
    let mut count = 0;
    for message in messages {
        let body = envelope::open(message, buffer).expect("an envelope");
        event::decode(&body, false, |event| count += usize::from(event.is_ok()));
    }
    count
}

/// Decodes bodies and applies their events.
pub fn ingest(state: &mut State, bodies: &[Vec<u8>]) {
    for body in bodies {
        event::decode(body, false, |event| state.apply(&event.expect("an event"), Duration::from_secs(1)));
    }
}
