//! What the `flower-exporter` command does, behind its arguments.

use std::ffi::OsString;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::broker;
use crate::daemon::{Exporter, StartError};
use crate::logging::{self, Logging};
use crate::settings::cli::Cli;
use crate::settings::{self, Loaded, Settings};
use crate::signals::{Intent, Intents};
use crate::systemd;

/// A mistake of the operator's: wrong settings, a taken port.
const MISTAKE: u8 = 2;

/// Runs the command with its arguments, the program's name first. The result is the process' exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::read(args) {
        Ok(cli) => cli,
        Err(message) => message.exit(),
    };
    let loaded = match settings::load(&cli) {
        Ok(loaded) => loaded,
        Err(error) => return fail(MISTAKE, &error),
    };
    if cli.check_config {
        if let Err(error) = broker::check(&loaded.settings) {
            return fail(MISTAKE, &error);
        }
        return match std::io::stdout().write_all(loaded.report().as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &error),
        };
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    if cli.healthcheck {
        return match runtime.block_on(healthcheck(&loaded.settings)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &format!("{error:#}")),
        };
    }
    runtime.block_on(serve(&cli, loaded))
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    let why = error.to_string();
    logging::last_word(&why);
    systemd::failed(&why);
    ExitCode::from(code)
}

async fn serve(cli: &Cli, loaded: Loaded) -> ExitCode {
    let mut intents = match Intents::listen() {
        Ok(intents) => intents,
        Err(error) => return fail(1, &error),
    };
    let logging = Logging::start(&loaded.settings.log);
    for unused in loaded.unused() {
        tracing::warn!("{unused}");
    }
    let exporter = tokio::select! {
        started = Exporter::start(loaded.settings, Vec::new()) => match started {
            Ok(exporter) => exporter,
            Err(error @ (StartError::Thread(_) | StartError::Load | StartError::Metrics(_))) => return fail(1, &error),
            Err(error) => return fail(MISTAKE, &error),
        },
        () = told_to_stop(&mut intents) => return ExitCode::SUCCESS,
    };
    let address = exporter.address();
    tracing::info!(version = crate::VERSION, "serving http://{address}/metrics");
    systemd::ready();
    tokio::select! {
        () = obey(&mut intents, cli, &exporter, &logging) => {}
        never = systemd::keep_told(&exporter) => match never {},
    }
    systemd::stopping();
    tracing::info!("stopping");
    tokio::select! {
        done = exporter.stop() => {
            if !done {
                tracing::warn!("not everything could be finished in time");
            }
            ExitCode::SUCCESS
        }
        () = told_to_stop(&mut intents) => {
            tracing::warn!("told to stop again: exiting at once");
            ExitCode::FAILURE
        }
    }
}

async fn obey(intents: &mut Intents, cli: &Cli, exporter: &Exporter, logging: &Logging) {
    loop {
        match intents.next().await {
            Intent::Stop => return,
            Intent::Reload => {
                systemd::reloading();
                reload(cli, exporter, logging);
                systemd::ready();
            }
            Intent::Save => drop(tokio::spawn(save(exporter.save()))),
        }
    }
}

async fn told_to_stop(intents: &mut Intents) {
    while intents.next().await != Intent::Stop {}
}

async fn save(saved: impl Future<Output = Result<(), String>>) {
    match saved.await {
        Ok(()) => tracing::info!("the state is saved"),
        Err(error) => tracing::warn!(error, "the state is not saved"),
    }
}

/// Reads the settings again. A bad file changes nothing.
fn reload(cli: &Cli, exporter: &Exporter, logging: &Logging) {
    let loaded = match settings::load(cli) {
        Ok(loaded) => loaded.settings,
        Err(error) => {
            tracing::error!(%error, "the settings cannot be read again: nothing is changed");
            return;
        }
    };
    let plan = exporter.reload(&loaded);
    logging.set_level(plan.settings.log.level);
    tracing::info!(changed = ?plan.live, "settings read again");
    if !plan.restart.is_empty() {
        tracing::warn!(keys = ?plan.restart, "these settings take a restart to change");
    }
}

/// Asks the running exporter's `/healthz`.
async fn healthcheck(settings: &Settings) -> anyhow::Result<()> {
    let address = reachable(settings.http.listen);
    let asking = async {
        let stream = TcpStream::connect(address).await.with_context(|| format!("no exporter at {address}"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get("/healthz").header("host", address.to_string()).body(Empty::<bytes::Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), 64 << 10).collect().await.map_err(anyhow::Error::from_boxed)?;
        Ok::<_, anyhow::Error>((status, body.to_bytes()))
    };
    let limit = Duration::from_secs(5).min(settings.http.request_timeout);
    let Ok(answer) = timeout(limit, asking).await else {
        bail!("no answer from http://{address}/healthz within {} s", limit.as_secs_f64());
    };
    let (status, body) = answer?;
    println!("{}", String::from_utf8_lossy(&body).trim_end());
    if !status.is_success() {
        bail!("http://{address}/healthz answers {status}");
    }
    Ok(())
}

/// Where a socket that listens on all addresses is reached from here.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
