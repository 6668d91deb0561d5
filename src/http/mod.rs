//! `/metrics` and `/healthz`, and nothing else. Never touches the broker.

mod body;
mod connection;
mod negotiate;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hyper::header::{ACCEPT, ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, VARY};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Mutex, watch};

use crate::ingest::Asker;
use crate::metrics::Snapshot;
use crate::metrics::text::Exposition;
use crate::settings::Settings;
use crate::telemetry::{BrokerStatus, Health, Telemetry};

use body::Payload;

pub use connection::serve;
#[doc(hidden)]
pub use connection::serve_one;

/// How long scrapes share a copy of the numbers that is still being sent.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// Connections that may wait to be accepted.
const LISTEN_BACKLOG: u32 = 1024;

/// What the endpoints answer from.
pub struct Endpoints {
    asker: Asker,
    settings: watch::Receiver<Arc<Settings>>,
    telemetry: Arc<Telemetry>,
    health: Arc<Health>,
    last: Mutex<Option<(Instant, Weak<Snapshot>)>>,
}

impl Endpoints {
    /// Over the ingest loop, the settings in force, the exporter's own metrics and the facts behind `/healthz`.
    #[must_use]
    pub fn new(
        asker: Asker,
        settings: watch::Receiver<Arc<Settings>>,
        telemetry: Arc<Telemetry>,
        health: Arc<Health>,
    ) -> Self {
        Self { asker, settings, telemetry, health, last: Mutex::new(None) }
    }

    async fn respond<B>(&self, request: Request<B>) -> Result<Response<Payload>, Infallible> {
        let path = request.uri().path();
        if !matches!(path, "/metrics" | "/healthz") {
            return Ok(text(StatusCode::NOT_FOUND, "Not found: there are /metrics and /healthz.\n"));
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD.\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Ok(response);
        }
        if path == "/healthz" {
            let ready = request
                .uri()
                .query()
                .is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("ready")));
            return Ok(self.healthz(ready));
        }
        Ok(self.metrics(request.method(), request.headers()).await)
    }

    async fn metrics(&self, method: &Method, headers: &HeaderMap) -> Response<Payload> {
        let format = negotiate::format(&joined(headers, &ACCEPT));
        let gzip = negotiate::accepts_gzip(&joined(headers, &ACCEPT_ENCODING));
        let mut response = if method == Method::HEAD {
            Response::new(Payload::empty())
        } else {
            let Some(snapshot) = self.snapshot().await else {
                return text(StatusCode::SERVICE_UNAVAILABLE, "The exporter is stopping.\n");
            };
            let own = if self.settings.borrow().metrics.self_metrics { self.telemetry.gather() } else { Vec::new() };
            Response::new(Payload::exposition(Exposition::new(snapshot, format, &own), gzip))
        };
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
        headers.insert(VARY, HeaderValue::from_static("Accept, Accept-Encoding"));
        if gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }

    /// A copy of the numbers. Scrapes that come while another is being sent share its copy for a second, so that slow
    /// readers do not hold one each.
    async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        let mut last = self.last.lock().await;
        if let Some((taken, snapshot)) = &*last
            && taken.elapsed() < SHARED_FOR
            && let Some(snapshot) = snapshot.upgrade()
        {
            return Some(snapshot);
        }
        let snapshot = self.asker.snapshot().await?;
        *last = Some((Instant::now(), Arc::downgrade(&snapshot)));
        Some(snapshot)
    }

    fn healthz(&self, ready: bool) -> Response<Payload> {
        let broker = self.health.broker();
        let (code, status) = if !self.health.is_alive() {
            (StatusCode::SERVICE_UNAVAILABLE, "stuck")
        } else if ready && broker != BrokerStatus::Connected {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready")
        } else {
            (StatusCode::OK, "ok")
        };
        let report = serde_json::json!({
            "status": status,
            "broker": broker.as_str(),
            "seconds_since_last_event": self.health.since_last_event().as_ref().map(Duration::as_secs_f64),
            "warnings": self.health.warnings(),
        });
        let mut response = text(code, format!("{report}\n"));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

fn text(code: StatusCode, body: impl Into<bytes::Bytes>) -> Response<Payload> {
    let mut response = Response::new(Payload::full(body.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// All values of a header that may be there several times.
fn joined(headers: &HeaderMap, name: &hyper::header::HeaderName) -> String {
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    values.join(",")
}

/// Binds the socket. A taken port is an error at once, before anything else is started.
///
/// # Errors
/// The system's, for the address.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(LISTEN_BACKLOG)
}
