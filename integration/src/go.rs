//! Go modules that the conformance tests need: the CRI's own interface file, the real `crictl` and `critest`, and the validation
//! programs of the OCI runtime specification, built from `integration/go` into `<target>/windlass-tools`. Owns that cache; versions and checksums are committed, never taken as they come.

use crate::setup;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the Go module that builds the tools is kept.
const TOOLS_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go");

/// The one that builds the validation programs.
const VALIDATION_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/oci");

/// The one that builds the client of streams.
const STREAMS_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/streams");

/// The one that builds a collector of traces.
const COLLECTOR_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/collector");

/// The one that builds a registry server.
const REGISTRY_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/registry");

/// The one that builds a plugin of NRI, and the validation suite of the CRI that has specs of NRI.
const NRI_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/nri");

/// The one that builds a plugin of NRI of an earlier interface.
const EARLIER_NRI_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/nri-earlier");

/// The one that builds kind's calls of a node.
const KIND_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/kind");

/// The one that builds Kubernetes' own programs.
const KUBERNETES_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/kube");

/// The one that builds Kubernetes' suite of tests, its runner and the program in its images.
const E2E_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/e2e");

/// The one that builds what runs in a cluster as pods.
const ADDONS_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/addons");

/// The versions that the module's go.mod names. kubeadm wants this CoreDNS.
pub const COREDNS_VERSION: &str = "v1.14.6";
pub const METRICS_SERVER_VERSION: &str = "v0.9.0";

/// The Go module with the server of metrics.
const METRICS_SERVER: &str = "sigs.k8s.io/metrics-server";

/// The one that builds etcd.
const ETCD_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/etcd");

/// The one that builds the plugins of CNI.
const CNI_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/cni");

/// The plugins that are built, by their folder in the project.
const CNI_PLUGINS: [&str; 8] = [
    "ipam/host-local",
    "main/bridge",
    "main/macvlan",
    "main/ptp",
    "meta/bandwidth",
    "meta/firewall",
    "meta/portmap",
    "meta/tuning",
];

/// The version that the module's go.mod names, without the `v`.
pub const KUBERNETES_VERSION: &str = "1.37.2";

/// The Go module with those programs.
const RUNTIME_TOOLS: &str = "github.com/opencontainers/runtime-tools";

/// Part of the stamp: changes when the way of building changes.
const RECIPE: &str = "1 CGO_ENABLED=0 -trimpath";

/// The built programs.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The command line client of the CRI.
    pub crictl: PathBuf,
    /// The validation suite of the CRI. One digest in it is of an image that only its publisher has: see `critest`.
    pub critest: PathBuf,
    /// The runner of its kind of suite, which it calls to run specs in parallel.
    pub ginkgo: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Download {
    dir: Option<PathBuf>,
    sum: Option<String>,
    error: Option<String>,
}

/// The folder of an unpacked Go module. Fails unless its content has the checksum `h1` (go.sum's form).
pub fn module(path: &str, version: &str, h1: &str) -> Result<PathBuf> {
    let scratch = tempfile::tempdir().context("make a folder for go mod download")?;
    std::fs::write(scratch.path().join("go.mod"), "module windlass/download\n").context("write go.mod")?;
    let name = format!("{path}@{version}");
    let output = Command::new("go")
        .args(["mod", "download", "-json", &name])
        .current_dir(scratch.path())
        .env("GOFLAGS", "-mod=mod")
        .env("GOWORK", "off")
        .output()
        .context("run go (Debian: apt-get install golang-go; Go 1.24 or newer)")?;
    let found: Download = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("download {name}: {}", String::from_utf8_lossy(&output.stderr)))?;
    if let Some(error) = found.error {
        bail!("download {name}: {error}");
    }
    let sum = found.sum.unwrap_or_default();
    ensure!(sum == h1, "download {name}: checksum {sum}, committed is {h1}");
    found.dir.with_context(|| format!("download {name}: go named no folder"))
}

