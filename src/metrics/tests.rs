use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{Encoder, Registry, TextEncoder};

use super::encode::{Exposition, Format};
use super::*;
use crate::celery::EventKind;

fn table(bounds: &[f64]) -> SeriesTable {
    SeriesTable::new(&SeriesOptions { bounds: bounds.to_vec(), ..SeriesOptions::default() })
}

fn series() -> SeriesTable {
    let mut series = table(&[0.075, 1.0, 2_000_000.0]);
    let worker = series.add_worker("celery@\"höst\"\\\n");
    series.set_online(worker, true);
    series.set_executing(worker, 2.5);
    for (id, text) in [(1, "tasks.add"), (2, ""), (3, "a,b=\"c\"\\")] {
        let (key, _) = series.add_task_series(worker, TaskName { id, text });
        series.count_event(key, EventKind::TaskReceived, "task-received");
        series.count_event(key, EventKind::TaskCustom, "task-\"odd\"");
        for seconds in [0.075, 0.5, 1e-7, 3e6] {
            series.observe_runtime(key, seconds);
        }
        series.set_prefetch_time(key, worker, 1.25);
        series.add_prefetched(key, worker);
    }
    series
}

fn snapshot(series: &SeriesTable) -> Arc<Snapshot> {
    let mut builder = SnapshotBuilder::new(series);
    while !builder.step(series, 1) {}
    Arc::new(builder.finish(series))
}

fn write(snapshot: &Arc<Snapshot>, format: Format, piece: usize) -> String {
    let mut exposition = Exposition::new(Arc::clone(snapshot), format, &[]);
    let mut text = Vec::new();
    while exposition.write(&mut text, piece) {}
    String::from_utf8(text).unwrap()
}

fn samples(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap()).map(|(name, value)| (name, value.parse().unwrap())).collect()
}

#[test]
fn the_exposition_agrees_with_the_prometheus_text_encoder() {
    let snapshot = snapshot(&series());
    let registry = Registry::new();
    let shared = Arc::clone(&snapshot);
    registry.register(Box::new(FlowerCollector::new(move || Some(Arc::clone(&shared))))).unwrap();
    let mut reference = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut reference).unwrap();
    // The reference writes `le` last, and formats bounds as Rust does.
    let reference = String::from_utf8(reference).unwrap();
    let actual = write(&snapshot, Format::Text, 1);
    let actual = actual.replace("le=\"1.0\",", "le=\"1\",").replace("le=\"2e+06\",", "le=\"2000000\",");
    let le_last = |line: &str| match line.split_once("{le=\"") {
        Some((name, rest)) => {
            let (le, rest) = rest.split_once("\",").unwrap();
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            format!("{name}{{{labels},le=\"{le}\"}} {value}")
        }
        None => line.to_owned(),
    };
    let actual: Vec<String> = actual.lines().map(le_last).collect();
    let actual = actual.join("\n");
    assert_eq!(samples(&actual), samples(&reference));
    assert_eq!(samples(&actual).len(), 3 * (2 + 6 + 2) + 2);
}

#[test]
fn the_piece_size_does_not_change_the_text() {
    let snapshot = snapshot(&series());
    let full = write(&snapshot, Format::Text, usize::MAX / 2);
    for piece in [1, 100, 1000] {
        assert_eq!(write(&snapshot, Format::Text, piece), full);
    }
}

#[test]
fn the_exposition_matches_the_golden_text() {
    let mut series = table(&[1.0]);
    let worker = series.add_worker("w");
    let (key, _) = series.add_task_series(worker, TaskName { id: 1, text: "t" });
    series.count_event(key, EventKind::TaskSucceeded, "task-succeeded");
    series.observe_runtime(key, 1.5);
    series.set_online(worker, false);
    let expected = r#"# HELP flower_events_total Number of events
# TYPE flower_events_total counter
flower_events_total{task="t",type="task-succeeded",worker="w"} 1
# HELP flower_task_runtime_seconds Task runtime
# TYPE flower_task_runtime_seconds histogram
flower_task_runtime_seconds_bucket{le="1.0",task="t",worker="w"} 0
flower_task_runtime_seconds_bucket{le="+Inf",task="t",worker="w"} 1
flower_task_runtime_seconds_count{task="t",worker="w"} 1
flower_task_runtime_seconds_sum{task="t",worker="w"} 1.5
# HELP flower_task_prefetch_time_seconds The time the task spent waiting at the celery worker to be executed.
# TYPE flower_task_prefetch_time_seconds gauge
# HELP flower_worker_prefetched_tasks Number of tasks of given type prefetched at a worker
# TYPE flower_worker_prefetched_tasks gauge
# HELP flower_worker_online Worker online status
# TYPE flower_worker_online gauge
flower_worker_online{worker="w"} 0
# HELP flower_worker_number_of_currently_executing_tasks Number of tasks currently executing at a worker
# TYPE flower_worker_number_of_currently_executing_tasks gauge
"#;
    let snapshot = snapshot(&series);
    assert_eq!(write(&snapshot, Format::Text, 1), expected);
    let open_metrics = expected
        .replace("HELP flower_events_total", "HELP flower_events")
        .replace("TYPE flower_events_total", "TYPE flower_events");
    assert_eq!(write(&snapshot, Format::OpenMetrics, 1), open_metrics + "# EOF\n");
}

