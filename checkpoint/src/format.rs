//! The bytes of a shard and of a model: the safetensors format, written deterministically.
//!
//! Same tensors, same bytes: names are sorted, nothing about job, time or rank is inside. A header
//! is a pure function of its tensors, so a reader needs to parse none: it computes the header that
//! the manifest's entries imply and compares.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::slice::Slice;
use crate::tiles::{self, CHECKSUM_BYTES};

/// Longest header: what the `safetensors` crate accepts.
pub(crate) const HEADER_BYTES_MAX: usize = 100_000_000;
/// Longest tensor name; parameter paths are far shorter.
const NAME_BYTES_MAX: usize = 1024;
/// Most dimensions of a tensor; what tensor libraries support.
const DIMENSIONS_MAX: usize = 16;
/// Name under which a file holds its tensors' checksums, after all of them.
const CHECKS_NAME: &str = "__crc32c__";

// Tensors are copied as they lie in memory, and safetensors is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// A tensor in memory: its name, its shape and its elements in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct TensorSlice<'a> {
    /// Unique within the checkpoint, such as `model.head.weight`.
    pub name: &'a str,
    /// Extent per dimension; empty for a scalar.
    pub shape: &'a [usize],
    /// As many elements as the shape has.
    pub data: &'a [f32],
}

/// A part of a tensor in memory, as one rank holds it.
#[derive(Clone, Debug)]
pub struct TensorPiece<'a> {
    /// The tensor's name, unique within the checkpoint.
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Extent of the whole tensor per dimension; empty for a scalar.
    pub shape: &'a [u64],
    /// Which part this is.
    pub slice: Slice,
    /// The part's elements, row-major, little-endian.
    pub data: &'a [u8],
}

/// Type of a tensor's elements, little-endian. Names are those of safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE 754 double precision.
    F64,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// Signed 64 bits.
    I64,
    /// Signed 32 bits.
    I32,
    /// Unsigned 8 bits.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::U8 => "U8",
        }
    }
}

/// Where a tensor, or a part of one, lies in an (uncompressed) shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// The tensor's name.
    pub name: String,
    /// Extent of the whole tensor per dimension; empty for a scalar.
    pub shape: Vec<u64>,
    /// Which part of it lies here; all of it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slice: Option<Slice>,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its first byte, counted from the beginning of the uncompressed file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes, hex, where later checkpoints are to find out whether it has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// How parts of it are checked, in each of several ways; without, only the whole shard can be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Checks>,
}

/// One way to divide a stored tensor into tiles; their checksums lie at the end of the shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checks {
    /// Extent of a tile per dimension.
    pub tile: Vec<u64>,
    /// CRC32C of the checksums.
    pub crc32c: u32,
}

impl Checks {
    /// Bytes of the checksums, for a piece with so many elements along each dimension.
    pub(crate) fn bytes(&self, length: &[u64]) -> u64 {
        tiles::count(length, &self.tile).map_or(u64::MAX, |n| n.saturating_mul(CHECKSUM_BYTES))
    }
}

impl TensorEntry {
    /// One that has no place yet.
    pub(crate) fn new(name: &str, dtype: Dtype, shape: &[u64], slice: Option<Slice>) -> Self {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Self { name, shape, slice, dtype, offset: 0, bytes: 0, blake3: None, checks: Vec::new() }
    }

    /// The part of the tensor that lies here.
    pub fn place(&self) -> Slice {
        self.slice.clone().unwrap_or_else(|| Slice::whole(&self.shape))
    }

    /// Bytes of its checksums, all ways together.
    pub(crate) fn check_bytes(&self) -> u64 {
        let length = self.place().length;
        self.checks.iter().fold(0, |sum, checks| sum.saturating_add(checks.bytes(&length)))
    }

    /// Its name in the file: parts of one tensor may lie in one.
    fn file_name(&self) -> String {
        match &self.slice {
            Some(slice) => format!("{}{slice}", self.name),
            None => self.name.clone(),
        }
    }

    /// Its bytes, when its numbers agree and can be counted.
    fn count_bytes(&self) -> Option<u64> {
        if self.shape.len() > DIMENSIONS_MAX {
            return None;
        }
        let whole = elements(&self.shape)?.checked_mul(self.dtype.bytes())?;
        let is_tile = |tile: &[u64]| tile.len() == self.shape.len() && !tile.contains(&0);
        self.checks.iter().all(|checks| is_tile(&checks.tile)).then_some(())?;
        match &self.slice {
            Some(slice) => slice.fits(&self.shape).then(|| slice.elements() * self.dtype.bytes()),
            None => Some(whole),
        }
    }
}

