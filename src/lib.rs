//! Flower's six Prometheus series for Celery, from the events on `RabbitMQ` or Redis: as a daemon, and as a library to
//! embed.
//!
//! # A first program
//! [`Exporter::start`](daemon::Exporter::start) runs the whole exporter, `/metrics` included. HTTP is served on the tokio
//! runtime it is called from, which has to go on running; the broker's connection and the events have threads of their
//! own. This prints failed tasks:
//!
//! ```no_run
//! use std::sync::mpsc;
//! use std::thread;
//!
//! use flower_exporter::celery::EventKind;
//! use flower_exporter::daemon::Exporter;
//! use flower_exporter::settings::Settings;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut settings = Settings::default();
//! settings.broker.url = "redis://localhost:6379/0".parse()?;
//! settings.http.listen = "127.0.0.1:9555".parse()?;
//!
//! // An observer must not block: what takes long happens on another thread.
//! let (failed, tasks) = mpsc::channel::<(String, String)>();
//! thread::spawn(move || {
//!     for (uuid, exception) in tasks {
//!         println!("{uuid} failed: {exception}");
//!     }
//! });
//! let exporter = Exporter::start(
//!     settings,
//!     vec![Box::new(move |event| {
//!         if event.kind == EventKind::TaskFailed {
//!             let _ = failed.send((event.uuid.to_string(), event.exception().unwrap_or_default()));
//!         }
//!     })],
//! )
//! .await?;
//! println!("http://{}/metrics", exporter.address());
//! for worker in exporter.workers().await {
//!     println!("{} is {}", worker.hostname, if worker.online { "online" } else { "offline" });
//! }
//! prometheus::default_registry().register(Box::new(exporter.collector()))?;
//! exporter.stop().await;
//! # Ok(())
//! # }
//! ```
//!
//! `examples/failed_tasks.rs` is a whole program. A broker that is not there is no error: it is tried for ever. A port
//! in use, a file that cannot be read, or saved state that another exporter has open is a
//! [`StartError`](daemon::StartError).
//!
//! # The observer
//! An [`Observer`](ingest::Observer) is called with every [`Event`](celery::Event) that could be read, in the order of
//! arrival, after the state has taken it; also with those of workers that `events.hostnames` leaves out.
//! - It runs on the thread of the events and must not block: the loop waits for it. On Redis, what does not fit the
//!   queue meanwhile is dropped.
//! - It must not gather the [`FlowerCollector`](metrics::FlowerCollector): the loop would wait for itself.
//! - When it panics, that is logged and counted, and it is called again for the next event.
//! - The event borrows the message: keep what you need as a `String`. [`exception`](celery::Event::exception),
//!   [`args`](celery::Event::args) and [`field`](celery::Event::field) read the event's text again at each call; call
//!   them for the events you want only.
//! - Arguments, results and exceptions are Python reprs, and may hold secrets. The exporter itself stores none of them.
//!
//! # Looking, and acting
//! - [`workers`](daemon::Exporter::workers), [`task`](daemon::Exporter::task) and [`tasks`](daemon::Exporter::tasks): how
//!   things stand, as [`WorkerView`](state::WorkerView) and [`TaskView`](state::TaskView).
//! - [`collector`](daemon::Exporter::collector): the six families for a Registry of the prometheus crate. Gathering waits
//!   for the ingest loop, at most ten seconds.
//! - [`health`](daemon::Exporter::health): what `/healthz` answers from, warnings included.
//! - [`reload`](daemon::Exporter::reload), [`save`](daemon::Exporter::save), [`stop`](daemon::Exporter::stop): what SIGHUP,
//!   SIGUSR1 and SIGTERM do to the daemon. Signals, and what systemd is told, are the program's own: the library handles
//!   none, and its log goes to the program's `tracing` subscriber.
//!
//! # The map, in reading order
//! - [`celery`]: what Celery puts on the wire, as pure functions.
//! - [`state`]: workers, tasks and how events move them; pure, bounded, time is passed in.
//! - [`metrics`]: the six families and their text.
//! - [`broker`]: one module a transport, all by the same [`tls`]; [`session`] connects, reconnects and marks the gaps.
//! - [`ingest`]: the hot loop, which alone owns the state.
//! - [`store`]: what survives a restart, and when a message may be acknowledged.
//! - [`http`]: `/metrics` and `/healthz`.
//! - [`daemon`]: puts the parts together.
//! - [`settings`], [`telemetry`], [`command`]: what the operator decides, what the exporter says of itself, and what the
//!   command line does.
pub mod broker;
pub mod celery;
pub mod command;
pub mod daemon;
pub mod http;
pub mod ingest;
mod logging;
mod marks;
pub mod metrics;
mod quiet;
pub mod session;
pub mod settings;
mod signals;
pub mod state;
pub mod store;
mod systemd;
pub mod telemetry;
pub mod tls;

/// The version with the commit and the target it was built from and for.
pub const VERSION: &str = env!("FLOWER_EXPORTER_VERSION");
