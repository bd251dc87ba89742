//! The idx format of MNIST and its relatives (<http://yann.lecun.com/exdb/mnist/>): a big-endian
//! header of magic number and dimensions, then bytes. Images and labels are two files.

use std::path::{Path, PathBuf};

use super::geometry::{ImageGeometry, planar};
use super::images::{ImageStore, Shape, check_shape};
use super::limits::{CHANNEL_BYTES_MAX, FILES_MAX};
use super::source::Source;
use crate::error::DataError;

/// Unsigned bytes in three dimensions: images, rows, columns.
const MAGIC_GREY: u32 = 0x0803;
/// Unsigned bytes in four dimensions: images, rows, columns, channels.
const MAGIC_COLOUR: u32 = 0x0804;
/// Unsigned bytes in one dimension: labels.
const MAGIC_LABELS: u32 = 0x0801;

/// Whether the name is that of an images file: `train-images-idx3-ubyte.gz`,
/// `t10k-images.idx3-ubyte` and the like.
pub(super) fn is_images_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.contains("images") && (name.contains("idx3") || name.contains("idx4"))
}

/// Reads the images file at the source, or the one in its folder, and the labels file beside it.
pub(super) fn read(
    source: &Source<'_>,
    expect: Option<&ImageGeometry>,
) -> Result<ImageStore, DataError> {
    let images_path =
        if source.is_folder()? { find_images(source)? } else { source.path.to_owned() };
    let images_source = source.at(&images_path);
    let labels_path = find_labels(&images_source)?;
    let labels_source = source.at(&labels_path);

    let images = images_source.read(CHANNEL_BYTES_MAX)?;
    let (dimensions, pixels) =
        body(&images, &[MAGIC_GREY, MAGIC_COLOUR]).map_err(|m| images_source.malformed(m))?;
    let labels = labels_source.read(CHANNEL_BYTES_MAX)?;
    let (label_count, labels) =
        body(&labels, &[MAGIC_LABELS]).map_err(|m| labels_source.malformed(m))?;
    if label_count[0] != dimensions[0] {
        return Err(labels_source.malformed(format!(
            "holds {} labels, expected {}, one per image of `{}`",
            label_count[0],
            dimensions[0],
            images_path.display()
        )));
    }

    let channels = dimensions.get(3).copied().unwrap_or(1);
    let shape = Shape::new(dimensions[1], dimensions[2], channels)
        .and_then(|shape| check_shape(shape, expect).map(|()| shape))
        .map_err(|m| images_source.malformed(m))?;
    let mut store = ImageStore { white: Some(255.0), ..ImageStore::new(shape, expect) };
    for (at, (image, label)) in pixels.chunks_exact(shape.values()).zip(labels).enumerate() {
        store.pixels.extend_bytes(&planar(image, channels));
        let class = store.labels.number(&label.to_string());
        let class = class.map_err(|m| labels_source.malformed(format!("image {at}: {m}")))?;
        store.classes.push(class);
    }
    Ok(store)
}

