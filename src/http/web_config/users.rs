//! Passwords of basic authentication. One is checked at a time, because bcrypt is slow on purpose.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use base64_turbo::STANDARD;
use bcrypt::HashParts;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use ring::hmac;
use ring::rand::SystemRandom;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::config::printable;

/// The highest cost of a hash. A check then takes several seconds.
const MAX_COST: u32 = 16;
/// The number of verified passwords that are remembered.
const MAX_VERIFIED: usize = 64;

/// Whether a request may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Access {
    Granted,
    Denied,
    /// Another password is being checked.
    Busy,
}

/// The users and the bcrypt hashes of their passwords.
pub(in crate::http) struct Users {
    hashes: HashMap<String, String>,
    /// The hash with the highest cost. It is checked for names that do not exist, so that they take as long.
    slowest: String,
    key: hmac::Key,
    /// Keyed hashes of the names and passwords that were verified.
    verified: Mutex<HashSet<Vec<u8>>>,
    checks: Arc<Semaphore>,
}

impl fmt::Debug for Users {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Users").field("count", &self.hashes.len()).finish_non_exhaustive()
    }
}

impl Users {
    /// # Errors
    /// Returns an error if a hash is invalid or too slow to check, or if the system has no random numbers.
    pub(super) fn new(hashes: HashMap<String, String>) -> Result<Self, String> {
        let mut slowest = (0, "");
        for (name, hash) in &hashes {
            let cost =
                cost(name, hash).map_err(|problem| format!("basic_auth_users.{:?} {problem}", printable(name)))?;
            slowest = slowest.max((cost, hash));
        }
        let slowest = slowest.1.to_owned();
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .map_err(|_| "the system has no random numbers".to_owned())?;
        let checks = Arc::new(Semaphore::new(1));
        Ok(Self { hashes, slowest, key, verified: Mutex::default(), checks })
    }

    /// Checks the `Authorization` header. A password that was not verified before is checked on another thread.
    pub(in crate::http) async fn check(&self, headers: &HeaderMap) -> Access {
        let Some((name, password)) = credentials(headers) else { return Access::Denied };
        let tag = self.tag(&name, &password);
        if self.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&tag) {
            return Access::Granted;
        }
        let Ok(permit) = Arc::clone(&self.checks).try_acquire_owned() else { return Access::Busy };
        let hash = self.hashes.get(&name);
        let (is_known, hash) = (hash.is_some(), hash.unwrap_or(&self.slowest).clone());
        let checked = spawn_blocking(move || {
            let _permit = permit;
            bcrypt::verify(password, &hash).is_ok_and(|is_correct| is_correct)
        });
        if !(checked.await.unwrap_or(false) && is_known) {
            return Access::Denied;
        }
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= MAX_VERIFIED {
            verified.clear();
        }
        verified.insert(tag);
        Access::Granted
    }

    fn tag(&self, name: &str, password: &[u8]) -> Vec<u8> {
        // A name contains no colon.
        let credentials = [name.as_bytes(), b":", password].concat();
        hmac::sign(&self.key, &credentials).as_ref().to_vec()
    }
}

/// The cost of a user's hash.
fn cost(name: &str, hash: &str) -> Result<u32, String> {
    if name.contains(':') {
        return Err("has a colon in its name, which basic authentication does not allow".to_owned());
    }
    match hash.parse::<HashParts>().map(|parts| parts.get_cost()) {
        Ok(cost) if cost <= MAX_COST => Ok(cost),
        Ok(_) => Err(format!("is a bcrypt hash of a cost above {MAX_COST}: a check would take too long")),
        Err(_) => Err("is no bcrypt hash: expected one from `htpasswd -nBC 10 NAME`".to_owned()),
    }
}

/// The name and the password of a request.
fn credentials(headers: &HeaderMap) -> Option<(String, Vec<u8>)> {
    let (scheme, encoded) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let decoded = STANDARD.decode(encoded.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let name = String::from_utf8(decoded[..colon].to_vec()).ok()?;
    Some((name, decoded[colon + 1..].to_vec()))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn users(hashes: &[(&str, String)]) -> Result<Users, String> {
        Users::new(hashes.iter().map(|(name, hash)| ((*name).to_owned(), hash.clone())).collect())
    }

    fn headers(credentials: &str) -> HeaderMap {
        let value = format!("Basic {}", STANDARD.encode(credentials));
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(&value).unwrap())])
    }

    #[tokio::test]
    async fn passwords_are_checked_one_at_a_time_and_remembered() {
        let hash = |password: &str| bcrypt::hash_with_salt(password, 8, [7; 16]).unwrap().to_string();
        let users = Arc::new(users(&[("alice", hash("a:b")), ("bob", hash(""))]).unwrap());
        let check = |credentials: &str| {
            let (users, headers) = (Arc::clone(&users), headers(credentials));
            async move { users.check(&headers).await }
        };
        for wrong in ["alice:a", "alice:", "carol:a:b", "alice", "bob:x"] {
            assert_eq!(check(wrong).await, Access::Denied, "{wrong}");
        }
        assert_eq!(users.check(&HeaderMap::new()).await, Access::Denied);
        assert_eq!(tokio::join!(check("alice:a:b"), check("bob:")), (Access::Granted, Access::Busy));
        assert_eq!(tokio::join!(check("alice:wrong"), check("alice:a:b")), (Access::Denied, Access::Granted));
        assert_eq!(check("bob:").await, Access::Granted);
    }

    #[test]
    fn invalid_hashes_are_refused_without_showing_them() {
        let slow = bcrypt::hash_with_salt("x", 4, [7; 16]).unwrap().to_string().replace("$04$", "$17$");
        for (name, hash, reason) in [
            ("alice", "hunter2".to_owned(), "is no bcrypt hash"),
            ("alice", slow.clone(), "a cost above 16"),
            ("a:b", slow.replace("$17$", "$10$"), "a colon in its name"),
        ] {
            let error = users(&[(name, hash.clone())]).unwrap_err();
            assert!(error.contains(reason) && !error.contains(&hash), "{error}");
        }
    }
}
