//! Answers queries between two messages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::IngestLoop;
use super::handle::Query;
use crate::metrics::SnapshotBuilder;

/// The longest time that one step of a snapshot delays events.
pub const COPY_BUDGET: Duration = Duration::from_millis(1);

impl IngestLoop {
    /// Answers queries, and copies for at most [`COPY_BUDGET`].
    pub(super) fn answer_queries(&mut self) {
        while let Ok(query) = self.context.queries_rx.try_recv() {
            match query {
                Query::Snapshot(reply) => {
                    self.update_gauges();
                    self.state.set_time(self.wall_clock.millis(Instant::now()));
                    let (_, replies) =
                        self.snapshot.get_or_insert_with(|| (SnapshotBuilder::new(self.state.series()), Vec::new()));
                    replies.push(reply);
                }
                Query::Workers(reply) => reply(self.state.workers(self.clock.time_at(Instant::now()))),
                Query::Task(uuid, reply) => reply(self.state.find_task(&uuid)),
                Query::Tasks { start, count, reply } => reply(self.state.tasks(start, count)),
                Query::Save(reply) => self.save_scheduler.request(reply),
            }
        }
        self.copy_snapshot();
    }

    fn copy_snapshot(&mut self) {
        let Some((mut builder, replies)) = self.snapshot.take() else { return };
        let series = self.state.series();
        if !builder.step_for(series, COPY_BUDGET) {
            self.snapshot = Some((builder, replies));
            return;
        }
        let snapshot = Arc::new(builder.finish(series));
        for reply in replies {
            reply(Arc::clone(&snapshot));
        }
    }
}
