//! Questions to the ingest loop, from HTTP and from the embedding program.

use std::sync::Arc;
use std::sync::mpsc::{Sender, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::metrics::Snapshot;
use crate::session::Arrival;
use crate::state::{TaskView, WorkerView};

/// Where an answer goes.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// A question to the loop, answered between two batches.
pub enum Query {
    /// A copy of all numbers.
    Snapshot(Reply<Arc<Snapshot>>),
    /// Save the state now.
    Save(Reply<Result<(), String>>),
    /// All workers.
    Workers(Reply<Vec<WorkerView>>),
    /// One task by its id.
    Task(String, Reply<Option<TaskView>>),
    /// At most `count` tasks from place `start` on.
    Tasks {
        /// The first place.
        start: usize,
        /// How many places.
        count: usize,
        /// Where the answer goes; empty at the end.
        reply: Reply<Vec<TaskView>>,
    },
}

/// Asks the ingest loop. Cheap to clone.
#[derive(Clone)]
pub struct Asker {
    queries: Sender<Query>,
    arrivals: Sender<Arrival>,
}

impl Asker {
    /// Over the two queues of an ingest loop.
    #[must_use]
    pub fn new(queries: Sender<Query>, arrivals: Sender<Arrival>) -> Self {
        Self { queries, arrivals }
    }

    /// Puts a question; the loop answers it between two batches. Unanswered questions are dropped when it ends.
    fn put(&self, query: Query) {
        if self.queries.send(query).is_ok() {
            let _ = self.arrivals.send(Arrival::Nudge);
        }
    }

    async fn ask<T: Send + 'static>(&self, query: impl FnOnce(Reply<T>) -> Query) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        // Whoever asked may have gone away: then there is nobody to tell.
        self.put(query(Box::new(move |reply| drop(sender.send(reply)))));
        answer.await.ok()
    }

    /// A copy of all numbers; `None` when the exporter has stopped.
    pub async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.ask(Query::Snapshot).await
    }

    /// Saves the state now.
    ///
    /// # Errors
    /// Why it is not on disk.
    pub async fn save(&self) -> Result<(), String> {
        self.ask(Query::Save).await.unwrap_or_else(|| Err("the exporter has stopped".to_owned()))
    }

    /// All workers; none when the exporter has stopped.
    pub async fn workers(&self) -> Vec<WorkerView> {
        self.ask(Query::Workers).await.unwrap_or_default()
    }

    /// One task by its id.
    pub async fn task(&self, uuid: &str) -> Option<TaskView> {
        let uuid = uuid.to_owned();
        self.ask(|reply| Query::Task(uuid, reply)).await.flatten()
    }

    /// At most `count` tasks from place `start` on.
    pub async fn tasks(&self, start: usize, count: usize) -> Vec<TaskView> {
        self.ask(|reply| Query::Tasks { start, count, reply }).await.unwrap_or_default()
    }

    /// Ends the loop, once it has taken everything that is queued.
    pub fn stop(&self) {
        // If it has ended already, all the better.
        let _ = self.arrivals.send(Arrival::Stop);
    }

    /// A copy of all numbers, for callers that are not async. Waits for at most ten seconds.
    #[must_use]
    pub fn snapshot_blocking(&self) -> Option<Arc<Snapshot>> {
        let (sender, answer) = sync_channel(1);
        self.put(Query::Snapshot(Box::new(move |reply| drop(sender.send(reply)))));
        answer.recv_timeout(Duration::from_secs(10)).ok()
    }
}
