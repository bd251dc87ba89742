//! The tensor operations that the models are made of, each with its gradient.
//!
//! On the processor each is one pass over slices with a hand-written gradient, registered with
//! burn's autodiff; on any other device the same function is composed of burn's operations. Both
//! forms are tested against each other. Rules that keep results independent of the cluster: no
//! global state, sums in a fixed order, no result that depends on the number of threads.

mod attention;
mod convolution;
mod cross_entropy;
mod dropout;
mod embedding;
mod fused;
mod group_norm;
mod layer_norm;
mod linear;
mod vector;

#[cfg(test)]
mod tests;

pub(crate) use attention::causal_attention;
pub(crate) use convolution::{Convolution, PixelLayout, convolution};
pub(crate) use cross_entropy::cross_entropy;
pub(crate) use dropout::dropout;
pub(crate) use embedding::embedding;
pub(crate) use group_norm::{GroupNorm, group_norm};
pub(crate) use layer_norm::layer_norm;
pub(crate) use linear::{Activation, linear};
pub(crate) use vector::{add_scaled, dot, softmax_in_place, vectorized};
