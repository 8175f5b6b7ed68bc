//! A container's writable layer as an archive in the form of an image's layer: overlayfs' whiteouts become `.wh.` names.

use super::bounds::Stop;
use crate::error::{Error, Result};
use rustix::fs::{major, minor};
use rustix::io::Errno;
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, Metadata},
    io::{self, BufWriter, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};
use tar::{Builder, EntryType, Header};

/// Largest set of names, or value, of extended attributes (xattr(7)).
const XATTR_LIMIT_BYTES: usize = 64 << 10;

/// Overlayfs' own attributes: a directory that hides what is below, and what only overlayfs can follow.
const OPAQUE: &str = "trusted.overlay.opaque";
const UNFOLLOWED: [&str; 2] = ["trusted.overlay.redirect", "trusted.overlay.metacopy"];

/// Writes what `upper` has as the archive `to`. Sockets are left out: nobody listens on them when they are unpacked.
pub(super) fn write(upper: &Path, to: &Path, stop: Stop) -> Result<()> {
    let failed = |error: io::Error| Error::io(format_args!("copy the writable layer to {}", to.display()), error);
    let file = File::options().write(true).create_new(true).mode(0o600).open(to).map_err(failed)?;
    let mut writer = Writer { archive: Builder::new(stop.guard(BufWriter::with_capacity(1 << 20, file))), links: HashMap::new() };
    writer.directory(upper, Path::new("")).map_err(failed)?;
    writer.archive.into_inner().and_then(|mut file| file.flush()).map_err(failed)
}

struct Writer<W: Write> {
    archive: Builder<W>,
    /// Where a file with several names was written first, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Writer<W> {
    fn directory(&mut self, from: &Path, name: &Path) -> io::Result<()> {
        let attributes = attributes(from)?;
        if let Some((key, _)) = attributes.iter().find(|(key, _)| UNFOLLOWED.contains(&key.as_str())) {
            return Err(io::Error::other(format!("{}: overlayfs' {key} has no form in an archive", name.display())));
        }
        let place = if name.as_os_str().is_empty() { Path::new("./") } else { name };
        self.entry(EntryType::Directory, place, &from.symlink_metadata()?, &attributes, None, io::empty())?;
        if attributes.iter().any(|(key, value)| key == OPAQUE && value == b"y") {
            self.whiteout(&name.join(".wh..wh..opq"))?;
        }
        let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        entries.iter().try_for_each(|entry| self.object(&entry.path(), &name.join(entry.file_name())))
    }

    fn object(&mut self, from: &Path, name: &Path) -> io::Result<()> {
        let found = from.symlink_metadata()?;
        let kind = found.file_type();
        if kind.is_dir() {
            return self.directory(from, name);
        }
        if kind.is_char_device() && found.rdev() == 0 {
            let hidden = name.file_name().unwrap_or_default().to_string_lossy();
            return self.whiteout(&name.with_file_name(format!(".wh.{hidden}")));
        }
        if kind.is_socket() {
            return Ok(());
        }
        let id = (found.dev(), found.ino());
        if found.nlink() > 1 {
            if let Some(first) = self.links.get(&id).cloned() {
                return self.entry(EntryType::Link, name, &found, &[], Some(&first), io::empty());
            }
            self.links.insert(id, name.to_owned());
        }
        let attributes = attributes(from)?;
        if kind.is_file() {
            let length = found.len();
            let file = io::Read::take(File::open(from)?, length);
            return self.entry(EntryType::Regular, name, &found, &attributes, None, file);
        }
        if kind.is_symlink() {
            let target = fs::read_link(from)?;
            return self.entry(EntryType::Symlink, name, &found, &attributes, Some(&target), io::empty());
        }
        let typ = match () {
            () if kind.is_fifo() => EntryType::Fifo,
            () if kind.is_block_device() => EntryType::Block,
            () => EntryType::Char,
        };
        self.entry(typ, name, &found, &attributes, None, io::empty())
    }

