//! The arithmetic of one element, the same on every rank and in every order of arrival.
//!
//! Crate-private: callers see [`crate::Buffer`]. Integer sums wrap, so they too are associative.
//! A NaN in a maximum or minimum stays a NaN: a diverged loss must not vanish in a reduction.

use crate::buffer::{Buffer, BufferMut, ElementType};

/// An element of a buffer.
pub(crate) trait Element: bytemuck::Pod {
    /// Its name on the wire.
    const TYPE: ElementType;
    /// Whether an average of it means anything.
    const DIVIDES: bool;

    fn sum(self, other: Self) -> Self;
    fn largest(self, other: Self) -> Self;
    fn smallest(self, other: Self) -> Self;
    /// Divided by a count; only called where `DIVIDES`.
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
            const DIVIDES: bool = true;

            fn sum(self, other: Self) -> Self {
                self + other
            }

            fn largest(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    Self::NAN
                } else if self.total_cmp(&other).is_lt() {
                    other
                } else {
                    self
                }
            }

            fn smallest(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    Self::NAN
                } else if self.total_cmp(&other).is_gt() {
                    other
                } else {
                    self
                }
            }

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
            const DIVIDES: bool = false;

            fn sum(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            fn largest(self, other: Self) -> Self {
                self.max(other)
            }

            fn smallest(self, other: Self) -> Self {
                self.min(other)
            }

            fn divided(self, _: u32) -> Self {
                self
            }
        }
    };
}

float!(f32, F32);
float!(f64, F64);
integer!(i64, I64);
integer!(u8, U8);

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
    }
}
