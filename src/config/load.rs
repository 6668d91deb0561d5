//! Merges the four sources: built-in defaults, TOML file, environment, command line. Later sources override earlier
//! ones.

use std::ffi::OsString;
use std::fmt::{Display, Write};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};
use figment::{Figment, Metadata, error::Kind as FigmentErrorKind};
use humantime::format_duration;

#[cfg(feature = "cli")]
use super::HttpConfig;
use super::broker_url::{BrokerUrls, UrlError};
use super::environment::{Environment, celery_layer};
use super::layer::{Layer, unknown_key, unset_if_empty};
#[cfg(feature = "cli")]
use super::schema::PREFIX;
use super::schema::{self, KEYS, Key, ValueKind, quoted};
use super::secret::{Secret, printable};
use super::{BrokerConfig, Config, ConfigError};

const DEFAULT_FILE: &str = "/etc/flower-exporter/flower-exporter.toml";
/// The keys that a probe needs.
#[cfg(feature = "cli")]
const PROBE_KEYS: [&str; 2] = ["http.listen", "http.web_config_file"];
/// The largest URL file, in bytes.
const MAX_URL_FILE: u64 = 64 << 10;

/// Values that override every other source, for example those of a command line. They are text and are checked like the
/// values of the other sources.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Overrides {
    /// The TOML file. `None`: `FLOWER_EXPORTER_CONFIG` if set, otherwise the default file if it exists.
    pub config_file: Option<PathBuf>,
    /// `broker.url`.
    pub broker: Option<Secret>,
    /// `http.listen`.
    pub listen: Option<String>,
    /// `http.web_config_file`.
    pub web_config_file: Option<String>,
    /// `log.level`.
    pub log_level: Option<String>,
    /// `log.format`.
    pub log_format: Option<String>,
    /// Whether `CELERY_BROKER_URL` is used if no source sets `broker.url` or `broker.url_file`.
    pub use_celery_variables: bool,
}

/// A configuration, and the source of each value.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoadedConfig {
    /// The configuration in force.
    pub config: Config,
    /// In the order of `KEYS`.
    sources: Vec<String>,
    /// Warnings about environment variables that have `_` in place of `__`.
    env_warnings: Vec<String>,
}

impl LoadedConfig {
    /// The configuration as TOML, with the source of each value. Secrets are masked, and unset keys are comments.
    #[must_use]
    pub fn report(&self) -> String {
        let mut report = String::new();
        for warning in self.warnings() {
            let _ = writeln!(report, "# {warning}");
        }
        let mut section = "";
        for (key, source) in KEYS.iter().zip(&self.sources) {
            if key.section() != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                section = key.section();
                let _ = writeln!(report, "{gap}[{section}]");
            }
            let name = &key.name[section.len() + 1..];
            let _ = match (key.format)(&self.config) {
                Some(value) => writeln!(report, "{name} = {value}  # {source}"),
                None => writeln!(report, "# {name} is unset  # {source}"),
            };
        }
        report
    }

    /// Values that have no effect or contradict each other, one line each: environment variables that lack an
    /// underscore, a URL beside a URL file, and a purge that is too early.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.env_warnings.iter().cloned().chain(self.shadowed_url()).chain(self.early_purges()).collect()
    }

    fn early_purges(&self) -> impl Iterator<Item = String> {
        let Config { state, metrics, .. } = &self.config;
        let shows_zeros = metrics.zero_first * 2;
        let offline = state.purge_offline_workers.zip(state.worker_timeout).filter(|(purge, timeout)| purge < timeout);
        let offline = offline.map(|(purge, timeout)| {
            format!(
                "state.purge_offline_workers ({}) is shorter than state.worker_timeout ({}): the series of a worker are \
                 removed before they show that it is offline",
                format_duration(purge),
                format_duration(timeout)
            )
        });
        let stopped = state.effective_purge_stopped().filter(|purge| *purge < shows_zeros);
        let stopped = stopped.map(|purge| {
            format!(
                "state.purge_stopped_workers ({}) is shorter than twice metrics.zero_first ({}): the last events of a \
                 worker may be removed before a scrape sees them",
                format_duration(purge),
                format_duration(metrics.zero_first)
            )
        });
        offline.into_iter().chain(stopped)
    }

    fn shadowed_url(&self) -> Option<String> {
        let broker = &self.config.broker;
        if broker.url_file.is_none() || broker.url == BrokerConfig::default().url {
            return None;
        }
        let source = |name| KEYS.iter().zip(&self.sources).find(|(key, _)| key.name == name).map(|(_, source)| source);
        let (url, file) = (source("broker.url")?, source("broker.url_file")?);
        Some(format!("broker.url ({url}) is ignored because broker.url_file ({file}) is set"))
    }
}

