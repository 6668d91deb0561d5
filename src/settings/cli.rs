//! The command line. Values stay text here: they are checked with the other layers' and in the same words.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{Parser, ValueHint};

use super::value::Secret;

/// Exports Celery's events as Prometheus metrics.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "flower-exporter", version = crate::VERSION)]
pub struct Cli {
    /// Settings file [else `FLOWER_EXPORTER_CONFIG`, else /etc/flower-exporter/flower-exporter.toml where it exists]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Broker URL as in Celery, or several separated by ';'
    #[arg(short, long, value_name = "URL")]
    pub broker: Option<Secret>,
    /// Address of /metrics
    #[arg(short, long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Print the settings in force and where each comes from, then exit
    #[arg(long)]
    pub check_config: bool,
    /// Ask the running exporter's /healthz and exit with 0 or 1
    #[arg(long)]
    pub healthcheck: bool,
}

impl Cli {
    /// Parses arguments, the program's name first.
    ///
    /// # Errors
    /// What clap finds wrong, or help and version asked for: call `exit` on it. A URL given in
    /// the wrong place is not repeated, for it may hold a password; nor what stands beside one, for it may be a part of it.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let args: Vec<OsString> = args.into_iter().collect();
        let has_url = args.iter().any(|arg| arg.to_string_lossy().contains("://"));
        Self::try_parse_from(args).map_err(|mut error| {
            for kind in [ContextKind::InvalidArg, ContextKind::InvalidValue] {
                if matches!(error.get(kind), Some(ContextValue::String(text)) if text.contains("://") || (has_url && !text.starts_with('-'))) {
                    error.insert(kind, ContextValue::String(Secret::MASK.to_owned()));
                }
            }
            error
        })
    }
}
