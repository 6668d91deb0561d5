//! The four layers, what is said about a mistake in one of them, and what a reload may change.

use std::ffi::{OsStr, OsString};
use std::fmt::{Display, Write};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::value::{Dict, Empty, Map, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider, error::Kind as Mistake, util::nest};

use super::cli::Cli;
use super::schema::{self, KEYS, Key, Kind, quoted};
use super::url::{Address, BrokerUrls, Transport};
use super::value::{Secret, printable};
use super::{Broker, BrokerUrl, Settings};

const DEFAULT_FILE: &str = "/etc/flower-exporter/flower-exporter.toml";
const PREFIX: &str = "FLOWER_EXPORTER_";
const MAX_URL_FILE: u64 = 64 << 10;

/// A mistake in the settings, told in one line without secrets. The start ends with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A settings or URL file that cannot be used.
    #[error("{path}: {problem}")]
    File {
        /// As given.
        path: String,
        /// Where in it, and what.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{subject}: unknown key {key}: expected one of {accepted}")]
    UnknownKey {
        /// The file or variable.
        subject: String,
        /// As `section.key`.
        key: String,
        /// The keys at that place.
        accepted: String,
    },
    /// A value of the wrong type or out of bounds.
    #[error("{subject}{value}: {expected}")]
    Value {
        /// The source, and the key where the source does not name it.
        subject: String,
        /// ` = value`, masked where it may hold a password; nothing where it is a table.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// A variable of ours that is no text.
    #[error("environment {0}: not valid UTF-8")]
    NotUtf8(String),
}

/// Settings and where each value came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What is in force.
    pub settings: Settings,
    /// In the order of `KEYS`.
    sources: Vec<String>,
    /// Variables that are none of ours by one underscore.
    misnamed: Vec<String>,
}

impl Loaded {
    /// What is in force as TOML, each value with its source; secrets are masked, unset keys are comments.
    #[must_use]
    pub fn report(&self) -> String {
        let mut report = String::new();
        for unused in self.unused() {
            let _ = writeln!(report, "# {unused}");
        }
        let mut section = "";
        for (key, source) in KEYS.iter().zip(&self.sources) {
            if key.section() != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                section = key.section();
                let _ = writeln!(report, "{gap}[{section}]");
            }
            let name = &key.name[section.len() + 1..];
            let _ = match (key.shown)(&self.settings) {
                Some(value) => writeln!(report, "{name} = {value}  # {source}"),
                None => writeln!(report, "# {name} is unset  # {source}"),
            };
        }
        report
    }

    /// What was given and has no effect, a line each: variables with one underscore where two belong, and a URL beside
    /// a URL file.
    #[must_use]
    pub fn unused(&self) -> Vec<String> {
        self.misnamed.iter().cloned().chain(self.overruled_url()).collect()
    }

    fn overruled_url(&self) -> Option<String> {
        let broker = &self.settings.broker;
        if broker.url_file.is_none() || broker.url == Broker::default().url {
            return None;
        }
        let source = |name| KEYS.iter().zip(&self.sources).find(|(key, _)| key.name == name).map(|(_, source)| source);
        let (url, file) = (source("broker.url")?, source("broker.url_file")?);
        Some(format!("broker.url ({url}) is not used: broker.url_file ({file}) is"))
    }
}

/// Reads default, file, environment and command line, and checks the result.
///
/// # Errors
/// The first mistake found.
pub fn load(cli: &Cli) -> Result<Loaded, Error> {
    load_from(cli, std::env::vars_os(), Path::new(DEFAULT_FILE))
}

/// As [`load`], from another environment and default file.
///
/// # Errors
/// The first mistake found.
#[doc(hidden)]
pub fn load_from(
    cli: &Cli,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    default_file: &Path,
) -> Result<Loaded, Error> {
    let mut named_file = None;
    let (mut variables, mut misnamed) = (Vec::new(), Vec::new());
    for (name, value) in environment {
        let name = name.to_string_lossy();
        match name.strip_prefix(PREFIX) {
            Some("CONFIG") if !value.is_empty() => named_file = Some(PathBuf::from(value)),
            Some(rest) if rest.contains("__") => {
                if rest.eq_ignore_ascii_case("BROKER__URL") {
                    variables.insert(0, variable_layer(&name, "BROKER__URL_FILE", OsStr::new(""))?);
                }
                variables.push(variable_layer(&name, rest, &value)?);
            }
            Some(rest) => {
                misnamed.extend(meant(rest).map(|meant| format!("environment {name} is not read: {meant} is")));
            }
            None => {}
        }
    }
    let mut figment = Figment::new();
    if let Some(layer) = file_layer(cli.config.as_ref().or(named_file.as_ref()), default_file)? {
        figment = figment.merge(layer);
    }
    for layer in variables.into_iter().chain(option_layers(cli)) {
        figment = figment.merge(layer);
    }
    let settings: Settings = figment.extract().map_err(|error| value_error(&figment, error))?;
    // A URL file must be readable at the start.
    settings.broker.urls()?;
    let sources = KEYS.iter().map(|key| source(&figment, key)).collect();
    Ok(Loaded { settings, sources, misnamed })
}

