//! Makes a pack of text files: the same bytes from the same texts on any machine, and never half a
//! file under the final name.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tokenizers::Tokenizer;

use super::limits::{
    CHANNEL_BYTES_MAX, TEXT_FILE_BYTES_MAX, TEXT_PIECE_BYTES, TOKENIZER_BYTES_MAX, VOCABULARY_MAX,
};
use super::pack::{BYTE_VOCABULARY, PackHeader, TokenWriter, Width};
use super::source::Source;
use super::text::{self, SEPARATOR};
use crate::error::DataError;

/// Tokens that end a text in common tokenizers; the first that one knows stands between files.
const END_TOKENS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"];

/// What [`pack`] does.
pub struct PackOptions<'a> {
    /// Files and folders, in this order; folders are walked in order of names.
    pub inputs: Vec<PathBuf>,
    /// The pack; replaced when it exists.
    pub output: PathBuf,
    /// A `tokenizer.json`; absent: tokens are the bytes of the text.
    pub tokenizer: Option<PathBuf>,
    /// Extensions (without the dot) of the files taken from folders; empty: all.
    pub extensions: Vec<String>,
    /// Told bytes done and bytes in all, after every file.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// What a pack holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PackReport {
    /// Files taken.
    pub files: u64,
    /// Files left out because they are empty or not UTF-8.
    pub skipped: u64,
    /// Bytes of text in the files taken.
    pub bytes: u64,
    /// Tokens, with the separators between files.
    pub tokens: u64,
    /// BLAKE3 of the tokens, hex: the digest of the data set.
    pub digest: String,
    /// Every token is smaller.
    pub vocabulary: u32,
    /// Entropy of the distribution of single tokens, in nats per token: a model that predicts
    /// better has learnt more than frequencies.
    pub unigram_entropy: f64,
}

/// How text becomes tokens.
enum Encoder {
    Bytes,
    Tokenizer { tokenizer: Box<Tokenizer>, json: Vec<u8>, separator: Option<u32> },
}

/// Packs text files into one file of tokens (the format: `data/pack.rs`). With bytes, a 0 byte
/// stands between files; with a tokenizer, its end-of-text token, if it has one.
///
/// The output is written under a temporary name beside it, synced and renamed.
///
/// # Errors
/// Names the path and what is wrong with it; nothing is left behind then.
pub fn pack(options: PackOptions<'_>) -> Result<PackReport, DataError> {
    let PackOptions { inputs, output, tokenizer, extensions, progress } = options;
    let encoder = Encoder::open(tokenizer.as_deref())?;
    let mut files = text::gather(None, &inputs, &extensions)?;
    files.retain(|path| !is_same(path, &output));
    let total = files.iter().map(|p| std::fs::metadata(p).map_or(0, |m| m.len())).sum();

    let target = Source::plain(&output);
    let partial = Partial::create(&output).map_err(|e| target.unwritable(&e))?;
    let vocabulary = encoder.vocabulary();
    let mut header = PackHeader {
        vocabulary,
        width: Width::of(vocabulary),
        tokens: 0,
        digest: blake3::hash(b""),
        tokenizer: encoder.json().to_vec(),
    };
    let mut out = BufWriter::with_capacity(1 << 20, &partial.file);
    // The header's length is known, its content only at the end.
    out.write_all(&header.encode()).map_err(|e| target.unwritable(&e))?;
    let mut writer = TokenWriter::new(out, vocabulary);

    let (mut taken, mut skipped, mut bytes, mut done) = (0, 0, 0, 0);
    for path in &files {
        let source = Source::plain(path);
        done += std::fs::metadata(path).map_or(0, |m| m.len());
        match text::read(&source, TEXT_FILE_BYTES_MAX)? {
            None => skipped += 1,
            Some(text) => {
                let separator = (taken > 0).then(|| encoder.separator()).flatten();
                writer.write(separator).map_err(|e| target.unwritable(&e))?;
                for piece in pieces(&text) {
                    let tokens = encoder.encode(piece).map_err(|m| source.malformed(m))?;
                    writer.write(tokens).map_err(|e| target.unwritable(&e))?;
                }
                (taken, bytes) = (taken + 1, bytes + text.len() as u64);
            }
        }
        if writer.bytes() > CHANNEL_BYTES_MAX {
            return Err(target.malformed(format!(
                "would hold more than {CHANNEL_BYTES_MAX} bytes of tokens, the most that a rank \
                 holds in memory"
            )));
        }
        progress(done, total);
    }
    let (out, tokens, digest, unigram_entropy) = writer.finish();
    if tokens == 0 {
        let shown: Vec<String> = inputs.iter().map(|p| format!("`{}`", p.display())).collect();
        return Err(DataError::Mismatch(format!(
            "no text in {} ({skipped} files are empty or not UTF-8; extensions: {})",
            shown.join(", "),
            if extensions.is_empty() { "all".to_owned() } else { extensions.join(", ") }
        )));
    }
    (header.tokens, header.digest) = (tokens, digest);
    let finish = |mut out: BufWriter<&File>| -> io::Result<()> {
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&header.encode())?;
        out.flush()
    };
    finish(out).and_then(|()| partial.commit(&output)).map_err(|e| target.unwritable(&e))?;
    let digest = digest.to_hex().to_string();
    Ok(PackReport { files: taken, skipped, bytes, tokens, digest, vocabulary, unigram_entropy })
}

