//! Runs inside a container and says what it sees there, or behaves as a test needs it.

mod dns;

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    match words.first().map(String::as_str) {
        Some("exit") => return ExitCode::from(u8::try_from(number(1)).unwrap_or(255)),
        Some("lines") => lines(number(1), Duration::from_micros(number(2))),
        Some("sleep") => std::thread::sleep(Duration::from_secs(number(1))),
        Some("hold-mem") => hold(number(1)),
        Some("load") => load([number(1), number(2), number(3), number(4)], words.get(5).map_or("", String::as_str)),
        Some("steady") => steady(number(1), number(2)),
        Some("flood") => flood(number(1)),
        Some("echo") => echo(u16::try_from(number(1)).unwrap_or(0)),
        Some("resolve") => return dns::resolve(&words[1..]),
        Some("query") => return dns::query(&words[1..]),
        _ => println!("{}", report()),
    }
    ExitCode::SUCCESS
}

/// `count` numbered lines, one each `interval`; 0 never ends.
fn lines(count: u64, interval: Duration) {
    let start = Instant::now();
    let mut number = 0u64;
    while count == 0 || number < count {
        println!("line {number}");
        number += 1;
        let due = interval.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
        if let Some(rest) = due.checked_sub(start.elapsed()) {
            std::thread::sleep(rest);
        }
    }
}

/// Touches and keeps this many MiB.
fn hold(mebibytes: u64) {
    let mut memory = vec![0u8; usize::try_from(mebibytes << 20).unwrap_or(0)];
    for page in memory.iter_mut().step_by(4096) {
        *page = 1;
    }
    println!("holding {mebibytes} MiB");
    std::thread::sleep(Duration::from_secs(3600));
    std::hint::black_box(&memory);
}

/// Does what was asked, as exactly as it can: sends MiB to `address`, writes MiB to /written, touches MiB of memory, and burns the processor
/// until the process has used so many milliseconds of it. Then it keeps the memory, an open socket and still.
fn load([cpu_ms, touch, write, send]: [u64; 4], address: &str) {
    let chunk = vec![7u8; 1 << 20];
    let mut socket = std::net::TcpStream::connect(address).ok();
    if let Some(socket) = &mut socket {
        for _ in 0..send {
            let _ = socket.write_all(&chunk);
        }
    }
    if let Ok(mut file) = fs::File::create("/written") {
        for _ in 0..write {
            let _ = file.write_all(&chunk);
        }
        let _ = file.sync_all();
    }
    let mut memory = vec![0u8; usize::try_from(touch << 20).unwrap_or(0)];
    for page in memory.iter_mut().step_by(4096) {
        *page = 1;
    }
    println!("sent, written and touched");
    let used = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::MAX, Duration::from);
    while used() < Duration::from_millis(cpu_ms) {
        std::hint::black_box((0..1000).sum::<u64>());
    }
    // A machine that stands still for a while may have made it more.
    println!("done in {} us", used().as_micros());
    std::thread::sleep(Duration::from_secs(3600));
    std::hint::black_box((&memory, &socket));
}

/// Keeps this many MiB, and takes of each tenth of a second the given share of the processor's time, in thousandths, or what it gets of
/// that. Tells after each the time since 1970 in milliseconds and the processor's time in microseconds.
fn steady(share: u64, mebibytes: u64) {
    let mut memory = vec![0u8; usize::try_from(mebibytes << 20).unwrap_or(0)];
    for page in memory.iter_mut().step_by(4096) {
        *page = 1;
    }
    let used = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::MAX, Duration::from);
    let (begun, before) = (Instant::now(), used());
    for tick in 1u64.. {
        while used().saturating_sub(before) < Duration::from_micros(share * 100 * tick) {
            std::hint::black_box((0..1000).sum::<u64>());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        println!("{} {}", now.as_millis(), used().as_micros());
        std::thread::sleep(Duration::from_millis(100 * tick).saturating_sub(begun.elapsed()));
    }
    std::hint::black_box(&memory);
}

fn flood(bytes: u64) {
    let chunk = [b'x'; 4096];
    let mut out = std::io::stdout().lock();
    for _ in 0..bytes / 4096 {
        let _ = out.write_all(&chunk);
    }
}

/// Gives back what comes on each connection to this port, until the client's end.
fn echo(port: u16) {
    let Ok(listener) = std::net::TcpListener::bind(("127.0.0.1", port)) else { return };
    println!("listening");
    for connection in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut &connection, &mut &connection);
            let _ = connection.shutdown(std::net::Shutdown::Write);
        });
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn report() -> Value {
    let status: BTreeMap<String, String> = read("/proc/self/status")
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect();
    let links = |directory: &str| -> BTreeMap<String, String> {
        let listing = fs::read_dir(directory).into_iter().flatten().flatten();
        listing
            .filter_map(|entry| {
                Some((entry.file_name().into_string().ok()?, fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()))
            })
            .collect()
    };
    json!({
        "status": status,
        "cwd": std::env::current_dir().ok(),
        "environment": std::env::vars().collect::<BTreeMap<_, _>>(),
        "hostname": read("/proc/sys/kernel/hostname").trim(),
        "mounts": read("/proc/self/mountinfo").lines().collect::<Vec<_>>(),
        "namespaces": links("/proc/self/ns"),
        "descriptors": links("/proc/self/fd"),
        "limits": read("/proc/self/limits").lines().collect::<Vec<_>>(),
        "cgroup": read("/proc/self/cgroup").trim(),
        "oom_score_adj": read("/proc/self/oom_score_adj").trim(),
        "processes": fs::read_dir("/proc").into_iter().flatten().flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).count(),
    })
}
