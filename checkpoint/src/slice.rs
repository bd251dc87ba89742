//! Boxes of a tensor: which part of it somebody holds or wants. Pure.
//!
//! A box is an offset and a length per dimension. It is the only kind of part there is: a range of
//! the flattened tensor, as ZeRO cuts it, is a few boxes one after another ([`Slice::of_range`]), so
//! every mesh, whatever it cuts along, is lists of boxes.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A box of a tensor. Ordered by its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// First index along each dimension.
    pub offset: Vec<u64>,
    /// Extent along each dimension.
    pub length: Vec<u64>,
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (dim, range) in self.ranges().enumerate() {
            let comma = if dim == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", range.start, range.end)?;
        }
        f.write_str("]")
    }
}

impl Slice {
    /// All of a tensor.
    pub fn whole(shape: &[u64]) -> Self {
        Self { offset: vec![0; shape.len()], length: shape.to_vec() }
    }

    /// All of a tensor but for one dimension, which is cut.
    pub fn cut(shape: &[u64], dim: usize, range: Range<u64>) -> Self {
        let mut slice = Self::whole(shape);
        if let (Some(offset), Some(length)) = (slice.offset.get_mut(dim), slice.length.get_mut(dim))
        {
            (*offset, *length) = (range.start, range.end.saturating_sub(range.start));
        }
        slice
    }

    /// The boxes that hold a range of the elements of a flattened (row-major) tensor, in its order:
    /// laid one after another they are the range. At most twice as many as dimensions, less one.
    /// What is beyond the tensor's end is left out.
    pub fn of_range(shape: &[u64], range: Range<u64>) -> Vec<Self> {
        let whole = Self::whole(shape);
        let end = range.end.min(whole.elements());
        let mut boxes = Vec::new();
        let mut start = range.start;
        while start < end {
            let slice = largest_at(&whole, start, end);
            start += slice.elements();
            boxes.push(slice);
        }
        boxes
    }

    /// Elements inside.
    pub fn elements(&self) -> u64 {
        self.length.iter().product()
    }

    /// Whether nothing is inside.
    pub fn is_empty(&self) -> bool {
        self.length.contains(&0)
    }

    /// Whether it has the tensor's dimensions and lies inside it.
    pub fn fits(&self, shape: &[u64]) -> bool {
        self.offset.len() == shape.len()
            && self.length.len() == shape.len()
            && self.offset.iter().zip(&self.length).zip(shape).all(|((offset, length), extent)| {
                offset.checked_add(*length).is_some_and(|end| end <= *extent)
            })
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.offset.iter().zip(&self.length).map(|(offset, length)| *offset..offset + length)
    }

    /// What both hold, if anything.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let mut common = self.clone();
        for (dim, (own, their)) in self.ranges().zip(other.ranges()).enumerate() {
            let range = own.start.max(their.start)..own.end.min(their.end);
            if range.is_empty() {
                return None;
            }
            (common.offset[dim], common.length[dim]) = (range.start, range.end - range.start);
        }
        Some(common)
    }

    /// What this one holds and `other` does not, as disjoint boxes: at most two per dimension.
    pub fn without(&self, other: &Self) -> Vec<Self> {
        let Some(common) = self.intersection(other) else {
            return if self.is_empty() { Vec::new() } else { vec![self.clone()] };
        };
        let mut rest = self.clone();
        let mut left = Vec::new();
        for (dim, (own, taken)) in self.ranges().zip(common.ranges()).enumerate() {
            for range in [own.start..taken.start, taken.end..own.end] {
                if !range.is_empty() {
                    let mut piece = rest.clone();
                    (piece.offset[dim], piece.length[dim]) = (range.start, range.end - range.start);
                    left.push(piece);
                }
            }
            (rest.offset[dim], rest.length[dim]) = (taken.start, taken.end - taken.start);
        }
        left
    }
}

/// The largest box that begins at element `start` of the flattened tensor, ends by `end`, and lies
/// in one piece there.
fn largest_at(whole: &Slice, start: u64, end: u64) -> Slice {
    let mut slice = Slice { offset: Vec::new(), length: vec![1; whole.length.len()] };
    let mut within = start;
    let mut inner = whole.elements();
    for extent in &whole.length {
        inner /= extent;
        slice.offset.push(within / inner);
        within %= inner;
    }
    // Dimensions from the last on: whole ones while the box begins at their first element.
    let mut inner = 1;
    for dim in (0..whole.length.len()).rev() {
        let extent = whole.length[dim];
        let count = ((end - start) / inner).min(extent - slice.offset[dim]);
        slice.length[dim] = count;
        if count < extent {
            break;
        }
        inner *= extent;
    }
    slice
}

/// Equal runs of elements at regular distances: how a box lies in two boxes that contain it, each
/// laid out row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// Elements of one run.
    pub length: u64,
    /// Runs along each outer dimension.
    pub counts: Vec<u64>,
    /// Where the first run begins in the one.
    pub source: u64,
    /// Where the first run begins in the other.
    pub destination: u64,
    /// Distance of runs along each outer dimension, in the one.
    pub source_strides: Vec<u64>,
    /// Distance of runs along each outer dimension, in the other.
    pub destination_strides: Vec<u64>,
}

