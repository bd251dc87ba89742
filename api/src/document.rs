//! Reads a TOML file into a typed struct, and says what is wrong in one clear message.
//!
//! Every struct it reads refuses unknown keys; the message then names the nearest valid key.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// No configuration or job file is larger; a larger one is some other file by mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A file that could not be read as the document it should be.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The file itself cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too large to be a document.
    #[error("`{}` has more than {FILE_BYTES_MAX} bytes: is it the right file?", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// The text is not the document: syntax, an unknown key, or a value of the wrong type.
    #[error("`{origin}`: {message}")]
    Invalid {
        /// The file, or where the text came from.
        origin: String,
        /// What was found and what was expected.
        message: String,
    },
}

/// Reads `path` as text, bounded.
pub fn read_text(path: &Path) -> Result<String, DocumentError> {
    let unreadable = |source| DocumentError::Unreadable { path: path.to_owned(), source };
    // What is read is bounded, not what the file says of itself: a device says nothing.
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(DocumentError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// Parses TOML text; `origin` names it in errors.
pub fn parse<T: DeserializeOwned>(text: &str, origin: &str) -> Result<T, DocumentError> {
    toml::from_str(text).map_err(|error| invalid(&error, text, origin))
}

/// Parses an already-read TOML table; `origin` names it in errors.
pub fn from_table<T: DeserializeOwned>(
    table: toml::Table,
    origin: &str,
) -> Result<T, DocumentError> {
    table.try_into().map_err(|error| invalid(&error, "", origin))
}

fn invalid(error: &toml::de::Error, text: &str, origin: &str) -> DocumentError {
    let origin = match error.span() {
        Some(span) if !text.is_empty() => {
            let before = &text.as_bytes()[..span.start.min(text.len())];
            let line = 1 + before.iter().filter(|b| **b == b'\n').count();
            format!("{origin}` line `{line}")
        }
        _ => origin.to_owned(),
    };
    DocumentError::Invalid { origin, message: for_people(error.message()) }
}

/// serde's message without the names of Rust's types.
fn for_people(message: &str) -> String {
    let message = with_suggestion(message);
    match message.strip_suffix("a nonzero u32") {
        Some(found) => format!("{found}a whole number of at least 1"),
        None => message,
    }
}

/// Turns serde's "unknown field `x`, expected one of `a`, `b`" into "unknown key `x`; did you mean
/// `a`? valid keys: …". Other messages pass unchanged.
pub fn with_suggestion(message: &str) -> String {
    let message = message.trim();
    let is_variant = message.starts_with("unknown variant");
    if !is_variant && !message.starts_with("unknown field") {
        return message.to_owned();
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(found) = quoted.next() else { return message.to_owned() };
    let valid: Vec<&str> = quoted.collect();
    let kind = if is_variant { "value" } else { "key" };
    unknown(kind, found, &valid)
}

/// "unknown `kind` `found`; did you mean `x`? valid …": shared by every place where a name that a
/// person typed is looked up in a list.
pub fn unknown(kind: &str, found: &str, valid: &[&str]) -> String {
    let hint = nearest(found, valid).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
    if valid.is_empty() {
        return format!("unknown {kind} `{found}`: none is valid here");
    }
    format!("unknown {kind} `{found}`{hint} (valid: {})", valid.join(", "))
}

/// The valid name nearest to what was typed, when one is near enough to be meant.
pub fn nearest<'a>(found: &str, valid: &[&'a str]) -> Option<&'a str> {
    let near = |name: &&str| edit_distance(found, name);
    let best = valid.iter().copied().min_by_key(near)?;
    let allowed = (found.chars().count().max(best.chars().count()) / 2).max(1);
    (near(&best) <= allowed).then_some(best)
}

/// Levenshtein's distance, two rows at a time.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut current = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let substitute = previous[j] + usize::from(x != *y);
            current.push(substitute.min(previous[j + 1] + 1).min(current[j] + 1));
        }
        previous = current;
    }
    previous[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[expect(dead_code, reason = "only parsed")]
        lanes: u32,
        #[serde(default)]
        #[expect(dead_code, reason = "only parsed")]
        microbatch: u32,
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_key() {
        let error = parse::<Sample>("lanes = 8\nmicrobach = 2\n", "job.toml").expect_err("unknown");
        let text = error.to_string();
        assert!(text.contains("line `2`"), "{text}");
        assert!(text.contains("unknown key `microbach`; did you mean `microbatch`?"), "{text}");
    }

    #[test]
    fn a_number_that_must_not_be_zero_is_said_so_without_a_type_of_rust() {
        #[derive(Debug, serde::Deserialize)]
        struct Positive {
            #[expect(dead_code, reason = "only parsed")]
            keep: std::num::NonZeroU32,
        }
        let error = parse::<Positive>("keep = 0\n", "job.toml").expect_err("zero").to_string();
        assert!(error.ends_with("`0`, expected a whole number of at least 1"), "{error}");
    }

    #[test]
    fn a_far_name_gets_no_suggestion() {
        assert_eq!(nearest("zzzzzz", &["lanes", "seed"]), None);
        assert_eq!(nearest("sed", &["lanes", "seed"]), Some("seed"));
    }
}
