//! Derives the options of TLS from the URL's `ssl_*` parameters and from `broker.tls`. The URL takes precedence.

use std::path::PathBuf;

use crate::config::broker_url::CertReqs;
use crate::config::{BrokerTlsConfig, BrokerUrl, printable_path};
use crate::tls::{PemFile, TlsOptions};

pub(super) fn tls_options(url: &BrokerUrl, config: &BrokerTlsConfig) -> TlsOptions {
    let ssl = &url.ssl;
    TlsOptions {
        ca_file: match (&ssl.ca_path, &ssl.ca_data) {
            (None, None) => pem_file("ssl_ca_certs", ssl.ca_certs.as_ref())
                .or_else(|| pem_file("broker.tls.ca_file", config.ca_file.as_ref())),
            _ => pem_file("ssl_ca_certs", ssl.ca_certs.as_ref()),
        },
        ca_path: pem_file("ssl_ca_path", ssl.ca_path.as_ref()),
        ca_data: ssl.ca_data.clone(),
        cert_file: pem_file("ssl_certfile", ssl.certfile.as_ref())
            .or_else(|| pem_file("broker.tls.cert_file", config.cert_file.as_ref())),
        key_file: pem_file("ssl_keyfile", ssl.keyfile.as_ref())
            .or_else(|| pem_file("broker.tls.key_file", config.key_file.as_ref())),
        check_hostname: ssl.check_hostname.unwrap_or(config.check_hostname),
        verify: ssl.cert_reqs.map_or(!config.insecure_skip_verify, |cert_reqs| cert_reqs != CertReqs::None),
    }
}

fn pem_file(setting: &'static str, path: Option<&PathBuf>) -> Option<PemFile> {
    path.map(|path| PemFile { setting, display: printable_path(path), path: path.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str, config: &BrokerTlsConfig) -> TlsOptions {
        tls_options(&url.parse().unwrap(), config)
    }

    #[test]
    fn url_parameters_override_settings() {
        let config = BrokerTlsConfig {
            ca_file: Some("/setting".into()),
            cert_file: Some("/setting".into()),
            check_hostname: false,
            insecure_skip_verify: true,
            ..BrokerTlsConfig::default()
        };
        let setting = |file: Option<PemFile>| file.map(|file| (file.setting, file.display));

        let from_settings = options("rediss://h", &config);
        assert!(!from_settings.check_hostname && !from_settings.verify);
        assert_eq!(setting(from_settings.ca_file), Some(("broker.tls.ca_file", "/setting".to_owned())));
        assert_eq!(setting(from_settings.key_file), None);

        let query = "ssl_ca_certs=/url&ssl_keyfile=/url&ssl_check_hostname=true&ssl_cert_reqs=optional";
        let from_url = options(&format!("rediss://h?{query}"), &config);
        assert!(from_url.check_hostname && from_url.verify);
        assert_eq!(setting(from_url.ca_file), Some(("ssl_ca_certs", "/url".to_owned())));
        assert_eq!(setting(from_url.cert_file), Some(("broker.tls.cert_file", "/setting".to_owned())));
        assert_eq!(setting(from_url.key_file), Some(("ssl_keyfile", "/url".to_owned())));
    }

    #[test]
    fn a_url_in_place_of_a_path_is_masked() {
        let config = BrokerTlsConfig { ca_file: Some("redis://:hunter2@h".into()), ..BrokerTlsConfig::default() };
        assert_eq!(options("rediss://h", &config).ca_file.unwrap().display, "***");
    }
}
