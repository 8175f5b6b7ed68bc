//! The one map from the daemon's errors to gRPC codes.

use crate::{
    error::{Error, Kind},
    image::ImageError,
};
use tonic::{Code, Status};

/// An error as the RPC's status.
pub(super) fn of(error: Error) -> Status {
    let code = match error.kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::Invalid => Code::InvalidArgument,
        Kind::Precondition => Code::FailedPrecondition,
        Kind::Exhausted => Code::ResourceExhausted,
        Kind::Deadline => Code::DeadlineExceeded,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
        Kind::Prefixed => Code::Unknown,
        Kind::Unread => Code::Cancelled,
    };
    Status::new(code, error.message)
}

/// An image operation's error. Kubelet reads a prefix only from a message with code Unknown.
pub(super) fn of_image(error: ImageError) -> Status {
    let message = error.to_string();
    match error {
        ImageError::InvalidReference { .. } => Status::invalid_argument(message),
        ImageError::NotFound(..) => Status::not_found(message),
        ImageError::Unauthorized(..) => Status::permission_denied(message),
        ImageError::RegistryUnavailable(..) => Status::unknown(format!("RegistryUnavailable: {message}")),
        ImageError::Untrusted(..) => Status::unknown(format!("SignatureValidationFailed: {message}")),
        ImageError::Corrupt(..) => Status::data_loss(message),
        ImageError::Unsupported(..) | ImageError::NoPlatform { .. } => Status::failed_precondition(message),
        ImageError::NoSpace(..) => Status::resource_exhausted(message),
        _ => Status::internal(message),
    }
}
