//! Flower's six Prometheus metrics for Celery, from the events on `RabbitMQ` or Redis: a daemon, and a library to
//! embed.
//!
//! # A first program
//! [`Exporter::builder`] configures and starts the whole exporter, `/metrics` included. HTTP is served on the current
//! tokio runtime, which must keep running. The broker's connection and the events have separate threads. This program
//! prints failed tasks:
//!
//! ```no_run
//! use std::sync::mpsc;
//! use std::thread;
//!
//! use flower_exporter::{Config, EventKind, Exporter};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::default();
//! config.broker.url = "redis://localhost:6379/0".parse()?;
//! config.http.listen = "127.0.0.1:9555".parse()?;
//!
//! // An observer must not block, so slow work is done on another thread.
//! let (failed, tasks) = mpsc::channel::<(String, String)>();
//! thread::spawn(move || {
//!     for (uuid, exception) in tasks {
//!         println!("{uuid} failed: {exception}");
//!     }
//! });
//! let exporter = Exporter::builder(config)
//!     .observer(move |event| {
//!         if event.kind == EventKind::TaskFailed {
//!             let _ = failed.send((event.uuid.to_string(), event.exception().unwrap_or_default()));
//!         }
//!     })
//!     .start()
//!     .await?;
//! println!("http://{}/metrics", exporter.address());
//! for worker in exporter.workers().await {
//!     println!("{} is {}", worker.hostname, if worker.online { "online" } else { "offline" });
//! }
//! prometheus::default_registry().register(Box::new(exporter.collector()))?;
//! exporter.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! `examples/failed_tasks.rs` is a complete program. A broker that cannot be reached is not an error: the exporter
//! retries indefinitely. An address in use, a URL or TLS file that cannot be read, or a state file that another process
//! has open is a [`StartError`].
//!
//! # Observers
//! An observer is called with every [`Event`] that could be decoded, in order of arrival, after the state has applied
//! it. That includes events of workers that `events.hostnames` leaves out.
//! - It runs on the ingest thread and must not block. On Redis, messages that do not fit into the buffer during a call
//!   are dropped.
//! - It must not gather the exporter's [`collector`](Exporter::collector), which waits for the ingest thread.
//! - A panic is logged and counted, and the observer is called again for the next event.
//! - The event borrows from the message: copy what must outlive the call. [`exception`](Event::exception),
//!   [`args`](Event::args) and [`field`](Event::field) parse the event's text at each call.
//! - Arguments, results and exceptions are Python reprs and may contain secrets. The exporter stores none of them.
//!
//! # Queries and control
//! - [`workers`](Exporter::workers), [`task`](Exporter::task) and [`tasks`](Exporter::tasks) return the current state
//!   as [`WorkerInfo`] and [`TaskInfo`].
//! - [`collector`](Exporter::collector) exports the six families to a `prometheus::Registry`. Gathering waits
//!   for the ingest thread, for at most ten seconds.
//! - [`health`](Exporter::health) is the state behind `/healthz`, warnings included.
//! - [`reload`](Exporter::reload), [`save`](Exporter::save) and [`shutdown`](Exporter::shutdown) do what SIGHUP,
//!   SIGUSR1 and SIGTERM do to the daemon. The library handles no signals, and its log goes to the program's `tracing`
//!   subscriber.
//!
//! # Platforms
//! Only Linux builds are tested. On other Unix systems, the `process_*` metrics and the detection of systemd's journal
//! are left out. The crate's `rust-version` is declared, not verified by compiling with that version.
//!
//! # Features
//! `cli` (on by default) is the daemon: command line, signals, systemd, log subscriber. A library needs
//! `default-features = false`.
//!
//! # Reading order of the source
//! Apart from `config`, these modules are hidden and not part of the API. Imports point in one direction, from the end
//! of this list to its beginning:
//! 1. `config`, `celery` (the wire format, pure), `tls`, `observability` and `inbox` (the bounded buffer): the base.
//! 2. `metrics` (the six families), `state` (workers, tasks, transitions) and `broker` (one module per transport).
//! 3. `store` (what survives a restart), `ingest` (the loop that owns the state), `session` (connects and reconnects)
//!    and `http`.
//! 4. `exporter` assembles them, and `cli` is the program around it.

#[doc(hidden)]
pub mod broker;
#[doc(hidden)]
pub mod celery;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod config;
mod exporter;
#[doc(hidden)]
pub mod http;
#[doc(hidden)]
pub mod inbox;
#[doc(hidden)]
pub mod ingest;
#[doc(hidden)]
pub mod metrics;
#[doc(hidden)]
pub mod observability;
mod session;
#[doc(hidden)]
pub mod state;
mod store;
mod tls;

pub use broker::BrokerConfigError;
pub use celery::{Event, EventKind};
pub use config::{Config, ConfigError};
pub use exporter::{Exporter, ExporterBuilder, SHUTDOWN_TIMEOUT, ShutdownError, StartError};
pub use observability::{BrokerStatus, Health};
pub use state::{TaskInfo, TaskState, WorkerInfo};
pub use store::{OpenError, SaveError};
pub use tls::TlsError;

/// The version, with the commit that it was built from and the target that it was built for.
pub const VERSION: &str = env!("FLOWER_EXPORTER_VERSION");