/// Loads and validates the configuration from defaults, file, environment and overrides.
///
/// # Errors
/// Returns an error if any value is invalid: the first one found.
pub fn load(overrides: &Overrides) -> Result<LoadedConfig, ConfigError> {
    load_from(overrides, std::env::vars_os(), Path::new(DEFAULT_FILE))
}

/// Like [`load`], with another environment and default file. For tests and fuzz targets.
///
/// # Errors
/// Returns an error if any value is invalid: the first one found.
#[doc(hidden)]
pub fn load_from(
    overrides: &Overrides,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    default_file: &Path,
) -> Result<LoadedConfig, ConfigError> {
    let environment = Environment::read(environment)?;
    let mut figment = Figment::new();
    let named_file = overrides.config_file.as_ref().or(environment.config_file.as_ref());
    if let Some(layer) = file_layer(named_file, default_file)? {
        figment = figment.merge(layer);
    }
    for layer in environment.layers.into_iter().chain(override_layers(overrides)) {
        figment = figment.merge(layer);
    }
    let mut env_warnings = environment.unrecognized;
    if overrides.use_celery_variables && !sets_url(&figment) {
        match environment.celery_url {
            Some(url) => figment = figment.merge(celery_layer(&url)?),
            None => env_warnings.extend(environment.broker_hints),
        }
    }
    let config: Config = figment.extract().map_err(|error| value_error(&figment, error))?;
    config.validate()?;
    let sources = KEYS.iter().map(|key| source(&figment, key)).collect();
    Ok(LoadedConfig { config, sources, env_warnings })
}

/// Whether any source sets the broker's URL, or a file that contains it.
fn sets_url(figment: &Figment) -> bool {
    let has_file = figment.find_value("broker.url_file").is_ok_and(|value| value.as_str().is_some());
    has_file || figment.contains("broker.url")
}

/// The values of `http.listen` and `http.web_config_file`, without validating any other key. A file that cannot be used
/// counts as absent.
///
/// # Errors
/// Returns an error if a value in the environment or in the overrides is invalid.
#[cfg(feature = "cli")]
pub(crate) fn load_probe(overrides: &Overrides) -> Result<HttpConfig, ConfigError> {
    probe_from(overrides, std::env::vars_os(), Path::new(DEFAULT_FILE))
}

#[cfg(feature = "cli")]
pub(super) fn probe_from(
    overrides: &Overrides,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    default_file: &Path,
) -> Result<HttpConfig, ConfigError> {
    let variables = PROBE_KEYS.map(|name| name.replace('.', "__").to_uppercase());
    let is_relevant = |name: &str| name == "CONFIG" || variables.iter().any(|known| name.eq_ignore_ascii_case(known));
    let relevant = environment
        .into_iter()
        .filter(|(name, _)| name.to_str().and_then(|name| name.strip_prefix(PREFIX)).is_some_and(is_relevant));
    let environment = Environment::read(relevant)?;
    let file = overrides.config_file.as_ref().or(environment.config_file.as_ref());
    let file = file.map_or(default_file, PathBuf::as_path);
    let overrides = Overrides {
        listen: overrides.listen.clone(),
        web_config_file: overrides.web_config_file.clone(),
        ..Overrides::default()
    };
    let layers = environment.layers.into_iter().chain(override_layers(&overrides));
    let in_file = PROBE_KEYS.into_iter().filter_map(|name| layer_of_key(file, name));
    let is_valid = |layer: &Layer| Figment::from(layer).extract::<Config>().is_ok();
    let figment = in_file.filter(is_valid).chain(layers).fold(Figment::new(), Figment::merge);
    let config: Config = figment.extract().map_err(|error| value_error(&figment, error))?;
    Ok(config.http)
}

/// The value of a key in a file, if the file can be read and parsed and contains it.
#[cfg(feature = "cli")]
fn layer_of_key(path: &Path, name: &str) -> Option<Layer> {
    let values = Toml::from_str::<Dict>(&std::fs::read_to_string(path).ok()?).ok()?;
    let key = schema::find(name)?;
    let value = Value::from(values).find(name)?;
    Some(Layer::from_key(printable_path(path), key, unset_if_empty(key, value)))
}

fn source(figment: &Figment, key: &Key) -> String {
    figment.find_metadata(key.name).map_or("default".to_owned(), |metadata| metadata.name.to_string())
}

