//! How the work of a step is divided over ranks: one parallelism, one file.

mod buckets;
mod data;

pub use buckets::Buckets;
pub use data::Lanes;
