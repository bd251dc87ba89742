//! Durations and byte sizes as people write them in configuration files: `"30s"`, `"10m"`, `"64MiB"`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A value with a unit that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not a {what}: expected a number and a unit, such as {example}")]
pub struct UnitError {
    found: String,
    what: &'static str,
    example: &'static str,
}

/// A span of time, written `"250ms"`, `"30s"`, `"10m"`, `"2h"` or `"1d"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// A span of milliseconds.
    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }
}

const SPAN_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim()))
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        split_unit(text)
            .and_then(|(n, unit)| {
                let (_, scale) = SPAN_UNITS.iter().find(|(name, _)| *name == unit)?;
                Some(Self::millis(n.checked_mul(*scale)?))
            })
            .ok_or_else(|| UnitError {
                found: text.to_owned(),
                what: "duration",
                example: "\"250ms\", \"30s\", \"10m\" or \"2h\"",
            })
    }
}

impl TryFrom<String> for Span {
    type Error = UnitError;
    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis() as u64;
        let (unit, scale) = SPAN_UNITS
            .iter()
            .rev()
            .find(|(_, scale)| millis.is_multiple_of(*scale) && millis >= *scale)
            .unwrap_or(&SPAN_UNITS[1]);
        write!(f, "{}{unit}", millis / scale)
    }
}

/// A number of bytes, written `"512"`, `"64KiB"`, `"8MiB"`, `"2GiB"` or with decimal `KB`, `MB`, `GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

const SIZE_UNITS: [(&str, u64); 8] = [
    ("", 1),
    ("B", 1),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        split_unit(text)
            .and_then(|(n, unit)| {
                let (_, scale) = SIZE_UNITS.iter().find(|(name, _)| *name == unit)?;
                Some(Self(n.checked_mul(*scale)?))
            })
            .ok_or_else(|| UnitError {
                found: text.to_owned(),
                what: "size",
                example: "\"64KiB\", \"8MiB\" or \"2GiB\"",
            })
    }
}

impl TryFrom<String> for ByteSize {
    type Error = UnitError;
    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, scale) in SIZE_UNITS[5..].iter().rev() {
            if self.0 >= *scale && self.0.is_multiple_of(*scale) {
                return write!(f, "{}{unit}", self.0 / scale);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back() {
        for text in ["250ms", "30s", "10m", "2h", "1d", "90s"] {
            assert_eq!(text.parse::<Span>().map(|s| s.to_string()).as_deref(), Ok(text));
        }
        for text in ["512B", "64KiB", "8MiB", "2GiB"] {
            assert_eq!(text.parse::<ByteSize>().map(|s| s.to_string()).as_deref(), Ok(text));
        }
        for bad in ["", "s", "-1s", "10 parsecs", "99999999999999999999s"] {
            assert!(bad.parse::<Span>().is_err(), "{bad:?} was accepted");
        }
    }
}
