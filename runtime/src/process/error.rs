//! The one error of building and starting a process: which step failed, on what, and why.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fmt::{Debug, Display, Formatter};
use windlass_proto::monitor::{Failure, failure};

/// Longest text of one field of an error. A report is one datagram, and a path in it comes from the bundle.
const FIELD_LIMIT_BYTES: usize = 4096;

/// What the caller may do about a failure. The same values as `Failure.Kind` of the monitor protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The system refused something.
    Internal,
    /// The bundle or the request is wrong.
    Invalid,
    /// What the request names does not exist.
    NotFound,
    /// Not possible in this state, for example the gate is open already.
    WrongState,
    /// The container's own program could not be run.
    Entrypoint,
    /// This build or kernel cannot do it.
    Unsupported,
    /// ENOSPC or EDQUOT.
    NoSpace,
}

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepError {
    /// The step, as a person reads it.
    pub step: String,
    /// What it was done to, often a path. May be empty.
    pub object: String,
    /// errno of the failed call, 0 when the cause is none.
    pub errno: i32,
    /// The cause in words when errno does not say it.
    pub message: String,
    /// What may be done about it.
    pub kind: Kind,
}

impl StepError {
    /// A failed system call.
    pub fn errno(step: &str, object: impl Display, errno: i32) -> Self {
        let full = [libc::ENOSPC, libc::EDQUOT].contains(&errno);
        let kind = if full { Kind::NoSpace } else { Kind::Internal };
        StepError { step: step.into(), object: cut(object), errno, message: String::new(), kind }
    }

    /// A failure without a system call behind it.
    pub fn because(kind: Kind, step: &str, object: impl Display, message: impl Display) -> Self {
        StepError { step: step.into(), object: cut(object), errno: 0, message: cut(message), kind }
    }

    /// The same failure of another kind.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }
}

fn cut(text: impl Display) -> String {
    let mut text = text.to_string();
    if text.len() > FIELD_LIMIT_BYTES {
        let end = (0..=FIELD_LIMIT_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

impl Display for StepError {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.step)?;
        if !self.object.is_empty() {
            write!(f, " {}", self.object)?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if self.errno != 0 {
            write!(f, ": {}", std::io::Error::from_raw_os_error(self.errno))?;
        }
        Ok(())
    }
}

impl std::error::Error for StepError {}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Failure {
        let kind = match error.kind {
            Kind::Internal => failure::Kind::Internal,
            Kind::Invalid => failure::Kind::Invalid,
            Kind::NotFound => failure::Kind::NotFound,
            Kind::WrongState => failure::Kind::WrongState,
            Kind::Entrypoint => failure::Kind::Entrypoint,
            Kind::Unsupported => failure::Kind::Unsupported,
            Kind::NoSpace => failure::Kind::NoSpace,
        };
        let kind = kind.into();
        Failure { step: error.step, object: error.object, errno: error.errno, message: error.message, kind }
    }
}

/// Names the step and the object of a failed call.
pub(crate) trait Context<T> {
    /// `step` as a person reads it, `object` what it was done to.
    fn context(self, step: &str, object: impl Display) -> Result<T, StepError>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn context(self, step: &str, object: impl Display) -> Result<T, StepError> {
        self.map_err(|errno| StepError::errno(step, object, errno.raw_os_error()))
    }
}

impl<T> Context<T> for Result<T, nix::Error> {
    fn context(self, step: &str, object: impl Display) -> Result<T, StepError> {
        self.map_err(|errno| StepError::errno(step, object, errno as i32))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, step: &str, object: impl Display) -> Result<T, StepError> {
        self.map_err(|error| match error.raw_os_error() {
            Some(errno) => StepError::errno(step, object, errno),
            None => StepError::because(Kind::Internal, step, object, error),
        })
    }
}
