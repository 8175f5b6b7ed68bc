//! Container Device Interface: the files in which vendors of devices say what a container must be given with a device (CDI
//! specification 1.1). Read anew for each request that names a device, so that no change is missed; knows no container.

use crate::error::{Error, Result};
use oci_spec::runtime::Hook;
use serde::Deserialize;
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

/// Versions whose files are understood.
const VERSIONS: [&str; 10] = ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];
/// Most files of one directory, and the largest one in bytes.
const FILES_MAX: usize = 1024;
const FILE_BYTES_MAX: u64 = 4 << 20;

/// One file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    cdi_version: String,
    kind: String,
    #[serde(default)]
    #[expect(dead_code, reason = "for people and other programs; a file that has it is not refused")]
    annotations: HashMap<String, String>,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default)]
    #[expect(dead_code, reason = "as those of the file")]
    annotations: HashMap<String, String>,
    container_edits: Edits,
}

/// What a container is given.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Edits {
    /// `KEY=value`.
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub mounts: Vec<Mount>,
    pub hooks: Vec<NamedHook>,
    pub additional_gids: Vec<u32>,
    /// Resource director classes, which are refused.
    pub intel_rdt: Option<serde_json::Value>,
    /// Network interfaces, which are refused.
    pub net_devices: Vec<serde_json::Value>,
}

/// A node in the container's /dev; what is not said is as on the host.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    pub path: String,
    #[serde(default)]
    pub host_path: String,
    #[serde(default, rename = "type")]
    pub kind: String,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    pub host_path: String,
    pub container_path: String,
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(default, rename = "type")]
    pub kind: String,
}

/// A hook and the name of its stage.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedHook {
    pub hook_name: String,
    #[serde(flatten)]
    pub hook: Hook,
}

/// The edits of `names` (`vendor/class=device`), in the order of application: what a file gives with each of its devices comes once, before the first of
/// them. Directories later in the list go over earlier ones.
pub fn find(directories: &[PathBuf], names: &[String]) -> Result<Vec<Edits>> {
    let known = Known::read(directories);
    let mut given: Vec<usize> = Vec::new();
    let mut edits = Vec::new();
    for name in names {
        let (index, device) = known.device(name)?;
        let file = known.files.get(index).ok_or_else(|| Error::internal("CDI file without an index"))?;
        if !given.contains(&index) {
            given.push(index);
            edits.push(file.container_edits.clone());
        }
        edits.push(device.container_edits.clone());
    }
    Ok(edits)
}

/// Every device of the directories.
#[derive(Default)]
struct Known {
    files: Vec<File>,
    devices: HashMap<String, Found>,
    /// Files that are no specification, with the reason.
    refused: Vec<String>,
}

struct Found {
    file: usize,
    path: PathBuf,
    directory: usize,
    device: Device,
    /// Another file of the same directory with this device.
    rival: Option<PathBuf>,
}

impl Known {
    fn read(directories: &[PathBuf]) -> Known {
        let mut known = Known::default();
        for (index, directory) in directories.iter().enumerate() {
            let mut paths: Vec<PathBuf> =
                fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|p| named(p)).collect();
            paths.sort();
            if paths.len() > FILES_MAX {
                known.refused.push(format!("{}: more than {FILES_MAX} files", directory.display()));
                paths.truncate(FILES_MAX);
            }
            for path in paths {
                match read(&path) {
                    Ok(file) => known.add(index, path, file),
                    Err(why) => known.refused.push(format!("{}: {why}", path.display())),
                }
            }
        }
        known
    }

    fn add(&mut self, directory: usize, path: PathBuf, file: File) {
        for device in &file.devices {
            let name = format!("{}={}", file.kind, device.name);
            let rival = self.devices.get(&name).filter(|have| have.directory == directory).map(|have| have.path.clone());
            let found = Found { file: self.files.len(), path: path.clone(), directory, device: device.clone(), rival };
            self.devices.insert(name, found);
        }
        self.files.push(file);
    }

    fn device(&self, name: &str) -> Result<(usize, &Device)> {
        let refused = match self.refused.as_slice() {
            [] => String::new(),
            files => format!("; files that could not be used: {}", files.join("; ")),
        };
        let found = self.devices.get(name).ok_or_else(|| {
            let known = if self.devices.is_empty() { "no device is known" } else { "no CDI file has it" };
            Error::invalid(format!("CDI device {name:?}: {known}{refused}"))
        })?;
        match &found.rival {
            Some(rival) => {
                Err(Error::invalid(format!("CDI device {name:?} is in both {} and {}", rival.display(), found.path.display())))
            }
            None => Ok((found.file, &found.device)),
        }
    }
}

fn named(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json" || extension == "yaml" || extension == "yml")
}

