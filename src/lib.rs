//! flower-exporter
pub mod celery;
pub mod metrics;
pub mod state;
