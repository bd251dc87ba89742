//! Images in CSV: one image per line, its pixel values and its label.
//!
//! With a header line the label is the column named `label`; without one it is the first column, as
//! SageMaker's built-in algorithms have it. A first line `# 32x32x3` (height, width, channels;
//! values channel last) gives the shape; without it images are square and grey.

use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;

use csv::ByteRecord;

use super::geometry::{ImageGeometry, planar};
use super::images::{ImageStore, Shape, check_shape};
use super::labels::excerpt;
use super::limits::{FILES_MAX, LINE_BYTES_MAX, TABLE_BYTES_MAX};
use super::source::{Source, has_extension};
use crate::error::DataError;

/// Reads the file, or all CSV files of the folder in order of their names.
pub(super) fn read(
    source: &Source<'_>,
    expect: Option<&ImageGeometry>,
) -> Result<ImageStore, DataError> {
    let paths: Vec<PathBuf> = if source.is_folder()? {
        let mut paths = source.entries(FILES_MAX)?;
        paths.retain(|path| has_extension(path, &["csv"]));
        paths
    } else {
        vec![source.path.to_owned()]
    };
    let mut store = None;
    for path in &paths {
        read_file(&source.at(path), expect, &mut store)?;
    }
    store.ok_or_else(|| source.malformed("holds no image"))
}

/// Where the label stands in a line, and how many cells a line has.
#[derive(Clone, Copy, Debug)]
struct Columns {
    label: usize,
    count: usize,
}

fn read_file(
    source: &Source<'_>,
    expect: Option<&ImageGeometry>,
    store: &mut Option<ImageStore>,
) -> Result<(), DataError> {
    let reader = BoundedLines::new(source.reader()?);
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let declared = declared_shape(&mut reader).map_err(|e| match e {
        Declaration::Unreadable(error) => source.unreadable(error),
        Declaration::Malformed(message) => source.malformed(format!("line 1: {message}")),
    })?;
    let skipped = u64::from(declared.is_some());
    // The position of a record is that of the blank lines and comments before it. With `\n` alone
    // as the end of a line (a `\r` is trimmed off the last cell) and one at the very end, the reader
    // always stands one line behind the record instead.
    let mut lines = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .comment(Some(b'#'))
        .terminator(csv::Terminator::Any(b'\n'))
        .from_reader(reader.chain(b"\n".as_slice()));

    let mut columns = None;
    let mut record = ByteRecord::new();
    let (mut interleaved, mut is_empty) = (Vec::new(), true);
    loop {
        match lines.read_byte_record(&mut record) {
            Ok(true) => {}
            Ok(false) if is_empty => return Err(source.malformed("holds no image")),
            Ok(false) => return Ok(()),
            Err(error) => return Err(source.unreadable(error.into())),
        }
        if record.len() == 1 && record[0].trim_ascii().is_empty() {
            continue;
        }
        let line = skipped + lines.position().line() - 1;
        let fault = |message: String| source.malformed(format!("line {line}: {message}"));
        let Some(Columns { label, count }) = columns else {
            let (found, is_header) = columns_of(&record).map_err(fault)?;
            columns = Some(found);
            if store.is_none() {
                let shape = shape_of(found.count - 1, declared, expect).map_err(fault)?;
                *store = Some(ImageStore::new(shape, expect));
            }
            if !is_header {
                append(&record, found, store.as_mut(), &mut interleaved).map_err(fault)?;
                is_empty = false;
            }
            continue;
        };
        append(&record, Columns { label, count }, store.as_mut(), &mut interleaved)
            .map_err(fault)?;
        is_empty = false;
    }
}

/// Appends one line to the store.
fn append(
    record: &ByteRecord,
    columns: Columns,
    store: Option<&mut ImageStore>,
    interleaved: &mut Vec<f32>,
) -> Result<(), String> {
    let store = store.expect("made when the first line was seen");
    let Columns { label, count } = columns;
    if record.len() != count {
        return Err(format!("{} cells, expected {count}", record.len()));
    }
    let expected = store.shape.values();
    if count - 1 != expected {
        return Err(format!("{} pixel values, expected {expected} ({})", count - 1, store.shape));
    }
    store.check_room()?;
    interleaved.clear();
    for (at, cell) in record.iter().enumerate().filter(|(at, _)| *at != label) {
        let value = number(cell).ok_or_else(|| {
            let text = excerpt(&String::from_utf8_lossy(cell.trim_ascii()));
            format!("column {}: `{text}` is not a number", at + 1)
        })?;
        interleaved.push(value);
    }
    let name = std::str::from_utf8(&record[label]).map_err(|_| "the label is not UTF-8")?;
    let class = store.labels.number(name.trim())?;
    store.classes.push(class);
    store.pixels.extend(&planar(interleaved, store.shape.channels));
    Ok(())
}

