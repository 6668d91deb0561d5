#![allow(clippy::needless_pass_by_value, clippy::float_cmp, reason = "inline json!() arguments, and sums of integers")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::celery::event;
use crate::config::WorkerGroups;
use crate::metrics::SnapshotBuilder;
use crate::metrics::encode::{Exposition, Format};

const SECOND: Duration = Duration::from_secs(1);

struct Fixture {
    state: State,
    now: Duration,
    may_be_late: bool,
}

impl Fixture {
    fn new() -> Self {
        Self::with_limits(|_| ())
    }

    fn with_limits(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = limits(100, 100, 100);
        change(&mut limits);
        Self::of(State::new(&limits))
    }

    fn of(state: State) -> Self {
        Self { state, now: SECOND, may_be_late: false }
    }

    fn event(&mut self, event: &Value) -> &mut Self {
        let arrival = Arrival { at: self.now, may_be_late: self.may_be_late };
        event::decode(event.to_string().as_bytes(), false, |event| self.state.apply(event.unwrap(), arrival));
        self
    }

    /// Applies a task event of uuid `id` with timestamp `time`.
    fn task(&mut self, kind: &str, worker: &str, id: &str, time: f64) -> &mut Self {
        self.task_with(kind, worker, id, time, json!({}))
    }

    fn task_with(&mut self, kind: &str, worker: &str, id: &str, time: f64, fields: Value) -> &mut Self {
        let mut event = json!({"type": format!("task-{kind}"), "hostname": worker, "uuid": id, "timestamp": time});
        if matches!(kind, "received" | "sent") {
            event["name"] = "t".into();
            event["eta"] = Value::Null;
        }
        for (key, value) in fields.as_object().unwrap() {
            event[key] = value.clone();
        }
        self.event(&event)
    }

    fn worker(&mut self, kind: &str, worker: &str, fields: Value) -> &mut Self {
        let mut event = json!({"type": format!("worker-{kind}"), "hostname": worker, "timestamp": 1.0});
        for (key, value) in fields.as_object().unwrap() {
            event[key] = value.clone();
        }
        self.event(&event)
    }

    fn advance(&mut self, seconds: u32) -> &mut Self {
        self.now += SECOND * seconds;
        let timeouts = Timeouts {
            worker_timeout: Some(SECOND * 60),
            purge_offline_workers: Some(SECOND * 600),
            purge_stopped_workers: Some(SECOND * 120),
        };
        self.state.expire(&timeouts, self.now);
        self
    }

    fn samples(&self) -> BTreeMap<String, f64> {
        let mut builder = SnapshotBuilder::new(self.state.series());
        while !builder.step(self.state.series(), 1) {}
        let snapshot = Arc::new(builder.finish(self.state.series()));
        let mut text = Vec::new();
        while Exposition::new(Arc::clone(&snapshot), Format::Text, &[]).write(&mut text, usize::MAX / 2) {}
        String::from_utf8(text)
            .unwrap()
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
            .collect()
    }

    fn prefetched(&self, worker: &str) -> Option<f64> {
        self.sample(&format!("flower_worker_prefetched_tasks{{task=\"t\",worker=\"{worker}\"}}"))
    }

    fn prefetch_time(&self, worker: &str) -> Option<f64> {
        self.sample(&format!("flower_task_prefetch_time_seconds{{task=\"t\",worker=\"{worker}\"}}"))
    }

    fn online(&self, worker: &str) -> Option<f64> {
        self.sample(&format!("flower_worker_online{{worker=\"{worker}\"}}"))
    }

    fn executing(&self, worker: &str) -> Option<f64> {
        self.sample(&format!("flower_worker_number_of_currently_executing_tasks{{worker=\"{worker}\"}}"))
    }

    fn sample(&self, series: &str) -> Option<f64> {
        self.samples().get(series).copied()
    }
}

#[test]
fn a_task_updates_the_gauges_from_received_to_succeeded() {
    let mut fixture = Fixture::new();
    fixture.task("received", "w", "a", 1.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(1.0), None));
    fixture.task("started", "w", "a", 3.5);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(2.5)));
    fixture.task_with("succeeded", "w", "a", 4.0, json!({"runtime": 0.5}));
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(0.0)));
    assert_eq!(fixture.sample(r#"flower_task_runtime_seconds_bucket{le="0.5",task="t",worker="w"}"#), Some(1.0));
}

#[test]
fn a_retried_task_keeps_the_entry_of_its_next_run() {
    let mut fixture = Fixture::new();
    fixture.task("received", "w", "a", 1.0).task("started", "w", "a", 2.0).task("received", "w", "a", 3.0);
    fixture.task("retried", "w", "a", 4.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(1.0), Some(0.0)));
    fixture.task("started", "w", "a", 5.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(2.0)));
    fixture.task("succeeded", "w", "a", 6.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(0.0)));
}

#[test]
fn a_redelivery_moves_the_entry_to_the_other_worker() {
    let mut fixture = Fixture::new();
    fixture.task("received", "v", "a", 1.0).task("received", "w", "a", 2.0).task("received", "w", "a", 2.5);
    assert_eq!((fixture.prefetched("v"), fixture.prefetched("w")), (Some(0.0), Some(1.0)));
    fixture.task("rejected", "v", "a", 3.0);
    assert_eq!(fixture.prefetched("w"), Some(1.0), "the event of another worker does not remove the entry");
}

#[test]
fn a_late_received_event_of_a_started_run_adds_no_entry() {
    let mut fixture = Fixture::new();
    fixture.task("started", "w", "a", 5.0).task("received", "w", "a", 4.0);
    assert_eq!(fixture.prefetched("w"), Some(0.0));
    fixture.task("succeeded", "w", "a", 6.0).task("received", "w", "a", 5.0);
    assert_eq!(fixture.prefetched("w"), Some(0.0));
    fixture.task("received", "w", "a", 6.5);
    assert_eq!(fixture.prefetched("w"), Some(1.0), "received for the next run");
}

