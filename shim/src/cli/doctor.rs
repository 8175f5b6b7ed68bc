//! `windlass doctor`: looks at all that this runtime needs of a node, and says of each thing how it is, what that means, and what to do. It
//! changes nothing, works with and without a daemon, and as somebody who is not root says what it could not see.

mod cgroups;
mod daemon;
mod images;
mod kernel;
mod kubelet;
mod leftovers;
mod monitors;
mod network;
mod parameters;
mod programs;
mod report;
mod storage;

use super::{Flags, output::Format};
use crate::{
    config::{self, Config, DEFAULT_PATH},
    error::Result,
};
use clap::Args;
use report::Report;
use std::{fs, path::Path, process::ExitCode};

/// `windlass doctor ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    flags: Flags,
    /// Only what is not well
    #[arg(short, long)]
    quiet: bool,
    /// How to print what was found
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// What every check begins with.
struct Node {
    config: Config,
    /// It is what the file and flags say: what they say was taken.
    taken: bool,
    /// Root sees everything.
    root: bool,
    /// The daemon that answers.
    daemon: Option<daemon::Daemon>,
}

/// Runs every check, and says what the program exits with.
pub(super) fn run(options: Options) -> Result<ExitCode> {
    let mut report = Report::default();
    let (config, taken) = configuration(&options.flags, &mut report);
    super::here(Box::pin(async {
        let root = rustix::process::geteuid().is_root();
        let mut node = Node { config, taken, root, daemon: None };
        node.daemon = daemon::check(&node, &mut report).await;
        kernel::check(&node, &mut report);
        cgroups::check(&node, &mut report).await;
        parameters::check(&node, &mut report);
        storage::check(&node, &mut report);
        network::check(&node, &mut report);
        images::check(&node, &mut report);
        programs::check(&node, &mut report).await;
        kubelet::check(&node, &mut report);
        leftovers::check(&node, &mut report).await;
        Ok(())
    }))?;
    if options.quiet {
        report.only_bad();
    }
    match options.format {
        Format::Json => super::output::pretty(&report)?,
        Format::Text => report.print()?,
    }
    Ok(report.exit_code())
}

/// The configuration that the checks go by, and whether it is what the file and flags say: the defaults where the file says none that is
/// taken.
fn configuration(flags: &Flags, report: &mut Report) -> (Config, bool) {
    report.area("configuration");
    let named = flags.place.config.as_deref();
    let file = named.unwrap_or(Path::new(DEFAULT_PATH));
    let mut config = match fs::read_to_string(file) {
        Ok(text) => match config::read(&text) {
            Ok(config) => {
                report.ok(format!("{} is a configuration", file.display()));
                config
            }
            Err(problems) => {
                for problem in problems {
                    report.error(
                        format!("{}: {problem}", file.display()),
                        "correct it: a daemon does not start with this file; `windlass config default` explains every field",
                    );
                }
                Config::default()
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
            report.ok(format!("{} is not there: every field has its default", file.display()));
            Config::default()
        }
        Err(error) => {
            report.error(format!("{}: {error}", file.display()), "name a file that can be read by --config");
            Config::default()
        }
    };
    flags.clone().over(&mut config);
    for problem in config.problems() {
        report.error(format!("a flag or a field: {problem}"), "correct it: a daemon does not start so");
    }
    let taken = report.findings.iter().all(|finding| !finding.is_error());
    (config, taken)
}

/// What a command says within a few seconds; nothing where it is not there or fails.
async fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(std::time::Duration::from_secs(5), command.output()).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A small file's text without the space around it.
fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}
