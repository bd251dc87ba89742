//! How the connections of a group are made, beside who its ranks are.

use std::sync::Arc;

use crate::selection::Selection;
use crate::tls::TlsMaterial;

/// Most streams to one peer.
pub(crate) const STREAMS_MAX: usize = api::data_plane::STREAMS_MAX as usize;

/// Options of the TCP transport; streams and selection must be the same on all ranks, which is
/// compared when the group forms.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Connections for data to each peer, 1 to 8: payloads of a mebibyte and more are shared by all.
    /// More than one where a single connection does not fill the network.
    pub streams: usize,
    /// Certificates: every connection between ranks is encrypted, and both sides must show one of
    /// the cluster's authority. Absent: frames are not encrypted.
    pub tls: Option<Arc<TlsMaterial>>,
    /// Which algorithm carries which reduction.
    pub selection: Selection,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { streams: 1, tls: None, selection: Selection::default() }
    }
}
