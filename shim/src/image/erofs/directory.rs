//! Directories: their entries as blocks, and their inodes, once all of the layer is known. An entry names the inode of its directory and
//! the directory that of its parent, so all inodes get their places first.

use super::BLOCK;
use super::format::{Content, INODE_BYTES, ROOT_AT, inode, number, xattrs};
use super::output::Output;
use super::tree::{Child, ROOT, Tree};
use std::io;

/// `struct erofs_dirent`
const ENTRY_BYTES: usize = 12;
const TYPE_DIRECTORY: u8 = 2;
const TYPE_SYMLINK: u8 = 7;

/// A directory's place, and what of its entries lies behind the inode.
struct Plan {
    directory: usize,
    /// In the file.
    at: u64,
    blocks: usize,
    /// Bytes in the last block; they follow the inode if `inline`.
    last: usize,
    inline: bool,
}

/// Writes all directories that can be reached from the root. The first block, with the root's inode in its place, is `first`. Returns how
/// many there are. The numbers of their inodes are `serial` and those that follow.
pub(super) fn write(tree: &mut Tree, output: &mut Output<'_>, first: &mut [u8; BLOCK], serial: u32) -> io::Result<u64> {
    output.close()?;
    output.fill_block();
    let region_at = u64::from(output.next_block()?) * BLOCK as u64;
    let (plans, region_bytes) = plan(tree, region_at)?;
    let mut region = vec![0; region_bytes];
    output.append(&region)?;
    output.fill_block();
    let mut numbers = vec![0; tree.directories.len()];
    for plan in &plans {
        if let Some(number_of) = numbers.get_mut(plan.directory) {
            *number_of = number(plan.at);
        }
    }
    for (plan, serial) in plans.iter().zip(serial..) {
        let bytes = entries(tree, plan, &numbers)?;
        let size = bytes.len() as u64;
        let (whole, tail) = bytes.split_at(if plan.inline { (plan.blocks - 1) * BLOCK } else { bytes.len() });
        let block = if whole.is_empty() { None } else { Some(output.next_block()?) };
        output.append(whole)?;
        output.fill_block();
        let content = match (block, plan.inline) {
            (block, true) => Content::Tail(block),
            (Some(block), false) => Content::Blocks(block),
            (None, false) => Content::Empty,
        };
        let directory = tree.directory(plan.directory)?;
        let below = directory.children.values().filter(|child| matches!(child, Child::Directory(_))).count();
        let links = u32::try_from(below + 2).unwrap_or(u32::MAX);
        let mut item = inode(&directory.attributes, serial, links, size, content);
        item.extend(tail);
        let (into, from) = match plan.directory {
            ROOT => (&mut first[..], ROOT_AT),
            _ => (&mut region[..], usize::try_from(plan.at - region_at).map_err(io::Error::other)?),
        };
        into.get_mut(from..from + item.len()).ok_or_else(|| io::Error::other("an inode out of place"))?.copy_from_slice(&item);
    }
    output.rewrite(region_at, &region)?;
    Ok(plans.len() as u64)
}

/// Gives every directory its place, the root first; and how long the region of the other inodes is.
fn plan(tree: &mut Tree, region_at: u64) -> io::Result<(Vec<Plan>, usize)> {
    let mut plans: Vec<Plan> = Vec::new();
    let (mut pending, mut used) = (vec![ROOT], 0usize);
    while let Some(at) = pending.pop() {
        let directory = tree.directory(at)?;
        directory.attributes.xattrs = xattrs(directory.xattrs.iter().map(|(key, value)| (key.as_slice(), value.as_slice())))?;
        let fixed = INODE_BYTES + directory.attributes.xattrs.len();
        let (blocks, last) = blocks_of(names(directory.children.keys().map(|name| &**name)));
        pending.extend(directory.children.values().rev().filter_map(|child| match child {
            Child::Directory(below) => Some(*below),
            _ => None,
        }));
        if at == ROOT {
            if ROOT_AT + fixed > BLOCK {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the root's extended attributes are too many"));
            }
            let inline = ROOT_AT + fixed + last <= BLOCK;
            plans.push(Plan { directory: at, at: ROOT_AT as u64, blocks, last, inline });
            continue;
        }
        let inline = fixed + last <= BLOCK;
        let bytes = if inline { fixed + last } else { fixed };
        if used % BLOCK + bytes > BLOCK {
            used = used.next_multiple_of(BLOCK);
        }
        plans.push(Plan { directory: at, at: region_at + used as u64, blocks, last, inline });
        used = (used + bytes).next_multiple_of(32);
    }
    Ok((plans, used))
}

/// The names of a directory in order, with its own two.
fn names<'a>(children: impl Iterator<Item = &'a [u8]>) -> Vec<&'a [u8]> {
    let mut names: Vec<&[u8]> = [&b"."[..], b".."].into_iter().chain(children).collect();
    names.sort_unstable();
    names
}

/// How many blocks the entries take, and how many bytes of the last one.
fn blocks_of(names: Vec<&[u8]>) -> (usize, usize) {
    let (mut blocks, mut used) = (1, 0);
    for name in names {
        let bytes = ENTRY_BYTES + name.len();
        if used + bytes > BLOCK {
            (blocks, used) = (blocks + 1, 0);
        }
        used += bytes;
    }
    (blocks, used)
}

fn entries(tree: &Tree, plan: &Plan, numbers: &[u64]) -> io::Result<Vec<u8>> {
    let lost = || io::Error::other("a directory that is not there");
    let directory = tree.directories.get(plan.directory).ok_or_else(lost)?;
    let number_of = |at: usize| numbers.get(at).copied().ok_or_else(lost);
    let mut all: Vec<(&[u8], u64, u8)> =
        vec![(b".", number_of(plan.directory)?, TYPE_DIRECTORY), (b"..", number_of(directory.parent)?, TYPE_DIRECTORY)];
    for (name, child) in &directory.children {
        all.push(match child {
            Child::Directory(at) => (name, number_of(*at)?, TYPE_DIRECTORY),
            Child::Symlink(inode, _) => (name, *inode, TYPE_SYMLINK),
            Child::Other(inode, kind) => (name, *inode, *kind),
        });
    }
    all.sort_unstable();
    let mut bytes = Vec::with_capacity((plan.blocks - 1) * BLOCK + plan.last);
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|(name, ..)| {
            used += ENTRY_BYTES + name.len();
            used <= BLOCK
        });
        let (block, more) = rest.split_at(fits.count());
        rest = more;
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let mut name_at = block.len() * ENTRY_BYTES;
        for (name, inode, kind) in block {
            bytes.extend(inode.to_le_bytes());
            bytes.extend(u16::try_from(name_at).map_err(io::Error::other)?.to_le_bytes());
            bytes.extend([*kind, 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, ..)| bytes.extend(*name));
    }
    Ok(bytes)
}
