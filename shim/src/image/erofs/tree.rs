//! The directories of a layer as its archive tells them so far, and what a path means in them. Symlinks are followed inside the layer.

use super::format::Attributes;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;

const SYMLINKS_MAX: u32 = 40;
/// Longest name: a symlink's target may have longer ones.
const NAME_MAX: usize = 255;

/// The root's place among the directories.
pub(super) const ROOT: usize = 0;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Child {
    /// A directory, by its place.
    Directory(usize),
    /// A symlink: its inode, and where it leads.
    Symlink(u64, Box<[u8]>),
    /// Anything else: its inode, and its type as a directory entry has it.
    Other(u64, u8),
}

impl Child {
    /// The inode; a directory has none yet.
    pub(super) fn inode(&self) -> Option<u64> {
        match self {
            Child::Directory(_) => None,
            Child::Symlink(inode, _) | Child::Other(inode, _) => Some(*inode),
        }
    }
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) attributes: Attributes,
    /// Raw, until the inode is written.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) children: BTreeMap<Box<[u8]>, Child>,
    pub(super) parent: usize,
}

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) directories: Vec<Directory>,
    /// Links of the inodes that have, or had, more than one.
    pub(super) links: HashMap<u64, u32>,
    /// Names that were given.
    pub(super) names: u64,
    /// The last directory that was looked for: most entries share it with the one before.
    last: Option<(Vec<u8>, usize)>,
    made: Attributes,
}

impl Tree {
    /// `made`: attributes of the root and of directories that no entry describes.
    pub(super) fn new(made: Attributes) -> Tree {
        let mut tree = Tree { directories: Vec::new(), links: HashMap::new(), names: 1, last: None, made };
        tree.push(ROOT);
        tree
    }

    fn push(&mut self, parent: usize) -> usize {
        let (attributes, xattrs, children) = (self.made.clone(), BTreeMap::new(), BTreeMap::new());
        self.directories.push(Directory { attributes, xattrs, children, parent });
        self.directories.len() - 1
    }

    pub(super) fn directory(&mut self, at: usize) -> io::Result<&mut Directory> {
        self.directories.get_mut(at).ok_or_else(|| io::Error::other("a directory that is not there"))
    }

    pub(super) fn child(&self, at: usize, name: &[u8]) -> Option<&Child> {
        self.directories.get(at)?.children.get(name)
    }

    /// The directory at a path. With `make`, what is missing of it is made; `None` is only returned without.
    pub(super) fn find(&mut self, path: &[u8], make: bool) -> io::Result<Option<usize>> {
        if let Some((last, at)) = &self.last
            && last == path
        {
            return Ok(Some(*at));
        }
        let found = self.walk(path, make)?;
        self.last = found.map(|at| (path.to_vec(), at));
        Ok(found)
    }

    fn walk(&mut self, path: &[u8], make: bool) -> io::Result<Option<usize>> {
        let mut pending: VecDeque<(Vec<u8>, bool)> = parts(path).map(|part| (part.to_vec(), false)).collect();
        let (mut at, mut links) = (ROOT, 0);
        while let Some((name, linked)) = pending.pop_front() {
            if name == b".." {
                at = self.directory(at)?.parent;
                continue;
            }
            match self.child(at, &name) {
                Some(Child::Directory(next)) => at = *next,
                Some(Child::Symlink(_, target)) => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Err(invalid("its directory is no directory"));
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    let target: Vec<_> = parts(target).map(|part| (part.to_vec(), true)).collect();
                    target.into_iter().rev().for_each(|part| pending.push_front(part));
                }
                Some(Child::Other(..)) => return Err(invalid("its directory is no directory")),
                None if !make => return Ok(None),
                None if linked => return Err(invalid("its directory is a symlink to nowhere")),
                None => at = self.make_directory(at, &name)?,
            }
        }
        Ok(Some(at))
    }

    /// The directory of this name, which replaces anything else that has it.
    pub(super) fn make_directory(&mut self, at: usize, name: &[u8]) -> io::Result<usize> {
        if let Some(Child::Directory(there)) = self.child(at, name) {
            return Ok(*there);
        }
        let made = self.push(at);
        self.put(at, name, Child::Directory(made))?;
        Ok(made)
    }

    /// Gives a name; what had it before goes.
    pub(super) fn put(&mut self, at: usize, name: &[u8], child: Child) -> io::Result<()> {
        if name.len() > NAME_MAX {
            return Err(invalid("a name of more than 255 bytes"));
        }
        self.names += 1;
        if let Some(inode) = child.inode()
            && let Some(links) = self.links.get_mut(&inode)
        {
            *links += 1;
        }
        if let Some(old) = self.directory(at)?.children.insert(name.into(), child) {
            self.last = None;
            self.forget(old);
        }
        Ok(())
    }

    /// One more name for the inode of `target`, which is no directory.
    pub(super) fn link(&mut self, at: usize, name: &[u8], target: Child) -> io::Result<()> {
        if let Some(inode) = target.inode() {
            self.links.entry(inode).or_insert(1);
        }
        self.put(at, name, target)
    }

    /// A name was taken from this: its links are fewer, and so are those of all below.
    fn forget(&mut self, child: Child) {
        let mut left = vec![child];
        while let Some(child) = left.pop() {
            match child {
                Child::Directory(at) => {
                    if let Some(directory) = self.directories.get_mut(at) {
                        left.extend(std::mem::take(&mut directory.children).into_values());
                    }
                }
                Child::Symlink(inode, _) | Child::Other(inode, _) => {
                    if let Some(links) = self.links.get_mut(&inode) {
                        *links -= 1;
                    }
                }
            }
        }
    }
}

/// The names of a path; `.` and nothing are none.
fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."))
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
