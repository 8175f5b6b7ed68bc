//! Sessions with the real `crictl`: a shell on a terminal, execs whose caller goes away, attached clients, forwarded ports.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use windlass_integration::{
    client::Client,
    daemon::{Daemon, command_lines},
    go,
    ground::Ground,
    image, node,
    process::Process,
    wait::until_true,
};
use windlass_proto::cri;

const LIMIT: Duration = Duration::from_secs(60);

struct Sessions {
    tools: go::Tools,
    ground: Ground,
}

/// The tools are built before the node is entered, which has no network to build them with.
fn on_a_node(test: impl FnOnce(&mut Sessions) -> Result<()> + Send + 'static) -> Result<()> {
    let tools = go::tools()?;
    node::run(move || {
        let layers = image::layers()?.to_vec();
        let daemon = Daemon::start_with(vec![(image::BUSYBOX, layers, serde_json::json!({}))])?;
        let mut sessions = Sessions { tools, ground: Ground::on(daemon)? };
        test(&mut sessions)?;
        sessions.ground.end()
    })
}

impl Sessions {
    /// The words of a crictl that speaks to this daemon and reads no configuration of the machine.
    fn crictl(&self, words: &str) -> Result<String> {
        let config = self.ground.daemon.path("crictl.yaml");
        fs::write(&config, "")?;
        let program = &self.tools.crictl;
        let (program, config, socket) = (program.display(), config.display(), self.ground.daemon.socket());
        let endpoint = format!("unix://{}", socket.display());
        Ok(format!("{program} --config {config} --runtime-endpoint {endpoint} --image-endpoint {endpoint} {words}"))
    }