impl Runs {
    /// How `slice`, which lies in both, moves from the layout of `source` to that of `destination`.
    pub fn between(slice: &Slice, source: &Slice, destination: &Slice) -> Self {
        let mut runs = Self {
            length: 1,
            counts: Vec::new(),
            source: 0,
            destination: 0,
            source_strides: Vec::new(),
            destination_strides: Vec::new(),
        };
        let (mut source_stride, mut destination_stride) = (1, 1);
        let mut in_one_piece = true;
        for dim in (0..slice.length.len()).rev() {
            let length = slice.length[dim];
            runs.source += (slice.offset[dim] - source.offset[dim]) * source_stride;
            runs.destination += (slice.offset[dim] - destination.offset[dim]) * destination_stride;
            if in_one_piece {
                runs.length *= length;
            } else if length != 1 {
                runs.counts.push(length);
                runs.source_strides.push(source_stride);
                runs.destination_strides.push(destination_stride);
            }
            in_one_piece &= length == source.length[dim] && length == destination.length[dim];
            source_stride *= source.length[dim];
            destination_stride *= destination.length[dim];
        }
        runs.counts.reverse();
        runs.source_strides.reverse();
        runs.destination_strides.reverse();
        runs
    }

    /// Begin of every run in the one and in the other, in row-major order; none when they are empty.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let runs = self.clone();
        let count = if runs.length == 0 { 0 } else { runs.counts.iter().product() };
        let mut index = vec![0; runs.counts.len()];
        let (mut source, mut destination) = (runs.source, runs.destination);
        (0..count).map(move |_| {
            let place = (source, destination);
            for dim in (0..index.len()).rev() {
                index[dim] += 1;
                source += runs.source_strides[dim];
                destination += runs.destination_strides[dim];
                if index[dim] < runs.counts[dim] {
                    break;
                }
                index[dim] = 0;
                source -= runs.counts[dim] * runs.source_strides[dim];
                destination -= runs.counts[dim] * runs.destination_strides[dim];
            }
            place
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(ranges: &[Range<u64>]) -> Slice {
        Slice {
            offset: ranges.iter().map(|range| range.start).collect(),
            length: ranges.iter().map(|range| range.end - range.start).collect(),
        }
    }

    fn cut(range: Range<u64>) -> Slice {
        Slice::cut(&[9], 0, range)
    }

    /// The elements of a box, by their place in the flattened tensor.
    fn flat(slice: &Slice, shape: &[u64]) -> Vec<u64> {
        let runs = Runs::between(slice, &Slice::whole(shape), slice);
        runs.iter().flat_map(|(start, _)| start..start + runs.length).collect()
    }

    #[test]
    fn every_flat_range_is_a_few_boxes_in_order() {
        for shape in [&[][..], &[7], &[3, 4], &[2, 3, 4], &[2, 1, 3, 2], &[1, 1], &[4, 0]] {
            let elements: u64 = shape.iter().product();
            for start in 0..=elements {
                for end in start..=elements {
                    let boxes = Slice::of_range(shape, start..end);
                    let place = format!("{start}..{end} of {shape:?}: {boxes:?}");
                    assert!(boxes.len() < (2 * shape.len()).max(2), "{place}");
                    assert!(boxes.iter().all(|slice| slice.fits(shape)), "{place}");
                    let found: Vec<u64> = boxes.iter().flat_map(|b| flat(b, shape)).collect();
                    assert_eq!(found, (start..end).collect::<Vec<_>>(), "{place}");
                }
            }
        }
        assert_eq!(Slice::of_range(&[2], 1..9), [cut(1..2)]);
    }

    #[test]
    fn what_is_left_and_what_is_common_make_the_whole() {
        let shape = [4, 5, 3];
        let whole = Slice::whole(&shape);
        for other in
            [slice(&[1..3, 0..2, 1..2]), slice(&[0..4, 2..5, 0..3]), slice(&[3..4, 3..4, 2..3])]
        {
            let common = whole.intersection(&other);
            let parts: Vec<Slice> = whole.without(&other).into_iter().chain(common).collect();
            let mut found: Vec<u64> = parts.iter().flat_map(|part| flat(part, &shape)).collect();
            found.sort_unstable();
            assert_eq!(found, (0..60).collect::<Vec<_>>(), "{other}");
        }
        assert_eq!(whole.without(&whole), []);
        assert_eq!(cut(0..2).intersection(&cut(2..3)), None);
        assert_eq!(cut(0..2).without(&cut(2..3)), [cut(0..2)]);
        assert_eq!(Slice::whole(&[]).without(&Slice::whole(&[])), [], "a scalar");
    }

    #[test]
    fn runs_are_as_long_as_both_layouts_allow() {
        let shape = [4, 6, 5];
        let whole = Slice::whole(&shape);
        let rows = slice(&[1..3, 0..6, 0..5]);
        let runs = Runs::between(&rows, &whole, &rows);
        assert_eq!((runs.length, runs.source, runs.destination), (60, 30, 0));
        assert_eq!(runs.iter().collect::<Vec<_>>(), [(30, 0)]);
        let columns = slice(&[0..4, 0..6, 2..4]);
        let runs = Runs::between(&columns, &whole, &columns);
        assert_eq!((runs.length, runs.counts.clone()), (2, vec![4, 6]));
        assert_eq!(runs.iter().nth(7), Some((37, 14)));
        let middle = slice(&[1..2, 2..4, 0..5]);
        assert_eq!(Runs::between(&middle, &whole, &rows).iter().collect::<Vec<_>>(), [(40, 10)]);
        assert_eq!(slice(&[1..2, 2..4]).to_string(), "[1:2,2:4]");
        assert!(!cut(1..5).fits(&[4]) && !cut(1..2).fits(&[4, 4]));
    }
}
