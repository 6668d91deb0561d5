//! Log lines that would otherwise repeat: each text is said at most once a minute, with how often it was kept back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(60);
/// Texts remembered; past it all are forgotten, rather than that memory grows.
const MAX_TEXTS: usize = 64;

/// What has been said lately.
#[derive(Debug, Default)]
pub struct Quiet {
    said: HashMap<String, (Instant, u64)>,
}

impl Quiet {
    /// Whether to say it now; if so, how often it was kept back since the last time.
    pub fn speak(&mut self, text: &str) -> Option<u64> {
        if let Some((at, kept)) = self.said.get_mut(text) {
            if at.elapsed() < PAUSE {
                *kept += 1;
                return None;
            }
            *at = Instant::now();
            return Some(std::mem::take(kept));
        }
        if self.said.len() >= MAX_TEXTS {
            self.said.clear();
        }
        self.said.insert(text.to_owned(), (Instant::now(), 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_said_once_and_others_beside_it() {
        let mut quiet = Quiet::default();
        assert_eq!(["a", "a", "b", "a"].map(|text| quiet.speak(text)), [Some(0), None, Some(0), None]);
        for number in 0..1000 {
            quiet.speak(&number.to_string());
        }
        assert!(quiet.said.len() <= MAX_TEXTS);
    }
}
