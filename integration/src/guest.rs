//! A guest with the whole of cgroup v2 and with AppArmor: a user-mode-linux kernel that runs as a process on this host, sees its file tree
//! read-only under a throw-away overlay, runs one command as root and ends. Needs no virtualisation and leaves nothing behind.

use crate::{process::Process, setup};
use anyhow::{Context, Result, bail, ensure};
use std::{
    env,
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Names a ready guest kernel: the program itself, or compressed with xz.
pub const KERNEL_VARIABLE: &str = "WINDLASS_GUEST_KERNEL";

/// A ready kernel that may lie beside the checkout.
const READY: &str = "../shared/lab/guest/linux-uml-7.3.xz";

/// A word for [`run_with`]: the guest's first process is systemd, with a message bus.
pub const SYSTEMD: &str = "windlass.init=systemd";

/// The word that names the one directory of the host that a guest writes.
const RUN_WORD: &str = "windlass.run=";

/// Most that is read of the output of a guest's command, or of its kernel's.
const OUTPUT_LIMIT_BYTES: u64 = 8 << 20;

/// Longest wait until the program in a guest says that it is ready.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Memory of the guest. Taken from the host only as far as it is touched.
const MEMORY: &str = "2G";

/// What a command in the guest has left.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// Standard output and error, in order.
    pub output: String,
}

/// The directory that the guest's programs and files are kept in, `<target>/guest`.
fn directory() -> Result<PathBuf> {
    let directory = setup::target().join("guest");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    directory.canonicalize().context("directory of the guest")
}

/// The guest's kernel: the one that [`KERNEL_VARIABLE`] names, the one in `<target>/guest`, a ready one beside the checkout, or else one
/// that is built from Debian's kernel source, which takes some minutes.
pub fn kernel() -> Result<PathBuf> {
    let directory = directory()?;
    let lock = File::create(directory.join("lock")).context("create the lock of the guest's kernel")?;
    lock.lock().context("wait for the guest's kernel")?;
    let kernel = directory.join("linux");
    if let Some(named) = env::var_os(KERNEL_VARIABLE).map(PathBuf::from) {
        ensure!(named.is_file(), "{KERNEL_VARIABLE} names {}, which is no file", named.display());
        return if named.extension().is_some_and(|end| end == "xz") {
            unpack(&named, &kernel)
        } else {
            Ok(named.canonicalize()?)
        };
    }
    if kernel.is_file() {
        return Ok(kernel);
    }
    let ready = setup::workspace().join(READY);
    if ready.is_file() {
        return unpack(&ready, &kernel);
    }
    println!("building the guest's kernel from Debian's source into {} (about ten minutes)", directory.display());
    let script = setup::workspace().join("integration/guest/build.sh");
    let status = Command::new("bash").arg(&script).arg(&directory).stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("run {}", script.display()))?;
    ensure!(status.success() && kernel.is_file(), "{} ended with {status}", script.display());
    Ok(kernel)
}

fn unpack(packed: &Path, kernel: &Path) -> Result<PathBuf> {
    let temporary = kernel.with_extension("new");
    let file = File::create(&temporary).with_context(|| format!("create {}", temporary.display()))?;
    let status = Command::new("xz").arg("-dc").arg(packed).stdout(file).status().context("run xz (Debian package xz-utils)")?;
    ensure!(status.success(), "unpack {}: xz ended with {status}", packed.display());
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
    fs::rename(&temporary, kernel)?;
    Ok(kernel.to_owned())
}

/// Whether the guest's kernel knows this word: a cheap look for an optional part of it.
pub fn kernel_knows(word: &str) -> Result<bool> {
    let bytes = fs::read(kernel()?)?;
    Ok(bytes.windows(word.len()).any(|window| window == word.as_bytes()))
}

/// Whether this process runs in a guest.
pub fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains(RUN_WORD)))
}

/// Runs `program` as root in a guest of its own and waits for its end. `shared` is a directory of the host that the guest may write.
pub fn run(shared: &Path, program: &[&str], environment: &[(&str, &str)], limit: Duration) -> Result<Outcome> {
    run_with(shared, program, environment, limit, &[])
}

