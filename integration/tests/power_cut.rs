//! The power is cut while images are imported or pulled, and removed: whatever is listed afterwards is whole, what was done is there, and
//! nothing unfinished stays. What is kept of a layer for the next pull is never synced: the disk may have anything for it.
//!
//! The machine is a user-mode-linux guest whose images lie on an ext4 file system on a disk of its own; a cut kills all of the guest at
//! once. So everything is lost that the guest's kernel had not written to its disk, in whatever order it writes, and the next boot replays
//! the journal. What this is not: a disk that loses what it has confirmed, or that tears a write.

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use windlass_integration::{
    daemon::Daemon,
    guest, image, node,
    registry::{Packed, Registry},
    setup,
};

/// Set inside the guest: the directory that is shared with the host.
const SHARED: &str = "WINDLASS_POWER_CUT";
/// Set inside the guest: how layers are kept that are made now. The others stay as they are.
const FORM: &str = "WINDLASS_POWER_CUT_FORM";
/// Set inside the guest at the last boot, which only checks.
const LAST: &str = "WINDLASS_POWER_CUT_LAST";
/// The registry's name of images that are pulled; the guest has it on loopback.
const REGISTRY: &str = "power.example";

/// Where the images come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Import,
    Pull,
}

impl Work {
    fn test(self) -> &'static str {
        match self {
            Work::Import => "twenty_power_cuts_in_the_middle_of_imports",
            Work::Pull => "ten_power_cuts_in_the_middle_of_pulls",
        }
    }

    fn cuts(self) -> u32 {
        if self == Work::Import { 20 } else { 10 }
    }

    /// The last cut's distance from the begin of work: some imports, or some pulls.
    fn longest(self) -> Duration {
        Duration::from_millis(if self == Work::Import { 1000 } else { 2500 })
    }

    fn images(self) -> u64 {
        if self == Work::Import { 3 } else { 2 }
    }

    /// Of the layer that each image has for itself. What comes of one as large as a pull's is kept for the next pull.
    fn own_bytes(self) -> usize {
        if self == Work::Import { 1 << 18 } else { 9 << 20 }
    }

    fn name(self, number: u64) -> String {
        let registry = if self == Work::Import { "localhost" } else { REGISTRY };
        format!("{registry}/power:v{number}")
    }

    fn run(self) {
        match env::var_os(SHARED).map(PathBuf::from) {
            Some(shared) => node::run(move || in_the_guest(self, &shared)).expect("images after a power cut"),
            None => on_the_host(self).expect("power cuts"),
        }
    }

    /// Puts what the guest takes images from into the directory that it sees.
    fn prepare(self, shared: &Path) -> Result<()> {
        let base = image::files_layer(&[("base", 0o644, &image::noise(99, 1 << 19))])?;
        for number in 0..self.images() {
            let own = image::files_layer(&[("own", 0o644, &image::noise(number, self.own_bytes())), ("small", 0o600, b"small")])?;
            let layers = vec![base.clone(), own];
            match self {
                Work::Import => image::write_archive_of(&shared.join(format!("{number}.tar")), &self.name(number), layers)?,
                Work::Pull => {
                    for (place, layer) in layers.iter().enumerate() {
                        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                        packed.write_all(layer)?;
                        fs::write(shared.join(format!("{number}-{place}.tar.gz")), packed.finish()?)?;
                        let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(layer)));
                        fs::write(shared.join(format!("{number}-{place}.id")), diff_id)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The registry with those images, which `directory` says is [`REGISTRY`].
    fn registry(self, shared: &Path, directory: &Path) -> Result<Registry> {
        let registry = Registry::start()?;
        for number in 0..self.images() {
            let layer = |place: u32| -> Result<Packed> {
                Ok(Packed {
                    media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
                    blob: fs::read(shared.join(format!("{number}-{place}.tar.gz")))?,
                    diff_id: fs::read_to_string(shared.join(format!("{number}-{place}.id")))?,
                })
            };
            let config = serde_json::json!({ "architecture": image::ARCHITECTURE, "os": "linux" });
            registry.add_packed("power", &format!("v{number}"), &[layer(0)?, layer(1)?], &config);
        }
        registry.mirror(directory, REGISTRY)?;
        Ok(registry)
    }
}

#[test]
fn twenty_power_cuts_in_the_middle_of_imports() {
    Work::Import.run();
}

#[test]
fn ten_power_cuts_in_the_middle_of_pulls() {
    Work::Pull.run();
}

fn on_the_host(work: Work) -> Result<()> {
    let directory = guest::scratch()?;
    let shared = directory.path();
    work.prepare(shared)?;
    let disk = shared.join("disk");
    fs::File::create(&disk)?.set_len(256 << 20)?;
    node::run_command("mkfs.ext4", &["-q", "-F", &disk.to_string_lossy()])?;
    let (program, programs) = (env::current_exe()?, setup::programs()?);
    let (program, programs) = (program.to_string_lossy(), programs.to_string_lossy());
    let (text, word) = (shared.to_string_lossy(), format!("ubda={}", disk.display()));
    let words = [program.as_ref(), "--exact", work.test(), "--test-threads", "1"];
    let environment = |form: &'static str| [(SHARED, text.as_ref()), ("WINDLASS_BIN_DIR", programs.as_ref()), (FORM, form)];
    let ready = shared.join("ready");
    let said = || fs::read_to_string(shared.join("output")).unwrap_or_default();
    let cuts = work.cuts();
    for cut in 0..cuts {
        let _ = fs::remove_file(&ready);
        let environment = environment(if cut % 2 == 0 { "erofs" } else { "directory" });
        let was_cut = guest::cut_power(shared, &words, &environment, &[&word], &ready, work.longest() * (cut * 7 % cuts) / cuts)?;
        ensure!(was_cut, "boot {cut}: {}", said());
    }
    let environment = [environment("erofs").as_slice(), &[(LAST, "1")]].concat();
    let last = guest::run_with(shared, &words, &environment, Duration::from_secs(300), &[&word])?;
    ensure!(last.code == 0, "after the last cut: {}", last.output);
    let found = fs::read_to_string(shared.join("found"))?;
    println!("images that were found, bytes that were kept of a layer, and what was being done, boot by boot:\n{found}");
    let with = |text: &str| found.lines().filter(|line| line.contains(text)).count() as u32;
    ensure!(found.lines().count() as u32 == cuts + 1 && with("0 images") < cuts * 3 / 4, "{found}");
    ensure!(with("without") >= cuts / 4, "few cuts met work: {found}");
    Ok(())
}

/// Checks what the last boot has left, then imports or pulls, and removes, until the power is cut.
fn in_the_guest(work: Work, shared: &Path) -> Result<()> {
    let mut daemon = Daemon::prepare(&[])?;
    let (form, certs) = (env::var(FORM)?, daemon.path("certs.d"));
    daemon.configure(&format!("[images]\nlayers = {form:?}\nregistry_config_dir = {certs:?}\n"))?;
    let _registry = if work == Work::Pull { Some(work.registry(shared, &certs)?) } else { None };
    fs::create_dir_all(daemon.root())?;
    node::run_command("mount", &["-t", "ext4", "/dev/ubda", &daemon.root().to_string_lossy()])?;
    daemon.serve()?;
    let listed = daemon.windlass(&["image", "ls"])?;
    let present: Vec<bool> = (0..work.images()).map(|number| listed.contains(&work.name(number))).collect();
    let checked = daemon.windlass(&["image", "verify"])?;
    ensure!(checked.lines().all(|line| line.ends_with("sound")), "{checked}");
    let until = Instant::now() + Duration::from_secs(60);
    while !daemon.unfinished_layers()?.is_empty() {
        ensure!(Instant::now() < until, "left: {:?}", daemon.unfinished_layers()?);
        std::thread::sleep(Duration::from_millis(5));
    }
    // What was said to be done is done. The file is the host's, which keeps its power.
    let said = fs::read_to_string(shared.join("said")).unwrap_or_default();
    for (number, present) in (0..).zip(&present) {
        let last = said.lines().rfind(|line| line.ends_with(&format!(" {number}")));
        ensure!(*present || !last.is_some_and(|line| line.starts_with("have")), "image {number} was there: {listed}\n{said}");
    }
    let count = present.iter().filter(|present| **present).count();
    let kept = fs::read_dir(daemon.root().join("images/partial"))?.flatten().filter_map(|entry| entry.metadata().ok());
    let kept_bytes: u64 = kept.map(|metadata| metadata.len()).sum();
    note(shared, "found", &format!("{count} images, {kept_bytes} bytes, {}", said.lines().last().unwrap_or("nothing")))?;
    if env::var_os(LAST).is_some() {
        return daemon.stop();
    }
    if work == Work::Pull && found(shared)? % 2 == 0 {
        // As other programs of a machine do: half of a layer comes to the disk, too.
        let root = fs::File::open(daemon.root())?;
        std::thread::spawn(move || {
            while rustix::fs::syncfs(&root).is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
    }
    fs::write(shared.join("ready"), "")?;
    for number in (0..work.images()).cycle().skip(count) {
        note(shared, "said", &format!("without {number}"))?;
        // One that is not there is fine.
        let _ = daemon.windlass(&["image", "rm", &work.name(number)]);
        match work {
            Work::Import => daemon.windlass(&["image", "import", &shared.join(format!("{number}.tar")).to_string_lossy()])?,
            Work::Pull => daemon.windlass(&["image", "pull", &work.name(number)])?,
        };
        note(shared, "said", &format!("have {number}"))?;
    }
    Ok(())
}

/// Boots that have looked at what is there.
fn found(shared: &Path) -> Result<usize> {
    Ok(fs::read_to_string(shared.join("found"))?.lines().count())
}

fn note(shared: &Path, file: &str, line: &str) -> Result<()> {
    let mut file = fs::File::options().create(true).append(true).open(shared.join(file)).context("tell the host")?;
    Ok(writeln!(file, "{line}")?)
}
