//! A folder with one folder of PNG or JPEG files per class. The first image gives the shape; the
//! others are resized to it.

use std::io::Cursor;
use std::path::PathBuf;

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits};
use rayon::prelude::*;

use super::geometry::{ImageGeometry, planar};
use super::images::{ImageStore, Shape};
use super::limits::{FILES_MAX, PICTURE_ALLOCATION_MAX, PICTURE_FILE_BYTES_MAX, PICTURE_SIDE_MAX};
use super::source::{Source, has_extension};
use crate::error::DataError;

/// Images decoded in parallel before they are appended in order; bounds what is held twice.
const CHUNK: usize = 256;

/// Reads the folder; classes and files in order of their names.
pub(super) fn read(
    source: &Source<'_>,
    expect: Option<&ImageGeometry>,
) -> Result<ImageStore, DataError> {
    let files = files(source)?;
    let shape = match (expect, files.first()) {
        (Some(geometry), _) => Shape::from(geometry),
        (None, Some((_, path))) => first_shape(&source.at(path))?,
        (None, None) => return Err(source.malformed("holds no image")),
    };
    let mut store = ImageStore { white: Some(255.0), ..ImageStore::new(shape, expect) };
    for chunk in files.chunks(CHUNK) {
        store.check_room().map_err(|m| source.malformed(m))?;
        let decoded: Vec<Result<Vec<u8>, DataError>> =
            chunk.par_iter().map(|(_, path)| read_picture(&source.at(path), shape)).collect();
        for (pixels, (label, path)) in decoded.into_iter().zip(chunk) {
            store.pixels.extend_bytes(&planar(&pixels?, shape.channels));
            let class = store.labels.number(label);
            store.classes.push(class.map_err(|m| source.at(path).malformed(m))?);
        }
    }
    Ok(store)
}

/// Every image with its label.
fn files(source: &Source<'_>) -> Result<Vec<(String, PathBuf)>, DataError> {
    let mut files = Vec::new();
    for folder in source.entries(FILES_MAX)?.into_iter().filter(|path| path.is_dir()) {
        let class = source.at(&folder);
        let label = folder.file_name().unwrap_or_default();
        let label = label.to_str().ok_or_else(|| class.malformed("the name is not UTF-8"))?;
        let before = files.len();
        for path in class.entries(FILES_MAX - before)? {
            if has_extension(&path, &["png", "jpg", "jpeg"]) && path.is_file() {
                files.push((label.to_owned(), path));
            } else {
                tracing::warn!(path = %path.display(), "left out: not a PNG or JPEG file");
            }
        }
        if files.len() == before {
            return Err(class.malformed("holds no PNG or JPEG file: a class without images"));
        }
    }
    if files.is_empty() {
        return Err(source.malformed("expected one folder of PNG or JPEG files per class"));
    }
    Ok(files)
}

fn first_shape(source: &Source<'_>) -> Result<Shape, DataError> {
    let fault = |message: String| source.malformed(message);
    let picture = decode(&source.read(PICTURE_FILE_BYTES_MAX)?).map_err(fault)?;
    let channels = if picture.color().has_color() { 3 } else { 1 };
    Shape::new(picture.height() as usize, picture.width() as usize, channels).map_err(fault)
}

fn read_picture(source: &Source<'_>, shape: Shape) -> Result<Vec<u8>, DataError> {
    let bytes = source.read(PICTURE_FILE_BYTES_MAX)?;
    decode(&bytes)
        .and_then(|picture| values(picture, shape.height, shape.width, shape.channels))
        .map_err(|message| source.malformed(message))
}

/// Decodes a PNG or JPEG file within bounds; the format is told by the content.
pub(super) fn decode(bytes: &[u8]) -> Result<DynamicImage, String> {
    let mut limits = Limits::no_limits();
    limits.max_image_width = Some(PICTURE_SIDE_MAX);
    limits.max_image_height = Some(PICTURE_SIDE_MAX);
    limits.max_alloc = Some(PICTURE_ALLOCATION_MAX);
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| format!("not a PNG or JPEG image: {e}"))?;
    reader.limits(limits);
    reader.decode().map_err(|e| format!("not a usable PNG or JPEG image: {e}"))
}

