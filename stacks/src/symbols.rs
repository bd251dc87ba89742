//! The names of return addresses.

use api::stacks::{FUNCTION_BYTES_MAX, StackFrame};

/// The functions at a return address, the innermost first: several where the compiler has put one into
/// another.
pub(crate) fn of(address: usize) -> Vec<StackFrame> {
    let mut frames = Vec::new();
    // A return address is that of the instruction after the call, which may be another function's.
    let inside = address.saturating_sub(1) as *mut std::ffi::c_void;
    backtrace::resolve(inside, |symbol| {
        let name = symbol.name().map(|name| clip(&format!("{name:#}")));
        frames.push(StackFrame {
            function: name.unwrap_or_else(|| format!("{address:#x}")),
            file: symbol.filename().map(|path| short(&path.to_string_lossy()).to_owned()),
            line: symbol.lineno(),
        });
    });
    if frames.is_empty() {
        frames.push(StackFrame { function: format!("{address:#x}"), ..StackFrame::default() });
    }
    frames
}

/// A path from where it begins to say something: a crate's folder rather than where it lay when the binary
/// was built.
fn short(path: &str) -> &str {
    // The crate, its folder of sources, the file; or a folder and a file.
    let from = path.rfind("/src/").or_else(|| path.rfind('/')).unwrap_or(0);
    path[..from].rfind('/').filter(|_| path.starts_with('/')).map_or(path, |at| &path[at + 1..])
}

/// A name of bounded length; what is cut is in the middle of generic arguments.
fn clip(name: &str) -> String {
    if name.len() <= FUNCTION_BYTES_MAX {
        return name.to_owned();
    }
    let end = (0..=FUNCTION_BYTES_MAX - 3).rev().find(|end| name.is_char_boundary(*end));
    format!("{}…", &name[..end.unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_names_are_short() {
        assert_eq!(short("/home/a/cohort/trainer/src/train.rs"), "trainer/src/train.rs");
        assert_eq!(short("/x/rayon-core-1.13.0/src/job.rs"), "rayon-core-1.13.0/src/job.rs");
        assert_eq!(short("/home/a/cohort/cli/main.rs"), "cli/main.rs");
        assert_eq!(short("trainer/src/train.rs"), "trainer/src/train.rs");
        assert_eq!(short("main.c"), "main.c");
        assert_eq!(clip(&"é".repeat(300)).len(), FUNCTION_BYTES_MAX - 4 + 3);
        assert_eq!(clip("a::b"), "a::b");
    }
}
