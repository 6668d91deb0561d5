//! Saves the state, so that it survives a restart. Messages of a named queue are acknowledged after the save.
//!
//! Runs on a separate thread, because it blocks on the disk. The ingest loop submits one [`Save`] at a time. After a
//! failed save the next one must be full. Until it is on disk, nothing waits for the disk: messages are acknowledged
//! once they are counted.

mod db;
mod writer;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot};

use db::{DbError, StateDb};
use writer::StoreWriter;

use crate::inbox::{Ack, Inbox, IngestMessage, ReplyFn};
use crate::observability::{Health, SelfMetrics};
use crate::state::{Delta, Limits, State};

/// How long to wait for the file if another exporter has it open or it cannot be opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const OPEN_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The exporter cannot start with its saved state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has the file open.
    #[error("state.db = \"{}\": locked by another process; stop it or set a different state.db", .0.display())]
    Locked(PathBuf),
}

/// The state is not on disk.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// `state.persistent` is off.
    #[error("state.persistent is off")]
    NotPersistent,
    /// The last save failed and is being retried.
    #[error("the last save failed and is being retried")]
    Retrying,
    /// The exporter has stopped.
    #[error("the exporter has stopped")]
    Stopped,
    /// The file could not be written.
    #[error("failed to write {}", path.display())]
    Write {
        /// `state.db`.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
}

/// A message in a named queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// The queue's virtual host and name.
    pub queue: Arc<str>,
    /// The hash of the message. `None` if no message has been processed yet.
    pub message: Option<u64>,
}

/// The contents of one transaction.
#[derive(Default)]
pub struct Save {
    /// The changed records.
    pub delta: Delta,
    /// Hashes of the messages that changed it, from a named queue.
    pub message_hashes: Vec<u64>,
    /// The newest of these messages. It is acknowledged only after a later save.
    pub position: Option<QueuePosition>,
    /// Sent after the save, even if it failed: messages do not wait for a disk that cannot be written.
    pub ack: Option<Ack>,
    /// Receives the result of a requested save.
    pub replies: Vec<ReplyFn<Result<(), SaveError>>>,
}

/// The state to start with.
#[derive(Debug)]
pub struct Restored {
    /// The state, which tracks its changes from now on.
    pub state: State,
    /// Hashes of the last messages, oldest first.
    pub message_hashes: Vec<u64>,
    /// The newest message whose effect is saved.
    pub position: Option<QueuePosition>,
    /// Whether there was no saved state.
    pub is_new: bool,
    /// When it was saved.
    pub saved_at: Option<SystemTime>,
}

impl Restored {
    /// A new state that tracks its changes, to be saved.
    fn empty(limits: &Limits) -> Self {
        let mut restored = Self::without_store(limits);
        restored.state.track_changes();
        restored
    }

    /// A new state that is not saved.
    #[must_use]
    pub fn without_store(limits: &Limits) -> Self {
        Self { state: State::new(limits), message_hashes: Vec::new(), position: None, is_new: true, saved_at: None }
    }
}

/// The store's status, for the ingest loop.
#[derive(Debug, Default)]
pub struct StoreStatus {
    busy: AtomicBool,
    failing: AtomicBool,
}

impl StoreStatus {
    /// Whether a save is under way, or waits until the disk can be written again.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Whether the last save failed: the next one must be full.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Acquire)
    }

    pub(crate) fn set_busy(&self) {
        self.busy.store(true, Ordering::Release);
    }

    pub(crate) fn set_idle(&self) {
        self.busy.store(false, Ordering::Release);
    }

    fn set_failing(&self) {
        self.failing.store(true, Ordering::Release);
    }

    /// Returns whether the store was failing.
    fn clear_failing(&self) -> bool {
        self.failing.swap(false, Ordering::AcqRel)
    }
}

/// The ingest loop's side of the store.
#[derive(Debug)]
pub struct StoreHandle {
    saves_tx: Sender<Save>,
    /// The store's status.
    pub status: Arc<StoreStatus>,
}

impl StoreHandle {
    /// A handle to the store at the other end of the channel.
    #[must_use]
    pub fn new(saves_tx: Sender<Save>, status: Arc<StoreStatus>) -> Self {
        Self { saves_tx, status }
    }

    /// Submits a save. The store is busy until it is done.
    pub fn save(&self, save: Save) {
        self.status.set_busy();
        // If the store has failed, `Health` reports that.
        let _ = self.saves_tx.send(save);
    }
}

