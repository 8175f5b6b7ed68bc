//! The programs that Windlass is compared with: containerd, runc, CRI-O and the CNI plugins from the Go module proxy, crun from the
//! source package of Debian's next release, conmon from Debian. Owns `<target>/windlass-tools/peers`; nothing but `cargo xtask compare`
//! needs it.
//!
//! A Go module is built in its own unpacked folder, so that its own go.mod and go.sum decide everything below it; what comes is pinned
//! here by the checksum of the module.

use crate::{
    build::{self, step},
    go,
    next_release::NextRelease,
    setup,
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Debian packages that the programs are built from or run with, and a file of each by which its presence is seen.
const PACKAGES: [(&str, &str); 10] = [
    ("conmon", "/usr/bin/conmon"),
    ("iptables", "/usr/sbin/iptables"),
    ("pkg-config", "/usr/bin/pkg-config"),
    ("libseccomp-dev", "/usr/include/seccomp.h"),
    ("libyajl-dev", "/usr/include/yajl/yajl_parse.h"),
    ("libcap-dev", "/usr/include/sys/capability.h"),
    ("make", "/usr/bin/make"),
    ("autoconf", "/usr/bin/autoconf"),
    ("automake", "/usr/bin/automake"),
    ("libtool", "/usr/bin/libtoolize"),
];

/// One Go module and what is built from it.
struct Product {
    module: &'static str,
    version: &'static str,
    /// Checksum of the module, in go.sum's form.
    sum: &'static str,
    /// Whether it calls C (libseccomp, sqlite).
    cgo: bool,
    tags: &'static str,
    /// For the linker, beside `-s -w`.
    define: &'static str,
    packages: &'static [&'static str],
    /// Below the folder of the products.
    folder: &'static str,
    /// What the packages become in that folder.
    programs: &'static [&'static str],
}

const PRODUCTS: [Product; 4] = [
    Product {
        module: "github.com/opencontainers/runc",
        version: "v1.5.2",
        sum: "h1:eUUowc2WJCnFYzI87C1WqRcu356Dk/wsoi90y+2wEfE=",
        cgo: true,
        tags: "seccomp",
        define: "-X main.version=1.5.2",
        packages: &["."],
        folder: "",
        programs: &["runc"],
    },
    Product {
        module: "github.com/containernetworking/plugins",
        version: "v1.9.1",
        sum: "h1:8oU6WsIsU3bpnNZuvHp74a6cE1MJwbj2P7s4/yTUNlA=",
        cgo: false,
        tags: "",
        define: "",
        packages: &["./plugins/main/bridge", "./plugins/ipam/host-local", "./plugins/main/loopback", "./plugins/meta/portmap"],
        folder: "cni",
        programs: &["bridge", "host-local", "loopback", "portmap"],
    },
    Product {
        module: "github.com/containerd/containerd/v2",
        version: "v2.4.2",
        sum: "h1:p6Qg+xbEz8lvwdhHDx0U469xENvp4LgGBx+E7djXkGw=",
        cgo: false,
        tags: "no_btrfs no_devmapper no_zfs",
        define: "-X github.com/containerd/containerd/v2/version.Version=2.4.2",
        packages: &["./cmd/containerd", "./cmd/containerd-shim-runc-v2"],
        folder: "",
        programs: &["containerd", "containerd-shim-runc-v2"],
    },
    Product {
        module: "github.com/cri-o/cri-o",
        version: "v1.34.0",
        sum: "h1:ux2URwAyENy5e5hD9Z95tshdfy98eqatZk0fxx3rhuk=",
        cgo: true,
        tags: "containers_image_openpgp exclude_graphdriver_btrfs containers_image_ostree_stub seccomp",
        define: "",
        packages: &["./cmd/crio"],
        folder: "",
        programs: &["crio"],
    },
];

