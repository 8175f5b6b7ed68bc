//! kind's clusters with Windlass as the runtime of their nodes: a node image made on the spot, and a guest in which Docker and kind run.

mod command;
mod images;
mod inside;
mod node;
mod source;

pub use command::run;
pub use inside::run as run_inside;
pub use node::Node;

/// The node image.
pub(crate) const IMAGE: &str = "kind-windlass";