#[test]
fn label_sets_with_equal_concatenation_are_distinct() {
    let mut series = table(&[1.0]);
    for (id, (worker, task)) in [("ab", "c"), ("a", "bc")].into_iter().enumerate() {
        let worker = series.add_worker(worker);
        let (key, _) = series.add_task_series(worker, TaskName { id: u32::try_from(id).unwrap(), text: task });
        series.add_prefetched(key, worker);
    }
    assert_eq!(samples(&write(&snapshot(&series), Format::Text, 1)).len(), 2);
}

#[test]
fn a_worker_added_and_removed_during_a_snapshot_is_not_exported() {
    let mut series = series();
    let kept = series.add_worker("kept");
    series.set_online(kept, true);
    let mut builder = SnapshotBuilder::new(&series);
    assert!(!builder.step(&series, 1), "the copy takes several steps");
    let removed = series.add_worker("removed");
    series.set_online(removed, true);
    let mut released = Vec::new();
    series.remove_worker(removed, |name| released.push(name));
    while !builder.step(&series, 1) {}
    assert!(released.is_empty());
    let text = write(&Arc::new(builder.finish(&series)), Format::Text, 1);
    assert!(!text.contains("removed") && text.contains("kept"));
}

#[test]
fn a_new_series_shows_zero_first_in_every_format() {
    let zero_first = Duration::from_secs(1);
    let mut series = SeriesTable::new(&SeriesOptions { bounds: vec![1.0], zero_first, ..SeriesOptions::default() });
    series.set_time(50_000);
    let worker = series.add_worker("w");
    series.set_online(worker, true);
    let (key, _) = series.add_task_series(worker, TaskName { id: 1, text: "t" });
    series.count_event(key, EventKind::TaskReceived, "task-received");
    series.observe_runtime(key, 0.5);
    series.set_prefetch_time(key, worker, 2.0);
    assert!(series.shows_zero(worker));
    let values = |series: &SeriesTable| samples(&write(&snapshot(series), Format::Text, 1)).values().sum::<f64>();
    assert!((values(&series) - 3.0).abs() < 1e-9, "only the gauges");
    series.set_time(50_998);
    series.count_event(key, EventKind::TaskReceived, "task-received");
    assert!((values(&series) - 3.0).abs() < 1e-9);
    series.set_time(50_999);
    assert!(!series.shows_zero(worker));
    assert!((values(&series) - (3.0 + 2.0 + 3.5)).abs() < 1e-9, "2 events, and a histogram of one value");
}

#[test]
fn created_samples_follow_their_family() {
    let mut series = table(&[1.0]);
    series.set_time(1_700_000_000_124);
    let worker = series.add_worker("w");
    let (key, _) = series.add_task_series(worker, TaskName { id: 1, text: "t" });
    series.count_event(key, EventKind::TaskReceived, "task-received");
    series.observe_runtime(key, 0.5);
    let snapshot = snapshot(&series);
    let write = |format| {
        let mut exposition = Exposition::new(Arc::clone(&snapshot), format, &[]).with_created();
        let mut out = Vec::new();
        while exposition.write(&mut out, 1) {}
        String::from_utf8(out).unwrap()
    };
    let text = write(Format::Text);
    let expected = "flower_events_total{task=\"t\",type=\"task-received\",worker=\"w\"} 1\n\
                    # HELP flower_events_created Number of events\n# TYPE flower_events_created gauge\n\
                    flower_events_created{task=\"t\",type=\"task-received\",worker=\"w\"} 1700000000.123\n\
                    # HELP flower_task_runtime_seconds Task runtime\n";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("# TYPE flower_task_runtime_seconds_created gauge\n"));
    let open_metrics = write(Format::OpenMetrics);
    assert!(
        !open_metrics.contains("_created gauge")
            && open_metrics.contains("_sum{task=\"t\",worker=\"w\"} 0.5\nflower_task_runtime_seconds_created{")
    );
}

#[test]
fn protobuf_families_have_the_length_that_they_begin_with() {
    let snapshot = snapshot(&series());
    let mut exposition = Exposition::new(Arc::clone(&snapshot), Format::Protobuf, &[]);
    let mut bytes = Vec::new();
    while exposition.write(&mut bytes, 1) {}
    let (mut at, mut families) = (0, 0);
    while at < bytes.len() {
        let (mut length, mut shift) = (0, 0);
        loop {
            let byte = bytes[at];
            length |= usize::from(byte & 0x7f) << shift;
            (at, shift) = (at + 1, shift + 7);
            if byte < 0x80 {
                break;
            }
        }
        assert_eq!(bytes[at], 0x0a, "the name comes first");
        (at, families) = (at + length, families + 1);
    }
    assert_eq!((at, families), (bytes.len(), 6));
    let mut whole = Vec::new();
    Exposition::new(snapshot, Format::Protobuf, &[]).write(&mut whole, usize::MAX / 2);
    assert_eq!(whole, bytes);
}