    /// A container whose input is open.
    fn with_input(&self, name: &str, command: &[&str], change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<String> {
        self.ground.start(name, command, |config| {
            config.stdin = true;
            change(config);
        })
    }

    fn attach(&self, transport: &str, flags: &str, id: &str) -> Result<Talk> {
        Talk::piped(&self.crictl(&format!("attach --transport {transport} {flags} {id}"))?)
    }

    /// Lines of a stream in a container's log.
    fn logged(&self, name: &str, stream: &str) -> Vec<String> {
        let log = self.ground.log(name);
        let lines = log.lines().filter_map(|line| {
            let mut words = line.splitn(4, ' ').skip(1);
            (words.next()? == stream).then(|| words.nth(1).map(str::to_owned))?
        });
        lines.collect()
    }

    /// Waits until so many lines are in it: what another client says before would come between.
    fn has_logged(&self, name: &str, stream: &str, lines: usize) -> Result<()> {
        until_true("what was said is answered", || Ok(self.logged(name, stream).len() >= lines))
            .map(drop)
            .with_context(|| format!("{name}: {:?}", self.logged(name, stream)))
    }

    fn exit_code(&self, id: &str) -> Result<i32> {
        Ok(self.ground.client.exited(id)?.exit_code)
    }

    /// A shell's program ends by Ctrl-C, and the shell goes on.
    fn interrupt(&self, talk: &mut Talk, id: &str) -> Result<()> {
        talk.say("echo sleep''ing; sleep 777\n")?;
        talk.hear("sleeping")?;
        until_true("the sleep", || Ok(self.processes(id)?.contains("sleep 777")))?;
        talk.say("\x03")?;
        talk.say("echo interrupted $?\n")?;
        talk.hear("interrupted 130")
    }

    /// The processes of a container.
    fn processes(&self, id: &str) -> Result<String> {
        self.ground.client.shell(id, "ps -o args")
    }
}

/// A shell command that is spoken with. Killed when it goes.
struct Talk {
    child: Process,
    input: Option<ChildStdin>,
    heard: Arc<Mutex<String>>,
}

impl Talk {
    fn start(mut command: Command) -> Result<Talk> {
        let mut child = Process::from(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start a client")?);
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
        let (file, directory) = (resize.display(), resize.parent().unwrap_or(Path::new("/")).display());
        // Where that never happens, the wait ends with the directory.
        let line = format!(
            "stty rows 40 cols 100; \
             (until [ -e {file} ] || [ ! -d {directory} ]; do sleep 0.05; done; stty rows 50 cols 120 </dev/tty) & exec {command}"
        );
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("SHELL", "/bin/sh");
        Talk::start(script)
    }

    /// Its errors are heard as well.
    fn piped(command: &str) -> Result<Talk> {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec {command} 2>&1")]);
        Talk::start(shell)
    }

    /// Says the words again and again until `part` is heard; how often they were said.
    fn say_until(&mut self, bytes: &str, part: &str) -> Result<usize> {
        let deadline = Instant::now() + LIMIT;
        for count in 1.. {
            self.say(bytes)?;
            let again = Instant::now() + Duration::from_millis(200);
            while Instant::now() < again {
                if self.heard.lock().expect("a result").contains(part) {
                    return Ok(count);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            ensure!(Instant::now() < deadline, "{part} is not heard: {:?}", self.heard.lock().expect("a result"));
        }
        unreachable!("counted without an end")
    }

    fn say(&mut self, bytes: &str) -> Result<()> {
        let input = self.input.as_mut().context("input is closed")?;
        input.write_all(bytes.as_bytes())?;
        Ok(input.flush()?)
    }

    fn hear(&self, part: &str) -> Result<()> {
        let heard = || self.heard.lock().expect("a result").clone();
        until_true(part, || Ok(heard().contains(part))).map(drop).with_context(|| format!("heard: {:?}", heard()))
    }

    /// The terminal gets another size, which the shell sees.
    fn resize(&mut self, switch: &Path) -> Result<()> {
        fs::write(switch, "")?;
        self.say("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo resi''zed\n")?;
        self.hear("resized")
    }

    fn code(&mut self) -> Result<i32> {
        let mut status = None;
        until_true("the client's end", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        status.and_then(|status| status.code()).context("the client was killed")
    }
}

#[test]
fn crictl_exec_on_a_terminal_has_its_size_its_signals_and_its_end() -> Result<()> {
    on_a_node(|sessions| {
        let id = sessions.ground.start("shell", &["sleep", "1000"], |_| {})?;
        for transport in TRANSPORTS {
            let resize = sessions.ground.daemon.path(transport);
            let command = sessions.crictl(&format!("exec --transport {transport} -it {id} sh"))?;
            let mut talk = Talk::on_terminal(&command, &resize)?;
            talk.say("echo first $(until stty size 2>/dev/null | grep .; do sleep 0.02; done) on $TERM\n")?;
            talk.hear("first 40 100 on xterm")?;
            talk.resize(&resize)?;
            sessions.interrupt(&mut talk, &id)?;
            talk.say("(exit 3)\n\x04")?;
            ensure!(talk.code()? != 0, "{transport}: the shell's code is lost");
            ensure!(!sessions.processes(&id)?.contains("sleep 777"), "{transport}");
        }
        Ok(())
    })
}

#[test]
fn an_exec_whose_caller_goes_away_is_killed_with_all_it_started() -> Result<()> {
    on_a_node(|sessions| {
        let id = sessions.ground.start("main", &["sleep", "1000"], |_| {})?;
        let script = "'setsid sleep 778 & sleep 777'";
        for words in [format!("exec --sync {id} sh -c {script}"), format!("exec {id} sh -c {script}")] {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec {}", sessions.crictl(&words)?)]);
            let mut talk = Talk::start(shell)?;
            until_true("both sleeps", || {
                let found = sessions.processes(&id)?;
                Ok(found.contains("sleep 777") && found.contains("sleep 778"))
            })
            .with_context(|| words.clone())?;
            talk.child.kill()?;
            ensure!(talk.child.wait()?.code() != Some(0), "{words}");
            until_true("the end of the exec", || {
                let found = sessions.processes(&id)?;
                Ok(!found.contains("sleep 777") && !found.contains("sleep 778"))
            })
            .with_context(|| words.clone())?;
        }
        Ok(())
    })
}

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Answers each line on both streams until it is told to quit.
const ANSWERS: &str =
    "while read line; do [ \"$line\" = quit ] && exit 5; echo \"got $line\"; echo \"saw $line\" >&2; done; exit 6";

fn several_attached(sessions: &Sessions, transport: &str) -> Result<()> {
    let id = sessions.with_input(transport, &["sh", "-c", ANSWERS], |_| {})?;
    let mut said = Vec::new();
    let mut one = sessions.attach(transport, "-i", &id)?;
    let count = one.say_until("one\n", "saw one")?;
    said.extend(vec!["one"; count]);
    sessions.has_logged(transport, "stderr", said.len())?;
    let mut two = sessions.attach(transport, "-i", &id)?;
    let count = two.say_until("two\n", "saw two")?;
    said.extend(vec!["two"; count]);
    sessions.has_logged(transport, "stderr", said.len())?;
    one.hear("saw two")?;
    // One that only listens.
    let mut three = sessions.attach(transport, "", &id)?;
    while !three.heard.lock().expect("a result").contains("saw three") {
        let count = one.say_until("three\n", "saw three")?;
        said.extend(vec!["three"; count]);
        ensure!(said.len() < 1000, "the third client hears nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    sessions.has_logged(transport, "stderr", said.len())?;
    // What is said last arrives, though its client has gone when it does.
    let four = sessions.crictl(&format!("attach --transport {transport} -i {id}"))?;
    Talk::piped(&format!("printf 'last words\\n' | {four}"))?.code()?;
    said.push("last words");
    for client in [&one, &two, &three] {
        client.hear("got last words")?;
        client.hear("saw last words")?;
    }
    two.child.kill()?;
    two.child.wait()?;
    one.say("after\n")?;
    said.push("after");
    for client in [&one, &three] {
        client.hear("got after")?;
        client.hear("saw after")?;
    }
    one.say("quit\n")?;
    ensure!(one.code()? == 0 && three.code()? == 0, "{transport}: the clients end well");
    ensure!(sessions.exit_code(&id)? == 5);
    for (stream, word) in [("stdout", "got"), ("stderr", "saw")] {
        let logged = sessions.logged(transport, stream);
        let expected: Vec<String> = said.iter().map(|line| format!("{word} {line}")).collect();
        ensure!(logged == expected, "{transport} {stream}: {logged:?} instead of {expected:?}");
    }
    Ok(())
}

#[test]
fn several_clients_are_attached_and_the_log_has_everything() -> Result<()> {
    on_a_node(|sessions| TRANSPORTS.into_iter().try_for_each(|transport| several_attached(sessions, transport)))
}

/// The first client that ends its input, or is cut, ends the program's, whoever else is attached.
fn one_input(sessions: &Sessions, transport: &str, cut: bool) -> Result<()> {
    let name = format!("{transport}-{cut}");
    let id = sessions.with_input(&name, &["sh", "-c", "cat; echo end of input"], |config| config.stdin_once = true)?;
    let mut first = sessions.attach(transport, "-i", &id)?;
    let firsts = first.say_until("first\n", "first")?;
    sessions.has_logged(&name, "stdout", firsts)?;
    let mut second = sessions.attach(transport, "-i", &id)?;
    let seconds = second.say_until("second\n", "second")?;
    sessions.has_logged(&name, "stdout", firsts + seconds)?;
    first.say("the end\n")?;
    second.hear("the end")?;
    if cut {
        first.child.kill()?;
        first.child.wait()?;
    } else {
        drop(first.input.take());
        first.hear("end of input")?;
        ensure!(first.code()? == 0, "{name}");
    }
    second.hear("end of input")?;
    ensure!(second.code()? == 0, "{name}");
    ensure!(sessions.exit_code(&id)? == 0);
    let logged = sessions.logged(&name, "stdout");
    let expected = [vec!["first"; firsts], vec!["second"; seconds], vec!["the end", "end of input"]].concat();
    ensure!(logged == expected, "{name}: {logged:?} instead of {expected:?}");
    Ok(())
}

#[test]
fn an_input_for_one_client_ends_with_it() -> Result<()> {
    on_a_node(|sessions| {
        for transport in TRANSPORTS {
            for cut in [false, true] {
                one_input(sessions, transport, cut).with_context(|| format!("{transport}, cut: {cut}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn a_daemon_killed_in_the_middle_of_sessions_leaves_the_container_as_it_was() -> Result<()> {
    on_a_node(|sessions| {
        let writes = format!("/probe lines 20000 500; {ANSWERS}");
        let writer = sessions.with_input("writer", &["sh", "-c", &writes], |_| {})?;
        let answerer = sessions.with_input("answerer", &["sh", "-c", ANSWERS], |_| {})?;
        let leaf = sessions.ground.daemon.cgroup_directory().join(&answerer);
        let mut reading = sessions.attach("spdy", "", &writer)?;
        let mut talking = sessions.attach("websocket", "-i", &answerer)?;
        let count = talking.say_until("one\n", "saw one")?;
        sessions.has_logged("answerer", "stdout", count)?;
        reading.hear("line ")?;
        let kept = sessions.ground.client.exec(&answerer, &["sh", "-c", "sleep 779 >/dev/null 2>&1 &"])?;
        ensure!(kept.exit_code == 0, "{kept:?}");
        let script = "'setsid sleep 778 & sleep 777'";
        let mut execs = Vec::new();
        for flags in ["--sync", "--transport spdy", "--transport websocket"] {
            execs.push(Talk::piped(&sessions.crictl(&format!("exec {flags} {answerer} sh -c {script}"))?)?);
        }
        let running = |name: &str| command_lines(&leaf).iter().filter(|line| *line == name).count();
        until_true("the execs", || Ok(running("sleep 777") == 3 && running("sleep 778") == 3))?;

        sessions.ground.daemon.kill9()?;
        until_true("the end of the execs", || Ok(running("sleep 777") + running("sleep 778") == 0))?;
        ensure!(running("sleep 779") == 1, "what an exec that had ended left goes on: {:?}", command_lines(&leaf));
        for client in [&mut reading, &mut talking].into_iter().chain(&mut execs) {
            // client-go does not tell over SPDY a cut connection from an end that was well.
            client.code()?;
        }
        sessions.ground.daemon.serve()?;
        sessions.ground.client = Client::connect(&sessions.ground.daemon)?;
        let mut talking = sessions.attach("spdy", "-i", &answerer)?;
        let again = talking.say_until("two\n", "saw two")?;
        let mut reading = sessions.attach("websocket", "-i", &writer)?;
        let last = reading.say_until("three\n", "got three")?;
        reading.say("quit\n")?;
        ensure!(reading.code()? == 0 && sessions.exit_code(&writer)? == 5);
        let lines = (0..20_000).map(|number| format!("line {number}"));
        let expected: Vec<String> = lines.chain(vec!["got three".to_owned(); last]).collect();
        ensure!(sessions.logged("writer", "stdout") == expected, "the log lost lines");
        talking.say("quit\n")?;
        ensure!(talking.code()? == 0 && sessions.exit_code(&answerer)? == 5);
        let expected = [vec!["got one"; count], vec!["got two"; again]].concat();
        ensure!(sessions.logged("answerer", "stdout") == expected, "the log of what was said");
        Ok(())
    })
}

fn attached_terminal(sessions: &Sessions, transport: &str) -> Result<()> {
    let id = sessions.with_input(transport, &["sh"], |config| config.tty = true)?;
    let command = sessions.crictl(&format!("attach --transport {transport} -it {id}"))?;
    let resize = sessions.ground.daemon.path(&format!("attach-{transport}"));
    let mut talk = Talk::on_terminal(&command, &resize)?;
    talk.say("until [ \"$(stty size)\" = '40 100' ]; do sleep 0.05; done; echo si''zed\n")?;
    talk.hear("sized")?;
    let mut other = Talk::on_terminal(&command, &sessions.ground.daemon.path("never"))?;
    other.say_until("echo o''ther\n", "other")?;
    talk.hear("other")?;
    talk.resize(&resize)?;
    other.hear("resized")?;
    sessions.interrupt(&mut talk, &id)?;
    // Ctrl-P Ctrl-Q, by which crictl lets go of a terminal.
    talk.say("\x10\x11")?;
    ensure!(talk.code()? == 0, "{transport}: detached");
    other.say("echo still the''re\n")?;
    other.hear("still there")?;
    let mut third = Talk::on_terminal(&command, &resize)?;
    third.say_until("echo on''ce more\n", "once more")?;
    other.hear("once more")?;
    third.say("exit 3\n")?;
    ensure!(third.code()? == 0 && other.code()? == 0, "{transport}: the clients end well");
    ensure!(sessions.exit_code(&id)? == 3);
    let logged = sessions.logged(transport, "stdout").join("\n");
    for part in ["sized", "other", "resized", "interrupted 130", "still there", "once more"] {
        ensure!(logged.contains(part), "{transport}: {part} is not in the log: {logged}");
    }
    Ok(())
}

#[test]
fn a_terminal_is_attached_resized_let_go_and_taken_up_again() -> Result<()> {
    on_a_node(|sessions| TRANSPORTS.into_iter().try_for_each(|transport| attached_terminal(sessions, transport)))
}

/// Sends bytes, ends that half, and gets them back.
fn exchange(port: u16, seed: u8) -> Result<()> {
    let sent: Vec<u8> = (0u32..1 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect();
    let mut connection = TcpStream::connect(("127.0.0.1", port)).context("connect to crictl")?;
    connection.set_read_timeout(Some(LIMIT))?;
    let mut up = connection.try_clone()?;
    let bytes = sent.clone();
    let sending = std::thread::spawn(move || up.write_all(&bytes).and_then(|()| up.shutdown(Shutdown::Write)));
    let mut back = Vec::new();
    connection.read_to_end(&mut back).context("read what comes back")?;
    sending.join().expect("no panic")?;
    ensure!(back == sent, "{} of {} bytes came back, or others", back.len(), sent.len());
    Ok(())
}

#[test]
fn crictl_forwards_ports_of_a_pod() -> Result<()> {
    on_a_node(|sessions| {
        sessions.ground.start("server", &["/probe", "echo", "80"], |_| {})?;
        until_true("the server", || Ok(sessions.logged("server", "stdout") == ["listening"]))?;
        for transport in TRANSPORTS {
            let pod = &sessions.ground.pod;
            let mut talk = Talk::piped(&sessions.crictl(&format!("port-forward --transport {transport} {pod} 0:80 0:81"))?)?;
            let local = |remote: u16| -> Result<u16> {
                let end = format!(" -> {remote}\n");
                talk.hear(&end)?;
                let heard = talk.heard.lock().expect("a result").clone();
                let line =
                    heard.lines().find(|line| line.starts_with("Forwarding from 127.0.0.1:") && line.ends_with(end.trim_end()));
                let port = line.and_then(|line| line.split([':', ' ']).nth(3)).context("a local port")?;
                Ok(port.parse()?)
            };
            let (served, closed) = (local(80)?, local(81)?);
            std::thread::scope(|scope| {
                let both = [1, 2].map(|seed| scope.spawn(move || exchange(served, seed)));
                both.into_iter().try_for_each(|one| one.join().expect("no panic"))
            })
            .with_context(|| transport.to_owned())?;
            let mut refused = TcpStream::connect(("127.0.0.1", closed))?;
            refused.set_read_timeout(Some(LIMIT))?;
            // Ended or reset, without a byte.
            ensure!(refused.read(&mut [0; 16]).unwrap_or(0) == 0, "{transport}: nobody listens there");
            talk.hear("refused")?;
            // client-go ends with the first connection that fails.
            ensure!(talk.code()? == 1, "{transport}: {:?}", talk.heard.lock().expect("a result"));
        }
        Ok(())
    })
}
