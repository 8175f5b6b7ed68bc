//! Other programs that the configuration leads to: the monitor, CRIU, and runtimes of handlers.

use super::{Node, output_of, report::Report};
use crate::checkpoint;
use std::path::Path;

/// The oldest CRIU that is served, and the oldest for kernels from 6.16 on, as (major, minor).
const CRIU: (u32, u32) = (4, 0);
const CRIU_SINCE_6_16: (u32, u32) = (4, 2);

pub(super) async fn check(node: &Node, report: &mut Report) {
    report.area("programs");
    let monitor = node.config.monitor_path();
    if executable(&monitor) {
        report.ok(format!("the monitor is {}", monitor.display()));
    } else {
        report.error(
            format!("{} cannot be executed: the daemon does not start, or no pod does", monitor.display()),
            "install the package again, or name the program by monitor.path",
        );
    }
    for (name, handler) in &node.config.handlers {
        let path = handler.path.display();
        if executable(&handler.path) {
            report.ok(format!("handler {name} is {path}"));
        } else {
            report.error(
                format!("handler {name}: {path} cannot be executed: pods whose RuntimeClass has it do not start"),
                format!("install it, or correct handlers.{name}.path"),
            );
        }
    }
    criu(node, report).await;
}

fn executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

async fn criu(node: &Node, report: &mut Report) {
    let Ok(path) = checkpoint::program(&node.config.checkpoint) else {
        report.ok("CRIU is not there: checkpoints are refused, and nothing else needs it");
        return;
    };
    let shown = path.display();
    let said = output_of(&path.to_string_lossy(), &["--version"]).await.unwrap_or_default();
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let wanted = if numbers(&kernel).is_some_and(|kernel| kernel >= (6, 16)) { CRIU_SINCE_6_16 } else { CRIU };
    let version = said.lines().find_map(|line| line.strip_prefix("Version:")).and_then(|text| numbers(text.trim()));
    match version {
        Some(version) if version >= wanted => {
            report.ok(format!("checkpoints are made by CRIU {}.{} ({shown})", version.0, version.1))
        }
        Some(version) => report.warning(
            format!(
                "{shown} is CRIU {}.{}, and Linux {kernel} needs {}.{}: checkpoints fail",
                version.0, version.1, wanted.0, wanted.1
            ),
            "install a newer CRIU, and name it by checkpoint.criu",
        ),
        None => report.warning(format!("{shown} tells no version: checkpoints may fail"), "try `criu check`"),
    }
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|byte: char| !byte.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
