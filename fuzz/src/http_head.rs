//! What comes in on an HTTP connection: it is answered or closed, by the server's own settings.
//!
//! The first byte of an input says how many bytes of the rest are there at a time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use flower_exporter::celery::event;
use flower_exporter::http::{self, Endpoints};
use flower_exporter::ingest::{Asker, Query};
use flower_exporter::metrics::{Copying, Snapshot};
use flower_exporter::settings::Settings;
use flower_exporter::state::{Limits, State};
use flower_exporter::telemetry::{Health, Telemetry};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::yield_now;

/// An answer is there, or never will be, after so many rounds.
const ROUNDS: usize = 100_000;

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(input: &[u8]) {
    if let Some((first, bytes)) = input.split_first() {
        SERVER.with(|server| check(&server.converse(bytes, 16 + 16 * usize::from(*first))));
    }
}

/// Each status the server may answer with; none where it closed.
fn check(answer: &[u8]) {
    const STATUS: [&str; 9] = ["200", "400", "404", "405", "414", "417", "431", "503", "505"];
    if !answer.is_empty() {
        let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
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
        let (queries, to_answer) = channel();
        let settings = watch::channel(Arc::new(Settings::default())).1;
        let telemetry = Telemetry::new().expect("its names differ");
        // Nobody takes the arrivals: the questions are answered here.
        let asker = Asker::new(queries, channel().0);
        Self {
            runtime: Builder::new_current_thread().enable_time().build().expect("a runtime"),
            endpoints: Arc::new(Endpoints::new(asker, settings, telemetry.into(), Health::default().into())),
            queries: to_answer,
            snapshot: Arc::new(snapshot()),
            stop: watch::channel(false).0,
        }
    }

    /// All that comes back. The pipe holds `piece` bytes in either direction.
    fn converse(&self, bytes: &[u8], piece: usize) -> Vec<u8> {
        self.runtime.block_on(async {
            let (client, server) = duplex(piece);
            let (mut reader, mut writer) = tokio::io::split(client);
            let mut answer = Vec::new();
            let talk = async {
                tokio::join!(
                    http::serve_one(server, Arc::clone(&self.endpoints), self.stop.subscribe()),
                    async {
                        // The server may hang up in between.
                        let _ = writer.write_all(bytes).await;
                        let _ = writer.shutdown().await;
                    },
                    reader.read_to_end(&mut answer),
                )
            };
            tokio::select! {
                _ = talk => {}
                () = self.answer() => panic!("neither answered nor closed"),
            }
            answer
        })
    }

    /// In the ingest loop's place.
    async fn answer(&self) {
        for _ in 0..ROUNDS {
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
    let mut state = State::new(&Limits { max_workers: 9, max_tasks: 9, max_label_pairs: 9, buckets: vec![1.0] });
    event::decode(BODY, false, |event| {
        state.apply(&event.expect("an event"), std::time::Duration::ZERO);
    });
    let mut copying = Copying::start(state.series());
    while !copying.proceed(state.series(), 100) {}
    copying.finish(state.series())
}