impl Encoder {
    fn open(path: Option<&Path>) -> Result<Self, DataError> {
        let Some(path) = path else { return Ok(Self::Bytes) };
        let source = Source::plain(path);
        let json = source.read_as_is(TOKENIZER_BYTES_MAX)?;
        let mut tokenizer = Tokenizer::from_bytes(&json)
            .map_err(|e| source.malformed(format!("not a tokenizer.json: {e}")))?;
        // Both are for batches of short texts: a corpus must be neither cut nor filled up.
        tokenizer.with_truncation(None).map_err(|e| source.malformed(e.to_string()))?;
        tokenizer.with_padding(None);
        let separator = END_TOKENS.iter().find_map(|token| tokenizer.token_to_id(token));
        let encoder = Self::Tokenizer { tokenizer: Box::new(tokenizer), json, separator };
        if !(1..=VOCABULARY_MAX).contains(&encoder.vocabulary()) {
            return Err(source.malformed(format!("a vocabulary beyond {VOCABULARY_MAX}")));
        }
        Ok(encoder)
    }

    /// One more than the largest token; ids may have gaps, so that it can exceed their number.
    fn vocabulary(&self) -> u32 {
        match self {
            Self::Bytes => BYTE_VOCABULARY,
            Self::Tokenizer { tokenizer, .. } => {
                tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1))
            }
        }
    }

    fn json(&self) -> &[u8] {
        match self {
            Self::Bytes => &[],
            Self::Tokenizer { json, .. } => json,
        }
    }

    fn separator(&self) -> Option<u32> {
        match self {
            Self::Bytes => Some(SEPARATOR.into()),
            Self::Tokenizer { separator, .. } => *separator,
        }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Tokenizer { tokenizer, .. } => tokenizer
                .encode_fast(text, false)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|e| format!("the tokenizer failed: {e}")),
        }
    }
}

/// Cuts a text after line ends into pieces of about [`TEXT_PIECE_BYTES`], so that a tokenizer's
/// memory is bounded. The cuts depend on the text alone; a line longer than a piece stays whole.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let from = TEXT_PIECE_BYTES.min(rest.len());
        // A newline is one byte, so cutting after it keeps both sides UTF-8.
        let end = rest.as_bytes()[from..].iter().position(|b| *b == b'\n');
        let (piece, next) = rest.split_at(end.map_or(rest.len(), |at| from + at + 1));
        rest = next;
        Some(piece)
    })
}

