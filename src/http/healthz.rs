//! The JSON of `/healthz`, as in docs/healthz.schema.json.

use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::observability::{BrokerReport, BrokerStatus, ClockStatus, Health, NOT_SUBSCRIBED};

/// The status code and the report. With `check_ready`, the exporter must also be subscribed.
pub(super) fn report(health: &Health, events: u64, check_ready: bool) -> (StatusCode, Value) {
    let broker = health.broker_report();
    let reason = health.failure_reason().or_else(|| not_ready_reason(&broker).filter(|_| check_ready));
    let status = match (&reason, health.is_alive()) {
        (None, _) => "ok",
        (Some(_), true) => "not ready",
        (Some(_), false) => "unhealthy",
    };
    let code = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let workers = health.workers();
    let last_error = broker.last_error.map(|(message, at)| json!({"message": message, "at": timestamp(at)}));
    let clock = match health.clock() {
        ClockStatus::Running => json!({"state": "running", "since": null, "reason": null}),
        ClockStatus::Paused { since, reason } => {
            json!({"state": "paused", "since": timestamp(since), "reason": reason})
        }
    };
    let report = json!({
        "status": status,
        "reason": reason,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": seconds(health.uptime()),
        "broker": {"state": broker.status.as_str(), "since": timestamp(broker.since), "last_error": last_error},
        "subscription": broker.subscription,
        "clock": clock,
        "events": {"total": events, "seconds_since_last": health.since_last_event().map(seconds)},
        "workers": {"online": workers.online, "offline": workers.offline},
        "losses": losses(health),
        "saved_state": health.saved_state().map(|saved| json!({
            "state": if saved.is_failing { "failing" } else { "ok" },
            "last_save": saved.last_save.map(timestamp),
        })),
        "warnings": health.warnings(),
    });
    (code, report)
}

fn not_ready_reason(broker: &BrokerReport) -> Option<String> {
    let error = broker.last_error.as_ref().map(|(message, _)| format!(": {message}")).unwrap_or_default();
    match broker.status {
        BrokerStatus::Connected => None,
        BrokerStatus::Connecting => Some(format!("{NOT_SUBSCRIBED}{error}")),
        BrokerStatus::Standby => Some("on standby: another consumer is consuming from broker.amqp.queue".to_owned()),
        BrokerStatus::Stopped => Some("the exporter is stopping".to_owned()),
    }
}

/// The losses of the last 15 minutes by cause.
fn losses(health: &Health) -> Value {
    let by_cause = health.losses().into_iter().map(|loss| {
        let sum = json!({
            "count": loss.count,
            "last": timestamp(loss.last),
            "seconds_without_subscription": loss.seconds,
            "approximate_events": loss.events,
        });
        (loss.cause.as_str().to_owned(), sum)
    });
    Value::Object(by_cause.collect())
}

fn timestamp(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Rounded to milliseconds.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
