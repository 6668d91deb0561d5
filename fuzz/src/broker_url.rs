//! Broker URLs: a printed URL parses to the same value, and neither it nor an error contains a password.

use super::{assert_no_secret, plant};
use flower_exporter::config::broker_url::Transport;
use flower_exporter::config::{BrokerUrl, BrokerUrls, Secret};

const MASK: &str = "***";

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(text: &str) {
    let urls: BrokerUrls = match plant(text).parse() {
        Ok(urls) => urls,
        Err(error) => {
            let error: flower_exporter::config::broker_url::UrlError = error;
            assert!(!error.to_string().contains(char::is_control), "error has more than one line: {error}");
            assert_no_secret(&format!("{error} {error:?}"));
            return;
        }
    };
    assert_no_secret(&format!("{urls} {urls:?}"));
    let reparsed: BrokerUrls = urls.to_string().parse().expect("a printed URL parses");
    assert_eq!(reparsed.len(), urls.len());
    for (url, reparsed) in urls.iter().zip(reparsed.iter()) {
        assert_eq!(url.to_string(), format!("{url:?}"));
        assert_eq!(*reparsed, with_password(url, MASK));
        assert_eq!(url.to_string(), with_password(url, "other").to_string(), "the printed URL depends on the password");
    }
}

/// Replaces the password of a URL, if it has one. For Redis, a username without a password is the password. Parameters
/// without effect are not printed.
fn with_password(url: &BrokerUrl, password: &str) -> BrokerUrl {
    let mut url = url.clone();
    url.parameters_without_effect.clear();
    match (&mut url.username, &mut url.password) {
        (_, Some(known)) => *known = Secret::from(password.to_owned()),
        (Some(user), None) if url.transport != Transport::Amqp => password.clone_into(user),
        _ => {}
    }
    url
}
