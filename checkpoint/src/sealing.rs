//! How an object is encrypted: AES-256-GCM over segments, any of which can be read alone.
//!
//! The construction is that of Tink's streaming AEAD, AES256-GCM-HKDF (Google Tink, "Streaming AEAD",
//! developers.google.com/tink; analysed by Hoang and Shen, "Security of Streaming Encryption in
//! Google's Tink Library", CCS 2020), which is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, "Online
//! Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015) under a key of its
//! own for every object:
//!
//! ```text
//! object   = header ‖ segment 0 ‖ segment 1 ‖ … ‖ segment n
//! header   = magic (8) ‖ key id (8) ‖ salt (32) ‖ nonce prefix (7) ‖ 0
//! key      = HKDF-SHA256(ikm = the store's key, salt = salt, info = "cohort object 1\0" ‖ object's name)
//! segment  = AES-256-GCM(key, nonce, 64 KiB of plaintext; less in the last only) ‖ tag (16)
//! nonce    = nonce prefix (7) ‖ number of the segment (4, big-endian) ‖ 1 if it is the last, else 0
//! key id   = the first 8 bytes of HKDF-SHA256(ikm = the store's key, salt = "", info = "cohort key id")
//! ```
//!
//! Salt and prefix are random at every write, so no key meets a nonce twice, however often an object
//! is written. A segment that is moved, swapped, repeated or cut off, or that belongs to an object of
//! another name, does not open. Unlike Tink's, all segments are of one size and the header comes
//! before the first: then a byte's place follows from its number by one division.
//! An object's size tells its plaintext's; names and sizes are not hidden.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};

/// Plaintext of every segment but the last. Who reads a few bytes reads a segment; its tag is 0.02 %.
pub(crate) const SEGMENT_BYTES: usize = 64 << 10;
/// A segment with its tag.
pub(crate) const SEALED_SEGMENT_BYTES: usize = SEGMENT_BYTES + MAX_TAG_LEN;
/// Bytes before the first segment.
pub(crate) const HEADER_BYTES: usize = 56;
/// What every encrypted object begins with. No safetensors file does (as the length of its header this
/// is 10^17 bytes), no zstd frame, no JSON.
pub(crate) const MAGIC: [u8; 8] = *b"COHORT\xe5\x01";
/// Bytes of the store's key.
pub(crate) const KEY_BYTES: usize = 32;

/// Whether a file begins like an encrypted object.
pub fn is_encrypted(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

const SALT: std::ops::Range<usize> = 16..48;
const PREFIX: std::ops::Range<usize> = 48..55;

/// Tells keys apart; says nothing about the key.
pub(crate) type KeyId = [u8; 8];

/// Why an object does not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SealError {
    #[error("it is not encrypted, and the store is")]
    Plain,
    #[error("it is encrypted under key `{found}`, the key at hand is `{expected}`")]
    OtherKey { found: String, expected: String },
    #[error("its encrypted bytes are not those that were written")]
    Damaged,
    #[error("it ends before what is wanted of it")]
    Short,
    #[error("it is larger than can be encrypted")]
    TooLarge,
    #[error("the system gives no random bytes")]
    NoRandomness,
    #[error("an encrypted object is not copied to another name")]
    Copied,
}

/// The store's key. Its `Debug` shows the id only.
#[derive(Clone)]
pub(crate) struct MasterKey([u8; KEY_BYTES]);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MasterKey({})", id_text(&self.id()))
    }
}

/// Bytes to derive that are no AEAD key.
struct IdLength;

impl KeyType for IdLength {
    fn len(&self) -> usize {
        size_of::<KeyId>()
    }
}

impl MasterKey {
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    pub fn id(&self) -> KeyId {
        let prk = Salt::new(HKDF_SHA256, &[]).extract(&self.0);
        let mut id = KeyId::default();
        let derived = prk.expand(&[b"cohort key id"], IdLength).and_then(|okm| okm.fill(&mut id));
        derived.expect("eight bytes can be derived");
        id
    }

    /// A header for a new object, and the key that goes with it.
    pub fn seal(&self, name: &str) -> Result<([u8; HEADER_BYTES], ObjectKey), SealError> {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..16].copy_from_slice(&self.id());
        let random = SystemRandom::new();
        random.fill(&mut header[SALT.start..PREFIX.end]).map_err(|_| SealError::NoRandomness)?;
        let key = self.derive(&header, name);
        Ok((header, key))
    }

    /// The key of the object that begins with these bytes.
    pub fn open(&self, header: &[u8], name: &str) -> Result<ObjectKey, SealError> {
        let Some((header, _)) = header.split_first_chunk::<HEADER_BYTES>() else {
            return Err(SealError::Plain);
        };
        if header[..8] != MAGIC {
            return Err(SealError::Plain);
        }
        if header[HEADER_BYTES - 1] != 0 {
            return Err(SealError::Damaged);
        }
        let own = self.id();
        if header[8..16] != own {
            let (found, expected) = (id_text(&header[8..16]), id_text(&own));
            return Err(SealError::OtherKey { found, expected });
        }
        Ok(self.derive(header, name))
    }

    fn derive(&self, header: &[u8; HEADER_BYTES], name: &str) -> ObjectKey {
        let prk = Salt::new(HKDF_SHA256, &header[SALT]).extract(&self.0);
        let info = [b"cohort object 1\0", name.as_bytes()];
        let okm = prk.expand(&info, &AES_256_GCM).expect("one key's bytes can be derived");
        let mut prefix = [0; PREFIX.end - PREFIX.start];
        prefix.copy_from_slice(&header[PREFIX]);
        ObjectKey { key: LessSafeKey::new(UnboundKey::from(okm)), prefix }
    }
}

