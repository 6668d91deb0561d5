//! Reads the file again when it has changed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::file::WebConfigFile;
use super::{WebConfig, WebConfigError};
use crate::observability::{ConfigPart, Health, SelfMetrics, WarningSource};

/// Time between two checks.
const INTERVAL: Duration = Duration::from_secs(5);
/// Files that are replaced one after the other do not fit together for a moment.
const SETTLING_TIME: Duration = Duration::from_secs(1);

/// Checks the files every five seconds until the receivers are gone. A valid change is sent; an invalid one is reported.
pub(in crate::http) async fn watch(
    web_config_tx: watch::Sender<Arc<WebConfig>>,
    health: Arc<Health>,
    self_metrics: Arc<SelfMetrics>,
) {
    let Some(path) = web_config_tx.borrow().path.clone() else { return };
    let mut known = web_config_tx.borrow().hash;
    while !web_config_tx.is_closed() {
        sleep(INTERVAL).await;
        let Some(changed) = read(&path).await else { return };
        if changed.hash == known {
            continue;
        }
        known = changed.hash;
        let Some(mut loaded) = load(changed).await else { return };
        if loaded.is_err() {
            sleep(SETTLING_TIME).await;
            let Some(settled) = read(&path).await else { return };
            known = settled.hash;
            let Some(settled) = load(settled).await else { return };
            loaded = settled;
        }
        self_metrics.record_reload(ConfigPart::Web, loaded.is_ok());
        match loaded {
            Ok(web_config) => {
                web_config_tx.send_replace(Arc::new(web_config));
                health.set_warnings(WarningSource::Web, Vec::new());
                tracing::info!(path = %path.display(), "web configuration reloaded");
            }
            Err(error) => {
                health.set_warnings(WarningSource::Web, vec![format!("{error}; keeping the current one")]);
            }
        }
    }
}

/// `None`: the runtime is shutting down.
async fn read(path: &Path) -> Option<WebConfigFile> {
    let path = path.to_owned();
    spawn_blocking(move || WebConfigFile::read(&path)).await.ok()
}

async fn load(file: WebConfigFile) -> Option<Result<WebConfig, WebConfigError>> {
    spawn_blocking(move || file.load()).await.ok()
}