/// A finite number.
fn number(cell: &[u8]) -> Option<f32> {
    let cell = cell.trim_ascii();
    // Nearly all cells are whole numbers of up to three digits.
    if (1..=3).contains(&cell.len()) && cell.iter().all(u8::is_ascii_digit) {
        return Some(cell.iter().fold(0.0, |sum, digit| sum * 10.0 + f32::from(digit - b'0')));
    }
    let value: f32 = std::str::from_utf8(cell).ok()?.parse().ok()?;
    value.is_finite().then_some(value)
}

/// The columns told by the first line, and whether that line is a header: its last cell, a pixel
/// where there is no header, is not a number.
fn columns_of(first: &ByteRecord) -> Result<(Columns, bool), String> {
    let count = first.len();
    if count < 2 {
        return Err(format!("{count} cells, expected a label and at least one pixel value"));
    }
    if number(&first[count - 1]).is_some() {
        return Ok((Columns { label: 0, count }, false));
    }
    let is_label = |cell: &&[u8]| cell.trim_ascii().eq_ignore_ascii_case(b"label");
    let labels = first.iter().filter(is_label).count();
    let label = first.iter().position(|cell| is_label(&cell));
    match label {
        Some(label) if labels == 1 => Ok((Columns { label, count }, true)),
        _ => Err(format!(
            "the last cell is `{}`, so this is a header, but {labels} of its columns are named \
             `label`, expected 1",
            excerpt(&String::from_utf8_lossy(first[count - 1].trim_ascii()))
        )),
    }
}

/// The shape of images of `values` values.
fn shape_of(
    values: usize,
    declared: Option<Shape>,
    expect: Option<&ImageGeometry>,
) -> Result<Shape, String> {
    let expected = expect.map(Shape::from);
    if let Some(shape) = declared {
        if shape.values() != values {
            return Err(format!(
                "{values} pixel values, expected {} for the {shape} of the first line",
                shape.values()
            ));
        }
        check_shape(shape, expect)?;
        return Ok(shape);
    }
    match expected {
        Some(shape) if shape.values() == values => return Ok(shape),
        Some(shape) => {
            return Err(format!(
                "{values} pixel values, expected {} ({shape}) as in the training channel",
                shape.values()
            ));
        }
        None => {}
    }
    let side = values.isqrt();
    if side * side != values {
        return Err(format!(
            "{values} pixel values are not a square image: give the shape in a first line such as \
             `# 24x32x1` (height x width x channels)"
        ));
    }
    Shape::new(side, side, 1)
}

/// Why a shape could not be read.
enum Declaration {
    Unreadable(io::Error),
    Malformed(String),
}

/// Takes a first line `# HxWxC` off the reader. Other comments are left to the CSV reader.
fn declared_shape(reader: &mut impl BufRead) -> Result<Option<Shape>, Declaration> {
    let begin = reader.fill_buf().map_err(Declaration::Unreadable)?;
    let end = begin.iter().position(|b| *b == b'\n').unwrap_or(begin.len());
    let Some(comment) = begin[..end].strip_prefix(b"#") else { return Ok(None) };
    let text = String::from_utf8_lossy(comment).trim().to_owned();
    let parts: Vec<&str> = text.split('x').collect();
    let numbers: Option<Vec<usize>> = parts.iter().map(|p| p.trim().parse().ok()).collect();
    let Some(numbers) = numbers else { return Ok(None) };
    let &[height, width, channels] = numbers.as_slice() else {
        let message = format!("shape `{}`, expected height x width x channels", excerpt(&text));
        return Err(Declaration::Malformed(message));
    };
    let shape = Shape::new(height, width, channels).map_err(Declaration::Malformed)?;
    let consumed = (end + 1).min(begin.len());
    reader.consume(consumed);
    Ok(Some(shape))
}

/// Ends the input with an error when a line or the whole is longer than the bounds, so that no
/// compressed file can make the CSV reader's buffers grow without end.
struct BoundedLines<R> {
    inner: R,
    line: usize,
    total: u64,
}

impl<R> BoundedLines<R> {
    fn new(inner: R) -> Self {
        Self { inner, line: 0, total: 0 }
    }
}

