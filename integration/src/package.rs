//! `cargo xtask package`: the Debian package, of the programs in `<target>/windlass`. What is in it stands in shim/Cargo.toml.

use crate::{
    build, go,
    node::{run_command, succeed},
    setup,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The version of cargo-deb that makes the package.
const CARGO_DEB: &str = "3.8.0";

/// Shells, and the files that their completions are in.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "windlass.bash"), ("zsh", "_windlass"), ("fish", "windlass.fish")];

/// Builds the programs and the package; says where it is.
pub fn run() -> Result<()> {
    build::all()?;
    let package = make_with(&setup::target().join("debian"), &[])?;
    println!("==> {}", package.display());
    Ok(())
}

/// Makes the package of the programs that are there, packed quickly, in `directory`, which is made anew.
pub fn make(directory: &Path) -> Result<PathBuf> {
    make_with(directory, &["--fast"])
}

fn make_with(directory: &Path, flags: &[&str]) -> Result<PathBuf> {
    let workspace = setup::workspace().canonicalize()?;
    let programs = workspace.join("target/windlass");
    ensure!(programs.join("windlass").exists(), "{} has no programs; run `cargo xtask build` first", programs.display());
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("empty {}", directory.display()))?;
    }
    fs::create_dir_all(directory)?;
    describe(&programs)?;
    let mut command = Command::new(cargo_deb()?);
    command.args(["--no-build", "--no-strip", "--quiet", "--manifest-path", "shim/Cargo.toml"]).args(flags);
    // The slash at the end makes it a folder.
    command.arg("--output").arg(directory.join("")).current_dir(&workspace);
    build::step("make the Debian package", &mut command)?;
    let mut made = fs::read_dir(directory)?.flatten().map(|entry| entry.path());
    made.find(|path| path.extension().is_some_and(|end| end == "deb")).context("cargo-deb left no package")
}

/// Completions and manual pages, which the program itself writes, beside the programs.
fn describe(programs: &Path) -> Result<()> {
    let (share, program) = (programs.join("share"), programs.join("windlass"));
    if share.exists() {
        fs::remove_dir_all(&share).with_context(|| format!("empty {}", share.display()))?;
    }
    let manual = share.join("man");
    fs::create_dir_all(&manual)?;
    for (shell, name) in COMPLETIONS {
        let text = succeed(&format!("windlass completions {shell}"), Command::new(&program).args(["completions", shell]))?;
        fs::write(share.join(name), text)?;
    }
    succeed("windlass manual", Command::new(&program).arg("manual").arg(&manual)).map(drop)
}

/// The same package as one of a later revision, packed quickly, in the folder of the other.
pub fn later(package: &Path) -> Result<PathBuf> {
    let content = package.with_extension("content");
    let later = package.with_extension("later.deb");
    run_command("dpkg-deb", &["--raw-extract", &package.to_string_lossy(), &content.to_string_lossy()])?;
    let control = content.join("DEBIAN/control");
    let text = fs::read_to_string(&control).context("read the package's control file")?;
    let revised: String = text
        .lines()
        .map(|line| match line.strip_prefix("Version: ") {
            Some(version) => format!("Version: {version}.later\n"),
            None => format!("{line}\n"),
        })
        .collect();
    ensure!(revised != text, "the control file has no version: {text}");
    fs::write(&control, revised)?;
    run_command("dpkg-deb", &["-Zgzip", "-z1", "--build", &content.to_string_lossy(), &later.to_string_lossy()])?;
    fs::remove_dir_all(content)?;
    Ok(later)
}

/// cargo-deb, built once into `<target>/windlass-tools`.
fn cargo_deb() -> Result<PathBuf> {
    let directory = setup::target().join("windlass-tools/cargo-deb");
    let program = directory.join("bin/cargo-deb");
    go::unless_stamped(&directory, &["cargo-deb", CARGO_DEB], &[&program], || {
        let mut install = build::cargo();
        install.args(["install", "cargo-deb", "--version", CARGO_DEB, "--locked", "--quiet", "--force"]);
        // Unoptimised and with the system's xz: it is run once.
        install.args(["--debug", "--no-default-features", "--root"]).arg(directory.canonicalize()?);
        build::step(&format!("build cargo-deb {CARGO_DEB} (half a minute)"), &mut install)
    })?;
    program.canonicalize().context("find cargo-deb")
}
