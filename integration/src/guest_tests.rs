//! Tests whose bodies run in the guest: the program of the tests runs itself once more there, each test leaves its result in a file, and
//! here each test reads its own. One boot serves all of them.

use crate::{guest, setup};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

/// Set inside the guest: the directory of the results.
const RESULTS: &str = "WINDLASS_GUEST_RESULTS";
/// Set inside the guest: its first process is systemd.
const SYSTEMD: &str = "WINDLASS_GUEST_SYSTEMD";

/// Inside the guest: the directory of what was prepared on the host.
pub fn prepared() -> Option<PathBuf> {
    env::var_os(RESULTS).map(PathBuf::from)
}

/// Whether this is a guest whose first process is systemd.
pub fn under_systemd() -> bool {
    env::var_os(SYSTEMD).is_some()
}

/// The tests of one program that run in the guest.
pub struct GuestTests {
    limit: Duration,
    filter: Option<&'static str>,
    prepare: fn(&Path) -> Result<()>,
    disk_mib: u64,
    systemd: bool,
    run: OnceLock<Result<Run, String>>,
}

/// What a run in the guest left: results by the test's name, and what it printed.
struct Run {
    results: BTreeMap<String, String>,
    output: String,
}

impl GuestTests {
    /// All tests of this program, which together take no longer than `limit`.
    pub const fn all(limit: Duration) -> GuestTests {
        GuestTests { limit, filter: None, prepare: |_| Ok(()), disk_mib: 0, systemd: false, run: OnceLock::new() }
    }

    /// The tests of this program whose names contain `filter`; `prepare` is called on the host before the guest starts, which can neither
    /// build nor reach a network. What it leaves in its directory is in [`prepared`] there.
    pub const fn some(limit: Duration, filter: &'static str, prepare: fn(&Path) -> Result<()>) -> GuestTests {
        GuestTests { limit, filter: Some(filter), prepare, disk_mib: 0, systemd: false, run: OnceLock::new() }
    }

    /// The guest has an empty disk of so many MiB, /dev/ubda.
    pub const fn with_disk(mut self, mebibytes: u64) -> GuestTests {
        self.disk_mib = mebibytes;
        self
    }

    /// The guest's first process is systemd.
    pub const fn under_systemd(mut self) -> GuestTests {
        self.systemd = true;
        self
    }

    /// The test `name`: in the guest its body, in another guest of the same program nothing, elsewhere the result that it had there.
    pub fn test(&self, name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(results) = prepared() else { return self.result_of(name) };
        if under_systemd() != self.systemd {
            return Ok(());
        }
        let result = body();
        let text = result.as_ref().map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned());
        fs::write(results.join(name), text).context("leave the result")?;
        result
    }

    fn result_of(&self, name: &str) -> Result<()> {
        let run = self.run.get_or_init(|| self.boot().map_err(|error| format!("{error:#}")));
        let run = run.as_ref().map_err(|error| anyhow::anyhow!("the guest: {error}"))?;
        match run.results.get(name).map(String::as_str) {
            Some("ok") => Ok(()),
            Some(text) => bail!("in the guest: {text}"),
            None => bail!("left no result in the guest, which said:\n{}", run.output),
        }
    }

    /// The words that choose tests in the guest: those that this program was called with, as far as they choose any of the guest's.
    fn words(&self) -> Vec<String> {
        let mut words: Vec<String> = env::args().skip(1).collect();
        if let Some(filter) = self.filter
            && !words.iter().any(|word| word.contains(filter))
        {
            words = vec![filter.to_owned()];
        }
        if !words.iter().any(|word| word.starts_with("--test-threads")) {
            words.extend(["--test-threads", "1"].map(str::to_owned));
        }
        words
    }

    /// Runs this program in the guest.
    fn boot(&self) -> Result<Run> {
        let directory = guest::scratch()?;
        (self.prepare)(directory.path())?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (program, words) = (text(&env::current_exe()?), self.words());
        let command: Vec<&str> = [program.as_str()].into_iter().chain(words.iter().map(String::as_str)).collect();
        let (results, programs) = (text(directory.path()), text(&setup::programs()?));
        let mut environment = vec![(RESULTS, results.as_str()), ("WINDLASS_BIN_DIR", programs.as_str())];
        let log = env::var("WINDLASS_TEST_LOG").unwrap_or_default();
        if !log.is_empty() {
            environment.push(("WINDLASS_TEST_LOG", &log));
        }
        let disk = directory.path().join("disk");
        fs::File::create(&disk)?.set_len(self.disk_mib << 20)?;
        let disk = (self.disk_mib > 0).then(|| format!("ubda={}", disk.display()));
        let mut more: Vec<&str> = disk.iter().map(String::as_str).collect();
        if self.systemd {
            environment.push((SYSTEMD, "1"));
            more.push(guest::SYSTEMD);
        }
        let outcome = guest::run_with(directory.path(), &command, &environment, self.limit, &more)?;
        if !log.is_empty() {
            eprintln!("{}", outcome.output);
        }
        let mut results = BTreeMap::new();
        for entry in fs::read_dir(directory.path())?.flatten() {
            if let (Ok(name), Ok(text)) = (entry.file_name().into_string(), fs::read_to_string(entry.path())) {
                results.insert(name, text);
            }
        }
        Ok(Run { results, output: outcome.output })
    }
}