/// Builds what is missing; returns the folder of the programs. Prints what it does.
pub(super) fn build() -> Result<PathBuf> {
    build::install(&PACKAGES)?;
    let folder = setup::target().join("windlass-tools/peers");
    for product in &PRODUCTS {
        product.build(&folder)?;
    }
    unless_there(&folder.join("pinns"), pinns)?;
    unless_there(&folder.join("crun"), crun)?;
    for name in ["bare-runc", "bare-crun"] {
        let source = setup::workspace().join("integration/go/bare.c");
        let mut gcc = Command::new("gcc");
        gcc.args(["-D_GNU_SOURCE", "-O2", "-static", "-s", "-w", "-o"]).arg(folder.join(name)).arg(source);
        step(&format!("build {name}"), &mut gcc)?;
    }
    Ok(folder)
}

impl Product {
    fn build(&self, products: &Path) -> Result<()> {
        let folder = products.join(self.folder);
        let programs: Vec<PathBuf> = self.programs.iter().map(|name| folder.join(name)).collect();
        let stamps: Vec<&str> = vec![self.sum, self.tags, self.define];
        let paths: Vec<&Path> = programs.iter().map(PathBuf::as_path).collect();
        let name = self.programs.first().context("a product has programs")?;
        go::unless_stamped(&products.join("stamps").join(name), &stamps, &paths, || self.compile(&folder))
    }

    fn compile(&self, folder: &Path) -> Result<()> {
        let module = go::module(self.module, self.version, self.sum)?;
        fs::create_dir_all(folder)?;
        let mut command = Command::new("go");
        command.args(["build", "-trimpath", "-tags", self.tags, "-ldflags", &format!("-s -w {}", self.define)]);
        // The slash at the end makes it a folder of programs; a module's root package has no name of its own.
        match self.packages {
            ["."] => command.arg("-o").arg(folder.join(self.programs.first().context("a program")?)),
            _ => command.arg("-o").arg(folder.join("")),
        };
        command.args(self.packages).current_dir(module);
        command.env("GOFLAGS", "-mod=readonly -buildvcs=false").env("GOWORK", "off");
        command.env("CGO_ENABLED", if self.cgo { "1" } else { "0" });
        step(&format!("build {} {} (up to six minutes)", self.module, self.version), &mut command)
    }
}

fn unless_there(program: &Path, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if program.is_file() { Ok(()) } else { build(program) }
}

/// CRI-O's program that pins namespaces.
fn pinns(output: &Path) -> Result<()> {
    let crio = PRODUCTS.iter().find(|product| product.programs == ["crio"]).context("CRI-O is a product")?;
    let source = go::module(crio.module, crio.version, crio.sum)?.join("pinns/src");
    let mut files = Vec::new();
    for entry in fs::read_dir(&source).with_context(|| format!("read {}", source.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "c") {
            files.push(path);
        }
    }
    let version = format!("-DVERSION=\"{}\"", crio.version);
    step("build pinns", Command::new("gcc").args(["-O2", "-std=c99", "-static", &version, "-o"]).arg(output).args(files))
}

/// crun of Debian's next release: the one of this release does not know the version of the specification that CRI-O writes.
fn crun(output: &Path) -> Result<()> {
    let release = NextRelease::open("deb-src", "trixie")?;
    let scratch = release.path();
    // A mirror may lack the files of the package beside the source, which are not needed; apt verified what it leaves here.
    let _ = release.apt().args(["source", "--download-only", "crun"]).stderr(Stdio::null()).status();
    let mut archives = fs::read_dir(scratch)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let Some(archive) = archives.find(|name| name.starts_with("crun_") && name.contains(".orig.tar.")) else {
        bail!("download crun's source: apt left no crun_*.orig.tar.* in {}", scratch.display());
    };
    let script = "tar xf $0 && cd crun-*/ && { [ -x configure ] || ./autogen.sh; } && \
                  ./configure --quiet --disable-systemd --disable-criu --disable-shared && \
                  echo '#define GIT_VERSION \"debian\"' > git-version.h && make -s crun && cp crun $1";
    let log = fs::File::create(scratch.join("log"))?;
    let mut shell = Command::new("sh");
    shell.args(["-ec", script, &archive]).arg(output).current_dir(scratch).stdout(log.try_clone()?).stderr(log);
    step("build crun (half a minute)", &mut shell).with_context(|| fs::read_to_string(scratch.join("log")).unwrap_or_default())
}