/// Tensors that cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A name is empty, too long or reserved.
    #[error("tensor name `{name}` cannot be written: {problem}")]
    Name {
        /// The name, cut to a printable length.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two tensors have one name.
    #[error("tensor `{name}` is given twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// Shape and number of elements disagree.
    #[error("tensor `{name}` of shape {shape:?} has {elements} elements")]
    Shape {
        /// The name.
        name: String,
        /// The shape.
        shape: Vec<u64>,
        /// Elements found.
        elements: u64,
    },
    /// A part lies outside its tensor, or has another length than its data.
    #[error("{slice} of tensor `{name}` of shape {shape:?} has {bytes} bytes of data: {problem}")]
    Piece {
        /// The tensor.
        name: String,
        /// The part.
        slice: Box<Slice>,
        /// The shape of the whole.
        shape: Vec<u64>,
        /// Bytes given.
        bytes: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The header outgrows what readers accept.
    #[error(
        "a header for {tensors} tensors has {bytes} bytes, expected at most {HEADER_BYTES_MAX}"
    )]
    Header {
        /// Tensors in the file.
        tensors: usize,
        /// Bytes of the header.
        bytes: usize,
    },
}

/// Elements of a shape, when they can be counted at all.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, extent| product.checked_mul(*extent))
}

/// The header of a file that holds these tensors in this order, and their entries, with offset and
/// length filled in.
///
/// Entries must be sorted by name and part; the data must follow in the same order, and after it
/// their checksums, if they have any.
pub(crate) fn layout(
    mut entries: Vec<TensorEntry>,
) -> Result<(Vec<u8>, Vec<TensorEntry>), FormatError> {
    let mut header = vec![0; 8];
    header.push(b'{');
    let mut offset = 0u64;
    for index in 0..entries.len() {
        let (before, rest) = entries.split_at_mut(index);
        let Some(entry) = rest.first_mut() else { break };
        check_name(&entry.name)?;
        if before
            .last()
            .is_some_and(|last| (&last.name, &last.slice) >= (&entry.name, &entry.slice))
        {
            return Err(FormatError::Twice { name: entry.file_name() });
        }
        let end = entry.count_bytes().and_then(|bytes| offset.checked_add(bytes));
        let Some(end) = end else {
            let (name, shape) = (entry.name.clone(), entry.shape.clone());
            return Err(FormatError::Shape { name, shape, elements: u64::MAX });
        };
        (entry.offset, entry.bytes) = (offset, end - offset);
        let length = entry.slice.as_ref().map_or(&entry.shape, |slice| &slice.length);
        push_info(&mut header, &entry.file_name(), entry.dtype.name(), length, offset..end);
        offset = end;
        if header.len() > HEADER_BYTES_MAX {
            break;
        }
    }
    let checks = entries.iter().try_fold(0u64, |sum, entry| sum.checked_add(entry.check_bytes()));
    let Some(end) = checks.and_then(|checks| offset.checked_add(checks)) else {
        return Err(FormatError::Header { tensors: entries.len(), bytes: header.len() });
    };
    if end > offset {
        push_info(&mut header, CHECKS_NAME, "U32", &[(end - offset) / CHECKSUM_BYTES], offset..end);
    }
    header.push(b'}');
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > HEADER_BYTES_MAX {
        return Err(FormatError::Header { tensors: entries.len(), bytes: header.len() });
    }
    let length = (header.len() - 8) as u64;
    header[..8].copy_from_slice(&length.to_le_bytes());
    for entry in &mut entries {
        entry.offset += header.len() as u64;
    }
    Ok((header, entries))
}

fn push_info(header: &mut Vec<u8>, name: &str, dtype: &str, shape: &[u64], place: Range<u64>) {
    if header.last() == Some(&b'}') {
        header.push(b',');
    }
    let (name, shape) = (serde_json::Value::from(name), serde_json::Value::from(shape));
    let (start, end) = (place.start, place.end);
    let info =
        format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#);
    header.extend_from_slice(info.as_bytes());
}

fn check_name(name: &str) -> Result<(), FormatError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name == "__metadata__" {
        "safetensors reserves it"
    } else if name == CHECKS_NAME {
        "the shard's checksums have it"
    } else if name.len() > NAME_BYTES_MAX {
        "it has more than 1024 bytes"
    } else {
        return Ok(());
    };
    Err(FormatError::Name { name: name.chars().take(80).collect(), problem })
}

/// Whole tensors as pieces, and their shapes in the file's type; checks that data and shapes agree.
pub(crate) fn shapes(tensors: &[TensorSlice<'_>]) -> Result<Vec<Vec<u64>>, FormatError> {
    let shape_of = |tensor: &TensorSlice<'_>| {
        let shape: Vec<u64> = tensor.shape.iter().map(|extent| *extent as u64).collect();
        let found = tensor.data.len() as u64;
        if elements(&shape) == Some(found) {
            return Ok(shape);
        }
        Err(FormatError::Shape { name: tensor.name.to_owned(), shape, elements: found })
    };
    tensors.iter().map(shape_of).collect()
}

