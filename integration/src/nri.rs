//! A real plugin of NRI (`go/nri`) beside a daemon: what it was told, and how it answers.

use crate::{daemon::Daemon, go, process::Process, wait::until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A plugin that has joined.
pub struct Plugin {
    process: Option<Process>,
    log: PathBuf,
}

/// What the plugin's configuration is, with the file that it writes.
fn configuration(log: &Path, behaviour: &Value) -> String {
    let mut all = behaviour.clone();
    all["Log"] = json!(log);
    all.to_string()
}

impl Plugin {
    /// Starts one that connects to the daemon, `NN-name`, and waits until it has been told of what there is.
    pub fn connect(daemon: &Daemon, name: &str, behaviour: &Value) -> Result<Plugin> {
        let plugin = Plugin::connecting(daemon, name, behaviour)?;
        plugin.wait("Synchronized")?;
        Ok(plugin)
    }

    /// The same without waiting.
    pub fn connecting(daemon: &Daemon, name: &str, behaviour: &Value) -> Result<Plugin> {
        let (index, base) = name.split_once('-').context("NN-name")?;
        let log = daemon.path(&format!("{name}.jsonl"));
        let process = Command::new(go::nri_plugin()?)
            .arg(daemon.state().join("nri.sock"))
            .args([index, base, &configuration(&log, behaviour)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs::File::create(daemon.path(&format!("{name}.err")))?)
            .spawn()
            .context("start the plugin")?;
        Ok(Plugin { process: Some(Process::from(process)), log })
    }

    /// Lays one where the daemon starts it, `NN-name`, configured by a file. It runs with the daemon's next start.
    pub fn install(daemon: &Daemon, name: &str, behaviour: &Value) -> Result<Plugin> {
        let (plugins, configurations) = (daemon.path("nri-plugins"), daemon.path("nri-conf"));
        for directory in [&plugins, &configurations] {
            fs::create_dir_all(directory)?;
        }
        fs::copy(go::nri_plugin()?, plugins.join(name))?;
        let log = daemon.path(&format!("{name}.jsonl"));
        fs::write(configurations.join(format!("{name}.conf")), configuration(&log, behaviour))?;
        Ok(Plugin { process: None, log })
    }

    /// All that it has been told so far.
    pub fn told(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        // A line that is written just now has no end yet.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// The events that concern a pod or container of this id or name, in order.
    pub fn events_of(&self, id: &str) -> Result<Vec<String>> {
        let concerns = |line: &Value| {
            let subject = if line["container"].is_object() { &line["container"] } else { &line["pod"] };
            subject["id"] == id || subject["name"] == id
        };
        Ok(self
            .told()?
            .iter()
            .filter(|line| concerns(line))
            .filter_map(|line| Some(line["event"].as_str()?.to_owned()))
            .collect())
    }

    /// Waits for an event; the last of its kind.
    pub fn wait(&self, event: &str) -> Result<Value> {
        until(&format!("{event} in {}", self.log.display()), || {
            Ok(self.told()?.into_iter().rev().find(|line| line["event"] == event))
        })
    }

    /// Waits until the last event of a pod or container is this one.
    pub fn wait_last(&self, id: &str, event: &str) -> Result<Vec<String>> {
        until(&format!("{event} of {id} as the last in {}", self.log.display()), || {
            Ok(Some(self.events_of(id)?).filter(|events| events.last().is_some_and(|last| last == event)))
        })
    }

    /// Asks for updates by itself; which the runtime says have failed.
    pub fn update(&mut self, updates: &Value) -> Result<Value> {
        let count = || -> Result<usize> { Ok(self.told()?.iter().filter(|line| line["event"] == "UpdateContainers").count()) };
        let before = count()?;
        let process = self.process.as_mut().context("a plugin of the test's own")?;
        writeln!(process.stdin.as_mut().context("its input")?, "{updates}")?;
        let this: &Plugin = self;
        until("an answer to the updates", || {
            let answers: Vec<Value> = this.told()?.into_iter().filter(|line| line["event"] == "UpdateContainers").collect();
            Ok((answers.len() > before).then(|| answers.last().cloned()).flatten())
        })
    }

    /// Stops it where it is (SIGSTOP): it is there and does nothing.
    pub fn freeze(&self) -> Result<()> {
        let process = self.process.as_ref().context("a plugin of the test's own")?;
        let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
        Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?)
    }

    /// Waits for its end, which is somebody else's doing.
    pub fn ended(&mut self) -> Result<()> {
        let process = self.process.as_mut().context("a plugin of the test's own")?;
        until("the plugin's end", || Ok(process.try_wait()?)).map(drop)
    }

    /// Waits until the daemon has noticed that it has gone, or has let it go.
    pub fn gone(daemon: &Daemon, name: &str) -> Result<()> {
        let line = format!("plugin={name}");
        until(&format!("{name} gone"), || {
            Ok(daemon.log().lines().any(|said| said.contains("NRI plugin gone") && said.contains(&line)).then_some(()))
        })
    }
}

/// The keys of a daemon's configuration that have plugins and their configurations where [`Plugin::install`] lays them.
pub fn installed(daemon: &Daemon) -> String {
    format!("[nri]\nplugin_path = {:?}\nplugin_config_path = {:?}\n", daemon.path("nri-plugins"), daemon.path("nri-conf"))
}

/// Fails unless the events are these.
pub fn expect(events: &[String], expected: &[&str]) -> Result<()> {
    ensure!(events == expected, "{events:?}, not {expected:?}");
    Ok(())
}
