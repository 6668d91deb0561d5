//! `flower-exporter`: Flower's six Prometheus metrics for Celery, from events on `RabbitMQ` or Redis.

use std::process::ExitCode;

fn main() -> ExitCode {
    flower_exporter::cli::run(std::env::args_os())
}
