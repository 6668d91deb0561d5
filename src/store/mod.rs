//! What survives a restart: a thread that writes what changed to disk, off the event path, and only then lets messages be
//! acknowledged.
//!
//! The ingest loop hands over one [`Save`] at a time. After one that failed the next has to be whole; until it is on
//! disk nothing waits for the disk: messages are acknowledged once they are counted, as without a store.

mod file;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use file::{File, Problem};

use crate::ingest::Reply;
use crate::session::{Ack, Arrival};
use crate::state::{Changes, Limits, State};
use crate::telemetry::{Health, Telemetry};

/// How long another exporter may take to let go of the file.
const PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Between two attempts after a failure, doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(8);

/// Why the exporter cannot start with its saved state.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "state.db = \"{}\": another exporter has it open: stop that one, or give each a file of its own", .0.display()
    )]
    InUse(PathBuf),
}

/// What is written together.
#[derive(Default)]
pub struct Save {
    /// What changed.
    pub changes: Changes,
    /// Hashes of the messages that changed it, from a named queue.
    pub recent: Vec<u64>,
    /// The queue they came from.
    pub source: Option<Arc<str>>,
    /// To be acknowledged once this is on disk.
    pub ack: Option<Ack>,
    /// Who wants to know; the error is fit for the log.
    pub replies: Vec<Reply<Result<(), String>>>,
}

/// What was saved, as it is taken up again.
#[derive(Debug)]
pub struct Restored {
    /// It remembers what changes from now on.
    pub state: State,
    /// Hashes of the last messages, the oldest first.
    pub recent: Vec<u64>,
    /// The queue they came from.
    pub source: Option<Arc<str>>,
}

/// How the store stands, for the ingest loop.
#[derive(Debug, Default)]
pub struct Status {
    busy: AtomicBool,
    failing: AtomicBool,
}

impl Status {
    /// Whether a save is under way, or waits for the disk.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Whether the last save failed: the next has to be whole.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Acquire)
    }
}

/// The ingest loop's end of the store.
#[derive(Debug)]
pub struct Handle {
    saves: Sender<Save>,
    /// How the store stands.
    pub status: Arc<Status>,
}

impl Handle {
    /// Over the queue of a store.
    #[must_use]
    pub fn new(saves: Sender<Save>, status: Arc<Status>) -> Self {
        Self { saves, status }
    }

    /// Hands a save over, which makes the store busy.
    pub fn save(&self, save: Save) {
        self.status.busy.store(true, Ordering::Release);
        // A store that has ended has died: then `Health` says so.
        let _ = self.saves.send(save);
    }
}

/// What the store works with.
pub struct Store {
    /// `state.db`.
    pub path: PathBuf,
    /// Bounds of the state.
    pub limits: Limits,
    /// `state.state_save_interval`.
    pub compact_every: Duration,
    /// Hashes of messages to keep.
    pub kept_hashes: usize,
    /// From the ingest loop.
    pub saves: Receiver<Save>,
    /// How we stand.
    pub status: Arc<Status>,
    /// To the session.
    pub acks: mpsc::UnboundedSender<Ack>,
    /// To the ingest loop: it may hand over the next.
    pub arrivals: Sender<Arrival>,
    /// The exporter's own counters.
    pub telemetry: Arc<Telemetry>,
    /// For `/healthz`.
    pub health: Arc<Health>,
}

impl Store {
    /// Opens the file, gives what is in it to `opened`, and works until the ingest loop has ended.
    pub fn run(self, opened: oneshot::Sender<Result<Restored, OpenError>>) {
        let _gone = Gone { status: Arc::clone(&self.status), arrivals: self.arrivals.clone() };
        let first = match self.open_first(&opened) {
            Ok((file, restored)) => {
                self.status.busy.store(file.is_err(), Ordering::Release);
                opened.send(Ok(restored)).map(|()| file).ok()
            }
            Err(error) => opened.send(Err(error)).err().and(None),
        };
        let Some(file) = first else { return };
        let lineage = file.as_ref().map_or_else(|_| fastrand::u64(..), |file| file.lineage);
        Saving { store: self, lineage, pause: FIRST_PAUSE, file: file.map_err(Some) }.run();
    }