/// Builds crictl, critest and ginkgo unless `<target>/windlass-tools` holds the ones of this recipe. Prints what it does.
pub fn tools() -> Result<Tools> {
    let dir = setup::target().join("windlass-tools");
    let tools = Tools { crictl: dir.join("crictl"), critest: dir.join("critest"), ginkgo: dir.join("ginkgo") };
    let products: [&Path; 3] = [&tools.crictl, &tools.critest, &tools.ginkgo];
    unless_built(&dir, Path::new(TOOLS_MODULE), &["go.mod", "go.sum", "tools.go"], &products, || {
        println!("building crictl, critest v1.34.0 and ginkgo from Go modules into {} (about two minutes)", dir.display());
        let module = Path::new(TOOLS_MODULE);
        go_build(module, &["build", "-trimpath"], &tools.crictl, &["sigs.k8s.io/cri-tools/cmd/crictl"])?;
        go_build(module, &["build", "-trimpath"], &tools.ginkgo, &["github.com/onsi/ginkgo/v2/ginkgo"])?;
        go_build(module, &["test", "-c", "-trimpath"], &tools.critest, &["sigs.k8s.io/cri-tools/cmd/critest"])
    })?;
    Ok(tools)
}

/// The programs of the OCI runtime specification's validation suite, and what they run.
#[derive(Debug, Clone)]
pub struct Validation {
    /// Directory of the programs, one for each folder of the suite; `runtimetest` among them, which runs inside containers.
    pub programs: PathBuf,
    /// The suite's root file system, a packed archive.
    pub rootfs: PathBuf,
}

/// Builds the validation programs unless `<target>/windlass-tools/oci` holds the ones of this recipe. Prints what it does.
pub fn validation() -> Result<Validation> {
    let dir = setup::target().join("windlass-tools/oci");
    let validation = Validation { programs: dir.join("programs"), rootfs: dir.join("rootfs.tar.gz") };
    let module = Path::new(VALIDATION_MODULE);
    unless_built(&dir, module, &["go.mod", "go.sum"], &[&validation.programs.join("runtimetest"), &validation.rootfs], || {
        println!("building the validation programs of runtime-tools into {} (about two minutes)", dir.display());
        std::fs::create_dir_all(&validation.programs).context("create the folder of the validation programs")?;
        let packages = [format!("{RUNTIME_TOOLS}/validation/..."), format!("{RUNTIME_TOOLS}/cmd/runtimetest")];
        // The slash at the end makes it a folder of programs.
        let output = validation.programs.join("");
        go_build(module, &["build", "-trimpath"], &output, &packages.each_ref().map(String::as_str))?;
        let packed = folder_of(module, RUNTIME_TOOLS)?.join("rootfs-amd64.tar.gz");
        std::fs::copy(&packed, &validation.rootfs).with_context(|| format!("copy {}", packed.display())).map(drop)
    })?;
    Ok(validation)
}

/// The client of streams, which is client-go's: built unless `<target>/windlass-tools/streams` holds the one of this recipe.
pub fn streams() -> Result<PathBuf> {
    own_program("streams", STREAMS_MODULE)
}

/// A collector of traces with OpenTelemetry's own types: built unless `<target>/windlass-tools/collector` holds the one of this recipe.
pub fn collector() -> Result<PathBuf> {
    own_program("collector", COLLECTOR_MODULE)
}

/// A plugin of NRI with the interface's own library: built unless `<target>/windlass-tools/nri` holds the one of this recipe.
pub fn nri_plugin() -> Result<PathBuf> {
    own_program("nri", NRI_MODULE)
}

/// A plugin of NRI with the library of an interface before 0.12: built unless `<target>/windlass-tools/nri-earlier` holds the one of this recipe.
pub fn earlier_nri_plugin() -> Result<PathBuf> {
    own_program("nri-earlier", EARLIER_NRI_MODULE)
}

/// The validation suite of the CRI in the version that has specs of NRI: built unless `<target>/windlass-tools/critest-nri` holds the one of
/// this recipe. Prints what it does.
pub fn critest_with_nri() -> Result<PathBuf> {
    let dir = setup::target().join("windlass-tools/critest-nri");
    let (program, module) = (dir.join("critest"), Path::new(NRI_MODULE));
    unless_built(&dir, module, &["go.mod", "go.sum", "tools.go"], &[&program], || {
        println!("building critest v1.37.0 from Go modules into {} (a minute)", dir.display());
        go_build(module, &["test", "-c", "-trimpath"], &program, &["sigs.k8s.io/cri-tools/cmd/critest"])
    })?;
    Ok(program)
}

