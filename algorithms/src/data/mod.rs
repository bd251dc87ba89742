//! Reads what jobs train on: images and tokens, from files that may be anything.
//!
//! Nothing here knows of ranks, lanes or epochs. Invariants: every decoded size is bounded before
//! it is allocated, and a digest depends on contents and their order only, never on file names,
//! compression or the machine.

mod augment;
mod crates;
#[cfg(test)]
mod examples;
mod geometry;
mod idx;
mod images;
mod labels;
mod limits;
mod pack;
mod packer;
mod pictures;
mod pixels;
mod recipe;
mod source;
mod table;
mod text;
mod tokens;

pub use augment::AugmentOptions;
pub use crates::{crate_sources, read_crate_names};
pub use geometry::ImageGeometry;
pub use images::{IMAGE_CONTENT_TYPES, ImageDataset, open_images};
pub use packer::{PackOptions, PackReport, pack};
pub use recipe::ensure_recipe;
pub use tokens::{TokenDataset, open_tokens};
