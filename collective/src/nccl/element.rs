//! Element types and reductions as NCCL and the sum kernels name them: the one place of the
//! mapping.

use std::ffi::c_int;
use std::fmt;

use crate::buffer::ElementType;
use crate::communicator::ReduceOp;

/// What an element of device memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceElement {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 16-bit float with the exponent of an `f32`.
    Bf16,
    /// IEEE 16-bit float.
    F16,
    /// 32-bit signed integer.
    I32,
    /// 64-bit signed integer.
    I64,
    /// Byte.
    U8,
}

impl DeviceElement {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F64, Self::Bf16, Self::F16, Self::I32, Self::I64, Self::U8];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Whether an average of it means anything: as [`ReduceOp::Avg`] says, floats only.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::Bf16 | Self::F16)
    }

    /// The `ncclDataType_t`.
    pub(super) const fn nccl(self) -> c_int {
        match self {
            Self::U8 => 1,
            Self::I32 => 2,
            Self::I64 => 4,
            Self::F16 => 6,
            Self::F32 => 7,
            Self::F64 => 8,
            Self::Bf16 => 9,
        }
    }
}

impl From<ElementType> for DeviceElement {
    fn from(element: ElementType) -> Self {
        match element {
            ElementType::F32 => Self::F32,
            ElementType::F64 => Self::F64,
            ElementType::Bf16 => Self::Bf16,
            ElementType::F16 => Self::F16,
            ElementType::I32 => Self::I32,
            ElementType::I64 => Self::I64,
            ElementType::U8 => Self::U8,
        }
    }
}

impl fmt::Display for DeviceElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
        })
    }
}

/// The `ncclRedOp_t`.
pub(super) const fn nccl_op(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Avg => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_reductions_have_the_numbers_of_the_header() {
        let types: Vec<(String, c_int, usize)> = DeviceElement::ALL
            .into_iter()
            .map(|element| (element.to_string(), element.nccl(), element.bytes()))
            .collect();
        let expected = [
            ("f32", 7, 4),
            ("f64", 8, 8),
            ("bf16", 9, 2),
            ("f16", 6, 2),
            ("i32", 2, 4),
            ("i64", 4, 8),
            ("u8", 1, 1),
        ];
        assert_eq!(types, expected.map(|(name, code, bytes)| (name.to_owned(), code, bytes)));
        let ops = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg].map(nccl_op);
        assert_eq!(ops, [0, 2, 3, 4]);
    }

    #[test]
    fn host_and_device_types_are_the_same_types() {
        for host in ElementType::ALL {
            let device = DeviceElement::from(host);
            assert_eq!(device.bytes(), host.bytes());
            assert_eq!(device.to_string(), host.to_string());
        }
    }
}
