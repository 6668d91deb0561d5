//! The one place where the parts are put together, started and drained.

use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::broker;
use crate::http::{self, Endpoints};
use crate::ingest::{Asker, Ingest, Observer, recent_messages};
use crate::metrics::FlowerCollector;
use crate::session::{Ack, Arrival, Session};
use crate::settings::{self, ReloadPlan, Settings};
use crate::state::{Limits, State, TaskView, WorkerView};
use crate::store::{self, Restored, Status, Store};
use crate::telemetry::{Health, Telemetry};

/// How long a stop may take.
pub const STOP_WITHIN: Duration = Duration::from_secs(4);

/// Why the exporter could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Settings that no connection can be made with.
    #[error("{0}")]
    Broker(#[from] broker::StartError),
    /// The address is taken, or not one of ours.
    #[error("http.listen = \"{address}\": cannot listen there: {error}: choose another address or stop what uses it")]
    Bind {
        /// As set.
        address: SocketAddr,
        /// The system's word.
        error: io::Error,
    },
    /// The saved state cannot be used.
    #[error("{0}")]
    Store(#[from] store::OpenError),
    /// A mistake in this program, told by its log.
    #[error("the saved state cannot be loaded: see the log")]
    Load,
    /// The system has no room for a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    /// A mistake in this program.
    #[error("the exporter's own metrics are inconsistent: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A running exporter. Dropping it stops it, without waiting for the end; [`Exporter::stop`] waits.
pub struct Exporter {
    asker: Asker,
    address: SocketAddr,
    settings: watch::Sender<Arc<Settings>>,
    telemetry: Arc<Telemetry>,
    health: Arc<Health>,
    stop: watch::Sender<bool>,
    http: JoinHandle<()>,
    /// Resolved when the ingest loop has ended.
    drained: oneshot::Receiver<()>,
    session_over: oneshot::Receiver<()>,
    /// Resolved when the last save is done with.
    saved: Option<oneshot::Receiver<()>>,
    _ending: Ending,
}

/// Ends the ingest loop, and the store with it, however the exporter goes.
struct Ending(Asker);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Exporter {
    /// Starts the exporter on the tokio runtime it is called from, with threads of its own for the broker's connection
    /// and for the events. `observers` are called with every event. With `state.persistent`, returns once the saved
    /// state is loaded; nothing is answered before.
    ///
    /// # Errors
    /// Files that the settings name are looked at, and the socket is bound: a taken port is an error at once. A broker that is not there is none; it is tried for
    /// ever. Saved state that another exporter has open for longer than ten seconds is an error; a file that cannot be
    /// read is set aside, and one that cannot be written is a warning.
    pub async fn start(settings: Settings, observers: Vec<Observer>) -> Result<Self, StartError> {
        broker::check(&settings)?;
        let address = settings.http.listen;
        let bind = |error| StartError::Bind { address, error };
        let listener = http::bind(address).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let shared = Shared::new()?;
        let (settings, watched) = watch::channel(Arc::new(settings));
        let (stop, stopped) = watch::channel(false);
        let (arrivals, incoming) = channel();
        let (queries, questions) = channel();
        let (acks, to_acknowledge) = mpsc::unbounded_channel();

        let now = Arc::clone(&watched.borrow());
        let Persistence { restored, store, saved } = Persistence::open(&now, &shared, &acks, &arrivals).await?;
        let Shared { telemetry, health } = shared;
        let ingest = Ingest {
            arrivals: incoming,
            queries: questions,
            acks,
            settings: watched.clone(),
            observers,
            telemetry: Arc::clone(&telemetry),
            health: Arc::clone(&health),
        };
        let drained = part("flower-ingest", &health, move || {
            ingest.run(restored, store);
            Ok(())
        })?;
        let asker = Asker::new(queries, arrivals.clone());
        let ending = Ending(asker.clone());
        let session = Session {
            settings: watched.clone(),
            arrivals,
            acks: to_acknowledge,
            stop: stopped.clone(),
            telemetry: Arc::clone(&telemetry),
            health: Arc::clone(&health),
        };
        let session_over = part("flower-broker", &health, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(session.run());
            runtime.shutdown_timeout(Duration::from_millis(100));
            Ok(())
        })?;
        let endpoints = Endpoints::new(asker.clone(), watched, Arc::clone(&telemetry), Arc::clone(&health));
        let http = tokio::spawn(http::serve(listener, Arc::new(endpoints), stopped));
        Ok(Self {
            asker,
            address,
            settings,
            telemetry,
            health,
            stop,
            http,
            drained,
            session_over,
            saved,
            _ending: ending,
        })
    }

    /// Where `/metrics` is served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What `/healthz` answers from.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Events read so far, counted or not.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.telemetry.events.get()
    }

    /// All workers as they stand; none when the exporter has stopped.
    pub async fn workers(&self) -> Vec<WorkerView> {
        self.asker.workers().await
    }

    /// One task as it stands.
    pub async fn task(&self, uuid: &str) -> Option<TaskView> {
        self.asker.task(uuid).await
    }

    /// The tasks held from place `start` on, at most `count` (a thousand is a good slice): empty at the end. In no
    /// particular order; one that comes or goes between two slices is in them or not.
    pub async fn tasks(&self, start: usize, count: usize) -> Vec<TaskView> {
        self.asker.tasks(start, count).await
    }

    /// Saves the state now. The future may be spawned and outlives the exporter.
    ///
    /// # Errors
    /// Why it is not on disk.
    pub fn save(&self) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let asker = self.asker.clone();
        async move { asker.save().await }
    }

    /// The six families, for a Registry of the embedding program.
    #[must_use]
    pub fn collector(&self) -> FlowerCollector {
        let asker = self.asker.clone();
        FlowerCollector::new(move || asker.snapshot_blocking())
    }

    /// Puts other settings in force, as far as that can be done live.
    #[allow(clippy::must_use_candidate, reason = "done for what it does")]
    pub fn reload(&self, new: &Settings) -> ReloadPlan {
        let plan = settings::reload(&self.settings.borrow(), new);
        self.settings.send_replace(Arc::new(plan.settings.clone()));
        plan
    }

    /// Stops reading, takes what is queued, finishes the responses in flight, saves the state. Returns within [`STOP_WITHIN`]; whether all
    /// was done by then.
    pub async fn stop(self) -> bool {
        let Self { asker, stop, http, drained, session_over, saved, .. } = self;
        stop.send_replace(true);
        let stopping = async {
            let _ = session_over.await;
            let _ = http.await;
            asker.stop();
            let _ = drained.await;
            if let Some(saved) = saved {
                let _ = saved.await;
            }
        };
        let done = tokio::time::timeout(STOP_WITHIN, stopping).await.is_ok();
        asker.stop();
        done
    }
}

