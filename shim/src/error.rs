//! What a failed operation tells its caller: a kind, by which the caller decides, and one sentence for a person.

use crate::image::ImageError;
use std::fmt;

/// What the caller may do about a failure. `cri::status` maps each kind to one gRPC code, and nothing else does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    NotFound,
    AlreadyExists,
    /// The request is wrong; the message names the field and the value.
    Invalid,
    /// The object is in a state that does not allow it.
    Precondition,
    /// Disk, addresses or another bounded thing has run out.
    Exhausted,
    Deadline,
    Unavailable,
    /// Asked for something that this runtime or kernel cannot give. Never given weaker.
    Unimplemented,
    Internal,
    /// Kubelet matches the message's prefix, which it sees only with the code Unknown.
    Prefixed,
    /// Nobody reads a command's output any more: it ends, and has not failed.
    Unread,
}

/// A failed operation. Clone, because operations that were joined share one result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
}

/// Result of an operation of the daemon.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into() }
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(Kind::NotFound, message)
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Kind::Invalid, message)
    }

    pub fn precondition(message: impl Into<String>) -> Error {
        Error::new(Kind::Precondition, message)
    }

    pub fn unimplemented(message: impl Into<String>) -> Error {
        Error::new(Kind::Unimplemented, message)
    }

    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Kind::Internal, message)
    }

    /// A failed system call: operation and object, then the errno. A full disk becomes [`Kind::Exhausted`].
    pub fn io(operation: impl fmt::Display, error: impl Into<std::io::Error>) -> Error {
        let error = error.into();
        let kind = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => Kind::Exhausted,
            _ => Kind::Internal,
        };
        Error::new(kind, format!("{operation}: {error}"))
    }

    /// A failure of the image store beside what a client asked of images.
    pub fn of_image(error: ImageError) -> Error {
        let kind = if matches!(error, ImageError::NoSpace(_)) { Kind::Exhausted } else { Kind::Internal };
        Error::new(kind, error.to_string())
    }

    /// Puts the operation in front of the cause.
    #[must_use]
    pub fn during(self, operation: impl fmt::Display) -> Error {
        Error { kind: self.kind, message: format!("{operation}: {}", self.message) }
    }
}

/// The value of an enumeration with this number. One that the CRI does not have here is refused: it is none of the others.
pub fn known<T: TryFrom<i32>>(field: impl fmt::Display, number: i32) -> Result<T> {
    T::try_from(number).map_err(|_| Error::invalid(format!("{field} {number} is unknown")))
}

impl From<crate::network::NetworkError> for Error {
    /// With the causes behind it: this is where the chain is told.
    fn from(error: crate::network::NetworkError) -> Error {
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            message = format!("{message}: {error}");
            cause = error.source();
        }
        let kind = match () {
            () if error.is_exhausted() => Kind::Exhausted,
            () if error.is_taken() => Kind::Precondition,
            () if error.is_invalid() => Kind::Invalid,
            () => Kind::Internal,
        };
        Error::new(kind, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
