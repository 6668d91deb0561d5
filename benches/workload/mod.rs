//! The event stream of all benchmarks: tasks that are sent, received, started and succeed, as Celery 5 reports them.
//! It generates the messages deterministically, in memory and without I/O.
//!
//! A message is a batch of up to six events of one process, in the formatting of Python's `json`.

#![allow(dead_code, reason = "each benchmark compiles this module and uses a part of it")]

use std::time::Duration;

use base64_turbo::STANDARD;
use flower_exporter::celery::{envelope, event};
use flower_exporter::config::MetricsConfig;
use flower_exporter::metrics::SeriesOptions;
use flower_exporter::state::{Arrival, Limits, State};

/// Events per message.
pub const BATCH: usize = 6;
/// Events per task.
const EVENTS_PER_TASK: usize = 4;

/// Clients that send the tasks. There are few, because each has label sets of its own.
const CLIENTS: usize = 4;

/// The size of a Celery deployment.
#[derive(Clone, Copy, Debug)]
pub struct Deployment {
    pub workers: usize,
    pub names: usize,
    /// Whether runtimes differ: from 10 ms to 1 s, evenly on a logarithmic scale.
    pub varied: bool,
}

/// Twenty workers and fifty task names: 1,000 label sets.
pub const TYPICAL: Deployment = Deployment { workers: 20, names: 50, varied: false };

impl Deployment {
    /// The message bodies for tasks `first..first + tasks`. A body is a list of events from one hostname.
    pub fn bodies(self, first: usize, tasks: usize) -> Vec<Vec<u8>> {
        let mut batches: Vec<(String, Vec<String>)> = Vec::new();
        for (hostname, event) in (first..first + tasks).flat_map(|task| self.events(task)) {
            let mut open = batches.iter_mut().rev().take(4 * self.workers);
            match open.find(|(host, batch)| batch.len() < BATCH && *host == hostname) {
                Some((_, batch)) => batch.push(event),
                None => batches.push((hostname, vec![event])),
            }
        }
        batches.iter().map(|(_, batch)| format!("[{}]", batch.join(", ")).into_bytes()).collect()
    }

    /// The events of a task, each with its hostname.
    fn events(self, task: usize) -> [(String, String); EVENTS_PER_TASK] {
        let (worker, name) = (task % self.workers, task / self.workers % self.names);
        let client = format!("gen{}@web-{}", 1000 + worker % CLIENTS, worker % CLIENTS);
        let worker = format!("celery@worker-{worker:04}.example.com");
        // Like random ids, these are not in order and share no prefix or suffix.
        let uuid = uuid::Builder::from_random_bytes(
            ((task as u128 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835)).to_be_bytes(),
        );
        let uuid = uuid.into_uuid();
        let event = |kind: &str, hostname: &str, clock: usize, delay: f64, fields: &str| {
            let time = 1_750_000_000.123_456 + task as f64 * 0.000_731 + delay;
            let clock = EVENTS_PER_TASK * task + clock;
            let event = format!(
                concat!(
                    r#"{{"hostname": "{hostname}", "utcoffset": 0.0, "pid": 4242, "clock": {clock}, "uuid": "{uuid}", "#,
                    r#"{fields}"timestamp": {time}, "type": "{kind}"}}"#
                ),
                hostname = hostname,
                clock = clock,
                uuid = uuid,
                fields = fields,
                time = time,
                kind = kind
            );
            (hostname.to_owned(), event)
        };
        let name = format!(
            r#""name": "project.application.tasks.number_{name}", "args": "(17, 'someone@example.com')", "kwargs": "{{'retry': True}}", "#
        );
        let family = format!(r#""root_id": "{uuid}", "parent_id": null, "#);
        let rest = r#""retries": 0, "eta": null, "expires": null, "#;
        let runtime = if self.varied { 0.01 * 100_f64.powf((task as f64 * 0.618_034).fract()) } else { 0.042_137_5 };
        let sent = format!(r#"{family}{name}{rest}"queue": "celery", "exchange": "", "routing_key": "celery", "#);
        [
            event("task-sent", &client, 0, 0.0, &sent),
            event("task-received", &worker, 1, 0.002, &format!("{name}{family}{rest}")),
            event("task-started", &worker, 2, 0.013, ""),
            event("task-succeeded", &worker, 3, 0.055, &format!(r#""result": "42", "runtime": {runtime}, "#)),
        ]
    }
}

/// A body in kombu's envelope, as received from Redis.
pub fn enveloped(body: &[u8]) -> Vec<u8> {
    let body = STANDARD.encode(body);
    format!(
        concat!(
            r#"{{"body": "{body}", "content-encoding": "utf-8", "content-type": "application/json", "#,
            r#""headers": {{"hostname": "celery@worker-0001.example.com"}}, "properties": {{"delivery_mode": 1, "#,
            r#""delivery_info": {{"exchange": "celeryev", "routing_key": "task.multi"}}, "priority": 0, "#,
            r#""body_encoding": "base64", "delivery_tag": "0b6a3b4e-9d3f-4a53-93a1-7b3c2d1e0f9a"}}}}"#
        ),
        body = body
    )
    .into_bytes()
}

/// A state with the default limits.
pub fn state() -> State {
    state_with(SeriesOptions::default())
}

/// A state with these options and the default limits.
pub fn state_with(series: SeriesOptions) -> State {
    State::new(&Limits { max_workers: 5_000, max_tasks: 100_000, series })
}

/// What is off by default and costs something for each event: native histograms, exemplars, zeros first.
pub fn all_options() -> SeriesOptions {
    let mut config = MetricsConfig::default();
    config.native_histogram_bucket_factor = Some(1.1);
    config.exemplars = true;
    config.zero_first = Duration::from_secs(30);
    SeriesOptions::new(&config)
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
        event::decode(body, false, |event| {
            state.apply(event.expect("an event"), Arrival::in_order(Duration::from_secs(1)));
        });
    }
}
