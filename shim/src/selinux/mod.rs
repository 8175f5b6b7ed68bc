//! SELinux: whether this kernel has a policy loaded, which labels its containers get, and the relabelling of volumes. Applying the labels is the
//! runtime's work. A pod's containers share a pair of categories that no other pod has.

mod relabel;

pub use relabel::relabel;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, fs, path::Path};
use windlass_proto::cri::SeLinuxOption;

/// There only with SELinux on and a policy loaded.
const POLICY: &str = "/sys/fs/selinux/policyvers";
/// Whether the policy has levels and categories.
const MLS: &str = "/sys/fs/selinux/mls";
/// The kernel's check of a label: EINVAL for one that the policy does not know.
const CONTEXT: &str = "/sys/fs/selinux/context";
const CONFIG: &str = "/etc/selinux/config";
/// Categories that the customary policies have.
const CATEGORIES: u16 = 1024;

/// What this node can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeLinux {
    /// The kernel has no SELinux, or no policy is loaded.
    Absent,
    /// There is a policy, but none for containers: the reason.
    Unready(String),
    /// Containers get labels made from these.
    On(Defaults),
}

/// The labels of a container without a wish, as the policy's `lxc_contexts` gives them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    process: Label,
    file: Label,
    levels: bool,
}

/// `user:role:type[:level]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Label {
    user: String,
    role: String,
    typ: String,
    level: String,
}

/// The labels of a container, each empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    pub process: String,
    pub file: String,
}

impl Label {
    fn parse(text: &str) -> Option<Label> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label =
            Label { user: parts.next()?, role: parts.next()?, typ: parts.next()?, level: parts.next().unwrap_or_default() };
        [&label.user, &label.role, &label.typ].iter().all(|part| !part.is_empty()).then_some(label)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.typ)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

impl SeLinux {
    /// Looks at the kernel and at the policy's files, and says in the log what is missing.
    pub fn find() -> SeLinux {
        if !Path::new(POLICY).exists() {
            return SeLinux::Absent;
        }
        let levels = fs::read_to_string(MLS).is_ok_and(|text| text.trim() == "1");
        match defaults(Path::new(CONFIG), levels) {
            Ok(defaults) => SeLinux::On(defaults),
            Err(reason) => {
                tracing::warn!(
                    reason,
                    "SELinux is on without a policy for containers: they run unlabelled, selinux_options are refused"
                );
                SeLinux::Unready(reason)
            }
        }
    }

    /// One word for a person, and what it means.
    pub fn describe(&self) -> String {
        match self {
            SeLinux::Absent => "not in this kernel, or no policy is loaded: selinux_options have no effect".into(),
            SeLinux::Unready(reason) => format!("on, but containers have no labels: {reason}"),
            SeLinux::On(defaults) => format!("on; containers are {}", defaults.process),
        }
    }

    /// A pod's own categories, `c1,c2`: derived from its id, and not among `taken`. Empty without levels.
    pub fn categories(&self, pod_id: &str, taken: &[String]) -> String {
        if !matches!(self, SeLinux::On(Defaults { levels: true, .. })) {
            return String::new();
        }
        let pairs = u64::from(CATEGORIES) * u64::from(CATEGORIES - 1) / 2;
        let first = u64::from_str_radix(pod_id.get(..15).unwrap_or_default(), 16).unwrap_or_default();
        let free = (0..pairs).map(|step| pair(first.wrapping_add(step) % pairs)).find(|pair| !taken.contains(pair));
        free.unwrap_or_default()
    }

    /// The labels of a container: the policy's, then what the pod wishes, then the container. Privileged containers have none, and none
    /// has one where the kernel knows no labels.
    pub fn labels(
        &self,
        categories: &str,
        pod: Option<&SeLinuxOption>,
        container: Option<&SeLinuxOption>,
        privileged: bool,
    ) -> Result<Labels> {
        let wishes: Vec<&SeLinuxOption> =
            [pod, container].into_iter().flatten().filter(|wish| **wish != Default::default()).collect();
        if privileged {
            return Ok(Labels::default());
        }
        let refuse = |why: &str| Err(Error::invalid(format!("security_context.selinux_options: {why}")));
        for wish in &wishes {
            for (name, text) in [("user", &wish.user), ("role", &wish.role), ("type", &wish.r#type)] {
                if text.contains(|c: char| c == ':' || c.is_whitespace() || c.is_control()) {
                    return refuse(&format!("{name} {text:?} is not a part of a label"));
                }
            }
        }
        let defaults = match self {
            SeLinux::On(defaults) => defaults,
            // "Optionally applied", says the CRI: pods of Kubernetes name labels on every kind of node, its conformance tests too.
            SeLinux::Absent => return Ok(Labels::default()),
            SeLinux::Unready(_) if wishes.is_empty() => return Ok(Labels::default()),
            SeLinux::Unready(reason) => return refuse(reason),
        };
        let (mut process, mut file) = (defaults.process.clone(), defaults.file.clone());
        if !categories.is_empty() {
            process.level = with_categories(&process.level, categories);
            file.level = with_categories(&file.level, categories);
        }
        for wish in &wishes {
            for (part, text) in [
                (&mut process.user, &wish.user),
                (&mut process.role, &wish.role),
                (&mut process.typ, &wish.r#type),
                (&mut process.level, &wish.level),
                (&mut file.level, &wish.level),
            ] {
                if !text.is_empty() {
                    part.clone_from(text);
                }
            }
        }
        let labels = Labels { process: process.to_string(), file: file.to_string() };
        for label in [&labels.process, &labels.file] {
            if Path::new(CONTEXT).exists() && fs::write(CONTEXT, label).is_err() {
                return refuse(&format!("the policy does not know {label}"));
            }
        }
        Ok(labels)
    }
}

/// The pair of categories with this number, lower one first: (0,1), (0,2), (1,2), (0,3), ...
fn pair(number: u64) -> String {
    let mut high = 1u64;
    let mut rest = number;
    while rest >= high {
        rest -= high;
        high += 1;
    }
    format!("c{rest},c{high}")
}

/// The sensitivity of a level with other categories.
fn with_categories(level: &str, categories: &str) -> String {
    let sensitivity = level.split([':', '-']).next().filter(|text| !text.is_empty()).unwrap_or("s0");
    format!("{sensitivity}:{categories}")
}

/// Reads `SELINUXTYPE` of the configuration, and `process` and `file` of that policy's `lxc_contexts`.
fn defaults(config: &Path, levels: bool) -> std::result::Result<Defaults, String> {
    let settings = settings(config)?;
    let policy = settings.get("SELINUXTYPE").map_or("targeted", String::as_str);
    let path = config.with_file_name(policy).join("contexts/lxc_contexts");
    let contexts = self::settings(&path)?;
    let label = |key: &str| {
        let text = contexts.get(key).ok_or_else(|| format!("{} has no {key}", path.display()))?;
        Label::parse(text).ok_or_else(|| format!("{}: {key} {text:?} is not a label", path.display()))
    };
    Ok(Defaults { process: label("process")?, file: label("file")?, levels })
}

/// `key = "value"` lines.
fn settings(path: &Path) -> std::result::Result<BTreeMap<String, String>, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    Ok(lines
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().trim_matches('"').to_owned()))
        .collect())
}

#[cfg(test)]
mod tests;