#[test]
fn prefetch_time_uses_events_of_one_worker_and_is_never_negative() {
    let mut fixture = Fixture::new();
    fixture.task("received", "v", "a", 1.0).task("started", "w", "a", 9.0);
    assert_eq!((fixture.prefetch_time("v"), fixture.prefetch_time("w")), (None, Some(0.0)));
    fixture.task("received", "w", "b", 9.0).task("started", "w", "b", 8.0);
    assert_eq!(fixture.prefetch_time("w"), Some(0.0));
}

#[test]
fn revoked_removes_the_entry_and_terminated_ends_the_run() {
    let mut fixture = Fixture::new();
    fixture.task("received", "w", "a", 1.0).task("revoked", "w", "a", 2.0).task("revoked", "w", "a", 2.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), None));
    fixture.task("received", "w", "b", 1.0).task("started", "w", "b", 2.0).task("received", "w", "b", 3.0);
    fixture.task_with("revoked", "w", "b", 4.0, json!({"terminated": true}));
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(1.0), Some(0.0)));
    fixture.task("revoked", "w", "b", 5.0);
    assert_eq!(fixture.prefetched("w"), Some(0.0));
}

#[test]
fn eta_tasks_do_not_count_as_prefetched() {
    let mut fixture = Fixture::new();
    fixture.task_with("received", "w", "a", 1.0, json!({"eta": "2030-01-01T00:00:00"}));
    fixture.task("started", "w", "a", 2.0).task("succeeded", "w", "a", 3.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (None, None));
    assert_eq!(fixture.state.find_task("a").unwrap().eta.as_deref(), Some("2030-01-01T00:00:00"));
}

#[test]
fn a_worker_restart_clears_its_prefetched_tasks() {
    for restart in [("online", json!({"processed": 0})), ("heartbeat", json!({"active": 0, "processed": 4}))] {
        let mut fixture = Fixture::new();
        fixture.worker("heartbeat", "w", json!({"active": 1, "processed": 5}));
        fixture.task("received", "w", "a", 1.0).task("received", "w", "b", 1.0).task("started", "w", "b", 2.0);
        fixture.worker("heartbeat", "w", json!({"active": 1, "processed": 5}));
        assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(1.0), Some(1.0)));
        fixture.worker(restart.0, "w", restart.1);
        assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(0.0)));
        fixture.task("started", "w", "a", 5.0);
        assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(4.0)));
    }
}

#[test]
fn an_offline_worker_holds_no_entries_until_it_is_online_again() {
    let mut fixture = Fixture::new();
    fixture.worker("offline", "new", json!({"active": 2}));
    assert_eq!((fixture.online("new"), fixture.executing("new")), (Some(0.0), None));
    fixture.worker("heartbeat", "w", json!({"active": 3})).task("received", "w", "a", 1.0);
    fixture.worker("offline", "w", json!({"active": 1}));
    assert_eq!(
        (fixture.online("w"), fixture.executing("w"), fixture.prefetched("w")),
        (Some(0.0), Some(1.0), Some(0.0))
    );
    fixture.task("received", "w", "b", 1.0);
    assert_eq!(fixture.prefetched("w"), Some(0.0));
    fixture.advance(61).task("received", "w", "b", 1.0);
    assert_eq!((fixture.executing("w"), fixture.prefetched("w")), (Some(0.0), Some(0.0)));
    fixture.worker("heartbeat", "w", json!({})).task("received", "w", "b", 1.0);
    assert_eq!((fixture.online("w"), fixture.prefetched("w")), (Some(1.0), Some(1.0)));
}

#[test]
fn a_worker_times_out_is_purged_and_can_return() {
    let mut fixture = Fixture::new();
    fixture.worker("heartbeat", "w", json!({"active": 3, "freq": 2.0})).task("received", "w", "a", 1.0);
    fixture.advance(59);
    assert_eq!(fixture.online("w"), Some(1.0));
    fixture.task("progress", "w", "a", 2.0).advance(59);
    assert_eq!(fixture.online("w"), Some(1.0), "any event resets the timeout");
    fixture.advance(1);
    assert_eq!(
        (fixture.online("w"), fixture.executing("w"), fixture.prefetched("w")),
        (Some(0.0), Some(0.0), Some(0.0))
    );
    fixture.task("started", "w", "a", 3.0);
    assert_eq!(fixture.online("w"), Some(0.0), "only worker events set the gauge to 1");
    fixture.advance(599);
    assert!(!fixture.samples().is_empty());
    fixture.advance(1);
    assert_eq!(fixture.samples(), BTreeMap::new());
    fixture.worker("heartbeat", "w", json!({})).task("succeeded", "w", "a", 9.0);
    assert_eq!((fixture.online("w"), fixture.prefetch_time("w")), (Some(1.0), Some(0.0)));
}

#[test]
fn a_worker_that_stopped_on_purpose_is_purged_earlier() {
    let mut fixture = Fixture::new();
    for worker in ["stopped", "lost", "back"] {
        fixture.worker("heartbeat", worker, json!({"active": 0}));
    }
    fixture.worker("offline", "stopped", json!({})).worker("offline", "back", json!({}));
    fixture.advance(1).task("succeeded", "stopped", "a", 1.0).worker("heartbeat", "back", json!({}));
    fixture.advance(119);
    assert_eq!([fixture.online("stopped"), fixture.online("lost"), fixture.online("back")], [Some(0.0); 3]);
    fixture.advance(1);
    assert_eq!(
        [fixture.online("stopped"), fixture.online("lost"), fixture.online("back")],
        [None, Some(0.0), Some(0.0)]
    );
    fixture.advance(479);
    assert_eq!([fixture.online("lost"), fixture.online("back")], [None, Some(0.0)]);
    fixture.advance(1);
    assert_eq!(fixture.samples(), BTreeMap::new());
}

