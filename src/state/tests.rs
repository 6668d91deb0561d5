#![allow(clippy::needless_pass_by_value, clippy::float_cmp, reason = "json!() in place, and sums of whole numbers")]

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::celery::event;
use crate::metrics::Copying;
use crate::metrics::text::{Exposition, Format};

const SECOND: Duration = Duration::from_secs(1);

struct Cluster {
    state: State,
    now: Duration,
}

impl Cluster {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits { max_workers: 100, max_tasks: 100, max_label_pairs: 100, buckets: vec![0.5, 1.0] };
        change(&mut limits);
        Self { state: State::new(&limits), now: SECOND }
    }

    fn event(&mut self, event: &Value) -> &mut Self {
        event::decode(event.to_string().as_bytes(), false, |event| self.state.apply(&event.unwrap(), self.now));
        self
    }

    /// A task event of uuid `id` at second `time`.
    fn task(&mut self, kind: &str, worker: &str, id: &str, time: f64) -> &mut Self {
        self.task_with(kind, worker, id, time, json!({}))
    }

    fn task_with(&mut self, kind: &str, worker: &str, id: &str, time: f64, more: Value) -> &mut Self {
        let mut event = json!({"type": format!("task-{kind}"), "hostname": worker, "uuid": id, "timestamp": time});
        if matches!(kind, "received" | "sent") {
            event["name"] = "t".into();
            event["eta"] = Value::Null;
        }
        for (key, value) in more.as_object().unwrap() {
            event[key] = value.clone();
        }
        self.event(&event)
    }

    fn worker(&mut self, kind: &str, worker: &str, more: Value) -> &mut Self {
        let mut event = json!({"type": format!("worker-{kind}"), "hostname": worker, "timestamp": 1.0});
        for (key, value) in more.as_object().unwrap() {
            event[key] = value.clone();
        }
        self.event(&event)
    }

    fn pass(&mut self, seconds: u32) -> &mut Self {
        self.now += SECOND * seconds;
        let timeouts = Timeouts { worker_timeout: Some(SECOND * 60), purge_offline_workers: Some(SECOND * 600) };
        self.state.sweep(&timeouts, self.now);
        self
    }

    fn samples(&self) -> BTreeMap<String, f64> {
        let mut copying = Copying::start(self.state.series());
        while !copying.proceed(self.state.series(), 1) {}
        let snapshot = Arc::new(copying.finish(self.state.series()));
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
fn a_task_from_received_to_its_end() {
    let mut cluster = Cluster::new();
    cluster.task("received", "w", "a", 1.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(1.0), None));
    cluster.task("started", "w", "a", 3.5);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(2.5)));
    cluster.task_with("succeeded", "w", "a", 4.0, json!({"runtime": 0.5}));
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(0.0)));
    assert_eq!(cluster.sample(r#"flower_task_runtime_seconds_bucket{le="0.5",task="t",worker="w"}"#), Some(1.0));
}

#[test]
fn an_end_leaves_the_next_runs_entry_alone() {
    let mut cluster = Cluster::new();
    cluster.task("received", "w", "a", 1.0).task("started", "w", "a", 2.0).task("received", "w", "a", 3.0);
    cluster.task("retried", "w", "a", 4.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(1.0), Some(0.0)));
    cluster.task("started", "w", "a", 5.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(2.0)));
    cluster.task("succeeded", "w", "a", 6.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(0.0)));
}

#[test]
fn a_redelivery_moves_the_entry() {
    let mut cluster = Cluster::new();
    cluster.task("received", "v", "a", 1.0).task("received", "w", "a", 2.0).task("received", "w", "a", 2.5);
    assert_eq!((cluster.prefetched("v"), cluster.prefetched("w")), (Some(0.0), Some(1.0)));
    cluster.task("rejected", "v", "a", 3.0);
    assert_eq!(cluster.prefetched("w"), Some(1.0), "another hostname never removes an entry");
}

#[test]
fn late_news_of_a_run_that_has_begun_is_ignored() {
    let mut cluster = Cluster::new();
    cluster.task("started", "w", "a", 5.0).task("received", "w", "a", 4.0);
    assert_eq!(cluster.prefetched("w"), Some(0.0));
    cluster.task("succeeded", "w", "a", 6.0).task("received", "w", "a", 5.0);
    assert_eq!(cluster.prefetched("w"), Some(0.0));
    cluster.task("received", "w", "a", 6.5);
    assert_eq!(cluster.prefetched("w"), Some(1.0), "news of the next run");
}

