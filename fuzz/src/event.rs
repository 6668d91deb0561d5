//! Events, and the state that they move: nothing panics, gauges are never negative, everything stays bounded.
//!
//! Each line of an input is a message's body; `~` before it leaves its worker out, as `events.hostnames` does. A line
//! `+60` lets a minute pass, `gap` loses events.

use std::time::Duration;

use flower_exporter::celery::{Event, Reject, event};
use flower_exporter::metrics::text::Format;
use flower_exporter::state::{Limits, State, Timeouts};
use super::{exposition, samples};

const WORKERS: usize = 3;
const TASKS: usize = 4;
const PAIRS: usize = 6;

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(script: &[u8]) {
    let mut cluster = Cluster::new();
    for line in script.split(|byte| *byte == b'\n') {
        match line {
            b"gap" => cluster.state.gap(),
            [b'+', seconds @ ..] => cluster.pass(seconds),
            [b'~', body @ ..] => decode(body, |event| cluster.state.learn_name(event)),
            body => decode(body, |event| cluster.apply(event)),
        }
    }
    cluster.check();
}

/// Reads a body with the quick reader and without, which agree on every event to the last bit.
fn decode(body: &[u8], mut each: impl FnMut(&Event)) {
    let (mut plain, mut observed) = (Vec::new(), Vec::new());
    event::decode(body, false, |event| plain.push(summary(&event)));
    event::decode_by_serde(body, true, |event| {
        observed.push(summary(&event));
        if let Ok(event) = event {
            assert_eq!(event.text("hostname").as_deref(), Some(&*event.hostname));
            let _ = (event.args(), event.exception(), event.field("x"));
            each(&event);
        }
    });
    assert_eq!(plain, observed);
}

/// Every field; `-0.0` is not `0.0` here.
fn summary(event: &Result<Event<'_>, Reject>) -> Result<String, Reject> {
    event.as_ref().map_err(|reason| *reason).map(|event| {
        let text = format!("{event:?}");
        text.split_once(", raw: ").expect("the last field").0.to_owned()
    })
}

struct Cluster {
    state: State,
    now: Duration,
    task_events: f64,
}

impl Cluster {
    fn new() -> Self {
        let limits = Limits { max_workers: WORKERS, max_tasks: TASKS, max_label_pairs: PAIRS, buckets: vec![0.5, 1.0] };
        Self { state: State::new(&limits), now: Duration::ZERO, task_events: 0.0 }
    }

    fn apply(&mut self, event: &Event) {
        self.task_events += f64::from(u8::from(event.kind.is_task()));
        self.state.apply(event, self.now);
        assert!(self.state.worker_count() <= WORKERS);
        assert!(self.state.task_count() <= TASKS);
        // Each worker, and the one beyond the bound, may have a pair under task `(other)`.
        assert!(self.state.series().pair_count() <= PAIRS + WORKERS + 1);
        assert!(self.state.name_count() <= PAIRS + TASKS + 1);
    }

    fn pass(&mut self, seconds: &[u8]) {
        let seconds: Option<u16> = str::from_utf8(seconds).ok().and_then(|seconds| seconds.parse().ok());
        self.now += Duration::from_secs(seconds.unwrap_or_default().into());
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let timeouts = Timeouts { worker_timeout: seconds(60), purge_offline_workers: seconds(600) };
        self.state.sweep(&timeouts, self.now);
    }

    fn check(&self) {
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
        assert!(self.state.mute_workers(self.now).len() <= self.state.workers(self.now).len());
    }
}
