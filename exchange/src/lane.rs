//! Lanes keep test traffic apart from the real one, from the registration of a user to the last notification.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Whose traffic a row, a message or a request belongs to: `live`, or `test-<colour>-<revision>.<run>`.
///
/// Fixed when a user registers, and inherited by everything that the user causes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
#[serde(try_from = "String", into = "String")]
#[sqlx(transparent)]
pub struct Lane(String);

impl Lane {
    /// The lane of real users.
    pub fn live() -> Self {
        Self("live".to_owned())
    }

    /// Whether real users are in this lane.
    pub fn is_live(&self) -> bool {
        self.0 == "live"
    }

    /// The lane as it is stored and sent.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `live` or `test`: the lane as a metric label, of which there may not be many.
    pub fn kind(&self) -> &'static str {
        if self.is_live() { "live" } else { "test" }
    }
}

/// What is wrong with the text of a lane.
#[derive(Debug, thiserror::Error)]
#[error("a lane is `live` or `test-<colour>-<revision>.<run>` in lower-case letters, digits and hyphens")]
pub struct InvalidLane;

impl FromStr for Lane {
    type Err = InvalidLane;

    fn from_str(text: &str) -> Result<Self, InvalidLane> {
        if text == "live" {
            return Ok(Self::live());
        }
        let rest = text.strip_prefix("test-").ok_or(InvalidLane)?;
        let (stack, run) = rest.split_once('.').ok_or(InvalidLane)?;
        let (colour, revision) = stack.split_once('-').ok_or(InvalidLane)?;
        let word = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        };
        let valid = text.len() <= 100 && word(colour) && word(revision) && word(run);
        valid.then(|| Self(text.to_owned())).ok_or(InvalidLane)
    }
}

impl TryFrom<String> for Lane {
    type Error = InvalidLane;

    fn try_from(text: String) -> Result<Self, InvalidLane> {
        text.parse()
    }
}

impl From<Lane> for String {
    fn from(lane: Lane) -> Self {
        lane.0
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_lanes_are_read() {
        for good in ["live", "test-blue-abc.1", "test-green-0f3a.run-7"] {
            assert_eq!(good.parse::<Lane>().unwrap().as_str(), good);
        }
        let long = format!("test-blue-abc.{}", "x".repeat(100));
        for bad in [
            "",
            "Live",
            "test",
            "test-blue",
            "test-blue-abc",
            "test--abc.1",
            "test-blue-abc.",
            "test-b-a.ä",
            &long,
        ] {
            assert!(bad.parse::<Lane>().is_err(), "{bad} was read");
        }
    }
}