#[test]
fn times_are_measured_between_events_of_one_worker_and_never_negative() {
    let mut cluster = Cluster::new();
    cluster.task("received", "v", "a", 1.0).task("started", "w", "a", 9.0);
    assert_eq!((cluster.prefetch_time("v"), cluster.prefetch_time("w")), (None, Some(0.0)));
    cluster.task("received", "w", "b", 9.0).task("started", "w", "b", 8.0);
    assert_eq!(cluster.prefetch_time("w"), Some(0.0));
}

#[test]
fn a_revoked_task_leaves_its_set_and_a_terminated_one_its_run() {
    let mut cluster = Cluster::new();
    cluster.task("received", "w", "a", 1.0).task("revoked", "w", "a", 2.0).task("revoked", "w", "a", 2.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), None));
    cluster.task("received", "w", "b", 1.0).task("started", "w", "b", 2.0).task("received", "w", "b", 3.0);
    cluster.task_with("revoked", "w", "b", 4.0, json!({"terminated": true}));
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(1.0), Some(0.0)));
    cluster.task("revoked", "w", "b", 5.0);
    assert_eq!(cluster.prefetched("w"), Some(0.0));
}

#[test]
fn eta_tasks_are_not_prefetched() {
    let mut cluster = Cluster::new();
    cluster.task_with("received", "w", "a", 1.0, json!({"eta": "2030-01-01T00:00:00"}));
    cluster.task("started", "w", "a", 2.0).task("succeeded", "w", "a", 3.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (None, None));
    assert_eq!(cluster.state.find_task("a").unwrap().eta.as_deref(), Some("2030-01-01T00:00:00"));
}

#[test]
fn a_restart_empties_the_set() {
    for restart in [("online", json!({"processed": 0})), ("heartbeat", json!({"active": 0, "processed": 4}))] {
        let mut cluster = Cluster::new();
        cluster.worker("heartbeat", "w", json!({"active": 1, "processed": 5}));
        cluster.task("received", "w", "a", 1.0).task("received", "w", "b", 1.0).task("started", "w", "b", 2.0);
        cluster.worker("heartbeat", "w", json!({"active": 1, "processed": 5}));
        assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(1.0), Some(1.0)));
        cluster.worker(restart.0, "w", restart.1);
        assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(0.0)));
        cluster.task("started", "w", "a", 5.0);
        assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(0.0), Some(4.0)));
    }
}

#[test]
fn a_worker_that_says_goodbye() {
    let mut cluster = Cluster::new();
    cluster.worker("offline", "stranger", json!({"active": 2}));
    assert_eq!((cluster.online("stranger"), cluster.executing("stranger")), (Some(0.0), None));
    cluster.worker("heartbeat", "w", json!({"active": 3})).task("received", "w", "a", 1.0);
    cluster.worker("offline", "w", json!({"active": 1}));
    assert_eq!(
        (cluster.online("w"), cluster.executing("w"), cluster.prefetched("w")),
        (Some(0.0), Some(1.0), Some(0.0))
    );
    cluster.task("received", "w", "b", 1.0);
    assert_eq!(cluster.prefetched("w"), Some(0.0));
    cluster.pass(61).task("received", "w", "b", 1.0);
    assert_eq!((cluster.executing("w"), cluster.prefetched("w")), (Some(0.0), Some(0.0)));
    cluster.worker("heartbeat", "w", json!({})).task("received", "w", "b", 1.0);
    assert_eq!((cluster.online("w"), cluster.prefetched("w")), (Some(1.0), Some(1.0)));
}