/// As [`run`], with more words on the kernel's command line.
pub fn run_with(
    shared: &Path,
    program: &[&str],
    environment: &[(&str, &str)],
    limit: Duration,
    words: &[&str],
) -> Result<Outcome> {
    let kernel = kernel()?;
    fs::write(shared.join("command"), script(program, environment)?)?;
    for name in ["output", "status"] {
        let _ = fs::remove_file(shared.join(name));
    }
    let console = File::create(shared.join("console"))?;
    let mut guest = Process::from(boot(&kernel, shared, console, words)?);
    let deadline = Instant::now() + limit;
    let ended = loop {
        if let Some(status) = guest.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(guest);
    let output = bounded(&shared.join("output"));
    let Some(ended) = ended else { bail!("the guest did not end within {limit:?}; so far:\n{output}") };
    match fs::read_to_string(shared.join("status")) {
        Ok(code) => Ok(Outcome { code: code.trim().parse().context("status of the command in the guest")?, output }),
        Err(_) => bail!("the guest ended ({ended}) before its command:\n{output}\n{}", bounded(&shared.join("console"))),
    }
}

/// Runs `program` in a guest as [`run_with`] does, waits until `ready` is there, and `after` that long cuts the guest's power: all its
/// processes are killed, and what the guest has not given to its disk by then is lost. Returns false if the program ended before that.
pub fn cut_power(
    shared: &Path,
    program: &[&str],
    environment: &[(&str, &str)],
    words: &[&str],
    ready: &Path,
    after: Duration,
) -> Result<bool> {
    fs::write(shared.join("command"), script(program, environment)?)?;
    for name in ["output", "status"] {
        let _ = fs::remove_file(shared.join(name));
    }
    let mut guest = Process::from(boot(&kernel()?, shared, File::create(shared.join("console"))?, words)?);
    let deadline = Instant::now() + BOOT_LIMIT;
    while !ready.exists() {
        if guest.try_wait()?.is_some() {
            return Ok(false);
        }
        ensure!(Instant::now() < deadline, "the guest is not ready; so far:\n{}", bounded(&shared.join("output")));
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(after);
    let pid = guest.id();
    let first = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    drop(guest);
    // The first process of the namespace is gone when all the others are.
    while first.split_whitespace().any(|pid| Path::new("/proc").join(pid).exists()) {
        ensure!(Instant::now() < deadline, "the guest does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(true)
}

/// Starts the kernel in pid and mount namespaces of its own: killing the one process that is ours ends everything that it made.
fn boot(kernel: &Path, shared: &Path, console: File, words: &[&str]) -> Result<Child> {
    let init = setup::workspace().join("integration/guest/init.sh").canonicalize().context("find the guest's init")?;
    let seen = setup::target().canonicalize()?;
    let shared = shared.canonicalize()?;
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]);
    // The kernel must not be process 1 of its namespace: its own abort() would be ignored.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]).arg(kernel);
    command.args([&format!("mem={MEMORY}"), "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=-1"]);
    command.args(["con0=null,fd:1", "con=null", "ssl=null"]);
    // System calls of the guest's processes are caught by seccomp where the host has it, less than half as dear as by ptrace.
    command.arg("seccomp=auto");
    command.arg(format!("uml_dir={}/", shared.display())).arg("umid=guest");
    command.arg(format!("init={}", init.display())).args(words);
    command.arg(format!("{RUN_WORD}{}", shared.display())).arg(format!("windlass.see={}", seen.display()));
    command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
    command.spawn().context("start the guest (unshare, of Debian's util-linux)")
}

/// The command as a script of the shell.
fn script(program: &[&str], environment: &[(&str, &str)]) -> Result<String> {
    let mut text = String::new();
    for (name, value) in environment {
        text.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    let here = env::current_dir().context("find the working directory")?;
    text.push_str(&format!("cd {}\nexec", quoted(&here.to_string_lossy())));
    for word in program {
        text.push(' ');
        text.push_str(&quoted(word));
    }
    text.push('\n');
    Ok(text)
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The first part of a file, or nothing.
fn bounded(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let _ = file.take(OUTPUT_LIMIT_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A new directory for [`run`], below `<target>/guest`: the guest hides the host's /tmp.
pub fn scratch() -> Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("run-").tempdir_in(directory()?).context("make a directory for the guest")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_the_shell() {
        let text = script(&["echo", "it's"], &[("A", "b c")]).expect("a script");
        assert!(text.starts_with("export A='b c'\ncd '"), "{text}");
        assert!(text.ends_with("\nexec 'echo' 'it'\\''s'\n"), "{text}");
    }
}
