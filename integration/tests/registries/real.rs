//! distribution behind TLS and tokens, go-containerregistry behind client certificates and passwords, and one as the other's mirror.

use crate::{
    Ground, auth_file,
    authority::Authority,
    directories, login, quoted,
    servers::{Image, Server, Ways},
    tokens::{GUEST, REFRESH, Tokens, USER},
};
use anyhow::{Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use std::{fs, path::Path};
use tonic::Code;
use windlass_integration::{go, image, node};
use windlass_proto::cri;

/// The test image, as two real layers.
fn busybox() -> Result<Image> {
    Image::new(&image::layers()?, json!({ "User": "1000:1000" }))
}

/// What was pulled is what was pushed, whichever way one looks at it.
fn expect_image(ground: &Ground, name: &str, repository: &str, pushed: &Image) -> Result<()> {
    let (id, listed) = (pushed.id(), ground.images()?);
    ensure!(listed.len() == 1, "{listed:?}");
    let (one, by_digest) = (&listed[0], format!("{repository}@{}", pushed.digest()));
    ensure!(one.id == id && one.repo_tags == [name] && one.repo_digests == [by_digest.clone()], "{one:?}");
    ensure!(one.uid.as_ref().is_some_and(|uid| uid.value == 1000) && one.username.is_empty() && one.size > 0, "{one:?}");
    for reference in [name, &by_digest, &id, &id["sha256:".len()..], &id["sha256:".len()..19]] {
        let request = cri::ImageStatusRequest { image: crate::spec(reference), verbose: false };
        let found = ground.client.image_status(request)?.image;
        ensure!(found.is_some_and(|image| image.id == id), "status of {reference}");
    }
    ground.expect_sound(pushed.layers.len())
}

#[test]
fn distribution_behind_tls_and_a_token_service() -> Result<()> {
    node::run(|| {
        let (directory, storage) = directories()?;
        let authority = Authority::new(directory.path())?;
        let tokens = Tokens::start(directory.path(), Some(authority.config()?))?;
        let pushed = busybox()?;
        let open = Server::distribution(directory.path(), &storage, Ways::default())?;
        open.push("team/busybox", "v1", &pushed)?;
        open.push("open/busybox", "v1", &pushed)?;
        let pair = authority.server("registry", &["127.0.0.1"])?;
        let ways = Ways { tls: Some(&pair), tokens: Some(&tokens), ..Ways::default() };
        let registry = Server::distribution(directory.path(), &storage, ways)?;
        let ground = Ground::new("")?;
        let (name, right) = (registry.name("team/busybox:v1"), login(USER.0, USER.1));
        let denied = |name: &str, auth: Option<cri::AuthConfig>, why: &str| {
            let error = ground.pull(name, auth).expect_err(why);
            ensure!(error.code() == Code::PermissionDenied && error.message().contains(why), "{error:?}");
            ensure!(ground.images()?.is_empty(), "an image after {error}");
            Ok(())
        };
        // Nobody has said yet that this registry speaks TLS, then nobody that its authority counts.
        let server = format!("server = \"https://{}\"\n", registry.address);
        for text in [String::new(), server.clone()] {
            if !text.is_empty() {
                ground.hosts(&registry.address, &text)?;
            }
            let error = ground.pull(&name, right.clone()).expect_err("no TLS, or no trust");
            ensure!(error.code() != Code::PermissionDenied && ground.images()?.is_empty(), "{error:?}");
            ensure!(text.is_empty() || error.message().starts_with("RegistryUnavailable: "), "{error:?}");
        }
        ground.hosts(&registry.address, &format!("{server}ca = {}\n", quoted(&authority.certificate())))?;
        denied(&name, None, "token service")?;
        denied(&name, login(USER.0, "guess"), "token service")?;
        // Known, but not here: the service gives a token that the registry finds too small.
        denied(&name, login(GUEST.0, GUEST.1), &registry.address)?;
        denied(&registry.name("team/busybox:none"), login(GUEST.0, GUEST.1), &registry.address)?;
        let error = ground.pull(&registry.name("team/busybox:none"), right.clone()).expect_err("no such tag");
        ensure!(error.code() == Code::NotFound, "{error:?}");
        let auth = |change: &dyn Fn(&mut cri::AuthConfig)| {
            let mut auth = cri::AuthConfig::default();
            change(&mut auth);
            Some(auth)
        };
        let basic = STANDARD.encode(format!("{}:{}", USER.0, USER.1));
        let bearer = tokens.token("team/busybox", &["pull"], 300)?;
        for (what, auth) in [
            ("user and password", right.clone()),
            ("both in one", auth(&|a| a.auth.clone_from(&basic))),
            ("a refresh token", auth(&|a| a.identity_token = REFRESH.into())),
            ("a token of the registry", auth(&|a| a.registry_token.clone_from(&bearer))),
        ] {
            let id = ground.pull(&name, auth).map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
            ensure!(id == pushed.id(), "{what}: {id}");
            expect_image(&ground, &name, &registry.name("team/busybox"), &pushed)?;
            ground.remove(&id)?;
        }
        ensure!(tokens.given().iter().any(|given| given == "POST repository:team/busybox:pull"), "{:?}", tokens.given());
        let expired = tokens.token("team/busybox", &["pull"], -3600)?;
        denied(&name, auth(&|a| a.registry_token.clone_from(&expired)), &registry.address)?;
        denied(&name, auth(&|a| a.identity_token = "stolen".into()), "token service")?;
        // The file has what the caller has not; the longest entry counts.
        let logins = [
            (registry.address.clone(), format!("{}:guess", USER.0)),
            (registry.name("team"), format!("{}:{}", USER.0, USER.1)),
            (registry.name("open"), format!("{}:{}", GUEST.0, GUEST.1)),
        ];
        ground.write("auth.json", &auth_file(&logins.each_ref().map(|(a, b)| (a.as_str(), b.as_str()))))?;
        ensure!(ground.pull(&name, None)? == pushed.id());
        ensure!(ground.pull(&registry.name("open/busybox:v1"), None)? == pushed.id());
        ensure!(ground.images()?.len() == 1, "one image of two names: {:?}", ground.images()?);
        ground.expect_runs(&pushed.id())?;
        ensure!(!ground.daemon.log().contains(USER.1), "a password is in the log");
        ground.expect_finished()
    })
}

#[test]
fn go_containerregistry_behind_client_certificates_and_a_password() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, _) = directories()?;
        let authority = Authority::new(directory.path())?;
        let (pair, client) = (authority.server("registry", &["127.0.0.1"])?, authority.client("node")?);
        let certificate = authority.certificate();
        let tls = Some((&pair, certificate.as_path()));
        let registry = Server::containerregistry(directory.path(), &program, tls, Some(&client), Some("anchor:chain"))?;
        let pushed = busybox()?;
        registry.push("team/busybox", "v1", &pushed)?;
        let ground = Ground::new("")?;
        let name = registry.name("team/busybox:v1");
        let trusted = format!("server = \"https://{}\"\nca = {}\n", registry.address, quoted(&authority.certificate()));
        ground.hosts(&registry.address, &trusted)?;
        let error = ground.pull(&name, login("anchor", "chain")).expect_err("no certificate");
        ensure!(error.message().starts_with("RegistryUnavailable: "), "{error:?}");
        // A certificate that another authority has given.
        let elsewhere = directory.path().join("elsewhere");
        fs::create_dir(&elsewhere)?;
        let other = Authority::new(&elsewhere)?.client("node")?;
        let pair_of =
            |pair: &crate::authority::Pair| format!("client = [[{}, {}]]\n", quoted(&pair.certificate), quoted(&pair.key));
        ground.hosts(&registry.address, &format!("{trusted}{}", pair_of(&other)))?;
        let error = ground.pull(&name, login("anchor", "chain")).expect_err("not its certificate");
        ensure!(error.message().starts_with("RegistryUnavailable: "), "{error:?}");
        ground.hosts(&registry.address, &format!("{trusted}{}", pair_of(&client)))?;
        for refused in [None, login("anchor", "guess")] {
            let error = ground.pull(&name, refused).expect_err("not allowed");
            ensure!(error.code() == Code::PermissionDenied, "{error:?}");
        }
        ensure!(ground.pull(&name, login("anchor", "chain"))? == pushed.id());
        expect_image(&ground, &name, &registry.name("team/busybox"), &pushed)?;
        ground.expect_runs(&pushed.id())?;
        ground.remove(&name)?;
        // docker's way to say the same.
        let place = format!("certs.d/{}", registry.address);
        fs::remove_file(ground.daemon.path(&format!("{place}/hosts.toml")))?;
        for (file, from) in [("ca.crt", &certificate), ("node.cert", &client.certificate), ("node.key", &client.key)] {
            ground.write(&format!("{place}/{file}"), &fs::read_to_string(from)?)?;
        }
        ground.write("auth.json", &auth_file(&[(&registry.address, "anchor:chain")]))?;
        let said = ground.pull(&name, None);
        ensure!(said.is_ok(), "docker's files: {said:?}");
        ensure!(!ground.daemon.log().contains("anchor:chain"), "a password is in the log");
        ground.expect_finished()
    })
}

