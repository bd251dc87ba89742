//! Typed views of flat memory: what a collective reads and writes.
//!
//! Borrowed only: no collective keeps or copies a caller's buffer beyond its call.

use std::fmt;

use half::{bf16, f16};

/// What an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ElementType {
    /// 32-bit float.
    F32 = 1,
    /// 64-bit float.
    F64 = 2,
    /// 64-bit signed integer; sums wrap.
    I64 = 3,
    /// Byte; sums wrap.
    U8 = 4,
    /// bfloat16; every addition is rounded to it.
    Bf16 = 5,
    /// IEEE half precision; every addition is rounded to it.
    F16 = 6,
    /// 32-bit signed integer; sums wrap.
    I32 = 7,
}

impl ElementType {
    /// Every type, in the order of their numbers on the wire.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F64, Self::I64, Self::U8, Self::Bf16, Self::F16, Self::I32];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Whether an average of it means anything: floats only, an integer's would round.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::Bf16 | Self::F16)
    }

    /// Its name, as in a call's text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::I32 => "i32",
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for ElementType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("unknown element type `{text}`, expected one of {known}")
        })
    }
}

/// Elements to send.
#[derive(Clone, Copy, Debug)]
pub enum Buffer<'a> {
    /// 32-bit float.
    F32(&'a [f32]),
    /// 64-bit float.
    F64(&'a [f64]),
    /// 64-bit signed integer; sums wrap.
    I64(&'a [i64]),
    /// Byte; sums wrap.
    U8(&'a [u8]),
    /// bfloat16; every addition is rounded to it.
    Bf16(&'a [bf16]),
    /// IEEE half precision; every addition is rounded to it.
    F16(&'a [f16]),
    /// 32-bit signed integer; sums wrap.
    I32(&'a [i32]),
}

/// Elements to fill or to reduce in place.
#[derive(Debug)]
pub enum BufferMut<'a> {
    /// 32-bit float.
    F32(&'a mut [f32]),
    /// 64-bit float.
    F64(&'a mut [f64]),
    /// 64-bit signed integer; sums wrap.
    I64(&'a mut [i64]),
    /// Byte; sums wrap.
    U8(&'a mut [u8]),
    /// bfloat16; every addition is rounded to it.
    Bf16(&'a mut [bf16]),
    /// IEEE half precision; every addition is rounded to it.
    F16(&'a mut [f16]),
    /// 32-bit signed integer; sums wrap.
    I32(&'a mut [i32]),
}

macro_rules! views {
    ($($variant:ident($element:ty)),*) => {
        impl Buffer<'_> {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(data) => data.len()),* }
            }

            /// Whether there is no element.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// What an element is.
            pub fn element(&self) -> ElementType {
                match self { $(Self::$variant(_) => ElementType::$variant),* }
            }

            pub(crate) fn as_bytes(&self) -> &[u8] {
                match self { $(Self::$variant(data) => bytemuck::cast_slice(data)),* }
            }
        }

        impl BufferMut<'_> {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(data) => data.len()),* }
            }

            /// Whether there is no element.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// What an element is.
            pub fn element(&self) -> ElementType {
                match self { $(Self::$variant(_) => ElementType::$variant),* }
            }

            /// A shorter borrow, to use the same buffer in several calls.
            pub fn reborrow(&mut self) -> BufferMut<'_> {
                match self { $(Self::$variant(data) => BufferMut::$variant(data)),* }
            }

            /// The same elements, to read.
            pub fn as_buffer(&self) -> Buffer<'_> {
                match self { $(Self::$variant(data) => Buffer::$variant(data)),* }
            }

            pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
                match self { $(Self::$variant(data) => bytemuck::cast_slice_mut(data)),* }
            }
        }

        $(
            impl<'a> From<&'a [$element]> for Buffer<'a> {
                fn from(data: &'a [$element]) -> Self {
                    Self::$variant(data)
                }
            }

            impl<'a> From<&'a Vec<$element>> for Buffer<'a> {
                fn from(data: &'a Vec<$element>) -> Self {
                    Self::$variant(data)
                }
            }

            impl<'a, const N: usize> From<&'a [$element; N]> for Buffer<'a> {
                fn from(data: &'a [$element; N]) -> Self {
                    Self::$variant(data)
                }
            }

            impl<'a> From<&'a mut [$element]> for BufferMut<'a> {
                fn from(data: &'a mut [$element]) -> Self {
                    Self::$variant(data)
                }
            }

            impl<'a> From<&'a mut Vec<$element>> for BufferMut<'a> {
                fn from(data: &'a mut Vec<$element>) -> Self {
                    Self::$variant(data)
                }
            }

            impl<'a, const N: usize> From<&'a mut [$element; N]> for BufferMut<'a> {
                fn from(data: &'a mut [$element; N]) -> Self {
                    Self::$variant(data)
                }
            }
        )*
    };
}

views!(F32(f32), F64(f64), I64(i64), U8(u8), Bf16(bf16), F16(f16), I32(i32));
