//! The format of the file: its keys, and what they set.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use super::{Identity, Users, WebConfig, WebConfigError};
use crate::config::printable_path;
use crate::tls::{PemFile, ServerOptions, server_config};

/// Maximum size of a file in bytes.
const MAX_SIZE: u64 = 1 << 20;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Yaml {
    tls_server_config: Option<TlsServerConfig>,
    /// The bcrypt hash of each user's password.
    basic_auth_users: Option<HashMap<String, String>>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TlsServerConfig {
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    client_auth_type: Option<String>,
    client_ca_file: Option<PathBuf>,
    min_version: Option<String>,
    max_version: Option<String>,
}

/// A web configuration file, parsed.
pub(super) struct WebConfigFile {
    path: PathBuf,
    yaml: Result<Yaml, String>,
    /// Differs if the content of this file, or of one that it names, differs.
    pub(super) hash: u64,
}

impl WebConfigFile {
    /// Reads the file, and those that it names. Blocks.
    pub(super) fn read(path: &Path) -> Self {
        let mut hasher = Xxh3::new();
        let text = read(path);
        hash(&mut hasher, &text);
        let yaml = text.map_err(|error| error.to_string()).and_then(|text| parse(&text));
        let tls = yaml.as_ref().ok().and_then(|yaml| yaml.tls_server_config.as_ref());
        let named = tls.iter().flat_map(|tls| [&tls.cert_file, &tls.key_file, &tls.client_ca_file]);
        named.flatten().for_each(|file| hash(&mut hasher, &read(&resolve(path, file))));
        Self { path: path.to_owned(), yaml, hash: hasher.digest() }
    }

    /// What the file sets. Blocks.
    ///
    /// # Errors
    /// Returns an error if the file, or one that it names, cannot be read or is invalid.
    pub(super) fn load(self) -> Result<WebConfig, WebConfigError> {
        let loaded = self.yaml.and_then(|yaml| yaml.load(&self.path));
        let path = Some(self.path.clone());
        loaded
            .map(|web_config| WebConfig { path, hash: self.hash, ..web_config })
            .map_err(|reason| WebConfigError { path: printable_path(&self.path), reason })
    }
}

impl Yaml {
    fn load(self, path: &Path) -> Result<WebConfig, String> {
        let tls = self.tls_server_config.map(|tls| tls.load(path)).transpose()?;
        let (tls, identity) = tls.unzip();
        let users = self.basic_auth_users.filter(|users| !users.is_empty()).map(Users::new).transpose()?;
        Ok(WebConfig { tls, users, identity, ..WebConfig::default() })
    }
}

impl TlsServerConfig {
    fn load(self, path: &Path) -> Result<(std::sync::Arc<rustls::ServerConfig>, Identity), String> {
        let pem_file = |setting, file: Option<PathBuf>| {
            file.map(|file| {
                let path = resolve(path, &file);
                PemFile { setting, display: printable_path(&path), path }
            })
        };
        let required = |key: &str| format!("tls_server_config.{key} is not set: expected the path of a PEM file");
        let cert_file = pem_file("tls_server_config.cert_file", self.cert_file).ok_or_else(|| required("cert_file"))?;
        let key_file = pem_file("tls_server_config.key_file", self.key_file).ok_or_else(|| required("key_file"))?;
        let client_ca_file = pem_file("tls_server_config.client_ca_file", self.client_ca_file);
        let requires_client_certificate =
            requires_client_certificate(self.client_auth_type.as_deref(), client_ca_file.is_some())?;
        let options = ServerOptions {
            cert_file: &cert_file,
            key_file: &key_file,
            client_ca_file: client_ca_file.as_ref().filter(|_| requires_client_certificate),
            versions: &versions(self.min_version.as_deref(), self.max_version.as_deref())?,
        };
        let config = server_config(&options).map_err(|error| error.to_string())?;
        let identity = Identity { cert_file: cert_file.path, key_file: key_file.path, requires_client_certificate };
        Ok((config, identity))
    }
}

fn requires_client_certificate(auth_type: Option<&str>, has_ca: bool) -> Result<bool, String> {
    match (auth_type.unwrap_or_default(), has_ca) {
        ("" | "NoClientCert", false) => Ok(false),
        ("RequireAndVerifyClientCert", true) => Ok(true),
        ("" | "NoClientCert", true) => Err("tls_server_config.client_ca_file requires client_auth_type: \
                                            RequireAndVerifyClientCert"
            .to_owned()),
        ("RequireAndVerifyClientCert", false) => {
            Err("tls_server_config.client_auth_type: RequireAndVerifyClientCert requires client_ca_file".to_owned())
        }
        _ => Err("tls_server_config.client_auth_type: expected NoClientCert or RequireAndVerifyClientCert".to_owned()),
    }
}

/// The versions from `min` (TLS 1.2) to `max` (TLS 1.3).
fn versions(min: Option<&str>, max: Option<&str>) -> Result<Vec<&'static SupportedProtocolVersion>, String> {
    let is_13 = |key: &str, version: Option<&str>, default| match version {
        None => Ok(default),
        Some("TLS12") => Ok(false),
        Some("TLS13") => Ok(true),
        Some(_) => Err(format!("tls_server_config.{key}: expected TLS12 or TLS13")),
    };
    match (is_13("min_version", min, false)?, is_13("max_version", max, true)?) {
        (false, true) => Ok(vec![&TLS12, &TLS13]),
        (false, false) => Ok(vec![&TLS12]),
        (true, true) => Ok(vec![&TLS13]),
        (true, false) => Err("tls_server_config.min_version is above max_version".to_owned()),
    }
}

/// Parses the file. The error is one line without values, because they may be password hashes.
fn parse(text: &[u8]) -> Result<Yaml, String> {
    let text = std::str::from_utf8(text).map_err(|_| "not UTF-8".to_owned())?;
    let parsed = serde_saphyr::from_str::<Option<Yaml>>(text);
    parsed.map(Option::unwrap_or_default).map_err(|error| {
        let message = error.without_snippet().to_string();
        let pieces = message.split('"').enumerate().map(|(index, piece)| if index % 2 == 0 { piece } else { "***" });
        pieces.collect::<Vec<_>>().join("\"").lines().collect::<Vec<_>>().join(" ")
    })
}

/// Relative paths begin at the directory of the web configuration file.
fn resolve(web_config: &Path, file: &Path) -> PathBuf {
    web_config.parent().unwrap_or(Path::new("")).join(file)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_SIZE {
        return Err(io::Error::other(format!("larger than {} MiB", MAX_SIZE >> 20)));
    }
    Ok(content)
}

fn hash(hasher: &mut Xxh3, content: &io::Result<Vec<u8>>) {
    match content {
        Ok(content) => {
            hasher.update(&(content.len() as u64).to_le_bytes());
            hasher.update(content);
        }
        Err(error) => hasher.update(error.to_string().as_bytes()),
    }
}