#[test]
fn a_silent_worker_is_lost_then_purged_and_may_come_back() {
    let mut cluster = Cluster::new();
    cluster.worker("heartbeat", "w", json!({"active": 3, "freq": 2.0})).task("received", "w", "a", 1.0);
    cluster.pass(59);
    assert_eq!(cluster.online("w"), Some(1.0));
    cluster.task("progress", "w", "a", 2.0).pass(59);
    assert_eq!(cluster.online("w"), Some(1.0), "any event is a sign of life");
    cluster.pass(1);
    assert_eq!(
        (cluster.online("w"), cluster.executing("w"), cluster.prefetched("w")),
        (Some(0.0), Some(0.0), Some(0.0))
    );
    cluster.task("started", "w", "a", 3.0);
    assert_eq!(cluster.online("w"), Some(0.0), "only worker events set it to 1");
    cluster.pass(599);
    assert!(!cluster.samples().is_empty());
    cluster.pass(1);
    assert_eq!(cluster.samples(), BTreeMap::new());
    cluster.worker("heartbeat", "w", json!({})).task("succeeded", "w", "a", 9.0);
    assert_eq!((cluster.online("w"), cluster.prefetch_time("w")), (Some(1.0), Some(0.0)));
}

#[test]
fn a_slow_heartbeat_is_waited_for() {
    let mut cluster = Cluster::new();
    cluster.worker("heartbeat", "w", json!({"active": 0, "freq": 40})).pass(119);
    assert_eq!(cluster.online("w"), Some(1.0));
    cluster.worker("heartbeat", "w", json!({"freq": 5})).pass(119);
    assert_eq!(cluster.online("w"), Some(1.0), "the answer to a broadcast does not tell the worker's own freq");
    cluster.pass(1);
    assert_eq!(cluster.online("w"), Some(0.0));
}

#[test]
fn values_that_are_none_are_ignored() {
    let mut cluster = Cluster::new();
    cluster.worker("online", "w", json!({"active": 3}));
    assert_eq!(cluster.executing("w"), None);
    for active in [json!("3"), json!(true), json!(-1), json!(null)] {
        cluster.worker("heartbeat", "w", json!({"active": active}));
        assert_eq!(cluster.executing("w"), None);
    }
    for runtime in [json!("3"), json!(true), json!(-1), json!(null), json!(0)] {
        cluster.task_with("succeeded", "w", "a", 1.0, json!({"runtime": runtime}));
    }
    assert_eq!(cluster.samples().keys().filter(|name| name.contains("runtime")).count(), 0);
}

#[test]
fn names_are_remembered() {
    let mut cluster = Cluster::new();
    cluster.task("started", "w", "a", 1.0).task("sent", "gen1@h", "a", 0.5);
    cluster.task_with("received", "w", "a", 0.6, json!({"name": null}));
    cluster.task_with("progress", "w", "a", 2.0, json!({"name": "own", "eta": "x", "runtime": 5}));
    cluster.task("succeeded", "w", "a", 2.0);
    let events = |kind: &str, task: &str| {
        cluster.sample(&format!("flower_events_total{{task=\"{task}\",type=\"task-{kind}\",worker=\"w\"}}"))
    };
    assert_eq!(events("started", ""), Some(1.0));
    assert_eq!(events("received", "t"), Some(1.0));
    assert_eq!(events("progress", "own"), Some(1.0));
    assert_eq!(events("succeeded", "t"), Some(1.0));
    assert_eq!(cluster.samples().keys().filter(|name| name.contains("runtime")).count(), 0);
}

