//! Pulls under a policy that wants signatures. The keys and signatures are openssl's, so that the daemon does not judge its own work.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, process::Command};
use tonic::{Code, Status};
use windlass_integration::{
    client::Client,
    daemon::Daemon,
    image, node,
    registry::{Added, Registry},
};
use windlass_proto::cri;

const REPOSITORY: &str = "team/app";

struct Ground {
    registry: Registry,
    daemon: Daemon,
    client: Client,
    added: Added,
    directory: tempfile::TempDir,
}

impl Ground {
    fn new() -> Result<Ground> {
        let registry = Registry::start()?;
        let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"] } });
        let added = registry.add(REPOSITORY, "v1", &[image::files_layer(&[("f", 0o644, b"content")])?], &config)?;
        let directory = tempfile::tempdir()?;
        let mut daemon = Daemon::prepare(&[])?;
        let policy = directory.path().join("policy.json");
        daemon.configure(&format!("[images]\npolicy = {policy:?}\n"))?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        Ok(Ground { registry, daemon, client, added, directory })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn repository(&self) -> String {
        format!("{}/{REPOSITORY}", self.registry.host())
    }

    /// A private key at `name`, and its public one at `name.pub`.
    fn key(&self, name: &str, options: &[&str]) -> Result<()> {
        let (private, public) = (self.at(name), self.at(&format!("{name}.pub")));
        openssl(&[&["genpkey", "-out", &text(&private)], options].concat())?;
        openssl(&["pkey", "-in", &text(&private), "-pubout", "-out", &text(&public)])
    }

    /// A signature of a digest and a name.
    fn signature(&self, key: &str, digest: &str, name: &str) -> Result<(String, String)> {
        let payload = json!({
            "critical": {
                "identity": { "docker-reference": name },
                "image": { "docker-manifest-digest": digest },
                "type": "cosign container image signature",
            },
            "optional": null,
        })
        .to_string();
        let (input, output, encoded) = (self.at("payload"), self.at("signature"), self.at("encoded"));
        fs::write(&input, &payload)?;
        openssl(&["dgst", "-sha256", "-sign", &text(&self.at(key)), "-out", &text(&output), &text(&input)])?;
        openssl(&["base64", "-A", "-in", &text(&output), "-out", &text(&encoded)])?;
        Ok((payload, fs::read_to_string(encoded)?))
    }

    /// What the policy wants of this registry's images; of all others it wants nothing.
    fn require(&self, requirements: Value) -> Result<()> {
        let policy = json!({
            "default": [{ "type": "insecureAcceptAnything" }],
            "transports": { "docker": { self.registry.host(): requirements } },
        });
        fs::write(self.at("policy.json"), policy.to_string()).context("write the policy")
    }

    fn pull(&self, name: &str) -> Result<String, Status> {
        let image = Some(cri::ImageSpec { image: name.into(), ..Default::default() });
        self.client.pull_image(cri::PullImageRequest { image, auth: None, sandbox_config: None }).map(|reply| reply.image_ref)
    }

    /// The pull is refused as kubelet wants to hear it, no blob but signatures' payloads was asked for, and nothing is left.
    fn refused(&self, name: &str, why: &str) -> Result<()> {
        let (blobs, kept) = (self.blobs(), self.kept()?);
        let status = self.pull(name).expect_err(why);
        ensure!(status.code() == Code::Unknown, "{why}: {status:?}");
        ensure!(
            status.message().starts_with("SignatureValidationFailed: ") && status.message().contains(why),
            "{why}: {status:?}"
        );
        ensure!(self.blobs() == blobs, "{why}: {:?}", self.registry.requests());
        ensure!(self.kept()? == kept, "{why}: {:?}", self.kept()?);
        Ok(())
    }

    /// Requests for the image's configuration and layers.
    fn blobs(&self) -> usize {
        let of_image = |line: &String| self.added.blobs.iter().any(|digest| line.ends_with(digest.as_str()));
        self.registry.requests().iter().filter(|line| of_image(line)).count()
    }

    /// Images, and layers on the disk.
    fn kept(&self) -> Result<(usize, usize)> {
        let images = self.client.list_images(cri::ListImagesRequest::default())?.images.len();
        let layers = fs::read_dir(self.daemon.root().join("images/layers")).map_or(0, Iterator::count);
        Ok((images, layers))
    }
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

fn openssl(words: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(words).output().context("run openssl (Debian package openssl)")?;
    ensure!(output.status.success(), "openssl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

const P256: [&str; 4] = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];

#[test]
fn only_a_signed_image_is_pulled() -> Result<()> {
    node::run(|| {
        let ground = Ground::new()?;
        let (tagged, repository) = (format!("{}:v1", ground.repository()), ground.repository());
        let index = ground.added.index.clone();
        ground.key("key", &P256)?;
        ground.key("other", &P256)?;
        let signed =
            |identity: Value| json!([{ "type": "sigstoreSigned", "keyPath": ground.at("key.pub"), "signedIdentity": identity }]);
        let sign = |key: &str, digest: &str, name: &str| -> Result<()> {
            ground.registry.sign(REPOSITORY, &index, &[ground.signature(key, digest, name)?]);
            Ok(())
        };
        ground.refused(&tagged, "policy.json")?;
        ground.require(signed(json!({ "type": "matchRepository" })))?;
        ground.refused(&tagged, "the image has none")?;
        sign("other", &index, &repository)?;
        ground.refused(&tagged, "none of the policy's keys")?;
        sign("key", &format!("sha256:{}", "1".repeat(64)), &repository)?;
        ground.refused(&tagged, "another image")?;
        sign("key", &index, &format!("{}/team/other", ground.registry.host()))?;
        ground.refused(&tagged, "team/other")?;
        let (payload, signature) = ground.signature("key", &format!("sha256:{}", "1".repeat(64)), &repository)?;
        ground.registry.sign(REPOSITORY, &index, &[(payload.replace(&"1".repeat(64), &index[7..]), signature)]);
        ground.refused(&tagged, "none of the policy's keys")?;
        // One that holds is enough, wherever it stands.
        let both = [ground.signature("other", &index, &repository)?, ground.signature("key", &index, &repository)?];
        ground.registry.sign(REPOSITORY, &index, &both);
        ensure!(ground.pull(&tagged)? == ground.added.config);
        ensure!(ground.pull(&format!("{repository}@{index}"))? == ground.added.config);
        // The usual identity is the name with its tag.
        ground.require(json!([{ "type": "sigstoreSigned", "keyPath": ground.at("key.pub") }]))?;
        ground.refused(&tagged, "for the name")?;
        sign("key", &index, &tagged)?;
        ensure!(ground.pull(&tagged)? == ground.added.config);
        Ok(())
    })
}

#[test]
fn an_image_that_is_here_is_judged_again() -> Result<()> {
    node::run(|| {
        let ground = Ground::new()?;
        let name = format!("{}:v1", ground.repository());
        ground.require(json!([{ "type": "insecureAcceptAnything" }]))?;
        ensure!(ground.pull(&name)? == ground.added.config);
        // What is imported is asked about too, here by the default.
        let archive = text(&ground.at("archive.tar"));
        ground.daemon.windlass(&["image", "export", &name, "--output", &archive])?;
        fs::write(ground.at("policy.json"), r#"{"default":[{"type":"reject"}]}"#)?;
        let error = ground.daemon.windlass(&["image", "import", &archive]).expect_err("rejected").to_string();
        ensure!(error.contains("SignatureValidationFailed: ") && error.contains("docker-archive"), "{error}");
        ground.require(json!([{ "type": "reject" }]))?;
        let asked = ground.registry.requests().len();
        ground.refused(&name, "are rejected")?;
        ensure!(ground.registry.requests().len() == asked, "a rejected image was asked for: {:?}", ground.registry.requests());
        for (policy, why) in [
            ("{", "policy.json"),
            (r#"{"default":[{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k"}]}"#, "signedBy"),
            (r#"{"default":[{"type":"sigstoreSigned","fulcio":{}}]}"#, "fulcio"),
            (r#"{"default":[{"type":"reject"}],"default":[{"type":"insecureAcceptAnything"}]}"#, "duplicate"),
        ] {
            fs::write(ground.at("policy.json"), policy)?;
            ground.refused(&name, why)?;
        }
        fs::remove_file(ground.at("policy.json"))?;
        ground.refused(&name, "policy.json")
    })
}

#[test]
fn keys_of_other_kinds_sign_too() -> Result<()> {
    node::run(|| {
        let ground = Ground::new()?;
        let (name, index) = (format!("{}:v1", ground.repository()), ground.added.index.clone());
        for (key, options) in [
            ("p384", ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
            ("rsa", ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ] {
            ground.key(key, &options)?;
            ground.require(json!([{ "type": "sigstoreSigned", "keyPath": ground.at(&format!("{key}.pub")) }]))?;
            ground.registry.sign(REPOSITORY, &index, &[ground.signature(key, &index, &ground.repository())?]);
            ground.refused(&name, "for the name")?;
            ground.registry.sign(REPOSITORY, &index, &[ground.signature(key, &index, &name)?]);
            ensure!(ground.pull(&name)? == ground.added.config, "{key}");
        }
        Ok(())
    })
}