fn read(path: &Path) -> Result<File, String> {
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > FILE_BYTES_MAX {
        return Err(format!("{size} bytes, the limit is {FILE_BYTES_MAX}"));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    // A YAML value first: the reader of hooks needs a map that knows itself.
    let value: serde_json::Value = match path.extension().is_some_and(|extension| extension == "json") {
        true => serde_json::from_str(&text).map_err(|error| error.to_string())?,
        false => serde_saphyr::from_str(&text).map_err(|error| error.to_string())?,
    };
    let file: File = serde_json::from_value(value).map_err(|error| error.to_string())?;
    check(&file)?;
    Ok(file)
}

fn check(file: &File) -> Result<(), String> {
    if !VERSIONS.contains(&file.cdi_version.trim_start_matches('v')) {
        return Err(format!("cdiVersion {:?} is not known", file.cdi_version));
    }
    let kind = file.kind.split_once('/').filter(|(vendor, class)| is_name(vendor, "_-.") && is_name(class, "_-."));
    if kind.is_none() {
        return Err(format!("kind {:?} is not of the form vendor/class", file.kind));
    }
    for (index, device) in file.devices.iter().enumerate() {
        if !is_name(&device.name, "_-.:") {
            return Err(format!("devices[{index}].name {:?} is not a name", device.name));
        }
        if file.devices[..index].iter().any(|other| other.name == device.name) {
            return Err(format!("devices[{index}].name {:?} comes twice", device.name));
        }
        if device.container_edits == Edits::default() {
            return Err(format!("devices[{index}].containerEdits is empty"));
        }
    }
    Ok(())
}

/// Letters, digits and `extra`, with a letter or digit at both ends.
fn is_name(text: &str, extra: &str) -> bool {
    let plain = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    plain(text.chars().next())
        && plain(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "cdiVersion: 0.6.0\nkind: example.com/card\ncontainerEdits:\n  env: [ALL=1]\ndevices:\n- name: one\n  containerEdits:\n    env: [ONE=1]\n- name: two\n  containerEdits:\n    env: [TWO=1]\n";

    fn directories(files: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let listed = ["etc", "run", "absent"].map(|name| directory.path().join(name)).to_vec();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, text).expect("file");
        }
        (directory, listed)
    }

    fn env(listed: &[PathBuf], names: &[&str]) -> Result<Vec<String>> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Ok(find(listed, &names)?.into_iter().flat_map(|edits| edits.env).collect())
    }

    #[test]
    fn what_a_file_gives_with_all_devices_comes_once() {
        let (_kept, listed) = directories(&[("etc/a.yaml", FIRST)]);
        let env = env(&listed, &["example.com/card=two", "example.com/card=one"]).expect("found");
        assert_eq!(env, ["ALL=1", "TWO=1", "ONE=1"]);
    }

    #[test]
    fn later_directories_go_over_earlier_ones_and_rivals_are_named() {
        let over = r#"{"cdiVersion":"1.0.0","kind":"example.com/card","devices":[{"name":"one","containerEdits":{"env":["ONE=over"]}}]}"#;
        let (_kept, listed) = directories(&[("etc/a.yaml", FIRST), ("run/b.json", over)]);
        assert_eq!(env(&listed, &["example.com/card=one"]).expect("found"), ["ONE=over"]);
        let (_kept, listed) = directories(&[("etc/a.yaml", FIRST), ("etc/b.json", over)]);
        let error = env(&listed, &["example.com/card=one"]).expect_err("two files").message;
        assert!(error.contains("a.yaml") && error.contains("b.json"), "{error}");
        assert_eq!(env(&listed, &["example.com/card=two"]).expect("in one only"), ["ALL=1", "TWO=1"]);
    }

    #[test]
    fn files_that_cannot_be_used_are_told_with_the_device_that_is_missed() {
        for (text, part) in [
            ("kind: [", "bad.yaml"),
            ("cdiVersion: 9.9.9\nkind: example.com/card\n", "9.9.9"),
            ("cdiVersion: 0.6.0\nkind: card\n", "vendor/class"),
            ("cdiVersion: 0.6.0\nkind: example.com/card\nsurprise: 1\n", "surprise"),
            ("cdiVersion: 0.6.0\nkind: example.com/card\ndevices:\n- name: a\n  containerEdits: {}\n", "empty"),
        ] {
            let (_kept, listed) = directories(&[("etc/bad.yaml", text), ("etc/good.yaml", FIRST)]);
            let error = env(&listed, &["example.com/card=three"]).expect_err("absent").message;
            assert!(error.contains("card=three") && error.contains("bad.yaml") && error.contains(part), "{error}");
            assert!(env(&listed, &["example.com/card=one"]).is_ok(), "the good file is of use");
        }
    }
}
