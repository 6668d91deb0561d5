//! Broker URLs: what is printed parses to the same, and neither it nor an error shows a password.

use flower_exporter::settings::url::Transport;
use flower_exporter::settings::{BrokerUrl, BrokerUrls, Secret};
use super::{assert_no_secret, plant};

const MASK: &str = "***";

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(text: &str) {
    let urls: BrokerUrls = match plant(text).parse() {
        Ok(urls) => urls,
        Err(error) => {
            let error: flower_exporter::settings::url::Error = error;
            assert!(!error.to_string().contains(char::is_control), "more than a line: {error}");
            assert_no_secret(&format!("{error} {error:?}"));
            return;
        }
    };
    assert_no_secret(&format!("{urls} {urls:?}"));
    let again: BrokerUrls = urls.to_string().parse().expect("what is printed can be read");
    assert_eq!(again.len(), urls.len());
    for (url, again) in urls.iter().zip(again.iter()) {
        assert_eq!(url.to_string(), format!("{url:?}"));
        assert_eq!(*again, with_password(url, MASK));
        assert_eq!(url.to_string(), with_password(url, "another").to_string(), "it depends on the password");
    }
}

/// The same URL with another password, where it has one. Redis takes a user without one for a password, too.
fn with_password(url: &BrokerUrl, password: &str) -> BrokerUrl {
    let mut url = url.clone();
    match (&mut url.username, &mut url.password) {
        (_, Some(known)) => *known = Secret::from(password.to_owned()),
        (Some(user), None) if url.transport != Transport::Amqp => password.clone_into(user),
        _ => {}
    }
    url
}
