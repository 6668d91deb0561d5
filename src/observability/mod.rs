//! What the exporter reports about itself: its own metrics, its health, and a throttle for its log.
//!
//! Every component writes here, and none reads a metric to make a decision.

mod health;
mod log_throttle;
mod losses;
mod self_metrics;

pub(crate) use health::{BrokerReport, ClockStatus, NOT_SUBSCRIBED, WarningSource};
pub use health::{BrokerStatus, Health, WorkerCounts};
pub use log_throttle::LogThrottle;
pub(crate) use losses::LossSummary;
pub use self_metrics::{ConfigPart, GapCause, SelfMetrics};
