//! CRIU for the tests of checkpoints: the machine's own if it is one that can be used, else Debian's next release, unpacked beside the other
//! tools with the libraries that it needs. (The one of Debian 12 does not know the vDSO of kernels from 6.13 on.)

use crate::{go::unless_stamped, next_release::NextRelease, setup};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Part of the stamp: changes when the way of unpacking changes.
const RECIPE: &str = "1 trixie";

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
    unless_stamped(&directory, &[RECIPE], &[&program], || unpack(&directory, &program))?;
    ensure!(works(&program), "{} check: CRIU cannot be used on this kernel", program.display());
    Ok(program)
}

fn works(program: &Path) -> bool {
    let mut command = Command::new(program);
    command.args(["check"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn unpack(directory: &Path, program: &Path) -> Result<()> {
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root)?;
    NextRelease::open("deb")?.unpack("criu", &root)?;
    let libraries = fs::read_dir(root.join("usr/lib"))?.flatten().map(|entry| entry.path());
    let libraries = libraries.filter(|path| path.join("libc.so.6").exists()).next().context("a C library among the packages")?;
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
