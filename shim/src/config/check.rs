//! Reads the text of a configuration, and finds all that is wrong with it at once: what is no field, what is no value of a field, and what
//! makes no sense. Each problem has its line, and what was probably meant. Asks nothing of the host.

use super::{Account, BlockIoClass, BlockIoLimit, Config, DriverChoice, HandlerConfig, NATIVE_HANDLER, Ulimit};
use crate::glob;
use crate::network::subnet::parse_subnets;
use serde::Deserialize;
use serde_json::Value;
use std::fmt;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// The names that `default_ulimits` takes.
pub(crate) const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Longest path of a socket in bytes (unix(7)).
const SOCKET_PATH_MAX_BYTES: usize = 107;
/// Longest name of a network interface in bytes.
const INTERFACE_MAX_BYTES: usize = 15;
/// Longest time that a plugin of NRI may be given: kubelet waits two minutes.
const NRI_TIMEOUT_MAX_MS: u64 = 60_000;
/// Stands for any name in the shape of the configuration.
const ANY: &str = "*";
/// How like another a word is that was probably meant (0 to 1).
const LIKE: f64 = 0.8;

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Line of the file, from 1; none where a field that is not in the file is meant.
    pub line: Option<usize>,
    /// Path of the field, as `network.subnets`; empty where the text is no TOML.
    pub field: String,
    /// What is wrong, and what to write instead.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.what)
    }
}

/// The configuration that the text says, or its problems in the order of their lines.
pub fn read(text: &str) -> Result<Config, Vec<Problem>> {
    let line = |at: usize| Some(text.get(..at).unwrap_or(text).matches('\n').count() + 1);
    let mut root = DeTable::parse(text).map_err(|error| {
        let line = error.span().and_then(|span| line(span.start));
        vec![Problem { line, field: String::new(), what: error.message().to_owned() }]
    })?;
    let shape = shape();
    let mut problems = Vec::new();
    let mut unknown = |at: usize, field: String, what: String| problems.push(Problem { line: line(at), field, what });
    only_known(root.get_mut(), &shape, &shape, "", &mut unknown);
    for (field, part) in parts(&root) {
        if let Err(error) = Config::deserialize(Deserializer::from(part)) {
            let at = error.span().map(|span| span.start);
            let field = at.and_then(|at| field_at(root.get_ref(), at)).unwrap_or(field);
            problems.push(Problem { line: at.and_then(line), field, what: error.message().to_owned() });
        }
    }
    let lines = root.clone();
    match Config::deserialize(Deserializer::from(root)) {
        Ok(config) => {
            for (field, what) in senseless(&config) {
                let at = place_of(lines.get_ref(), &field);
                problems.push(Problem { line: at.and_then(line), field, what });
            }
            if problems.is_empty() {
                return Ok(config);
            }
        }
        Err(error) if problems.is_empty() => {
            let line = error.span().and_then(|span| line(span.start));
            problems.push(Problem { line, field: String::new(), what: error.message().to_owned() });
        }
        Err(_) => {}
    }
    problems.sort_by_key(|problem| problem.line);
    Err(problems)
}

/// A configuration that has everything, with [`ANY`] for names that are the administrator's.
fn shape() -> Value {
    let device = BlockIoLimit {
        path: "/".into(),
        weight: 0,
        read_bytes_per_second: 0,
        write_bytes_per_second: 0,
        reads_per_second: 0,
        writes_per_second: 0,
    };
    let any = || ANY.to_owned();
    let mut whole = Config {
        block_io_classes: [(any(), BlockIoClass { weight: 0, devices: vec![device] })].into(),
        handlers: [(any(), HandlerConfig { path: "/".into(), pod_annotations: vec![any()], container_annotations: vec![any()] })]
            .into(),
        ..Config::default()
    };
    whole.containers.default_ulimits = [(any(), Ulimit { soft: 0, hard: 0 })].into();
    serde_json::json!(whole)
}

