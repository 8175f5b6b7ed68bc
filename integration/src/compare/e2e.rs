//! `cargo xtask e2e`: a part of Kubernetes' own suite in a cluster of one node over Windlass, and in the same run over containerd with runc,
//! so that what the ground itself forbids is seen. Compares with the committed lists, and writes README.md's table.

use super::{
    cluster, products,
    results::{self, Line, noted},
    rival,
};
use crate::{
    build,
    e2e::{Choice, Prepared},
    ginkgo::{self, Outcomes},
    go::KUBERNETES_VERSION,
    node, setup,
};
use anyhow::{Context, Result, ensure};
use std::{fs, path::PathBuf, thread::ScopedJoinHandle};

/// The committed lists.
const MUST_PASS: &str = "integration/conformance/e2e-must-pass.txt";
const NOT_YET: &str = "integration/conformance/e2e-not-yet.txt";
const COMMAND: &str = "cargo xtask e2e";

/// How much to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Runtimes: windlass, containerd.
    #[arg(long, value_delimiter = ',', default_value = "windlass,containerd")]
    runtime: Vec<String>,
    /// Run only the chosen specs whose names a regular expression finds; README.md stays as it is then.
    #[arg(long)]
    focus: Vec<String>,
    /// Leave out the specs whose names this regular expression finds; README.md stays as it is then.
    #[arg(long, default_value = "")]
    skip: String,
    /// Specs at a time, with each runtime.
    #[arg(long, default_value_t = 8)]
    processes: usize,
    /// Leave README.md as it is.
    #[arg(long)]
    print: bool,
    /// Run the programs that are built, without building Windlass again.
    #[arg(long)]
    no_build: bool,
}

impl Options {
    fn whole(&self) -> bool {
        self.focus.is_empty() && self.skip.is_empty()
    }
}

/// Builds, runs, compares with the lists and writes the table; false if a listed spec did not pass with Windlass.
pub fn run(options: &Options) -> Result<bool> {
    for name in &options.runtime {
        ensure!(["windlass", "containerd"].contains(&name.as_str()), "there is no runtime {name:?}: windlass, containerd");
    }
    if !options.no_build {
        build::all()?;
    }
    let prepared = Prepared::new()?;
    let choice = Choice { focus: options.focus.clone(), skip: options.skip.clone(), processes: options.processes };
    let wants = |name: &str| options.runtime.iter().any(|runtime| runtime == name);
    let products = wants("containerd").then(products::build).transpose()?;
    // At the same time: each has a node of its own, and specs wait more than they work.
    let (windlass, containerd) = std::thread::scope(|scope| {
        let windlass =
            wants("windlass").then(|| scope.spawn(|| prepared.over_windlass(&choice, &setup::reports("e2e/windlass")?)));
        let containerd = products.map(|products| scope.spawn(|| containerd(&prepared, &choice, products)));
        (windlass.map(ended), containerd.map(ended))
    });
    let mut lines = Vec::new();
    let mut good = true;
    if let Some(outcomes) = windlass.transpose()? {
        let outcomes = noted("Windlass", outcomes);
        good = compare(&outcomes, options)?;
        lines.push(Line { title: "Windlass".into(), outcomes });
    }
    if let Some(outcomes) = containerd.transpose()? {
        lines.push(Line { title: "containerd 2.4.2 + runc 1.5.2".into(), outcomes: noted("containerd", outcomes) });
    }
    let table = results::table(&format!("e2e.test {KUBERNETES_VERSION}"), &lines)?;
    println!("{table}");
    if lines.len() == 2 && options.whole() && !options.print {
        results::write(COMMAND, &table)?;
    }
    Ok(good)
}

fn ended(run: ScopedJoinHandle<'_, Result<Outcomes>>) -> Result<Outcomes> {
    run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// False if a listed spec did not pass, or one is listed nowhere.
fn compare(outcomes: &Outcomes, options: &Options) -> Result<bool> {
    let read = |name: &str| fs::read_to_string(setup::workspace().join(name)).with_context(|| format!("read {name}"));
    let (mut must_pass, not_yet) = (read(MUST_PASS)?, read(NOT_YET)?);
    if !options.whole() {
        must_pass = must_pass.lines().filter(|name| outcomes.contains_key(*name)).collect::<Vec<_>>().join("\n");
    }
    let verdict = ginkgo::compare(outcomes, &must_pass, &not_yet);
    let told = [
        (&verdict.broken, "listed, and did not pass"),
        (&verdict.unlisted, "in neither list or in both"),
        (&verdict.gained, "passes now, belongs to the list of those that must"),
    ];
    for (names, what) in told {
        names.iter().for_each(|name| println!("{what}: {name}"));
    }
    Ok(verdict.broken.is_empty() && verdict.unlisted.is_empty())
}

fn containerd(prepared: &Prepared, choice: &Choice, products: PathBuf) -> Result<Outcomes> {
    let (prepared, choice, output) = (prepared.clone(), choice.clone(), setup::reports("e2e/containerd")?);
    node::run(move || {
        node::share_mounts()?;
        let (rival, _standins) = rival::containerd(&products, prepared.images.clone())?;
        let directory = tempfile::Builder::new().prefix("windlass-e2e-").tempdir()?;
        let mut cluster = cluster::start(&prepared.programs, directory.path(), &rival.socket)?;
        cluster.write_mirror(&rival.mirrors().context("containerd has mirrors")?)?;
        let outcomes = prepared.over(&mut cluster, &choice, &output);
        fs::write(output.join("daemon.log"), rival.log())?;
        drop(cluster);
        rival.stop()?;
        outcomes
    })
}
