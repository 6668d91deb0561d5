//! systemd's notification protocol: ready, reloading, stopping, a status line, the watchdog. Without a notification
//! socket nothing is sent.

use std::convert::Infallible;
use std::env;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::exporter::Exporter;
use crate::observability::BrokerStatus;

/// Time between two notifications, unless the watchdog needs them more often.
const NOTIFY_INTERVAL: Duration = Duration::from_secs(5);
const MIN_NOTIFY_INTERVAL: Duration = Duration::from_millis(1);
/// systemd accepts messages of 4096 bytes. A character has four bytes at most.
const MAX_STATUS_CHARS: usize = 1000;

/// Reports that every component is started.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Reports that the configuration is being loaded again, until [`ready`].
pub(super) fn reloading() {
    // The time is for `Type=notify-reload` of systemd 253 and later.
    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading)]);
}

/// Reports that the exporter is stopping.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// Reports the reason for the exit, for `systemctl status`.
pub(super) fn failed(reason: &str) {
    notify(&[NotifyState::Status(&single_line(reason))]);
}

/// Sends the status, and notifies the watchdog as long as the session loop and the ingest loop run. systemd restarts a
/// service that stops notifying it.
pub(super) async fn notify_loop(exporter: &Exporter) -> Infallible {
    if env::var_os("NOTIFY_SOCKET").is_none() {
        return pending().await;
    }
    let watchdog = sd_notify::watchdog_enabled();
    let period = watchdog.map_or(NOTIFY_INTERVAL, |limit| NOTIFY_INTERVAL.min(limit / 4));
    let mut ticks = interval(period.max(MIN_NOTIFY_INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        notify(&[NotifyState::Status(&single_line(&status(exporter)))]);
        if watchdog.is_some_and(|limit| exporter.health().has_ticked_within(limit / 2)) {
            notify(&[NotifyState::Watchdog]);
        }
    }
}

fn status(exporter: &Exporter) -> String {
    let health = exporter.health();
    let broker = match health.broker() {
        BrokerStatus::Connecting => "connecting to broker",
        BrokerStatus::Standby => "on standby: another exporter is consuming the queue",
        BrokerStatus::Connected => "connected to broker",
        BrokerStatus::Stopped => "stopped",
    };
    let events = match health.since_last_event() {
        None => "no events yet".to_owned(),
        Some(ago) => format!("{} events, last one {} s ago", exporter.decoded_events(), ago.as_secs()),
    };
    [vec![broker.to_owned(), events], health.warnings()].concat().join("; ")
}

/// A line break in a worker's name must not start another assignment of the message.
fn single_line(text: &str) -> String {
    text.chars().take(MAX_STATUS_CHARS).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "sd_notify failed");
    }
}

#[cfg(test)]
mod tests {
    use super::single_line;

    #[test]
    fn a_status_is_one_line_that_fits_into_a_message() {
        assert_eq!(single_line("worker w\nMAINPID=1 is late"), "worker w MAINPID=1 is late");
        assert_eq!(format!("STATUS={}\n", single_line(&"\u{1F41E}".repeat(5000))).len(), 4008);
    }
}