/// What the parts tell of themselves.
struct Shared {
    telemetry: Arc<Telemetry>,
    health: Arc<Health>,
}

impl Shared {
    fn new() -> Result<Self, StartError> {
        Ok(Self { telemetry: Arc::new(Telemetry::new()?), health: Arc::new(Health::default()) })
    }
}

/// The state to begin with, and where it is saved.
struct Persistence {
    restored: Restored,
    store: Option<store::Handle>,
    saved: Option<oneshot::Receiver<()>>,
}

impl Persistence {
    async fn open(
        settings: &Settings,
        shared: &Shared,
        acks: &mpsc::UnboundedSender<Ack>,
        arrivals: &Sender<Arrival>,
    ) -> Result<Self, StartError> {
        let limits = Limits {
            max_workers: settings.state.max_workers,
            max_tasks: settings.state.max_tasks,
            max_label_pairs: settings.metrics.max_label_pairs,
            buckets: settings.metrics.task_runtime_metric_buckets.clone(),
        };
        if !settings.state.persistent {
            let restored = Restored { state: State::new(&limits), recent: Vec::new(), source: None };
            return Ok(Self { restored, store: None, saved: None });
        }
        let (handed_over, to_save) = channel();
        let status = Arc::new(Status::default());
        let store = Store {
            path: settings.state.db.clone(),
            limits,
            compact_every: settings.state.state_save_interval,
            kept_hashes: recent_messages(settings),
            saves: to_save,
            status: Arc::clone(&status),
            acks: acks.clone(),
            arrivals: arrivals.clone(),
            telemetry: Arc::clone(&shared.telemetry),
            health: Arc::clone(&shared.health),
        };
        let (opened, opening) = oneshot::channel();
        let saved = part("flower-store", &shared.health, move || {
            store.run(opened);
            Ok(())
        })?;
        let restored = opening.await.map_err(|_| StartError::Load)??;
        Ok(Self { restored, store: Some(store::Handle::new(handed_over, status)), saved: Some(saved) })
    }
}

/// Runs a part of the pipeline on a thread of its own. `/healthz` tells when it fails; the receiver, when it is over.
fn part(
    name: &str,
    health: &Arc<Health>,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<oneshot::Receiver<()>> {
    let (over, ended) = oneshot::channel();
    let health = Arc::clone(health);
    let (name, builder) = (name.to_owned(), thread::Builder::new().name(name.to_owned()));
    builder.spawn(move || {
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                health.died();
                tracing::error!(part = name, %error, "a part of the exporter failed");
            }
            Err(_) => {
                health.died();
                tracing::error!(part = name, "a part of the exporter panicked");
            }
        }
        drop(over);
    })?;
    Ok(ended)
}
