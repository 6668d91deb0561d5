//! Reads settings from environment variables.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};

use super::ConfigError;
use super::layer::{Layer, unknown_key};
use super::schema::{self, KEYS, PREFIX, ValueKind};

/// The URL that Celery's applications and Flower's image read.
const CELERY_BROKER_URL: &str = "CELERY_BROKER_URL";
/// Other variables that often contain the broker's URL.
const BROKER_VARIABLES: [&str; 2] = ["BROKER_URL", "FLOWER_BROKER"];

/// The exporter's environment variables.
#[derive(Default)]
pub(super) struct Environment {
    pub(super) config_file: Option<PathBuf>,
    pub(super) layers: Vec<Layer>,
    /// Warnings about variables that have `_` in place of `__`.
    pub(super) unrecognized: Vec<String>,
    /// `CELERY_BROKER_URL`, to be used if no source sets a URL.
    pub(super) celery_url: Option<OsString>,
    /// Warnings about variables that are not used, if no source sets a URL.
    pub(super) broker_hints: Vec<String>,
}

impl Environment {
    pub(super) fn read(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, ConfigError> {
        let mut environment = Self::default();
        for (name, value) in variables {
            let name = name.to_string_lossy();
            match name.strip_prefix(PREFIX) {
                Some("CONFIG") if !value.is_empty() => environment.config_file = Some(PathBuf::from(value)),
                Some(rest) if rest.contains("__") => {
                    if rest.eq_ignore_ascii_case("BROKER__URL") {
                        // A URL in the environment replaces a URL file that the TOML file sets.
                        environment.layers.insert(0, variable_layer(&name, "BROKER__URL_FILE", OsStr::new(""))?);
                    }
                    environment.layers.push(variable_layer(&name, rest, &value)?);
                }
                Some(rest) => {
                    environment.unrecognized.extend(did_you_mean(rest).map(|known| ignored(&name, &known)));
                }
                None if name == CELERY_BROKER_URL && !value.is_empty() => {
                    environment.celery_url = Some(value);
                }
                None if BROKER_VARIABLES.contains(&&*name) && !value.is_empty() => {
                    environment.broker_hints.push(ignored(&name, &format!("{PREFIX}BROKER__URL")));
                }
                None => {}
            }
        }
        Ok(environment)
    }
}

fn ignored(name: &str, known: &str) -> String {
    format!("environment variable {name} is ignored; did you mean {known}?")
}

/// The broker's URL from `CELERY_BROKER_URL`.
pub(super) fn celery_layer(url: &OsStr) -> Result<Layer, ConfigError> {
    variable_layer(CELERY_BROKER_URL, "BROKER__URL", url)
}

/// The variable that was probably meant by a name with single underscores. `None` if no key is similar. Kubernetes sets
/// variables such as `FLOWER_EXPORTER_PORT` for a Service of this name, and they must be ignored.
fn did_you_mean(rest: &str) -> Option<String> {
    let key = KEYS.iter().find(|key| key.name.replace('.', "_").eq_ignore_ascii_case(rest))?;
    Some(key.variable())
}

fn variable_layer(name: &str, rest: &str, value: &OsStr) -> Result<Layer, ConfigError> {
    let path = rest.to_ascii_lowercase().replace("__", ".");
    let source = format!("environment {}", name.escape_debug());
    let key = schema::find(&path).ok_or_else(|| unknown_key(&source, &path))?;
    let text = value.to_str().ok_or_else(|| ConfigError::NotUtf8(name.to_owned()))?;
    let value = match key.kind {
        ValueKind::Text | ValueKind::Secret => Value::from(text),
        ValueKind::Scalar if key.type_name == "boolean" => boolean(text).map_or_else(|| scalar(text), Value::from),
        ValueKind::Scalar => scalar(text),
        ValueKind::Strings | ValueKind::Numbers if text.is_empty() => Value::from(text),
        ValueKind::Strings => list(text, |item| Value::from(item)),
        ValueKind::Numbers => list(text, scalar),
    };
    Ok(Layer::from_key(source, key, value))
}

/// A boolean as Python and shell users write it.
fn boolean(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

fn scalar(text: &str) -> Value {
    let text = text.trim();
    let boolean = text.parse::<bool>().map(Value::from).ok();
    let integer = || text.parse::<i64>().map(Value::from).ok();
    let float = || text.parse::<f64>().map(Value::from).ok();
    boolean.or_else(integer).or_else(float).unwrap_or_else(|| Value::from(text))
}

/// Parses a TOML array or comma-separated items. A comma-separated list may begin with `[`, too, because a glob may.
fn list(text: &str, item: fn(&str) -> Value) -> Value {
    let array = Toml::from_str::<Dict>(&format!("list = {}", text.trim()))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("list"))
        .filter(|value| value.as_array().is_some());
    let items = || text.split(',').map(str::trim).filter(|item| !item.is_empty());
    array.unwrap_or_else(|| Value::from(items().map(item).collect::<Vec<_>>()))
}
