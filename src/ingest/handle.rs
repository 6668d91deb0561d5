//! Queries to the ingest loop, from HTTP and from the embedding program.

use std::sync::Arc;
use std::sync::mpsc::{Sender, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::inbox::{Inbox, IngestMessage, ReplyFn};
use crate::metrics::Snapshot;
use crate::state::{TaskInfo, WorkerInfo};
use crate::store::SaveError;

/// How long a blocking caller waits for a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(10);

/// A query. The loop answers it between two batches.
pub enum Query {
    /// A copy of all metrics.
    Snapshot(ReplyFn<Arc<Snapshot>>),
    /// Saves the state now.
    Save(ReplyFn<Result<(), SaveError>>),
    /// All workers.
    Workers(ReplyFn<Vec<WorkerInfo>>),
    /// The task with this id.
    Task(String, ReplyFn<Option<TaskInfo>>),
    /// A page of the tasks.
    Tasks {
        /// The first index.
        start: usize,
        /// At most this many tasks.
        count: usize,
        /// Receives an empty page at the end.
        reply: ReplyFn<Vec<TaskInfo>>,
    },
}

/// Sends queries to the ingest loop. Cheap to clone.
#[derive(Clone)]
pub struct IngestHandle {
    queries_tx: Sender<Query>,
    inbox: Inbox,
}

impl IngestHandle {
    /// A handle to the loop at the other end of both channels.
    #[must_use]
    pub fn new(queries_tx: Sender<Query>, inbox: Inbox) -> Self {
        Self { queries_tx, inbox }
    }

    /// When the loop ends, it drops the queries that it has not answered.
    fn send(&self, query: Query) {
        if self.queries_tx.send(query).is_ok() {
            self.inbox.send(IngestMessage::Wake);
        }
    }

    async fn ask<T: Send + 'static>(&self, query: impl FnOnce(ReplyFn<T>) -> Query) -> Option<T> {
        let (reply_tx, reply_rx) = oneshot::channel();
        // If the caller is gone, the reply is not needed.
        self.send(query(Box::new(move |reply| drop(reply_tx.send(reply)))));
        reply_rx.await.ok()
    }

    /// A copy of all metrics. `None` once the exporter has stopped.
    pub async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.ask(Query::Snapshot).await
    }

    /// Saves the state now.
    ///
    /// # Errors
    /// Returns an error if the state is not on disk.
    pub async fn save(&self) -> Result<(), SaveError> {
        self.ask(Query::Save).await.unwrap_or(Err(SaveError::Stopped))
    }

    /// All workers. Empty once the exporter has stopped.
    pub async fn workers(&self) -> Vec<WorkerInfo> {
        self.ask(Query::Workers).await.unwrap_or_default()
    }

    /// The task with this id.
    pub async fn task(&self, uuid: &str) -> Option<TaskInfo> {
        let uuid = uuid.to_owned();
        self.ask(|reply| Query::Task(uuid, reply)).await.flatten()
    }

    /// At most `count` tasks, starting at index `start`.
    pub async fn tasks(&self, start: usize, count: usize) -> Vec<TaskInfo> {
        self.ask(|reply| Query::Tasks { start, count, reply }).await.unwrap_or_default()
    }

    /// Ends the loop once it has processed everything in its inbox.
    pub fn stop(&self) {
        self.inbox.send(IngestMessage::Stop);
    }

    /// A copy of all metrics, for blocking callers. Blocks for at most ten seconds.
    #[must_use]
    pub fn snapshot_blocking(&self) -> Option<Arc<Snapshot>> {
        let (reply_tx, reply_rx) = sync_channel(1);
        self.send(Query::Snapshot(Box::new(move |reply| drop(reply_tx.send(reply)))));
        reply_rx.recv_timeout(SNAPSHOT_TIMEOUT).ok()
    }
}