/// Takes out what is no field, and tells of each: its place, its path, and what was probably meant.
fn only_known(table: &mut DeTable<'_>, shape: &Value, whole: &Value, path: &str, tell: &mut dyn FnMut(usize, String, String)) {
    let Some(known) = shape.as_object() else { return };
    let any = known.get(ANY);
    *table = std::mem::take(table)
        .into_iter()
        .filter_map(|(key, mut value)| {
            let name = key.get_ref().as_ref();
            let field = join(path, name);
            match known.get(name).or(any) {
                None => {
                    tell(key.span().start, field, format!("there is no such field{}", meant(name, shape, whole, path)));
                    None
                }
                Some(shape) => {
                    match value.get_mut() {
                        DeValue::Table(inner) => only_known(inner, shape, whole, &field, tell),
                        DeValue::Array(items) => {
                            for item in items.iter_mut() {
                                if let (DeValue::Table(inner), Some(shape)) = (item.get_mut(), shape.get(0)) {
                                    only_known(inner, shape, whole, &field, tell);
                                }
                            }
                        }
                        _ => {}
                    }
                    Some((key, value))
                }
            }
        })
        .collect();
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// `; did you mean ...?`: a field of the same table with a name like it, else one of that name elsewhere.
fn meant(name: &str, shape: &Value, whole: &Value, path: &str) -> String {
    let here = shape.as_object().into_iter().flat_map(|map| map.keys()).filter(|key| *key != ANY);
    let like = here.clone().map(|key| (strsim::jaro_winkler(name, key), key)).max_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((_, key)) = like.filter(|(likeness, _)| *likeness >= LIKE) {
        return format!("; did you mean {key:?}?");
    }
    let elsewhere = whole.as_object().into_iter().flatten().flat_map(|(section, inner)| {
        let top = (section == name).then(|| section.clone());
        top.into_iter().chain(inner.get(name).map(|_| format!("{section}.{name}")))
    });
    match elsewhere.into_iter().next() {
        Some(field) => format!("; did you mean {field:?}?"),
        None => {
            let names: Vec<&str> = here.map(String::as_str).collect();
            let table = if path.is_empty() { "the file".to_owned() } else { format!("[{path}]") };
            format!("; {table} has {}", names.join(", "))
        }
    }
}

/// The document in parts that can be read by themselves, so that each tells its own error.
fn parts<'i>(root: &Spanned<DeTable<'i>>) -> Vec<(String, Spanned<DeTable<'i>>)> {
    let mut parts = Vec::new();
    let alone = |key: &Spanned<_>, value: &Spanned<DeValue<'i>>| {
        let mut table = DeTable::new();
        table.insert(key.clone(), value.clone());
        table
    };
    for (key, value) in root.get_ref() {
        match value.get_ref() {
            DeValue::Table(inner) => {
                for (inner_key, inner_value) in inner {
                    let section = Spanned::new(value.span(), DeValue::Table(alone(inner_key, inner_value)));
                    let field = join(key.get_ref(), inner_key.get_ref());
                    parts.push((field, Spanned::new(root.span(), alone(key, &section))));
                }
            }
            _ => parts.push((key.get_ref().to_string(), Spanned::new(root.span(), alone(key, value)))),
        }
    }
    parts
}

/// The path of the innermost field whose value this place is in.
fn field_at(table: &DeTable<'_>, at: usize) -> Option<String> {
    for (key, value) in table {
        let name = key.get_ref();
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(below) = field_at(inner, at)
        {
            return Some(join(name, &below));
        }
        if value.span().contains(&at) {
            return Some(name.to_string());
        }
    }
    None
}

/// Where a field is in the text, or the table nearest to it.
fn place_of(table: &DeTable<'_>, field: &str) -> Option<usize> {
    let (name, rest) = field.split_once('.').unwrap_or((field, ""));
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
    match value.get_ref() {
        DeValue::Table(inner) if !rest.is_empty() => place_of(inner, rest).or(Some(key.span().start)),
        _ => Some(key.span().start),
    }
}

