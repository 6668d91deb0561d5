//! What systemd is told by its notification socket: ready, reloading, stopping, how it stands, and that every loop
//! turns. Without that socket nothing is told.

use std::convert::Infallible;
use std::env;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::daemon::Exporter;
use crate::telemetry::BrokerStatus;

/// How often systemd hears of us, where its watchdog does not want to more often.
const BEAT: Duration = Duration::from_secs(5);

/// Everything is started: what waits for us may go on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The settings are being read again; [`ready`] ends that.
pub fn reloading() {
    // With the time, `Type=notify-reload` of systemd 253 is served as well.
    tell(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading)]);
}

/// On the way out.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// Why it ends, for `systemctl status`.
pub fn failed(why: &str) {
    tell(&[NotifyState::Status(&line(why))]);
}

/// Tells how the exporter stands, and feeds the watchdog as long as its loops turn: systemd restarts what it does not
/// hear from.
pub async fn keep_told(exporter: &Exporter) -> Infallible {
    if env::var_os("NOTIFY_SOCKET").is_none() {
        return pending().await;
    }
    let watchdog = sd_notify::watchdog_enabled();
    let mut beats = interval(watchdog.map_or(BEAT, |limit| BEAT.min(limit / 4)).max(Duration::from_millis(1)));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        tell(&[NotifyState::Status(&line(&status(exporter)))]);
        if watchdog.is_some_and(|limit| exporter.health().has_turned_within(limit / 2)) {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn status(exporter: &Exporter) -> String {
    let health = exporter.health();
    let broker = match health.broker() {
        BrokerStatus::Connecting => "not connected to the broker, trying",
        BrokerStatus::Connected => "connected to the broker",
        BrokerStatus::Stopped => "stopped",
    };
    let events = match health.since_last_event() {
        None => "no event yet".to_owned(),
        Some(ago) => format!("{} events, the last {} s ago", exporter.events(), ago.as_secs()),
    };
    [vec![broker.to_owned(), events], health.warnings()].concat().join("; ")
}

/// Text that is one line of a message, however a worker is called that it names; systemd takes 4096 bytes at most.
fn line(text: &str) -> String {
    text.chars().take(1000).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_status_is_one_line_that_fits() {
        assert_eq!(line("worker w\nMAINPID=1 is late"), "worker w MAINPID=1 is late");
        assert_eq!(format!("STATUS={}\n", line(&"\u{1F41E}".repeat(5000))).len(), 4008);
    }
}
