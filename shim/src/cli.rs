//! The command line: the daemon, and what an operator of a node asks of it and of the node. A module for each command.

mod client;
mod config;
mod doctor;
mod events;
mod exec;
mod image;
mod inspect;
mod logs;
mod manual;
mod output;
mod ps;
mod serve;
mod stats;
mod status;

use crate::{
    config::{Config, DEFAULT_NRI_SOCKET},
    error::{Error, Kind, Result},
    log,
    telemetry::trace,
};
use clap::{Args, Parser, Subcommand};
pub use output::safe;
use output::while_read;
use std::{
    path::{Path, PathBuf},
    pin::Pin,
    process::ExitCode,
    time::Duration,
};

/// A Kubernetes container runtime: serves the CRI to kubelet and crictl, and runs pods as namespaced processes.
#[derive(Debug, Parser)]
#[command(name = "windlass", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the CRI until SIGTERM or SIGINT. Pods go on running afterwards.
    Serve(Flags),
    /// Look after the images of this node.
    Image {
        #[command(flatten)]
        flags: Flags,
        #[command(subcommand)]
        command: image::ImageCommand,
    },
    /// Check this node: the kernel, cgroups, directories, network, configuration, kubelet, and what was left behind. Changes nothing. Exits
    /// with 0 if all is well, 1 if there are warnings, 2 if there are errors, 3 if nothing is wrong as far as could be seen.
    Doctor(doctor::Options),
    /// Print, check and explain the configuration.
    Config {
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Show how the running daemon is: version, pods, network, limits, memory.
    Status(status::Options),
    /// List pods with their containers, addresses, use of processor and memory, and monitors.
    #[command(visible_alias = "pods")]
    Ps(ps::Options),
    /// Show all that is known of a pod or a container: record, bundle, cgroup, namespaces, processes, limits in force, last exit.
    Inspect(inspect::Options),
    /// Print what a container wrote.
    Logs(logs::Options),
    /// Run a command in a container.
    Exec(exec::Options),
    /// Print what happens to pods and containers, until interrupted.
    Events(events::Options),
    /// Show what pods and containers use of processor, memory, disk and network.
    Stats(stats::Options),
    /// Print completions for a shell.
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory.
    #[command(hide = true)]
    Manual {
        /// Where they go; must exist
        directory: PathBuf,
    },
}

/// Which daemon is meant. Said before or behind the word of a subcommand.
#[derive(Debug, Default, Clone, Args)]
pub struct Place {
    /// Configuration file; must exist when given [default: /etc/windlass/config.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Durable state: images, records, writable layers [default: /var/lib/windlass]
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// State that may go at a reboot [default: /run/windlass]
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// CRI socket [default: /run/windlass/windlass.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Flags that go over the configuration file.
#[derive(Debug, Default, Clone, Args)]
pub struct Flags {
    #[command(flatten)]
    place: Place,
    /// CNI configuration files [default: /etc/cni/net.d]
    #[arg(long, global = true, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// CNI plugins [default: /opt/cni/bin]
    #[arg(long, global = true, value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// Registry configuration, <DIR>/<host>/hosts.toml; several with colons between them
    /// [default: /etc/windlass/certs.d:/etc/containerd/certs.d:/etc/docker/certs.d]
    #[arg(long, global = true, value_name = "DIR")]
    registry_config_dir: Option<PathBuf>,
    /// error, warn, info, debug, trace, or directives such as windlass::image=debug [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

impl Place {
    fn over(self, config: &mut Config) {
        if let (Some(state), None) = (&self.state, &self.socket) {
            config.socket = state.join("windlass.sock");
        }
        // A second daemon leaves the first one's plugins alone.
        if let Some(state) = self.state.as_ref().filter(|_| config.nri.socket_path == Path::new(DEFAULT_NRI_SOCKET)) {
            config.nri.socket_path = state.join("nri.sock");
        }
        set(&mut config.root, self.root);
        set(&mut config.state, self.state);
        set(&mut config.socket, self.socket);
    }

    /// The configuration with these flags over it.
    fn load(self) -> Result<Config> {
        Flags { place: self, ..Flags::default() }.load()
    }
}

impl Flags {
    fn over(self, config: &mut Config) {
        self.place.over(config);
        set(&mut config.network.cni_conf_dir, self.cni_conf_dir);
        set(&mut config.network.cni_bin_dir, self.cni_bin_dir);
        set(&mut config.images.registry_config_dir, self.registry_config_dir);
        set(&mut config.log_level, self.log_level);
    }

    /// The configuration with these flags over it.
    fn load(self) -> Result<Config> {
        let mut config = Config::load(self.place.config.as_deref())?;
        self.over(&mut config);
        // What the file says was good: it is a flag.
        match config.problems().first() {
            Some(problem) => Err(Error::invalid(problem.to_string())),
            None => Ok(config),
        }
    }
}

/// Runs a command to its end, and says what the program exits with. A reader of its output that has gone away has seen enough.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match command(cli) {
        Err(error) if error.kind == Kind::Unread => Ok(ExitCode::SUCCESS),
        other => other,
    }
}

