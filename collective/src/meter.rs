//! How many bytes have come in a call, told to the flight recorder whenever the call blocks: a call
//! that never blocks has ended before anybody could ask.

use crate::flight::{FlightRecorder, FlightToken};

/// The bytes of the call under way.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Not told yet.
    bytes: u64,
    log: Option<(FlightRecorder, FlightToken)>,
}

impl Meter {
    /// From now on it counts for that call.
    pub(crate) fn begin(&mut self, recorder: &FlightRecorder, token: FlightToken) {
        self.bytes = 0;
        match &mut self.log {
            Some((known, last)) if known.is(recorder) => *last = token,
            log => *log = Some((recorder.clone(), token)),
        }
    }

    /// So many more have come.
    pub(crate) fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// The call is about to wait.
    pub(crate) fn tell(&mut self) {
        if let (Some((recorder, token)), 1..) = (&self.log, self.bytes) {
            recorder.moved(*token, std::mem::take(&mut self.bytes));
        }
    }
}
