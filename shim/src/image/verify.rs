//! Checks layers that are kept as images: the archive that they were made from is put together again and must have the layer's diff id,
//! and must become the same image once more. So a bit that turned is found wherever it lies.

use super::digest::HashingReader;
use super::erofs;
use super::error::ImageError;
use super::extract::Limits;
use super::object::Image;
use super::split::Joined;
use super::store::Store;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

const COMPARE_BYTES: usize = 1 << 20;

/// What became of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Byte by byte what was pulled.
    Sound,
    /// Not what was pulled, and why.
    Damaged(String),
    /// A directory: nothing is kept that it could be checked by.
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
                    Ok(Some((split, file))) => layer(split, &file, diff_id, &self.0.layers.scratch()?, self.0.limits())?,
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

/// Checks one layer. `again` is an empty file, which takes as much room as the image. Errors: those of the disk, which say nothing about
/// the layer.
pub(super) fn layer(split: File, image: &File, diff_id: &str, again: &File, limits: Limits) -> Result<Verdict, ImageError> {
    let failed = |e: io::Error| ImageError::io("verify", e);
    let damaged = |why: &str| Ok(Verdict::Damaged(why.to_owned()));
    let copy = image.try_clone().map_err(failed)?;
    let joined = match Joined::new(split, copy) {
        Ok(joined) => HashingReader::new(joined),
        Err(_) => return damaged("what is kept of its archive cannot be read"),
    };
    let mut rest = match erofs::build(joined, again, limits, None) {
        Ok((_, rest, _)) => rest,
        Err(error @ ImageError::NoSpace(_)) => return Err(error),
        Err(error) => return damaged(&format!("its archive cannot be put together: {error}")),
    };
    if io::copy(&mut rest, &mut io::sink()).is_err() {
        return damaged("the end of its archive cannot be read");
    }
    let found = rest.finish();
    if found != diff_id {
        return damaged(&format!("its content has digest {found}, not {diff_id}"));
    }
    if same(image, again).map_err(failed)? {
        Ok(Verdict::Sound)
    } else {
        damaged("its directories and attributes are not those of its archive")
    }
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
