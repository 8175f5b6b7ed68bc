//! Namespaces of a container.
