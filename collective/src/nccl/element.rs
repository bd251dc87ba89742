//! Element types and reductions as NCCL names them: the one place of the mapping.

use std::ffi::c_int;

use crate::buffer::ElementType;
use crate::communicator::ReduceOp;

/// The `ncclDataType_t`.
pub(super) const fn nccl_type(element: ElementType) -> c_int {
    match element {
        ElementType::U8 => 1,
        ElementType::I32 => 2,
        ElementType::I64 => 4,
        ElementType::F16 => 6,
        ElementType::F32 => 7,
        ElementType::F64 => 8,
        ElementType::Bf16 => 9,
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
        let types = ElementType::ALL.map(|element| (element.name(), nccl_type(element)));
        let expected =
            [("f32", 7), ("f64", 8), ("i64", 4), ("u8", 1), ("bf16", 9), ("f16", 6), ("i32", 2)];
        assert_eq!(types, expected);
        assert_eq!(ReduceOp::ALL.map(nccl_op), [0, 2, 3, 4]);
    }
}
