//! What a path of a request must be, whatever it is for.

use crate::error::{Error, Result};

/// Longest path and longest name in it (linux/limits.h, without the closing NUL).
const PATH_MAX_BYTES: usize = 4095;
const NAME_MAX_BYTES: usize = 255;

/// Refuses what the kernel could not look up. `field` as the message shall name it.
pub(super) fn check(field: &str, path: &str) -> Result<()> {
    let why = if !path.starts_with('/') {
        "is not absolute"
    } else if path.contains('\0') {
        "contains a NUL byte"
    } else if path.len() > PATH_MAX_BYTES || path.split('/').any(|name| name.len() > NAME_MAX_BYTES) {
        "is too long"
    } else {
        return Ok(());
    };
    let shown: String = path.chars().take(80).collect();
    Err(Error::invalid(format!("{field} {shown:?} {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_no_kernel_takes_are_named() {
        check("working_dir", "/a/b").expect("a path");
        check("working_dir", &"/x".repeat(2047)).expect("as long as may be");
        for bad in ["", "a/b", "/a\0b", &"/x".repeat(2048), &format!("/{}", "x".repeat(256))] {
            let error = check("working_dir", bad).expect_err("refused");
            assert!(error.message.starts_with("working_dir"), "{error}");
        }
    }
}
