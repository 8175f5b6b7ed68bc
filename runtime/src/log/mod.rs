//! The log of one container in CRI format: `<time> <stdout|stderr> <P|F> <content>` a line. Splits the two streams into lines,
//! stamps them and appends them to one file. Never blocks or fails the container: what the file does not take is dropped and counted.

mod file;
mod line;
mod time;

pub use file::ContainerLog;
pub use line::{LINE_LIMIT_BYTES, Stream};
pub use time::{now_ns, rfc3339_nano};
