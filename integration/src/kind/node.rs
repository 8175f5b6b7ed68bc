//! A kind node's root: a stand-in of `kindest/node` made of Debian's packages, kind's own files and Kubernetes as it is built here, and
//! changed by `manifests/kind/install.sh`, as the Dockerfile beside that changes a real one.

use super::{IMAGE, images, source::Source};
use crate::{
    build,
    cluster::Programs,
    debian, go, image,
    node::{output_of, run_command, succeed},
    package, setup,
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

/// What kind's own image has of Debian, but for storage servers' clients and fuse-overlayfs.
const PACKAGES: &str = "systemd,systemd-sysv,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,e2fsprogs,bash,\
                        ca-certificates,curl,jq,procps";

/// The plugins of CNI that it has.
const PLUGINS: [&str; 3] = ["host-local", "portmap", "ptp"];

/// Folders of units that Debian starts and a node does not, and what of their names counts.
const UNWANTED: [(&str, &str); 6] = [
    ("usr/lib/systemd/system/multi-user.target.wants", ""),
    ("usr/lib/systemd/system/local-fs.target.wants", ""),
    ("usr/lib/systemd/system/basic.target.wants", ""),
    ("usr/lib/systemd/system/sysinit.target.wants", "systemd-tmpfiles-setup.service"),
    ("usr/lib/systemd/system/sockets.target.wants", "udev"),
    ("usr/lib/systemd/system/sockets.target.wants", "initctl"),
];

/// Runs a command in the root of its first word, with /proc there.
const ENTER: &str = "mount -t proc proc $0/proc && exec chroot $0 \"$@\"";

/// The root, in a folder, which goes with this value.
pub struct Node {
    root: PathBuf,
}

impl Node {
    /// Fetches and builds what it is made of.
    pub fn prepare() -> Result<()> {
        Source::find()?;
        debian::system("kind-base", PACKAGES)?;
        go::tools()?;
        go::cni_plugins().map(drop)
    }

    /// Makes it in `<target>/kind`, anew. Needs a network the first time.
    pub fn make(programs: &Programs) -> Result<Node> {
        let directory = setup::target().join("kind");
        fs::create_dir_all(&directory)?;
        let root = directory.canonicalize()?.join("root");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let source = Source::find()?;
        let base = debian::system("kind-base", PACKAGES)?;
        run_command("cp", &["-a", &base.to_string_lossy(), &root.to_string_lossy()])?;
        let node = Node { root };
        node.stand_in(programs, &source)?;
        node.install(&images::write(programs, &source, &node.path("images"))?)?;
        Ok(node)
    }

    /// Where the root is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn place(&self, from: &Path, folder: &str) -> Result<()> {
        let to = self.path(folder).join(from.file_name().context("a file's name")?);
        fs::create_dir_all(self.path(folder))?;
        fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
        Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
    }

    fn run(&self, title: &str, words: &[&str]) -> Result<()> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", ENTER]).arg(&self.root).args(words);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        succeed(title, &mut command).map(drop)
    }

    /// What kind's image is without Windlass, and without containerd.
    fn stand_in(&self, programs: &Programs, source: &Source) -> Result<()> {
        run_command("cp", &["-r", &source.root().join(".").to_string_lossy(), &self.root.to_string_lossy()])?;
        for folder in ["usr/local/bin", "kind/bin"] {
            run_command("chmod", &["-R", "755", &self.path(folder).to_string_lossy()])?;
        }
        let own = fs::read_dir(self.path("etc/systemd/system"))?.flatten().map(|entry| entry.path());
        let own = own.filter(|path| path.extension().is_some_and(|end| end == "wants")).map(|path| (path, ""));
        for (folder, word) in UNWANTED.iter().map(|(folder, word)| (self.path(folder), *word)).chain(own) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().contains(word) {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        let journal = self.path("etc/systemd/journald.conf");
        fs::write(&journal, format!("{}ReadKMsg=no\n", fs::read_to_string(&journal)?))?;
        self.run("enable the units", &["systemctl", "enable", "kubelet", "containerd", "undo-mount-hacks"])?;
        symlink("/dev/null", self.path("etc/systemd/system/systemd-binfmt.service"))?;
        fs::create_dir_all(self.path("etc/kubernetes/manifests"))?;
        for program in programs.of_a_node() {
            self.place(program, "usr/bin")?;
        }
        self.place(&go::tools()?.crictl, "usr/local/bin")?;
        let plugins = go::cni_plugins()?;
        for plugin in PLUGINS {
            self.place(&plugins.join(plugin), "opt/cni/bin")?;
        }
        fs::write(self.path("kind/version"), format!("v{}", go::KUBERNETES_VERSION))?;
        source.write_manifests(&self.path("kind/manifests"))
    }

    /// The steps of the Dockerfile.
    fn install(&self, archives: &[PathBuf]) -> Result<()> {
        let manifests = setup::workspace().join("manifests");
        let from = self.path("windlass");
        let package = package::make(&from)?;
        ensure!(package.starts_with(&from), "the package is at {}", package.display());
        fs::copy(manifests.join("crictl.yaml"), from.join("crictl.yaml"))?;
        run_command("cp", &["-r", &manifests.join("kind").to_string_lossy(), &from.to_string_lossy()])?;
        let inside: Vec<String> =
            archives.iter().filter_map(|path| Some(format!("/{}", path.strip_prefix(&self.root).ok()?.display()))).collect();
        let words = ["sh", "/windlass/kind/install.sh", "/windlass"].into_iter().chain(inside.iter().map(String::as_str));
        self.run("manifests/kind/install.sh", &words.collect::<Vec<_>>())?;
        fs::remove_dir_all(from)?;
        Ok(fs::remove_dir_all(self.path("images"))?)
    }

    /// Writes the node image as an archive that `docker load` reads.
    pub fn write_archive(&self, to: &Path) -> Result<()> {
        let layer = to.with_extension("layer");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&self.root).arg("-cf").arg(&layer).args(["--sort=name", "."]);
        build::step("pack the node's root", &mut tar)?;
        let config = json!({
            "Entrypoint": ["/usr/local/bin/entrypoint", "/sbin/init"], "Cmd": null, "StopSignal": "SIGRTMIN+3",
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "container=docker"],
        });
        image::write_archive_with(to, &format!("{IMAGE}:latest"), vec![fs::read(&layer)?], config)?;
        Ok(fs::remove_file(layer)?)
    }

    /// How large the root is, in MiB.
    pub fn size_mib(&self) -> Result<u64> {
        let said = output_of("du", &["-sm", &self.root.to_string_lossy()])?;
        said.split_whitespace().next().unwrap_or_default().parse().context("the size of the node's root")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