/// The pieces that whole tensors are, given [`shapes`].
pub(crate) fn whole<'a>(
    tensors: &[TensorSlice<'a>],
    shapes: &'a [Vec<u64>],
) -> Vec<TensorPiece<'a>> {
    let piece = |(tensor, shape): (&TensorSlice<'a>, &'a Vec<u64>)| TensorPiece {
        name: tensor.name,
        dtype: Dtype::F32,
        shape,
        slice: Slice::whole(shape),
        data: bytemuck::cast_slice(tensor.data),
    };
    tensors.iter().zip(shapes).map(piece).collect()
}

/// The order in which pieces are written, and their entries in that order. Left out is what holds
/// nothing of a tensor that has elements: a rank's empty share.
pub(crate) fn order(pieces: &[TensorPiece<'_>]) -> Result<Vec<(usize, TensorEntry)>, FormatError> {
    let mut order = Vec::with_capacity(pieces.len());
    for (index, piece) in pieces.iter().enumerate() {
        let TensorPiece { name, dtype, shape, slice, data } = piece;
        let wrong = |problem| {
            let (name, slice) = ((*name).to_owned(), Box::new(slice.clone()));
            let shape = shape.to_vec();
            FormatError::Piece { name, slice, shape, bytes: data.len() as u64, problem }
        };
        let Some(elements) = elements(shape).filter(|_| slice.fits(shape)) else {
            return Err(wrong("it does not lie inside"));
        };
        if slice.elements().checked_mul(dtype.bytes()) != Some(data.len() as u64) {
            return Err(wrong("another length than its elements have"));
        }
        if elements > 0 && slice.is_empty() {
            continue;
        }
        // Of a tensor without elements every part is all of it.
        let part = (elements > 0 && *slice != Slice::whole(shape)).then(|| slice.clone());
        order.push((index, TensorEntry::new(name, *dtype, shape, part)));
    }
    order.sort_by(|(_, a), (_, b)| (&a.name, &a.slice).cmp(&(&b.name, &b.slice)));
    order.dedup_by(|(_, a), (_, b)| a == b && elements(&a.shape) == Some(0));
    Ok(order)
}

/// A whole safetensors file. The same tensors give the same bytes, in whatever order they come.
pub fn safetensors_bytes(tensors: &[TensorSlice<'_>]) -> Result<Vec<u8>, FormatError> {
    let shapes = shapes(tensors)?;
    let order = order(&whole(tensors, &shapes))?;
    let (order, entries): (Vec<usize>, Vec<TensorEntry>) = order.into_iter().unzip();
    let (mut file, entries) = layout(entries)?;
    file.reserve_exact(entries.iter().map(|entry| entry.bytes as usize).sum());
    for index in order {
        file.extend_from_slice(bytemuck::cast_slice(tensors[index].data));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::{Dtype as TheirDtype, TensorView};

    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_safetensors_crate() {
        let weight: Vec<f32> = (0..6).map(|i| i as f32 * 0.5).collect();
        let ours = [
            TensorSlice { name: "model.w \"ä\"\n", shape: &[2, 3], data: &weight },
            TensorSlice { name: "model.b", shape: &[], data: &[7.0] },
            TensorSlice { name: "model.empty", shape: &[0, 4], data: &[] },
        ];
        let bytes = safetensors_bytes(&ours).expect("writes");
        let mut theirs = HashMap::new();
        for tensor in &ours {
            let data = bytemuck::cast_slice(tensor.data);
            let view = TensorView::new(TheirDtype::F32, tensor.shape.to_vec(), data);
            theirs.insert(tensor.name, view.expect("a tensor"));
        }
        assert_eq!(bytes, safetensors::serialize(theirs, None).expect("writes"));
        let mut reversed = ours;
        reversed.reverse();
        assert_eq!(bytes, safetensors_bytes(&reversed).expect("writes"), "order of arguments");
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let long = "x".repeat(2000);
        let one = |name, shape, data| safetensors_bytes(&[TensorSlice { name, shape, data }]);
        assert!(matches!(one("", &[1], &[0.0]), Err(FormatError::Name { .. })));
        assert!(matches!(one("__metadata__", &[1], &[0.0]), Err(FormatError::Name { .. })));
        assert!(matches!(one(&long, &[1], &[0.0]), Err(FormatError::Name { .. })));
        assert!(matches!(one("a", &[2], &[0.0]), Err(FormatError::Shape { .. })));
        assert!(matches!(one("a", &[usize::MAX, 2], &[]), Err(FormatError::Shape { .. })));
        let twin = TensorSlice { name: "a", shape: &[1], data: &[0.0] };
        assert!(matches!(safetensors_bytes(&[twin, twin]), Err(FormatError::Twice { .. })));
    }
}