/// The key of one writing of one object.
#[derive(Debug)]
pub(crate) struct ObjectKey {
    key: LessSafeKey,
    prefix: [u8; PREFIX.end - PREFIX.start],
}

impl ObjectKey {
    fn nonce(&self, segment: u64, is_last: bool) -> Result<Nonce, SealError> {
        let number = u32::try_from(segment).map_err(|_| SealError::TooLarge)?;
        let mut nonce = [0; 12];
        nonce[..7].copy_from_slice(&self.prefix);
        nonce[7..11].copy_from_slice(&number.to_be_bytes());
        nonce[11] = is_last.into();
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Encrypts a segment in place and appends its tag.
    pub fn seal(&self, segment: u64, is_last: bool, data: &mut Vec<u8>) -> Result<(), SealError> {
        debug_assert!(data.len() <= SEGMENT_BYTES && (is_last || data.len() == SEGMENT_BYTES));
        let nonce = self.nonce(segment, is_last)?;
        let sealed = self.key.seal_in_place_append_tag(nonce, Aad::empty(), data);
        sealed.map_err(|_| SealError::TooLarge)
    }

    /// Decrypts a segment in place; returns the plaintext.
    pub fn open<'a>(
        &self,
        segment: u64,
        is_last: bool,
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], SealError> {
        let nonce = self.nonce(segment, is_last)?;
        self.key.open_in_place(nonce, Aad::empty(), data).map_err(|_| SealError::Damaged)
    }
}

/// Segments of an object with so many bytes of plaintext: one at least, which says that it is empty.
pub(crate) fn segments(plain: u64) -> u64 {
    plain.div_ceil(SEGMENT_BYTES as u64).max(1)
}

/// Size of an encrypted object.
#[cfg(test)]
fn sealed_bytes(plain: u64) -> u64 {
    HEADER_BYTES as u64 + plain + segments(plain) * MAX_TAG_LEN as u64
}

/// Size of what an object of this size holds; none if no encrypted object has this size.
pub(crate) fn plain_bytes(sealed: u64) -> Option<u64> {
    let body = sealed.checked_sub(HEADER_BYTES as u64)?;
    let segments = body.div_ceil(SEALED_SEGMENT_BYTES as u64);
    let plain = body.checked_sub(segments.max(1) * MAX_TAG_LEN as u64)?;
    (self::segments(plain) == segments).then_some(plain)
}

/// A key's id for people.
pub(crate) fn id_text(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn master(byte: u8) -> MasterKey {
        MasterKey::new([byte; KEY_BYTES])
    }

    #[test]
    fn sizes_tell_one_another() {
        let segment = SEGMENT_BYTES as u64;
        for plain in [0, 1, 15, 16, segment - 1, segment, segment + 1, 7 * segment, 1 << 40] {
            let sealed = sealed_bytes(plain);
            assert_eq!(plain_bytes(sealed), Some(plain));
        }
        // Of every size at most one plaintext, and of too small ones none.
        assert_eq!((0..72).filter_map(plain_bytes).next(), None);
        let edge = sealed_bytes(segment);
        let around: Vec<_> = (edge - 1..edge + 20).map(plain_bytes).collect();
        assert_eq!(&around[..2], &[Some(segment - 1), Some(segment)]);
        assert!(around[2..18].iter().all(Option::is_none), "{around:?}");
        assert_eq!(around[18], Some(segment + 1));
    }

    #[test]
    fn a_segment_opens_only_where_it_was_sealed() {
        let (header, key) = master(7).seal("jobs/a/model/g1/x").expect("seals");
        let mut sealed = vec![42; SEGMENT_BYTES];
        key.seal(3, false, &mut sealed).expect("seals");
        let open = |key: &MasterKey, name: &str, segment, is_last, sealed: &[u8]| {
            let mut data = sealed.to_vec();
            let key = key.open(&header, name)?;
            key.open(segment, is_last, &mut data).map(|plain| plain.to_vec())
        };
        let name = "jobs/a/model/g1/x";
        assert_eq!(open(&master(7), name, 3, false, &sealed), Ok(vec![42; SEGMENT_BYTES]));
        for (name, segment, is_last) in
            [(name, 2, false), (name, 3, true), ("jobs/a/model/g2/x", 3, false)]
        {
            let found = open(&master(7), name, segment, is_last, &sealed);
            assert_eq!(found, Err(SealError::Damaged), "{name} {segment} {is_last}");
        }
        for at in [0, 100, SEGMENT_BYTES + 15] {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert_eq!(open(&master(7), name, 3, false, &damaged), Err(SealError::Damaged));
        }
        let other = open(&master(8), name, 3, false, &sealed);
        assert!(matches!(other, Err(SealError::OtherKey { .. })), "{other:?}");
        // The same again is another object.
        let (again, _) = master(7).seal(name).expect("seals");
        assert_ne!(header, again);
    }

    #[test]
    fn a_key_is_shown_by_its_id_only() {
        let shown = format!("{:?}", master(0xab));
        assert!(!shown.contains("abab") && !shown.contains("171"), "{shown}");
        assert_eq!(shown.len(), "MasterKey()".len() + 16);
        // Fixed for good: what was encrypted must stay readable.
        assert_eq!(master(0).id(), master(0).id());
        assert_ne!(master(0).id(), master(1).id());
    }
}