    fn entry(
        &mut self,
        typ: EntryType,
        name: &Path,
        found: &Metadata,
        attributes: &[(String, Vec<u8>)],
        target: Option<&Path>,
        content: impl io::Read,
    ) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(typ);
        header.set_mode(found.mode() & 0o7777);
        header.set_uid(found.uid().into());
        header.set_gid(found.gid().into());
        header.set_mtime(u64::try_from(found.mtime()).unwrap_or(0));
        header.set_size(if typ == EntryType::Regular { found.len() } else { 0 });
        if [EntryType::Char, EntryType::Block].contains(&typ) {
            header.set_device_major(major(found.rdev()))?;
            header.set_device_minor(minor(found.rdev()))?;
        }
        let kept = attributes.iter().filter(|(key, _)| !key.starts_with("trusted.overlay.") && key != "security.selinux");
        let kept: Vec<(String, &[u8])> = kept.map(|(key, value)| (format!("SCHILY.xattr.{key}"), value.as_slice())).collect();
        if !kept.is_empty() {
            self.archive.append_pax_extensions(kept.iter().map(|(key, value)| (key.as_str(), *value)))?;
        }
        match target {
            Some(target) => self.archive.append_link(&mut header, name, target),
            None => self.archive.append_data(&mut header, name, content),
        }
    }

    fn whiteout(&mut self, name: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(0);
        self.archive.append_data(&mut header, name, io::empty())
    }
}

/// Extended attributes of a file, of a link itself. A file system without any has none.
fn attributes(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0u8; XATTR_LIMIT_BYTES];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let names = names.get(..length).unwrap_or_default().split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found = Vec::new();
    for name in names {
        let mut value = vec![0u8; XATTR_LIMIT_BYTES];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value)?;
        value.truncate(length);
        found.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};
    use std::{collections::BTreeMap, io::Read, os::unix::fs::symlink};

    /// Name, kind, mode, target and content of each entry.
    fn listed(archive: &Path) -> BTreeMap<String, (EntryType, u32, Option<String>, String)> {
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(File::open(archive).expect("an archive")).entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").to_string_lossy().into_owned();
            let target = entry.link_name().expect("a target").map(|target| target.to_string_lossy().into_owned());
            let (kind, mode) = (entry.header().entry_type(), entry.header().mode().expect("a mode"));
            let mut content = String::new();
            entry.read_to_string(&mut content).expect("content");
            found.insert(name, (kind, mode, target, content));
        }
        found
    }

    #[test]
    fn a_writable_layer_survives_its_archive() {
        let directory = tempfile::tempdir().expect("directory");
        let upper = directory.path().join("upper");
        let long = "x".repeat(120);
        fs::create_dir_all(upper.join("dir").join(&long)).expect("directories");
        fs::write(upper.join("dir").join(&long).join("file"), "content").expect("file");
        fs::hard_link(upper.join("dir").join(&long).join("file"), upper.join("second")).expect("link");
        symlink("/somewhere/else", upper.join("soft")).expect("symlink");
        mknodat(CWD, upper.join("gone"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).expect("whiteout");
        mknodat(CWD, upper.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).expect("fifo");
        let _socket = std::os::unix::net::UnixListener::bind(upper.join("socket")).expect("socket");
        setxattr(upper.join("dir"), OPAQUE, b"y", XattrFlags::empty()).expect("opaque");
        let archive = directory.path().join("diff.tar");
        write(&upper, &archive, Stop::default()).expect("written");
        let found = listed(&archive);
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        let file = format!("dir/{long}/file");
        assert_eq!(names, ["./", ".wh.gone", "dir", "dir/.wh..wh..opq", &format!("dir/{long}"), &file, "pipe", "second", "soft"]);
        assert_eq!(found[&file].3, "content");
        assert_eq!((found["second"].0, found["second"].2.as_deref()), (EntryType::Link, Some(file.as_str())));
        assert_eq!(found["soft"].2.as_deref(), Some("/somewhere/else"));
        assert_eq!((found["pipe"].0, found["pipe"].1 & 0o777), (EntryType::Fifo, 0o640));
        setxattr(upper.join("dir"), UNFOLLOWED[0], b"/elsewhere", XattrFlags::empty()).expect("redirect");
        let error =
            write(&upper, &directory.path().join("other.tar"), Stop::default()).expect_err("cannot be told in an archive");
        assert!(error.message.contains("dir") && error.message.contains("redirect"), "{error}");
    }
}