/// 8-bit values in rows, channel last, of a picture brought to a shape. Transparency is dropped.
pub(super) fn values(
    picture: DynamicImage,
    height: usize,
    width: usize,
    channels: usize,
) -> Result<Vec<u8>, String> {
    let side = |n: usize| u32::try_from(n).map_err(|_| format!("{n} pixels are too many"));
    let (rows, columns) = (side(height)?, side(width)?);
    // Colours first: resizing a palette's or 16-bit image afterwards is the same for all files.
    let picture = match channels {
        1 => DynamicImage::ImageLuma8(picture.into_luma8()),
        3 => DynamicImage::ImageRgb8(picture.into_rgb8()),
        _ => return Err(format!("cannot make {channels} channels of a picture, only 1 or 3")),
    };
    let picture = if (picture.height(), picture.width()) == (rows, columns) {
        picture
    } else {
        picture.resize_exact(columns, rows, FilterType::Triangle)
    };
    Ok(picture.into_bytes())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::{AugmentOptions, ImageDataset, open_images};
    use crate::dataset::Dataset;

    fn write_grey(path: &Path, width: u32, height: u32, pixels: &[u8]) {
        let picture = image::GrayImage::from_raw(width, height, pixels.to_vec()).expect("the size");
        picture.save(path).expect("writes");
    }

    fn open(path: &Path, expect: Option<&ImageGeometry>) -> Result<ImageDataset, String> {
        open_images("train", path, Some("image/*"), expect, AugmentOptions::default())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn folders_are_classes_and_sizes_follow_the_first() {
        let folder = tempfile::tempdir().expect("a folder");
        for class in ["cat", "dog", ".hidden"] {
            std::fs::create_dir(folder.path().join(class)).expect("creates");
        }
        write_grey(&folder.path().join("cat/a.png"), 2, 1, &[10, 20]);
        write_grey(&folder.path().join("dog/b.png"), 4, 2, &[7; 8]);
        std::fs::write(folder.path().join("dog/notes.txt"), "x").expect("writes");
        let colour = image::RgbImage::from_raw(2, 1, vec![200; 6]).expect("the size");
        colour.save(folder.path().join("dog/c.jpg")).expect("writes");
        let set = open(folder.path(), None).expect("reads");
        assert_eq!((set.len(), set.geometry().labels.join(" ")), (3, "cat dog".into()));
        assert_eq!(set.geometry().to_string(), "1x2x1");

        let geometry = ImageGeometry { mean: 0.0, std: 1.0, ..set.geometry().clone() };
        let bytes = std::fs::read(folder.path().join("dog/b.png")).expect("reads");
        assert_eq!(geometry.input_of_picture(&bytes).expect("resized"), [7.0; 2]);

        let narrower = ImageGeometry { labels: vec!["cat".into()], ..set.geometry().clone() };
        let error = open(folder.path(), Some(&narrower)).expect_err("unknown label");
        assert!(error.contains("b.png") && error.contains("label `dog`"), "{error}");
    }

    #[test]
    fn broken_pictures_and_empty_classes_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = open(folder.path(), None).expect_err("empty");
        assert!(error.contains("one folder of PNG or JPEG files per class"), "{error}");
        std::fs::create_dir(folder.path().join("a")).expect("creates");
        let error = open(folder.path(), None).expect_err("empty class");
        assert!(error.contains("a class without images"), "{error}");
        let path = folder.path().join("a/a.png");
        write_grey(&path, 2, 2, &[1, 2, 3, 4]);
        let whole = std::fs::read(&path).expect("reads");
        std::fs::write(&path, &whole[..whole.len() / 2]).expect("writes");
        let error = open(folder.path(), None).expect_err("cut off");
        assert!(error.contains("a.png") && error.contains("not a usable PNG"), "{error}");
        // The header alone claims 2^31 - 1 columns.
        let mut huge = whole;
        huge[16..20].copy_from_slice(&0x7fff_ffffu32.to_be_bytes());
        std::fs::write(&path, &huge).expect("writes");
        assert!(open(folder.path(), None).is_err());
        let error = open(&path, None).expect_err("a file");
        assert!(error.contains("is a file, expected"), "{error}");
    }
}