#[test]
fn a_long_heartbeat_interval_extends_the_timeout() {
    let mut fixture = Fixture::new();
    fixture.worker("heartbeat", "w", json!({"active": 0, "freq": 40})).advance(119);
    assert_eq!(fixture.online("w"), Some(1.0));
    fixture.worker("heartbeat", "w", json!({"freq": 5})).advance(119);
    assert_eq!(fixture.online("w"), Some(1.0), "the freq in a broadcast reply is ignored");
    fixture.advance(1);
    assert_eq!(fixture.online("w"), Some(0.0));
}

#[test]
fn invalid_values_are_ignored() {
    let mut fixture = Fixture::new();
    fixture.worker("online", "w", json!({"active": 3}));
    assert_eq!(fixture.executing("w"), None);
    for active in [json!("3"), json!(true), json!(-1), json!(null)] {
        fixture.worker("heartbeat", "w", json!({"active": active}));
        assert_eq!(fixture.executing("w"), None);
    }
    for runtime in [json!("3"), json!(true), json!(-1), json!(null), json!(0)] {
        fixture.task_with("succeeded", "w", "a", 1.0, json!({"runtime": runtime}));
    }
    assert_eq!(fixture.samples().keys().filter(|name| name.contains("runtime")).count(), 0);
}

#[test]
fn a_task_name_applies_to_later_events_of_the_task() {
    let mut fixture = Fixture::new();
    fixture.task("started", "w", "a", 1.0).task("sent", "gen1@h", "a", 0.5);
    fixture.task_with("received", "w", "a", 0.6, json!({"name": null}));
    fixture.task_with("progress", "w", "a", 2.0, json!({"name": "custom", "eta": "x", "runtime": 5}));
    fixture.task("succeeded", "w", "a", 2.0);
    let count = |kind: &str, task: &str| {
        fixture.sample(&format!("flower_events_total{{task=\"{task}\",type=\"task-{kind}\",worker=\"w\"}}"))
    };
    assert_eq!(count("started", ""), Some(1.0));
    assert_eq!(count("received", "t"), Some(1.0));
    assert_eq!(count("progress", "custom"), Some(1.0));
    assert_eq!(count("succeeded", "t"), Some(1.0));
    assert_eq!(fixture.samples().keys().filter(|name| name.contains("runtime")).count(), 0);
}