/// Values that have the right type and make no sense: field, and why.
pub(super) fn senseless(config: &Config) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut no = |field: &str, why: String| found.push((field.to_owned(), why));
    for (field, path) in [("root", &config.root), ("state", &config.state), ("socket", &config.socket)] {
        if !path.is_absolute() {
            no(field, format!("{:?} is not an absolute path", path.display()));
        }
    }
    if config.socket.as_os_str().len() > SOCKET_PATH_MAX_BYTES {
        no("socket", format!("has {} bytes; the kernel takes {SOCKET_PATH_MAX_BYTES}", config.socket.as_os_str().len()));
    }
    if let Some(why) = filter(&config.log_level) {
        no("log_level", format!("{:?}: {why}; write error, warn, info, debug or trace", config.log_level));
    }
    if config.cgroup.parent.split('/').any(|part| part == "..") {
        no("cgroup.parent", format!("{:?} contains \"..\"", config.cgroup.parent));
    }
    if config.cgroup.driver == DriverChoice::Systemd && config.monitor.account == Account::System {
        no(
            "monitor.account",
            "\"system\" does not go with cgroup.driver = \"systemd\": a pod's scope has its monitor in it".into(),
        );
    }
    limits(config, &mut no);
    for (name, handler) in &config.handlers {
        if name.is_empty() || name == NATIVE_HANDLER {
            no(&format!("handlers.{name}"), format!("{name:?} is the native runtime's name; give this one another"));
        }
        if !handler.path.is_absolute() {
            no(&format!("handlers.{name}.path"), format!("{:?} is not an absolute path", handler.path.display()));
        }
        let program = handler.path.file_name().unwrap_or_default().to_string_lossy();
        if program.starts_with("runsc") || program.contains("kata") {
            let why = format!(
                "{program} gives a pod a kernel of its own, past which Windlass would execute commands: it is not served"
            );
            no(&format!("handlers.{name}.path"), why);
        }
        annotations(&format!("handlers.{name}"), &handler.pod_annotations, &handler.container_annotations, &mut no);
    }
    annotations("containers", &config.containers.pod_annotations, &config.containers.container_annotations, &mut no);
    network(config, &mut no);
    if config.images.max_parallel_layers == 0 {
        no("images.max_parallel_layers", "0 is no layer at all; write 1 or more".into());
    }
    if config.images.progress_timeout_seconds == 0 {
        no("images.progress_timeout_seconds", "0 seconds for an answer; write 1 or more".into());
    }
    addresses(config, &mut no);
    nri(config, &mut no);
    found
}

/// What is wrong with a filter of the log. A bare word that is no level would be taken for a part of the program, and silence all others.
fn filter(text: &str) -> Option<String> {
    if let Err(error) = EnvFilter::try_new(text) {
        return Some(error.to_string());
    }
    let bare = text.split(',').map(str::trim).filter(|directive| !directive.contains(['=', '[', '{', ']', '}']));
    bare.into_iter().find(|word| word.parse::<LevelFilter>().is_err()).map(|word| format!("{word:?} is no level"))
}

fn limits(config: &Config, no: &mut dyn FnMut(&str, String)) {
    for (name, limit) in &config.containers.default_ulimits {
        let field = format!("containers.default_ulimits.{name}");
        if !ULIMITS.contains(&name.as_str()) {
            no(&field, format!("{name:?} is none of {}", ULIMITS.join(", ")));
        }
        if limit.soft > limit.hard {
            no(&field, format!("soft {} is above hard {}", limit.soft, limit.hard));
        }
    }
    if config.containers.shm_size_bytes == 0 {
        no("containers.shm_size_bytes", "0 bytes of /dev/shm".into());
    }
    for (name, class) in &config.block_io_classes {
        let weights = std::iter::once(class.weight).chain(class.devices.iter().map(|device| device.weight));
        for weight in weights.filter(|weight| *weight != 0 && !(10..=1000).contains(weight)) {
            no(&format!("block_io_classes.{name}"), format!("weight {weight} is not 10 to 1000"));
        }
    }
}

/// Patterns that nothing could be told by.
fn annotations(table: &str, of_pods: &[String], of_containers: &[String], no: &mut dyn FnMut(&str, String)) {
    for (field, patterns) in [("pod_annotations", of_pods), ("container_annotations", of_containers)] {
        for pattern in patterns.iter().filter(|pattern| !glob::is_pattern(pattern)) {
            no(&format!("{table}.{field}"), format!("{pattern:?} is no pattern: a bracket or a backslash has no end"));
        }
    }
}

