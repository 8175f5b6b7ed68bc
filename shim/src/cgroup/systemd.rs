//! systemd over D-Bus: the scope of a pod is started, told its limits and ended. Below a scope the cgroups are ours (`Delegate=yes`), and
//! systemd is asked about nothing: one call, and one signal that its job is done, for each pod that is run.
//!
//! Over the message bus, or where there is none over systemd's own socket, as runc and kubelet do. A connection that is lost is made again by
//! the next call.

use super::private::{self, Private};
use crate::error::{Error, Kind, Result};
use futures_util::StreamExt;
use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::oneshot;
use zbus::{Connection, MatchRule, Message, MessageStream, Variant, connection::Builder, message};

const SERVICE: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// There while systemd is the first process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// Longest wait for a connection with all that belongs to it.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the answer to a call.
const CALL_LIMIT: Duration = Duration::from_secs(25);
/// Longest wait for the end of a job. A slice or a scope starts at once, but behind the jobs that systemd has.
const JOB_LIMIT: Duration = Duration::from_secs(30);

/// The first version that knows `OOMPolicy=` in a scope. Before, it does nothing to a scope in which a process is killed for memory.
const OOM_POLICY_SINCE: u32 = 253;

/// No limit, in systemd's properties.
const INFINITY: u64 = u64::MAX;

/// Files of a cgroup that hold one number, and the properties that say the same.
const NUMBERS: [(&str, &str); 7] = [
    ("cpu.weight", "CPUWeight"),
    ("memory.min", "MemoryMin"),
    ("memory.low", "MemoryLow"),
    ("memory.high", "MemoryHigh"),
    ("memory.max", "MemoryMax"),
    ("memory.swap.max", "MemorySwapMax"),
    ("pids.max", "TasksMax"),
];

/// Files that hold a list of numbers, as `0-2,7`.
const SETS: [(&str, &str); 2] = [("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")];

/// Most numbers of a set.
const SET_MAX: usize = 8192;

/// A property of a unit.
pub(super) type Property = (&'static str, Variant<'static>);

/// The connection to systemd.
pub struct Systemd {
    /// Where systemd's own tree begins in the cgroup tree; empty where it has all of it.
    pub root: String,
    /// As it calls itself: `252.38-1~deb12u1`.
    pub version: String,
    bus: tokio::sync::Mutex<Arc<Bus>>,
}

/// Who waits for the end of a unit's job; told its result.
type Waiting = Mutex<HashMap<String, oneshot::Sender<String>>>;

struct Bus {
    connection: Connection,
    waiting: Arc<Waiting>,
}

const POISON: &str = "never poisoned: no panic while held";

/// True where systemd is the first process of this machine or container.
pub(super) fn booted() -> bool {
    Path::new(BOOTED).is_dir()
}

impl Systemd {
    /// Connects, and asks what has to be known.
    pub async fn connect() -> Result<Systemd> {
        let bus = Bus::connect().await?;
        let root: String = bus.property("ControlGroup").await?;
        let version = bus.property("Version").await?;
        Ok(Systemd { root: root.trim_end_matches('/').to_owned(), version, bus: tokio::sync::Mutex::new(Arc::new(bus)) })
    }

    /// Starts the scope of a pod with its monitor in it, and the slices that it is in as far as they are not there.
    pub async fn start_scope(&self, scope: &str, slice: &str, description: &str, pid: u32) -> Result<()> {
        let mut properties: Vec<Property> = vec![
            ("Description", Variant::from(description.to_owned())),
            ("Slice", Variant::from(slice.to_owned())),
            ("PIDs", Variant::from(vec![pid])),
            ("Delegate", Variant::from(true)),
            // Not stopped before the kubelet that would stop it in order.
            ("DefaultDependencies", Variant::from(false)),
            // Nothing is kept of a scope that ended badly.
            ("CollectMode", Variant::from("inactive-or-failed".to_owned())),
            // Else it is systemd's DefaultTasksMax, for all containers of the pod together.
            ("TasksMax", Variant::from(INFINITY)),
        ];
        if leading_number(&self.version) >= OOM_POLICY_SINCE {
            properties.push(("OOMPolicy", Variant::from("continue".to_owned())));
        }
        let none: Vec<(&str, Vec<Property>)> = Vec::new();
        let bus = self.bus().await?;
        let started = bus.job(scope, "StartTransientUnit", &(scope, "fail", properties, none)).await;
        if started.is_err() {
            // It may still be on its way.
            let _ = bus.call("StopUnit", &(scope, "replace")).await;
        }
        started
    }

