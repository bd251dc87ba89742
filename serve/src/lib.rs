//! Hosts trained models: loads one, batches requests, answers over HTTP.
//!
//! It trains nothing and knows nothing of jobs; an endpoint of the cluster is this server started
//! by a worker.

#![forbid(unsafe_code)]

mod body;
mod compute;
mod connection;
mod error;
mod metrics;
mod model;
mod queue;
mod replica;
mod request;
mod server;

pub use error::ServeError;
pub use model::{LoadedModel, load_folder, load_from_store};
pub use replica::run_replica;
pub use request::{parse_request, request_json};
pub use server::{Server, ServerOptions};
