//! Test images made from Debian's static busybox and the `probe` program, as an archive in the format of `docker save`.

use crate::{node::output_of, setup};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};
use tar::{Builder, EntryType, Header};

/// Name of the image with a shell, the usual tools, and /probe.
pub const BUSYBOX: &str = "localhost/busybox:test";

/// This machine's architecture, as images name it.
pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\nuser:x:1000:1000::/home/user:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nextra:x:50000:user\n";

fn file(builder: &mut Builder<Vec<u8>>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    builder.append_data(&mut header, path, bytes)?;
    Ok(())
}

fn entry(builder: &mut Builder<Vec<u8>>, kind: EntryType, path: &str, mode: u32, target: Option<&str>) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    match target {
        Some(target) => builder.append_link(&mut header, path, target)?,
        None => builder.append_data(&mut header, path, std::io::empty())?,
    }
    Ok(())
}

fn busybox_layer() -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for directory in ["bin/", "etc/", "root/", "home/", "proc/", "sys/", "dev/", "var/"] {
        entry(&mut builder, EntryType::Directory, directory, 0o755, None)?;
    }
    entry(&mut builder, EntryType::Directory, "tmp/", 0o1777, None)?;
    let busybox = fs::read("/bin/busybox").context("read /bin/busybox (Debian package busybox-static)")?;
    file(&mut builder, "bin/busybox", 0o755, &busybox)?;
    let applets = Command::new("/bin/busybox").arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        entry(&mut builder, EntryType::Link, &format!("bin/{applet}"), 0o755, Some("bin/busybox"))?;
    }
    file(&mut builder, "etc/passwd", 0o644, PASSWD.as_bytes())?;
    file(&mut builder, "etc/group", 0o644, GROUP.as_bytes())?;
    Ok(builder.into_inner()?)
}

fn probe_layer() -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    let probe = setup::programs()?.join("probe");
    file(&mut builder, "probe", 0o755, &fs::read(&probe).with_context(|| format!("read {}", probe.display()))?)?;
    Ok(builder.into_inner()?)
}

/// Uncompressed layers of the test image: busybox, then the probe.
pub fn layers() -> Result<[Vec<u8>; 2]> {
    Ok([busybox_layer()?, probe_layer()?])
}

/// The libraries that a program of this machine is linked to, its loader among them.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let needed = output_of("ldd", &[&program.to_string_lossy()])?;
    // `name => path (address)`, and the loader by its path alone.
    let paths = needed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// A layer of one of this machine's programs with the libraries that it is linked to, all of them where they are here.
pub fn linked_layer(program: &Path) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for path in [vec![program.to_owned()], libraries(program)?].concat() {
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        file(&mut builder, path.to_string_lossy().trim_start_matches('/'), 0o755, &content)?;
    }
    Ok(builder.into_inner()?)
}

/// A layer of links: path and where it points.
pub fn links_layer(links: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for (path, to) in links {
        entry(&mut builder, EntryType::Symlink, path, 0o777, Some(to))?;
    }
    Ok(builder.into_inner()?)
}

/// Writes the archive with [`BUSYBOX`].
pub fn write_archive(path: &Path) -> Result<()> {
    write_archive_of(path, BUSYBOX, layers()?.to_vec())
}

/// A layer of files that anybody may execute: path and content.
pub fn programs_layer(programs: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    files_layer(&programs.iter().map(|(path, content)| (*path, 0o755, *content)).collect::<Vec<_>>())
}

/// A layer of files: path, mode and content.
pub fn files_layer(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for (path, mode, content) in files {
        file(&mut builder, path, *mode, content)?;
    }
    Ok(builder.into_inner()?)
}

/// A layer of a program that whoever executes it has this capability for, as a bit of the permitted and the effective set.
pub fn capable_layer(path: &str, capability: u32, content: &[u8]) -> Result<Vec<u8>> {
    // struct vfs_cap_data of linux/capability.h: revision 2, effective; permitted and inheritable, each low and high.
    let attribute = [0x0200_0001u32, 1 << capability, 0, 0, 0].map(u32::to_le_bytes).concat();
    let mut builder = Builder::new(Vec::new());
    builder.append_pax_extensions([("SCHILY.xattr.security.capability", attribute.as_slice())])?;
    file(&mut builder, path, 0o755, content)?;
    Ok(builder.into_inner()?)
}

/// Writes an archive with one image of these uncompressed layers, lowest first.
pub fn write_archive_of(path: &Path, name: &str, layers: Vec<Vec<u8>>) -> Result<()> {
    write_archive_with(path, name, layers, json!({}))
}

/// The same with further fields of the image's `config`, which go over the usual ones.
pub fn write_archive_with(path: &Path, name: &str, layers: Vec<Vec<u8>>, fields: serde_json::Value) -> Result<()> {
    let digest = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", digest(layer))).collect();
    let mut config = json!({ "Cmd": ["sh"], "Env": ["PATH=/bin", "IMAGE=busybox"] });
    for (key, value) in fields.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let config = json!({
        "architecture": ARCHITECTURE, "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let names: Vec<String> = layers.iter().map(|layer| format!("{}.tar", digest(layer))).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": names }]).to_string();
    let mut builder = Builder::new(Vec::new());
    file(&mut builder, "manifest.json", 0o644, manifest.as_bytes())?;
    file(&mut builder, "config.json", 0o644, config.as_bytes())?;
    for (name, layer) in names.iter().zip(&layers) {
        file(&mut builder, name, 0o644, layer)?;
    }
    fs::File::create(path)?.write_all(&builder.into_inner()?)?;
    Ok(())
}

/// The program that holds a pod's namespaces where the runtime wants one.
pub fn pause() -> Result<Vec<u8>> {
    let scratch = tempfile::tempdir()?;
    let source = setup::workspace().join("integration/go/pause.c");
    let output = scratch.path().join("pause");
    let status =
        Command::new("gcc").args(["-Os", "-static", "-s", "-o"]).arg(&output).arg(&source).status().context("run gcc")?;
    ensure!(status.success(), "build {}: {status}", source.display());
    fs::read(&output).context("read pause")
}

/// Bytes that do not compress, other ones for each seed; a multiple of eight.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(length / 8).flatten().collect()
}