impl<R: Read> Read for BoundedLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.total += count as u64;
        self.line = match buffer[..count].iter().rposition(|b| *b == b'\n') {
            Some(newline) => count - newline - 1,
            None => self.line + count,
        };
        if self.line > LINE_BYTES_MAX {
            let message = format!("a line is longer than {LINE_BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if self.total > TABLE_BYTES_MAX {
            let message = format!("its text is longer than {TABLE_BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::{AugmentOptions, ImageDataset, open_images};
    use crate::dataset::Dataset;

    fn open(text: &str, expect: Option<&ImageGeometry>) -> Result<ImageDataset, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.csv");
        std::fs::write(&path, text).expect("writes");
        open_path(&path, expect)
    }

    fn open_path(path: &Path, expect: Option<&ImageGeometry>) -> Result<ImageDataset, String> {
        open_images("train", path, None, expect, AugmentOptions::default())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn label_first_label_last_and_windows_lines_give_the_same_set() {
        let first = open("7,0,1,2,255\n3,4,5,6,7\n", None).expect("no header");
        let last = open("p0,p1,p2,p3,label\r\n0,1,2,255,7\r\n4,5,6,7,3\r\n", None).expect("header");
        let middle =
            open("# 2x2x1\n# made by hand\np0,p1, Label ,p2,p3\n0,1,7,2,255\n4,5,3,6,7", None);
        let middle = middle.expect("declared");
        assert_eq!(first.digest(), last.digest());
        assert_eq!(first.digest(), middle.digest());
        assert_eq!((first.geometry().height, first.geometry().labels.join(" ")), (2, "3 7".into()));
        let words = open("cat,0.5,1\ndog,-1e-3,1\n", None);
        assert!(words.expect_err("2 values").contains("not a square image"));
        let words = open("# 1x2x1\ncat,0.5,1\ndog,-1e-3,1\n", None).expect("declared");
        assert_eq!(words.geometry().labels, ["cat", "dog"]);
    }

    #[test]
    fn faults_name_their_line() {
        let training = open("0,1,2,3,4\n1,1,2,3,4\n", None).expect("reads");
        let expect = Some(training.geometry());
        for (text, expect, message) in [
            ("", None, "holds no image"),
            ("p0,label\n", None, "holds no image"),
            ("0,1,2,3,4\n\n1,2,3,4\n", None, "line 3: 4 cells, expected 5"),
            ("0,1,2,3,4\n1,2,x3,4,5\n", None, "line 2: column 3: `x3` is not a number"),
            ("0,1,2,3,4\n1,2,,4,5\n", None, "line 2: column 3: `` is not a number"),
            ("# 2x2x1\n0,1,2,3,NaN\n", None, "line 2: the last cell is `NaN`"),
            ("0,1,2,3,4\n1,2,3,inf,5\n", None, "line 2: column 4: `inf` is not a number"),
            ("# 2x2x1\n\n0,1,2,3,4\n1,2,y,4,5\n", None, "line 4: column 3: `y`"),
            ("0,1,2,3,4\r\n\r\n# no\r\n1,2,3,4,y\r\n", None, "line 4: column 5: `y` is not"),
            ("0,1,2,3,4\n,2,3,4,5\n", None, "line 2: the label is empty"),
            ("a,b,c,d,e\n", None, "0 of its columns are named `label`"),
            ("5\n", None, "line 1: 1 cells, expected a label and at least one pixel"),
            ("# 2x2x3\n0,1,2,3,4\n", None, "line 2: 4 pixel values, expected 12 for the 2x2x3"),
            ("# 2x2\n0,1,2,3,4\n", None, "line 1: shape `2x2`, expected height x width x channels"),
            ("# 99999x99999x3\n0,1\n", None, "line 1: images of 99999x99999x3 values"),
            ("0,1\n", expect, "line 1: 1 pixel values, expected 4 (2x2x1) as in the training"),
            ("# 1x4x1\n0,1,2,3,4\n", expect, "images of 1x4x1"),
            ("0,1,2,3,4\n2,1,2,3,4\n", expect, "line 2: label `2` is not among the 2"),
        ] {
            let error = open(text, expect).expect_err(text);
            assert!(error.contains(message), "{text:?}: found `{error}`, expected `{message}`");
        }
    }

    #[test]
    fn a_folder_of_tables_is_read_in_order() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("b.csv"), "1,9\n").expect("writes");
        std::fs::write(folder.path().join("a.csv"), "0,8\n1,7\n").expect("writes");
        let set = open_path(folder.path(), None).expect("reads");
        assert_eq!(set.digest(), open("0,8\n1,7\n1,9\n", None).expect("reads").digest());
        std::fs::write(folder.path().join("c.csv"), "1,9,9,9,9\n").expect("writes");
        let error = open_path(folder.path(), None).expect_err("other shape");
        assert!(error.contains("c.csv") && error.contains("4 pixel values, expected 1"), "{error}");
    }

    #[test]
    fn an_endless_line_ends_at_the_bound() {
        let mut lines = BoundedLines::new(io::repeat(b'1'));
        let mut buffer = vec![0; 1 << 20];
        let error = (0..=LINE_BYTES_MAX >> 20)
            .find_map(|_| lines.read(&mut buffer).err())
            .expect("ends at the bound");
        assert!(error.to_string().contains("a line is longer than"), "{error}");
    }
}
