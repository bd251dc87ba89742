//! The pack format: tokens of a text in one file, ready to train on.
//!
//! ```text
//! magic       8 bytes  89 "CHPACK" 0a
//! version     u32      1
//! vocabulary  u32      every token is smaller
//! width       u32      bytes per token: 1, 2 or 4
//! tokenizer   u32      length of tokenizer.json; 0: tokens are bytes
//! tokens      u64      how many
//! digest      32 bytes BLAKE3 of the tokens as they lie in the file
//! seal        32 bytes BLAKE3 of everything before it, then of the tokenizer
//! tokenizer.json, then the tokens
//! ```
//! Numbers are little-endian. The file holds no path, name or time, so that the same texts give the
//! same bytes on any machine. Neither a writer of temporary files (`packer`) nor a data set
//! (`tokens`).

use std::io::{self, Read, Write};

use super::limits::{CHANNEL_BYTES_MAX, TOKENIZER_BYTES_MAX, VOCABULARY_MAX};

/// How every pack begins. The first byte is no text, the last is broken by line-end conversion.
pub(super) const MAGIC: [u8; 8] = *b"\x89CHPACK\n";
const VERSION: u32 = 1;
/// Bytes before the tokenizer.
const HEADER_BYTES: usize = 96;

/// Vocabulary of tokens that are bytes.
pub(super) const BYTE_VOCABULARY: u32 = 256;

/// Bytes per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    One = 1,
    Two = 2,
    Four = 4,
}

impl Width {
    /// The narrowest for a vocabulary.
    pub(super) fn of(vocabulary: u32) -> Self {
        match vocabulary {
            0..=0x100 => Self::One,
            0x101..=0x1_0000 => Self::Two,
            _ => Self::Four,
        }
    }

    /// Number of bytes.
    pub(super) fn bytes(self) -> usize {
        self as usize
    }

    /// Appends a token; it must be smaller than the vocabulary of the width.
    pub(super) fn encode(self, token: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&token.to_le_bytes()[..self.bytes()]);
    }

    /// Tokens of `bytes`, whose length is a multiple of the width.
    pub(super) fn decode(self, bytes: &[u8]) -> impl Iterator<Item = u32> {
        bytes.chunks_exact(self.bytes()).map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        })
    }
}

/// What stands before the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PackHeader {
    pub(super) vocabulary: u32,
    pub(super) width: Width,
    pub(super) tokens: u64,
    pub(super) digest: blake3::Hash,
    /// tokenizer.json; empty: tokens are bytes.
    pub(super) tokenizer: Vec<u8>,
}

impl PackHeader {
    /// Bytes before the tokens, with the tokenizer.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.tokenizer.len());
        out.extend_from_slice(&MAGIC);
        for number in [VERSION, self.vocabulary, self.width as u32, self.tokenizer.len() as u32] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.tokens.to_le_bytes());
        out.extend_from_slice(self.digest.as_bytes());
        let seal = seal(&out, &self.tokenizer);
        out.extend_from_slice(seal.as_bytes());
        out.extend_from_slice(&self.tokenizer);
        out
    }

    /// Reads the header and the tokenizer; the reader then stands at the first token. `Err` holds
    /// what is wrong with the content.
    pub(super) fn read(reader: &mut impl Read) -> io::Result<Result<Self, String>> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        reader.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut header)?;
        let fields = match Fields::parse(&header) {
            Ok(fields) => fields,
            Err(message) => return Ok(Err(message)),
        };
        let mut tokenizer = Vec::new();
        reader.by_ref().take(fields.tokenizer.into()).read_to_end(&mut tokenizer)?;
        Ok(fields.finish(&header, tokenizer))
    }
}

/// The header's numbers, each within its bound.
struct Fields {
    vocabulary: u32,
    width: Width,
    tokenizer: u32,
    tokens: u64,
}

