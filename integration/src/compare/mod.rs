//! `cargo xtask compare`: Windlass and the runtimes that are used today, on one machine, in one run, by one client through the CRI
//! socket, in rounds that take turns. Prints tables with ratios to Windlass. Needed by no test.

mod cluster;
mod config;
pub mod e2e;
mod images;
mod kubelet;
mod life;
mod lists;
mod load;
mod products;
mod pull;
mod results;
mod rival;
mod sharing;
mod streams;
pub mod suites;
mod table;

use crate::{build, client::Client, cluster::Programs, go, guest, node, registry::Registry, setup};
use anyhow::{Context, Result, ensure};
use rival::{Ground, Kind, Network, Rival};
use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};
use windlass_proto::cri;

/// What to measure, and how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Parts: pull, start, cni, parallel, exec, streams, stats, memory, sharing, many, cluster.
    #[arg(long, value_delimiter = ',', default_value = "pull,start,parallel,exec,streams,stats,memory")]
    what: Vec<String>,
    /// Rounds of the part `pull`; each pulls every image once with each runtime.
    #[arg(long, default_value_t = 5)]
    pulls: usize,
    /// Pods of each runtime and network of the part `start`.
    #[arg(long, default_value_t = 30)]
    pods: usize,
    /// Runtimes: windlass, containerd+runc, containerd+crun, cri-o+crun.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Let the part `pull` write to the file system of the temporary directory; else it writes to a tmpfs.
    #[arg(long)]
    disk: bool,
    /// Measure the programs that are built, without building Windlass again.
    #[arg(long)]
    no_build: bool,
    /// Measure in a guest whose kernel has the whole of cgroup v2.
    #[arg(long)]
    guest: bool,
    /// Folder of the runtimes' programs: they are not built, and neither is Windlass.
    #[arg(long, hide = true)]
    products: Option<PathBuf>,
}

/// Longest run in a guest.
const GUEST_LIMIT: Duration = Duration::from_secs(3600);

/// Builds, starts, measures and prints.
///
/// # Errors
/// Where a build, the start of a runtime or a call that is measured fails.
pub fn run(options: &Options) -> Result<()> {
    for part in &options.what {
        let parts = ["pull", "start", "cni", "parallel", "exec", "streams", "stats", "memory", "sharing", "many", "cluster"];
        ensure!(parts.contains(&part.as_str()), "there is no part {part:?}; parts are {}", parts.join(", "));
    }
    let products = match &options.products {
        Some(built) => built.clone(),
        None => prepare(options)?,
    };
    if options.guest {
        return in_guest(options, &products);
    }
    let options = options.clone();
    node::run(move || measure(&options, &products))
}

/// Builds, before the node is entered, which has no network to build with.
fn prepare(options: &Options) -> Result<PathBuf> {
    if !options.no_build {
        build::all()?;
    }
    go::streams()?;
    if options.what.iter().any(|what| what == "cluster") {
        Programs::build()?;
    }
    products::build()
}

/// Runs this command once more inside the guest.
fn in_guest(options: &Options, products: &Path) -> Result<()> {
    let shared = guest::scratch()?;
    let program = env::current_exe()?.to_string_lossy().into_owned();
    let (what, only, products) = (options.what.join(","), options.only.join(","), products.canonicalize()?);
    let (pulls, pods, products) = (options.pulls.to_string(), options.pods.to_string(), products.to_string_lossy());
    let mut words = vec![&*program, "compare", "--what", &what, "--pulls", &pulls, "--pods", &pods, "--products", &products];
    if !only.is_empty() {
        words.extend(["--only", &only]);
    }
    let outcome = guest::run(shared.path(), &words, &[], GUEST_LIMIT)?;
    println!("{}", outcome.output);
    ensure!(outcome.code == 0, "ended in the guest with {}", outcome.code);
    Ok(())
}

fn measure(options: &Options, products: &Path) -> Result<()> {
    let registry = Registry::start()?;
    images::add_runnable(&registry)?;
    let wants = |part: &str| options.what.iter().any(|what| what == part);
    if wants("pull") {
        let measured = images::add_measured(&registry, &setup::target().join("windlass-tools/layers"))?;
        let ground = Ground { products, registry: &registry, tmpfs: !options.disk, layers: "auto" };
        pull::measure(&ground, &kinds(options), &measured, options.pulls)?;
    }
    let ground = Ground { products, registry: &registry, tmpfs: false, layers: "auto" };
    if wants("sharing") {
        images::add_shared(&registry, &setup::target().join("windlass-tools/layers"))?;
        sharing::measure(&ground, &kinds(options))?;
    }
    if ["start", "cni", "parallel", "exec", "streams"].into_iter().any(wants) {
        let rivals = start_all(&ground, options, wants("cni"))?;
        life::measure(&rivals, options.pods, &wants)?;
        if wants("streams") {
            streams::measure(&rivals, &format!("{}/{}", registry.host(), streams::IMAGE))?;
        }
        end_all(rivals)?;
    }
    if wants("stats") || wants("memory") {
        // One after the other: their pods would be in each other's way.
        load::measure(&ground, &kinds(options), &wants)?;
    }
    if wants("many") {
        load::many(&ground, &kinds(options))?;
    }
    if wants("cluster") {
        cluster::measure(&ground, &kinds(options))?;
    }
    Ok(())
}

fn kinds(options: &Options) -> Vec<Kind> {
    let named = |kind: &Kind| options.only.is_empty() || options.only.iter().any(|name| kind.name().eq_ignore_ascii_case(name));
    Kind::ALL.into_iter().filter(named).collect()
}

fn start_all(ground: &Ground<'_>, options: &Options, cni: bool) -> Result<Vec<Peer>> {
    let mut rivals = Vec::new();
    for kind in kinds(options) {
        rivals.push(Peer::start(ground, kind, Network::Own)?);
        if kind == Kind::Windlass && cni {
            rivals.push(Peer::start(ground, kind, Network::Cni)?);
        }
    }
    Ok(rivals)
}

fn end_all(peers: Vec<Peer>) -> Result<()> {
    peers.into_iter().try_for_each(|peer| peer.rival.stop())
}

/// A runtime that serves and has the images that pods need, with its client.
struct Peer {
    rival: Rival,
    client: Client,
    /// Name of the image that pods run.
    image: String,
}

impl Peer {
    fn start(ground: &Ground<'_>, kind: Kind, network: Network) -> Result<Peer> {
        let rival = ground.start(kind, network)?;
        let client = Client::connect_to(&rival.socket).with_context(|| rival.log())?;
        let image = format!("{}/{}", ground.registry.host(), images::RUN);
        let peer = Peer { rival, client, image };
        for name in [peer.image.clone(), format!("{}/{}", ground.registry.host(), config::PAUSE)] {
            peer.pull(&name)?;
        }
        println!("{} serves", peer.rival.label());
        Ok(peer)
    }

    fn pull(&self, image: &str) -> Result<()> {
        let image = cri::ImageSpec { image: image.into(), ..Default::default() };
        let request = cri::PullImageRequest { image: Some(image), ..Default::default() };
        self.client.pull_image(request).map(drop).with_context(|| format!("{}:\n{}", self.rival.label(), self.rival.log()))
    }

    fn remove_image(&self, image: &str) -> Result<()> {
        let image = cri::ImageSpec { image: image.into(), ..Default::default() };
        self.client.remove_image(cri::RemoveImageRequest { image: Some(image) }).map(drop).context("remove the image")
    }
}
