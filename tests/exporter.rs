//! Drives a whole exporter through the public API against a real Redis.
//!
//! Needs `redis-server` on the PATH. Without it the test reports that it is skipped.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use flower_exporter::{BrokerStatus, Config, EventKind, Exporter, TaskState};
use prometheus::Registry;
use tempfile::TempDir;

/// A Redis server on a free port, stopped when dropped.
struct Redis {
    process: Child,
    port: u16,
    _directory: TempDir,
}

impl Redis {
    /// `None` if there is no `redis-server`, which is reported even though cargo captures the output of tests that pass.
    fn start() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port();
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--save", "", "--port", &port.to_string()])
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .spawn();
        let process = match process {
            Ok(process) => process,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "skipped: failed to run redis-server: {error}");
                return None;
            }
        };
        let redis = Self { process, port, _directory: directory };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "redis-server does not listen on port {port}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(redis)
    }

    /// Publishes an event in kombu's envelope, with the body as text.
    fn publish(&self, event: &serde_json::Value) {
        let envelope = serde_json::json!({
            "body": event.to_string(), "content-type": "application/json", "content-encoding": "utf-8",
            "headers": {}, "properties": {"delivery_tag": "t", "delivery_info": {}},
        });
        let words = ["PUBLISH", "/0.celeryev/task.x", &envelope.to_string()];
        let strings: String = words.map(|word| format!("${}\r\n{word}\r\n", word.len())).concat();
        let command = format!("*{}\r\n{strings}", words.len());
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).expect("a connection");
        connection.write_all(command.as_bytes()).expect("PUBLISH is sent");
        let mut reply = [0; 4];
        connection.read_exact(&mut reply).expect("PUBLISH is answered");
        assert_eq!(&reply, b":1\r\n", "one subscriber");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits for a condition with a deadline.
async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn event(kind: &str, uuid: &str, timestamp: f64) -> serde_json::Value {
    serde_json::json!({
        "type": kind, "hostname": "w@test", "timestamp": timestamp, "uuid": uuid, "name": "add", "eta": null,
        "exception": "ValueError('x')",
    })
}

fn config(redis: &Redis, directory: &TempDir) -> Config {
    let mut config = Config::default();
    config.broker.url = format!("redis://127.0.0.1:{}/0", redis.port).parse().expect("a valid URL");
    config.http.listen = "127.0.0.1:0".parse().expect("a valid address");
    config.state.persistent = true;
    config.state.db = directory.path().join("state");
    config
}

async fn connected(exporter: &Exporter) {
    wait_until("subscribed", async || exporter.health().broker() == BrokerStatus::Connected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedded_exporter_observes_queries_reloads_saves_and_restores() {
    let Some(redis) = Redis::start() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (observed_tx, observed_rx) = mpsc::channel();
    let exporter = Exporter::builder(config(&redis, &directory))
        .observer(move |event| {
            let exception = event.exception().filter(|_| event.kind == EventKind::TaskFailed);
            observed_tx.send((event.kind, event.uuid.to_string(), exception)).expect("the test is running");
        })
        .start()
        .await
        .expect("a started exporter");
    connected(&exporter).await;

    redis.publish(&event("task-received", "a", 1.0));
    redis.publish(&event("task-started", "a", 2.0));
    redis.publish(&event("task-failed", "a", 3.5));
    redis.publish(&event("task-received", "b", 4.0));
    wait_until("four events", async || exporter.decoded_events() == 4).await;

    let observed: Vec<_> = observed_rx.try_iter().collect();
    assert_eq!(observed[2], (EventKind::TaskFailed, "a".to_owned(), Some("ValueError('x')".to_owned())));
    let workers = exporter.workers().await;
    assert_eq!((workers.len(), workers[0].hostname.as_str(), workers[0].online), (1, "w@test", false));
    let task = exporter.task("a").await.expect("a task in memory");
    assert_eq!((task.state, task.name.as_str(), task.worker.as_deref()), (TaskState::Failed, "add", Some("w@test")));
    assert_eq!(exporter.tasks(0, 10).await.len(), 2);
    assert!(exporter.tasks(2, 10).await.is_empty());

    let registry = Registry::new();
    registry.register(Box::new(exporter.collector())).expect("no other collector");
    let families = tokio::task::spawn_blocking(move || registry.gather()).await.expect("no panic");
    assert!(families.iter().any(|family| family.name() == "flower_events_total" && family.get_metric().len() == 3));

    let mut changed = config(&redis, &directory);
    changed.state.worker_timeout = None;
    changed.state.max_tasks = 7;
    let report = exporter.reload(&changed).expect("a valid configuration");
    assert_eq!((report.applied, report.requires_restart), (vec!["state.worker_timeout"], vec!["state.max_tasks"]));

    exporter.save().await.expect("a saved state");
    exporter.shutdown().await.expect("a shutdown in time");

    let restored = Exporter::builder(config(&redis, &directory)).start().await.expect("a started exporter");
    assert_eq!(restored.task("a").await.map(|task| task.state), Some(TaskState::Failed));
    restored.shutdown().await.expect("a shutdown in time");
}

#[tokio::test]
async fn a_state_file_in_use_is_an_error() {
    let Some(redis) = Redis::start() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let first = Exporter::builder(config(&redis, &directory)).start().await.expect("a started exporter");
    let error = Exporter::builder(config(&redis, &directory)).start().await.err().expect("the file is locked");
    assert!(error.to_string().contains("locked by another process"), "{error}");
    first.shutdown().await.expect("a shutdown in time");
}
