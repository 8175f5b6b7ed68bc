//! The store against a registry on loopback, on a real file system, as root.

use super::test_images::{Made, Tar, gzip, image, image_for, index, noise, zstd};
use super::test_registry::Registry;
use super::*;
use rustix::fs::{self as rfs, FileType};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tar::EntryType;

fn files(root: &Path) -> RegistryFiles {
    let at = |name: &str| root.join(name);
    RegistryFiles { hosts: at("certs.d"), registries_conf: at("registries.conf"), auth_file: at("auth.json") }
}

fn open(root: &Path) -> Store {
    let mut config = StoreConfig::new(root.join("images"), files(root));
    config.platform = Platform { os: "linux".into(), architecture: "amd64".into() };
    config.layer_limit_bytes = 1 << 30;
    Store::open(config).unwrap()
}

fn open_as(root: &Path, format: LayerFormat) -> Store {
    let mut config = StoreConfig::new(root.join("images"), files(root));
    config.platform = Platform { os: "linux".into(), architecture: "amd64".into() };
    config.layer_format = Some(format);
    Store::open(config).unwrap()
}

/// The layer's files, while the process has the descriptor.
fn root_of(layer: &Layer) -> PathBuf {
    let root = layer.root().unwrap();
    PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::IntoRawFd::into_raw_fd(root)))
}

fn paths(image: &super::Image) -> Vec<PathBuf> {
    image.layers.iter().map(|layer| layer.path.clone()).collect()
}

/// Waits until the layers' directory holds `expected` layers and nothing unfinished.
fn assert_layers(root: &Path, expected: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let names: Vec<String> = fs::read_dir(root.join("images/layers"))
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        let layers = names.iter().filter(|n| n.trim_end_matches(".erofs").len() == 64).count();
        let strays = names.iter().filter(|n| n.starts_with("tmp-") || n.starts_with("trash-")).count();
        let splits = names.iter().filter(|n| n.ends_with(".split") && !n.starts_with("t")).count();
        let records = names.len() - layers - strays - splits;
        if layers == expected && strays == 0 && records == layers && splits == layers {
            return;
        }
        assert!(Instant::now() < deadline, "wanted {expected} layers, found {names:?}");
        std::thread::yield_now();
    }
}

fn one(plain: Vec<u8>) -> Made {
    let stored = gzip(&plain);
    image(&[(plain, stored)], false)
}