fn file_layer(named: Option<&PathBuf>, default: &Path) -> Result<Option<Layer>, ConfigError> {
    let path = named.map_or(default, PathBuf::as_path);
    let text = match std::fs::read_to_string(path) {
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        read => read.map_err(|error| file_error(path, &error))?,
    };
    let mut values = Toml::from_str::<Dict>(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        let message = error.message().replace('\n', ", ");
        file_error(path, &format_args!("line {line}, column {column}: {message}"))
    })?;
    check_keys(&mut values, "", &printable_path(path))?;
    let metadata = Metadata::named(printable_path(path)).source(path);
    Ok(Some(Layer { metadata, values }))
}

fn file_error(path: &Path, problem: &dyn Display) -> ConfigError {
    ConfigError::File { path: printable_path(path), reason: problem.to_string() }
}

/// A path that is safe to print. It is masked if it may be a URL with a password, which was set by mistake.
pub(crate) fn printable_path(path: &Path) -> String {
    printable(&path.to_string_lossy()).escape_debug().to_string()
}

fn check_keys(values: &mut Dict, section: &str, file: &str) -> Result<(), ConfigError> {
    for (name, value) in values {
        let path = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        if let Some(key) = schema::find(&path) {
            *value = unset_if_empty(key, value.clone());
        } else if !schema::is_section(&path) {
            return Err(unknown_key(file, &path));
        } else if let Value::Dict(_, inner) = value {
            check_keys(inner, &path, file)?;
        } else {
            let subject = format!("{file}: {path}");
            let reason = format!("expected a table [{path}]");
            return Err(ConfigError::Value { subject, value: String::new(), reason });
        }
    }
    Ok(())
}

fn override_layers(overrides: &Overrides) -> impl Iterator<Item = Layer> {
    let values = [
        ("broker.url", "--broker", overrides.broker.as_ref().map(Secret::expose)),
        // A URL on the command line replaces a URL file that an earlier source sets.
        ("broker.url_file", "--broker", overrides.broker.as_ref().map(|_| "")),
        ("http.listen", "--listen", overrides.listen.as_deref()),
        ("http.web_config_file", "--web.config.file", overrides.web_config_file.as_deref()),
        ("log.level", "--log-level", overrides.log_level.as_deref()),
        ("log.format", "--log-format", overrides.log_format.as_deref()),
    ];
    values.into_iter().filter_map(|(name, option, value)| {
        Some(Layer::from_key(format!("command line {option}"), schema::find(name)?, Value::from(value?)))
    })
}

fn value_error(figment: &Figment, error: figment::Error) -> ConfigError {
    let path = error.path.join(".");
    let key = KEYS.iter().find(|key| path == key.name);
    let subject = match &error.metadata {
        Some(metadata) if metadata.source.is_some() => format!("{}: {path}", metadata.name),
        Some(metadata) => metadata.name.to_string(),
        None => path.clone(),
    };
    let value = match key.map(|key| key.kind) {
        None => String::new(),
        Some(ValueKind::Secret) => format!(" = {}", Secret::MASK),
        Some(_) => figment.find_value(&path).map_or(String::new(), |value| format!(" = {}", format_value(&value))),
    };
    let reason = match error.kind {
        FigmentErrorKind::Message(message) => message,
        FigmentErrorKind::InvalidType(_, expected) if expected == "a boolean" => "expected true or false".to_owned(),
        _ => "expected a string".to_owned(),
    };
    ConfigError::Value { subject, value, reason }
}

fn format_value(value: &Value) -> String {
    match value {
        Value::String(_, text) => quoted(printable(text)),
        Value::Bool(_, flag) => flag.to_string(),
        Value::Num(_, number) => match number.to_i128() {
            Some(integer) => integer.to_string(),
            None => format!("{:?}", number.to_f64().unwrap_or(f64::NAN)),
        },
        Value::Array(_, items) => {
            format!("[{}]", items.iter().map(format_value).collect::<Vec<_>>().join(", "))
        }
        _ => "{…}".to_owned(),
    }
}

/// Reads the URLs that `url_file` contains. Errors name the file and never contain its content.
pub(super) fn read_urls(path: &Path) -> Result<BrokerUrls, ConfigError> {
    let invalid = |reason: String| ConfigError::Value {
        subject: "broker.url_file".to_owned(),
        value: format!(" = {}", quoted(&printable_path(path))),
        reason,
    };
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_URL_FILE + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(invalid(error.to_string())),
        Ok(bytes) if bytes as u64 > MAX_URL_FILE => Err(invalid("file exceeds 64 KiB".to_owned())),
        Ok(_) => text.parse().map_err(|error: UrlError| invalid(error.to_string())),
    }
}