/// The variable that was meant by one with a single underscore. Names that mean nothing here are somebody else's:
/// Kubernetes sets `FLOWER_EXPORTER_PORT` and the like for a Service of our name.
fn meant(rest: &str) -> Option<String> {
    let key = KEYS.iter().find(|key| key.name.replace('.', "_").eq_ignore_ascii_case(rest))?;
    Some(format!("{PREFIX}{}", key.name.replace('.', "__").to_uppercase()))
}

fn source(figment: &Figment, key: &Key) -> String {
    figment.find_metadata(key.name).map_or("default".to_owned(), |metadata| metadata.name.to_string())
}

/// One source's values; its metadata's name is what the report and errors call it.
struct Layer {
    metadata: Metadata,
    values: Dict,
}

impl Layer {
    fn of_key(source: String, key: &Key, value: Value) -> Self {
        let values = nest(key.name, unset_if_empty(key, value)).into_dict().unwrap_or_default();
        Self { metadata: Metadata::named(source), values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        self.metadata.clone()
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

fn unset_if_empty(key: &Key, value: Value) -> Value {
    match value.as_str() {
        Some("") if key.optional => Value::Empty(Tag::Default, Empty::None),
        _ => value,
    }
}

fn file_layer(named: Option<&PathBuf>, default: &Path) -> Result<Option<Layer>, Error> {
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
    check_keys(&mut values, "", &masked(path))?;
    let metadata = Metadata::named(masked(path)).source(path);
    Ok(Some(Layer { metadata, values }))
}

fn file_error(path: &Path, problem: &dyn Display) -> Error {
    Error::File { path: masked(path), problem: problem.to_string() }
}

/// A path for printing.
pub(crate) fn masked(path: &Path) -> String {
    printable(&path.to_string_lossy()).escape_debug().to_string()
}

fn check_keys(values: &mut Dict, section: &str, file: &str) -> Result<(), Error> {
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
            let expected = format!("expected a table [{path}]");
            return Err(Error::Value { subject, value: String::new(), expected });
        }
    }
    Ok(())
}

fn unknown_key(subject: &str, key: &str) -> Error {
    let section = key.rsplit_once('.').map_or("", |(section, _)| section);
    Error::UnknownKey {
        subject: subject.to_owned(),
        key: key.escape_debug().to_string(),
        accepted: schema::children(section).join(", "),
    }
}

fn variable_layer(name: &str, rest: &str, value: &OsStr) -> Result<Layer, Error> {
    let path = rest.to_ascii_lowercase().replace("__", ".");
    let source = format!("environment {}", name.escape_debug());
    let key = schema::find(&path).ok_or_else(|| unknown_key(&source, &path))?;
    let text = value.to_str().ok_or_else(|| Error::NotUtf8(name.to_owned()))?;
    let value = match key.kind {
        Kind::Text | Kind::Secret => Value::from(text),
        Kind::Scalar => scalar(text),
        Kind::Texts | Kind::Numbers if text.is_empty() => Value::from(text),
        Kind::Texts => list(text, |item| Value::from(item)),
        Kind::Numbers => list(text, scalar),
    };
    Ok(Layer::of_key(source, key, value))
}

fn scalar(text: &str) -> Value {
    let text = text.trim();
    let boolean = text.parse::<bool>().map(Value::from).ok();
    let integer = || text.parse::<i64>().map(Value::from).ok();
    let float = || text.parse::<f64>().map(Value::from).ok();
    boolean.or_else(integer).or_else(float).unwrap_or_else(|| Value::from(text))
}

/// A glob may begin with `[` as well: what is no TOML array is comma-separated.
fn list(text: &str, item: fn(&str) -> Value) -> Value {
    let array = Toml::from_str::<Dict>(&format!("list = {}", text.trim()))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("list"))
        .filter(|value| value.as_array().is_some());
    let items = || text.split(',').map(str::trim).filter(|item| !item.is_empty());
    array.unwrap_or_else(|| Value::from(items().map(item).collect::<Vec<_>>()))
}

