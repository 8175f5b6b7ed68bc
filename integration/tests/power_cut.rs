//! The power is cut while images are imported and removed: whatever is listed afterwards is whole, what was done is there, and nothing
//! unfinished stays.
//!
//! The machine is a user-mode-linux guest whose images lie on an ext4 file system on a disk of its own; a cut kills all of the guest at
//! once. So everything is lost that the guest's kernel had not written to its disk, in whatever order it writes, and the next boot replays
//! the journal. What this is not: a disk that loses what it has confirmed, or that tears a write.

use anyhow::{Context, Result, ensure};
use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use windlass_integration::{daemon::Daemon, guest, image, node, setup};

/// Set inside the guest: the directory that is shared with the host.
const SHARED: &str = "WINDLASS_POWER_CUT";
/// Set inside the guest: how layers are kept that are made now. The others stay as they are.
const FORM: &str = "WINDLASS_POWER_CUT_FORM";
/// Set inside the guest at the last boot, which only checks.
const LAST: &str = "WINDLASS_POWER_CUT_LAST";
const CUTS: u32 = 20;
/// The last cut's distance from the begin of work: some imports.
const LONGEST: Duration = Duration::from_millis(1000);
const IMAGES: u64 = 3;

fn name(number: u64) -> String {
    format!("localhost/power:v{number}")
}

#[test]
fn twenty_power_cuts_in_the_middle_of_imports() {
    match env::var_os(SHARED).map(PathBuf::from) {
        Some(shared) => node::run(move || in_the_guest(&shared)).expect("images after a power cut"),
        None => on_the_host().expect("power cuts"),
    }
}

fn on_the_host() -> Result<()> {
    let directory = guest::scratch()?;
    let shared = directory.path();
    let base = image::files_layer(&[("base", 0o644, &noise(99, 1 << 19))])?;
    for number in 0..IMAGES {
        let own = image::files_layer(&[("own", 0o644, &noise(number, 1 << 18)), ("small", 0o600, b"small")])?;
        let archive = shared.join(format!("{number}.tar"));
        image::write_archive_of(&archive, &name(number), vec![base.clone(), own])?;
    }
    let disk = shared.join("disk");
    fs::File::create(&disk)?.set_len(256 << 20)?;
    node::run_command("mkfs.ext4", &["-q", "-F", &disk.to_string_lossy()])?;
    let (program, programs) = (env::current_exe()?, setup::programs()?);
    let (program, programs) = (program.to_string_lossy(), programs.to_string_lossy());
    let (text, word) = (shared.to_string_lossy(), format!("ubda={}", disk.display()));
    let words = [program.as_ref(), "--test-threads", "1"];
    let environment = |form: &'static str| [(SHARED, text.as_ref()), ("WINDLASS_BIN_DIR", programs.as_ref()), (FORM, form)];
    let ready = shared.join("ready");
    let said = || fs::read_to_string(shared.join("output")).unwrap_or_default();
    for cut in 0..CUTS {
        let _ = fs::remove_file(&ready);
        let environment = environment(if cut % 2 == 0 { "erofs" } else { "directory" });
        let was_cut = guest::cut_power(shared, &words, &environment, &[&word], &ready, LONGEST * (cut * 7 % CUTS) / CUTS)?;
        ensure!(was_cut, "boot {cut}: {}", said());
    }
    let environment = [environment("erofs").as_slice(), &[(LAST, "1")]].concat();
    let last = guest::run_with(shared, &words, &environment, Duration::from_secs(60), &[&word])?;
    ensure!(last.code == 0, "after the last cut: {}", last.output);
    let found = fs::read_to_string(shared.join("found"))?;
    let kinds = |whole: &str| found.lines().filter(|line| *line == whole).count();
    ensure!(found.lines().count() as u32 == CUTS + 1 && kinds("0") < 10, "images that were found, boot by boot: {found}");
    Ok(())
}

/// Checks what the last boot has left, then imports and removes until the power is cut.
fn in_the_guest(shared: &Path) -> Result<()> {
    let mut daemon = Daemon::prepare(&[])?;
    let (config, form) = (daemon.path("config.toml"), env::var(FORM)?);
    fs::write(&config, fs::read_to_string(&config)? + &format!("[images]\nlayers = {form:?}\n"))?;
    fs::create_dir_all(daemon.root())?;
    node::run_command("mount", &["-t", "ext4", "/dev/ubda", &daemon.root().to_string_lossy()])?;
    daemon.serve()?;
    let listed = daemon.windlass(&["image", "ls"])?;
    let present: Vec<bool> = (0..IMAGES).map(|number| listed.contains(&name(number))).collect();
    let checked = daemon.windlass(&["image", "verify"])?;
    ensure!(checked.lines().all(|line| line.ends_with("sound")), "{checked}");
    let until = Instant::now() + Duration::from_secs(10);
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
    note(shared, "found", &present.iter().filter(|present| **present).count().to_string())?;
    if env::var_os(LAST).is_some() {
        return daemon.stop();
    }
    fs::write(shared.join("ready"), "")?;
    for number in (0..IMAGES).cycle().skip(present.iter().filter(|present| **present).count()) {
        note(shared, "said", &format!("without {number}"))?;
        // One that is not there is fine.
        let _ = daemon.windlass(&["image", "rm", &name(number)]);
        let archive = shared.join(format!("{number}.tar"));
        daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        note(shared, "said", &format!("have {number}"))?;
    }
    Ok(())
}

fn note(shared: &Path, file: &str, line: &str) -> Result<()> {
    let mut file = fs::File::options().create(true).append(true).open(shared.join(file)).context("tell the host")?;
    Ok(writeln!(file, "{line}")?)
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(length / 8).flatten().collect()
}
