//! The `flower-exporter` program. Only the cargo feature `cli` builds it; an embedding program does not need it.

pub mod args;
mod healthcheck;
mod logging;
mod open_files;
mod signals;
mod systemd;

use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use args::Args;
use logging::Logging;
use signals::{Signal, Signals};

use crate::broker;
use crate::config::{self, LoadedConfig};
use crate::exporter::{Exporter, StartError};
use crate::http::WebConfig;
use crate::store::SaveError;

/// Exit code for errors that the operator must fix: an invalid configuration, an address in use.
const EXIT_CONFIG_ERROR: u8 = 2;
const EXIT_FAILURE: u8 = 1;

/// Runs the program with its arguments, the program's name first. Returns the exit code of the process.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::read(args) {
        Ok(args) => args,
        Err(message) => message.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(EXIT_FAILURE, &error),
    };
    if args.healthcheck {
        return match runtime.block_on(healthcheck::run(&args.overrides())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(EXIT_FAILURE, &format!("{error:#}")),
        };
    }
    let loaded = match config::load(&args.overrides()) {
        Ok(loaded) => loaded,
        Err(error) => return fail(EXIT_CONFIG_ERROR, &error),
    };
    if args.check_config {
        return check_config(&loaded);
    }
    runtime.block_on(serve(&args, loaded))
}

fn check_config(loaded: &LoadedConfig) -> ExitCode {
    if let Err(error) = broker::validate(&loaded.config) {
        return fail(EXIT_CONFIG_ERROR, &error);
    }
    if let Err(error) = WebConfig::load(loaded.config.http.web_config_file.as_deref()) {
        return fail(EXIT_CONFIG_ERROR, &error);
    }
    match std::io::stdout().write_all(loaded.report().as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_FAILURE, &error),
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    fail_with(code, error, logging::print_fatal)
}

fn fail_with(code: u8, error: &dyn std::fmt::Display, print: impl FnOnce(&str)) -> ExitCode {
    let reason = error.to_string();
    print(&reason);
    systemd::failed(&reason);
    ExitCode::from(code)
}

async fn serve(args: &Args, loaded: LoadedConfig) -> ExitCode {
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => return fail(EXIT_FAILURE, &error),
    };
    let logging = match Logging::start(&loaded.config.log) {
        Ok(logging) => logging,
        Err(error) => return fail(EXIT_FAILURE, &error),
    };
    let fail = |code, error: StartError| fail_with(code, &error, |reason| logging.print_fatal(reason));
    let file_limit_warning = open_files::raise_limit(loaded.config.http.max_connections);
    for warning in loaded.warnings().into_iter().chain(file_limit_warning) {
        tracing::warn!("{warning}");
    }
    let exporter = tokio::select! {
        started = Exporter::builder(loaded.config).start() => match started {
            Ok(exporter) => exporter,
            Err(error @ (StartError::Thread(_) | StartError::Load | StartError::Metrics(_))) => {
                return fail(EXIT_FAILURE, error);
            }
            Err(error) => return fail(EXIT_CONFIG_ERROR, error),
        },
        () = wait_for_stop(&mut signals) => return ExitCode::SUCCESS,
    };
    tracing::info!(version = crate::VERSION, "serving {}/metrics", exporter.url());
    systemd::ready();
    tokio::select! {
        () = handle_signals(&mut signals, args, &exporter, &logging) => {}
        never = systemd::notify_loop(&exporter) => match never {},
        never = logging.report_lost_lines(&exporter) => match never {},
    }
    systemd::stopping();
    tracing::info!("stopping");
    tokio::select! {
        done = exporter.shutdown() => {
            if done.is_err() {
                tracing::warn!("shutdown timed out");
            }
            ExitCode::SUCCESS
        }
        () = wait_for_stop(&mut signals) => {
            tracing::warn!("second stop signal; exiting immediately");
            ExitCode::FAILURE
        }
    }
}

/// Returns on a stop signal.
async fn handle_signals(signals: &mut Signals, args: &Args, exporter: &Exporter, logging: &Logging) {
    loop {
        match signals.next().await {
            Signal::Stop => return,
            Signal::Reload => {
                systemd::reloading();
                reload(args, exporter, logging);
                systemd::ready();
            }
            Signal::Save => drop(tokio::spawn(save(exporter.save()))),
        }
    }
}

async fn wait_for_stop(signals: &mut Signals) {
    while signals.next().await != Signal::Stop {}
}

async fn save(saving: impl Future<Output = Result<(), SaveError>>) {
    match saving.await {
        Ok(()) => tracing::info!("state saved"),
        Err(error) => {
            let cause = error.source().map(ToString::to_string);
            tracing::warn!(%error, cause, "failed to save state");
        }
    }
}

/// Loads the configuration again. An invalid one changes nothing.
fn reload(args: &Args, exporter: &Exporter, logging: &Logging) {
    let loaded = config::load(&args.overrides()).inspect_err(|_| exporter.record_failed_reload());
    match loaded.and_then(|loaded| exporter.reload(&loaded.config)) {
        Ok(report) => {
            logging.set_level(report.config.log.level);
            tracing::info!(changed = ?report.applied, "configuration reloaded");
            if !report.requires_restart.is_empty() {
                tracing::warn!(keys = ?report.requires_restart, "some changes take effect only after a restart");
            }
        }
        Err(error) => tracing::error!(%error, "failed to reload configuration; keeping the current one"),
    }
}
