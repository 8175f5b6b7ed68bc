//! The images that Kubernetes' own suite pulls: agnhost, which is most of them, built from Kubernetes' module with the tools that specs
//! run beside it, and others that are busybox with something of their own.

use super::{GROUP, Images, Layer, MANIFEST_TYPE, PASSWD, PATH_VARIABLE, Tree, busybox, digest, programs};
use crate::{
    build,
    go::EndToEnd,
    image::{ARCHITECTURE, pause},
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// The shell that is found first: busybox's own, whose words specs expect of `/bin/sh`, drops variables with names such as `data-1`.
const SHELL: &str = "/bin/bash";

/// Tools of agnhost's image: Debian package, the program on this machine, its place in the image.
const TOOLS: [(&str, &str, &str); 10] = [
    ("bash", SHELL, "bin/bash"),
    ("curl", "/usr/bin/curl", "usr/bin/curl"),
    ("bind9-dnsutils", "/usr/bin/dig", "usr/bin/dig"),
    ("bind9-dnsutils", "/usr/bin/nslookup", "usr/bin/nslookup"),
    ("libc-bin", "/usr/bin/getent", "usr/bin/getent"),
    ("hostname", "/bin/hostname", "usr/bin/hostname"),
    ("iperf", "/usr/bin/iperf", "usr/local/bin/iperf"),
    ("iproute2", "/bin/ss", "usr/bin/ss"),
    ("netcat-openbsd", "/bin/nc.openbsd", "usr/bin/nc"),
    ("socat", "/usr/bin/socat", "usr/bin/socat"),
];

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

impl Images {
    /// Builds the stand-ins of Kubernetes' suite.
    pub fn build_for_e2e(built: &EndToEnd) -> Result<Images> {
        build::install(&TOOLS.map(|(package, program, _)| (package, program)))?;
        let mut images = Images::default();
        let shell = |kind: &str| json!({ "Cmd": ["sh"], "Env": [PATH_VARIABLE, format!("KIND={kind}")] });
        let mut tree = Tree::new();
        tree.file("pause", 0o755, &pause()?)?;
        let layers = [images.layer(tree)?];
        images.add("pause", "3.10.2", &layers, &json!({ "Entrypoint": ["/pause"], "User": "65535:65535" }))?;

        let mut tree = busybox(&build::executing_busybox()?)?;
        tree.program("usr/bin/sh", Path::new(SHELL))?;
        let base = [images.layer(tree)?];
        images.add("e2e-test-images/busybox", "1.37.0-2", &base, &shell("busybox"))?;
        images.add("e2e-test-images/nonroot", "1.5", &base, &json!({ "Cmd": ["sh"], "User": "1234" }))?;
        let [base] = base;
        let tools = [base.clone(), images.layer(tools()?)?];
        images.add("e2e-test-images/ipc-utils", "1.4", &tools, &shell("ipc-utils"))?;
        images.add("e2e-test-images/glibc-dns-testing", "2.1.1", &tools, &shell("glibc-dns-testing"))?;
        images.agnhost(&tools, built)?;
        images.others(&base)?;
        Ok(images)
    }

    fn agnhost(&mut self, tools: &[Layer], built: &EndToEnd) -> Result<()> {
        let mut tree = Tree::new();
        tree.file("agnhost", 0o755, &fs::read(&built.agnhost).context("read agnhost")?)?;
        tree.symlink("agnhost-2", "agnhost")?;
        tree.directory("uploads", 0o755)?;
        for name in ["localhost.crt", "localhost.key"] {
            tree.file(name, 0o644, &fs::read(built.images.join("agnhost/porter").join(name))?)?;
        }
        // A spec looks there for the system that agnhost is published with.
        tree.file("etc/os-release", 0o644, b"NAME=\"In place of Alpine Linux\"\n")?;
        self.fake_registry(&mut tree)?;
        let user = "user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n";
        tree.file("etc/passwd", 0o644, format!("{PASSWD}{user}").as_bytes())?;
        let groups = "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n";
        tree.file("etc/group", 0o644, format!("{GROUP}{groups}").as_bytes())?;
        let layers = [tools, &[self.layer(tree)?]].concat();
        let config = |command: &str, version: &str| json!({ "Entrypoint": ["/agnhost"], "Cmd": [command], "Env": [PATH_VARIABLE, format!("VERSION={version}")] });
        // Deployments are rolled from one version to the other.
        for version in ["2.55", "2.66.1"] {
            self.add("e2e-test-images/agnhost", version, &layers, &config("pause", version))?;
        }
        for name in ["kitten", "nautilus"] {
            let mut tree = Tree::new();
            for file in [format!("{name}.jpg"), "data.json".into()] {
                tree.file(&file, 0o644, &fs::read(built.images.join(name).join("html").join(&file))?)?;
            }
            let layers = [layers.as_slice(), &[self.layer(tree)?]].concat();
            self.add(&format!("e2e-test-images/{name}"), "1.8", &layers, &config("test-webserver", name))?;
        }
        Ok(())
    }

    /// What agnhost's own registry serves: the pause image, in a folder for each digest.
    fn fake_registry(&self, tree: &mut Tree) -> Result<()> {
        let manifest = self.manifests.get("pause:3.10.2").context("the pause image")?;
        let platform = json!({ "architecture": ARCHITECTURE, "os": "linux" });
        let own = json!({ "mediaType": MANIFEST_TYPE, "digest": digest(manifest), "size": manifest.len(), "platform": platform });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [own] }).to_string().into_bytes();
        let root = "var/registry/pause";
        let content: Value = serde_json::from_slice(manifest)?;
        let layers = content["layers"].as_array().into_iter().flatten();
        let blobs = layers.chain([&content["config"]]).filter_map(|one| self.blobs.get_key_value(one["digest"].as_str()?));
        let mut files = vec![("manifests", digest(&index), index.as_slice()), ("manifests", digest(manifest), manifest)];
        files.extend(blobs.map(|(digest, blob)| ("blobs", digest.clone(), blob.as_slice())));
        for (kind, digest, bytes) in files {
            let (algorithm, hex) = digest.split_once(':').context("a digest has an algorithm")?;
            tree.file(&format!("{root}/{kind}/{algorithm}/{}/{hex}/data", &hex[..2]), 0o644, bytes)?;
        }
        tree.file(&format!("{root}/manifests/testing"), 0o644, digest(&index).as_bytes())
    }

    /// Web servers and the set-user-ID program.
    fn others(&mut self, base: &Layer) -> Result<()> {
        let (web, nnp) = programs()?;
        let mut tree = Tree::new();
        tree.file("usr/sbin/nginx", 0o755, &web)?;
        let layers = [base.clone(), self.layer(tree)?];
        for version in ["1.27.0-2", "1.28.0-2"] {
            let variables = [PATH_VARIABLE.to_owned(), "WEB_KIND=nginx".into(), format!("VERSION={version}")];
            self.add("e2e-test-images/nginx", version, &layers, &json!({ "Entrypoint": ["/usr/sbin/nginx"], "Env": variables }))?;
        }
        let mut tree = Tree::new();
        tree.file("usr/local/bin/nnp", 0o4755, &nnp)?;
        let layers = [base.clone(), self.layer(tree)?];
        self.add("e2e-test-images/nonewprivs", "1.4", &layers, &json!({ "Cmd": ["nnp"], "Env": [PATH_VARIABLE] }))
    }
}

fn tools() -> Result<Tree> {
    let mut tree = Tree::new();
    for (_, program, path) in TOOLS {
        tree.program(path, Path::new(program))?;
    }
    tree.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n")?;
    Ok(tree)
}
