//! Bytes of a pipe into lines, as a terminal would leave them: bounded, valid UTF-8, with only what
//! stands after the last carriage return (a progress bar is its final state).

use api::session::LOG_LINE_BYTES_MAX;

/// Room for the mark that a cut line ends with.
const CUT_MARK_BYTES: usize = 48;

const _: () = assert!(CUT_MARK_BYTES < LOG_LINE_BYTES_MAX);

/// Splits one stream; holds at most one bounded line.
#[derive(Default)]
pub(crate) struct LineSplitter {
    pending: Vec<u8>,
    /// Bytes of the pending line that were not kept.
    cut: u64,
    /// A carriage return that may belong to the line's end.
    carriage_return: bool,
}

impl LineSplitter {
    /// Takes bytes in any portions; calls `line` for each finished one.
    pub(crate) fn push(&mut self, bytes: &[u8], mut line: impl FnMut(String)) {
        for &byte in bytes {
            match byte {
                b'\n' => line(self.take()),
                b'\r' => self.carriage_return = true,
                _ => self.push_byte(byte),
            }
        }
    }

    fn push_byte(&mut self, byte: u8) {
        if self.carriage_return {
            // The cursor is back at the line's start: what follows overwrites it.
            self.pending.clear();
            (self.cut, self.carriage_return) = (0, false);
        }
        if self.pending.len() < LOG_LINE_BYTES_MAX {
            self.pending.push(byte);
        } else {
            self.cut += 1;
        }
    }

    /// The last line, when the stream ended without a line end.
    pub(crate) fn finish(&mut self) -> Option<String> {
        (!self.pending.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let mut text = String::from_utf8_lossy(&self.pending).into_owned();
        if self.cut > 0 || text.len() > LOG_LINE_BYTES_MAX {
            // Replacing invalid bytes lengthens a text, so this is decided on the text.
            let kept = text.floor_char_boundary(LOG_LINE_BYTES_MAX - CUT_MARK_BYTES);
            let cut = self.cut + (text.len() - kept) as u64;
            text.truncate(kept);
            text.push_str(&format!(" … [{cut} bytes cut]"));
        }
        self.pending.clear();
        (self.cut, self.carriage_return) = (0, false);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of `input`, cut into portions of every size: portions must not matter.
    fn split(input: &[u8]) -> Vec<String> {
        let split_by = |portion: usize| {
            let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
            input.chunks(portion).for_each(|bytes| splitter.push(bytes, |l| lines.push(l)));
            lines.extend(splitter.finish());
            lines
        };
        let whole = split_by(input.len().max(1));
        for portion in [1, 2, 3, 7] {
            assert_eq!(split_by(portion), whole, "portions of {portion}");
        }
        whole
    }

    #[test]
    fn lines_are_what_a_terminal_would_show() {
        let table: [(&[u8], &[&str]); 8] = [
            (b"", &[]),
            (b"a\nb", &["a", "b"]),
            (b"a\r\n\r\nb\n", &["a", "", "b"]),
            (b"10%\r50%\r100%\ndone\n", &["100%", "done"]),
            (b"10%\r50%\r", &["50%"]),
            (b"\n\n", &["", ""]),
            (b"\xff\xfe ok\n", &["\u{fffd}\u{fffd} ok"]),
            ("\u{e4}\u{1f980}\n".as_bytes(), &["\u{e4}\u{1f980}"]),
        ];
        for (input, lines) in table {
            assert_eq!(split(input), lines, "{:?}", String::from_utf8_lossy(input));
        }
    }

    #[test]
    fn a_long_line_is_cut_and_marked_and_the_next_one_is_whole() {
        for (long, unit) in [("x", 1), ("\u{1f980}", 4)] {
            let mut input = long.repeat(3 * LOG_LINE_BYTES_MAX / unit);
            input.push_str("\nnext\n");
            let lines = split(input.as_bytes());
            assert_eq!((lines.len(), lines[1].as_str()), (2, "next"));
            assert!(lines[0].len() <= LOG_LINE_BYTES_MAX, "{} bytes", lines[0].len());
            assert!(lines[0].ends_with(" bytes cut]"), "{}", &lines[0][lines[0].len() - 64..]);
        }
        // Invalid bytes become three bytes each: still bounded.
        let lines = split(&[0xff; LOG_LINE_BYTES_MAX]);
        assert!(lines[0].len() <= LOG_LINE_BYTES_MAX && lines[0].ends_with(" bytes cut]"));
    }
}
