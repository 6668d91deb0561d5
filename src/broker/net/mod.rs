//! Sockets: connects to the first address that responds, and coalesces the reads of a busy socket.
//! Nothing here blocks, retries or depends on the protocol above it.

mod coalescing;
pub(super) mod happy_eyeballs;
mod used_addresses;

pub(super) use coalescing::CoalescingSocket;
pub(super) use used_addresses::UsedAddresses;