#[test]
fn event_totals_are_exact_beyond_the_limits() {
    let mut fixture = Fixture::with_limits(|limits| {
        limits.max_workers = 2;
        limits.series.max_label_sets = 4;
        limits.max_tasks = 3;
    });
    for worker in ["v", "w", "x"] {
        for id in 0..50 {
            let name = json!({"name": format!("name{id}")});
            fixture.task_with("received", worker, &format!("{worker}{id}"), 1.0, name);
        }
    }
    for kind in 0..100 {
        fixture.task(&format!("custom{kind}"), "v", "v0", 1.0);
    }
    let samples = fixture.samples();
    let events: Vec<_> = samples.iter().filter(|(name, _)| name.starts_with("flower_events_total")).collect();
    assert_eq!(events.iter().map(|(_, count)| **count).sum::<f64>(), 250.0);
    assert_eq!(events.iter().filter(|(name, _)| name.contains(r#"worker="x""#)).count(), 0);
    assert_eq!(samples[r#"flower_events_total{task="(other)",type="task-received",worker="(other)"}"#], 50.0);
    assert_eq!(events.iter().filter(|(name, _)| name.contains(r#"type="(other)""#)).count(), 1);
    assert_eq!((fixture.state.task_count(), fixture.state.worker_count()), (3, 2));
    assert!(fixture.state.name_count() <= 3 + 4 + 1);
}

#[test]
fn clients_are_evicted_before_offline_workers() {
    let mut fixture = Fixture::with_limits(|limits| limits.max_workers = 3);
    fixture.worker("heartbeat", "live", json!({})).worker("offline", "offline", json!({}));
    fixture.task("sent", "gen1@h", "a", 1.0).task("sent", "gen2@h", "b", 1.0);
    let tracked = |fixture: &Fixture| -> Vec<String> {
        let hostnames = ["live", "offline", "gen1@h", "gen2@h", "new"];
        let is_tracked =
            |name: &&&str| fixture.samples().keys().any(|series| series.contains(&format!("worker=\"{name}\"")));
        hostnames.iter().filter(is_tracked).map(|name| (*name).to_owned()).collect()
    };
    assert_eq!(tracked(&fixture), ["live", "offline", "gen2@h"]);
    fixture.worker("heartbeat", "new", json!({}));
    assert_eq!(tracked(&fixture), ["live", "offline", "new"]);
    fixture.task("sent", "gen1@h", "a", 1.0);
    assert_eq!(tracked(&fixture), ["live", "gen1@h", "new"]);
}

#[test]
fn a_full_table_evicts_workers_that_go_offline_or_time_out() {
    let mut fixture = Fixture::with_limits(|limits| limits.max_workers = 2);
    fixture.worker("heartbeat", "a", json!({})).worker("heartbeat", "b", json!({})).worker("heartbeat", "c", json!({}));
    assert_eq!(fixture.online("c"), None);
    fixture.worker("offline", "a", json!({})).worker("heartbeat", "c", json!({})).worker("heartbeat", "d", json!({}));
    assert_eq!((fixture.online("a"), fixture.online("c"), fixture.online("d")), (None, Some(1.0), None));
    fixture.advance(61).worker("heartbeat", "d", json!({})).worker("heartbeat", "e", json!({}));
    assert_eq!((fixture.online("d"), fixture.online("e")), (Some(1.0), Some(1.0)));
}

#[test]
fn finished_tasks_are_evicted_first_and_evictions_update_the_gauges() {
    let mut fixture = Fixture::with_limits(|limits| limits.max_tasks = 2);
    fixture.task("received", "w", "a", 1.0).task("received", "w", "b", 1.0).task("started", "w", "b", 3.0);
    fixture.task("succeeded", "w", "b", 4.0).task("received", "w", "c", 1.0);
    assert_eq!((fixture.state.find_task("b"), fixture.prefetched("w")), (None, Some(2.0)));
    fixture.task("started", "w", "c", 5.0).task("received", "w", "d", 1.0);
    assert_eq!((fixture.state.find_task("a"), fixture.prefetched("w")), (None, Some(1.0)));
    fixture.task("received", "w", "e", 1.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(2.0), Some(0.0)));
}

#[test]
fn a_gap_clears_the_prefetched_tasks_of_every_worker() {
    let mut fixture = Fixture::new();
    fixture.task("received", "v", "a", 1.0).task("received", "w", "b", 1.0);
    fixture.state.record_gap();
    assert_eq!((fixture.prefetched("v"), fixture.prefetched("w")), (Some(0.0), Some(0.0)));
    fixture.task("revoked", "v", "a", 2.0).task("received", "v", "c", 2.0);
    assert_eq!(fixture.prefetched("v"), Some(1.0));
}

#[test]
fn a_live_worker_is_not_purged_before_its_timeout() {
    let mut fixture = Fixture::new();
    fixture.worker("heartbeat", "w", json!({"active": 1, "freq": 300.0}));
    fixture.advance(700);
    assert_eq!(fixture.online("w"), Some(1.0));
    fixture.advance(250);
    assert_eq!(fixture.online("w"), None);
}

#[test]
fn an_idle_heartbeat_ends_the_runs_that_began_before_it() {
    let mut fixture = Fixture::with_limits(|limits| limits.max_tasks = 2);
    let heartbeat = |active: u32, time: f64| json!({"active": active, "timestamp": time});
    fixture.task("received", "w", "a", 1.0).task("started", "w", "a", 3.0).worker("heartbeat", "w", heartbeat(0, 3.0));
    assert_eq!(fixture.prefetch_time("w"), Some(2.0), "a heartbeat may overtake earlier task events");
    fixture.worker("heartbeat", "w", heartbeat(1, 4.0)).worker("heartbeat", "v", heartbeat(0, 4.0));
    assert_eq!(fixture.prefetch_time("w"), Some(2.0));
    fixture.worker("heartbeat", "w", heartbeat(0, 5.0));
    assert_eq!(fixture.prefetch_time("w"), Some(0.0));
    fixture.task("received", "w", "b", 6.0).task("started", "w", "b", 6.5).task("succeeded", "w", "a", 7.0);
    assert_eq!(fixture.prefetch_time("w"), Some(0.5), "the run of a had ended before b started");
    fixture.worker("heartbeat", "w", heartbeat(0, 6.0));
    assert_eq!(fixture.prefetch_time("w"), Some(0.5), "b started after the heartbeat");
}

#[test]
fn a_run_that_began_before_an_idle_heartbeat_does_not_end_a_later_one() {
    let mut fixture = Fixture::with_limits(|limits| limits.max_tasks = 2);
    fixture.task("received", "w", "a", 1.0).task("started", "w", "a", 3.0);
    fixture.worker("heartbeat", "w", json!({"active": 0, "timestamp": 5.0}));
    fixture.task("received", "w", "b", 6.0).task("started", "w", "b", 7.0).task("received", "w", "c", 8.0);
    assert_eq!((fixture.state.find_task("a"), fixture.prefetch_time("w")), (None, Some(1.0)), "a was evicted");
    fixture.task("received", "w", "d", 1.0).task("started", "w", "d", 2.0);
    assert_eq!(fixture.prefetch_time("w"), Some(1.0), "the clock of w stepped back");
    fixture.task("succeeded", "w", "d", 2.5);
    assert_eq!(fixture.prefetch_time("w"), Some(0.0));
}

#[test]
fn a_late_started_event_of_a_run_that_has_ended_is_ignored() {
    let mut fixture = Fixture::new();
    fixture.task("received", "w", "a", 1.0).task("succeeded", "w", "a", 4.0).task("started", "w", "a", 3.0);
    assert_eq!((fixture.prefetched("w"), fixture.prefetch_time("w")), (Some(0.0), Some(0.0)));
    fixture.task("received", "w", "a", 2.0);
    assert_eq!(fixture.prefetched("w"), Some(0.0), "it started later");
    fixture.task("received", "w", "a", 5.0).task("started", "w", "a", 6.0);
    assert_eq!(fixture.prefetch_time("w"), Some(1.0), "the next run");
    fixture.task("retried", "w", "a", 7.0).task("received", "v", "a", 1.0).task("started", "v", "a", 2.0);
    assert_eq!((fixture.prefetch_time("w"), fixture.prefetch_time("v")), (Some(0.0), Some(1.0)), "another clock");
}

#[test]
fn a_worker_event_that_may_be_late_has_no_effect_if_it_is_older_than_the_last_one() {
    let mut fixture = Fixture::new();
    let late = |fixture: &mut Fixture, kind: &str, time: f64| {
        fixture.may_be_late = true;
        fixture.worker(kind, "w", json!({"timestamp": time, "active": 9})).may_be_late = false;
    };
    late(&mut fixture, "heartbeat", 5.0);
    assert_eq!(fixture.executing("w"), Some(9.0), "the first event of the worker");
    fixture.worker("heartbeat", "w", json!({"timestamp": 10.0, "active": 1})).task("received", "w", "a", 11.0);
    for kind in ["offline", "online", "heartbeat"] {
        late(&mut fixture, kind, 10.5);
        assert_eq!((fixture.online("w"), fixture.executing("w")), (Some(1.0), Some(1.0)), "{kind}");
        assert_eq!(fixture.prefetched("w"), Some(1.0), "{kind}");
    }
    fixture.may_be_late = true;
    fixture.task("started", "w", "a", 9.0);
    late(&mut fixture, "offline", 10.5);
    assert_eq!(fixture.online("w"), Some(1.0), "an older task event does not turn the clock back");
    late(&mut fixture, "offline", 12.0);
    assert_eq!(fixture.online("w"), Some(0.0));
    fixture.worker("online", "w", json!({"timestamp": 2.0}));
    assert_eq!(fixture.online("w"), Some(1.0), "in order: the clock has stepped back");
    late(&mut fixture, "heartbeat", 3.0);
    assert_eq!(fixture.executing("w"), Some(9.0));
}

#[test]
fn a_worker_that_processes_tasks_without_task_events_is_reported() {
    let mut fixture = Fixture::new();
    let heartbeat = |fixture: &mut Fixture, processed: u32| -> bool {
        fixture.worker("heartbeat", "w", json!({"active": 1, "processed": processed}));
        fixture.now += SECOND * 40;
        !fixture.state.workers_without_task_events(fixture.now).is_empty()
    };
    assert!([5, 5, 5].iter().all(|processed| !heartbeat(&mut fixture, *processed)), "idle");
    assert!(heartbeat(&mut fixture, 6));
    fixture.task("received", "w", "a", 1.0);
    assert!(!heartbeat(&mut fixture, 7));
    assert!(heartbeat(&mut fixture, 8));
    fixture.state.record_gap();
    assert!(
        [8, 8, 8].iter().all(|processed| !heartbeat(&mut fixture, *processed)),
        "its task events may be in the gap"
    );
}

#[test]
fn task_info_and_worker_info_contain_the_reported_values() {
    let mut fixture = Fixture::new();
    let uuid = "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11";
    fixture.worker(
        "online",
        "w",
        json!({"freq": 2, "active": 0, "processed": 7, "loadavg": [1, 2.5, 3],
        "sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux"}),
    );
    fixture.task("sent", "gen1@h", uuid, 1.0).task_with("received", "w", uuid, 2.0, json!({"retries": 2}));
    fixture.task("started", "w", uuid, 3.0).task_with("succeeded", "w", uuid, 5.0, json!({"runtime": 2.0}));
    let task = fixture.state.find_task(uuid).unwrap();
    assert_eq!((task.uuid.as_str(), task.name.as_str(), task.state), (uuid, "t", TaskState::Succeeded));
    let times = [task.sent, task.received, task.started, task.ended];
    assert_eq!(
        times.map(|time| time?.duration_since(UNIX_EPOCH).ok()),
        [1, 2, 3, 5].map(|s| Some(Duration::from_secs(s)))
    );
    assert_eq!((task.runtime, task.retries, task.worker.as_deref()), (Some(SECOND * 2), 2, Some("w")));
    assert_eq!(fixture.state.tasks(0, 10), [task]);
    let workers = fixture.state.workers(fixture.now);
    assert_eq!(workers.len(), 1, "clients are not workers");
    assert_eq!((workers[0].online, workers[0].processed, workers[0].loadavg), (true, Some(7.0), Some([1.0, 2.5, 3.0])));
    assert_eq!(workers[0].sw_ver.as_deref(), Some("5.7.0"));
    assert_eq!(workers[0].events.len(), 4);
}

#[test]
fn unusual_task_ids_are_distinct_and_bounded() {
    assert_eq!(TaskId::new("8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11").to_string(), "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11");
    let distinct = [
        "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11",
        "8F3C1F5E-6A52-4C6A-9D3F-0D7C3B1F7A11",
        "8f3c1f5e6a524c6a9d3f0d7c3b1f7a11",
        "{8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11}",
        "",
    ];
    let ids: std::collections::HashSet<TaskId> = distinct.iter().map(|text| TaskId::new(text)).collect();
    assert_eq!(ids.len(), distinct.len());
    let (one, other) = (TaskId::new(&"x".repeat(1 << 20)), TaskId::new(&"x".repeat((1 << 20) + 1)));
    assert_ne!(one, other);
    assert!(one.to_string().len() <= 256);
    assert_eq!(TaskId::new(&one.to_string()), one, "a lookup by the stored id");
}

fn any_event() -> impl Strategy<Value = Value> {
    let kinds = [
        "task-sent",
        "task-received",
        "task-started",
        "task-succeeded",
        "task-failed",
        "task-retried",
        "task-revoked",
        "task-rejected",
        "task-cancelled",
        "task-progress",
        "worker-online",
        "worker-heartbeat",
        "worker-offline",
    ];
    let fields = (0..5_u8, 0..6_u8, 0..4_u8, 0..50_u8, any::<bool>(), any::<bool>());
    (proptest::sample::select(kinds.to_vec()), fields).prop_map(|(kind, (worker, id, name, time, eta, flag))| {
        let mut event = json!({"type": kind, "hostname": format!("w{worker}"), "timestamp": f64::from(time) - 5.0,
            "uuid": format!("id{id}"), "terminated": flag,
            "runtime": if time == 39 { 1.7e308 } else { f64::from(time) - 10.0 },
            "active": time, "processed": time, "freq": time});
        if name > 0 {
            event["name"] = format!("n{name}").into();
            event["eta"] = if eta { "2030-01-01".into() } else { Value::Null };
        }
        event
    })
}

/// The contents of the state file.
#[derive(Clone, Default)]
struct Saved {
    header: Vec<u8>,
    tables: [BTreeMap<u32, Vec<u8>>; 3],
}

impl Saved {
    fn save(&mut self, state: &mut State) {
        let delta = state.take_changes();
        assert!(!state.has_changes());
        if delta.is_full {
            self.tables = Default::default();
        }
        self.header.clone_from(&delta.header);
        for (table, batch) in self.tables.iter_mut().zip([&delta.workers, &delta.task_series, &delta.tasks]) {
            for (key, record) in batch.iter() {
                match record {
                    Some(record) => drop(table.insert(key, record.to_vec())),
                    None => drop(table.remove(&key)),
                }
            }
        }
    }

    fn restore(&self, limits: &Limits) -> Result<State, Corrupt> {
        let mut restorer = Restorer::start(limits, &self.header)?;
        let [workers, task_series, tasks] = &self.tables;
        workers.iter().try_for_each(|(key, record)| restorer.worker(*key, record))?;
        task_series.iter().try_for_each(|(key, record)| restorer.task_series(*key, record))?;
        tasks.iter().try_for_each(|(key, record)| restorer.task(*key, record))?;
        Ok(restorer.finish())
    }
}

fn limits(max_workers: usize, max_tasks: usize, max_label_sets: usize) -> Limits {
    Limits {
        max_workers,
        max_tasks,
        series: SeriesOptions { max_label_sets, bounds: vec![0.5, 1.0], ..SeriesOptions::default() },
    }
}

#[test]
fn changed_buckets_discard_the_saved_histograms() {
    let mut fixture = Fixture::new();
    fixture.state.track_changes();
    fixture.task_with("succeeded", "w", "a", 1.0, json!({"runtime": 0.7}));
    let mut saved = Saved::default();
    saved.save(&mut fixture.state);
    let mut changed = limits(100, 100, 100);
    changed.series.bounds = vec![0.25];
    let fixture = Fixture::of(saved.restore(&changed).unwrap());
    assert!(fixture.samples().keys().all(|name| !name.contains("runtime")));
    assert!(fixture.samples().keys().any(|name| name.contains("events_total")));
    assert!(fixture.state.has_changes(), "the next save contains the new buckets");
}

#[test]
fn native_histograms_survive_a_restart_unless_they_were_off() {
    let limits = |native_schema| {
        let mut limits = limits(100, 100, 100);
        limits.series.native_schema = native_schema;
        limits
    };
    let protobuf = |state: &State| {
        let mut builder = SnapshotBuilder::new(state.series());
        while !builder.step(state.series(), 1) {}
        let mut out = Vec::new();
        let snapshot = Arc::new(builder.finish(state.series()));
        while Exposition::new(Arc::clone(&snapshot), Format::Protobuf, &[]).write(&mut out, usize::MAX / 2) {}
        out
    };
    let mut fixture = Fixture::of(State::new(&limits(Some(3))));
    fixture.state.track_changes();
    for (id, runtime) in [("a", 1e-9), ("b", 0.7), ("c", 1e9)] {
        fixture.task_with("succeeded", "w", id, 1.0, json!({"runtime": runtime}));
    }
    let mut saved = Saved::default();
    saved.save(&mut fixture.state);
    let restored = saved.restore(&limits(Some(3))).unwrap();
    assert_eq!(protobuf(&restored), protobuf(&fixture.state));
    let count = |state| Fixture::of(state).sample(r#"flower_task_runtime_seconds_count{task="",worker="w"}"#);
    assert_eq!(count(saved.restore(&limits(Some(-4))).unwrap()), Some(3.0), "a lower resolution");
    let mut off = saved.restore(&limits(None)).unwrap();
    assert!(protobuf(&off).len() < protobuf(&fixture.state).len());
    saved.save(&mut off);
    assert_eq!(count(off), Some(3.0), "the classic buckets continue");
    assert_eq!(count(saved.restore(&limits(Some(3))).unwrap()), None, "the native buckets of three runs are unknown");
}

#[test]
fn a_lower_max_tasks_keeps_the_newest_tasks() {
    let mut fixture = Fixture::new();
    fixture.state.track_changes();
    for second in 0..50 {
        fixture.task("received", "w", &format!("t{second}"), f64::from(second));
    }
    let mut saved = Saved::default();
    saved.save(&mut fixture.state);
    let mut state = saved.restore(&limits(100, 10, 100)).unwrap();
    assert_eq!(state.task_count(), 10);
    assert!(state.find_task("t39").is_none() && state.find_task("t40").is_some() && state.find_task("t49").is_some());
    saved.save(&mut state);
    assert_eq!(saved.tables[2].len(), 10, "the file does not contain the dropped tasks");
    let samples = Fixture::of(state).samples();
    assert_eq!(samples[r#"flower_worker_prefetched_tasks{task="t",worker="w"}"#], 10.0);
}

#[test]
fn inconsistent_records_are_rejected() {
    let mut fixture = Fixture::new();
    fixture.state.track_changes();
    fixture.task("received", "w", "a", 1.0).task("received", "v", "b", 1.0);
    let mut saved = Saved::default();
    saved.save(&mut fixture.state);
    let limits = limits(100, 100, 100);
    let assert_rejected = |change: fn(&mut Saved)| {
        let mut saved = saved.clone();
        change(&mut saved);
        assert!(saved.restore(&limits).is_err());
    };
    assert!(saved.restore(&limits).is_ok());
    assert_rejected(|saved| saved.header.clear());
    assert_rejected(|saved| saved.header.push(0));
    for table in 0..3_usize {
        let mut changed = saved.clone();
        let record = changed.tables[table][&0].clone();
        changed.tables[table].insert(7, record);
        assert!(changed.restore(&limits).is_err(), "duplicate record in table {table}");
    }
    assert_rejected(|saved| drop(saved.tables[0].remove(&0)));
    assert_rejected(|saved| drop(saved.tables[1].remove(&0)));
    assert_rejected(|saved| saved.tables[2].get_mut(&0).unwrap().truncate(5));
}

fn with_groups(worker_groups: Option<WorkerGroups>, mut limits: Limits) -> Limits {
    limits.series.worker_groups = worker_groups;
    limits
}

fn groups(entries: &[&str]) -> WorkerGroups {
    WorkerGroups::new(entries.iter().map(|entry| (*entry).to_owned()).collect()).unwrap()
}

fn any_groups() -> impl Strategy<Value = Option<WorkerGroups>> {
    let choices: [&[&str]; 3] = [&["g=w[0-2]"], &["(x)=w0", "g=w*"], &["w1=w3|w4"]];
    proptest::option::of(proptest::sample::select(choices.to_vec()).prop_map(groups))
}

#[test]
fn the_members_of_a_group_share_the_series_of_tasks_only() {
    let mut fixture = Fixture::with_limits(|limits| limits.series.worker_groups = Some(groups(&["g=w?"])));
    fixture.worker("heartbeat", "w1", json!({"active": 1})).worker("heartbeat", "w2", json!({"active": 2}));
    for (worker, id) in [("w1", "a"), ("w2", "b"), ("w1", "c"), ("g", "d"), ("x", "e")] {
        fixture.task("received", worker, id, 1.0);
    }
    assert_eq!((fixture.prefetched("g"), fixture.prefetched("x")), (Some(4.0), Some(1.0)));
    assert_eq!(
        (fixture.executing("w1"), fixture.executing("w2"), fixture.executing("g")),
        (Some(1.0), Some(2.0), None)
    );
    fixture.worker("online", "w1", json!({}));
    assert_eq!(fixture.prefetched("g"), Some(2.0), "only the tasks of the worker that has restarted are gone");
    let received = r#"flower_events_total{task="t",type="task-received",worker="g"}"#;
    assert_eq!(
        (fixture.sample(received), fixture.samples().keys().any(|name| name.contains("w1\",task"))),
        (Some(4.0), false)
    );
    fixture.advance(60).advance(600);
    assert_eq!((fixture.state.worker_count(), fixture.online("w1")), (0, None));
    assert_eq!((fixture.prefetched("g"), fixture.sample(received)), (Some(0.0), Some(4.0)), "counters of a group stay");
}

#[test]
fn the_prefetch_time_of_a_group_is_the_last_one_set() {
    let mut fixture = Fixture::with_limits(|limits| limits.series.worker_groups = Some(groups(&["g=w?"])));
    for (worker, id, start) in [("w1", "a", 3.0), ("w2", "b", 8.0)] {
        fixture.task("received", worker, id, 1.0).task("started", worker, id, start);
    }
    assert_eq!(fixture.prefetch_time("g"), Some(7.0));
    fixture.task("succeeded", "w1", "a", 9.0).worker("online", "w1", json!({}));
    assert_eq!(fixture.prefetch_time("g"), Some(7.0), "another member has set it since");
    fixture.task("received", "w1", "c", 9.0).task("started", "w1", "c", 10.0);
    assert_eq!(fixture.prefetch_time("g"), Some(1.0));
    fixture.task("succeeded", "w2", "b", 11.0).worker("heartbeat", "w2", json!({"active": 0, "timestamp": 12.0}));
    assert_eq!(fixture.prefetch_time("g"), Some(1.0));
    fixture.worker("heartbeat", "w1", json!({"active": 0, "timestamp": 13.0}));
    assert_eq!(fixture.prefetch_time("g"), Some(0.0));
}

#[test]
fn a_hostname_beyond_the_limit_is_counted_in_its_group() {
    let mut fixture = Fixture::with_limits(|limits| {
        limits.series.worker_groups = Some(groups(&["g=w?"]));
        limits.max_workers = 1;
    });
    fixture.worker("heartbeat", "live", json!({})).task("received", "w1", "a", 1.0).task("received", "x", "b", 1.0);
    let received = |worker: &str| {
        fixture.sample(&format!(r#"flower_events_total{{task="t",type="task-received",worker="{worker}"}}"#))
    };
    assert_eq!((received("g"), received(OTHER)), (Some(1.0), Some(1.0)));
}

#[test]
fn changed_groups_discard_the_saved_series_of_tasks() {
    let limits = |entries| with_groups(entries, limits(100, 100, 100));
    let some = |entry| Some(groups(&[entry]));
    for (before, after) in [(some("g=w"), some("h=w")), (None, some("g=w")), (some("g=w"), None)] {
        let mut fixture = Fixture::of(State::new(&limits(before)));
        fixture.state.track_changes();
        fixture.worker("heartbeat", "w", json!({"active": 1}));
        fixture.task("received", "w", "a", 1.0).task("received", "w", "b", 1.0).task("started", "w", "b", 2.0);
        let mut saved = Saved::default();
        saved.save(&mut fixture.state);
        let mut fixture = Fixture::of(saved.restore(&limits(after.clone())).unwrap());
        assert_eq!(fixture.samples().len(), 2, "the gauges of the worker");
        assert_eq!((fixture.online("w"), fixture.state.task_count()), (Some(1.0), 2));
        saved.save(&mut fixture.state);
        assert!(saved.tables[1].is_empty(), "the file does not contain the old series");
        fixture.task("started", "w", "a", 3.0).task("succeeded", "w", "b", 4.0);
        assert!(fixture.samples().values().all(|value| *value >= 0.0));
        assert!(saved.restore(&limits(after)).is_ok());
    }
}

/// The samples of the families with the labels worker and task, without the label worker: their sums.
fn sums(fixture: &Fixture) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for (series, value) in fixture.samples() {
        if series.contains("task=") && !series.starts_with("flower_task_prefetch_time_seconds") {
            let (start, rest) = series.split_once(r#"worker=""#).unwrap();
            let (_, end) = rest.split_once('"').unwrap();
            *sums.entry(format!("{start}{end}")).or_default() += value;
        }
    }
    sums
}

#[test]
fn renamed_workers_of_a_group_add_no_series() {
    let limits = |groups| with_groups(groups, limits(10_000, 10_000, 1_000_000));
    let mut ungrouped = Fixture::of(State::new(&limits(None)));
    let mut grouped = Fixture::of(State::new(&limits(Some(groups(&["all=*"])))));
    let mut label_sets = Vec::new();
    for deployment in 0..6 {
        for worker in 0..1000 {
            let hostname = format!("celery@pod-{deployment}-{worker}");
            for task in 0..50 {
                let (id, name) = (format!("{deployment}-{worker}-{task}"), json!({"name": format!("t{task}")}));
                for fixture in [&mut ungrouped, &mut grouped] {
                    let runtime = json!({"runtime": f64::from((worker + task) % 64) / 32.0});
                    fixture.task_with("received", &hostname, &id, 1.0, name.clone());
                    fixture.task("started", &hostname, &id, 2.0).task_with("succeeded", &hostname, &id, 3.0, runtime);
                }
            }
        }
        label_sets.push((grouped.state.series().label_set_count(), ungrouped.state.series().label_set_count()));
    }
    assert_eq!(label_sets, [1, 2, 3, 4, 5, 6].map(|deployments| (50, deployments * 50_000)));
    assert_eq!(sums(&grouped), sums(&ungrouped));
    assert_eq!(sums(&grouped).len(), 50 * (3 + 5 + 1));
}

proptest! {
    /// For any events: the series of groups are the sums of those of the workers.
    #[test]
    fn groups_are_sums(
        events in prop::collection::vec((any_event(), 0..80_u32, 0..40_u8), 1..200),
        groups in any_groups(),
    ) {
        let mut ungrouped = Fixture::of(State::new(&limits(100, 100, 100)));
        let mut grouped = Fixture::of(State::new(&with_groups(groups, limits(100, 100, 100))));
        let timeouts =
            Timeouts { worker_timeout: Some(SECOND * 60), purge_offline_workers: None, purge_stopped_workers: None };
        for (event, seconds, gap) in &events {
            for fixture in [&mut ungrouped, &mut grouped] {
                fixture.event(event);
                fixture.now += SECOND * if *seconds > 75 { *seconds } else { 0 };
                fixture.state.expire(&timeouts, fixture.now);
                if *gap == 0 {
                    fixture.state.record_gap();
                }
            }
            prop_assert_eq!(sums(&grouped), sums(&ungrouped));
        }
    }
}

proptest! {
    /// For any events: gauges are never negative, prefetched tasks do not exceed tracked tasks, all tables are bounded,
    /// and a purge removes all series.
    #[test]
    fn arbitrary_events_keep_the_state_valid_and_bounded(
        events in prop::collection::vec((any_event(), 0..80_u32, 0..40_u8), 1..200),
        groups in any_groups(),
    ) {
        let mut kept = vec![Box::from(OTHER)];
        kept.extend(groups.iter().flat_map(WorkerGroups::names).cloned());
        let mut fixture = Fixture::of(State::new(&with_groups(groups, limits(3, 4, 6))));
        let mut task_events = 0.0;
        for (event, seconds, gap) in &events {
            fixture.event(event);
            task_events += f64::from(u8::from(event["type"].as_str().unwrap().starts_with("task-")));
            if *seconds > 75 {
                fixture.advance(*seconds);
            }
            if *gap == 0 {
                fixture.state.record_gap();
            }
            let samples = fixture.samples();
            prop_assert!(samples.values().all(|value| *value >= 0.0), "{samples:?}");
            let sum = |family: &str| -> f64 {
                samples.iter().filter(|(name, _)| name.starts_with(family)).map(|(_, value)| value).sum()
            };
            prop_assert!(sum("flower_worker_prefetched_tasks") <= 4.0);
            prop_assert!(sum("flower_events_total") <= task_events);
            prop_assert!(fixture.state.series().label_set_count() <= 6 + 4);
            prop_assert!(fixture.state.name_count() <= 6 + 4 + 1);
        }
        fixture.state.other = None;
        fixture.advance(600);
        let remaining = fixture.samples();
        let is_kept = |name: &str| kept.iter().any(|kept| name.contains(&format!(r#"worker="{kept}""#)));
        prop_assert!(remaining.keys().all(|name| is_kept(name)), "{remaining:?}");
        let is_zero = |name: &str, value: f64| value == 0.0 || !name.contains("prefetch");
        prop_assert!(remaining.iter().all(|(name, value)| is_zero(name, *value)), "{remaining:?}");
        prop_assert_eq!(fixture.state.worker_count(), 0);
    }

    /// For any events and any number of saves in between, restoring returns the saved state.
    #[test]
    fn a_restored_state_equals_the_saved_one(
        events in prop::collection::vec((any_event(), 0..90_u32, 0..10_u8), 1..200),
        groups in any_groups(),
    ) {
        let limits = with_groups(groups, limits(3, 4, 6));
        let mut fixture = Fixture::of(State::new(&limits));
        fixture.state.track_changes();
        let mut saved = Saved::default();
        for (event, seconds, save) in &events {
            fixture.event(event);
            if *seconds > 75 {
                fixture.advance(*seconds);
            }
            if *save == 0 {
                saved.save(&mut fixture.state);
            }
        }
        saved.save(&mut fixture.state);
        let mut state = saved.restore(&limits).unwrap();
        let sorted = |state: &State| {
            let mut tasks: Vec<_> = state.tasks(0, 100).iter().map(|task| format!("{task:?}")).collect();
            tasks.sort();
            let mut workers = state.workers(SECOND);
            for worker in &mut workers {
                worker.since_last_event = SECOND;
            }
            workers.sort_by(|one, other| one.hostname.cmp(&other.hostname));
            (tasks, workers, state.name_count())
        };
        prop_assert_eq!(sorted(&state), sorted(&fixture.state));
        let mut again = saved.clone();
        again.save(&mut state);
        prop_assert_eq!(Fixture::of(state).samples(), fixture.samples());
        let state = again.restore(&limits).unwrap();
        prop_assert_eq!(Fixture::of(state).samples(), fixture.samples());
    }

    /// A state that is repeatedly restored from its last save continues like one that was never interrupted.
    #[test]
    fn a_restored_state_behaves_like_an_uninterrupted_one(
        events in prop::collection::vec((any_event(), 0..20_u8), 1..200),
        groups in any_groups(),
    ) {
        let limits = with_groups(groups, limits(100, 100, 100));
        let mut fixture = Fixture::of(State::new(&limits));
        let mut restored = Fixture::of(State::new(&limits));
        restored.state.track_changes();
        let mut saved = Saved::default();
        for (event, action) in &events {
            fixture.event(event);
            restored.event(event);
            match action {
                0 => {
                    saved.save(&mut restored.state);
                    restored.state = saved.restore(&limits).unwrap();
                }
                1 => saved.save(&mut restored.state),
                2 => {
                    fixture.state.record_gap();
                    restored.state.record_gap();
                }
                _ => {}
            }
            prop_assert_eq!(fixture.samples(), restored.samples());
        }
    }
}
