//! The program of a container: found in its own root by its own PATH, with an error that a person can act on.

use super::{Kind, StepError};
use crate::security::Filter;
use crate::sys::exec::Image;
use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;
use std::convert::Infallible;
use std::ffi::CString;

/// PATH of a process whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that is ready to run: nothing is allocated or looked up any more.
#[derive(Debug)]
pub(super) struct Entrypoint {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Entrypoint {
    /// Finds args[0] as the user that the process already is, in the root that it already has.
    pub(super) fn find(process: &Process) -> Result<Entrypoint, StepError> {
        let arguments = process.args().as_deref().unwrap_or_default();
        let name = arguments.first().map(String::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(StepError::because(Kind::Invalid, "find the program", "", "no arguments"));
        }
        let environment = process.env().as_deref().unwrap_or_default();
        let path = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        let found = locate(name, path)?;
        Ok(Entrypoint { path: text(&found)?, arguments: texts(arguments)?, environment: texts(environment)? })
    }

    /// Replaces the calling process. The filter is loaded last of all: it may forbid whatever is not exec.
    pub(super) fn execute(&self, filter: Option<&Filter>) -> Result<Infallible, StepError> {
        let image = Image::new(&self.path, &self.arguments, &self.environment);
        if let Some(filter) = filter {
            filter.load()?;
        }
        let errno = image.execute();
        let mut error = StepError::errno("exec", self.path.to_string_lossy(), errno.raw_os_error()).kind(Kind::Entrypoint);
        error.message = match errno {
            Errno::NOENT => "its interpreter or dynamic linker is not in the container".into(),
            Errno::NOEXEC => "not a program of this machine, or a script without #!".into(),
            Errno::TOOBIG => {
                "an argument or variable is longer than 128 KiB, or all together than the stack's limit allows".into()
            }
            Errno::ACCESS => "not executable by this user, or on a file system mounted noexec".into(),
            _ => String::new(),
        };
        Err(error)
    }
}

fn locate(name: &str, path: &str) -> Result<String, StepError> {
    if name.contains('/') {
        return executable(name).map(|()| name.to_owned()).map_err(|errno| refused(name, errno, String::new()));
    }
    let mut worst = Errno::NOENT;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{directory}/{name}");
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => worst = errno,
        }
    }
    Err(refused(name, worst, format!(" in PATH ({path})")))
}

fn executable(path: &str) -> Result<(), Errno> {
    let found = stat(path)?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn refused(name: &str, errno: Errno, place: String) -> StepError {
    let mut error = StepError::errno("exec", format!("{name:?}"), errno.raw_os_error()).kind(Kind::Entrypoint);
    error.message = match errno {
        Errno::NOENT | Errno::NOTDIR => format!("executable file not found{place}"),
        Errno::ACCESS => format!("not executable by this user{place}"),
        Errno::ISDIR => "is a directory".into(),
        _ => format!("cannot be run{place}"),
    };
    error
}

fn text(value: &str) -> Result<CString, StepError> {
    CString::new(value).map_err(|_| StepError::because(Kind::Invalid, "exec", value.escape_debug(), "contains a NUL byte"))
}

fn texts(values: &[String]) -> Result<Vec<CString>, StepError> {
    values.iter().map(|value| text(value)).collect()
}
