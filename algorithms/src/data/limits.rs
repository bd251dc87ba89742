//! Bounds on what is read. A header, an archive or a folder may claim anything; these are the sizes
//! beyond which it is refused instead of believed.

/// Most bytes of decoded pixels or tokens in one channel. Every rank holds its data in memory, so a
/// larger set would take the host down before it trained.
pub(super) const CHANNEL_BYTES_MAX: u64 = 4 << 30;

/// Most values in one image (1024 × 1365 in colour): a larger one is a picture that nobody scaled,
/// and one activation of a network on it would not fit.
pub(super) const IMAGE_VALUES_MAX: usize = 4 << 20;

/// Longest side of an image file before it is scaled; larger than any camera's.
pub(super) const PICTURE_SIDE_MAX: u32 = 16_384;

/// Most bytes the decoder of one image file may allocate: 8-bit RGBA of 8192 × 8192.
pub(super) const PICTURE_ALLOCATION_MAX: u64 = 256 << 20;

/// Largest image file.
pub(super) const PICTURE_FILE_BYTES_MAX: u64 = 64 << 20;

/// Longest line of a CSV file: the most values of an image at 16 characters each.
pub(super) const LINE_BYTES_MAX: usize = IMAGE_VALUES_MAX * 16;

/// Most bytes of CSV text in one file, decompressed: four characters per byte of the channel.
pub(super) const TABLE_BYTES_MAX: u64 = 4 * CHANNEL_BYTES_MAX;

/// Most classes. Far more than any labelled set; a CSV whose first column is not a label hits it
/// early instead of building a layer as wide as the file is long.
pub(super) const LABELS_MAX: usize = 1 << 16;

/// Longest label in bytes.
pub(super) const LABEL_BYTES_MAX: usize = 256;

/// Most files taken from a folder; a walk that finds more was pointed at the wrong one.
pub(super) const FILES_MAX: usize = 4_000_000;

/// Deepest folder that is walked, which also ends a walk through mounts that contain themselves.
pub(super) const FOLDER_DEPTH_MAX: usize = 64;

/// Largest text file that is packed: it is tokenised in memory.
pub(super) const TEXT_FILE_BYTES_MAX: u64 = 1 << 30;

/// Text given to a tokenizer at once; see `packer`.
pub(super) const TEXT_PIECE_BYTES: usize = 1 << 20;

/// Largest tokenizer.json; those of large models have about 20 MiB.
pub(super) const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Largest vocabulary; the largest published ones have about 2^18 entries.
pub(super) const VOCABULARY_MAX: u32 = 1 << 22;

/// Largest of the small documents: a list of crates, a recipe, a Cargo.lock.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 8 << 20;

// Samples are numbered in u32, and an image has at least one byte.
const _: () = assert!(CHANNEL_BYTES_MAX <= u32::MAX as u64 + 1);
// An image that is allowed fits into a line and into a channel.
const _: () = assert!(LINE_BYTES_MAX as u64 <= CHANNEL_BYTES_MAX);
