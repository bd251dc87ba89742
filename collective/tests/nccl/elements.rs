//! Small whole numbers as elements of every type, exact in all of them.

use collective::ElementType;
use collective::nccl::{DeviceBuffer, DeviceMemory, NcclGroup};

pub fn encode(element: ElementType, values: &[i64]) -> Vec<u8> {
    let bytes = |value: &i64| match element {
        ElementType::F32 => (*value as f32).to_le_bytes().to_vec(),
        ElementType::F64 => (*value as f64).to_le_bytes().to_vec(),
        ElementType::Bf16 => (((*value as f32).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        ElementType::F16 => half(*value).to_le_bytes().to_vec(),
        ElementType::I32 => (*value as i32).to_le_bytes().to_vec(),
        ElementType::I64 => value.to_le_bytes().to_vec(),
        ElementType::U8 => vec![*value as u8],
    };
    values.iter().flat_map(bytes).collect()
}

/// A whole number from 0 to 2047 as IEEE half: exact.
fn half(value: i64) -> u16 {
    assert!((0..2048).contains(&value));
    if value == 0 {
        return 0;
    }
    let exponent = value.ilog2();
    let mantissa = (value << (10 - exponent)) & 0x3ff;
    ((exponent + 15) << 10) as u16 | mantissa as u16
}

/// Device memory of a group's GPU with these elements.
pub fn upload(group: &mut NcclGroup, element: ElementType, values: &[i64]) -> DeviceBuffer {
    let bytes = encode(element, values);
    let memory = DeviceMemory::new(group.device(), bytes.len()).unwrap();
    let buffer = memory.buffer(element, values.len()).unwrap();
    group.write_bytes(&buffer, &bytes).unwrap();
    buffer
}

/// The elements of a buffer are these.
#[track_caller]
pub fn assert_holds(group: &mut NcclGroup, buffer: &DeviceBuffer, values: &[i64], what: &str) {
    let found = group.read_bytes(buffer).unwrap();
    let (element, rank) = (buffer.element(), group.rank());
    assert!(found == encode(element, values), "{what} of {element} on {rank} differs");
}
