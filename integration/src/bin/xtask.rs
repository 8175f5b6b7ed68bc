//! `cargo xtask`: the commands of this project's developers and users.

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};
use windlass_integration::{ahead, build, cluster::command as cluster, compare, demo, kind, measure, package, suite, upgrade};

/// Builds, shows and tests Windlass.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what the machine lacks, and build the programs side by side into target/windlass.
    Build,
    /// Run a pod from nothing and show it from both sides; leaves no trace.
    Demo,
    /// Time every phase of a pod's life and weigh what the runtime keeps in memory; words after `--` are `bench`'s own flags.
    Bench {
        /// Flags of `bench`, such as `--pods 100`.
        #[arg(last = true)]
        flags: Vec<String>,
    },
    /// Build containerd, CRI-O and what they need, and measure Windlass beside them with one client. Takes half an hour the first time.
    Compare(compare::Options),
    /// Build, and make the Debian package in target/debian.
    Package,
    /// Start a Kubernetes cluster of one node over Windlass, in namespaces of its own, and say how to use it.
    Up,
    /// End that cluster and remove all of it.
    Down,
    /// What `up` leaves in the background.
    #[command(hide = true)]
    KeepCluster,
    /// Make a kind node image with Windlass as its runtime, and a cluster of it with kind and Docker in a guest: load an image into it, run
    /// pods, export its logs, delete it. Takes some minutes.
    Kind,
    /// What `kind` runs in the guest.
    #[command(hide = true)]
    KindInside { directory: PathBuf },
    /// Run the CRI's validation suite on Windlass and on containerd, and write the table of README.md. Needs half an hour.
    Suites(compare::suites::Options),
    /// Run a part of Kubernetes' own suite in a cluster of one node over Windlass, then over containerd: what every node and every cluster has
    /// to pass of pods, volumes, networks, workloads and kubectl. Compares with the lists in integration/conformance, and writes the table of
    /// README.md. Needs an hour, and ten minutes more the first time.
    E2e(compare::e2e::Options),
    /// Start pods with the daemon and monitors of an older revision, replace the daemon with today's, and show that no pod notices.
    Upgrade {
        /// The older revisions, as git names them.
        #[arg(long, value_delimiter = ',', default_value = upgrade::EARLIER)]
        from: Vec<String>,
    },
    /// Set up, build, and run every test.
    Test,
    /// What `test` leaves to the background.
    #[command(hide = true)]
    BuildAhead,
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Build => build::all().map(|()| true),
        Command::Demo => demo::run().map(|()| true),
        Command::Bench { flags } => measure::run(flags.clone()).map(|()| true),
        Command::Compare(options) => compare::run(options).map(|()| true),
        Command::Package => package::run().map(|()| true),
        Command::Up => cluster::up().map(|()| true),
        Command::Down => cluster::down().map(|()| true),
        Command::KeepCluster => cluster::keep().map(|()| true),
        Command::Kind => kind::run().map(|()| true),
        Command::KindInside { directory } => kind::run_inside(directory).map(|()| true),
        Command::Suites(options) => compare::suites::run(options),
        Command::E2e(options) => compare::e2e::run(options),
        Command::Upgrade { from } => upgrade::run(from).map(|()| true),
        Command::Test => suite::run(),
        Command::BuildAhead => Ok(ahead::build()),
    }
}
