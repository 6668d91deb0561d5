//! The command line. Values remain text here and are validated with those of the other sources.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{Parser, ValueHint};

use crate::config::{Overrides, Secret};

/// Exports Celery's events as Prometheus metrics.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "flower-exporter", version = crate::VERSION)]
pub struct Args {
    /// Configuration file [default: `FLOWER_EXPORTER_CONFIG`, else /etc/flower-exporter/flower-exporter.toml if it
    /// exists]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Broker URL as in Celery, or several separated by ';'
    #[arg(short, long, value_name = "URL")]
    pub broker: Option<Secret>,
    /// Address of /metrics
    #[arg(short, long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// Web configuration file of Prometheus' exporter-toolkit: TLS and passwords
    #[arg(long = "web.config.file", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub web_config_file: Option<String>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Print the resulting configuration and the source of each value, then exit
    #[arg(long)]
    pub check_config: bool,
    /// Query /healthz of the running exporter and exit with 0 or 1
    #[arg(long)]
    pub healthcheck: bool,
}

impl Args {
    /// Parses arguments, the program's name first.
    ///
    /// # Errors
    /// Returns an error if an argument is invalid, or if help or the version was requested: call `exit` on it. It does
    /// not repeat a URL or the arguments next to one, because either may contain a password.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let args: Vec<OsString> = args.into_iter().collect();
        let has_url = args.iter().any(|arg| arg.to_string_lossy().contains("://"));
        let may_hold_password = |text: &str| text.contains("://") || (has_url && !text.starts_with('-'));
        Self::try_parse_from(args).map_err(|mut error| {
            for kind in [ContextKind::InvalidArg, ContextKind::InvalidValue] {
                if matches!(error.get(kind), Some(ContextValue::String(text)) if may_hold_password(text)) {
                    error.insert(kind, ContextValue::String(Secret::MASK.to_owned()));
                }
            }
            error
        })
    }

    /// The values that override the other sources.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides {
            use_celery_variables: true,
            config_file: self.config.clone(),
            broker: self.broker.clone(),
            listen: self.listen.clone(),
            web_config_file: self.web_config_file.clone(),
            log_level: self.log_level.clone(),
            log_format: self.log_format.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_does_not_repeat_a_url_or_what_stands_beside_it() {
        let url = "redis://:hunter2@h";
        for args in [vec![url], vec!["--bro", url], vec!["--check-config=redis://:hunter2@h"]] {
            let args = ["flower-exporter"].into_iter().chain(args).map(OsString::from);
            let error = Args::read(args).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
