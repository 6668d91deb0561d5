//! Sockets: connects to the first address that responds, and coalesces the reads of a busy socket.
//! Nothing here blocks, retries or depends on the protocol above it.

mod coalescing;
pub(super) mod happy_eyeballs;

pub(super) use coalescing::CoalescingSocket;
