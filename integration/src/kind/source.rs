//! What kind's module has besides its command: the files of a node's root, and manifests in its Go source.

use crate::go;
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Where in the module the manifests are.
const MANIFESTS: [(&str, &str, &str); 2] = [
    ("const_cni.go", "defaultCNIManifest", "default-cni.yaml"),
    ("const_storage.go", "defaultStorageManifest", "default-storage.yaml"),
];

/// An unpacked module of kind.
pub(super) struct Source {
    directory: PathBuf,
    /// The string constants of its files with manifests.
    constants: BTreeMap<String, String>,
}

impl Source {
    pub(super) fn find() -> Result<Source> {
        let directory = go::kind_source()?;
        let mut constants = BTreeMap::new();
        for (file, ..) in MANIFESTS {
            let path = directory.join("pkg/build/nodeimage").join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            constants.extend(strings(&text));
        }
        Ok(Source { directory, constants })
    }

    /// The folder with the files of a node's root.
    pub(super) fn root(&self) -> PathBuf {
        self.directory.join("images/base/files")
    }

    /// A constant, such as the name of an image.
    pub(super) fn constant(&self, name: &str) -> Result<&str> {
        self.constants.get(name).map(String::as_str).with_context(|| format!("kind's source has no {name}"))
    }

    /// Writes the manifests that kind applies to a new cluster.
    pub(super) fn write_manifests(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for (_, constant, file) in MANIFESTS {
            let text = self.constant(constant)?;
            ensure!(text.contains("\nkind: "), "{constant} is no manifest: {text:?}");
            fs::write(to.join(file), text)?;
        }
        Ok(())
    }
}

/// The constants of a Go file that are strings, also those put together of others.
fn strings(text: &str) -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for part in text.split("\nconst ").skip(1) {
        let Some((name, mut rest)) = part.split_once(" = ") else { continue };
        let mut value = String::new();
        loop {
            let (piece, after) = match rest.chars().next() {
                Some(quote @ ('`' | '"')) => match rest[1..].split_once(quote) {
                    Some((piece, after)) => (piece.to_owned(), after),
                    None => break,
                },
                _ => {
                    let end = rest.find(|sign: char| !sign.is_alphanumeric()).unwrap_or(rest.len());
                    (found.get(&rest[..end]).cloned().unwrap_or_default(), &rest[end..])
                }
            };
            value += &piece;
            match after.strip_prefix(" + ") {
                Some(more) => rest = more,
                None => break,
            }
        }
        found.insert(name.to_owned(), value);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_read_and_put_together() {
        let found = strings(
            "package x\n\nconst name = \"a:1\"\n\nvar list = []string{name}\n\nconst text = `\nimage: ` + name + `\nend\n`\n",
        );
        assert_eq!(found["name"], "a:1");
        assert_eq!(found["text"], "\nimage: a:1\nend\n");
    }
}