/// The store's inputs and outputs.
pub struct Store {
    /// `state.db`.
    pub path: PathBuf,
    /// Bounds of the state.
    pub limits: Limits,
    /// How many message hashes are kept.
    pub hashes_to_keep: usize,
    /// Saves from the ingest loop.
    pub saves_rx: Receiver<Save>,
    /// Shared with the ingest loop.
    pub status: Arc<StoreStatus>,
    /// Acknowledgments to the session.
    pub acks_tx: mpsc::UnboundedSender<Ack>,
    /// The inbox of the ingest loop, which may submit the next save.
    pub inbox: Inbox,
    /// The exporter's own metrics.
    pub self_metrics: Arc<SelfMetrics>,
    /// The state behind `/healthz`.
    pub health: Arc<Health>,
}

impl Store {
    /// Opens the file, sends what it contains to `opened_tx`, and saves until the ingest loop has ended.
    pub fn run(self, opened_tx: oneshot::Sender<Result<Restored, OpenError>>) {
        let _fail_on_drop = UnavailableOnDrop { status: Arc::clone(&self.status), inbox: self.inbox.clone() };
        match self.open_or_wait(&opened_tx) {
            Ok((db, restored)) => {
                if db.is_err() {
                    self.status.set_busy();
                }
                self.health.record_save(restored.saved_at);
                if opened_tx.send(Ok(restored)).is_ok() {
                    StoreWriter::new(self, db).run();
                }
            }
            // If the exporter was dropped, the error is not needed.
            Err(error) => drop(opened_tx.send(Err(error))),
        }
    }

    /// The file and its state; or an empty state, and why the file cannot be opened.
    fn open_or_wait(
        &self,
        opened_tx: &oneshot::Sender<Result<Restored, OpenError>>,
    ) -> Result<(Result<StateDb, DbError>, Restored), OpenError> {
        let started = Instant::now();
        let may_wait = || started.elapsed() < OPEN_TIMEOUT && !opened_tx.is_closed();
        let mut last_error = None;
        let error = loop {
            match StateDb::open(&self.path, &self.limits) {
                Ok((db, restored)) => {
                    if let Some(restored) = &restored {
                        self.log_loaded(restored, started.elapsed());
                    }
                    return Ok((Ok(db), restored.unwrap_or_else(|| Restored::empty(&self.limits))));
                }
                Err(DbError::Locked) if !may_wait() => return Err(OpenError::Locked(self.path.clone())),
                Err(DbError::Unreadable(reason)) => {
                    if let Err(error) = quarantine(&self.path, &reason, "starting with an empty state") {
                        break error;
                    }
                }
                // Starting without a file that exists but cannot be opened yet would lose its contents.
                Err(error) if matches!(error, DbError::Locked) || self.may_exist() && may_wait() => {
                    self.log_waiting(&error, &mut last_error);
                    thread::sleep(OPEN_POLL_INTERVAL);
                }
                Err(error) => break error,
            }
        };
        Ok((Err(error), Restored::empty(&self.limits)))
    }

    fn log_loaded(&self, restored: &Restored, elapsed: Duration) {
        let (workers, tasks) = (restored.state.worker_count(), restored.state.task_count());
        tracing::info!(path = %self.path.display(), workers, tasks, ?elapsed, "state loaded");
    }

    /// Logs each reason once.
    fn log_waiting(&self, error: &DbError, last_error: &mut Option<String>) {
        if last_error.replace(error.to_string()) == Some(error.to_string()) {
            return;
        }
        let path = self.path.display();
        match error {
            DbError::Locked => tracing::warn!(%path, "state file is locked by another process; waiting"),
            error => tracing::warn!(%path, %error, "failed to open state file; retrying"),
        }
    }

    /// False only if the file is known not to exist.
    fn may_exist(&self) -> bool {
        !matches!(self.path.try_exists(), Ok(false))
    }
}

/// Moves an unreadable file aside, with one warning that names its new path.
fn quarantine(path: &Path, reason: &str, consequence: &str) -> Result<(), DbError> {
    let moved_to = db::move_aside(path)
        .map_err(|error| DbError::Unavailable(format!("it is unreadable ({reason}) and cannot be renamed: {error}")))?;
    tracing::warn!(
        path = %path.display(),
        reason,
        moved_to = %moved_to.display(),
        "state file is unreadable; moved aside; {consequence}"
    );
    Ok(())
}

/// Marks the store as failing and busy when it ends for any reason: no further save is submitted or waited for.
struct UnavailableOnDrop {
    status: Arc<StoreStatus>,
    inbox: Inbox,
}

impl Drop for UnavailableOnDrop {
    fn drop(&mut self) {
        self.status.set_failing();
        self.status.set_busy();
        self.inbox.send(IngestMessage::Wake);
    }
}
