//! A sequence of tokens cut into windows: what language models train on.
//!
//! Window `i` holds the tokens `i·L ..= i·L + L`: L inputs, and the L tokens that follow each of
//! them. So no token is a target twice, and a last piece shorter than a window is left out.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::limits::{CHANNEL_BYTES_MAX, VOCABULARY_MAX};
use super::pack::{BYTE_VOCABULARY, MAGIC, PackHeader, Width};
use super::source::Source;
use super::text::{self, SEPARATOR};
use crate::block::{BlockInput, StepKey, Targets};
use crate::dataset::{Dataset, Microbatch};
use crate::error::DataError;

/// Windows over a sequence of tokens held in memory. Cloning and splitting share the tokens.
#[derive(Clone, Debug)]
pub struct TokenDataset {
    sequence: Arc<Sequence>,
    sequence_length: usize,
    /// The first window of this part, and how many it has.
    first: u64,
    count: u64,
}

#[derive(Debug)]
struct Sequence {
    bytes: Vec<u8>,
    width: Width,
    vocabulary: u32,
    tokenizer: Vec<u8>,
    digest: String,
}

/// Opens a channel of text: a pack (`cluster data pack`), a text file, or a folder of text files
/// (walked in order of names, one 0 byte between files); the latter two as bytes.
///
/// `sequence_length` is in tokens; `vocabulary` is that of the model, at least that of the data.
///
/// # Errors
/// Names the file and what is wrong with it: damaged, too large, too short for one window, or with
/// a larger vocabulary than the model's.
pub fn open_tokens(
    channel: &str,
    path: &Path,
    sequence_length: usize,
    vocabulary: usize,
) -> Result<TokenDataset, DataError> {
    let source = Source::channel(channel, path);
    let sequence = if source.is_folder()? { read_folder(&source)? } else { read_file(&source)? };
    if sequence.vocabulary as usize > vocabulary {
        return Err(source.malformed(format!(
            "has a vocabulary of {}, but the model's is {vocabulary}: they must be equal, or the \
             model's larger",
            sequence.vocabulary
        )));
    }
    if sequence_length == 0 {
        return Err(DataError::Mismatch("the sequence length is 0, expected at least 1".into()));
    }
    let tokens = sequence.len();
    let count = tokens.saturating_sub(1) / sequence_length as u64;
    if count == 0 {
        return Err(source.malformed(format!(
            "has {tokens} tokens, expected at least {} for one window of sequence length \
             {sequence_length} and its last target",
            sequence_length as u64 + 1
        )));
    }
    Ok(TokenDataset { sequence: Arc::new(sequence), sequence_length, first: 0, count })
}

impl Sequence {
    fn of_bytes(bytes: Vec<u8>) -> Self {
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let (vocabulary, width) = (BYTE_VOCABULARY, Width::One);
        Self { bytes, width, vocabulary, tokenizer: Vec::new(), digest }
    }

    fn len(&self) -> u64 {
        (self.bytes.len() / self.width.bytes()) as u64
    }
}

fn read_file(source: &Source<'_>) -> Result<Sequence, DataError> {
    let file = File::open(source.path).map_err(|e| source.unreadable(e))?;
    let mut begin = Vec::new();
    (&file).take(MAGIC.len() as u64).read_to_end(&mut begin).map_err(|e| source.unreadable(e))?;
    if begin == MAGIC {
        return read_pack(source);
    }
    let text = source.read_as_is(CHANNEL_BYTES_MAX)?;
    if std::str::from_utf8(&text).is_err() {
        return Err(source.malformed("is neither a pack (`cluster data pack`) nor UTF-8 text"));
    }
    Ok(Sequence::of_bytes(text))
}

fn read_pack(source: &Source<'_>) -> Result<Sequence, DataError> {
    let file = File::open(source.path).map_err(|e| source.unreadable(e))?;
    let mut reader = BufReader::new(file);
    let header = PackHeader::read(&mut reader).map_err(|e| source.unreadable(e))?;
    let PackHeader { vocabulary, width, tokens, digest, tokenizer } =
        header.map_err(|m| source.malformed(m))?;
    // Bounded by the header's check; the vector grows with what is really there.
    let expected = tokens * width.bytes() as u64;
    let mut bytes = Vec::new();
    reader.take(expected + 1).read_to_end(&mut bytes).map_err(|e| source.unreadable(e))?;
    if bytes.len() as u64 != expected {
        let found = if bytes.len() as u64 > expected { "more" } else { "fewer" };
        return Err(source.malformed(format!(
            "holds {found} than the {expected} bytes of tokens that its header promises: is the \
             copy complete?"
        )));
    }
    if blake3::hash(&bytes) != digest {
        return Err(source.malformed(
            "the tokens are damaged: their checksum does not fit; copy or pack them again",
        ));
    }
    if let Some(token) = width.decode(&bytes).find(|token| *token >= vocabulary) {
        return Err(
            source.malformed(format!("token {token} is outside the vocabulary of {vocabulary}"))
        );
    }
    let digest = digest.to_hex().to_string();
    Ok(Sequence { bytes, width, vocabulary, tokenizer, digest })
}

