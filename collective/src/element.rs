//! The arithmetic of one element, the same on every rank and in every order of arrival.
//!
//! Crate-private: callers see [`crate::Buffer`]. Integer sums wrap, so they too are associative.
//! A NaN in a maximum or minimum stays a NaN: a diverged loss must not vanish in a reduction.

use half::{bf16, f16};

use crate::buffer::{Buffer, BufferMut, ElementType};

/// An element of a buffer.
pub(crate) trait Element: bytemuck::Pod {
    /// Its name on the wire.
    const TYPE: ElementType;

    fn sum(self, other: Self) -> Self;
    fn largest(self, other: Self) -> Self;
    fn smallest(self, other: Self) -> Self;
    /// Divided by a count; only called for floats.
    fn divided(self, by: u32) -> Self;
    /// The view of this type, if the buffer has it.
    fn view(buffer: Buffer<'_>) -> Option<&[Self]>;
    /// The mutable view of this type, if the buffer has it.
    fn view_mut(buffer: BufferMut<'_>) -> Option<&mut [Self]>;
}

macro_rules! views {
    ($variant:ident) => {
        const TYPE: ElementType = ElementType::$variant;

        fn view(buffer: Buffer<'_>) -> Option<&[Self]> {
            if let Buffer::$variant(data) = buffer { Some(data) } else { None }
        }

        fn view_mut(buffer: BufferMut<'_>) -> Option<&mut [Self]> {
            if let BufferMut::$variant(data) = buffer { Some(data) } else { None }
        }
    };
}

macro_rules! float {
    ($float:ident, $variant:ident) => {
        impl Element for $float {
            views!($variant);

            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self + other
            }

            #[inline(always)]
            fn largest(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    Self::NAN
                } else if self.total_cmp(&other).is_lt() {
                    other
                } else {
                    self
                }
            }

            #[inline(always)]
            fn smallest(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    Self::NAN
                } else if self.total_cmp(&other).is_gt() {
                    other
                } else {
                    self
                }
            }

            #[inline(always)]
            #[allow(clippy::cast_lossless, reason = "u32 to f32 rounds, the same everywhere")]
            fn divided(self, by: u32) -> Self {
                self / by as $float
            }
        }
    };
}

macro_rules! integer {
    ($integer:ident, $variant:ident) => {
        impl Element for $integer {
            views!($variant);

            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn largest(self, other: Self) -> Self {
                self.max(other)
            }

            #[inline(always)]
            fn smallest(self, other: Self) -> Self {
                self.min(other)
            }

            #[inline(always)]
            fn divided(self, _: u32) -> Self {
                self
            }
        }
    };
}

/// Half precision: computed in f32 and rounded at once, so that every order of arrival and every
/// transport rounds at the same places.
macro_rules! half_float {
    ($float:ident, $variant:ident, $narrow:path) => {
        impl Element for $float {
            views!($variant);

            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                $narrow(self.to_f32() + other.to_f32())
            }

            #[inline(always)]
            fn largest(self, other: Self) -> Self {
                $narrow(self.to_f32().largest(other.to_f32()))
            }

            #[inline(always)]
            fn smallest(self, other: Self) -> Self {
                $narrow(self.to_f32().smallest(other.to_f32()))
            }

            #[inline(always)]
            fn divided(self, by: u32) -> Self {
                $narrow(self.to_f32().divided(by))
            }
        }
    };
}

/// Round to nearest even without a branch, so that it vectorises; NaNs stay NaNs.
#[inline(always)]
fn narrow_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { quiet as u16 } else { rounded as u16 })
}

float!(f32, F32);
float!(f64, F64);
half_float!(bf16, Bf16, narrow_bf16);
half_float!(f16, F16, f16::from_f32);
integer!(i64, I64);
integer!(i32, I32);
integer!(u8, U8);

/// Runs a body with a name set to the type of the elements of a buffer.
macro_rules! with_element {
    ($buffer:expr, $element:ident => $body:expr) => {
        with_element!(@ $buffer, $element, $body,
            F32: f32, F64: f64, I64: i64, U8: u8, Bf16: half::bf16, F16: half::f16, I32: i32)
    };
    (@ $buffer:expr, $element:ident, $body:expr, $($variant:ident: $type:ty),*) => {
        match $buffer.element() {
            $(crate::buffer::ElementType::$variant => {
                type $element = $type;
                $body
            })*
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_keep_nan_and_order_zeros_whatever_the_side() {
        assert!(f32::NAN.largest(1.0).is_nan());
        assert!(1.0f64.smallest(f64::NAN).is_nan());
        for (a, b) in [(0.0f32, -0.0f32), (-0.0, 0.0)] {
            assert_eq!(a.largest(b).to_bits(), 0.0f32.to_bits());
            assert_eq!(a.smallest(b).to_bits(), (-0.0f32).to_bits());
        }
        assert_eq!(i64::MAX.sum(1), i64::MIN);
        assert_eq!(255u8.sum(2), 1);
        assert_eq!(i32::MAX.sum(1), i32::MIN);
        assert!(bf16::NAN.smallest(bf16::ONE).is_nan());
    }

    #[test]
    fn bf16_rounds_as_the_standard_conversion_does() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let (ours, theirs) = (narrow_bf16(value), bf16::from_f32(value));
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{value:?}");
            }
        }
    }
}