/// kind's own code against a node: built unless `<target>/windlass-tools/kind` holds the one of this recipe.
pub fn kind() -> Result<PathBuf> {
    own_program("kind", KIND_MODULE)
}

/// The command `kind`: built unless `<target>/windlass-tools/kind-command` holds the one of this recipe. Prints what it does.
pub fn kind_command() -> Result<PathBuf> {
    Program {
        folder: "kind-command",
        name: "kind",
        module: KIND_MODULE,
        sources: &["tools.go"],
        flags: "",
        package: "sigs.k8s.io/kind",
    }
    .built()
}

/// The folder of kind's unpacked module, which the build of its command fetches.
pub fn kind_source() -> Result<PathBuf> {
    kind_command()?;
    folder_of(Path::new(KIND_MODULE), "sigs.k8s.io/kind")
}

/// go-containerregistry's registry server: built unless `<target>/windlass-tools/registry` holds the one of this recipe.
pub fn registry() -> Result<PathBuf> {
    own_program("registry", REGISTRY_MODULE)
}

/// A module's own `main.go`, built.
fn own_program(name: &str, module: &str) -> Result<PathBuf> {
    Program { folder: name, name, module, sources: &["main.go"], flags: "", package: "." }.built()
}

/// One program of a module.
struct Program<'a> {
    /// Below `<target>/windlass-tools`.
    folder: &'a str,
    name: &'a str,
    module: &'a str,
    /// Files of ours that it is built from, besides go.mod and go.sum.
    sources: &'a [&'a str],
    /// For `go build`; empty for none.
    flags: &'a str,
    package: &'a str,
}

impl Program<'_> {
    /// Builds it unless the one of this recipe is there. Prints what it does.
    fn built(&self) -> Result<PathBuf> {
        let directory = setup::target().join("windlass-tools").join(self.folder);
        let (program, module) = (directory.join(self.name), Path::new(self.module));
        let inputs = [&["go.mod", "go.sum"], self.sources].concat();
        unless_built(&directory, module, &inputs, &[&program], || {
            println!("building {} from Go modules into {}", self.name, directory.display());
            let verb: Vec<&str> = ["build", "-trimpath", self.flags].into_iter().filter(|word| !word.is_empty()).collect();
            go_build(module, &verb, &program, &[self.package])
        })?;
        Ok(program)
    }
}

/// Builds the newest plugins of the CNI project, and `cnitool`, which calls them by libcni, unless `<target>/windlass-tools/cni` holds the ones of this recipe. Prints what it does.
pub fn cni_plugins() -> Result<PathBuf> {
    let dir = setup::target().join("windlass-tools/cni");
    let programs = dir.join("programs");
    let packages: Vec<String> = CNI_PLUGINS
        .iter()
        .map(|plugin| format!("github.com/containernetworking/plugins/plugins/{plugin}"))
        .chain(["github.com/containernetworking/cni/cnitool".to_owned()])
        .collect();
    let products: Vec<PathBuf> = packages.iter().filter_map(|package| Some(programs.join(package.rsplit_once('/')?.1))).collect();
    let products: Vec<&Path> = products.iter().map(PathBuf::as_path).collect();
    let module = Path::new(CNI_MODULE);
    unless_built(&dir, module, &["go.mod", "go.sum", "tools.go"], &products, || {
        println!("building the plugins of CNI from Go modules into {} (some seconds)", dir.display());
        std::fs::create_dir_all(&programs).context("create the folder of the plugins")?;
        // The slash at the end makes it a folder of programs.
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        go_build(module, &["build", "-trimpath"], &programs.join(""), &packages)
    })?;
    Ok(programs)
}