    /// Tells systemd the limits that stand in a scope's files: those that it does not know it sets back when it reads its units again.
    pub async fn keep_limits(&self, scope: &str, directory: &Path) -> Result<()> {
        let properties = properties(|file| std::fs::read_to_string(directory.join(file)).ok());
        self.bus().await?.call("SetUnitProperties", &(scope, true, properties)).await.map(drop)
    }

    /// Stops a unit and everything in it. One that is not there is stopped.
    pub async fn stop(&self, unit: &str) -> Result<()> {
        match self.bus().await?.job(unit, "StopUnit", &(unit, "replace")).await {
            Err(error) if error.kind == Kind::NotFound => Ok(()),
            other => other,
        }
    }

    /// The connection; made again if it was lost.
    async fn bus(&self) -> Result<Arc<Bus>> {
        let mut bus = self.bus.lock().await;
        if bus.connection.is_closed() {
            tracing::info!("connecting to systemd again");
            *bus = Arc::new(Bus::connect().await?);
        }
        Ok(bus.clone())
    }
}

impl Bus {
    async fn connect() -> Result<Bus> {
        let bus = within_limit(async { Bus::over(Builder::system()).await }).await;
        let Err(no_bus) = bus else { return bus.map_err(unavailable) };
        let own = within_limit(async { Bus::over(Builder::socket(Private::connect().await?).p2p()).await }).await;
        own.map_err(|error| unavailable(format!("over the message bus: {no_bus}; over {}: {error}", private::PATH)))
    }

    /// Connects, and listens to the ends of jobs.
    async fn over(builder: Builder<'_>) -> zbus::Result<Bus> {
        let connection = builder.method_timeout(CALL_LIMIT).build().await?;
        let rule = MatchRule::builder().msg_type(message::Type::Signal).sender(SERVICE).path(OBJECT);
        let rule = rule.interface(MANAGER).member("JobRemoved").build()?;
        let ends = MessageStream::for_match_rule(rule, &connection, None).await?;
        let bus = Bus { connection, waiting: Arc::default() };
        // systemd sends signals to those alone who ask for them.
        bus.invoke("Subscribe", &()).await?;
        tokio::spawn(tell(ends, bus.waiting.clone()));
        Ok(bus)
    }

    /// Calls a method whose job concerns `unit`, and waits for the end of the job.
    async fn job<B: serde::Serialize + zbus::DynamicType>(&self, unit: &str, method: &str, body: &B) -> Result<()> {
        let (sender, ended) = oneshot::channel();
        self.waiting.lock().expect(POISON).insert(unit.to_owned(), sender);
        let outcome = match self.call(method, body).await {
            Err(error) => Err(error),
            Ok(_) => match tokio::time::timeout(JOB_LIMIT, ended).await {
                Ok(Ok(result)) if result == "done" || result == "skipped" => Ok(()),
                Ok(Ok(result)) => Err(Error::internal(format!("systemd: {method} {unit}: its job ended with {result:?}"))),
                Ok(Err(_)) => Err(lost()),
                Err(_) => {
                    let why = format!("systemd: {method} {unit}: its job did not end in {} s", JOB_LIMIT.as_secs());
                    Err(Error::new(Kind::Deadline, why))
                }
            },
        };
        self.waiting.lock().expect(POISON).remove(unit);
        outcome
    }

    async fn call<B: serde::Serialize + zbus::DynamicType>(&self, method: &str, body: &B) -> Result<Message> {
        self.invoke(method, body).await.map_err(|error| of_call(method, &error))
    }

    async fn invoke<B: serde::Serialize + zbus::DynamicType>(&self, method: &str, body: &B) -> zbus::Result<Message> {
        self.connection.call_method(Some(SERVICE), OBJECT, Some(MANAGER), method, body).await
    }

    async fn property(&self, name: &str) -> Result<String> {
        let properties = Some("org.freedesktop.DBus.Properties");
        let asked = self.connection.call_method(Some(SERVICE), OBJECT, properties, "Get", &(MANAGER, name)).await;
        let answer = asked.map_err(|error| of_call(name, &error))?;
        match answer.body().deserialize::<Variant<'_>>() {
            Ok(Variant::Str(text)) => Ok(text.to_string()),
            other => Err(Error::internal(format!("systemd: {name} is no text: {other:?}"))),
        }
    }
}