impl Fields {
    fn parse(header: &[u8]) -> Result<Self, String> {
        if !header.starts_with(&MAGIC) {
            return Err("does not begin as a pack: make one with `cluster data pack`".into());
        }
        let cut = || format!("the header ends after {} of {HEADER_BYTES} bytes", header.len());
        let word = |at: usize| -> Result<u32, String> {
            let bytes = header.get(at..at + 4).ok_or_else(cut)?;
            Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| cut())?))
        };
        let version = word(8)?;
        if version != VERSION {
            return Err(format!("pack format {version}, expected {VERSION}: pack the text again"));
        }
        if header.len() < HEADER_BYTES {
            return Err(cut());
        }
        let (vocabulary, tokenizer) = (word(12)?, word(20)?);
        if !(1..=VOCABULARY_MAX).contains(&vocabulary) {
            return Err(format!("vocabulary {vocabulary}, expected 1 to {VOCABULARY_MAX}"));
        }
        let width = Width::of(vocabulary);
        if word(16)? != width as u32 {
            return Err(format!(
                "{} bytes per token, expected {} for a vocabulary of {vocabulary}",
                word(16)?,
                width.bytes()
            ));
        }
        if u64::from(tokenizer) > TOKENIZER_BYTES_MAX {
            return Err(format!(
                "a tokenizer of {tokenizer} bytes, expected at most {TOKENIZER_BYTES_MAX}"
            ));
        }
        let tokens = u64::from(word(24)?) | u64::from(word(28)?) << 32;
        match tokens.checked_mul(width as u64) {
            Some(1..=CHANNEL_BYTES_MAX) => Ok(Self { vocabulary, width, tokenizer, tokens }),
            _ => Err(format!(
                "{tokens} tokens of {} bytes, expected 1 to {CHANNEL_BYTES_MAX} bytes of them",
                width.bytes()
            )),
        }
    }

    fn finish(self, header: &[u8], tokenizer: Vec<u8>) -> Result<PackHeader, String> {
        let (sealed, found) = header.split_at(HEADER_BYTES - 32);
        if found != seal(sealed, &tokenizer).as_bytes() {
            return Err(
                "the header is damaged: its checksum does not fit; pack the text again".into()
            );
        }
        let digest: [u8; 32] =
            sealed[32..].try_into().map_err(|_| "the header is cut off".to_owned())?;
        let Self { vocabulary, width, tokens, .. } = self;
        Ok(PackHeader { vocabulary, width, tokens, digest: digest.into(), tokenizer })
    }
}

fn seal(header: &[u8], tokenizer: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(header).update(tokenizer).finalize()
}

/// Writes tokens, and knows their number, digest and distribution at the end.
pub(super) struct TokenWriter<W> {
    out: W,
    width: Width,
    hasher: blake3::Hasher,
    counts: Vec<u64>,
    buffer: Vec<u8>,
}

impl<W: Write> TokenWriter<W> {
    /// Writes tokens of a vocabulary.
    pub(super) fn new(out: W, vocabulary: u32) -> Self {
        Self {
            out,
            width: Width::of(vocabulary),
            hasher: blake3::Hasher::new(),
            counts: vec![0; vocabulary as usize],
            buffer: Vec::new(),
        }
    }

    /// Appends tokens; one outside the vocabulary is an error.
    pub(super) fn write(&mut self, tokens: impl IntoIterator<Item = u32>) -> io::Result<()> {
        self.buffer.clear();
        for token in tokens {
            let count = self.counts.get_mut(token as usize).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("token {token} out of range"))
            })?;
            *count += 1;
            self.width.encode(token, &mut self.buffer);
        }
        self.hasher.update(&self.buffer);
        self.out.write_all(&self.buffer)
    }

    /// Bytes written.
    pub(super) fn bytes(&self) -> u64 {
        self.hasher.count()
    }

    /// The output, the number of tokens, their digest and the entropy of their distribution in
    /// nats: what a model that knows nothing but frequencies pays per token.
    pub(super) fn finish(self) -> (W, u64, blake3::Hash, f64) {
        let tokens: u64 = self.counts.iter().sum();
        let entropy = self.counts.iter().filter(|c| **c > 0).map(|&count| {
            let share = count as f64 / tokens as f64;
            -share * share.ln()
        });
        (self.out, tokens, self.hasher.finalize(), entropy.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_reads_back_for_every_width() {
        for (vocabulary, width) in [(256, Width::One), (257, Width::Two), (70_000, Width::Four)] {
            let header = PackHeader {
                vocabulary,
                width,
                tokens: 3,
                digest: blake3::hash(b"tokens"),
                tokenizer: vec![b'x'; vocabulary as usize % 7],
            };
            let bytes = header.encode();
            let read = PackHeader::read(&mut bytes.as_slice()).expect("readable");
            assert_eq!(read.as_ref(), Ok(&header));
            // Every flipped byte is noticed, wherever it is.
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                let read = PackHeader::read(&mut damaged.as_slice()).expect("readable");
                assert!(read.is_err(), "byte {at} was flipped unnoticed");
            }
            for length in 0..bytes.len() {
                let read = PackHeader::read(&mut &bytes[..length]).expect("readable");
                assert!(read.is_err(), "{length} of {} bytes were accepted", bytes.len());
            }
        }
    }

    #[test]
    fn entropy_is_that_of_the_distribution() {
        let mut writer = TokenWriter::new(Vec::new(), 256);
        writer.write([1, 2, 1, 3]).expect("in memory");
        let (bytes, tokens, digest, entropy) = writer.finish();
        assert_eq!((bytes.as_slice(), tokens), ([1, 2, 1, 3].as_slice(), 4));
        assert_eq!(digest, blake3::hash(&[1, 2, 1, 3]));
        assert!((entropy - 1.5 * 2f64.ln()).abs() < 1e-12, "{entropy}");
        assert!(TokenWriter::new(Vec::new(), 2).write([2]).is_err());
    }
}
