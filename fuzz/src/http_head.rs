//! Bytes on an HTTP connection: the server responds or closes the connection, within its own limits.
//!
//! The first byte of an input sets how many bytes of the rest the connection buffers at a time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use flower_exporter::celery::event;
use flower_exporter::config::Config;
use flower_exporter::http::{self, Endpoints};
use flower_exporter::inbox::Inbox;
use flower_exporter::ingest::{IngestHandle, Query};
use flower_exporter::metrics::SeriesOptions;
use flower_exporter::metrics::{Snapshot, SnapshotBuilder};
use flower_exporter::observability::{Health, SelfMetrics};
use flower_exporter::state::{Arrival, Limits, State};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::yield_now;

/// Rounds of the runtime after which a missing response counts as a finding.
const MAX_ROUNDS: usize = 100_000;

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(input: &[u8]) {
    if let Some((first, bytes)) = input.split_first() {
        SERVER.with(|server| assert_valid(&server.exchange(bytes, 16 + 16 * usize::from(*first))));
    }
}

/// Asserts that a response has a known status, or is empty because the server closed the connection.
fn assert_valid(response: &[u8]) {
    const STATUS: [&str; 9] = ["200", "400", "404", "405", "414", "417", "431", "503", "505"];
    if !response.is_empty() {
        let line = response.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = str::from_utf8(line).expect("a status line");
        let status = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 "));
        assert!(status.is_some_and(|status| STATUS.contains(&&status[..3])), "{line}");
    }
}

thread_local! {
    static SERVER: Server = Server::new();
}

struct Server {
    runtime: Runtime,
    endpoints: Arc<Endpoints>,
    queries: Receiver<Query>,
    snapshot: Arc<Snapshot>,
    stop: watch::Sender<bool>,
}

impl Server {
    fn new() -> Self {
        let (queries_tx, queries_rx) = channel();
        let config = watch::channel(Arc::new(Config::default())).1;
        let self_metrics = Arc::new(SelfMetrics::new().expect("the metric names are unique"));
        // The inbox has no receiver, because this fixture answers the queries.
        let (inbox, _) = Inbox::new(1, Arc::clone(&self_metrics), Health::default().into());
        let ingest = IngestHandle::new(queries_tx, inbox);
        Self {
            runtime: Builder::new_current_thread().enable_time().build().expect("a runtime"),
            endpoints: Arc::new(Endpoints::new(
                ingest,
                config,
                watch::channel(Arc::default()).1,
                self_metrics,
                Health::default().into(),
            )),
            queries: queries_rx,
            snapshot: Arc::new(snapshot()),
            stop: watch::channel(false).0,
        }
    }

    /// Sends `bytes` and returns the response. The pipe buffers `piece` bytes in each direction.
    fn exchange(&self, bytes: &[u8], piece: usize) -> Vec<u8> {
        self.runtime.block_on(async {
            let (client, server) = duplex(piece);
            let (mut reader, mut writer) = tokio::io::split(client);
            let mut response = Vec::new();
            let exchange = async {
                tokio::join!(
                    http::serve_one(server, Arc::clone(&self.endpoints), self.stop.subscribe()),
                    async {
                        // The server may close the connection first.
                        let _ = writer.write_all(bytes).await;
                        let _ = writer.shutdown().await;
                    },
                    reader.read_to_end(&mut response),
                )
            };
            tokio::select! {
                _ = exchange => {}
                () = self.answer_queries() => panic!("neither responded nor closed"),
            }
            response
        })
    }

    /// Answers queries instead of the ingest loop.
    async fn answer_queries(&self) {
        for _ in 0..MAX_ROUNDS {
            while let Ok(query) = self.queries.try_recv() {
                if let Query::Snapshot(reply) = query {
                    reply(Arc::clone(&self.snapshot));
                }
            }
            yield_now().await;
        }
    }
}

fn snapshot() -> Snapshot {
    const BODY: &[u8] = br#"[{"type": "worker-heartbeat", "hostname": "w", "active": 1},
        {"type": "task-received", "hostname": "w", "timestamp": 1, "uuid": "a", "name": "add", "eta": null},
        {"type": "task-succeeded", "hostname": "w", "timestamp": 2, "uuid": "a", "runtime": 0.5}]"#;
    let mut state = State::new(&Limits {
        max_workers: 9,
        max_tasks: 9,
        series: SeriesOptions { max_label_sets: 9, bounds: vec![1.0], ..SeriesOptions::default() },
    });
    event::decode(BODY, false, |event| {
        state.apply(event.expect("an event"), Arrival::in_order(Duration::ZERO));
    });
    let mut builder = SnapshotBuilder::new(state.series());
    while !builder.step(state.series(), 100) {}
    builder.finish(state.series())
}
