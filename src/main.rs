//! `flower-exporter`: Flower's six Prometheus series for Celery, from the events on `RabbitMQ` or Redis.

use std::process::ExitCode;

fn main() -> ExitCode {
    flower_exporter::command::run(std::env::args_os())
}
