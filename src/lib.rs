//! flower-exporter
pub mod broker;
pub mod celery;
pub mod command;
pub mod daemon;
pub mod http;
pub mod ingest;
mod logging;
pub mod metrics;
mod quiet;
pub mod session;
pub mod settings;
mod signals;
pub mod state;
pub mod telemetry;