#[test]
fn beyond_the_bounds_totals_stay_true() {
    let mut cluster = Cluster::with(|limits| {
        limits.max_workers = 2;
        limits.max_label_pairs = 4;
        limits.max_tasks = 3;
    });
    for worker in ["v", "w", "x"] {
        for id in 0..50 {
            let name = json!({"name": format!("name{id}")});
            cluster.task_with("received", worker, &format!("{worker}{id}"), 1.0, name);
        }
    }
    for kind in 0..100 {
        cluster.task(&format!("custom{kind}"), "v", "v0", 1.0);
    }
    let samples = cluster.samples();
    let events: Vec<_> = samples.iter().filter(|(name, _)| name.starts_with("flower_events_total")).collect();
    assert_eq!(events.iter().map(|(_, count)| **count).sum::<f64>(), 250.0);
    assert_eq!(events.iter().filter(|(name, _)| name.contains(r#"worker="x""#)).count(), 0);
    assert_eq!(samples[r#"flower_events_total{task="(other)",type="task-received",worker="(other)"}"#], 50.0);
    assert_eq!(events.iter().filter(|(name, _)| name.contains(r#"type="(other)""#)).count(), 1);
    assert_eq!((cluster.state.task_count(), cluster.state.worker_count()), (3, 2));
    assert!(cluster.state.name_count() <= 3 + 4 + 1);
}

#[test]
fn clients_give_way_first_then_workers_that_left() {
    let mut cluster = Cluster::with(|limits| limits.max_workers = 3);
    cluster.worker("heartbeat", "live", json!({})).worker("offline", "left", json!({}));
    cluster.task("sent", "gen1@h", "a", 1.0).task("sent", "gen2@h", "b", 1.0);
    let workers = |cluster: &Cluster| -> Vec<String> {
        let hostnames = ["live", "left", "gen1@h", "gen2@h", "new"];
        let has = |name: &&&str| cluster.samples().keys().any(|series| series.contains(&format!("worker=\"{name}\"")));
        hostnames.iter().filter(has).map(|name| (*name).to_owned()).collect()
    };
    assert_eq!(workers(&cluster), ["live", "left", "gen2@h"]);
    cluster.worker("heartbeat", "new", json!({}));
    assert_eq!(workers(&cluster), ["live", "left", "new"]);
    cluster.task("sent", "gen1@h", "a", 1.0);
    assert_eq!(workers(&cluster), ["live", "gen1@h", "new"]);
}

#[test]
fn a_full_table_has_room_again_once_a_worker_left_or_is_lost() {
    let mut cluster = Cluster::with(|limits| limits.max_workers = 2);
    cluster.worker("heartbeat", "a", json!({})).worker("heartbeat", "b", json!({})).worker("heartbeat", "c", json!({}));
    assert_eq!(cluster.online("c"), None);
    cluster.worker("offline", "a", json!({})).worker("heartbeat", "c", json!({})).worker("heartbeat", "d", json!({}));
    assert_eq!((cluster.online("a"), cluster.online("c"), cluster.online("d")), (None, Some(1.0), None));
    cluster.pass(61).worker("heartbeat", "d", json!({})).worker("heartbeat", "e", json!({}));
    assert_eq!((cluster.online("d"), cluster.online("e")), (Some(1.0), Some(1.0)));
}

#[test]
fn finished_tasks_give_way_first_and_take_their_gauges_along() {
    let mut cluster = Cluster::with(|limits| limits.max_tasks = 2);
    cluster.task("received", "w", "a", 1.0).task("received", "w", "b", 1.0).task("started", "w", "b", 3.0);
    cluster.task("succeeded", "w", "b", 4.0).task("received", "w", "c", 1.0);
    assert_eq!((cluster.state.find_task("b"), cluster.prefetched("w")), (None, Some(2.0)));
    cluster.task("started", "w", "c", 5.0).task("received", "w", "d", 1.0);
    assert_eq!((cluster.state.find_task("a"), cluster.prefetched("w")), (None, Some(1.0)));
    cluster.task("received", "w", "e", 1.0);
    assert_eq!((cluster.prefetched("w"), cluster.prefetch_time("w")), (Some(2.0), Some(0.0)));
}

#[test]
fn a_gap_empties_every_set() {
    let mut cluster = Cluster::new();
    cluster.task("received", "v", "a", 1.0).task("received", "w", "b", 1.0);
    cluster.state.gap();
    assert_eq!((cluster.prefetched("v"), cluster.prefetched("w")), (Some(0.0), Some(0.0)));
    cluster.task("revoked", "v", "a", 2.0).task("received", "v", "c", 2.0);
    assert_eq!(cluster.prefetched("v"), Some(1.0));
}

#[test]
fn a_worker_that_may_be_silent_for_long_is_not_purged_before() {
    let mut cluster = Cluster::new();
    cluster.worker("heartbeat", "w", json!({"active": 1, "freq": 300.0}));
    cluster.pass(700);
    assert_eq!(cluster.online("w"), Some(1.0));
    cluster.pass(250);
    assert_eq!(cluster.online("w"), None);
}

#[test]
fn what_ended_in_a_gap_is_over_when_the_worker_says_it_rests() {
    let mut cluster = Cluster::new();
    let rests = json!({"active": 0});
    cluster.task("received", "w", "a", 1.0).task("started", "w", "a", 3.0).worker("heartbeat", "w", rests.clone());
    assert_eq!(cluster.prefetch_time("w"), Some(2.0), "a heartbeat may overtake what was said before it");
    cluster.state.gap();
    cluster.worker("heartbeat", "w", json!({"active": 1}));
    assert_eq!(cluster.prefetch_time("w"), Some(2.0));
    cluster.worker("heartbeat", "w", rests.clone());
    assert_eq!(cluster.prefetch_time("w"), Some(0.0));
    cluster.task("received", "w", "b", 4.0).task("started", "w", "b", 5.0).worker("heartbeat", "w", rests);
    assert_eq!(cluster.prefetch_time("w"), Some(1.0));
}

#[test]
fn a_worker_that_works_without_task_events_is_mute() {
    let mut cluster = Cluster::new();
    let heartbeat = |cluster: &mut Cluster, processed: u32| -> bool {
        cluster.worker("heartbeat", "w", json!({"active": 1, "processed": processed}));
        cluster.now += SECOND * 40;
        !cluster.state.mute_workers(cluster.now).is_empty()
    };
    assert!([5, 5, 5].iter().all(|processed| !heartbeat(&mut cluster, *processed)), "it rests");
    assert!(heartbeat(&mut cluster, 6));
    cluster.task("received", "w", "a", 1.0);
    assert!(!heartbeat(&mut cluster, 7));
    assert!(heartbeat(&mut cluster, 8));
    cluster.state.gap();
    assert!([8, 8, 8].iter().all(|processed| !heartbeat(&mut cluster, *processed)), "its events fell into a gap");
}

#[test]
fn what_a_program_can_read() {
    let mut cluster = Cluster::new();
    let uuid = "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11";
    cluster.worker(
        "online",
        "w",
        json!({"freq": 2, "active": 0, "processed": 7, "loadavg": [1, 2.5, 3],
        "sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux"}),
    );
    cluster.task("sent", "gen1@h", uuid, 1.0).task_with("received", "w", uuid, 2.0, json!({"retries": 2}));
    cluster.task("started", "w", uuid, 3.0).task_with("succeeded", "w", uuid, 5.0, json!({"runtime": 2.0}));
    let task = cluster.state.find_task(uuid).unwrap();
    assert_eq!((task.uuid.as_str(), task.name.as_str(), task.state), (uuid, "t", TaskState::Succeeded));
    assert_eq!((task.sent, task.received, task.started, task.ended), (Some(1.0), Some(2.0), Some(3.0), Some(5.0)));
    assert_eq!((task.runtime, task.retries, task.worker.as_deref()), (Some(SECOND * 2), 2, Some("w")));
    assert_eq!(cluster.state.tasks(0, 10), [task]);
    let workers = cluster.state.workers(cluster.now);
    assert_eq!(workers.len(), 1, "clients are no workers");
    assert_eq!((workers[0].online, workers[0].processed, workers[0].loadavg), (true, Some(7.0), Some([1.0, 2.5, 3.0])));
    assert_eq!(workers[0].sw_ver.as_deref(), Some("5.7.0"));
    assert_eq!(workers[0].events.len(), 4);
}

#[test]
fn odd_ids_are_kept_apart_and_bounded() {
    assert_eq!(TaskId::of("8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11").to_string(), "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11");
    let distinct = [
        "8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11",
        "8F3C1F5E-6A52-4C6A-9D3F-0D7C3B1F7A11",
        "8f3c1f5e6a524c6a9d3f0d7c3b1f7a11",
        "{8f3c1f5e-6a52-4c6a-9d3f-0d7c3b1f7a11}",
        "",
    ];
    let ids: std::collections::HashSet<TaskId> = distinct.iter().map(|text| TaskId::of(text)).collect();
    assert_eq!(ids.len(), distinct.len());
    let (one, other) = (TaskId::of(&"x".repeat(1 << 20)), TaskId::of(&"x".repeat((1 << 20) + 1)));
    assert_ne!(one, other);
    assert!(one.to_string().len() <= 256);
    assert_eq!(TaskId::of(&one.to_string()), one, "as a program reads it, and asks for it");
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
            "uuid": format!("id{id}"), "terminated": flag, "runtime": if time == 39 { 1.7e308 } else { f64::from(time) - 10.0 },
            "active": time, "processed": time, "freq": time});
        if name > 0 {
            event["name"] = format!("n{name}").into();
            event["eta"] = if eta { "2030-01-01".into() } else { Value::Null };
        }
        event
    })
}

/// What a store would hold.
#[derive(Clone, Default)]
struct Saved {
    header: Vec<u8>,
    tables: [BTreeMap<u32, Vec<u8>>; 3],
}

impl Saved {
    fn save(&mut self, state: &mut State) {
        let changes = state.take_changes();
        assert!(!state.has_changes());
        if changes.whole {
            self.tables = Default::default();
        }
        self.header.clone_from(&changes.header);
        for (table, rows) in self.tables.iter_mut().zip([&changes.workers, &changes.pairs, &changes.tasks]) {
            for (number, record) in rows.iter() {
                match record {
                    Some(record) => drop(table.insert(number, record.to_vec())),
                    None => drop(table.remove(&number)),
                }
            }
        }
    }

    fn restore(&self, limits: &Limits) -> Result<State, Corrupt> {
        let mut restoring = Restoring::start(limits, &self.header)?;
        let [workers, pairs, tasks] = &self.tables;
        workers.iter().try_for_each(|(number, record)| restoring.worker(*number, record))?;
        pairs.iter().try_for_each(|(number, record)| restoring.pair(*number, record))?;
        tasks.iter().try_for_each(|(number, record)| restoring.task(*number, record))?;
        Ok(restoring.finish())
    }
}

fn limits(max_workers: usize, max_tasks: usize, max_label_pairs: usize) -> Limits {
    Limits { max_workers, max_tasks, max_label_pairs, buckets: vec![0.5, 1.0] }
}

#[test]
fn other_buckets_begin_the_histograms_anew() {
    let mut cluster = Cluster::new();
    cluster.state.keep_changes();
    cluster.task_with("succeeded", "w", "a", 1.0, json!({"runtime": 0.7}));
    let mut saved = Saved::default();
    saved.save(&mut cluster.state);
    let mut other = limits(100, 100, 100);
    other.buckets = vec![0.25];
    let cluster = Cluster { state: saved.restore(&other).unwrap(), now: SECOND };
    assert!(cluster.samples().keys().all(|name| !name.contains("runtime")));
    assert!(cluster.samples().keys().any(|name| name.contains("events_total")));
    assert!(cluster.state.has_changes(), "saved with the new ones");
}

#[test]
fn a_lower_bound_keeps_the_newest_tasks() {
    let mut cluster = Cluster::new();
    cluster.state.keep_changes();
    for second in 0..50 {
        cluster.task("received", "w", &format!("t{second}"), f64::from(second));
    }
    let mut saved = Saved::default();
    saved.save(&mut cluster.state);
    let mut state = saved.restore(&limits(100, 10, 100)).unwrap();
    assert_eq!(state.task_count(), 10);
    assert!(state.find_task("t39").is_none() && state.find_task("t40").is_some() && state.find_task("t49").is_some());
    saved.save(&mut state);
    assert_eq!(saved.tables[2].len(), 10, "those that are gone are gone from the store");
    let samples = Cluster { state, now: SECOND }.samples();
    assert_eq!(samples[r#"flower_worker_prefetched_tasks{task="t",worker="w"}"#], 10.0);
}

#[test]
fn records_that_contradict_each_other_are_refused() {
    let mut cluster = Cluster::new();
    cluster.state.keep_changes();
    cluster.task("received", "w", "a", 1.0).task("received", "v", "b", 1.0);
    let mut saved = Saved::default();
    saved.save(&mut cluster.state);
    let limits = limits(100, 100, 100);
    let refused = |change: fn(&mut Saved)| {
        let mut saved = saved.clone();
        change(&mut saved);
        assert!(saved.restore(&limits).is_err());
    };
    assert!(saved.restore(&limits).is_ok());
    refused(|saved| saved.header.clear());
    refused(|saved| saved.header.push(0));
    for table in 0..3_usize {
        let mut other = saved.clone();
        let record = other.tables[table][&0].clone();
        other.tables[table].insert(7, record);
        assert!(other.restore(&limits).is_err(), "twice the same in table {table}");
    }
    refused(|saved| drop(saved.tables[0].remove(&0)));
    refused(|saved| drop(saved.tables[1].remove(&0)));
    refused(|saved| saved.tables[2].get_mut(&0).unwrap().truncate(5));
}

proptest! {
    /// Whatever comes: gauges are never negative, no set is larger than the tasks held, everything stays bounded, and
    /// after the last purge nothing is left.
    #[test]
    fn whatever_comes(events in prop::collection::vec((any_event(), 0..80_u32, 0..40_u8), 1..200)) {
        let mut cluster = Cluster::with(|limits| {
            limits.max_workers = 3;
            limits.max_tasks = 4;
            limits.max_label_pairs = 6;
        });
        let mut task_events = 0.0;
        for (event, seconds, gap) in &events {
            cluster.event(event);
            task_events += f64::from(u8::from(event["type"].as_str().unwrap().starts_with("task-")));
            if *seconds > 75 {
                cluster.pass(*seconds);
            }
            if *gap == 0 {
                cluster.state.gap();
            }
            let samples = cluster.samples();
            prop_assert!(samples.values().all(|value| *value >= 0.0), "{samples:?}");
            let of = |family: &str| -> f64 {
                samples.iter().filter(|(name, _)| name.starts_with(family)).map(|(_, value)| value).sum()
            };
            prop_assert!(of("flower_worker_prefetched_tasks") <= 4.0);
            prop_assert!(of("flower_events_total") <= task_events);
            prop_assert!(cluster.state.series().pair_count() <= 6 + 4);
            prop_assert!(cluster.state.name_count() <= 6 + 4 + 1);
        }
        cluster.state.other = None;
        cluster.pass(600);
        let left = cluster.samples();
        prop_assert!(left.keys().all(|name| name.contains(r#"worker="(other)""#)), "{left:?}");
        prop_assert_eq!(cluster.state.worker_count(), 0);
    }

    /// What is restored is what was saved, whatever came before, and however often it was saved.
    #[test]
    fn what_is_restored_is_what_was_saved(events in prop::collection::vec((any_event(), 0..90_u32, 0..10_u8), 1..200)) {
        let limits = limits(3, 4, 6);
        let mut cluster = Cluster { state: State::new(&limits), now: SECOND };
        cluster.state.keep_changes();
        let mut saved = Saved::default();
        for (event, seconds, save) in &events {
            cluster.event(event);
            if *seconds > 75 {
                cluster.pass(*seconds);
            }
            if *save == 0 {
                saved.save(&mut cluster.state);
            }
        }
        saved.save(&mut cluster.state);
        let mut state = saved.restore(&limits).unwrap();
        let sorted = |state: &State| {
            let mut tasks: Vec<_> = state.tasks(0, 100).iter().map(|task| format!("{task:?}")).collect();
            tasks.sort();
            let mut workers = state.workers(SECOND);
            for worker in &mut workers {
                worker.last_heard = SECOND;
            }
            workers.sort_by(|one, other| one.hostname.cmp(&other.hostname));
            (tasks, workers, state.name_count())
        };
        prop_assert_eq!(sorted(&state), sorted(&cluster.state));
        let mut again = saved.clone();
        again.save(&mut state);
        prop_assert_eq!(Cluster { state, now: SECOND }.samples(), cluster.samples());
        let state = again.restore(&limits).unwrap();
        prop_assert_eq!(Cluster { state, now: SECOND }.samples(), cluster.samples());
    }

    /// A state that dies and is restored again and again goes on as one that lives.
    #[test]
    fn a_restored_state_goes_on(events in prop::collection::vec((any_event(), 0..20_u8), 1..200)) {
        let limits = limits(100, 100, 100);
        let mut cluster = Cluster { state: State::new(&limits), now: SECOND };
        let mut other = Cluster { state: State::new(&limits), now: SECOND };
        other.state.keep_changes();
        let mut saved = Saved::default();
        for (event, fate) in &events {
            cluster.event(event);
            other.event(event);
            match fate {
                0 => {
                    saved.save(&mut other.state);
                    other.state = saved.restore(&limits).unwrap();
                }
                1 => saved.save(&mut other.state),
                2 => {
                    cluster.state.gap();
                    other.state.gap();
                }
                _ => {}
            }
            prop_assert_eq!(cluster.samples(), other.samples());
        }
    }
}
