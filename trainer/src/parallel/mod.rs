//! How the work of a step is divided over ranks: one parallelism, one file.

mod data;

pub use data::Lanes;
