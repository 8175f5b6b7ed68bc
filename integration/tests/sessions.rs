//! Sessions with the real `crictl`: a shell on a terminal, and execs whose caller goes away.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    go, image,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

const LIMIT: Duration = Duration::from_secs(20);

fn wait_for(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !condition()? {
        ensure!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

struct Ground {
    tools: go::Tools,
    daemon: Daemon,
    client: Client,
    config: cri::PodSandboxConfig,
    pod: String,
    before: Snapshot,
}

/// The tools are built before the node is entered, which has no network to build them with.
fn ground(tools: go::Tools) -> Result<Ground> {
    let layers = image::layers()?.to_vec();
    let daemon = Daemon::start_with(vec![(image::BUSYBOX, layers, serde_json::json!({}))])?;
    let client = Client::connect(&daemon)?;
    let config = pod(&daemon.path("logs"));
    let warm = client.run(&config)?;
    client.remove(&warm)?;
    let before = Snapshot::take(&daemon)?;
    let pod = client.run(&config)?;
    Ok(Ground { tools, daemon, client, config, pod, before })
}

impl Ground {
    fn container(&self, name: &str, command: &[&str], change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<String> {
        let mut wanted = container(&self.config, name, command);
        change(&mut wanted);
        let id = self.client.create(&self.pod, &self.config, &wanted)?;
        self.client.start(&id)?;
        Ok(id)
    }

    /// The words of a crictl that speaks to this daemon and reads no configuration of the machine.
    fn crictl(&self, words: &str) -> Result<String> {
        let config = self.daemon.path("crictl.yaml");
        fs::write(&config, "")?;
        let program = &self.tools.crictl;
        let (program, config, socket) = (program.display(), config.display(), self.daemon.socket());
        let endpoint = format!("unix://{}", socket.display());
        Ok(format!("{program} --config {config} --runtime-endpoint {endpoint} --image-endpoint {endpoint} {words}"))
    }

    fn end(self) -> Result<()> {
        self.client.remove(&self.pod)?;
        self.before.expect_same(&Snapshot::take(&self.daemon)?)
    }

    /// The processes of a container.
    fn processes(&self, id: &str) -> Result<String> {
        let listed = self.client.exec(id, &["ps", "-o", "args"])?;
        Ok(String::from_utf8_lossy(&listed.stdout).into_owned())
    }
}

/// A shell command that is spoken with. Killed when it goes.
struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    heard: Arc<Mutex<String>>,
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Talk {
    fn start(mut command: Command) -> Result<Talk> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start a client")?;
        let mut output = child.stdout.take().context("stdout")?;
        let heard = Arc::new(Mutex::new(String::new()));
        let into = heard.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = output.read(&mut buffer) {
                if count == 0 {
                    break;
                }
                into.lock().expect("a result").push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Ok(Talk { input: child.stdin.take(), child, heard })
    }

    /// On a pseudo-terminal of 100x40 that becomes 120x50 when the file is there.
    fn on_terminal(command: &str, resize: &Path) -> Result<Talk> {
        let file = resize.display();
        let line = format!(
            "stty rows 40 cols 100; (until [ -e {file} ]; do sleep 0.05; done; stty rows 50 cols 120 </dev/tty) & exec {command}"
        );
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("SHELL", "/bin/sh");
        Talk::start(script)
    }

    fn say(&mut self, bytes: &str) -> Result<()> {
        let input = self.input.as_mut().context("input is closed")?;
        input.write_all(bytes.as_bytes())?;
        Ok(input.flush()?)
    }

    fn hear(&self, part: &str) -> Result<()> {
        let heard = || self.heard.lock().expect("a result").clone();
        wait_for(part, || Ok(heard().contains(part))).with_context(|| format!("heard: {:?}", heard()))
    }

    fn code(&mut self) -> Result<i32> {
        let mut status = None;
        wait_for("the client's end", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        status.and_then(|status| status.code()).context("the client was killed")
    }
}

#[test]
fn crictl_exec_on_a_terminal_has_its_size_its_signals_and_its_end() -> Result<()> {
    let tools = go::tools()?;
    node::run(move || {
        let ground = ground(tools)?;
        let id = ground.container("shell", &["sleep", "1000"], |_| {})?;
        for transport in ["spdy", "websocket"] {
            let resize = ground.daemon.path(transport);
            let command = ground.crictl(&format!("exec --transport {transport} -it {id} sh"))?;
            let mut talk = Talk::on_terminal(&command, &resize)?;
            talk.say("echo first $(stty size) on $TERM\n")?;
            talk.hear("first 40 100 on xterm")?;
            fs::write(&resize, "")?;
            talk.say("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo resi''zed\n")?;
            talk.hear("resized")?;
            talk.say("echo sleep''ing; sleep 777\n")?;
            talk.hear("sleeping")?;
            wait_for("the sleep", || Ok(ground.processes(&id)?.contains("sleep 777")))?;
            talk.say("\x03")?;
            talk.say("echo interrupted $?\n")?;
            talk.hear("interrupted 130")?;
            talk.say("(exit 3)\n\x04")?;
            ensure!(talk.code()? != 0, "{transport}: the shell's code is lost");
            ensure!(!ground.processes(&id)?.contains("sleep 777"), "{transport}");
        }
        ground.end()
    })
}

#[test]
fn an_exec_whose_caller_goes_away_is_killed_with_all_it_started() -> Result<()> {
    let tools = go::tools()?;
    node::run(move || {
        let ground = ground(tools)?;
        let id = ground.container("main", &["sleep", "1000"], |_| {})?;
        let script = "'setsid sleep 778 & sleep 777'";
        for words in [format!("exec --sync {id} sh -c {script}"), format!("exec {id} sh -c {script}")] {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec {}", ground.crictl(&words)?)]);
            let mut talk = Talk::start(shell)?;
            wait_for("both sleeps", || {
                let found = ground.processes(&id)?;
                Ok(found.contains("sleep 777") && found.contains("sleep 778"))
            })
            .with_context(|| words.clone())?;
            talk.child.kill()?;
            ensure!(talk.child.wait()?.code() != Some(0), "{words}");
            wait_for("the end of the exec", || {
                let found = ground.processes(&id)?;
                Ok(!found.contains("sleep 777") && !found.contains("sleep 778"))
            })
            .with_context(|| words.clone())?;
        }
        ground.end()
    })
}
