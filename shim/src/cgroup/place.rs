//! Names of systemd's slices and scopes, and where they are in the cgroup tree (systemd.slice(5)). Pure.

use crate::error::{Error, Result};

const SLICE: &str = ".slice";

/// Longest name of a unit, with its ending (UNIT_NAME_MAX of systemd).
const UNIT_NAME_MAX_BYTES: usize = 255;

/// Where the cgroups of a pod are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Their parent in the v2 tree, beginning with `/`.
    pub parent: String,
    /// The systemd scope below it that holds them; empty where they are in the parent itself.
    pub scope: String,
}

/// Directories of a slice from the root of systemd's own tree: `a-b.slice` is `/a.slice/a-b.slice`. `None`: no valid name of a slice.
pub(super) fn expand(slice: &str) -> Option<String> {
    let stem = slice.strip_suffix(SLICE)?;
    if stem == "-" {
        return Some(String::new());
    }
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || b":_.\\-".contains(&byte);
    if slice.len() > UNIT_NAME_MAX_BYTES || !stem.bytes().all(valid) || stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    Some(ends.map(|end| format!("/{}{SLICE}", &stem[..end])).collect())
}

/// The slice that stands for a path of the other syntax, named as kubelet does: `/a/b-c` is `a-b_c.slice`.
fn slice_of(path: &str) -> String {
    let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(|part| part.replace('-', "_")).collect();
    format!("{}{SLICE}", parts.join("-"))
}

/// The last part of a cgroup parent, if it is the name of a slice.
fn last_slice(parent: &str) -> Option<&str> {
    parent.trim_matches('/').rsplit('/').next().filter(|last| last.ends_with(SLICE))
}

/// A pod's place under cgroupfs. A path is taken as it is; a slice's bare name is where systemd would have it.
pub(super) fn plain(asked: &str, default: &str) -> Result<Place> {
    let parent = given(asked, default)?;
    let bare = last_slice(parent).filter(|slice| parent.trim_matches('/') == *slice);
    let parent = bare.and_then(expand).unwrap_or_else(|| format!("/{}", parent.trim_matches('/')));
    Ok(Place { parent: if parent.is_empty() { "/".into() } else { parent }, scope: String::new() })
}

/// A pod's place under systemd, whose own tree begins at `root` (empty where it has all of it): a scope of its own in the slice. A parent in
/// the other syntax is taken as under cgroupfs if the pod asks for it, and as the slice of that name if it is the default.
pub(super) fn scoped(asked: &str, default: &str, root: &str, pod_id: &str) -> Result<Place> {
    let parent = given(asked, default)?;
    let slice = match last_slice(parent) {
        Some(slice) => slice.to_owned(),
        None if asked.is_empty() => slice_of(parent),
        None => return plain(asked, default),
    };
    let path =
        expand(&slice).ok_or_else(|| Error::invalid(format!("cgroup_parent {parent:?}: systemd has no slice of this name")))?;
    let named = parent.trim_matches('/');
    if last_slice(parent).is_some()
        && named != slice
        && named != path.trim_matches('/')
        && named != format!("{root}{path}").trim_matches('/')
    {
        return Err(Error::invalid(format!("cgroup_parent {parent:?}: systemd has {slice} at {path}")));
    }
    let parent = format!("{root}{path}");
    Ok(Place { parent: if parent.is_empty() { "/".into() } else { parent }, scope: format!("windlass-{pod_id}.scope") })
}

fn given<'a>(asked: &'a str, default: &'a str) -> Result<&'a str> {
    let parent = if asked.is_empty() { default } else { asked };
    if parent.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("config.linux.cgroup_parent {parent:?} contains \"..\"")));
    }
    Ok(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_in_those_that_its_name_tells() {
        assert_eq!(expand("test.slice").as_deref(), Some("/test.slice"));
        assert_eq!(
            expand("kubepods-burstable-pod7_8.slice").as_deref(),
            Some("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7_8.slice")
        );
        assert_eq!(expand("-.slice").as_deref(), Some(""));
        for wrong in ["test", ".slice", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", "a b.slice"] {
            assert_eq!(expand(wrong), None, "{wrong}");
        }
        assert_eq!(expand(&format!("{}.slice", "x".repeat(250))), None, "longer than a unit's name");
    }

    fn check(asked: &str, expected: Option<(&str, bool)>) {
        let found = scoped(asked, "/windlass", "/outer", "1f");
        let place = found.as_ref().ok().map(|place| (place.parent.as_str(), place.scope == "windlass-1f.scope"));
        assert_eq!(place, expected, "{asked:?}: {found:?}");
    }

    #[test]
    fn under_systemd_a_pod_has_a_scope_in_its_slice() {
        check("", Some(("/outer/windlass.slice", true)));
        check("a-b.slice", Some(("/outer/a.slice/a-b.slice", true)));
        check("/a.slice/a-b.slice", Some(("/outer/a.slice/a-b.slice", true)));
        check("/outer/a.slice/a-b.slice/", Some(("/outer/a.slice/a-b.slice", true)));
        check("-.slice", Some(("/outer", true)));
        check("/kubepods/pod7", Some(("/kubepods/pod7", false)));
        check("/other/a-b.slice", None);
        check("a--b.slice", None);
        check("/a/../b.slice", None);
        assert_eq!(scoped("", "/x-y/z", "", "1f").expect("valid").parent, "/x_y.slice/x_y-z.slice");
        assert_eq!(scoped("-.slice", "", "", "1f").expect("valid").parent, "/");
    }

    #[test]
    fn under_cgroupfs_a_path_is_taken_as_it_is() {
        let parent = |asked: &str| plain(asked, "/windlass").expect("valid").parent;
        assert_eq!(parent(""), "/windlass");
        assert_eq!(parent("kubepods/pod7/"), "/kubepods/pod7");
        assert_eq!(parent("/other/a-b.slice"), "/other/a-b.slice");
        assert_eq!(parent("a-b.slice"), "/a.slice/a-b.slice");
        assert!(plain("/a/../b", "/windlass").is_err());
    }
}
