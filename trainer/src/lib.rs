//! One rank of a job: the step loop, its parallelism, optimisers, data order and checkpoints.
//!
//! It decides nothing about placement or generations; it does what its assignment says and reports.
//! The numeric promise of the project lives here: the final weights depend on the job, not on the
//! number of ranks or on how often they died.

#![forbid(unsafe_code)]

mod agreement;
mod channels;
mod checkpoints;
mod data_plane;
mod device;
mod divergence;
mod engine;
mod error;
mod held;
mod member;
mod newcomers;
mod norm;
mod optimizer;
mod order;
mod parallel;
mod parameters;
mod place;
mod rank;
mod recovery;
mod samples;
mod schedule;
mod self_test;
mod slowest;
mod state;
mod train;

pub use data_plane::{DataPlaneError, tcp_options};
pub use device::{fingerprint, open as open_device};
pub use error::TrainError;
pub use held::last_step;
pub use rank::run_rank;
pub use self_test::run_self_test;
pub use train::End;