/// A program of Kubernetes, such as `kubelet`, or `health`, the answerer of gRPC health checks: built unless
/// `<target>/windlass-tools/kube` holds it, which takes some minutes the first time. Prints what it does.
pub fn kubernetes(name: &str) -> Result<PathBuf> {
    let package = if name == "health" { "./health".to_owned() } else { format!("k8s.io/kubernetes/cmd/{name}") };
    Program {
        folder: &format!("kube/{name}"),
        name,
        module: KUBERNETES_MODULE,
        sources: &["tools.go", "health/main.go"],
        flags: &kubernetes_flags(),
        package: &package,
    }
    .built()
}

/// For the linker: what Kubernetes' programs take for their version.
fn kubernetes_flags() -> String {
    let mut numbers = KUBERNETES_VERSION.split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let version = "k8s.io/component-base/version";
    format!(
        "-ldflags=-s -w -X {version}.gitVersion=v{KUBERNETES_VERSION} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
    )
}

/// Kubernetes' suite of tests for a cluster.
#[derive(Debug, Clone)]
pub struct EndToEnd {
    pub suite: PathBuf,
    /// The runner of its kind of suite.
    pub ginkgo: PathBuf,
    /// What most of its images consist of.
    pub agnhost: PathBuf,
    /// Where Kubernetes has the other files of its images.
    pub images: PathBuf,
}

/// Builds the suite unless `<target>/windlass-tools/e2e` holds the one of this recipe. Prints what it does.
pub fn end_to_end() -> Result<EndToEnd> {
    let dir = setup::target().join("windlass-tools/e2e");
    let module = Path::new(E2E_MODULE);
    let built = EndToEnd {
        suite: dir.join("e2e.test"),
        ginkgo: dir.join("ginkgo"),
        agnhost: dir.join("agnhost"),
        images: folder_of(module, "k8s.io/kubernetes")?.join("test/images"),
    };
    let products: [&Path; 3] = [&built.suite, &built.ginkgo, &built.agnhost];
    unless_built(&dir, module, &["go.mod", "go.sum", "tools.go"], &products, || {
        println!("building e2e.test of Kubernetes {KUBERNETES_VERSION} from Go modules into {} (five minutes)", dir.display());
        let flags = kubernetes_flags();
        go_build(module, &["build", "-trimpath", &flags], &built.ginkgo, &["github.com/onsi/ginkgo/v2/ginkgo"])?;
        go_build(module, &["build", "-trimpath", &flags], &built.agnhost, &["k8s.io/kubernetes/test/images/agnhost"])?;
        go_build(module, &["test", "-c", "-trimpath", &flags], &built.suite, &["k8s.io/kubernetes/test/e2e"])
    })?;
    Ok(built)
}

/// What runs in a cluster as pods.
#[derive(Debug, Clone)]
pub struct Addons {
    /// The DNS server.
    pub coredns: PathBuf,
    /// The server of metrics, and the folder of the objects that deploy it.
    pub metrics_server: PathBuf,
    pub metrics_objects: PathBuf,
}

/// Builds them unless `<target>/windlass-tools/addons` holds the ones of this recipe. Prints what it does.
pub fn addons() -> Result<Addons> {
    let dir = setup::target().join("windlass-tools/addons");
    let at = |name: &str| dir.join(name);
    let addons = Addons { coredns: at("coredns"), metrics_server: at("metrics-server"), metrics_objects: at("objects") };
    let products = [addons.coredns.as_path(), &addons.metrics_server, &at("objects/kustomization.yaml")];
    let module = Path::new(ADDONS_MODULE);
    unless_built(&dir, module, &["go.mod", "go.sum", "tools.go", "coredns/main.go"], &products, || {
        println!(
            "building CoreDNS {COREDNS_VERSION} and metrics-server {METRICS_SERVER_VERSION} into {} (half a minute after Kubernetes)",
            dir.display()
        );
        // The slash at the end makes it a folder of programs.
        let packages = ["./coredns", &format!("{METRICS_SERVER}/cmd/metrics-server")];
        go_build(module, &["build", "-trimpath", "-ldflags=-s -w"], &dir.join(""), &packages)?;
        let from = folder_of(module, METRICS_SERVER)?.join("manifests/base");
        std::fs::create_dir_all(&addons.metrics_objects).context("create the folder of objects")?;
        for entry in std::fs::read_dir(&from).with_context(|| format!("read {}", from.display()))?.flatten() {
            let content = std::fs::read(entry.path()).with_context(|| format!("read {}", entry.path().display()))?;
            std::fs::write(addons.metrics_objects.join(entry.file_name()), content)?;
        }
        Ok(())
    })?;
    Ok(addons)
}