/// Whether both paths name the same existing file.
fn is_same(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// A file under a temporary name, removed unless it is committed.
struct Partial {
    file: File,
    path: PathBuf,
    is_committed: std::cell::Cell<bool>,
}

impl Partial {
    /// The name is hidden, so that no walk takes it, and this process's own.
    fn create(output: &Path) -> io::Result<Self> {
        let name = output.file_name().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "expected the name of a file")
        })?;
        let folder = output.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let path = folder.join(name);
        Ok(Self { file: File::create(&path)?, path, is_committed: false.into() })
    }

    fn commit(&self, output: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, output)?;
        self.is_committed.set(true);
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_committed.get() {
            // The name is this process's own: what is left of it would only be replaced.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::open_tokens;
    use crate::dataset::Dataset;

    fn run(
        inputs: &[&Path],
        output: &Path,
        tokenizer: Option<&Path>,
    ) -> Result<PackReport, String> {
        let mut last = (0, 0);
        let report = pack(PackOptions {
            inputs: inputs.iter().map(|p| p.to_path_buf()).collect(),
            output: output.to_owned(),
            tokenizer: tokenizer.map(Path::to_owned),
            extensions: vec!["rs".into()],
            progress: &mut |done, total| last = (done, total),
        });
        assert!(report.is_err() || last.0 == last.1, "progress ended at {last:?}");
        report.map_err(|e| e.to_string())
    }

    fn sources(folder: &Path) {
        std::fs::create_dir_all(folder.join("b")).expect("creates");
        for (name, text) in [
            ("a.rs", b"fn a() {}\n".as_slice()),
            ("b/c.rs", "// ü\n".as_bytes()),
            ("b/latin.rs", &[0xe4, 0xf6]),
            ("b/empty.rs", b""),
            ("notes.md", b"no"),
        ] {
            std::fs::write(folder.join(name), text).expect("writes");
        }
    }

    #[test]
    fn the_same_texts_give_the_same_bytes_anywhere() {
        let (one, two) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let mut packs = Vec::new();
        for folder in [one.path(), two.path()] {
            sources(&folder.join("src"));
            let output = folder.join("out/text.pack");
            let report = run(&[&folder.join("src")], &output, None).expect("packs");
            assert_eq!((report.files, report.skipped, report.bytes, report.tokens), (2, 2, 16, 17));
            let again = run(&[&folder.join("src")], &output, None).expect("replaces");
            assert_eq!(report, again);
            packs.push((std::fs::read(&output).expect("reads"), report.digest));
            let left = std::fs::read_dir(folder.join("out")).expect("lists").count();
            assert_eq!(left, 1, "temporary files were left");
        }
        assert_eq!(packs[0], packs[1]);
        let expected = blake3::hash("fn a() {}\n\0// ü\n".as_bytes()).to_hex().to_string();
        assert_eq!(packs[0].1, expected);
        // The folder of texts opened directly is the same data set.
        let direct = open_tokens("train", &one.path().join("src/b/c.rs"), 2, 256).expect("opens");
        assert_eq!(direct.digest(), blake3::hash("// ü\n".as_bytes()).to_hex().as_str());
    }

    #[test]
    fn nothing_is_left_of_a_pack_that_fails() {
        let folder = tempfile::tempdir().expect("a folder");
        let output = folder.path().join("out/text.pack");
        let missing = folder.path().join("missing");
        let error = run(&[&missing], &output, None).expect_err("missing");
        assert!(error.contains("missing` ") || error.contains("missing`: "), "{error}");
        std::fs::write(folder.path().join("a.md"), "x").expect("writes");
        let error = run(&[folder.path()], &output, None).expect_err("no text");
        assert!(error.contains("no text in") && error.contains("extensions: rs"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path().join("out")).expect("lists").count(), 0);
        let error = run(&[folder.path()], Path::new("/"), None).expect_err("a folder");
        assert!(error.contains("the name of a file"), "{error}");
    }

    #[test]
    fn a_tokenizer_is_embedded_and_separates_files() {
        let folder = tempfile::tempdir().expect("a folder");
        sources(&folder.path().join("src"));
        let json = folder.path().join("tokenizer.json");
        std::fs::write(&json, WORDS).expect("writes");
        let output = folder.path().join("text.pack");
        let report = run(&[&folder.path().join("src")], &output, Some(&json)).expect("packs");
        // fn a()…: two words are known; then the end token (id 300, so two bytes each); then `//`.
        assert_eq!((report.tokens, report.vocabulary), (6, 301));
        let set = open_tokens("train", &output, 5, 301).expect("opens");
        assert_eq!(set.tokenizer(), Some(WORDS.as_bytes()));
        assert_eq!(set.tokens(), 6);
        let error = open_tokens("train", &output, 5, 300).expect_err("too small").to_string();
        assert!(error.contains("vocabulary of 301") && error.contains("300"), "{error}");
        std::fs::write(&json, "{}").expect("writes");
        let error = run(&[folder.path()], &output, Some(&json)).expect_err("no tokenizer");
        assert!(error.contains("not a tokenizer.json"), "{error}");
    }

    #[test]
    fn pieces_are_cut_after_lines_and_lose_nothing() {
        let line = "ü".repeat(300_000) + "\n";
        let text = line.repeat(4) + "end";
        let cut: Vec<&str> = pieces(&text).collect();
        assert_eq!(cut.concat(), text);
        assert_eq!(cut.len(), 3);
        assert!(cut[..2].iter().all(|piece| piece.ends_with('\n')));
    }

    /// Words apart by spaces, unknown ones as one token, an end token beyond a gap.
    const WORDS: &str = r#"{
      "version": "1.0", "truncation": null, "padding": null,
      "added_tokens": [{"id": 300, "content": "</s>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}],
      "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
      "post_processor": null, "decoder": null,
      "model": {"type": "WordLevel", "vocab": {"fn": 0, "a()": 1, "?": 2, "</s>": 300},
        "unk_token": "?"}
    }"#;
}
