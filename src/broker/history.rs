//! What the session remembers from one connection to the next.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::net::UsedAddresses;
use super::output_limit::OutputLimitDisconnects;

/// The outcome of earlier connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ConnectionHistory {
    pub(super) addresses: UsedAddresses,
    seen_master: Arc<AtomicBool>,
    output_limit_disconnects: Arc<Mutex<Option<OutputLimitDisconnects>>>,
}

impl ConnectionHistory {
    /// Records that a Redis server was a master. From then on a replica is not used: it was a master before its failover,
    /// or its address still leads to the old master, and broadcasts there reach no worker.
    pub(super) fn record_master(&self) {
        self.seen_master.store(true, Ordering::Relaxed);
    }

    /// Remembers how often a Redis server has disconnected clients that lagged. Returns whether it has done so since the
    /// last connection.
    pub(super) fn output_limit_was_reached(&self, now: Option<OutputLimitDisconnects>) -> bool {
        let mut known = self.output_limit_disconnects.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *known, now);
        before.zip(known.as_ref()).is_some_and(|(before, now)| now.has_increased_since(&before))
    }

    /// Whether any server was a master.
    #[must_use]
    pub fn has_seen_master(&self) -> bool {
        self.seen_master.load(Ordering::Relaxed)
    }
}
