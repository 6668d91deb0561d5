//! Flower's six Prometheus series for Celery, from the events on `RabbitMQ` or Redis: as a daemon, and as a library to
//! embed.
//!
//! # The map, in reading order
//! - [`celery`]: what Celery puts on the wire, as pure functions.
//! - [`state`]: workers, tasks and how events move them; pure, bounded, time is passed in.
//! - [`metrics`]: the six families and their text.
//! - [`broker`]: one module a transport, all by the same [`tls`]; [`session`] connects, reconnects and marks the gaps.
//! - [`ingest`]: the hot loop, which alone owns the state.
//! - [`store`]: what survives a restart, and when a message may be acknowledged.
//! - [`http`]: `/metrics` and `/healthz`.
//! - [`daemon`]: puts the parts together: [`daemon::Exporter`] is where an embedding program starts.
//! - [`settings`], [`telemetry`], [`command`]: what the operator decides, what the exporter says of itself, and what the
//!   command line does.
//!
//! # Embedding
//! Start the exporter in a tokio program, listen to every event, read workers and tasks as they stand:
//!
//! ```no_run
//! use flower_exporter::celery::EventKind;
//! use flower_exporter::daemon::Exporter;
//! use flower_exporter::settings::Settings;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut settings = Settings::default();
//! settings.broker.url = "redis://localhost:6379/0".parse()?;
//! let exporter = Exporter::start(settings, vec![Box::new(|event| {
//!     // On the ingest thread: whatever takes long belongs elsewhere.
//!     if event.kind == EventKind::TaskFailed {
//!         println!("{}: {}", event.uuid, event.exception().unwrap_or_default());
//!     }
//! })])
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
pub mod telemetry;
pub mod tls;
