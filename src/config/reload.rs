//! Which changes of the configuration take effect while the exporter runs.

use super::Config;
use super::schema::KEYS;

/// What a reload changed, and what it could not change.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ReloadReport {
    /// The effective configuration after the reload.
    pub config: Config,
    /// Keys whose new value took effect.
    pub applied: Vec<&'static str>,
    /// Keys that keep their old value until the exporter is restarted.
    pub requires_restart: Vec<&'static str>,
}

/// Plans a reload: compares two configurations key by key.
#[must_use]
pub fn plan_reload(old: &Config, new: &Config) -> ReloadReport {
    let mut report = ReloadReport { config: old.clone(), applied: Vec::new(), requires_restart: Vec::new() };
    for key in KEYS.iter().filter(|key| !(key.eq)(old, new)) {
        if key.live {
            (key.copy)(&mut report.config, new);
            report.applied.push(key.name);
        } else {
            report.requires_restart.push(key.name);
        }
    }
    report
}
