//! What the session remembers from one connection to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::net::UsedAddresses;

/// The outcome of earlier connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ConnectionHistory {
    pub(super) addresses: UsedAddresses,
    seen_master: Arc<AtomicBool>,
}

impl ConnectionHistory {
    /// Records that a Redis server was a master. From then on a replica is not used: it was a master before its failover,
    /// or its address still leads to the old master, and broadcasts there reach no worker.
    pub(super) fn record_master(&self) {
        self.seen_master.store(true, Ordering::Relaxed);
    }

    /// Whether any server was a master.
    #[must_use]
    pub fn has_seen_master(&self) -> bool {
        self.seen_master.load(Ordering::Relaxed)
    }
}
