//! Finds the text files of folders, in an order that is the same on every machine.

use std::path::{Path, PathBuf};

use super::limits::{FILES_MAX, FOLDER_DEPTH_MAX};
use super::source::Source;
use crate::error::DataError;

/// The byte between two files of byte-level tokens; no text file holds it.
pub(super) const SEPARATOR: u8 = 0;

/// Regular files under `inputs`: inputs in the given order, folders walked in order of names,
/// hidden entries and symbolic links left out. `extensions` (without the dot; empty: all) choose
/// among the files of folders; a file that is an input itself is always taken.
pub(super) fn gather(
    channel: Option<&str>,
    inputs: &[PathBuf],
    extensions: &[String],
) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for input in inputs {
        let source = Source { channel, path: input };
        if source.is_folder()? {
            walk(&source, extensions, 0, &mut files)?;
        } else {
            files.push(input.clone());
        }
    }
    Ok(files)
}

fn walk(
    folder: &Source<'_>,
    extensions: &[String],
    depth: usize,
    files: &mut Vec<PathBuf>,
) -> Result<(), DataError> {
    if depth > FOLDER_DEPTH_MAX {
        return Err(folder.malformed(format!("lies more than {FOLDER_DEPTH_MAX} folders deep")));
    }
    for path in folder.entries(FILES_MAX)? {
        let source = folder.at(&path);
        let kind = std::fs::symlink_metadata(&path).map_err(|e| source.unreadable(e))?.file_type();
        if kind.is_dir() {
            walk(&source, extensions, depth + 1, files)?;
        } else if kind.is_file() && is_chosen(&path, extensions) {
            if files.len() == FILES_MAX {
                return Err(folder.malformed(format!("holds more than {FILES_MAX} files")));
            }
            files.push(path);
        }
    }
    Ok(())
}

fn is_chosen(path: &Path, extensions: &[String]) -> bool {
    extensions.is_empty()
        || path.extension().is_some_and(|found| extensions.iter().any(|e| found == e.as_str()))
}

/// The text of a file, or `None` when it is empty or not UTF-8.
pub(super) fn read(source: &Source<'_>, limit: u64) -> Result<Option<String>, DataError> {
    let text = String::from_utf8(source.read_as_is(limit)?).ok();
    Ok(text.filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_names_and_links_are_left_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        for path in ["b/z.rs", "b/a.rs", "a.rs", "b.rs", "c.txt", ".git/x.rs", "b-c/y.rs"] {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().expect("in the folder")).expect("creates");
            std::fs::write(path, "x").expect("writes");
        }
        std::os::unix::fs::symlink(root, root.join("b/loop")).expect("links");
        let names = |extensions: &[String], inputs: &[PathBuf]| -> Vec<String> {
            let files = gather(None, inputs, extensions).expect("walks");
            let name = |p: &PathBuf| p.strip_prefix(root).expect("under it").display().to_string();
            files.iter().map(name).collect()
        };
        let rust = ["rs".to_owned()];
        let expected = ["a.rs", "b/a.rs", "b/z.rs", "b-c/y.rs", "b.rs"];
        assert_eq!(names(&rust, &[root.to_owned()]), expected);
        let given = [root.join("c.txt"), root.join("b")];
        assert_eq!(names(&rust, &given), ["c.txt", "b/a.rs", "b/z.rs"]);
        assert_eq!(names(&[], &[root.to_owned()]).len(), 6);
    }
}
