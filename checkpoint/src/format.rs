//! The bytes of a shard and of a model: the safetensors format, written deterministically.
//!
//! Same tensors, same bytes: names are sorted, nothing about job, time or rank is inside. A header
//! is a pure function of its tensors, so a reader needs to parse none: it computes the header that
//! the manifest's entries imply and compares.

use serde::{Deserialize, Serialize};

/// Longest header: what the `safetensors` crate accepts.
pub(crate) const HEADER_BYTES_MAX: usize = 100_000_000;
/// Longest tensor name; parameter paths are far shorter.
const NAME_BYTES_MAX: usize = 1024;
/// Most dimensions of a tensor; what tensor libraries support.
const DIMENSIONS_MAX: usize = 16;

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

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE 754 single precision, little-endian.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
        }
    }
}

/// Where a tensor lies in an (uncompressed) shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Extent per dimension; empty for a scalar.
    pub shape: Vec<u64>,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its first byte, counted from the beginning of the uncompressed file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
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

/// The header of a file that holds these tensors in this order, and the tensors' entries.
///
/// `tensors` yields (name, shape) sorted by name; the data must follow in the same order.
pub(crate) fn layout<'a>(
    tensors: impl Iterator<Item = (&'a str, Vec<u64>)>,
) -> Result<(Vec<u8>, Vec<TensorEntry>), FormatError> {
    let mut entries: Vec<TensorEntry> = Vec::new();
    let mut header = vec![0; 8];
    header.push(b'{');
    let mut offset = 0u64;
    for (name, shape) in tensors {
        check_name(name)?;
        if let Some(last) = entries.last()
            && last.name.as_str() >= name
        {
            return Err(FormatError::Twice { name: name.to_owned() });
        }
        let bytes = elements(&shape).and_then(|count| count.checked_mul(Dtype::F32.bytes()));
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        let (Some(bytes), Some(end), true) = (bytes, end, shape.len() <= DIMENSIONS_MAX) else {
            let elements = u64::MAX;
            return Err(FormatError::Shape { name: name.to_owned(), shape, elements });
        };
        if !entries.is_empty() {
            header.push(b',');
        }
        push_info(&mut header, name, &shape, offset, end);
        let name = name.to_owned();
        entries.push(TensorEntry { name, shape, dtype: Dtype::F32, offset, bytes });
        offset = end;
        if header.len() > HEADER_BYTES_MAX {
            break;
        }
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

fn push_info(header: &mut Vec<u8>, name: &str, shape: &[u64], start: u64, end: u64) {
    let name = serde_json::Value::from(name);
    let shape = serde_json::Value::from(shape);
    let info =
        format!(r#"{name}:{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#);
    header.extend_from_slice(info.as_bytes());
}

fn check_name(name: &str) -> Result<(), FormatError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name == "__metadata__" {
        "safetensors reserves it"
    } else if name.len() > NAME_BYTES_MAX {
        "it has more than 1024 bytes"
    } else {
        return Ok(());
    };
    Err(FormatError::Name { name: name.chars().take(80).collect(), problem })
}

/// Order in which tensors are written: by name. Checks that data and shapes agree.
pub(crate) fn order(tensors: &[TensorSlice<'_>]) -> Result<Vec<usize>, FormatError> {
    for tensor in tensors {
        let shape = shape_of(tensor);
        if elements(&shape) != Some(tensor.data.len() as u64) {
            let elements = tensor.data.len() as u64;
            return Err(FormatError::Shape { name: tensor.name.to_owned(), shape, elements });
        }
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|index| tensors[*index].name);
    Ok(order)
}

/// A tensor's shape in the file's type.
pub(crate) fn shape_of(tensor: &TensorSlice<'_>) -> Vec<u64> {
    tensor.shape.iter().map(|extent| *extent as u64).collect()
}

/// A whole safetensors file. The same tensors give the same bytes, in whatever order they come.
pub fn safetensors_bytes(tensors: &[TensorSlice<'_>]) -> Result<Vec<u8>, FormatError> {
    let order = order(tensors)?;
    let sorted = || order.iter().map(|index| &tensors[*index]);
    let (mut file, entries) = layout(sorted().map(|t| (t.name, shape_of(t))))?;
    file.reserve_exact(entries.iter().map(|entry| entry.bytes as usize).sum());
    for tensor in sorted() {
        file.extend_from_slice(bytemuck::cast_slice(tensor.data));
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
