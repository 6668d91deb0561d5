//! Writes saves, retries after a failure, and compacts the file.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant, SystemTime};

use super::db::{DbError, StateDb};
use super::{Save, SaveError, Store, quarantine};
use crate::inbox::IngestMessage;
use crate::observability::WarningSource;

/// The delay between two attempts after a failure. It doubles from the first value to the second.
const INITIAL_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(8);
/// How often the writer checks whether compaction is worthwhile.
const COMPACTION_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// The store after the attempt to open its file.
pub(super) struct StoreWriter {
    store: Store,
    /// Identifies the state in memory, so that a file with another state is not overwritten.
    store_id: u64,
    backoff: Duration,
    /// The error is taken out when it is reported.
    db: Result<StateDb, Option<DbError>>,
}

impl StoreWriter {
    pub(super) fn new(store: Store, db: Result<StateDb, DbError>) -> Self {
        let store_id = db.as_ref().map_or_else(|_| fastrand::u64(..), |db| db.store_id);
        Self { store, store_id, backoff: INITIAL_BACKOFF, db: db.map_err(Some) }
    }

    /// Runs until the ingest loop has ended.
    pub(super) fn run(mut self) {
        let mut next = None;
        if let Err(error) = &mut self.db
            && let Some(error) = error.take()
        {
            self.failed(&error);
            next = self.recover();
            self.mark_idle();
        }
        let mut checked_at = Instant::now();
        loop {
            let timeout = COMPACTION_CHECK_INTERVAL.saturating_sub(checked_at.elapsed());
            let save = match next.take() {
                Some(save) => Ok(save),
                None => self.store.saves_rx.recv_timeout(timeout),
            };
            match save {
                Ok(save) => next = self.save(save),
                Err(RecvTimeoutError::Disconnected) => return self.log_unsaved_on_exit(),
                Err(RecvTimeoutError::Timeout) => {
                    checked_at = Instant::now();
                    next = self.compact();
                }
            }
        }
    }

    fn log_unsaved_on_exit(&self) {
        if self.store.status.is_failing() {
            let path = self.store.path.display();
            tracing::error!(%path, "state not saved; everything counted since the last save is lost");
        }
    }

    /// Writes a save. After a failure, returns once the file could be opened again. While the store is busy, the ingest
    /// loop submits only the save of its shutdown, which is then returned.
    fn save(&mut self, save: Save) -> Option<Save> {
        let started = Instant::now();
        let result = self.commit(&save);
        if let Some(ack) = save.ack {
            // If the session has ended, the broker requeues the messages.
            let _ = self.store.acks_tx.send(ack);
        }
        match &result {
            Ok(()) => self.succeeded(&save, started.elapsed()),
            Err(error) => self.failed(error),
        }
        let is_err = result.is_err();
        let result =
            result.map_err(|error| SaveError::Write { path: self.store.path.clone(), source: Arc::new(error) });
        for reply in save.replies {
            reply(result.clone());
        }
        let last = if is_err { self.recover() } else { None };
        self.mark_idle();
        last
    }

    fn commit(&mut self, save: &Save) -> Result<(), DbError> {
        match &mut self.db {
            Ok(_) if self.store.status.is_failing() && !save.delta.is_full => {
                Err(DbError::Unavailable("the previous save failed: a full save is required".to_owned()))
            }
            Ok(db) => db.commit(save, self.store.hashes_to_keep),
            Err(_) => Err(DbError::Unavailable("the file is not open".to_owned())),
        }
    }

    fn mark_idle(&self) {
        self.store.status.set_idle();
        self.wake();
    }

    /// Wakes the ingest loop, which checks the status.
    fn wake(&self) {
        self.store.inbox.send(IngestMessage::Wake);
    }

    fn succeeded(&mut self, save: &Save, elapsed: Duration) {
        self.backoff = INITIAL_BACKOFF;
        let Store { status, self_metrics, health, path, .. } = &self.store;
        self_metrics.last_save_duration.set(elapsed.as_secs_f64());
        health.record_save(Some(SystemTime::now()));
        if status.clear_failing() {
            health.set_warnings(WarningSource::Store, Vec::new());
            tracing::info!(path = %path.display(), "state is being saved again");
        }
        tracing::trace!(bytes = save.delta.byte_len(), full = save.delta.is_full, ?elapsed, "state saved");
    }