fn read_folder(source: &Source<'_>) -> Result<Sequence, DataError> {
    let files = text::gather(source.channel, &[source.path.to_owned()], &[])?;
    let (mut bytes, mut skipped) = (Vec::new(), 0);
    for path in &files {
        let room = CHANNEL_BYTES_MAX.saturating_sub(bytes.len() as u64 + 1);
        match text::read(&source.at(path), room)? {
            None => skipped += 1,
            Some(text) => {
                if !bytes.is_empty() {
                    bytes.push(SEPARATOR);
                }
                bytes.extend_from_slice(text.as_bytes());
            }
        }
    }
    if bytes.is_empty() {
        return Err(source.malformed(format!(
            "holds no text: {skipped} of {} files are empty or not UTF-8",
            files.len()
        )));
    }
    if skipped > 0 {
        tracing::warn!(path = %source.path.display(), skipped, "files that are empty or not UTF-8");
    }
    Ok(Sequence::of_bytes(bytes))
}

impl TokenDataset {
    /// Vocabulary of the data: every token is smaller.
    pub fn vocabulary(&self) -> usize {
        self.sequence.vocabulary as usize
    }

    /// The `tokenizer.json` the tokens were made with; none when they are bytes.
    pub fn tokenizer(&self) -> Option<&[u8]> {
        Some(self.sequence.tokenizer.as_slice()).filter(|json| !json.is_empty())
    }

    /// Tokens in the whole sequence, before any split.
    pub fn tokens(&self) -> u64 {
        self.sequence.len()
    }

    /// Sets the last `fraction` of the windows aside for validation. No second part when either
    /// would be empty. Both keep the digest of the whole.
    pub fn split(self, fraction: f32) -> (Self, Option<Self>) {
        let share = f64::from(fraction.clamp(0.0, 1.0)) * self.count as f64;
        let held_out = share.round() as u64;
        if held_out == 0 || held_out >= self.count {
            return (self, None);
        }
        let count = self.count - held_out;
        let validation = Self { first: self.first + count, count: held_out, ..self.clone() };
        (Self { count, ..self }, Some(validation))
    }
}

impl Dataset for TokenDataset {
    fn len(&self) -> u64 {
        self.count
    }

    fn microbatch(
        &self,
        indices: &[u64],
        _augment: Option<StepKey>,
        device: &Device,
    ) -> Result<Microbatch, DataError> {
        let (length, width) = (self.sequence_length, self.sequence.width);
        let size = indices.len() * length;
        let (mut inputs, mut targets) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for &index in indices {
            if index >= self.count {
                let count = self.count;
                return Err(DataError::Mismatch(format!(
                    "sample {index} of a set of {count} samples"
                )));
            }
            let from = (self.first + index) as usize * length * width.bytes();
            let window = &self.sequence.bytes[from..from + (length + 1) * width.bytes()];
            let (head, tail) = (&window[..length * width.bytes()], &window[width.bytes()..]);
            inputs.extend(width.decode(head).map(|token| token as i32));
            targets.extend(width.decode(tail).map(|token| token as i32));
        }
        let inputs = TensorData::new(inputs, [indices.len(), length]);
        let targets = TensorData::new(targets, [size]);
        Ok(Microbatch {
            input: BlockInput::Tokens(Tensor::<2, Int>::from_data(inputs, device)),
            targets: Targets::Classes(Tensor::<1, Int>::from_data(targets, device)),
            samples: indices.len() as u64,
            tokens: size as u64,
        })
    }

    fn digest(&self) -> &str {
        &self.sequence.digest
    }
}

// Tokens reach the device as i32.
const _: () = assert!(VOCABULARY_MAX <= i32::MAX as u32);

#[cfg(test)]
mod tests {
    use super::super::pack::TokenWriter;
    use super::*;

    fn write_pack(path: &Path, vocabulary: u32, tokens: &[u32]) {
        let mut writer = TokenWriter::new(Vec::new(), vocabulary);
        writer.write(tokens.iter().copied()).expect("in memory");
        let (bytes, tokens, digest, _) = writer.finish();
        let width = Width::of(vocabulary);
        let header = PackHeader { vocabulary, width, tokens, digest, tokenizer: Vec::new() };
        std::fs::write(path, [header.encode(), bytes].concat()).expect("writes");
    }

