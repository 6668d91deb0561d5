//! Assembles the components, starts them and shuts them down. No other module depends on all of them.

use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use prometheus::core::Collector;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::broker::{self, BrokerConfigError};
use crate::celery::Event;
use crate::config::{self, Config, ReloadReport};
use crate::http::{self, Endpoints, WebConfig, WebConfigError};
use crate::inbox::{Ack, Inbox, WorkerStarts};
use crate::ingest::{Ingest, IngestHandle, Observer, redelivery_window};
use crate::metrics::{FlowerCollector, SeriesOptions};
#[cfg(feature = "cli")]
use crate::observability::WarningSource;
use crate::observability::{ConfigPart, Health, SelfMetrics};
use crate::session::SessionLoop;
use crate::state::{Limits, TaskInfo, WorkerInfo};
use crate::store::{OpenError, Restored, SaveError, Store, StoreHandle, StoreStatus};

/// How long [`Exporter::shutdown`] may take.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(4);

/// The exporter could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The broker's settings are invalid, or a file that they name cannot be used.
    #[error(transparent)]
    Broker(#[from] BrokerConfigError),
    /// The address is in use, does not belong to this host, or requires privileges.
    #[error(
        "failed to bind http.listen = \"{address}\": {source}; choose another address, or stop the process that uses it"
    )]
    Bind {
        /// As configured.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The web configuration file, or a file that it names, cannot be used.
    #[error(transparent)]
    WebConfig(#[from] WebConfigError),
    /// The saved state is in use.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A panic while the saved state was loaded. The log has its message.
    #[error("failed to load state: see the log")]
    Load,
    /// A thread could not be created.
    #[error("failed to start a thread: {0}")]
    Thread(#[from] io::Error),
    /// A bug: the exporter's own metrics are inconsistent.
    #[error("failed to register the exporter's own metrics: {0}")]
    Metrics(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The exporter did not finish in time: [`SHUTDOWN_TIMEOUT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shutdown timed out after {} s", SHUTDOWN_TIMEOUT.as_secs())]
#[non_exhaustive]
pub struct ShutdownError;

/// Configures an [`Exporter`] before it is started.
#[must_use]
pub struct ExporterBuilder {
    config: Config,
    observers: Vec<Observer>,
}

impl ExporterBuilder {
    /// Adds an observer. It is called with every event that could be decoded, on the ingest thread, after the state has
    /// applied it. It must not block, because the ingest loop waits for it.
    pub fn observer(mut self, observer: impl FnMut(&Event<'_>) + Send + 'static) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Starts the exporter on the current tokio runtime, with separate threads for the broker's connection and for the
    /// events. With `state.persistent`, returns once the saved state is loaded.
    ///
    /// # Errors
    /// Returns an error if the configuration is invalid, if a URL or TLS file that it names cannot be used, if the
    /// address cannot be bound, or if another process has held the state file for ten seconds. A broker that cannot be
    /// reached is not an error: the exporter retries indefinitely. A state file that cannot be decoded is moved aside,
    /// and one that cannot be opened is retried while the exporter runs without it.
    pub async fn start(self) -> Result<Exporter, StartError> {
        Exporter::start(self.config, self.observers).await
    }
}

/// A running exporter. Dropping it stops it without waiting; [`Exporter::shutdown`] waits.
pub struct Exporter {
    ingest: IngestHandle,
    address: SocketAddr,
    config_tx: watch::Sender<Arc<Config>>,
    web_config: watch::Receiver<Arc<WebConfig>>,
    self_metrics: Arc<SelfMetrics>,
    health: Arc<Health>,
    stop_tx: watch::Sender<bool>,
    http: JoinHandle<()>,
    ingest_done: oneshot::Receiver<()>,
    session_done: oneshot::Receiver<()>,
    store_done: Option<oneshot::Receiver<()>>,
    _stop_on_drop: StopOnDrop,
}

/// Ends the ingest loop and the store, however the exporter ends.
struct StopOnDrop(IngestHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Exporter {
    /// An exporter with this configuration, to be started.
    pub fn builder(config: Config) -> ExporterBuilder {
        ExporterBuilder { config, observers: Vec::new() }
    }

    async fn start(config: Config, observers: Vec<Observer>) -> Result<Self, StartError> {
        broker::validate(&config)?;
        let web_config = WebConfig::load(config.http.web_config_file.as_deref())?;
        let address = config.http.listen;
        let bind_error = |source| StartError::Bind { address, source };
        let listener = http::bind(address).map_err(bind_error)?;
        let address = listener.local_addr().map_err(bind_error)?;
        let observability = Observability::new()?;
        let Observability { self_metrics, health } = observability.clone();
        let (inbox, inbox_rx) =
            Inbox::new(config.events.buffer_max_bytes, Arc::clone(&self_metrics), Arc::clone(&health));
        let (acks_tx, acks_rx) = mpsc::unbounded_channel();
        let (starts_tx, starts_rx) = watch::channel(WorkerStarts::default());
        let persistence = Persistence::open(&config, &observability, &acks_tx, &inbox).await?;
        let (config_tx, config_rx) = watch::channel(Arc::new(config));
        let (stop_tx, stop_rx) = watch::channel(false);

        let (queries_tx, queries_rx) = channel();
        let ingest = Ingest {
            inbox_rx,
            queries_rx,
            acks_tx,
            starts_tx,
            config: config_rx.clone(),
            observers,
            self_metrics: Arc::clone(&self_metrics),
            health: Arc::clone(&health),
        };
        let ingest_done = spawn_component("flower-ingest", &health, move || {
            ingest.run(persistence.restored, persistence.store);
            Ok(())
        })?;
        let ingest = IngestHandle::new(queries_tx, inbox.clone());
        let stop_on_drop = StopOnDrop(ingest.clone());
        let session = SessionLoop {
            config: config_rx.clone(),
            inbox,
            acks_rx,
            starts_rx,
            stop_rx: stop_rx.clone(),
            self_metrics: Arc::clone(&self_metrics),
            health: Arc::clone(&health),
        };
        let session_done = spawn_component("flower-broker", &health, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(session.run());
            runtime.shutdown_timeout(Duration::from_millis(100));
            Ok(())
        })?;
        let web_config = http::follow(web_config, &health, &self_metrics);
        let endpoints = Endpoints::new(
            ingest.clone(),
            config_rx,
            web_config.clone(),
            Arc::clone(&self_metrics),
            Arc::clone(&health),
        );
        let http = tokio::spawn(http::serve(listener, Arc::new(endpoints), stop_rx));
        Ok(Self {
            ingest,
            address,
            config_tx,
            web_config,
            self_metrics,
            health,
            stop_tx,
            http,
            ingest_done,
            session_done,
            store_done: persistence.store_done,
            _stop_on_drop: stop_on_drop,
        })
    }

    /// Where `/metrics` is served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The scheme and the address of `/metrics`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", self.web_config.borrow().scheme(), self.address)
    }

    /// The state behind `/healthz`.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Events decoded so far, including those that `events.hostnames` leaves out.
    #[must_use]
    pub fn decoded_events(&self) -> u64 {
        self.self_metrics.decoded_events.get()
    }

    /// All workers. Empty once the exporter has stopped.
    pub async fn workers(&self) -> Vec<WorkerInfo> {
        self.ingest.workers().await
    }

    /// The task with this id.
    pub async fn task(&self, uuid: &str) -> Option<TaskInfo> {
        self.ingest.task(uuid).await
    }

    /// A page of the tasks in memory, in no particular order: at most `count` tasks (1000 is a reasonable page size),
    /// starting at index `start`. Empty at the end. A task that is added or evicted between two calls may be missing.
    pub async fn tasks(&self, start: usize, count: usize) -> Vec<TaskInfo> {
        self.ingest.tasks(start, count).await
    }

    /// Saves the state now. The future may be spawned and outlives the exporter.
    ///
    /// # Errors
    /// Returns an error if the state is not on disk.
    pub fn save(&self) -> impl Future<Output = Result<(), SaveError>> + Send + use<> {
        let ingest = self.ingest.clone();
        async move { ingest.save().await }
    }

    /// The six families, for a `prometheus::Registry` of the embedding program.
    #[must_use]
    pub fn collector(&self) -> impl Collector + use<> {
        let ingest = self.ingest.clone();
        FlowerCollector::new(move || ingest.snapshot_blocking())
    }

    /// Applies another configuration, as far as that is possible without a restart.
    ///
    /// # Errors
    /// Returns an error if the configuration is invalid. Nothing changes then.
    pub fn reload(&self, new: &Config) -> Result<ReloadReport, config::ConfigError> {
        let validated = new.validate();
        self.self_metrics.record_reload(ConfigPart::Settings, validated.is_ok());
        validated?;
        let report = config::plan_reload(&self.config_tx.borrow(), new);
        self.config_tx.send_replace(Arc::new(report.config.clone()));
        Ok(report)
    }

    /// Records that the configuration could not be loaded again, for the exporter's own metrics.
    pub fn record_failed_reload(&self) {
        self.self_metrics.record_reload(ConfigPart::Settings, false);
    }

    /// Records how many log lines were lost since the last call, and whether lines are still lost.
    #[cfg(feature = "cli")]
    pub(crate) fn record_lost_log_lines(&self, count: u64, is_lossy: bool) {
        self.self_metrics.lost_log_lines.inc_by(count);
        let warning = is_lossy.then(|| "log lines are lost: standard error is closed or not read".to_owned());
        self.health.set_unlogged_warnings(WarningSource::Log, warning.into_iter().collect());
    }

    /// Stops receiving, processes what is in the buffer, finishes the responses in flight and saves the state.
    ///
    /// # Errors
    /// Returns an error if that takes longer than [`SHUTDOWN_TIMEOUT`].
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        let Self { ingest, stop_tx, http, ingest_done, session_done, store_done, .. } = self;
        stop_tx.send_replace(true);
        let draining = async {
            let _ = session_done.await;
            let _ = http.await;
            ingest.stop();
            let _ = ingest_done.await;
            if let Some(store_done) = store_done {
                let _ = store_done.await;
            }
        };
        let drained = tokio::time::timeout(SHUTDOWN_TIMEOUT, draining).await;
        ingest.stop();
        drained.map_err(|_| ShutdownError)
    }
}

/// The metrics and the health that every component updates.
#[derive(Clone)]
struct Observability {
    self_metrics: Arc<SelfMetrics>,
    health: Arc<Health>,
}

impl Observability {
    fn new() -> Result<Self, StartError> {
        let self_metrics = SelfMetrics::new().map_err(|error| StartError::Metrics(Box::new(error)))?;
        Ok(Self { self_metrics: Arc::new(self_metrics), health: Arc::new(Health::default()) })
    }
}

/// The state to start with, and the store that saves it.
struct Persistence {
    restored: Restored,
    store: Option<StoreHandle>,
    store_done: Option<oneshot::Receiver<()>>,
}

impl Persistence {
    async fn open(
        config: &Config,
        observability: &Observability,
        acks_tx: &mpsc::UnboundedSender<Ack>,
        inbox: &Inbox,
    ) -> Result<Self, StartError> {
        let limits = Limits {
            max_workers: config.state.max_workers,
            max_tasks: config.state.max_tasks,
            series: SeriesOptions::new(&config.metrics),
        };
        if !config.state.persistent {
            return Ok(Self { restored: Restored::without_store(&limits), store: None, store_done: None });
        }
        let (saves_tx, saves_rx) = channel();
        let status = Arc::new(StoreStatus::default());
        let store = Store {
            path: config.state.db.clone(),
            limits,
            hashes_to_keep: redelivery_window(config),
            saves_rx,
            status: Arc::clone(&status),
            acks_tx: acks_tx.clone(),
            inbox: inbox.clone(),
            self_metrics: Arc::clone(&observability.self_metrics),
            health: Arc::clone(&observability.health),
        };
        let (opened_tx, opened_rx) = oneshot::channel();
        let store_done = spawn_component("flower-store", &observability.health, move || {
            store.run(opened_tx);
            Ok(())
        })?;
        let restored = opened_rx.await.map_err(|_| StartError::Load)??;
        Ok(Self { restored, store: Some(StoreHandle::new(saves_tx, status)), store_done: Some(store_done) })
    }
}

/// Runs a component on a separate thread. `/healthz` shows whether it failed. The receiver resolves once it has ended.
fn spawn_component(
    name: &'static str,
    health: &Arc<Health>,
    run: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<oneshot::Receiver<()>> {
    let (done_tx, done_rx) = oneshot::channel();
    let health = Arc::clone(health);
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                health.mark_failed();
                tracing::error!(component = name, %error, "component failed");
            }
            Err(_) => {
                health.mark_failed();
                tracing::error!(component = name, "component panicked");
            }
        }
        drop(done_tx);
    })?;
    Ok(done_rx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_that_fails_or_panics_is_unhealthy() {
        for run in [(|| Err(io::Error::other("test"))) as fn() -> io::Result<()>, || panic!("test")] {
            let health = Arc::new(Health::default());
            let done = spawn_component("test", &health, run).unwrap();
            assert!(done.blocking_recv().is_err(), "the sender is dropped at the end");
            assert!(!health.is_alive());
        }
    }

    /// A configuration whose broker cannot be reached.
    fn unreachable_broker() -> Config {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut config = Config::default();
        config.broker.url = format!("redis://127.0.0.1:{port}/0").parse().unwrap();
        config.http.listen = "127.0.0.1:0".parse().unwrap();
        config
    }

    #[tokio::test]
    async fn an_unreachable_broker_does_not_prevent_start_or_shutdown() {
        let exporter = Exporter::builder(unreachable_broker()).start().await.unwrap();
        assert_ne!(exporter.address().port(), 0);
        assert!(exporter.workers().await.is_empty());
        assert!(matches!(exporter.save().await, Err(SaveError::NotPersistent)));
        exporter.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn an_address_in_use_is_a_start_error_with_its_cause() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = unreachable_broker();
        config.http.listen = taken.local_addr().unwrap();
        let error = Exporter::builder(config).start().await.err().unwrap();
        assert!(matches!(error, StartError::Bind { .. }) && std::error::Error::source(&error).is_some(), "{error}");
    }

    #[tokio::test]
    async fn an_invalid_reload_changes_nothing() {
        let exporter = Exporter::builder(unreachable_broker()).start().await.unwrap();
        let mut invalid = unreachable_broker();
        invalid.broker.url_file = Some("/nowhere".into());
        assert!(exporter.reload(&invalid).is_err());
        let mut changed = (**exporter.config_tx.borrow()).clone();
        changed.state.worker_timeout = None;
        changed.state.max_tasks = 5;
        let report = exporter.reload(&changed).unwrap();
        assert_eq!((report.applied, report.requires_restart), (vec!["state.worker_timeout"], vec!["state.max_tasks"]));
        exporter.shutdown().await.unwrap();
    }
}