/// Dimensions and content of an idx file. The header may say anything: it is compared with the
/// length that is really there.
fn body<'a>(file: &'a [u8], magics: &[u32]) -> Result<(Vec<usize>, &'a [u8]), String> {
    let word = |at: usize| -> Option<u32> {
        let bytes = file.get(4 * at..4 * at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let ended = || format!("has {} bytes, too few for an idx header", file.len());
    let magic = word(0).ok_or_else(ended)?;
    if !magics.contains(&magic) {
        let expected: Vec<String> = magics.iter().map(|m| format!("{m:#06x}")).collect();
        return Err(format!("begins with {magic:#010x}, expected {}", expected.join(" or ")));
    }
    // The magic's lowest byte is the number of dimensions.
    let count = (magic & 0xff) as usize;
    let dimensions: Vec<usize> = (1..=count)
        .map(|at| word(at).map(|d| d as usize))
        .collect::<Option<_>>()
        .ok_or_else(ended)?;
    let content = &file[4 * (count + 1)..];
    let promised = dimensions.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
    let shown = dimensions.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
    match promised {
        Some(promised) if promised == content.len() => Ok((dimensions, content)),
        Some(promised) => Err(format!(
            "the header promises {shown} = {promised} bytes, found {}: is the file cut off?",
            content.len()
        )),
        None => Err(format!("the header promises {shown} bytes, found {}", content.len())),
    }
}

/// The images file of a folder. Where it holds a training and a test set, the channel's name tells.
fn find_images(source: &Source<'_>) -> Result<PathBuf, DataError> {
    let mut found = source.entries(FILES_MAX)?;
    found.retain(|path| is_images_file(path));
    if found.len() > 1 {
        let wanted: &[&str] = match source.channel {
            Some("train") => &["train"],
            _ => &["t10k", "test", "validation"],
        };
        let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
        let is_wanted = |path: &PathBuf| {
            name(path).is_some_and(|name| wanted.iter().any(|prefix| name.starts_with(prefix)))
        };
        let chosen: Vec<PathBuf> = found.iter().filter(|p| is_wanted(p)).cloned().collect();
        if chosen.len() != 1 {
            let names: Vec<String> = found.iter().filter_map(|p| name(p)).collect();
            return Err(source.malformed(format!(
                "holds several idx files of images ({}): name one of them in the channel's uri",
                names.join(", ")
            )));
        }
        found = chosen;
    }
    found.pop().ok_or_else(|| {
        source.malformed("holds no idx file of images, such as `train-images-idx3-ubyte.gz`")
    })
}

/// The labels file beside an images file, compressed or not.
fn find_labels(images: &Source<'_>) -> Result<PathBuf, DataError> {
    let name = images.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let labels = name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1");
    let plain = labels.strip_suffix(".gz").unwrap_or(&labels).to_owned();
    let candidates = [labels, plain.clone(), format!("{plain}.gz")];
    let paths = candidates.iter().filter(|c| **c != name).map(|c| images.path.with_file_name(c));
    let mut paths = paths.filter(|path| path.is_file());
    paths.next().ok_or_else(|| {
        images.malformed(format!("expected its labels beside it, in `{plain}` or `{plain}.gz`"))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::data::{AugmentOptions, ImageDataset, open_images};
    use crate::dataset::Dataset;

    fn file(magic: u32, dimensions: &[u32], content: &[u8]) -> Vec<u8> {
        let words = std::iter::once(&magic).chain(dimensions);
        words.flat_map(|w| w.to_be_bytes()).chain(content.iter().copied()).collect()
    }

    fn write(path: &Path, content: &[u8]) {
        if path.extension().is_some_and(|e| e == "gz") {
            let file = std::fs::File::create(path).expect("creates");
            let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
            gzip.write_all(content).expect("writes");
            gzip.finish().expect("ends");
        } else {
            std::fs::write(path, content).expect("writes");
        }
    }

    fn open(
        path: &Path,
        channel: &str,
        expect: Option<&ImageGeometry>,
    ) -> Result<ImageDataset, String> {
        open_images(channel, path, None, expect, AugmentOptions::default())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn folders_and_files_plain_and_compressed_give_the_same_set() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let images = file(MAGIC_GREY, &[3, 2, 1], &[0, 255, 1, 2, 3, 4]);
        let labels = file(MAGIC_LABELS, &[3], &[10, 9, 10]);
        write(&at("train-images-idx3-ubyte.gz"), &images);
        write(&at("train-labels-idx1-ubyte"), &labels);
        write(&at("t10k-images-idx3-ubyte"), &file(MAGIC_GREY, &[1, 2, 1], &[7, 8]));
        write(&at("t10k-labels-idx1-ubyte.gz"), &file(MAGIC_LABELS, &[1], &[9]));
        let train = open(folder.path(), "train", None).expect("reads");
        assert_eq!((train.len(), train.geometry().labels.join(" ")), (3, "9 10".into()));
        let named = open(&at("train-images-idx3-ubyte.gz"), "x", None).expect("reads");
        assert_eq!(named.digest(), train.digest());
        let validation = open(folder.path(), "validation", Some(train.geometry())).expect("fits");
        assert_eq!(validation.geometry(), train.geometry());
        assert_ne!(validation.digest(), train.digest());

        write(&at("t10k-labels-idx1-ubyte.gz"), &file(MAGIC_LABELS, &[1], &[4]));
        let error = open(folder.path(), "validation", Some(train.geometry())).expect_err("unseen");
        assert!(error.contains("image 0: label `4` is not among the 2"), "{error}");
        write(&at("t10k-images-idx3-ubyte"), &file(MAGIC_GREY, &[1, 1, 2], &[7, 8]));
        let error = open(folder.path(), "validation", Some(train.geometry())).expect_err("shape");
        assert!(error.contains("images of 1x2x1") && error.contains("expected 2x1x1"), "{error}");
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let (images, labels) =
            (folder.path().join("images-idx3-ubyte"), folder.path().join("labels-idx1-ubyte"));
        write(&labels, &file(MAGIC_LABELS, &[2], &[0, 1]));
        let huge = file(MAGIC_GREY, &[u32::MAX, u32::MAX, u32::MAX], &[0; 8]);
        let zero = file(MAGIC_GREY, &[2, 0, 4], &[]);
        for (content, message) in [
            (file(MAGIC_GREY, &[2, 2, 2], &[0; 7]), "promises 2x2x2 = 8 bytes, found 7"),
            (file(MAGIC_GREY, &[2, 2, 2], &[0; 9]), "promises 2x2x2 = 8 bytes, found 9"),
            (huge, "promises 4294967295x4294967295x4294967295 bytes, found 8"),
            (zero, "images of 0x4x1 values"),
            (file(MAGIC_GREY, &[1, 2, 2], &[0; 4]), "holds 2 labels, expected 1"),
            (file(0x0d03, &[2, 2, 2], &[0; 8]), "begins with 0x00000d03, expected 0x0803"),
            (vec![0, 0, 8], "has 3 bytes, too few"),
            (file(MAGIC_GREY, &[2, 2], &[]), "too few for an idx header"),
            (vec![], "has 0 bytes, too few"),
        ] {
            write(&images, &content);
            let error = open(folder.path(), "train", None).expect_err(message);
            assert!(error.contains(message), "found `{error}`, expected `{message}`");
        }
        std::fs::remove_file(&labels).expect("removes");
        let error = open(&images, "train", None).expect_err("no labels");
        assert!(error.contains("`labels-idx1-ubyte` or `labels-idx1-ubyte.gz`"), "{error}");
    }
}
