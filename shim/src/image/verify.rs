//! Checks layers: the archive that one was made from is put together again and must have the layer's diff id, and must become the same
//! image, or the same directory, once more. So a bit that turned is found wherever it lies.

use super::digest::HashingReader;
use super::error::ImageError;
use super::extract::{self, Limits};
use super::layers::Layers;
use super::object::Image;
use super::split::{Joined, Kept};
use super::store::Store;
use super::{erofs, tree};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;

const COMPARE_BYTES: usize = 1 << 20;

/// What became of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Byte by byte what was pulled.
    Sound,
    /// Not what was pulled, and why.
    Damaged(String),
    /// A directory of an earlier version of the store: nothing is kept that it could be checked by.
    Unknown,
}

impl Store {
    /// Checks every layer of an image, lowest first, and tells `each`, which says whether to go on; what `checked` has is not checked
    /// again. Blocks, and reads and writes as many bytes as the image has.
    ///
    /// # Errors
    /// `NotFound`; `NoSpace`, `Io` of the check itself.
    pub fn verify(
        &self,
        name: &str,
        checked: &mut HashMap<String, Verdict>,
        mut each: impl FnMut(&str, &Verdict) -> bool,
    ) -> Result<(), ImageError> {
        let image = self.get(name).ok_or_else(|| ImageError::NotFound(format!("image {name}")))?;
        let _lease = self.lease(&image);
        for (one, diff_id) in image.layers.iter().zip(image.config.rootfs().diff_ids()) {
            let verdict = match checked.get(&one.chain_id) {
                Some(verdict) => verdict.clone(),
                None => match self.0.layers.files(&one.chain_id) {
                    Ok(None) => Verdict::Unknown,
                    Ok(Some((split, Kept::Image(file)))) => {
                        image_layer(split, file, diff_id, &self.0.layers.scratch()?, self.0.limits())?
                    }
                    Ok(Some((split, Kept::Directory(root)))) => {
                        directory_layer(split, root, diff_id, &self.0.layers, self.0.limits())?
                    }
                    Err(error) => Verdict::Damaged(error.to_string()),
                },
            };
            let go_on = each(&one.chain_id, &verdict);
            checked.insert(one.chain_id.clone(), verdict);
            if !go_on {
                break;
            }
        }
        Ok(())
    }

    /// Gives damaged layers up, and with them every image that has one: the next pull brings them back. Returns the names of those images.
    ///
    /// # Errors
    /// `Io` if a record cannot be removed.
    pub fn give_up(&self, chain_ids: &[String]) -> Result<Vec<String>, ImageError> {
        let damaged = |image: &Image| image.layers.iter().any(|layer| chain_ids.contains(&layer.chain_id));
        let mut lost = Vec::new();
        for image in self.list().into_iter().filter(|image| damaged(image)) {
            lost.push(image.repo_tags.first().or(image.repo_digests.first()).unwrap_or(&image.id).clone());
            self.remove(&image.id)?;
        }
        chain_ids.iter().for_each(|chain_id| self.0.layers.lose(chain_id));
        Ok(lost)
    }
}

fn failed(error: io::Error) -> ImageError {
    ImageError::io("verify", error)
}

/// Checks one layer. `again` is an empty file, which takes as much room as the image. Errors: those of the disk, which say nothing about
/// the layer.
pub(super) fn image_layer(split: File, image: File, diff_id: &str, again: &File, limits: Limits) -> Result<Verdict, ImageError> {
    let kept = Kept::Image(image.try_clone().map_err(failed)?);
    let build = |archive| erofs::build(archive, again, limits, None).map(|(_, rest, _)| rest);
    if let Some(why) = archive_differs(split, kept, diff_id, build)? {
        return Ok(Verdict::Damaged(why));
    }
    if same(&image, again).map_err(failed)? {
        Ok(Verdict::Sound)
    } else {
        Ok(Verdict::Damaged("its directories and attributes are not those of its archive".into()))
    }
}

/// As [`image_layer`], by unpacking the layer once more beside the others.
fn directory_layer(split: File, root: OwnedFd, diff_id: &str, layers: &Layers, limits: Limits) -> Result<Verdict, ImageError> {
    let again = layers.temp_dir()?;
    let kept = Kept::Directory(root.try_clone().map_err(failed)?);
    let unpack = |archive| extract::extract(archive, again.path(), limits, None).map(|(_, rest, _)| rest);
    if let Some(why) = archive_differs(split, kept, diff_id, unpack)? {
        return Ok(Verdict::Damaged(why));
    }
    let again = File::open(again.path()).map_err(failed)?.into();
    Ok(match tree::difference(&root, &again).map_err(failed)? {
        None => Verdict::Sound,
        Some((path, how)) => Verdict::Damaged(format!("{path:?} is not what its archive says: {how}")),
    })
}

/// Puts the archive together and makes the layer of it once more; says why it is not the archive that it was.
fn archive_differs(
    split: File,
    kept: Kept,
    diff_id: &str,
    make: impl FnOnce(HashingReader<Joined>) -> Result<HashingReader<Joined>, ImageError>,
) -> Result<Option<String>, ImageError> {
    let Ok(joined) = Joined::new(split, kept) else {
        return Ok(Some("what is kept of its archive cannot be read".into()));
    };
    let mut rest = match make(HashingReader::new(joined)) {
        Ok(rest) => rest,
        Err(error @ ImageError::NoSpace(_)) => return Err(error),
        Err(error) => return Ok(Some(format!("its archive cannot be put together: {error}"))),
    };
    if io::copy(&mut rest, &mut io::sink()).is_err() {
        return Ok(Some("the end of its archive cannot be read".into()));
    }
    let found = rest.finish();
    Ok(Some(format!("its content has digest {found}, not {diff_id}")).filter(|_| found != diff_id))
}

fn same(mut one: &File, mut other: &File) -> io::Result<bool> {
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    one.seek(SeekFrom::Start(0))?;
    other.seek(SeekFrom::Start(0))?;
    let (mut left, mut right) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    loop {
        let got = one.read(&mut left)?;
        let (left, right) = (left.get(..got).unwrap_or_default(), right.get_mut(..got).unwrap_or_default());
        other.read_exact(right)?;
        if left != right {
            return Ok(false);
        }
        if got == 0 {
            return Ok(true);
        }
    }
}