fn network(config: &Config, no: &mut dyn FnMut(&str, String)) {
    let network = &config.network;
    if network.bridge.is_empty() || network.bridge.len() > INTERFACE_MAX_BYTES {
        no("network.bridge", format!("{:?} has {} bytes, not 1 to {INTERFACE_MAX_BYTES}", network.bridge, network.bridge.len()));
    }
    if network.bridge.bytes().any(|byte| !(byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')) {
        no("network.bridge", format!("{:?} has other than letters, digits, - and _", network.bridge));
    }
    if let Err(why) = parse_subnets(network.subnets.iter().map(String::as_str)) {
        no("network.subnets", why);
    }
    for (field, path) in [("netns_dir", &network.netns_dir), ("cni_conf_dir", &network.cni_conf_dir)] {
        if !path.is_absolute() {
            no(&format!("network.{field}"), format!("{:?} is not an absolute path", path.display()));
        }
    }
    if let Some(path) = std::env::split_paths(&network.cni_bin_dir).find(|path| !path.is_absolute()) {
        no("network.cni_bin_dir", format!("{:?} is not an absolute path", path.display()));
    }
    if network.cni_timeout_seconds == 0 {
        no("network.cni_timeout_seconds", "0 seconds for a plugin; write 1 or more".into());
    }
}

fn addresses(config: &Config, no: &mut dyn FnMut(&str, String)) {
    let streaming = &config.streaming;
    for (field, address) in [("streaming.address", &streaming.address), ("metrics.address", &config.metrics.address)] {
        let whole = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !whole && (field == "streaming.address" || !address.is_empty()) {
            no(field, format!("{address:?} is not ADDRESS:PORT"));
        }
    }
    let empty = |path: &Path| path.as_os_str().is_empty();
    match (empty(&streaming.tls_certificate), empty(&streaming.tls_key)) {
        (false, true) => no("streaming.tls_key", "is empty, and tls_certificate is not: both or neither".into()),
        (true, false) => no("streaming.tls_certificate", "is empty, and tls_key is not: both or neither".into()),
        _ => {}
    }
    if !(0.0..=1.0).contains(&config.tracing.sampling_ratio) {
        no("tracing.sampling_ratio", format!("{} is not from 0 to 1", config.tracing.sampling_ratio));
    }
}

fn nri(config: &Config, no: &mut dyn FnMut(&str, String)) {
    let nri = &config.nri;
    for (field, limit) in [
        ("nri.plugin_registration_timeout_ms", nri.plugin_registration_timeout_ms),
        ("nri.plugin_request_timeout_ms", nri.plugin_request_timeout_ms),
    ] {
        if !(1..=NRI_TIMEOUT_MAX_MS).contains(&limit) {
            no(field, format!("{limit} is not 1 to {NRI_TIMEOUT_MAX_MS}"));
        }
    }
    for (field, path) in [
        ("nri.socket_path", &nri.socket_path),
        ("nri.plugin_path", &nri.plugin_path),
        ("nri.plugin_config_path", &nri.plugin_config_path),
    ] {
        if !path.is_absolute() {
            no(field, format!("{:?} is not an absolute path", path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each problem as `line field`, with a word of what it says.
    fn check(text: &str, expected: &[(usize, &str, &str)]) {
        let problems = read(text).err().unwrap_or_default();
        assert_eq!(problems.len(), expected.len(), "{text}: {problems:#?}");
        for (problem, (line, field, word)) in problems.iter().zip(expected) {
            assert_eq!((problem.line, problem.field.as_str()), (Some(*line), *field), "{text}: {problem}");
            assert!(problem.what.contains(word), "{word:?} in {problem}");
        }
    }

    #[test]
    fn a_field_that_is_none_is_told_with_its_line_and_what_was_meant() {
        check("[cgroup]\nparant = \"/x\"\n", &[(2, "cgroup.parant", "did you mean \"parent\"?")]);
        check("\n\n[netwerk]\nmode = \"cni\"\n", &[(3, "netwerk", "did you mean \"network\"?")]);
        check("[images]\nshm_size_bytes = 1\n", &[(2, "images.shm_size_bytes", "did you mean \"containers.shm_size_bytes\"?")]);
        check("[metrics]\nzzz = 1\n", &[(2, "metrics.zzz", "[metrics] has address")]);
        check(
            "[handlers.runc]\npath = \"/a\"\ntype = 1\n",
            &[(3, "handlers.runc.type", "[handlers.runc] has container_annotations, path, pod_annotations")],
        );
        let class =
            "[block_io_classes.x]\nweight = 20\n[[block_io_classes.x.devices]]\npath = \"/dev/x\"\nread_bytes_per_secand = 1\n";
        check(class, &[(5, "block_io_classes.x.devices.read_bytes_per_secand", "did you mean \"read_bytes_per_second\"?")]);
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let text = "root = 1\nrot = 1\n[cgroup]\ndriver = \"systemdd\"\nstrict = \"yes\"\n[network]\nmode = 3\n[images]\nlayers = \"x\"\n";
        check(
            text,
            &[
                (1, "root", "expected path string"),
                (2, "rot", "\"root\""),
                (4, "cgroup.driver", "expected one of `auto`"),
                (5, "cgroup.strict", "expected a boolean"),
                (7, "network.mode", ""),
                (9, "images.layers", "`erofs`"),
            ],
        );
    }

    #[test]
    fn a_text_that_is_no_toml_is_told_with_its_line() {
        check("root = \"/a\"\n[cgroup\n", &[(2, "", "")]);
        check("a = 1\na = 2\n", &[(2, "", "duplicate key")]);
    }

    #[test]
    fn values_that_make_no_sense() {
        for (text, field, word) in [
            ("[containers]\ndefault_ulimits = { files = { soft = 1, hard = 2 } }", "containers.default_ulimits.files", "nofile"),
            (
                "[containers]\ndefault_ulimits = { nofile = { soft = 3, hard = 2 } }",
                "containers.default_ulimits.nofile",
                "soft 3",
            ),
            ("[containers]\ndefault_ulimits = { nofile = { soft = 3 } }", "containers.default_ulimits.nofile", "hard"),
            ("[containers]\nshm_size_bytes = 0", "containers.shm_size_bytes", "0 bytes"),
            ("[block_io_classes.slow]\nweight = 5", "block_io_classes.slow", "weight 5"),
            ("[images]\nmax_parallel_layers = 0", "images.max_parallel_layers", "1 or more"),
            ("[images]\nprogress_timeout_seconds = 0", "images.progress_timeout_seconds", "1 or more"),
            ("[network]\ncni_timeout_seconds = 0", "network.cni_timeout_seconds", "1 or more"),
            ("[network]\nsubnets = [\"10.0.0.1/8\"]", "network.subnets", "10.0.0"),
            ("[network]\nbridge = \"a-name-of-16-byt\"", "network.bridge", "16 bytes"),
            ("[network]\ncni_bin_dir = \"/opt/cni/bin:here\"", "network.cni_bin_dir", "here"),
            ("[network]\nbridge = \"br\\\"0\"", "network.bridge", "letters"),
            ("[handlers.windlass]\npath = \"/usr/bin/runc\"", "handlers.windlass", "native"),
            ("[streaming]\naddress = \"127.0.0.1\"", "streaming.address", "PORT"),
            ("[streaming]\ntls_key = \"/key\"", "streaming.tls_certificate", "both or neither"),
            ("[metrics]\naddress = \"9099\"", "metrics.address", "PORT"),
            ("[tracing]\nsampling_ratio = 2.0", "tracing.sampling_ratio", "from 0 to 1"),
            ("[handlers.runc]\npath = \"runc\"", "handlers.runc.path", "absolute"),
            ("[handlers.g]\npath = \"/usr/bin/runsc\"", "handlers.g.path", "a kernel of its own"),
            (
                "[handlers.runc]\npath = \"/runc\"\npod_annotations = [\"a.*\", \"[\"]",
                "handlers.runc.pod_annotations",
                "no pattern",
            ),
            ("[containers]\ncontainer_annotations = [\"a\\\\\"]", "containers.container_annotations", "no pattern"),
            ("[cgroup]\nparent = \"/a/../b\"", "cgroup.parent", "\"..\""),
            ("[nri]\nplugin_request_timeout_ms = 0", "nri.plugin_request_timeout_ms", "0 is not 1 to"),
            ("[nri]\nsocket_path = \"nri.sock\"", "nri.socket_path", "absolute"),
            ("[nri.validator]\nreject = true", "nri.validator.reject", "no such field"),
        ] {
            let problems = read(text).expect_err(text);
            let [problem] = &problems[..] else { panic!("{text}: {problems:#?}") };
            assert!(problem.line.is_some() && problem.field == field && problem.what.contains(word), "{text}: {problem}");
        }
        for good in ["WARN", "off", "info,windlass::image=debug", "windlass::image=debug", "info,[{pod=web}]=debug"] {
            assert!(read(&format!("log_level = {good:?}")).is_ok(), "{good}");
        }
        let name = "x".repeat(120);
        for (text, field) in [
            ("root = \"var\"".to_owned(), "root"),
            (format!("socket = \"/{name}\""), "socket"),
            ("log_level = \"a=b=c\"".to_owned(), "log_level"),
            ("log_level = \"warning\"".to_owned(), "log_level"),
            ("log_level = \"info,windlass::image\"".to_owned(), "log_level"),
        ] {
            let problems = read(&text).expect_err(&text);
            assert!(problems.len() == 1 && problems[0].field == field && problems[0].line == Some(1), "{text}: {problems:#?}");
        }
    }
}
