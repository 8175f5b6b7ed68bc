//! `cargo xtask suites`: the CRI's validation suite on Windlass, on this host and in the guest, and in the same run on containerd with
//! runc, so that what the ground itself forbids is seen. Writes README.md's table.

use super::{
    products,
    results::{self, Line, noted},
    rival,
};
use crate::{
    build,
    critest::{Prepared, Run},
    ginkgo::{self, Outcomes},
    node, setup,
    standin_registry::StandinRegistry,
};
use anyhow::{Context, Result};
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// Longest run of the suite.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Tests that run the suite in the guest, and where they leave its report.
const PLAIN: (&str, &str) = ("the_specs_of_the_guests_list_pass", "critest-guest");
const SYSTEMD: (&str, &str) = ("the_specs_of_the_guests_list_pass_under_systemd", "critest-guest-systemd");

/// How much to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Runs on Windlass, which must all end the same.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Leave README.md as it is.
    #[arg(long)]
    print: bool,
    /// Run the programs that are built, without building Windlass again.
    #[arg(long)]
    no_build: bool,
}

/// Builds, runs, and writes the table; false if runs on Windlass differ.
pub fn run(options: &Options) -> Result<bool> {
    if !options.no_build {
        build::all()?;
    }
    let products = products::build()?;
    let mut runs = Vec::new();
    for number in 1..=options.runs.max(1) {
        runs.push(noted(&format!("Windlass, run {number}"), windlass(&format!("windlass-{number}"), &[])?));
    }
    let parallel = noted("Windlass, four specs at a time", windlass("windlass-parallel", &["-parallel", "4"])?);
    let guest = noted("Windlass, in the guest", guest(PLAIN)?);
    let systemd = noted("Windlass, in the guest, systemd cgroups", self::guest(SYSTEMD)?);
    let other = noted("containerd", containerd(&products)?);
    let same = runs.iter().chain([&parallel]).all(|run| states(run) == states(&runs[0]));
    println!("==> {} runs on this host and one in parallel: {}", runs.len(), if same { "all the same" } else { "NOT the same" });
    let table = results::table(
        "critest 1.34.0",
        &[
            Line { title: "Windlass".into(), outcomes: runs.swap_remove(0) },
            Line { title: "Windlass, in the guest".into(), outcomes: guest },
            Line { title: "Windlass, in the guest, systemd cgroups".into(), outcomes: systemd },
            Line { title: "containerd 2.4.2 + runc 1.5.2".into(), outcomes: other },
        ],
    )?;
    println!("{table}");
    if !options.print {
        results::write("cargo xtask suites", &table)?;
    }
    Ok(same)
}

fn states(outcomes: &Outcomes) -> BTreeMap<&str, &str> {
    outcomes.iter().map(|(name, outcome)| (name.as_str(), outcome.state.as_str())).collect()
}

fn windlass(name: &str, flags: &'static [&'static str]) -> Result<Outcomes> {
    let (suite, output) = (Prepared::new()?, setup::reports(&format!("suites/{name}"))?);
    node::run(move || {
        let program = suite.program();
        let registry = StandinRegistry::start(suite.images)?;
        let daemon = registry.daemon(&output.join("certs.d"))?;
        let socket = daemon.socket();
        Run { suite: &program, socket: &socket, output: &output, limit: LIMIT, focus: "", flags, beside: None }.outcomes()
    })
}

fn containerd(products: &Path) -> Result<Outcomes> {
    let (suite, output, products) = (Prepared::new()?, setup::reports("suites/containerd")?, products.to_owned());
    node::run(move || {
        let program = suite.program();
        let (rival, _standins) = rival::containerd(&products, suite.images)?;
        let run = Run {
            suite: &program,
            socket: &rival.socket,
            output: &output,
            limit: LIMIT,
            focus: "",
            flags: &[],
            beside: Some(rival.pid),
        };
        let outcomes = run.outcomes();
        fs::write(output.join("daemon.log"), rival.log())?;
        rival.stop()?;
        outcomes
    })
}

/// All of the suite in the guest, by the test that runs a part of it there and leaves its report in `kept` of `<target>`.
fn guest((test, kept): (&str, &str)) -> Result<Outcomes> {
    let mut command = build::cargo();
    command.args(["test", "--quiet", "-p", "windlass-integration", "--test", "guest_critest", "--", "--exact", test]);
    command.env("WINDLASS_GUEST_FOCUS", ".");
    build::step("the suite in the guest (five minutes)", &mut command)?;
    ginkgo::outcomes(&fs::read(setup::target().join(kept).join("critest.json")).context("read the guest's report")?)
}
