//! What kubelet does with a pod of an apiserver's only. One cluster serves both parts.

use crate::{daemon, eviction, resize};
use anyhow::{Context, Result};
use windlass_integration::cluster::{Cluster, Programs};

pub(crate) fn pods_of_a_cluster_are_resized_in_place_and_evicted() -> Result<()> {
    let daemon = daemon("")?;
    let mut cluster = Cluster::start(&Programs::build()?, &daemon).with_context(|| daemon.log())?;
    resize::check(&cluster).context("resize")?;
    eviction::check(&mut cluster, &daemon).context("eviction")
}
