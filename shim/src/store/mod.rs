//! Records: the durable form of pods and containers, one versioned JSON file each, replaced by rename.
//! A record is not synced to disk: after a power loss its processes are gone too, and an unreadable one is set aside.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Version of the records that this build writes. Older ones stay readable.
pub const RECORD_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    record: T,
}

/// Replaces the record at `path`; a reader sees the old one or the new one, whole.
pub fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let bytes = serde_json::to_vec(&Versioned { version: RECORD_VERSION, record })
        .map_err(|error| Error::internal(format!("encode record {}: {error}", path.display())))?;
    write_file(path, &bytes)
}

/// Room on the disk for a record that will be written soon; given back when dropped.
pub struct Room(PathBuf);

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Fails now if the record could not be written later.
pub fn reserve<T: Serialize>(path: &Path, record: &T) -> Result<Room> {
    let bytes = serde_json::to_vec(record).map_err(|error| Error::internal(format!("encode record: {error}")))?;
    let room = Room(path.with_extension("room"));
    fs::write(&room.0, bytes).map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
    Ok(room)
}

/// Replaces a file by rename.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let result = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    result.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        Error::io(format_args!("write {}", path.display()), error)
    })
}

/// What a record's file has.
#[derive(Debug, PartialEq, Eq)]
pub enum Kept<T> {
    Whole(T),
    Absent,
    /// Of this version, which a newer build writes.
    Newer(u32),
    /// Why it cannot be read.
    Damaged(String),
}

/// Reads a record and changes nothing.
pub fn look<T: DeserializeOwned>(path: &Path) -> Result<Kept<T>> {
    /// What every version has.
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Kept::Absent),
        Err(error) => return Err(Error::io(format_args!("read {}", path.display()), error)),
    };
    Ok(match serde_json::from_slice::<Versioned<T>>(&bytes) {
        Ok(versioned) if versioned.version <= RECORD_VERSION => Kept::Whole(versioned.record),
        Ok(versioned) => Kept::Newer(versioned.version),
        // A newer build's record may be of another form.
        Err(error) => match serde_json::from_slice::<Head>(&bytes) {
            Ok(head) if head.version > RECORD_VERSION => Kept::Newer(head.version),
            _ => Kept::Damaged(error.to_string()),
        },
    })
}

/// Reads a record. `None`: there is none, or its content was unreadable and has been set aside as `<name>.bad` with a line in the log.
/// That the system does not give it now is an error: it may be whole.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    Ok(match look(path)? {
        Kept::Whole(record) => Some(record),
        Kept::Absent => None,
        Kept::Newer(version) => {
            tracing::error!(path = %path.display(), version, "record of a newer version is left alone");
            None
        }
        Kept::Damaged(error) => {
            let aside = path.with_extension("bad");
            tracing::error!(path = %path.display(), %error, aside = %aside.display(), "bad record set aside");
            let _ = fs::rename(path, aside);
            None
        }
    })
}

/// Names of the entries of a directory, none when it is absent.
pub fn entries(directory: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(format_args!("list {}", directory.display()), error);
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing.map_err(failed)?,
    };
    let names: io::Result<Vec<_>> = listing.map(|entry| entry.map(|entry| entry.file_name().into_string().ok())).collect();
    Ok(names.map_err(failed)?.into_iter().flatten().collect())
}

/// Removes a directory tree; an absent one is fine.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(format_args!("remove {}", path.display()), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Sample {
        name: String,
    }

    #[test]
    fn a_record_comes_back_and_a_damaged_one_is_set_aside() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("record.json");
        write(&path, &Sample { name: "web".into() }).expect("write");
        assert_eq!(read::<Sample>(&path), Ok(Some(Sample { name: "web".into() })));
        fs::write(&path, b"{\"version\":1,").expect("damage");
        assert_eq!(read::<Sample>(&path), Ok(None));
        assert!(!path.exists() && path.with_extension("bad").exists());
    }

    #[test]
    fn a_record_of_a_newer_version_is_left_in_place() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("record.json");
        fs::write(&path, b"{\"version\":99,\"called\":\"web\"}").expect("write");
        assert_eq!(look::<Sample>(&path), Ok(Kept::Newer(99)));
        assert_eq!(read::<Sample>(&path), Ok(None));
        assert!(path.exists());
    }
}
