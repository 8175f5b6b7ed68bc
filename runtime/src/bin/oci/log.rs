//! Errors and warnings for whoever called: on standard error, and with --log as lines of a file, which managers read.

use crate::{Outcome, failed, invalid};
use std::io::Write;
use std::path::PathBuf;
use windlass_runtime::log::{now_ns, rfc3339_nano};

/// Where messages go.
#[derive(Debug, Default, Clone)]
pub(crate) struct Log {
    file: Option<PathBuf>,
    json: bool,
}

impl Log {
    /// Checks that the file can be written, before anything happens that has to be told.
    pub(crate) fn open(file: Option<PathBuf>, format: Option<&str>) -> Outcome<Log> {
        let json = match format {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => return Err(invalid(other, "not a format of --log-format: text or json")),
        };
        if let Some(path) = &file {
            open(path).map_err(|error| failed("open log", path, &error))?;
        }
        Ok(Log { file, json })
    }

    /// The command failed.
    pub(crate) fn error(&self, message: &str) {
        eprintln!("windlass-oci: {message}");
        self.line("error", message);
    }

    /// It goes on.
    pub(crate) fn warning(&self, message: &str) {
        if self.file.is_none() {
            eprintln!("windlass-oci: {message}");
        }
        self.line("warning", message);
    }

    fn line(&self, level: &str, message: &str) {
        let Some(file) = self.file.as_ref().and_then(|path| open(path).ok()) else { return };
        let time = rfc3339_nano(now_ns());
        let time = String::from_utf8_lossy(&time);
        let line = if self.json {
            serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
        } else {
            format!("time=\"{time}\" level={level} msg={message:?}")
        };
        // Nobody is left who could be told that this fails.
        let _ = writeln!(&file, "{line}");
    }
}

fn open(path: &std::path::Path) -> std::io::Result<std::fs::File> {
    std::fs::OpenOptions::new().append(true).create(true).open(path)
}
