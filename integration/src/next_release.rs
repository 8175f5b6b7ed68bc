//! Packages of a later release of Debian, from apt's own mirror, with lists of their own: nothing of them is installed on the machine.

use crate::{build::step, node::output_of};
use anyhow::{Context, Result};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// The mirror of Debian that apt has.
fn mirror() -> Result<Option<String>> {
    let sites = output_of("apt-get", &["indextargets", "--format", "$(SITE)", "Origin: Debian"])?;
    Ok(sites.lines().next().map(str::to_owned))
}

/// The package lists of a release in a directory that goes with this value. What is fetched lies there too.
pub struct NextRelease {
    directory: tempfile::TempDir,
    name: &'static str,
}

impl NextRelease {
    /// Fetches the lists of packages (`deb`) or of their sources (`deb-src`) of the release `name`.
    pub fn open(kind: &str, name: &'static str) -> Result<NextRelease> {
        let release = NextRelease { directory: tempfile::tempdir().context("make a folder for packages")?, name };
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(release.path().join(folder))?;
        }
        // Where nothing is installed, a package is fetched with everything that it needs.
        fs::write(release.path().join("status"), "")?;
        // apt's own mirror, another release.
        let site = match mirror()? {
            Some(site) => site,
            // A machine whose lists were never fetched, or removed, does not tell.
            None => {
                step("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
                mirror()?.context("apt has a mirror of Debian")?
            }
        };
        let list = format!("{kind} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {site} {name} main\n");
        fs::write(release.path().join("sources.list"), list)?;
        step(&format!("apt-get update, of {name} in a folder of its own"), release.apt().arg("update"))?;
        Ok(release)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// An `apt-get` of this release, which begins in the directory.
    pub fn apt(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.current_dir(self.path()).arg("-qq");
        let places =
            [("Etc::sourcelist", "sources.list"), ("State::lists", "lists"), ("State::status", "status"), ("Cache", "cache")];
        for (key, value) in places {
            command.arg("-o").arg(format!("Dir::{key}={}", self.path().join(value).display()));
        }
        command.args(["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"]);
        command
    }

    /// Unpacks a package and all that it needs into `to`. Nothing of it is run.
    pub fn unpack(&self, package: &str, to: &Path) -> Result<()> {
        let mut fetch = self.apt();
        fetch.args(["install", "-y", "--download-only", "--no-install-recommends", package]).stdout(Stdio::null());
        step(&format!("fetch {package} of Debian {}", self.name), &mut fetch)?;
        for entry in fs::read_dir(self.path().join("cache/archives"))?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let status = Command::new("dpkg-deb").arg("-x").arg(&path).arg(to).status().context("run dpkg-deb")?;
                anyhow::ensure!(status.success(), "unpack {}: {status}", path.display());
            }
        }
        Ok(())
    }
}