/// Tells whoever waits that the job of a unit has ended. Ends with the connection, and takes the waiting with it.
async fn tell(mut ends: MessageStream, waiting: Arc<Waiting>) {
    while let Some(Ok(message)) = ends.next().await {
        // The bus lets nobody else through by the rule; what is sent to this connection alone goes past it, and may be anybody's.
        if message.header().destination().is_some() {
            continue;
        }
        let body = message.body();
        let Ok((_, _, unit, result)) = body.deserialize::<(u32, zbus::ObjectPath<'_>, &str, &str)>() else { continue };
        if let Some(waiter) = waiting.lock().expect(POISON).remove(unit) {
            let _ = waiter.send(result.to_owned());
        }
    }
    waiting.lock().expect(POISON).clear();
}

async fn within_limit(connecting: impl Future<Output = zbus::Result<Bus>>) -> Result<Bus, String> {
    match tokio::time::timeout(CONNECT_LIMIT, connecting).await {
        Ok(made) => made.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer in {} s", CONNECT_LIMIT.as_secs())),
    }
}

fn unavailable(why: String) -> Error {
    Error::new(Kind::Unavailable, format!("connect to systemd {why}"))
}

fn lost() -> Error {
    Error::new(Kind::Unavailable, "the connection to systemd was lost")
}

fn of_call(what: &str, error: &zbus::Error) -> Error {
    let kind = match error {
        zbus::Error::MethodError(name, ..) if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit" => Kind::NotFound,
        zbus::Error::InputOutput(_) => Kind::Unavailable,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("systemd: {what}: {error}"))
}

/// What the files of a cgroup say, in systemd's words.
fn properties(now: impl Fn(&str) -> Option<String>) -> Vec<Property> {
    let number = |text: &str| if text == "max" { Some(INFINITY) } else { text.parse().ok() };
    let mut found: Vec<Property> = Vec::new();
    for (file, property) in NUMBERS {
        found.extend(now(file).and_then(|text| number(text.trim())).map(|value| (property, Variant::from(value))));
    }
    for (file, property) in SETS {
        found.extend(now(file).and_then(|text| bits(text.trim())).map(|bits| (property, Variant::from(bits))));
    }
    let quota = now("cpu.max").and_then(|text| {
        let (quota, period) = text.trim().split_once(' ')?;
        Some((number(quota)?, period.parse::<u64>().ok().filter(|period| *period > 0)?))
    });
    if let Some((quota, period)) = quota {
        let in_second = if quota == INFINITY { quota } else { quota.saturating_mul(1_000_000) / period };
        found.extend([("CPUQuotaPerSecUSec", Variant::from(in_second)), ("CPUQuotaPeriodUSec", Variant::from(period))]);
    }
    found
}

/// `0-2,7` as a set of bits, the lowest first. `None` for an empty list.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut bits = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok().filter(|last| *last < SET_MAX)?);
        for number in first..=last {
            bits.resize(bits.len().max(number / 8 + 1), 0);
            bits[number / 8] |= 1 << (number % 8);
        }
    }
    (!bits.is_empty()).then_some(bits)
}

/// `252.38-1~deb12u1` is 252, `v257-rc1` is 257.
fn leading_number(version: &str) -> u32 {
    let digits: String = version.trim_start_matches('v').chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_as_the_files_have_them() {
        let files = [
            ("memory.max", "1048576\n"),
            ("memory.high", "max\n"),
            ("cpu.weight", "59\n"),
            ("cpu.max", "25000 50000\n"),
            ("cpuset.cpus", "0-2,9\n"),
            ("cpuset.mems", "\n"),
        ];
        let found = properties(|file| files.iter().find(|(name, _)| *name == file).map(|(_, text)| (*text).to_owned()));
        let expected: Vec<Property> = vec![
            ("CPUWeight", Variant::from(59_u64)),
            ("MemoryHigh", Variant::from(u64::MAX)),
            ("MemoryMax", Variant::from(1_048_576_u64)),
            ("AllowedCPUs", Variant::from(vec![0b111_u8, 0b10])),
            ("CPUQuotaPerSecUSec", Variant::from(500_000_u64)),
            ("CPUQuotaPeriodUSec", Variant::from(50_000_u64)),
        ];
        assert_eq!(found, expected);
        let unlimited = properties(|file| (file == "cpu.max").then(|| "max 100000\n".to_owned()));
        assert_eq!(unlimited[0], ("CPUQuotaPerSecUSec", Variant::from(u64::MAX)));
        assert_eq!(bits("7-99999"), None, "more than a machine has");
    }

    #[test]
    fn a_version_begins_with_its_number() {
        assert_eq!(leading_number("252.38-1~deb12u1"), 252);
        assert_eq!(leading_number("v257-rc1"), 257);
        assert_eq!(leading_number("devel"), 0);
    }
}
