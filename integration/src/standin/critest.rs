//! The images that critest pulls: busybox with marks and users of their own, web servers and a set-user-ID program.

use super::{GROUP, Images, Layer, PASSWD, PATH_VARIABLE, Tree, busybox, programs};
use crate::build;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn predefined_group() -> Result<Tree> {
    let mut tree = Tree::new();
    tree.file("etc/passwd", 0o644, format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n").as_bytes())?;
    tree.file(
        "etc/group",
        0o644,
        format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n").as_bytes(),
    )?;
    Ok(tree)
}

impl Images {
    /// Builds the stand-ins of critest.
    pub fn build() -> Result<Images> {
        let mut images = Images::default();
        let base = images.layer(busybox(&build::executing_busybox()?)?)?;
        images.plain(&base)?;
        images.special(&base)?;
        Ok(images)
    }

    /// Hex digits of the stand-in whose published digest critest has built in.
    pub fn pinned_digest(&self) -> Result<String> {
        let manifest = self.manifests.get("k8s-staging-cri-tools/test-image-digest:latest").context("the image with a digest")?;
        Ok(hex::encode(Sha256::digest(manifest)))
    }

    /// Images that are busybox and a file or a user of their own.
    fn plain(&mut self, base: &Layer) -> Result<()> {
        let shell = |more: Value| merged(json!({ "Cmd": ["sh"], "Env": [PATH_VARIABLE] }), more);
        let base = std::slice::from_ref(base);
        self.add("e2e-test-images/busybox", "1.29-2", base, &shell(json!({})))?;
        for tag in ["1", "1-glibc", "1-musl", "1-uclibc", "1.35.0-glibc"] {
            self.add("docker/library/busybox", tag, base, &json!({ "Cmd": ["sh"], "Env": [PATH_VARIABLE, format!("T={tag}")] }))?;
        }
        let users = [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:users"), ("username-group", "www-data:100")];
        for (name, user) in users {
            self.add(&format!("k8s-staging-cri-tools/test-image-user-{name}"), "latest", base, &shell(json!({ "User": user })))?;
        }
        let marked = [
            ("latest", "latest", "latest"),
            ("tag", "test", "tag"),
            ("tag", "all", "all"),
            ("digest", "latest", "digest"),
            ("1", "latest", "1"),
            ("2", "latest", "2"),
            ("3", "latest", "3"),
            ("tags", "1", "tags"),
            ("tags", "2", "tags"),
            ("tags", "3", "tags"),
        ];
        for (name, tag, mark) in marked {
            let mut tree = Tree::new();
            tree.file(&format!("TEST-{mark}"), 0o644, format!("test-{mark}\n").as_bytes())?;
            let layers = [base[0].clone(), self.layer(tree)?];
            self.add(&format!("k8s-staging-cri-tools/test-image-{name}"), tag, &layers, &shell(json!({})))?;
        }
        let layers = [base[0].clone(), self.layer(predefined_group()?)?];
        self.add("k8s-staging-cri-tools/test-image-predefined-group", "latest", &layers, &shell(json!({ "User": "1000" })))
    }

    /// Web servers and the set-user-ID program.
    fn special(&mut self, base: &Layer) -> Result<()> {
        let (web, nnp) = programs()?;
        let mut tree = Tree::new();
        for path in ["usr/sbin", "usr/local", "usr/local/bin"] {
            tree.directory(path, 0o755)?;
        }
        tree.file("usr/sbin/nginx", 0o755, &web)?;
        tree.link("usr/local/bin/httpd-foreground", "usr/sbin/nginx")?;
        let layers = [base.clone(), self.layer(tree)?];
        let server = |program: &str, variable: &str| json!({ "Entrypoint": [program], "Env": [PATH_VARIABLE, variable] });
        self.add("e2e-test-images/nginx", "1.14-2", &layers, &server("/usr/sbin/nginx", "WEB_KIND=nginx"))?;
        self.add("e2e-test-images/httpd", "2.4.39-4", &layers, &server("/usr/local/bin/httpd-foreground", "WEB_KIND=httpd"))?;
        self.add("k8s-staging-cri-tools/hostnet-nginx-amd64", "latest", &layers, &server("/usr/sbin/nginx", "WEB_PORT=12003"))?;
        let mut tree = Tree::new();
        tree.file("nnp", 0o4755, &nnp)?;
        let layers = [self.layer(tree)?];
        self.add("e2e-test-images/nonewprivs", "1.3", &layers, &json!({ "Entrypoint": ["/nnp"], "Env": [PATH_VARIABLE] }))
    }
}

fn merged(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}
