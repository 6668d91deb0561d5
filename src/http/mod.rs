//! The HTTP server for `/metrics` and `/healthz`.
//! It runs on the caller's tokio runtime, must not block, and uses neither the broker nor the state directly: a scrape
//! requests a snapshot from the ingest thread.

mod body;
mod healthz;
mod negotiate;
mod server;
mod web_config;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, VARY,
    WWW_AUTHENTICATE,
};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Mutex, watch};

use crate::config::Config;
use crate::ingest::IngestHandle;
use crate::metrics::Snapshot;
use crate::metrics::encode::Exposition;
use crate::observability::{Health, SelfMetrics};

use body::ResponseBody;
use web_config::Access;

pub use server::serve;
#[doc(hidden)]
pub use server::serve_one;
pub use web_config::{Identity, WebConfig, WebConfigError};

/// How long other scrapes share a snapshot that is still being sent.
const SNAPSHOT_SHARE_WINDOW: Duration = Duration::from_secs(1);

/// The maximum number of connections that have not been accepted yet.
const LISTEN_BACKLOG: u32 = 1024;

/// The routes and their data sources.
pub struct Endpoints {
    ingest: IngestHandle,
    config: watch::Receiver<Arc<Config>>,
    web_config: watch::Receiver<Arc<WebConfig>>,
    self_metrics: Arc<SelfMetrics>,
    health: Arc<Health>,
    /// The most recent snapshot and when it was taken.
    latest: Mutex<Option<(Instant, Weak<Snapshot>)>>,
}

impl Endpoints {
    /// Routes that read from the ingest loop, the current configuration, the exporter's own metrics and its health.
    #[must_use]
    pub fn new(
        ingest: IngestHandle,
        config: watch::Receiver<Arc<Config>>,
        web_config: watch::Receiver<Arc<WebConfig>>,
        self_metrics: Arc<SelfMetrics>,
        health: Arc<Health>,
    ) -> Self {
        Self { ingest, config, web_config, self_metrics, health, latest: Mutex::new(None) }
    }

    async fn respond<B>(&self, request: Request<B>) -> Result<Response<ResponseBody>, Infallible> {
        let path = request.uri().path();
        let access = self.access(request.headers()).await;
        match access {
            Access::Granted => {}
            _ if path == "/healthz" => {}
            Access::Denied => return Ok(unauthorized()),
            Access::Busy => return Ok(busy()),
        }
        if !matches!(path, "/metrics" | "/healthz") {
            return Ok(text(StatusCode::NOT_FOUND, "Not found: see /metrics and /healthz.\n"));
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed: use GET or HEAD.\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Ok(response);
        }
        if path == "/healthz" {
            let check_ready = request
                .uri()
                .query()
                .is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("ready")));
            return Ok(self.healthz(check_ready, access));
        }
        Ok(self.metrics(request.method(), request.headers()).await)
    }

    /// Whether the request has the name and the password of a user, if there are any.
    async fn access(&self, headers: &HeaderMap) -> Access {
        let web_config = Arc::clone(&self.web_config.borrow());
        match &web_config.users {
            Some(users) => users.check(headers).await,
            None => Access::Granted,
        }
    }

    async fn metrics(&self, method: &Method, headers: &HeaderMap) -> Response<ResponseBody> {
        let timer = self.self_metrics.scrape_duration.start_timer();
        let format = negotiate::format(&joined(headers, &ACCEPT));
        let gzip = negotiate::accepts_gzip(&joined(headers, &ACCEPT_ENCODING));
        let mut response = if method == Method::HEAD {
            timer.stop_and_discard();
            Response::new(ResponseBody::empty())
        } else {
            let Some(snapshot) = self.snapshot().await else {
                return text(StatusCode::SERVICE_UNAVAILABLE, "The exporter is stopping.\n");
            };
            let (is_enabled, created) = {
                let metrics = &self.config.borrow().metrics;
                (metrics.self_metrics, metrics.created)
            };
            let self_metrics =
                if is_enabled { self.self_metrics.gather(self.health.since_last_event()) } else { Vec::new() };
            let exposition = Exposition::new(snapshot, format, &self_metrics);
            let exposition = if created { exposition.with_created() } else { exposition };
            Response::new(ResponseBody::exposition(exposition, gzip, timer))
        };
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
        headers.insert(VARY, HeaderValue::from_static("Accept, Accept-Encoding"));
        if gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }

    /// A snapshot of the metrics. A scrape that begins while another is being sent shares its snapshot for up to a
    /// second, so that slow clients do not hold one snapshot each.
    async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        let mut latest = self.latest.lock().await;
        if let Some((taken_at, snapshot)) = &*latest
            && taken_at.elapsed() < SNAPSHOT_SHARE_WINDOW
            && let Some(snapshot) = snapshot.upgrade()
        {
            return Some(snapshot);
        }
        let snapshot = self.ingest.snapshot().await?;
        *latest = Some((Instant::now(), Arc::downgrade(&snapshot)));
        Some(snapshot)
    }

    /// Without access, the report has only the status.
    fn healthz(&self, check_ready: bool, access: Access) -> Response<ResponseBody> {
        let (code, mut report) = healthz::report(&self.health, self.self_metrics.decoded_events.get(), check_ready);
        if access != Access::Granted {
            report = serde_json::json!({"status": report["status"]});
        }
        let mut response = text(code, format!("{report}\n"));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

/// The current content of the web configuration file, if there is one. It is read again when it changes.
pub fn follow(
    web_config: WebConfig,
    health: &Arc<Health>,
    self_metrics: &Arc<SelfMetrics>,
) -> watch::Receiver<Arc<WebConfig>> {
    let (web_config_tx, web_config_rx) = watch::channel(Arc::new(web_config));
    tokio::spawn(web_config::watch(web_config_tx, Arc::clone(health), Arc::clone(self_metrics)));
    web_config_rx
}

fn unauthorized() -> Response<ResponseBody> {
    let mut response = text(StatusCode::UNAUTHORIZED, "Unauthorized: send the name and password of a user.\n");
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"flower-exporter\""));
    response
}

fn busy() -> Response<ResponseBody> {
    let mut response = text(StatusCode::TOO_MANY_REQUESTS, "Too many requests: another password is being checked.\n");
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn text(code: StatusCode, body: impl Into<bytes::Bytes>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(body.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// All values of a header that may occur more than once, separated by commas.
fn joined(headers: &HeaderMap, name: &HeaderName) -> String {
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    values.join(",")
}

/// Binds a listening socket.
///
/// # Errors
/// Returns an error if the address is in use, does not belong to this host or requires privileges.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(LISTEN_BACKLOG)
}