/// etcd's server: built unless `<target>/windlass-tools/etcd` holds the one of this recipe. Prints what it does.
pub fn etcd() -> Result<PathBuf> {
    Program {
        folder: "etcd",
        name: "etcd",
        module: ETCD_MODULE,
        sources: &["tools.go"],
        flags: "-ldflags=-s -w",
        package: "go.etcd.io/etcd/server/v3",
    }
    .built()
}

/// The unpacked folder of a module that `module` requires.
fn folder_of(module: &Path, required: &str) -> Result<PathBuf> {
    let go = |words: &[&str]| -> Result<String> {
        let output = Command::new("go").args(words).arg(required).current_dir(module).env("GOWORK", "off").output();
        let output = output.context("run go")?;
        ensure!(output.status.success(), "go {} {required}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).with_context(|| format!("the folder of {required}"))
    };
    // What was built before may be gone from Go's cache.
    go(&["mod", "download"])?;
    Ok(PathBuf::from(go(&["list", "-m", "-f", "{{.Dir}}"])?.trim()))
}

/// Calls `build` unless `products` are there and the stamp in `dir` is that of the module's `inputs`. One process at a time.
fn unless_built(
    dir: &Path,
    module: &Path,
    inputs: &[&str],
    products: &[&Path],
    build: impl FnOnce() -> Result<()>,
) -> Result<()> {
    unless_stamped(dir, &[&stamp(module, inputs)?], products, build)
}

/// Calls `build` unless `products` are there and the stamp in `dir` says the same words. One process at a time.
pub fn unless_stamped(dir: &Path, words: &[&str], products: &[&Path], build: impl FnOnce() -> Result<()>) -> Result<()> {
    let stamp_file = dir.join("stamp");
    let stamp = words.join("\n");
    let current = || {
        let same = std::fs::read_to_string(&stamp_file).is_ok_and(|found| found == stamp);
        same && products.iter().all(|product| product.is_file())
    };
    // Looked at before anything is written: a guest sees the programs on a read-only file system.
    if current() {
        return Ok(());
    }
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let lock = std::fs::File::create(dir.join("lock")).context("create the lock of the tools")?;
    lock.lock().context("wait for the lock of the tools")?;
    if current() {
        return Ok(());
    }
    build()?;
    std::fs::write(&stamp_file, &stamp).context("write the stamp of the tools")
}

fn stamp(module: &Path, inputs: &[&str]) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(RECIPE);
    for name in inputs {
        hash.update(std::fs::read(module.join(name)).with_context(|| format!("read {name} of the tools"))?);
    }
    Ok(hex::encode(hash.finalize()))
}

fn go_build(module: &Path, verb: &[&str], output: &Path, packages: &[&str]) -> Result<()> {
    println!("  {}", packages.join(" "));
    // The checksum database does not answer for cri-tools; the committed go.sum pins it.
    let status = Command::new("go")
        .args(verb)
        // What is for a debugger alone is a twelfth of the compiler's work.
        .arg("-gcflags=all=-dwarf=false")
        .arg("-o")
        .arg(output)
        .args(packages)
        .current_dir(module)
        .env("GONOSUMDB", "sigs.k8s.io/cri-tools")
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        .env("GOWORK", "off")
        .env("CGO_ENABLED", "0")
        // The compiler collects garbage four times less often: a tenth less work, of little more memory.
        .env("GOGC", "400")
        .stdin(Stdio::null())
        .status()
        .context("run go (Debian: apt-get install golang-go; Go 1.24 or newer)")?;
    ensure!(status.success(), "build {}: go ended with {status}", packages.join(" "));
    Ok(())
}
