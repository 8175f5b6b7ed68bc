//! execve(2), with everything allocated beforehand: a seccomp filter may forbid what malloc calls.

use rustix::io::Errno;
use std::ffi::{CStr, CString, c_char};
use std::marker::PhantomData;

/// A program with its arguments and environment in the kernel's form.
#[derive(Debug)]
pub struct Image<'a> {
    path: &'a CStr,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    strings: PhantomData<&'a CString>,
}

impl<'a> Image<'a> {
    /// Prepares the call.
    pub fn new(path: &'a CStr, arguments: &'a [CString], environment: &'a [CString]) -> Image<'a> {
        let pointers =
            |strings: &'a [CString]| strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
        Image { path, arguments: pointers(arguments), environment: pointers(environment), strings: PhantomData }
    }

    /// Replaces the calling process; returns only why it could not.
    pub fn execute(&self) -> Errno {
        // SAFETY: the three pointers are to NUL-terminated strings and null-terminated arrays of such, all alive as long as `self`.
        unsafe { libc::execve(self.path.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
        super::process::last_errno()
    }
}
