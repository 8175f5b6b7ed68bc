//! Specs of the CRI's validation suite that need more than this host's kernel: AppArmor, and the memory controller on cgroup v2, with plain
//! cgroups and with systemd's. This program prepares images and suite here, and runs itself in the guest to run them there.
//! `WINDLASS_GUEST_FOCUS` chooses other specs (`.` is all of them), which are then only reported.

use anyhow::{Context, Result};
use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use windlass_integration::{critest, ginkgo, go, guest, node, setup, standin::Images, standin_registry::StandinRegistry};

/// Set inside the guest: the directory that was prepared.
const PREPARED: &str = "WINDLASS_GUEST_CRITEST";
/// Chooses other specs than those of the list.
const FOCUS: &str = "WINDLASS_GUEST_FOCUS";
const LISTED: &str = "AppArmor|Container OOM";
/// Longest run of the suite, and of the guest around it.
const SUITE_LIMIT: Duration = Duration::from_secs(20 * 60);
const GUEST_LIMIT: Duration = Duration::from_secs(22 * 60);

#[test]
fn the_specs_of_the_guests_list_pass() {
    pass("the_specs_of_the_guests_list_pass", "critest-guest", &[]);
}

#[test]
fn the_specs_of_the_guests_list_pass_under_systemd() {
    pass("the_specs_of_the_guests_list_pass_under_systemd", "critest-guest-systemd", &[guest::SYSTEMD]);
}

/// The test of this name in a guest with these words on its kernel's command line. Logs and report stay in `kept` of `<target>`.
fn pass(test: &str, kept: &str, words: &[&str]) {
    if let Some(directory) = env::var_os(PREPARED).map(PathBuf::from) {
        let focus = env::var(FOCUS).unwrap_or_else(|_| LISTED.to_owned());
        node::run(move || run_suite(&directory, &focus)).expect("a run of critest");
        return;
    }
    let outcomes = boot(test, kept, words).expect("a run of critest in the guest");
    if env::var_os(FOCUS).is_some() {
        for (name, outcome) in outcomes.iter().filter(|(_, outcome)| outcome.state != "skipped") {
            println!("{name}: {}: {}", outcome.state, outcome.message);
        }
        return;
    }
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/must-pass-in-guest.txt");
    let list = fs::read_to_string(&list).unwrap_or_else(|error| panic!("read {}: {error}", list.display()));
    let broken = ginkgo::broken(&outcomes, &list);
    assert!(broken.is_empty(), "{} listed specs did not pass:\n{}", broken.len(), broken.join("\n"));
}

/// Prepares everything that needs a compiler or the network, and runs this program in the guest.
fn boot(test: &str, kept: &str, words: &[&str]) -> Result<ginkgo::Outcomes> {
    let directory = guest::scratch()?;
    let images = Images::build()?;
    let blobs = directory.path().join("images");
    fs::create_dir(&blobs)?;
    images.write_to(&blobs)?;
    critest::with_digest(&go::tools()?.critest, &images.pinned_digest()?, &directory.path().join("critest"))?;
    // The suite calls apparmor_parser through sudo, which a test machine need not have.
    let bin = directory.path().join("bin");
    fs::create_dir(&bin)?;
    fs::write(bin.join("sudo"), "#!/bin/sh\nexec \"$@\"\n")?;
    fs::set_permissions(bin.join("sudo"), fs::Permissions::from_mode(0o755))?;

    let text = |path: &Path| path.to_string_lossy().into_owned();
    let program = text(&env::current_exe()?);
    let (prepared, programs) = (text(directory.path()), text(&setup::programs()?));
    let path = format!("{prepared}/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let mut environment = vec![(PREPARED, prepared.as_str()), ("WINDLASS_BIN_DIR", &programs), ("PATH", &path)];
    let focus = env::var(FOCUS).unwrap_or_default();
    if !focus.is_empty() {
        environment.push((FOCUS, &focus));
    }
    let program = [&program, test, "--exact"];
    let outcome = guest::run_with(directory.path(), &program, &environment, GUEST_LIMIT, words)?;
    let kept = setup::reports(kept)?;
    for name in ["critest.log", "critest.json", "daemon.log"] {
        let _ = fs::copy(directory.path().join(name), kept.join(name));
    }
    let report = fs::read(directory.path().join("critest.json"));
    ginkgo::outcomes(&report.with_context(|| format!("no report; the guest said:\n{}", outcome.output))?)
}

fn run_suite(directory: &Path, focus: &str) -> Result<()> {
    let registry = StandinRegistry::start(Images::read_from(&directory.join("images"))?)?;
    let daemon = registry.daemon(&directory.join("certs.d"))?;
    let (suite, socket) = (directory.join("critest"), daemon.socket());
    let run =
        critest::Run { suite: &suite, socket: &socket, output: directory, limit: SUITE_LIMIT, focus, flags: &[], beside: None };
    let outcomes = run.outcomes();
    fs::write(directory.join("daemon.log"), daemon.log())?;
    outcomes.map(drop)
}