fn option_layers(cli: &Cli) -> impl Iterator<Item = Layer> {
    let options = [
        ("broker.url", "--broker", cli.broker.as_ref().map(Secret::expose)),
        // A URL of a later layer replaces the file of an earlier one.
        ("broker.url_file", "--broker", cli.broker.as_ref().map(|_| "")),
        ("http.listen", "--listen", cli.listen.as_deref()),
        ("log.level", "--log-level", cli.log_level.as_deref()),
        ("log.format", "--log-format", cli.log_format.as_deref()),
    ];
    options.into_iter().filter_map(|(name, option, value)| {
        Some(Layer::of_key(format!("command line {option}"), schema::find(name)?, Value::from(value?)))
    })
}

fn value_error(figment: &Figment, error: figment::Error) -> Error {
    let path = error.path.join(".");
    let key = KEYS.iter().find(|key| path == key.name);
    let subject = match &error.metadata {
        Some(metadata) if metadata.source.is_some() => format!("{}: {path}", metadata.name),
        Some(metadata) => metadata.name.to_string(),
        None => path.clone(),
    };
    let value = match key.map(|key| key.kind) {
        None => String::new(),
        Some(Kind::Secret) => format!(" = {}", Secret::MASK),
        Some(_) => figment.find_value(&path).map_or(String::new(), |value| format!(" = {}", shown(&value))),
    };
    let expected = match error.kind {
        Mistake::Message(message) => message,
        Mistake::InvalidType(_, expected) if expected == "a boolean" => "expected true or false".to_owned(),
        _ => "expected text".to_owned(),
    };
    Error::Value { subject, value, expected }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(_, text) => quoted(printable(text)),
        Value::Bool(_, flag) => flag.to_string(),
        Value::Num(_, number) => match number.to_i128() {
            Some(integer) => integer.to_string(),
            None => format!("{:?}", number.to_f64().unwrap_or(f64::NAN)),
        },
        Value::Array(_, items) => {
            format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", "))
        }
        _ => "{…}".to_owned(),
    }
}

/// Reads the URLs that `url_file` holds; errors name the file and never its content.
pub(super) fn read_urls(path: &Path) -> Result<BrokerUrls, Error> {
    let failed = |problem: String| Error::Value {
        subject: "broker.url_file".to_owned(),
        value: format!(" = {}", quoted(&masked(path))),
        expected: problem,
    };
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_URL_FILE + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(failed(error.to_string())),
        Ok(bytes) if bytes as u64 > MAX_URL_FILE => Err(failed("longer than 64 KiB".to_owned())),
        Ok(_) => text.parse().map_err(|error: super::url::Error| failed(error.to_string())),
    }
}

/// Refuses URLs that other settings contradict.
pub(super) fn check_urls(broker: &Broker, urls: &BrokerUrls) -> Result<(), Error> {
    let refuse = |subject: &str, value: &str, expected: &str| {
        Err(Error::Value { subject: subject.to_owned(), value: value.to_owned(), expected: expected.to_owned() })
    };
    let url_key = if broker.url_file.is_some() { "broker.url_file" } else { "broker.url" };
    if urls.iter().any(|url| url.transport == Transport::Sentinel) && broker.redis.master_name.is_none() {
        return refuse("broker.redis.master_name", "", "unset: expected the master's name, which sentinel:// needs");
    }
    let unix = |url: &BrokerUrl| matches!(url.address, Address::Unix(_));
    match broker.tls.enabled {
        Some(false) if urls.iter().any(|url| url.tls) => {
            let asks =
                format!("{url_key} asks for TLS, by amqps://, rediss:// or an ssl_ parameter: expected one of both");
            refuse("broker.tls.enabled", " = false", &asks)
        }
        Some(true) if urls.iter().any(unix) => {
            refuse("broker.tls.enabled", " = true", "there is no TLS on redis+socket://: expected a URL with a host")
        }
        _ => Ok(()),
    }
}

/// The keys in which two settings differ.
#[derive(Clone, Debug, PartialEq)]
pub struct ReloadPlan {
    /// What is in force afterwards.
    pub settings: Settings,
    /// Take the new value at once.
    pub live: Vec<&'static str>,
    /// Keep the old value until a restart.
    pub restart: Vec<&'static str>,
}

/// Compares key by key: what a reload changes, and what it cannot.
#[must_use]
pub fn reload(old: &Settings, new: &Settings) -> ReloadPlan {
    let mut plan = ReloadPlan { settings: old.clone(), live: Vec::new(), restart: Vec::new() };
    for key in KEYS.iter().filter(|key| !(key.same)(old, new)) {
        if let Some(adopt) = key.adopt {
            adopt(&mut plan.settings, new);
            plan.live.push(key.name);
        } else {
            plan.restart.push(key.name);
        }
    }
    plan
}
