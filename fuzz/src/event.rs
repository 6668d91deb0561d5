//! Events and the state they update: nothing panics, gauges are never negative, and everything is bounded.
//!
//! Each line of an input is a message body. A body after `~` comes from a worker that `events.hostnames` leaves out. A
//! line `+60` advances the time by a minute, and `gap` records missing events.

use std::time::Duration;

use super::{exposition, samples};
use flower_exporter::celery::{DecodeError, Event, event};
use flower_exporter::metrics::SeriesOptions;
use flower_exporter::metrics::encode::Format;
use flower_exporter::state::{Arrival, Limits, State, Timeouts};

const WORKERS: usize = 3;
const TASKS: usize = 4;
const LABEL_SETS: usize = 6;

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(script: &[u8]) {
    let mut fixture = Fixture::new();
    for line in script.split(|byte| *byte == b'\n') {
        match line {
            b"gap" => fixture.state.record_gap(),
            [b'+', seconds @ ..] => fixture.advance(seconds),
            [b'~', body @ ..] => decode(body, |event| fixture.state.learn_metadata(event)),
            body => decode(body, |event| fixture.apply(event)),
        }
    }
    fixture.assert_valid();
}

/// Decodes a body with the fast path and without it. Both must agree on every bit of every event.
fn decode(body: &[u8], mut on_event: impl FnMut(&Event)) {
    let (mut fast, mut slow) = (Vec::new(), Vec::new());
    event::decode(body, false, |event| fast.push(summary(event)));
    event::decode_slow_path(body, true, |event| {
        slow.push(summary(event));
        if let Ok(event) = event {
            assert_eq!(event.text("hostname").as_deref(), Some(&*event.hostname));
            let _ = (event.args(), event.exception(), event.field("x"));
            on_event(event);
        }
    });
    assert_eq!(fast, slow);
}

/// All fields as text, in which `-0.0` differs from `0.0`.
fn summary(event: Result<&Event<'_>, DecodeError>) -> Result<String, DecodeError> {
    event.map(|event| {
        let text = format!("{event:?}");
        text.split_once(", raw: ").expect("the last field").0.to_owned()
    })
}

struct Fixture {
    state: State,
    now: Duration,
    task_events: f64,
}

impl Fixture {
    fn new() -> Self {
        let limits = Limits {
            max_workers: WORKERS,
            max_tasks: TASKS,
            series: SeriesOptions { max_label_sets: LABEL_SETS, bounds: vec![0.5, 1.0], ..SeriesOptions::default() },
        };
        Self { state: State::new(&limits), now: Duration::ZERO, task_events: 0.0 }
    }

    fn apply(&mut self, event: &Event) {
        self.task_events += f64::from(u8::from(event.kind.is_task()));
        self.state.apply(event, Arrival::in_order(self.now));
        assert!(self.state.worker_count() <= WORKERS);
        assert!(self.state.task_count() <= TASKS);
        // Each worker, and worker `(other)`, may have one more label set, for task `(other)`.
        assert!(self.state.series().label_set_count() <= LABEL_SETS + WORKERS + 1);
        assert!(self.state.name_count() <= LABEL_SETS + TASKS + 1);
    }

    fn advance(&mut self, seconds: &[u8]) {
        let seconds: Option<u16> = str::from_utf8(seconds).ok().and_then(|seconds| seconds.parse().ok());
        self.now += Duration::from_secs(seconds.unwrap_or_default().into());
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let timeouts = Timeouts {
            worker_timeout: seconds(60),
            purge_offline_workers: seconds(600),
            purge_stopped_workers: seconds(300),
        };
        self.state.expire(&timeouts, self.now);
    }

    fn assert_valid(&self) {
        let text = exposition(&self.state, Format::Text);
        let samples = samples(&text);
        assert!(samples.values().all(|value| *value >= 0.0), "{text}");
        let sum = |family: &str| -> f64 {
            samples.iter().filter(|(series, _)| series.starts_with(family)).map(|(_, value)| value).sum()
        };
        #[allow(clippy::cast_precision_loss, reason = "it is 4")]
        let tasks = TASKS as f64;
        assert!(sum("flower_worker_prefetched_tasks{") <= tasks, "{text}");
        assert!(sum("flower_events_total{") <= self.task_events, "{text}");
        assert!(exposition(&self.state, Format::OpenMetrics).ends_with("\n# EOF\n"));
        for task in self.state.tasks(0, TASKS + 1) {
            assert_eq!(self.state.find_task(&task.uuid).map(|found| found.state), Some(task.state));
        }
        assert!(self.state.workers_without_task_events(self.now).len() <= self.state.workers(self.now).len());
    }
}