fn command(cli: Cli) -> Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Serve(flags) => {
            let config = flags.load()?;
            serve::is_root()?;
            let (spans, exporter) = trace::start(&config.tracing)?.unzip();
            log::start(&config.log_level, spans)?;
            on_threads(Box::pin(serve::run(config, exporter))).map(done)
        }
        Command::Image { flags, command } => {
            let config = flags.load()?;
            log::start(&config.log_level, None)?;
            on_threads(Box::pin(image::run(config, command))).map(done)
        }
        Command::Doctor(options) => doctor::run(options),
        Command::Config { command } => config::run(command),
        Command::Status(options) => here(Box::pin(status::run(options))).map(done),
        Command::Ps(options) => here(Box::pin(ps::run(options))).map(done),
        Command::Inspect(options) => here(Box::pin(inspect::run(options))).map(done),
        Command::Logs(options) => here(Box::pin(while_read(logs::run(options)))).map(done),
        Command::Exec(options) => {
            let mut code = ExitCode::SUCCESS;
            here(Box::pin(async {
                code = exec::run(options).await?;
                Ok(())
            }))?;
            Ok(code)
        }
        Command::Events(options) => here(Box::pin(while_read(events::run(options)))).map(done),
        Command::Stats(options) => here(Box::pin(while_read(stats::run(options)))).map(done),
        Command::Completions { shell } => manual::completions(shell).map(done),
        Command::Manual { directory } => manual::write(&directory).map(done),
    }
}

/// What a command does. Boxed, so that the machinery that runs it is compiled once.
type Work<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Longest wait for threads that block, once the work is done.
const THREADS_END_LIMIT: Duration = Duration::from_secs(5);

/// Work of the daemon's kind.
fn on_threads(work: Work<'_>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::io("start threads", error))?;
    let done = runtime.block_on(work);
    // A thread whose file system does not answer never ends.
    runtime.shutdown_timeout(THREADS_END_LIMIT);
    done
}

/// Work of a client's kind. A thread that waits for nobody's sake does not hold up the end.
fn here(work: Work<'_>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::io("start the client", error))?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Config};
    use clap::CommandFactory;
    use std::{collections::BTreeSet, fs};

    const OPERATING: &str = include_str!("../../manifests/OPERATING.md");
    const DOCUMENTS: [&str; 3] = [OPERATING, include_str!("../../README.md"), include_str!("../../manifests/UPGRADE.md")];

    /// What stands between backquotes in a text's lines, and the lines of its blocks of commands.
    fn quoted(text: &str) -> Vec<&str> {
        let mut found = Vec::new();
        let mut block = false;
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                block = !block;
            } else if block {
                found.push(line);
            } else {
                found.extend(line.split('`').skip(1).step_by(2));
            }
        }
        found
    }

    #[test]
    fn the_daemon_is_named_before_or_behind_a_subcommand() {
        for words in [["windlass", "image", "--root", "/x", "ls"], ["windlass", "image", "ls", "--root", "/x"]] {
            let Command::Image { flags, .. } = Cli::parse_from(words).command else { panic!("{words:?}") };
            assert_eq!(flags.place.root.as_deref(), Some(std::path::Path::new("/x")), "{words:?}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_of_the_documents_are_understood() {
        let mut count = 0;
        for command in DOCUMENTS.iter().flat_map(|text| quoted(text)) {
            let command = command.split(['#', '>', ';', '|']).next().unwrap_or_default().trim();
            // A bare word may be the program's name; `help` and `--help` end the program.
            let words: Vec<&str> = command.split_whitespace().collect();
            if words.first() != Some(&"windlass") || words.len() < 2 || words.contains(&"--help") || words.contains(&"help") {
                continue;
            }
            // A group of commands named as such.
            if ["image", "config"].contains(&words[1]) && words.len() == 2 {
                continue;
            }
            count += 1;
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{command}: {error}");
            }
        }
        assert!(count > 25, "{count} commands in the documents");
    }

    #[test]
    fn fields_of_the_documents_are_of_the_configuration() {
        let value = serde_json::json!(Config::default());
        let sections: BTreeSet<&String> = value.as_object().expect("a table").keys().collect();
        let mut count = 0;
        for quoted in quoted(OPERATING) {
            let field = quoted.split(" = ").next().unwrap_or_default();
            let Some((section, rest)) = field.split_once('.') else { continue };
            if !sections.contains(&section.to_owned()) || !rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
                continue;
            }
            count += 1;
            assert!(value[section].get(rest).is_some(), "{field}");
        }
        assert!(count >= 25, "{count} fields in the document");
        assert!(config::read(config::REFERENCE).is_ok());
    }

    /// Every message of the table of symptoms is one that the sources have.
    #[test]
    fn messages_of_the_document_are_those_of_the_program() {
        fn sources(directory: &Path, text: &mut String) {
            for entry in fs::read_dir(directory).expect("a directory").flatten() {
                if entry.path().is_dir() {
                    sources(&entry.path(), text);
                } else if entry.path() != Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli.rs") {
                    text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
                }
            }
        }
        let mut text = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
        let table = OPERATING.split("## By symptom").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("the table");
        let messages: Vec<&str> = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        assert!(messages.len() > 20, "{messages:?}");
        for message in messages {
            assert!(text.contains(message), "no source says {message:?}");
        }
    }

    #[test]
    fn figures_of_the_document_are_served() {
        let telemetry = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/telemetry");
        let served: String = ["mod.rs", "text.rs", "process.rs"]
            .iter()
            .map(|name| fs::read_to_string(telemetry.join(name)).unwrap_or_default())
            .collect();
        let words = OPERATING.split(|byte: char| !(byte.is_ascii_alphanumeric() || byte == '_'));
        for name in words.filter(|word| word.starts_with("windlass_") && word.len() > 9 && !word.contains("amd64")) {
            let base = name.trim_end_matches("_bucket").trim_end_matches("_count");
            assert!(served.contains(base) || base == "windlass_", "{name}");
        }
    }
}