/// The mirror of a registry, with credentials of its own; the registry's own stay away from it.
#[test]
fn a_mirror_with_its_own_credentials_and_the_registry_behind_it() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, storage) = directories()?;
        let authority = Authority::new(directory.path())?;
        let certificate = authority.certificate();
        let tokens = Tokens::start(directory.path(), Some(authority.config()?))?;
        let (pushed, newer) = (busybox()?, Image::new(&image::layers()?[..1], json!({}))?);
        Server::distribution(directory.path(), &storage, Ways::default())?.push("library/busybox", "v2", &newer)?;
        let pair = authority.server("registry", &["127.0.0.1"])?;
        let ways = Ways { tls: Some(&pair), tokens: Some(&tokens), ..Ways::default() };
        let registry = Server::distribution(directory.path(), &storage, ways)?;
        let login_of_mirror = Some("mirror:own word");
        let mirror =
            Server::containerregistry(directory.path(), &program, Some((&pair, Path::new(&certificate))), None, login_of_mirror)?;
        mirror.push("library/busybox", "v1", &pushed)?;
        let ground = Ground::new("")?;
        let ca = quoted(&certificate);
        let text = format!(
            "server = \"{}\"\nca = {ca}\n\n[host.\"{}\"]\ncapabilities = [\"pull\", \"resolve\"]\nca = {ca}\n",
            registry.url(),
            mirror.url()
        );
        ground.hosts("docker.io", &text)?;
        let right = || login(USER.0, USER.1);
        // The mirror wants its own credentials, and the registry does not have this tag.
        let error = ground.pull("busybox:v1", right()).expect_err("only the mirror has it");
        ensure!(error.code() == Code::NotFound && ground.images()?.is_empty(), "{error:?}");
        ground.write("auth.json", &auth_file(&[(&mirror.address, "mirror:own word")]))?;
        ensure!(ground.pull("busybox:v1", right())? == pushed.id());
        expect_image(&ground, "docker.io/library/busybox:v1", "docker.io/library/busybox", &pushed)?;
        ensure!(tokens.given().len() == 1, "the registry was asked once, in vain: {:?}", tokens.given());
        // What the mirror does not have, the registry has.
        ensure!(ground.pull("busybox:v2", right())? == newer.id());
        let error = ground.pull("busybox:v2", login(USER.0, "guess")).expect_err("the mirror's file is not for the registry");
        ensure!(error.code() == Code::PermissionDenied, "{error:?}");
        // Without the mirror.
        let address = mirror.address.clone();
        drop(mirror);
        ensure!(ground.pull("docker.io/library/busybox:v2", right())? == newer.id(), "{address} is gone");
        let error = ground.pull("busybox:v1", right()).expect_err("only the mirror had it");
        ensure!(error.code() == Code::NotFound, "{error:?}");
        ground.expect_sound(3)
    })
}
