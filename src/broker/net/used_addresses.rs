//! The order in which the addresses of a host are tried.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Maximum number of addresses in memory.
const MAX_ADDRESSES: usize = 64;

/// The addresses that accepted a connection, the latest last. They are tried after all others, in this order: the
/// connection to them has ended, or they accepted it and did not respond.
#[derive(Clone, Debug, Default)]
pub(in crate::broker) struct UsedAddresses(Arc<Mutex<Vec<SocketAddr>>>);

impl UsedAddresses {
    /// Records that a connection to this address is established.
    pub(super) fn record(&self, address: SocketAddr) {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.retain(|known| *known != address);
        if used.len() >= MAX_ADDRESSES {
            used.remove(0);
        }
        used.push(address);
    }

    /// The addresses in the order in which they are tried. Unused ones stay in the resolver's order.
    pub(super) fn order(&self, addresses: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
        let used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ordered: Vec<SocketAddr> = addresses.collect();
        ordered.sort_by_key(|address| used.iter().position(|known| known == address));
        ordered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_addresses_are_tried_last_and_the_latest_one_at_the_end() {
        let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let used = UsedAddresses::default();
        for port in [1, 3, 1] {
            used.record(address(port));
        }
        let ordered = used.order([1, 2, 3, 4].map(address).into_iter());
        assert_eq!(ordered, [2, 4, 3, 1].map(address));
        for port in 0..1000 {
            used.record(address(port));
        }
        assert_eq!(used.0.lock().unwrap().len(), MAX_ADDRESSES);
    }
}
