//! What can go wrong with an image, grouped by what the caller may do about it.

use std::fmt::Display;
use std::io;

/// A failed image operation. `Display` names the operation, the object and the cause once.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The name is no image reference.
    #[error("image reference {reference:?}: {cause}")]
    InvalidReference {
        /// As the caller wrote it.
        reference: String,
        /// Which rule it breaks.
        cause: String,
    },
    /// The registry or the store has no such image, manifest or blob.
    #[error("{0}: not found")]
    NotFound(String),
    /// Missing, wrong or insufficient credentials.
    #[error("{0}")]
    Unauthorized(String),
    /// The policy does not let this image be used.
    #[error("{0}")]
    Untrusted(String),
    /// Nobody answered, or the answer was a server's failure; a later try may succeed.
    #[error("{0}")]
    RegistryUnavailable(String),
    /// Bytes that are not what their digest says, or an archive that breaks its format.
    #[error("{0}")]
    Corrupt(String),
    /// An index without an image for this machine, or an image that is for another.
    #[error("{object}: no image for platform {platform}")]
    NoPlatform {
        /// The index, or the image's manifest.
        object: String,
        /// As `os/architecture`.
        platform: String,
    },
    /// An image of a kind that this store does not take.
    #[error("{0}")]
    Unsupported(String),
    /// The disk, or its inodes, ran out.
    #[error("{0}: no space left on device")]
    NoSpace(String),
    /// A bound of this store was passed: bytes, entries, or size of a header or manifest.
    #[error("{0}")]
    TooMany(String),
    /// Any other failure of the operating system.
    #[error("{0}")]
    Io(String),
}

impl ImageError {
    /// Wraps an I/O error of `what` (operation and object); an [`ImageError`] carried inside comes back as itself.
    pub(super) fn io(what: impl Display, error: impl Into<io::Error>) -> ImageError {
        let error: io::Error = error.into();
        if let Some(inner) = error.get_ref().and_then(|e| e.downcast_ref::<ImageError>()) {
            return inner.clone();
        }
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImageError::NoSpace(what.to_string()),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                ImageError::Corrupt(format!("{what}: {error}"))
            }
            _ => ImageError::Io(format!("{what}: {error}")),
        }
    }

    /// Puts the operation and object in front.
    pub(super) fn within(self, context: impl Display) -> ImageError {
        use ImageError::*;
        let put = |text: String| format!("{context}: {text}");
        match self {
            InvalidReference { .. } => self,
            NotFound(text) => NotFound(put(text)),
            Unauthorized(text) => Unauthorized(put(text)),
            Untrusted(text) => Untrusted(put(text)),
            RegistryUnavailable(text) => RegistryUnavailable(put(text)),
            Corrupt(text) => Corrupt(put(text)),
            NoPlatform { object, platform } => NoPlatform { object: put(object), platform },
            Unsupported(text) => Unsupported(put(text)),
            NoSpace(text) => NoSpace(put(text)),
            TooMany(text) => TooMany(put(text)),
            Io(text) => Io(put(text)),
        }
    }

    /// As the payload of an `io::Error`, to pass through a `Read`.
    pub(super) fn into_io(self) -> io::Error {
        io::Error::other(self)
    }
}