fn small() -> Made {
    one(Tar::new().dir("etc", 0o755).file("etc/passwd", 0o644, b"root:x:0:0::/:/bin/sh\n").finish())
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_all_compressions_and_kinds_and_survives_reopening() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let tars: Vec<Vec<u8>> = (0..4).map(|i| Tar::new().file(&format!("f{i}"), 0o644, &noise(i + 1, 300_000)).finish()).collect();
    let half = tars[3].len() / 2;
    let members = [gzip(&tars[3][..half]), gzip(&tars[3][half..])].concat();
    let stored = [gzip(&tars[0]), zstd(&tars[1]), tars[2].clone(), members];
    let made = image(&tars.into_iter().zip(stored).collect::<Vec<_>>(), true);
    registry.push("a/b", "multi", &made);
    let list = index(&made.manifest);
    registry.content.lock().unwrap().objects.insert("a/b/manifests/latest".into(), list.clone());
    let store = open(root.path());
    let image = store.pull(&registry.name("a/b"), None).await.unwrap();
    assert_eq!(image.id, digest::of(&made.config));
    assert_eq!(image.repo_tags, [registry.name("a/b:latest")]);
    assert_eq!(image.repo_digests, [format!("{}@{}", registry.name("a/b"), digest::of(&list))]);
    for (i, layer) in image.layers.iter().enumerate() {
        assert_eq!(fs::read(root_of(layer).join(format!("f{i}"))).unwrap(), noise(i as u64 + 1, 300_000));
    }
    let usage = store.usage();
    assert!(usage.used_bytes >= 1_200_000 && usage.inodes_used == 8, "{usage:?}");
    drop(store);
    let store = open(root.path());
    let again = store.get(&registry.name("a/b")).unwrap();
    assert_eq!((paths(&again), again.size_bytes), (paths(&image), image.size_bytes));
    assert_eq!(store.usage(), usage);
    assert_layers(root.path(), 4);
    let blobs = registry.requests("/blobs/");
    store.pull(&registry.name("a/b"), None).await.unwrap();
    assert_eq!(registry.requests("/blobs/"), blobs + 1, "only the config is fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn looked_up_by_every_name_and_removed_with_all_of_them() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let made = small();
    registry.push("a/b", "1", &made);
    registry.push("a/b", "2", &made);
    let store = open(root.path());
    store.pull(&registry.name("a/b:1"), None).await.unwrap();
    let image = store.pull(&registry.name("a/b:2"), None).await.unwrap();
    assert_eq!(image.repo_tags.len(), 2);
    let digest = digest::of(&made.manifest);
    let hex = digest::hex_of(&image.id);
    let by_digest = registry.name(&format!("a/b@{digest}"));
    let both = registry.name(&format!("a/b:1@{digest}"));
    for name in [&image.id, hex, &hex[..3], &hex[..12], &image.repo_tags[0], &image.repo_tags[1], &by_digest, &both] {
        assert_eq!(store.get(name).map(|i| i.id.clone()).as_ref(), Some(&image.id), "{name}");
    }
    assert!(store.get(&hex[..2]).is_none() && store.get("nothing").is_none() && store.get("").is_none());
    let lease = store.lease(&image);
    store.remove(&by_digest).unwrap();
    store.remove(&by_digest).unwrap();
    assert!(store.list().is_empty());
    assert_layers(root.path(), 1);
    // A container of an image that is gone keeps its layers over a restart.
    let chain = lease.chain_ids().to_vec();
    drop(store);
    drop(lease);
    let store = open(root.path());
    let lease = store.lease_layers(&chain);
    store.collect_unused();
    assert_layers(root.path(), 1);
    drop(lease);
    assert_layers(root.path(), 0);
    assert_eq!(store.usage().used_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_leaves_the_old_image() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "t", &small());
    let store = open(root.path());
    let old = store.pull(&registry.name("a/b:t"), None).await.unwrap();
    registry.push("a/b", "t", &one(Tar::new().file("x", 0o644, b"x").finish()));
    let new = store.pull(&registry.name("a/b:t"), None).await.unwrap();
    drop(store);
    let store = open(root.path());
    assert_eq!(store.get(&new.repo_tags[0]).unwrap().id, new.id);
    let old = store.get(&old.id).unwrap();
    assert!(old.repo_tags.is_empty() && old.repo_digests.len() == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_are_resumed() {
    for ignore_ranges in [false, true] {
        let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
        let made = one(Tar::new().file("big", 0o644, &noise(7, 1_000_000)).finish());
        registry.push("a/b", "t", &made);
        {
            let mut content = registry.content.lock().unwrap();
            (content.cut_after, content.ignore_ranges) = (Some(400_000), ignore_ranges);
        }
        let image = open(root.path()).pull(&registry.name("a/b:t"), None).await.unwrap();
        assert_eq!(fs::read(root_of(&image.layers[0]).join("big")).unwrap(), noise(7, 1_000_000));
        assert!(registry.requests("bytes=400000-") > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_kind_and_leave_nothing() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let store = open(root.path());
    let made = small();
    registry.push("a/b", "t", &made);
    let name = registry.name("a/b:t");
    let missing = store.pull(&registry.name("a/b:none"), None).await.unwrap_err();
    assert!(matches!(missing, ImageError::NotFound(_)), "{missing}");
    assert!(matches!(store.pull("A B", None).await, Err(ImageError::InvalidReference { .. })));
    let nobody = store.pull("127.0.0.1:1/a/b", None).await.unwrap_err();
    assert!(matches!(nobody, ImageError::RegistryUnavailable(_)), "{nobody}");
    // Other bytes that unpack to the very same layer: only the blob's digest tells.
    let path = format!("a/b/blobs/{}", digest::of(&made.layers[0]));
    let mut same = made.layers[0].clone();
    same[4] ^= 1;
    registry.content.lock().unwrap().objects.insert(path.clone(), same);
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt(_)), "{error}");
    registry.content.lock().unwrap().objects.insert(path, made.layers[0].clone());
    // Wrong bytes of a layer, then of a config, then a layer that fits no diff id.
    for blob in [&made.layers[0], &made.config] {
        let path = format!("a/b/blobs/{}", digest::of(blob));
        let mut wrong = blob.clone();
        let last = wrong.len() - 1;
        wrong[last] ^= 1;
        registry.content.lock().unwrap().objects.insert(path.clone(), wrong);
        let error = store.pull(&name, None).await.unwrap_err();
        assert!(matches!(error, ImageError::Corrupt(_)), "{error}");
        registry.content.lock().unwrap().objects.insert(path, blob.clone());
    }
    let plain = Tar::new().file("x", 0o644, b"x").finish();
    registry.push("a/b", "diff", &image(&[(plain, gzip(&Tar::new().finish()))], false));
    let error = store.pull(&registry.name("a/b:diff"), None).await.unwrap_err();
    assert!(error.to_string().contains("diff id"), "{error}");
    registry.content.lock().unwrap().failures = 100;
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, ImageError::RegistryUnavailable(_)), "{error}");
    registry.content.lock().unwrap().failures = 2;
    assert!(store.list().is_empty());
    assert_layers(root.path(), 0);
    store.pull(&name, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_an_index_is_for_this_platform_or_says_none() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let store = open(root.path());
    let plain = Tar::new().file("f", 0o644, b"f").finish();
    for (tag, os, architecture, taken) in [
        ("own", "linux", "amd64", true),
        ("none", "", "", true),
        ("machine", "linux", "arm64", false),
        ("system", "windows", "amd64", false),
    ] {
        registry.push("a/b", tag, &image_for(os, architecture, &[(plain.clone(), gzip(&plain))], false));
        let outcome = store.pull(&registry.name(&format!("a/b:{tag}")), None).await;
        let refused = matches!(&outcome, Err(ImageError::NoPlatform { platform, .. }) if platform == "linux/amd64");
        assert!(outcome.is_ok() == taken && refused != taken, "{tag}: {outcome:?}");
    }
    assert_eq!(store.list().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn token_login() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "t", &small());
    registry.content.lock().unwrap().login = Some("me:secret".into());
    let store = open(root.path());
    let name = registry.name("a/b:t");
    let wrong = RegistryAuth::Basic { username: "me".into(), password: "guess".into() };
    for auth in [None, Some(wrong)] {
        let error = store.pull(&name, auth).await.unwrap_err();
        assert!(matches!(error, ImageError::Unauthorized(_)), "{error}");
    }
    store.pull(&name, Some(RegistryAuth::Bearer { token: "let-me-in".into() })).await.unwrap();
    store.remove(&name).unwrap();
    let right = RegistryAuth::Basic { username: "me".into(), password: "secret".into() };
    store.pull(&name, Some(right)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_given_is_kept_and_leaves_the_image_that_had_it() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "one", &small());
    let other = Tar::new().file("other", 0o644, b"other").finish();
    registry.push("a/b", "two", &image(&[(other.clone(), gzip(&other))], false));
    let store = open(root.path());
    let one = store.pull(&registry.name("a/b:one"), None).await.unwrap();
    let two = store.pull(&registry.name("a/b:two"), None).await.unwrap();
    let tagged = store.tag(&one.id, "mine").unwrap();
    assert!(tagged.repo_tags.contains(&"docker.io/library/mine:latest".to_owned()), "{:?}", tagged.repo_tags);
    assert_eq!(store.tag(&registry.name("a/b:two"), "mine:latest").unwrap().id, two.id);
    assert_eq!(store.get(&one.id).unwrap().repo_tags, one.repo_tags);
    drop(store);
    let store = open(root.path());
    assert_eq!(store.get("mine").unwrap().id, two.id);
    assert!(matches!(store.tag("absent", "mine").unwrap_err(), ImageError::NotFound(_)));
    for wrong in ["Mine", &one.id, "mine@sha256:0000000000000000000000000000000000000000000000000000000000000000"] {
        let error = store.tag(&two.id, wrong).unwrap_err();
        assert!(matches!(error, ImageError::InvalidReference { .. }), "{wrong}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_serves_another_registrys_name() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("library/x", "latest", &small());
    let dir = root.path().join("certs.d/docker.io");
    fs::create_dir_all(&dir).unwrap();
    fs::write(
        dir.join("hosts.toml"),
        format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", registry.address),
    )
    .unwrap();
    let image = open(root.path()).pull("x", None).await.unwrap();
    assert_eq!(image.repo_tags, ["docker.io/library/x:latest"]);
    assert!(registry.requests("ns=docker.io") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_pulls_are_joined_and_shared_layers_fetched_once() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let base = Tar::new().file("base", 0o644, &noise(3, 2_000_000)).finish();
    let top = Tar::new().file("top", 0o644, b"top").finish();
    let base = (base.clone(), gzip(&base));
    registry.push("a/b", "t", &image(std::slice::from_ref(&base), false));
    registry.push("a/c", "t", &image(&[base.clone(), (top.clone(), gzip(&top))], false));
    let store = open(root.path());
    let (one, two) = (registry.name("a/b:t"), registry.name("a/c:t"));
    let (a, b, c) = tokio::join!(store.pull(&one, None), store.pull(&one, None), store.pull(&two, None));
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert_eq!((&a.id, &paths(&a)[0]), (&b.id, &paths(&c)[0]));
    assert_eq!(registry.requests(&digest::of(&base.1)), 1);
    assert_eq!(registry.requests("a/b/manifests"), 1);
    store.remove(&one).unwrap();
    assert_layers(root.path(), 2);
    store.remove(&two).unwrap();
    assert_layers(root.path(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_nobody_waits_for_is_canceled() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "t", &one(Tar::new().file("big", 0o644, &noise(5, 20_000_000)).finish()));
    registry.content.lock().unwrap().cut_after = Some(1_000_000);
    let store = open(root.path());
    let name = registry.name("a/b:t");
    let pull = tokio::time::timeout(Duration::from_millis(300), store.pull(&name, None)).await;
    assert!(pull.is_err(), "20 cuts take longer than this");
    assert_layers(root.path(), 0);
    assert!(store.list().is_empty());
}

/// Lets a pull of a layer of 20 MB go on until some of it is kept, and ends it and its store there.
async fn pull_a_part(root: &Path, name: &str) -> PathBuf {
    let store = open(root);
    let kept = || fs::read_dir(root.join("images/partial")).unwrap().next().map(|entry| entry.unwrap().path());
    let enough = async {
        loop {
            match kept().filter(|path| fs::metadata(path).unwrap().len() > 4_000_000) {
                Some(path) => return path,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::select! {
        pulled = store.pull(name, None) => panic!("all of it came: {pulled:?}"),
        path = tokio::time::timeout(Duration::from_secs(20), enough) => path.unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_layer_goes_on_where_an_earlier_store_ended() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let made = one(Tar::new().file("big", 0o644, &noise(5, 20_000_000)).finish());
    registry.push("a/b", "t", &made);
    let name = registry.name("a/b:t");
    let cut_after = |bytes: Option<usize>| registry.content.lock().unwrap().cut_after = bytes;
    let served = || std::mem::take(&mut registry.content.lock().unwrap().served_bytes);
    for damaged in [false, true] {
        cut_after(Some(3_000_000));
        let path = pull_a_part(root.path(), &name).await;
        assert!(path.ends_with(digest::hex_of(&digest::of(&made.layers[0]))));
        let there = fs::metadata(&path).unwrap().len();
        let usage = open(root.path()).usage();
        assert!(usage.partial_bytes >= there && usage.used_bytes == usage.partial_bytes && usage.inodes_used == 1, "{usage:?}");
        if damaged {
            rustix::io::pwrite(fs::File::options().write(true).open(&path).unwrap(), b"damage", there / 2).unwrap();
        }
        cut_after(None);
        let store = open(root.path());
        let image = store.pull(&name, None).await.unwrap();
        assert_eq!(fs::read(root_of(&image.layers[0]).join("big")).unwrap(), noise(5, 20_000_000));
        assert_eq!(fs::read_dir(root.path().join("images/partial")).unwrap().count(), 0, "nothing is kept of a whole layer");
        let (served, whole) = (served(), made.layers[0].len());
        // What had come but was not written yet, at most a batch and an answer.
        assert!(damaged || served < whole + 5_000_000, "{served} bytes for {whole}");
        // Damage that the decompressor sees ends the first try before the rest is asked for.
        assert!(!damaged || served >= whole + 4_000_000, "{served} bytes for {whole}: damage is not kept");
        store.remove(&name).unwrap();
    }
    cut_after(Some(3_000_000));
    pull_a_part(root.path(), &name).await;
    let store = open(root.path());
    assert!(store.usage().partial_bytes > 0);
    store.clear_partial();
    assert_eq!((store.usage().used_bytes, store.usage().inodes_used), (0, 0));
    assert_eq!(fs::read_dir(root.path().join("images/partial")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_has_the_disk_before_what_is_kept_of_it() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
        }
    }
    let disk = Mounted(tempfile::tempdir().unwrap());
    mount(Some("tmpfs"), disk.0.path(), Some("tmpfs"), MsFlags::empty(), Some("size=32m")).unwrap();
    let registry = Registry::start();
    registry.push("a/b", "t", &one(Tar::new().file("big", 0o644, &noise(9, 24_000_000)).finish()));
    let store = open(disk.0.path());
    store.pull(&registry.name("a/b:t"), None).await.unwrap();
    assert_layers(disk.0.path(), 1);
    assert_eq!(fs::read_dir(disk.0.path().join("images/partial")).unwrap().count(), 0);
}

/// Unpacks without a store.
fn unpack(plain: Vec<u8>) -> (tempfile::TempDir, Result<extract::Written, ImageError>) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("layer")).unwrap();
    let limits = extract::Limits { bytes: 100 << 20, entries: 10_000 };
    let place = dir.path().join("layer");
    let result = unpack::unpack(&plain[..], &digest::of(&plain), unpack::Place::Directory(&place, None), limits);
    // An image has the same content, or fails for the same reason.
    match &result {
        Ok(_) => super::erofs::tests::same_as_a_directory(&plain),
        Err(error) => {
            let image = tempfile::tempfile().unwrap();
            let other = unpack::unpack(
                &plain[..],
                &digest::of(&plain),
                unpack::Place::Erofs(&image, &tempfile::tempfile().unwrap()),
                limits,
            )
            .unwrap_err();
            assert_eq!(other.to_string(), error.to_string());
        }
    }
    (dir, result)
}

#[test]
fn everything_a_layer_can_hold() {
    let capability = [1, 0, 0, 2, 0x0a, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let plain = Tar::new()
        .dir("./", 0o755)
        .dir("d", 0o1777)
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("mtime", b"5.25"),
        ])
        .file("d/setuid", 0o4755, b"data")
        .hard_link("d/hard", "d/setuid")
        .symlink("d/sym", "/d/setuid")
        .device("d/null", EntryType::Char, 1, 3)
        .device("d/loop", EntryType::Block, 7, 9)
        .device("d/fifo", EntryType::Fifo, 0, 0)
        .file("a/b/c", 0o600, b"parents are made")
        .file("sparse", 0o644, &[vec![0; 1 << 20], vec![1; 10]].concat())
        .file("d/.wh.gone", 0o644, b"")
        .file("a/b/.wh..wh..opq", 0o644, b"")
        .file("twice", 0o644, b"first")
        .dir("twice", 0o700)
        .file("twice/in", 0o644, b"")
        .file("twice", 0o640, b"last")
        .pax(&[("path", "l".repeat(200).as_bytes())])
        .file("short", 0o644, b"")
        .finish();
    let (dir, result) = unpack(plain);
    result.unwrap();
    let at = |p: &str| dir.path().join("layer").join(p);
    let meta = |p: &str| fs::symlink_metadata(at(p)).unwrap();
    let setuid = meta("d/setuid");
    assert_eq!((setuid.mode() & 0o7777, setuid.uid(), setuid.gid(), setuid.nlink()), (0o4755, 1000, 2000, 2));
    assert_eq!((setuid.mtime(), setuid.mtime_nsec()), (5, 250_000_000));
    assert_eq!(meta("d/hard").ino(), setuid.ino());
    let mut value = [0u8; 64];
    let n = rfs::lgetxattr(at("d/setuid"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(&value[..n], capability);
    assert!(rfs::lgetxattr(at("d/setuid"), "trusted.overlay.redirect", &mut value[..]).is_err());
    assert_eq!((meta("d").mode() & 0o7777, meta("d").mtime()), (0o1777, 1_000_000_000));
    assert_eq!(fs::read_link(at("d/sym")).unwrap(), Path::new("/d/setuid"));
    assert_eq!(meta("d/sym").uid(), 1000);
    for (path, kind, device) in [
        ("d/null", FileType::CharacterDevice, (1, 3)),
        ("d/loop", FileType::BlockDevice, (7, 9)),
        ("d/fifo", FileType::Fifo, (0, 0)),
        ("d/gone", FileType::CharacterDevice, (0, 0)),
    ] {
        let found = meta(path);
        assert_eq!(FileType::from_raw_mode(found.mode()), kind, "{path}");
        assert_eq!((rfs::major(found.rdev()), rfs::minor(found.rdev())), device, "{path}");
    }
    assert_eq!(meta("d/null").mode() & 0o7777, 0o620);
    assert_eq!((meta("a").mode() & 0o7777, meta("a/b/c").mode() & 0o7777), (0o755, 0o600));
    assert!(meta("sparse").len() == (1 << 20) + 10 && meta("sparse").blocks() * 512 < 1 << 19);
    let n = rfs::lgetxattr(at("a/b"), "trusted.overlay.opaque", &mut value[..]).unwrap();
    assert_eq!(&value[..n], b"y");
    assert_eq!(fs::read(at("twice")).unwrap(), b"last");
    assert!(at(&"l".repeat(200)).exists() && !at("short").exists());
}

#[test]
fn hostile_entries_stay_inside_or_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let target = outside.path().to_str().unwrap();
    let link = victim.to_str().unwrap();
    let up = "../../../../../../../../../..";
    // Refused, each with a reason.
    for (what, plain) in [
        ("dot-dot", Tar::new().file("../x", 0o644, b"x").finish()),
        ("dot-dot inside", Tar::new().file("a/../../x", 0o644, b"x").finish()),
        ("hard link up", Tar::new().hard_link("h", "../x").finish()),
        ("hard link outside", Tar::new().hard_link("h", link).finish()),
        ("hard link through a symlink", Tar::new().symlink("s", target).hard_link("h", "s/victim").finish()),
        ("write through a symlink", Tar::new().symlink("s", target).file("s/victim", 0o644, b"x").finish()),
        (
            "write through a relative one",
            Tar::new().symlink("s", &format!("{up}{target}")).file("s/victim", 0o644, b"x").finish(),
        ),
        ("magic link", Tar::new().symlink("s", "/proc/self/root").file("s/x", 0o644, b"x").finish()),
        ("whiteout of nothing", Tar::new().file(".wh.", 0o644, b"").finish()),
        ("whiteout of dot-dot", Tar::new().file("a/.wh...", 0o644, b"").finish()),
        ("root as a file", Tar::new().file("/", 0o644, b"").symlink(".", "/etc").finish()),
        ("a file as a directory", Tar::new().file("f", 0o644, b"").file("f/x", 0o644, b"").finish()),
        ("cut short", Tar::new().file("f", 0o644, &[7; 5000]).finish()[..2000].to_vec()),
        ("NUL", Tar::new().pax(&[("path", b"a\0b")]).file("f", 0o644, b"").finish()),
        ("bad PAX", Tar::new().raw("p", EntryType::XHeader, 0o644, "", b"99 path=x\n").file("f", 0o644, b"").finish()),
    ] {
        let (dir, result) = unpack(plain);
        let error = result.expect_err(what);
        assert!(matches!(error, ImageError::Corrupt(_)), "{what}: {error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{what}");
        assert_eq!(fs::read(&victim).unwrap(), b"safe", "{what}");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "{what}");
    }
    // Harmless: absolute paths lie below the root, and a symlink itself is replaced, not followed.
    let (dir, result) = unpack(Tar::new().file("/abs/x", 0o644, b"x").symlink("s", link).file("s", 0o644, b"mine").finish());
    result.unwrap();
    assert!(dir.path().join("layer/abs/x").exists());
    assert!(fs::symlink_metadata(dir.path().join("layer/s")).unwrap().is_file());
    assert_eq!(fs::read(&victim).unwrap(), b"safe");
    let (dir, result) = unpack(Tar::new().dir("in", 0o755).symlink("s", "/in").file("s/x", 0o644, b"x").finish());
    result.unwrap();
    assert!(dir.path().join("layer/in/x").exists(), "a symlink is followed with the layer as root");
}

#[test]
fn bombs_meet_a_limit() {
    let mut many = Tar::new();
    for i in 0..10_001 {
        many = many.file(&format!("f{i}"), 0o644, b"");
    }
    let long_name = Tar::new().raw("n", EntryType::GNULongName, 0o644, "", &vec![b'a'; 2 << 20]).file("f", 0o644, b"").finish();
    let huge = Tar::new().file("zeros", 0o644, &vec![0; 101 << 20]).finish();
    for plain in [many.finish(), long_name, huge] {
        let error = unpack(plain).1.unwrap_err();
        assert!(matches!(error, ImageError::TooMany(_)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_files_as_the_overlay_would_show_them() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let low = Tar::new()
        .file("etc/passwd", 0o644, b"low")
        .file("etc/group", 0o644, b"group")
        .file("etc/gone", 0o644, b"gone")
        .file("opaque/hidden", 0o644, b"hidden")
        .file("real/file", 0o644, b"through a link")
        .finish();
    let high = Tar::new()
        .file("etc/passwd", 0o644, b"high")
        .file("etc/.wh.gone", 0o644, b"")
        .file("opaque/.wh..wh..opq", 0o644, b"")
        .symlink("link", "/../real")
        .symlink("out", "/etc/../../../../../etc/hostname")
        .symlink("loop", "loop")
        .finish();
    let made = image(&[(low.clone(), gzip(&low)), (high.clone(), gzip(&high))], false);
    registry.push("a/b", "t", &made);
    let image = open(root.path()).pull(&registry.name("a/b:t"), None).await.unwrap();
    let read = |path: &str| image.read_file(path, 100).unwrap();
    assert_eq!(read("etc/passwd").as_deref(), Some(&b"high"[..]));
    assert_eq!(read("/etc/group").as_deref(), Some(&b"group"[..]));
    assert_eq!(read("link/file").as_deref(), Some(&b"through a link"[..]));
    for absent in ["etc/gone", "opaque/hidden", "out", "etc", "nothing/here", "etc/passwd/x", ""] {
        assert_eq!(read(absent), None, "{absent}");
    }
    assert!(image.read_file("loop", 100).is_err());
    assert!(matches!(image.read_file("etc/group", 2), Err(ImageError::TooMany(_))));
}

fn write_layout(dir: &Path, made: &Made) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    for blob in made.layers.iter().chain([&made.config, &made.manifest]) {
        fs::write(blobs.join(digest::hex_of(&digest::of(blob))), blob).unwrap();
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest::of(&made.manifest), "size": made.manifest.len(),
        "annotations": { "org.opencontainers.image.ref.name": "q.example/app:1" } }] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_layouts_and_docker_archives() {
    let (root, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, made) = (open(root.path()), small());
    let layout = work.path().join("layout");
    write_layout(&layout, &made);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", &layout).unwrap();
    let packed = work.path().join("layout.tar.gz");
    fs::write(&packed, gzip(&builder.into_inner().unwrap())).unwrap();
    for path in [&layout, &packed] {
        let images = store.import(path).await.unwrap();
        assert_eq!(images[0].repo_tags, ["q.example/app:1"]);
        assert_eq!(images[0].repo_digests, [format!("q.example/app@{}", digest::of(&made.manifest))]);
        assert_layers(root.path(), 1);
        store.remove("q.example/app:1").unwrap();
        assert_layers(root.path(), 0);
    }
    let manifest = serde_json::json!([{ "Config": "c.json", "RepoTags": ["app:2"], "Layers": ["l/layer.tar"] }]);
    let saved = Tar::new()
        .file("c.json", 0o644, &made.config)
        .file("l/layer.tar", 0o644, &made.layers[0])
        .file("manifest.json", 0o644, manifest.to_string().as_bytes())
        .finish();
    let archive = work.path().join("saved.tar");
    fs::write(&archive, saved).unwrap();
    let images = store.import(&archive).await.unwrap();
    assert_eq!(
        (images[0].id.as_str(), &images[0].repo_tags[..]),
        (digest::of(&made.config).as_str(), &["docker.io/library/app:2".to_owned()][..])
    );
    assert_eq!(images[0].read_file("etc/passwd", 1000).unwrap().unwrap(), b"root:x:0:0::/:/bin/sh\n");
    fs::write(&archive, Tar::new().file("x", 0o644, b"").finish()).unwrap();
    assert!(matches!(store.import(&archive).await, Err(ImageError::Corrupt(_))));
    let blob = layout.join("blobs/sha256").join(digest::hex_of(&digest::of(&made.layers[0])));
    fs::write(&blob, gzip(&Tar::new().finish())).unwrap();
    store.remove("app:2").unwrap();
    assert!(matches!(store.import(&layout).await, Err(ImageError::Corrupt(_))));
    assert_layers(root.path(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_work_and_bad_records_do_not_stop_the_store() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "t", &small());
    let name = registry.name("a/b:t");
    let store = open(root.path());
    let image = store.pull(&name, None).await.unwrap();
    drop(store);
    let layers = root.path().join("images/layers");
    fs::create_dir_all(layers.join("tmp-1/x")).unwrap();
    fs::create_dir_all(layers.join("trash-1")).unwrap();
    fs::create_dir_all(layers.join("b".repeat(64))).unwrap();
    fs::write(root.path().join(format!("images/{}.json", "c".repeat(64))), "{").unwrap();
    let store = open(root.path());
    assert_eq!(store.list().len(), 1);
    assert_layers(root.path(), 1);
    drop(store);
    fs::remove_file(&image.layers[0].path).unwrap();
    let store = open(root.path());
    assert!(store.list().is_empty());
    store.pull(&name, None).await.unwrap();
    assert!(store.get(&name).unwrap().has_path("etc/passwd").unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_the_pull_and_leaves_nothing() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
        }
    }
    let disk = Mounted(tempfile::tempdir().unwrap());
    mount(Some("tmpfs"), disk.0.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    let registry = Registry::start();
    registry.push("a/b", "big", &one(Tar::new().file("big", 0o644, &noise(9, 4_000_000)).finish()));
    registry.push("a/b", "small", &small());
    let store = open(disk.0.path());
    let error = store.pull(&registry.name("a/b:big"), None).await.unwrap_err();
    assert!(matches!(error, ImageError::NoSpace(_)), "{error}");
    assert_layers(disk.0.path(), 0);
    store.pull(&registry.name("a/b:small"), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_layers_live_side_by_side() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let layer = |name: &str| Tar::new().file(name, 0o644, name.as_bytes()).finish();
    let both = [layer("lower"), layer("upper")].map(|plain| (plain.clone(), gzip(&plain)));
    registry.push("a/one", "t", &image(&both[..1], false));
    registry.push("a/two", "t", &image(&both, false));
    let open_as = |format| open_as(root.path(), format);
    let store = open_as(LayerFormat::Directory);
    let one = store.pull(&registry.name("a/one:t"), None).await.unwrap();
    assert!(one.layers[0].path.is_dir());
    drop((one, store));
    let store = open_as(LayerFormat::Erofs);
    let two = store.pull(&registry.name("a/two:t"), None).await.unwrap();
    assert!(two.layers[0].path.is_dir() && two.layers[1].path.is_file(), "{two:?}");
    drop(two);
    drop(store);
    let store = open_as(LayerFormat::Directory);
    let two = store.get(&registry.name("a/two:t")).unwrap();
    for name in ["lower", "upper"] {
        assert_eq!(two.read_file(name, 100).unwrap().as_deref(), Some(name.as_bytes()));
    }
    let kept = root_of(&two.layers[1]);
    for name in ["a/one:t", "a/two:t"] {
        store.remove(&registry.name(name)).unwrap();
    }
    assert_layers(root.path(), 0);
    assert_eq!(fs::read(kept.join("upper")).unwrap(), b"upper", "who uses a layer keeps it");
    let tree = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&store.layer_tree().unwrap())));
    assert_eq!(fs::read_dir(tree).unwrap().count(), 0, "nothing is left in the tree");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_are_copied_out_of_an_image_as_they_are() {
    let low = Tar::new()
        .dir("data/", 0o2750)
        .file("data/below", 0o644, b"hidden")
        .file("data/gone", 0o644, b"")
        .dir("data/apart/", 0o700)
        .file("data/apart/file", 0o600, b"by itself")
        .finish();
    let high = Tar::new()
        .pax(&[("SCHILY.xattr.user.note", b"kept"), ("SCHILY.xattr.user.overlay.opaque", b"y")])
        .file("data/below", 0o4755, b"shown")
        .file("data/.wh.gone", 0o644, b"")
        .dir("data/sub/", 0o1777)
        .hard_link("data/sub/again", "data/below")
        .symlink("data/out", "../../../../etc")
        .symlink("way", "/data/../data/./sub")
        .symlink("dangling", "data/nothing")
        .device("data/null", EntryType::Char, 1, 3)
        .file("data/holes", 0o600, &[[0; 1 << 16], [1; 1 << 16], [0; 1 << 16]].concat())
        .finish();
    for format in [LayerFormat::Erofs, LayerFormat::Directory] {
        let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
        registry.push("a/b", "t", &image(&[(low.clone(), gzip(&low)), (high.clone(), gzip(&high))], false));
        let image = open_as(root.path(), format).pull(&registry.name("a/b:t"), None).await.unwrap();
        let real = |path: &str| image.real_path(path).unwrap();
        assert_eq!(real("/way/x/y"), ("data/sub/x/y".into(), None));
        assert_eq!(real("dangling/x"), ("data/nothing/x".into(), None));
        assert_eq!(real("data/apart"), ("data/apart".into(), Some(FileType::Directory)));
        assert_eq!(real("data/sub/.."), ("data".into(), Some(FileType::Directory)));
        assert_eq!(real("data/out/passwd"), ("etc/passwd".into(), None));
        let copies = ["whole", "apart", "sub"].map(|name| root.path().join(name));
        copies.iter().for_each(|copy| fs::create_dir(copy).unwrap());
        let paths = ["data", "data/apart", "data/sub"].map(PathBuf::from);
        image.copy(&paths.clone().into_iter().zip(copies.clone()).take(2).collect::<Vec<_>>()).unwrap();
        let (joined, open) = (copy::joined(&image.layers).unwrap(), |path: &Path| {
            rfs::open(path, rfs::OFlags::RDONLY | rfs::OFlags::DIRECTORY, rfs::Mode::empty()).unwrap()
        });
        let of_image = |path: &Path| tree::open(&joined, path, rfs::OFlags::DIRECTORY).unwrap();
        let difference = tree::difference(&of_image(&paths[0]), &open(&copies[0])).unwrap();
        assert_eq!(difference, Some(("apart".into(), "names")), "a directory that is copied by itself is empty here");
        assert_eq!(tree::difference(&of_image(&paths[1]), &open(&copies[1])).unwrap(), None);
        fs::remove_dir_all(&copies[0]).unwrap();
        fs::create_dir(&copies[0]).unwrap();
        image.copy(&[(paths[0].clone(), copies[0].clone())]).unwrap();
        assert_eq!(tree::difference(&of_image(&paths[0]), &open(&copies[0])).unwrap(), None);
        let holes = fs::metadata(copies[0].join("holes")).unwrap();
        assert!(holes.blocks() * 512 < holes.len(), "holes stay holes: {} blocks", holes.blocks());
        assert!(rfs::lgetxattr(copies[0].join("below"), "user.overlay.opaque", &mut [0u8; 8]).is_err());
    }
}

/// Pages of a file in memory, in bytes.
fn resident(path: &Path) -> u64 {
    let path = path.to_string_lossy().replace("/proc/self/", &format!("/proc/{}/", std::process::id()));
    let output = Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_images_own_file_is_not_cached_beside_what_is_in_it() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    registry.push("a/b", "t", &one(Tar::new().file("big", 0o644, &noise(1, 4 << 20)).finish()));
    let store = open(root.path());
    let pulled = store.pull(&registry.name("a/b:t"), None).await.unwrap();
    let layer = &pulled.layers[0];
    if layer.format() == LayerFormat::Directory {
        return;
    }
    let file = root_of(layer).join("big");
    assert_eq!(fs::read(&file).unwrap().len(), 4 << 20);
    assert!(resident(&layer.path) >= 4 << 20 && resident(&file) == 4 << 20);
    store.0.layers.let_go_of_copies();
    assert_eq!((resident(&layer.path), resident(&file)), (0, 4 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn exported_images_come_back_the_same() {
    for format in [LayerFormat::Erofs, LayerFormat::Directory] {
        exported_as(format).await;
    }
}

async fn exported_as(format: LayerFormat) {
    let (root, other, registry) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Registry::start());
    let plain = Tar::new().dir("d", 0o755).file("d/f", 0o4755, &noise(1, 70_000)).symlink("l", "d/f").hard_link("h", "d/f");
    // What the directory has no more: a file that a later one replaces, one below a directory that goes, one behind a link that goes.
    let plain = plain.file("twice", 0o600, &noise(2, 100_000)).file("twice", 0o600, &noise(3, 10));
    let plain = plain.file("e/sub/in", 0o600, b"lost").hard_link("still", "e/sub/in").file("e", 0o600, b"no directory");
    let plain =
        plain.symlink("way", "d").file("way/g", 0o600, b"by a link").file("way/f2", 0o600, b"x").file("d/f2", 0o600, b"y");
    let plain = plain.file("way", 0o600, b"no link").finish();
    let second = Tar::new().file(".wh.d", 0o600, b"").finish();
    registry.push(
        "a/b",
        "t",
        &image(&[(plain.clone(), gzip(&plain)), (second.clone(), zstd(&second)), (plain.clone(), plain)], false),
    );
    let store = open_as(root.path(), format);
    let pulled = store.pull(&registry.name("a/b:t"), None).await.unwrap();
    assert!(pulled.layers.iter().all(|layer| layer.format() == format));
    let verified = store.verify(&pulled.id, &mut std::collections::HashMap::new(), |_, found| {
        assert_eq!(*found, Verdict::Sound);
        true
    });
    verified.unwrap();
    let file = other.path().join("image.tar");
    store.export(&pulled.repo_tags[0], fs::File::create(&file).unwrap()).unwrap();
    let mut again = Vec::new();
    store.export(&pulled.id, &mut again).unwrap();
    assert!(again == fs::read(&file).unwrap(), "the same image is the same archive");
    let elsewhere = open(other.path());
    let imported = elsewhere.import(&file).await.unwrap();
    assert_eq!((&imported[0].id, &imported[0].repo_tags), (&pulled.id, &pulled.repo_tags));
    // As an OCI layout alone, too.
    let names = Command::new("tar").arg("-tf").arg(&file).output().unwrap();
    assert!(String::from_utf8_lossy(&names.stdout).lines().any(|name| name == "index.json"));
    let layout = tempfile::tempdir().unwrap();
    let unpacked = Command::new("tar").args(["--exclude=manifest.json", "-xf"]).arg(&file).arg("-C").arg(layout.path()).status();
    assert!(unpacked.unwrap().success());
    elsewhere.remove(&pulled.id).unwrap();
    assert_eq!(elsewhere.import(layout.path()).await.unwrap()[0].id, pulled.id);
    assert_eq!(store.export("missing", Vec::new()).unwrap_err().to_string(), "image missing: not found");
}

/// Of an image with one layer.
fn verdict(store: &Store, name: &str) -> Verdict {
    let mut checked = std::collections::HashMap::new();
    let mut count = 0;
    store
        .verify(name, &mut checked, |_, _| {
            count += 1;
            true
        })
        .unwrap();
    assert_eq!((count, checked.len()), (1, 1));
    checked.into_values().next().unwrap()
}

/// What is said of it, and how it is done.
type Damage<'a> = (&'a str, &'a dyn Fn(&Path));

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_a_directory_is_found_whatever_it_is_and_repaired_by_a_pull() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let plain = Tar::new().dir("d", 0o755).file("d/f", 0o644, &noise(1, 9000)).symlink("l", "d/f").hard_link("h", "d/f");
    let plain = plain.pax(&[("SCHILY.xattr.user.a", b"1")]).file("a/x", 0o644, b"x").file("d/.wh.gone", 0o600, b"");
    registry.push("a/b", "t", &one(plain.file("twice", 0o600, b"1").file("twice", 0o600, b"2").finish()));
    let (name, store) = (registry.name("a/b:t"), open_as(root.path(), LayerFormat::Directory));
    let as_it_was = |directory: &Path| {
        let then = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        fs::File::open(directory).unwrap().set_modified(then).unwrap();
    };
    let damages: [Damage<'_>; 12] = [
        ("content has digest", &|at| {
            let mut bytes = fs::read(at.join("d/f")).unwrap();
            bytes[7000] ^= 1;
            fs::write(at.join("d/f"), bytes).unwrap();
        }),
        ("put together", &|at| fs::remove_file(at.join("twice")).unwrap()),
        ("put together", &|at| fs::write(at.join("a/x"), b"").unwrap()),
        ("names", &|at| {
            fs::write(at.join("d/more"), b"").unwrap();
            as_it_was(&at.join("d"));
        }),
        ("names", &|at| {
            fs::remove_file(at.join("d/gone")).unwrap();
            as_it_was(&at.join("d"));
        }),
        ("kind, mode or owner", &|at| std::os::unix::fs::lchown(at.join("l"), Some(7), None).unwrap()),
        ("kind, mode or owner", &|at| rfs::chmod(at.join("a"), rfs::Mode::from_raw_mode(0o777)).unwrap()),
        ("attributes", &|at| rfs::lsetxattr(at.join("a/x"), "user.a", b"2", rfs::XattrFlags::empty()).unwrap()),
        ("time", &|at| fs::File::open(at.join("d")).unwrap().set_modified(std::time::SystemTime::now()).unwrap()),
        ("what is kept of its archive|put together|end of its archive|content has digest", &|at| {
            let split = at.with_extension("split");
            let length = fs::metadata(&split).unwrap().len();
            fs::File::options().write(true).open(split).unwrap().set_len(length / 2).unwrap();
        }),
        ("what is kept of its archive|put together", &|at| fs::write(at.with_extension("split"), b"nonsense").unwrap()),
        ("content has digest", &|at| fs::write(at.with_extension("split"), b"").unwrap()),
    ];
    for (why, damage) in damages {
        let pulled = store.pull(&name, None).await.unwrap();
        assert_eq!(verdict(&store, &name), Verdict::Sound);
        let layer = &pulled.layers[0];
        damage(&layer.path);
        let Verdict::Damaged(found) = verdict(&store, &name) else { panic!("{why}: it is sound") };
        assert!(why.split('|').any(|one| found.contains(one)), "{why}: {found}");
        assert_eq!(store.give_up(std::slice::from_ref(&layer.chain_id)).unwrap(), std::slice::from_ref(&name));
    }
    let pulled = store.pull(&name, None).await.unwrap();
    fs::remove_file(pulled.layers[0].path.with_extension("split")).unwrap();
    assert_eq!(verdict(&store, &name), Verdict::Unknown, "as a layer of an earlier version");
    drop(pulled);
    store.remove(&name).unwrap();
    assert_layers(root.path(), 0);
    assert_eq!(fs::read_dir(root.path().join("images/layers")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_wherever_it_is_and_repaired_by_a_pull() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let plain = Tar::new().dir("d", 0o755).file("d/f", 0o644, &noise(1, 9000)).symlink("l", "d/f").finish();
    registry.push("a/b", "t", &one(plain));
    let (name, store) = (registry.name("a/b:t"), open(root.path()));
    let pulled = store.pull(&name, None).await.unwrap();
    let layer = pulled.layers[0].clone();
    assert_eq!(verdict(&store, &name), Verdict::Sound);
    let sound = fs::read(&layer.path).unwrap();
    let split = layer.path.with_extension("split");
    // In the superblock, in file data, in inodes and names; and in the record of the archive.
    let mut found = 0;
    for at in (0..sound.len()).step_by(509) {
        let mut bytes = sound.clone();
        bytes[at] ^= 0x40;
        fs::write(&layer.path, bytes).unwrap();
        found += usize::from(matches!(verdict(&store, &name), Verdict::Damaged(_)));
    }
    assert_eq!(found, sound.len().div_ceil(509));
    fs::write(&layer.path, &sound).unwrap();
    let kept = fs::read(&split).unwrap();
    for damaged in [&kept[..kept.len() / 2], b"nonsense", b""] {
        fs::write(&split, damaged).unwrap();
        assert!(matches!(verdict(&store, &name), Verdict::Damaged(_)));
    }
    fs::remove_file(&split).unwrap();
    assert!(matches!(verdict(&store, &name), Verdict::Damaged(_)));
    // Somebody still uses the layer.
    let lease = store.lease(&pulled);
    assert_eq!(store.give_up(std::slice::from_ref(&layer.chain_id)).unwrap(), std::slice::from_ref(&name));
    assert!(store.get(&name).is_none());
    let again = store.pull(&name, None).await.unwrap();
    assert_eq!(verdict(&store, &name), Verdict::Sound);
    assert_eq!((&again.id, fs::read(&again.layers[0].path).unwrap() == sound), (&pulled.id, true));
    drop((lease, pulled, again, layer));
    assert_layers(root.path(), 1);
    store.remove(&name).unwrap();
    assert_layers(root.path(), 0);
}
