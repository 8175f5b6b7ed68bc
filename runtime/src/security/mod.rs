//! What a container's process may do.
