//! CRIU for the tests of checkpoints: the machine's own if it is one that can be used, else a later Debian's, unpacked beside the other
//! tools with the libraries that it needs. On kernel 6.18 version 3.17 (Debian 12) finds no vDSO, and 4.1 (Debian 13) cannot write an
//! IP socket: since 6.16 the kernel answers EOPNOTSUPP when such a socket is asked for SO_PASSCRED.

use crate::{go::unless_stamped, next_release::NextRelease, setup};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Part of the stamp: changes when the way of unpacking changes.
const RECIPE: &str = "1";

/// The first release of Debian with CRIU 4.2.
const RELEASE: &str = "forky";

/// A CRIU that works on this kernel.
pub fn program() -> Result<PathBuf> {
    let installed = Path::new("/usr/sbin/criu");
    if works(installed) {
        return Ok(installed.to_owned());
    }
    let directory = setup::target().join("windlass-tools/criu");
    fs::create_dir_all(&directory)?;
    let directory = directory.canonicalize()?;
    let program = directory.join("criu");
    unless_stamped(&directory, &[RECIPE, RELEASE], &[&program], || unpack(&directory, &program))?;
    ensure!(works(&program), "{} check: CRIU cannot be used on this kernel", program.display());
    Ok(program)
}

/// Whether it is new enough for the newest kernels, and for this one.
fn works(program: &Path) -> bool {
    let run = |word: &str| Command::new(program).arg(word).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let version = run("--version").map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut numbers = version.trim_start_matches("Version: ").split('.').map(|part| part.trim().parse::<u32>().unwrap_or(0));
    let new = (numbers.next(), numbers.next()) >= (Some(4), Some(2));
    new && run("check").is_ok_and(|output| output.status.success())
}

fn unpack(directory: &Path, program: &Path) -> Result<()> {
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root)?;
    NextRelease::open("deb", RELEASE)?.unpack("criu", &root)?;
    let mut directories = fs::read_dir(root.join("usr/lib"))?.flatten().map(|entry| entry.path());
    let libraries = directories.find(|path| path.join("libc.so.6").exists()).context("a C library among the packages")?;
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"));
    let loader = fs::read_dir(&libraries)?.flatten().map(|entry| entry.path()).find(named).context("the C library's loader")?;
    let script = format!(
        "#!/bin/sh\nexec {} --library-path {} {} \"$@\"\n",
        loader.display(),
        libraries.display(),
        root.join("usr/sbin/criu").display()
    );
    fs::write(program, script)?;
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).context("make the script executable")
}
