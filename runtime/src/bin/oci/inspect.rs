//! state, list, ps: what is known of containers.

use crate::arguments::{Call, Flag, switch, value};
use crate::record::Record;
use crate::{Outcome, failed, invalid};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use windlass_runtime::cgroup::Cgroup;
use windlass_runtime::process::Kind;

const FORMAT: Flag = value("--format", "-f", "FORMAT", "table or json");
pub(crate) const LIST_FLAGS: &[Flag] = &[FORMAT, switch("--quiet", "-q", "ids alone")];
pub(crate) const PS_FLAGS: &[Flag] = &[FORMAT];

/// `state`.
pub(crate) fn state(call: &Call) -> Outcome<i32> {
    let home = call.home()?;
    println!("{:#}", describe(&Record::load(&home)?, &home)?);
    Ok(0)
}

fn describe(record: &Record, home: &Path) -> Outcome<Value> {
    let spec = record.spec(home)?;
    let mut state = record.state(record.status(home)).json(&spec);
    let root = spec.root().as_ref().map(|root| record.bundle.join(root.path()));
    state["rootfs"] = json!(root);
    state["created"] = json!(record.created);
    state["owner"] = json!(fs::metadata(home).map(|found| user_name(found.uid())).unwrap_or_default());
    Ok(state)
}

/// `list`.
pub(crate) fn list(call: &Call) -> Outcome<i32> {
    let mut states = Vec::new();
    let entries = match fs::read_dir(&call.root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        other => Some(other.map_err(|error| failed("list", &call.root, &error))?),
    };
    for entry in entries.into_iter().flatten().flatten() {
        let home = entry.path();
        match Record::load(&home).and_then(|record| describe(&record, &home)) {
            Ok(state) => states.push(state),
            // Not complete yet, or gone meanwhile.
            Err(error) if error.kind == Kind::NotFound || !home.join("state.json").exists() => {}
            Err(error) => call.log.warning(&error.to_string()),
        }
    }
    states.sort_by_key(|state| state["id"].as_str().unwrap_or_default().to_owned());
    let text = |state: &Value, key: &str| state[key].as_str().map_or_else(|| state[key].to_string(), str::to_owned);
    if call.flags.has("--quiet") {
        states.iter().for_each(|state| println!("{}", text(state, "id")));
    } else if json_wanted(call)? {
        println!("{}", Value::Array(states));
    } else {
        let keys = ["id", "pid", "status", "bundle", "created", "owner"];
        let mut rows = vec![keys.map(str::to_uppercase).to_vec()];
        rows.extend(states.iter().map(|state| keys.map(|key| text(state, key)).to_vec()));
        print_table(&rows);
    }
    Ok(0)
}

/// `ps`.
pub(crate) fn ps(call: &Call) -> Outcome<i32> {
    let record = Record::load(&call.home()?)?;
    let pids = match Cgroup::open(&record.cgroup) {
        Err(error) if error.errno == libc::ENOENT => Vec::new(),
        cgroup => cgroup?.processes()?,
    };
    if json_wanted(call)? {
        println!("{}", json!(pids));
        return Ok(0);
    }
    let mut rows = vec![["UID", "PID", "PPID", "CMD"].map(str::to_owned).to_vec()];
    rows.extend(pids.into_iter().filter_map(process_row));
    print_table(&rows);
    Ok(0)
}

/// `None` for a process that has ended meanwhile.
fn process_row(pid: i32) -> Option<Vec<String>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).replace('\0', " ");
    let command = if words.trim().is_empty() { format!("[{}]", field("Name:").unwrap_or("?")) } else { words.trim().to_owned() };
    let user = field("Uid:").and_then(|uid| uid.parse().ok()).map(user_name).unwrap_or_default();
    Some(vec![user, pid.to_string(), field("PPid:").unwrap_or("?").to_owned(), command])
}

fn json_wanted(call: &Call) -> Outcome<bool> {
    match call.flags.get("--format") {
        None | Some("table") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(invalid(other, "not a format: table or json")),
    }
}

/// Columns as wide as their longest entry.
fn print_table(rows: &[Vec<String>]) {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", cells.collect::<Vec<_>>().join("   ").trim_end());
    }
}

/// A name of /etc/passwd, or the number.
fn user_name(uid: u32) -> String {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| uid.to_string())
}