    fn windows(set: &TokenDataset, indices: &[u64]) -> (Vec<i64>, Vec<i64>) {
        let batch = set.microbatch(indices, None, &Device::flex()).expect("in range");
        assert_eq!(batch.tokens, (indices.len() * set.sequence_length) as u64);
        let BlockInput::Tokens(input) = batch.input else { panic!("text is tokens") };
        assert_eq!(input.dims(), [indices.len(), set.sequence_length]);
        let Targets::Classes(targets) = batch.targets;
        (input.into_data().iter().collect(), targets.into_data().iter().collect())
    }

    #[test]
    fn windows_do_not_overlap_in_targets_for_any_width() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.pack");
        for (vocabulary, base) in [(256, 200), (60_000, 50_000), (1 << 20, 1 << 19)] {
            let tokens: Vec<u32> = (0..8).map(|i| base + i).collect();
            write_pack(&path, vocabulary, &tokens);
            let set = open_tokens("train", &path, 3, 1 << 20).expect("opens");
            // Seven targets: two windows, one token is left out.
            assert_eq!((set.len(), set.tokens(), set.vocabulary()), (2, 8, vocabulary as usize));
            let at = |offsets: [i64; 6]| offsets.map(|o| i64::from(base) + o).to_vec();
            let expected = (at([3, 4, 5, 0, 1, 2]), at([4, 5, 6, 1, 2, 3]));
            assert_eq!(windows(&set, &[1, 0]), expected);
            assert!(set.microbatch(&[2], None, &Device::flex()).is_err());
        }
    }

    #[test]
    fn a_split_takes_the_last_windows() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "0123456789").expect("writes");
        let set = open_tokens("train", &path, 1, 256).expect("opens");
        let (train, validation) = set.clone().split(0.33);
        let validation = validation.expect("three windows");
        assert_eq!((train.len(), validation.len()), (6, 3));
        assert_eq!(windows(&validation, &[0]).0, [i64::from(b'6')]);
        assert!(train.microbatch(&[6], None, &Device::flex()).is_err());
        assert!(set.clone().split(0.01).1.is_none() && set.split(1.0).1.is_none());
    }

    #[test]
    fn folders_of_text_are_bytes_with_separators() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("b.txt"), "yz").expect("writes");
        std::fs::write(folder.path().join("a.txt"), "x").expect("writes");
        std::fs::write(folder.path().join("c.bin"), [0xff, 0xfe]).expect("writes");
        let set = open_tokens("train", folder.path(), 3, 256).expect("opens");
        assert_eq!(windows(&set, &[0]), (vec![120, 0, 121], vec![0, 121, 122]));
        assert_eq!(
            (set.digest(), set.tokenizer()),
            (blake3::hash(b"x\0yz").to_hex().as_str(), None)
        );
    }

    #[test]
    fn damaged_packs_and_unfit_data_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.pack");
        let error = |sequence_length, vocabulary| {
            let opened = open_tokens("train", &path, sequence_length, vocabulary);
            opened.expect_err("unfit").to_string()
        };
        write_pack(&path, 300, &[1, 2, 3, 4]);
        let whole = std::fs::read(&path).expect("reads");
        assert!(error(4, 300).contains("has 4 tokens, expected at least 5"), "{}", error(4, 300));
        assert!(error(2, 299).contains("vocabulary of 300, but the model's is 299"));
        assert!(error(0, 300).contains("sequence length is 0"));
        for (content, message) in [
            (whole[..whole.len() - 1].to_vec(), "fewer than the 8 bytes"),
            ([whole.as_slice(), &[0]].concat(), "more than the 8 bytes"),
            ([&whole[..whole.len() - 1], &[1]].concat(), "tokens are damaged"),
            (whole[..50].to_vec(), "the header ends after 50 of 96 bytes"),
            (vec![0xff; 10], "neither a pack (`cluster data pack`) nor UTF-8"),
            (Vec::new(), "has 0 tokens"),
        ] {
            std::fs::write(&path, content).expect("writes");
            assert!(error(2, 300).contains(message), "found `{}`, not `{message}`", error(2, 300));
        }
        // A header that was sealed over a token outside the vocabulary.
        let tokens = [299u16, 300].map(u16::to_le_bytes).concat();
        let (width, digest) = (Width::Two, blake3::hash(&tokens));
        let header =
            PackHeader { vocabulary: 300, width, tokens: 2, digest, tokenizer: Vec::new() };
        std::fs::write(&path, [header.encode(), tokens].concat()).expect("writes");
        assert!(error(1, 300).contains("token 300 is outside"), "{}", error(1, 300));
    }
}