    /// The file and its state; or a state to begin with, and what is wrong with the file.
    fn open_first(
        &self,
        opened: &oneshot::Sender<Result<Restored, OpenError>>,
    ) -> Result<(Result<File, Problem>, Restored), OpenError> {
        let (began, mut waiting, mut told) = (Instant::now(), false, None);
        let problem = loop {
            match File::open(&self.path, &self.limits) {
                Ok((file, restored)) => {
                    if let Some(restored) = &restored {
                        let (workers, tasks) = (restored.state.worker_count(), restored.state.task_count());
                        let took = began.elapsed();
                        tracing::info!(path = %self.path.display(), workers, tasks, ?took, "the saved state is loaded");
                    }
                    return Ok((Ok(file), restored.unwrap_or_else(|| self.empty())));
                }
                Err(Problem::InUse) if began.elapsed() < PATIENCE && !opened.is_closed() => {
                    if !std::mem::replace(&mut waiting, true) {
                        tracing::warn!(path = %self.path.display(), "another exporter has the saved state open: waiting for it");
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                Err(Problem::InUse) => return Err(OpenError::InUse(self.path.clone())),
                Err(Problem::Unreadable(why)) => {
                    if let Err(error) = set_aside(&self.path, &why, "starting empty") {
                        break error;
                    }
                }
                // What is there, and cannot be opened just now, would be lost if we began without it.
                Err(problem) if self.may_exist() && began.elapsed() < PATIENCE && !opened.is_closed() => {
                    if told != Some(problem.to_string()) {
                        tracing::warn!(path = %self.path.display(), %problem, "the saved state cannot be opened: waiting for it");
                        told = Some(problem.to_string());
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                Err(problem) => break problem,
            }
        };
        Ok((Err(problem), self.empty()))
    }

    /// Not when it is known that nothing is there.
    fn may_exist(&self) -> bool {
        !matches!(self.path.try_exists(), Ok(false))
    }

    fn empty(&self) -> Restored {
        let mut state = State::new(&self.limits);
        state.keep_changes();
        Restored { state, recent: Vec::new(), source: None }
    }
}

/// One warning, which says where it is.
fn set_aside(path: &Path, why: &str, and_then: &str) -> Result<(), Problem> {
    let aside = file::set_aside(path)
        .map_err(|error| Problem::Unusable(format!("it cannot be read ({why}), and not be renamed either: {error}")))?;
    tracing::warn!(path = %path.display(), why, set_aside = %aside.display(), "the saved state cannot be read: {and_then}");
    Ok(())
}

/// However the store ends, nothing waits for it.
struct Gone {
    status: Arc<Status>,
    arrivals: Sender<Arrival>,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.status.failing.store(true, Ordering::Release);
        self.status.busy.store(true, Ordering::Release);
        // If the ingest loop has ended, nothing does anyway.
        let _ = self.arrivals.send(Arrival::Nudge);
    }
}

/// The store once it is open, or once it is known that it cannot be.
struct Saving {
    store: Store,
    lineage: u64,
    /// Until the next attempt after a failure.
    pause: Duration,
    /// The problem is taken out when it is told.
    file: Result<File, Option<Problem>>,
}

impl Saving {
    fn run(mut self) {
        let mut next = None;
        if let Err(problem) = &mut self.file
            && let Some(problem) = problem.take()
        {
            self.failed(&problem);
            next = self.recover();
            self.free();
        }
        let mut compacted = Instant::now();
        loop {
            let patience = self.store.compact_every.saturating_sub(compacted.elapsed());
            let save = match next.take() {
                Some(save) => Ok(save),
                None => self.store.saves.recv_timeout(patience),
            };
            match save {
                Ok(save) => next = self.save(save),
                Err(RecvTimeoutError::Disconnected) => return self.take_leave(),
                Err(RecvTimeoutError::Timeout) => {
                    compacted = Instant::now();
                    next = self.compact();
                }
            }
        }
    }

    fn take_leave(&self) {
        if self.store.status.is_failing() {
            tracing::error!(path = %self.store.path.display(), "the state is not saved: what was counted since it last was is lost");
        }
    }

    /// Writes a save. After a failure, returns once there is hope, or with the save that is the last of all.
    fn save(&mut self, save: Save) -> Option<Save> {
        let began = Instant::now();
        let result = self.commit(&save);
        if let Some(ack) = save.ack {
            // The session may be over already: then the broker knows better than we do.
            let _ = self.store.acks.send(ack);
        }
        match &result {
            Ok(()) => self.succeeded(&save, began.elapsed()),
            Err(problem) => self.failed(problem),
        }
        for reply in save.replies {
            reply(result.as_ref().copied().map_err(ToString::to_string));
        }
        let last = if result.is_err() { self.recover() } else { None };
        self.free();
        last
    }

    fn commit(&mut self, save: &Save) -> Result<(), Problem> {
        match &mut self.file {
            Ok(_) if self.store.status.is_failing() && !save.changes.whole => {
                Err(Problem::Unusable("the save before it failed".to_owned()))
            }
            Ok(file) => file.commit(save, self.store.kept_hashes),
            Err(_) => Err(Problem::Unusable("it is not open".to_owned())),
        }
    }

    fn free(&self) {
        self.store.status.busy.store(false, Ordering::Release);
        self.nudge();
    }

    /// The ingest loop looks how we stand.
    fn nudge(&self) {
        // If it has ended there is nothing more to save.
        let _ = self.store.arrivals.send(Arrival::Nudge);
    }

    fn succeeded(&mut self, save: &Save, took: Duration) {
        self.pause = FIRST_PAUSE;
        let Store { status, telemetry, health, path, .. } = &self.store;
        telemetry.save_duration.set(took.as_secs_f64());
        if status.failing.swap(false, Ordering::AcqRel) {
            health.set_unsaved(None);
            tracing::info!(path = %path.display(), "the state is saved again");
        }
        let bytes = save.changes.workers.bytes() + save.changes.pairs.bytes() + save.changes.tasks.bytes();
        tracing::trace!(bytes, whole = save.changes.whole, ?took, "the state is saved");
    }

    fn failed(&mut self, problem: &Problem) {
        let file = std::mem::replace(&mut self.file, Err(None));
        if catch_unwind(AssertUnwindSafe(|| drop(file))).is_err() {
            tracing::debug!("the database panicked as it was closed");
        }
        let Store { status, telemetry, health, path, .. } = &self.store;
        telemetry.save_failures.inc();
        let warning = format!(
            "the state cannot be saved to {} and would not survive a restart, trying again: {problem}",
            path.display()
        );
        health.set_unsaved(Some(warning));
        status.failing.store(true, Ordering::Release);
        self.nudge();
    }

    /// Waits until the file can be opened again. Returns a save that comes meanwhile, which is the last of all.
    fn recover(&mut self) -> Option<Save> {
        self.store.status.busy.store(true, Ordering::Release);
        loop {
            let save = match self.store.saves.recv_timeout(self.pause) {
                Ok(save) => Some(save),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => None,
            };
            self.pause = (self.pause * 2).min(LAST_PAUSE);
            match self.open_again() {
                Ok(file) => self.file = Ok(file),
                Err(problem) => {
                    tracing::debug!(%problem, "the saved state cannot be opened");
                }
            }
            if save.is_some() || self.file.is_ok() {
                return save;
            }
        }
    }

    fn open_again(&self) -> Result<File, Problem> {
        match File::open_again(&self.store.path, self.lineage) {
            Err(Problem::Unreadable(why)) => {
                set_aside(&self.store.path, &why, "ours is written in its place")?;
                File::open_again(&self.store.path, self.lineage)
            }
            opened => opened,
        }
    }

    fn compact(&mut self) -> Option<Save> {
        let Ok(file) = &mut self.file else { return None };
        let Err(problem) = file.compact() else { return None };
        self.store.status.busy.store(true, Ordering::Release);
        self.failed(&problem);
        let last = self.recover();
        self.free();
        last
    }
}
