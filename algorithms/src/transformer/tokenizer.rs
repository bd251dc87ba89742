//! Between text and tokens: plain bytes, or a Hugging Face `tokenizer.json`.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::error::AlgorithmError;

/// Tokens of a byte-level model.
const BYTES: usize = 256;
/// Largest tokenizer.json: the largest published ones have about 35 MB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Turns text into tokens and back.
pub struct TextTokenizer {
    kind: Kind,
}

enum Kind {
    Bytes,
    Json { tokenizer: Box<Tokenizer>, text: String, vocabulary: usize },
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer").field("vocabulary", &self.vocabulary()).finish()
    }
}

impl TextTokenizer {
    /// Every byte of the UTF-8 text is a token.
    pub fn bytes() -> Self {
        Self { kind: Kind::Bytes }
    }

    /// Reads a tokenizer.json.
    pub fn open(path: &Path) -> Result<Self, AlgorithmError> {
        let refuse = |message: String| {
            AlgorithmError::Hyperparameters(format!("tokenizer `{}`: {message}", path.display()))
        };
        let length = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?.len();
        if length > FILE_BYTES_MAX {
            return Err(refuse(format!("has {length} bytes, expected at most {FILE_BYTES_MAX}")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        Self::from_json(&text).map_err(refuse)
    }

    /// The text of a tokenizer.json.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(text)
            .map_err(|error| format!("is not a tokenizer.json: {error}"))?;
        // Both are for batches of short texts: a corpus must be neither cut nor filled up.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        // Ids may have gaps, so the table must reach the largest id, not only hold their number.
        let largest = tokenizer.get_vocab(true).into_values().max();
        let largest = largest.ok_or_else(|| "has an empty vocabulary".to_owned())?;
        let vocabulary = largest as usize + 1;
        let tokenizer = Box::new(tokenizer);
        Ok(Self { kind: Kind::Json { tokenizer, text: text.to_owned(), vocabulary } })
    }

    /// One more than the largest token.
    pub fn vocabulary(&self) -> usize {
        match &self.kind {
            Kind::Bytes => BYTES,
            Kind::Json { vocabulary, .. } => *vocabulary,
        }
    }

    /// The tokenizer.json, unless tokens are bytes.
    pub fn json(&self) -> Option<&str> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::Json { text, .. } => Some(text),
        }
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// Says why when the tokenizer cannot express it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Json { tokenizer, .. } => tokenizer
                .encode_fast(text, false)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| format!("the tokenizer refuses the text: {error}")),
        }
    }

    /// Begins to turn tokens into text piece by piece.
    pub(super) fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, bytes: Vec::new(), ids: Vec::new(), shown: 0, context: 0 }
    }
}

/// Text from a stream of tokens. A piece never ends inside a character: what is incomplete waits for
/// the next token, and becomes U+FFFD if there is none.
pub(super) struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// All tokens so far (tokenizer.json only).
    ids: Vec<u32>,
    /// Tokens whose text has been given out.
    shown: usize,
    /// First token decoded again together with new ones, since a token's text may depend on the one
    /// before it (a leading space, for example).
    context: usize,
}

impl TextStream<'_> {
    /// The text that `token` completes; empty while a character is incomplete.
    pub(super) fn push(&mut self, token: u32) -> String {
        match &self.tokenizer.kind {
            // A vocabulary padded beyond 256 has tokens that stand for nothing.
            Kind::Bytes => match u8::try_from(token) {
                Ok(byte) => {
                    self.bytes.push(byte);
                    take_characters(&mut self.bytes)
                }
                Err(_) => String::new(),
            },
            Kind::Json { tokenizer, .. } => {
                self.ids.push(token);
                self.piece(tokenizer, false)
            }
        }
    }

    /// What is left: an incomplete character as U+FFFD.
    pub(super) fn finish(&mut self) -> String {
        match &self.tokenizer.kind {
            Kind::Bytes => String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned(),
            Kind::Json { tokenizer, .. } => self.piece(tokenizer, true),
        }
    }

    fn piece(&mut self, tokenizer: &Tokenizer, last: bool) -> String {
        let decode = |ids: &[u32]| tokenizer.decode(ids, true).unwrap_or_default();
        let before = decode(&self.ids[self.context..self.shown]);
        let now = decode(&self.ids[self.context..]);
        let Some(new) = now.strip_prefix(before.as_str()) else { return String::new() };
        if new.is_empty() || (!last && new.ends_with(char::REPLACEMENT_CHARACTER)) {
            return String::new();
        }
        self.context = self.shown;
        self.shown = self.ids.len();
        new.to_owned()
    }
}

/// Takes every complete character off the front; bytes that can never become one are U+FFFD.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(std::str::from_utf8(&bytes[..valid]).unwrap_or_default());
                match error.error_len() {
                    None => {
                        bytes.drain(..valid);
                        return text;
                    }
                    Some(length) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        bytes.drain(..valid + length);
                    }
                }
            }
        }
    }
}

/// A byte-level BPE as GPT-2's, with every byte and one merge.
#[cfg(test)]
pub(crate) fn byte_level_json() -> String {
    let mut vocabulary = serde_json::Map::new();
    let mut letters: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    for (id, letter) in letters.iter().enumerate() {
        vocabulary.insert(letter.to_string(), id.into());
    }
    vocabulary.insert("he".into(), 256.into());
    serde_json::json!({
        "version": "1.0",
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["h e"]},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(tokenizer: &TextTokenizer, tokens: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream();
        let mut pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token)).collect();
        pieces.push(stream.finish());
        pieces
    }

    #[test]
    fn bytes_wait_for_whole_characters() {
        let tokenizer = TextTokenizer::bytes();
        let tokens = tokenizer.encode("aé€").expect("bytes");
        assert_eq!(tokens.len(), 6);
        assert_eq!(pieces(&tokenizer, &tokens), ["a", "", "é", "", "", "€", ""]);
        // Cut short, then nonsense, then text again; 300 is beyond the bytes.
        assert_eq!(pieces(&tokenizer, &[0xe2, 0x82]), ["", "", "\u{fffd}"]);
        assert_eq!(
            pieces(&tokenizer, &[0xe2, 0x41, 0xff, 300]),
            ["", "\u{fffd}A", "\u{fffd}", "", ""]
        );
    }

    #[test]
    fn a_tokenizer_json_round_trips_and_streams_whole_characters() {
        let tokenizer = TextTokenizer::from_json(&byte_level_json()).expect("valid");
        assert_eq!(tokenizer.vocabulary(), 257);
        let text = "he said: héhe €";
        let tokens = tokenizer.encode(text).expect("encodes");
        assert!(tokens.contains(&256) && tokens.len() < text.len());
        let given = pieces(&tokenizer, &tokens);
        assert_eq!(given.concat(), text);
        assert!(given.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        let cut = pieces(&tokenizer, &tokens[..tokens.len() - 1]);
        assert!(
            cut.last().is_some_and(|last| last.contains(char::REPLACEMENT_CHARACTER)),
            "{cut:?}"
        );
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let error = TextTokenizer::from_json("{}").expect_err("refused");
        assert!(error.contains("not a tokenizer.json"), "{error}");
        let missing =
            TextTokenizer::open(Path::new("/nowhere/tokenizer.json")).expect_err("refused");
        assert!(missing.to_string().contains("/nowhere/tokenizer.json"), "{missing}");
    }
}