    fn failed(&mut self, error: &DbError) {
        let db = std::mem::replace(&mut self.db, Err(None));
        if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
            tracing::debug!("database panicked on close");
        }
        let Store { status, self_metrics, health, path, .. } = &self.store;
        self_metrics.save_failures.inc();
        let warning = format!("failed to save state; retrying: {}: {error}", path.display());
        health.set_warnings(WarningSource::Store, vec![warning]);
        status.set_failing();
        self.wake();
    }

    /// Waits until the file can be opened again. Returns the save of the shutdown if it is submitted in the meantime.
    fn recover(&mut self) -> Option<Save> {
        self.store.status.set_busy();
        loop {
            let save = match self.store.saves_rx.recv_timeout(self.backoff) {
                Ok(save) => Some(save),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => None,
            };
            self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
            match self.reopen() {
                Ok(db) => self.db = Ok(db),
                Err(error) => tracing::debug!(%error, "failed to open state file"),
            }
            if save.is_some() || self.db.is_ok() {
                return save;
            }
        }
    }

    fn reopen(&self) -> Result<StateDb, DbError> {
        let path = &self.store.path;
        match StateDb::reopen(path, self.store_id) {
            Err(DbError::Unreadable(reason)) => {
                quarantine(path, &reason, "writing the current state to a new file")?;
                StateDb::reopen(path, self.store_id)
            }
            opened => opened,
        }
    }

    fn compact(&mut self) -> Option<Save> {
        let Ok(db) = &mut self.db else { return None };
        let Err(error) = db.compact() else { return None };
        self.store.status.set_busy();
        self.failed(&error);
        let last = self.recover();
        self.mark_idle();
        last
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::JoinHandle;

    use tokio::sync::{mpsc, oneshot};

    use super::*;
    use crate::inbox::{Ack, DeliveryTag, Inbox};
    use crate::metrics::SeriesOptions;
    use crate::observability::{Health, SelfMetrics};
    use crate::state::{Limits, State};
    use crate::store::{QueuePosition, Restored, StoreStatus};

    fn limits() -> Limits {
        Limits {
            max_workers: 9,
            max_tasks: 9,
            series: SeriesOptions { max_label_sets: 9, bounds: vec![1.0], ..SeriesOptions::default() },
        }
    }

    struct Fixture {
        saves_tx: Sender<Save>,
        acks_rx: mpsc::UnboundedReceiver<Ack>,
        inbox_rx: Receiver<IngestMessage>,
        status: Arc<StoreStatus>,
        health: Arc<Health>,
        thread: JoinHandle<()>,
    }

    impl Fixture {
        /// A running store, and what it restored.
        fn new(path: &Path) -> (Self, Restored) {
            let ((saves_tx, saves_rx), (acks_tx, acks_rx)) = (channel(), mpsc::unbounded_channel());
            let (self_metrics, health) = (Arc::new(SelfMetrics::new().unwrap()), Arc::new(Health::default()));
            let (inbox, inbox_rx) = Inbox::new(1, Arc::clone(&self_metrics), Arc::clone(&health));
            let status = Arc::new(StoreStatus::default());
            let store = Store {
                path: path.to_owned(),
                limits: limits(),
                hashes_to_keep: 2,
                saves_rx,
                status: Arc::clone(&status),
                acks_tx,
                inbox,
                self_metrics,
                health: Arc::clone(&health),
            };
            let (opened_tx, opened_rx) = oneshot::channel();
            let thread = std::thread::spawn(move || store.run(opened_tx));
            let restored = opened_rx.blocking_recv().unwrap().unwrap();
            (Self { saves_tx, acks_rx, inbox_rx, status, health, thread }, restored)
        }

        /// Submits a save and waits for its result.
        fn save(&self, mut save: Save) -> Result<(), SaveError> {
            let (reply_tx, reply_rx) = channel();
            save.replies.push(Box::new(move |result| reply_tx.send(result).unwrap()));
            self.status.set_busy();
            self.saves_tx.send(save).unwrap();
            reply_rx.recv().unwrap()
        }

        fn stop(self) -> Receiver<IngestMessage> {
            drop(self.saves_tx);
            self.thread.join().unwrap();
            self.inbox_rx
        }
    }

    fn full_save(state: &mut State) -> Save {
        state.require_full_save();
        Save { delta: state.take_changes(), ..Save::default() }
    }

    #[test]
    fn what_was_saved_is_restored_and_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let (mut fixture, mut restored) = Fixture::new(&path);
        assert!(restored.is_new);
        let ack = Ack { session: 1, tag: DeliveryTag(5) };
        let message_hashes = vec![1, 2, 3];
        let position = QueuePosition { queue: "q".into(), message: Some(3) };
        let save =
            Save { message_hashes, position: Some(position.clone()), ack: Some(ack), ..full_save(&mut restored.state) };
        fixture.save(save).unwrap();
        assert_eq!(fixture.acks_rx.try_recv().unwrap().tag, DeliveryTag(5));
        fixture.stop();
        let (fixture, restored) = Fixture::new(&path);
        assert!(!restored.is_new);
        assert_eq!((restored.message_hashes, restored.position), (vec![1, 2, 3], Some(position)));
        fixture.stop();
    }

    #[test]
    fn a_failed_save_is_a_warning_until_a_full_one_is_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let (fixture, mut restored) = Fixture::new(&path);
        fixture.save(full_save(&mut restored.state)).unwrap();
        fs::remove_file(&path).unwrap();
        let error = fixture.save(full_save(&mut restored.state)).unwrap_err();
        assert!(std::error::Error::source(&error).is_some(), "{error}");
        assert!(fixture.status.is_failing());
        assert_eq!(fixture.health.warnings().len(), 1);
        while fixture.status.is_busy() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let partial = Save { delta: restored.state.take_changes(), ..Save::default() };
        assert!(fixture.save(partial).is_err(), "only a full save repairs the file");
        while fixture.status.is_busy() {
            std::thread::sleep(Duration::from_millis(10));
        }
        fixture.save(full_save(&mut restored.state)).unwrap();
        assert!(!fixture.status.is_failing() && fixture.health.warnings().is_empty());
        let inbox_rx = fixture.stop();
        assert!(inbox_rx.try_iter().all(|message| matches!(message, IngestMessage::Wake)));
        assert!(!Fixture::new(&path).1.is_new);
    }

    #[test]
    fn a_file_of_another_format_is_moved_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        fs::write(&path, "not a database").unwrap();
        let (fixture, restored) = Fixture::new(&path);
        assert!(restored.is_new);
        fixture.stop();
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}
