//! What an operator asks on the command line: of the daemon over its socket, and of the program alone.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    ground::{Ground, begin},
    node,
    process::Process,
    setup, wait,
};
use windlass_proto::cri;

/// The program without a daemon's directories.
fn program(words: &[&str]) -> Result<Output> {
    Ok(Command::new(setup::programs()?.join("windlass")).args(words).stdin(Stdio::null()).output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The JSON that a command prints.
fn json(daemon: &Daemon, words: &[&str]) -> Result<Value> {
    let words: Vec<&str> = words.iter().copied().chain(["--format", "json"]).collect();
    let said = daemon.windlass(&words)?;
    serde_json::from_str(&said).with_context(|| format!("{words:?}: {said}"))
}

/// What a command that must fail says.
fn refused(daemon: &Daemon, words: &[&str]) -> Result<String> {
    let output = daemon.command(words)?.output()?;
    ensure!(!output.status.success(), "{words:?} succeeded: {}", text(&output.stdout));
    Ok(text(&output.stderr))
}

#[test]
fn the_configuration_is_printed_checked_and_shown() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("config.toml");
    let path = file.to_str().context("a name")?;
    let default = program(&["config", "default"])?;
    ensure!(default.status.success() && text(&default.stdout).contains("# images, layers, records"), "{default:?}");
    fs::write(&file, &default.stdout)?;
    ensure!(program(&["config", "check", path])?.status.success());
    let same = program(&["config", "show", "--config", path, "--changed"])?;
    ensure!(same.status.success() && text(&same.stdout).trim().is_empty(), "{same:?}");

    fs::write(&file, "[cgroup]\nparant = \"/x\"\n[images]\nlayers = \"tar\"\nmax_parallel_layers = 0\n")?;
    let wrong = program(&["config", "check", path])?;
    ensure!(wrong.status.code() == Some(1), "{wrong:?}");
    let said = text(&wrong.stdout);
    for words in
        [["config.toml: line 2: cgroup.parant", "did you mean \"parent\"?"], ["config.toml: line 4: images.layers", "`erofs`"]]
    {
        ensure!(said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in {said}");
    }
    let problems: Value = serde_json::from_slice(&program(&["config", "check", path, "--format", "json"])?.stdout)?;
    ensure!(problems[0]["line"] == 2 && problems[0]["field"] == "cgroup.parant", "{problems}");

    fs::write(&file, "[network]\nmode = \"cni\"\n")?;
    let shown = text(&program(&["config", "show", "--config", path, "--root", "/elsewhere"])?.stdout);
    ensure!(
        shown.contains("root = \"/elsewhere\"") && shown.contains("mode = \"cni\"") && shown.contains("[streaming]"),
        "{shown}"
    );
    let changed = text(&program(&["config", "show", "--config", path, "--root", "/elsewhere", "--changed"])?.stdout);
    ensure!(changed.trim() == "root = \"/elsewhere\"\n\n[network]\nmode = \"cni\"", "{changed}");
    let none = program(&["config", "check", "/nonexistent/config.toml"])?;
    ensure!(!none.status.success() && text(&none.stderr).contains("/nonexistent/config.toml"), "{none:?}");
    Ok(())
}

#[test]
fn completions_complete_and_every_command_has_a_page() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = program(&["completions", shell])?;
        ensure!(script.status.success() && text(&script.stdout).contains("doctor"), "{shell}");
    }
    let script = "source <(\"$0\" completions bash); COMP_WORDS=(windlass image pru); COMP_CWORD=2; \
                  _windlass windlass pru image; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    let completed = node::succeed("complete", bash.args(["-c", script]).arg(setup::programs()?.join("windlass")))?;
    ensure!(completed.trim() == "prune", "{completed:?}");

    let directory = tempfile::tempdir()?;
    ensure!(program(&["manual", directory.path().to_str().context("a name")?])?.status.success());
    let help = text(&program(&["--help"])?.stdout);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let named: Vec<&str> = commands
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    ensure!(named.len() >= 11 && named.contains(&"inspect"), "{help}");
    for name in named.iter().filter(|name| **name != "help") {
        let page = fs::read_to_string(directory.path().join(format!("windlass-{name}.1")))
            .with_context(|| format!("a page of {name}"))?;
        ensure!(page.contains(".SH DESCRIPTION") && page.contains("\\-\\-"), "{name}: {page}");
    }
    ensure!(!directory.path().join("windlass-manual.1").exists(), "a page of a hidden command");
    Ok(())
}

/// A pod with a container that runs and one that has ended.
fn ground() -> Result<(Ground, String, String)> {
    let (daemon, client, before) = begin()?;
    let mut config = pod(&daemon.path("logs"));
    config.labels.insert("app".into(), "web".into());
    let id = client.run(&config)?;
    let ground = Ground { daemon, client, config, pod: id, before };
    let script =
        "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three; while sleep 0.1; do test -e /go && echo four && exit 5; done";
    let main = ground.start("main", &["sh", "-c", script], |_| {})?;
    let done = ground.start("done", &["sh", "-c", "echo bye; exit 3"], |_| {})?;
    wait::until("the end of a container", || {
        Ok((ground.client.container(&done)?.state() == cri::ContainerState::ContainerExited).then_some(()))
    })?;
    wait::until("the log", || Ok(ground.log("main").contains("three").then_some(())))?;
    Ok((ground, main, done))
}

#[test]
fn pods_and_containers_are_listed_looked_into_and_followed() -> Result<()> {
    node::run(|| {
        let (ground, main, done) = ground()?;
        let meta = ground.config.metadata.clone().context("metadata")?;
        let name = format!("{}/{}", meta.namespace, meta.name);
        status(&ground)?;
        lists(&ground, &name, &main)?;
        details(&ground, &name, &main, &done)?;
        names(&ground, &name, &main)?;
        executes(&ground, &name, &main)?;
        strange(&ground)?;
        unread(&ground, &main)?;
        logs(&ground, &name, &main)?;
        ground.end()
    })
}

fn status(ground: &Ground) -> Result<()> {
    let status = json(&ground.daemon, &["status"])?;
    ensure!(status["pid"].as_u64() == ground.daemon.pid().map(u64::from) && status["pods"]["ready"] == 1, "{status}");
    ensure!(
        status["containers"]["running"] == 1 && status["containers"]["all"] == 2 && status["monitors"]["count"] == 1,
        "{status}"
    );
    ensure!(status["memoryBytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{status}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    ensure!(status["startedAt"].as_u64().is_some_and(|at| now - at < 120), "{status}");
    let said = ground.daemon.windlass(&["status"])?;
    for word in [
        env!("CARGO_PKG_VERSION"),
        "1 ready of 1",
        "1 running of 2",
        "built-in bridge, 10.57.0.0/16",
        "network up",
        "streaming    http://127.0.0.1:",
    ] {
        ensure!(said.contains(word), "{word:?} in {said}");
    }
    Ok(())
}

fn lists(ground: &Ground, name: &str, main: &str) -> Result<()> {
    let pods = json(&ground.daemon, &["ps"])?;
    let one = &pods[0];
    ensure!(
        one["id"] == ground.pod.as_str()
            && one["state"] == "Ready"
            && one["containers"].as_array().is_some_and(|all| all.len() == 2),
        "{pods}"
    );
    ensure!(one["monitor_pid"].as_i64() == ground.daemon.monitors().first().map(|pid| i64::from(*pid)), "{pods}");
    ensure!(
        one["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0)
            && one["addresses"][0].as_str().is_some_and(|ip| ip.starts_with("10.57.")),
        "{pods}"
    );
    let said = ground.daemon.windlass(&["ps"])?;
    ensure!(
        said.lines().count() == 4 && said.contains("Exited 3 Error") && said.contains(&main[..12]) && !said.contains(main),
        "{said}"
    );
    ensure!(ground.daemon.windlass(&["ps", "--no-trunc"])?.contains(main));
    let (namespace, pod) = name.split_once('/').context("a name")?;
    let count = |words: &[&str]| -> Result<usize> {
        Ok(json(&ground.daemon, &[&["ps"], words].concat())?.as_array().map_or(0, Vec::len))
    };
    for (words, expected) in [
        (&["-l", "app=web"][..], 1),
        (&["-l", "app=other"], 0),
        (&["-n", namespace], 1),
        (&["-n", "no-such"], 0),
        (&["--name", pod], 1),
        (&["--running"], 1),
        (&[&main[..8]], 1),
        (&["ffffffffffffffff"], 0),
    ] {
        ensure!(count(words)? == expected, "{words:?}");
    }
    ensure!(ground.daemon.windlass(&["pods", "-q"])?.trim() == ground.pod);
    ensure!(refused(&ground.daemon, &["ps", "-l", "app"])?.contains("\"app\" is not KEY=VALUE"));
    let stats = json(&ground.daemon, &["stats"])?;
    let of = |container: &str| stats.as_array().and_then(|all| all.iter().find(|one| one["container"] == container)).cloned();
    let (whole, main) = (of("").context("the pod")?, of("main").context("the container")?);
    ensure!(
        whole["cpu_millicores"].is_u64()
            && whole["pod"] == name
            && main["memory_working_set_bytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{stats}"
    );
    ensure!(
        ground.daemon.windlass(&["stats", name])?.lines().count() >= 3
            && ground.daemon.windlass(&["stats", "zz"])?.lines().count() == 1
    );
    Ok(())
}

fn details(ground: &Ground, name: &str, main: &str, done: &str) -> Result<()> {
    let found = json(&ground.daemon, &["inspect", &main[..12]])?;
    let bundle = ground.daemon.root().join("containers").join(main);
    ensure!(
        found["kind"] == "container" && found["name"] == format!("{name}/main") && found["pod"] == ground.pod.as_str(),
        "{found}"
    );
    ensure!(found["bundle"].as_str().map(Path::new) == Some(bundle.as_path()) && bundle.join("config.json").exists(), "{found}");
    let cgroup = found["cgroup"].as_str().context("its cgroup")?;
    ensure!(Path::new(cgroup).is_dir(), "{cgroup}");
    let pid = found["process"]["pid"].as_i64().context("its process")?;
    ensure!(fs::read_to_string(format!("{cgroup}/cgroup.procs"))?.lines().any(|line| line == pid.to_string()), "{found}");
    ensure!(found["namespaces"]["net"].as_str().is_some_and(|net| !net.contains("host")), "{found}");
    ensure!(
        found["mounts"]
            .as_array()
            .is_some_and(|mounts| mounts.iter().any(|mount| mount["at"] == "/" && mount["type"] == "overlay")),
        "{found}"
    );
    let layer = found["root"]["layers"][0].as_str().context("a layer")?;
    ensure!(Path::new(layer).exists(), "{layer}");
    let ended = json(&ground.daemon, &["inspect", done])?;
    ensure!(ended["exit"]["code"] == 3 && ended["exit"]["reason"] == "Error" && ended["process"].is_null(), "{ended}");
    let found = json(&ground.daemon, &["inspect", name])?;
    ensure!(found["kind"] == "pod" && found["id"] == ground.pod.as_str() && found["labels"]["app"] == "web", "{found}");
    ensure!(
        found["monitor"]["process"]["command"].as_str().is_some_and(|command| command.starts_with("windlass-monitor --dir")),
        "{found}"
    );
    let said = ground.daemon.windlass(&["inspect", name])?;
    ensure!(said.contains("kind: pod") && said.contains("name=done") && said.contains("limits:"), "{said}");
    Ok(())
}

/// Words that mean several things, or none; and a root that is not the daemon's.
fn names(ground: &Ground, name: &str, main: &str) -> Result<()> {
    let mut elsewhere = Command::new(setup::programs()?.join("windlass"));
    elsewhere.args(["ps", "--root", "/no/such/root", "--socket"]).arg(ground.daemon.socket());
    let output = elsewhere.output()?;
    ensure!(!output.status.success() && text(&output.stderr).contains("not \"/no/such/root\""), "{output:?}");
    let said = refused(&ground.daemon, &["logs", name])?;
    ensure!(said.contains(&format!("{name}/done, {name}/main")), "{said}");
    let said = refused(&ground.daemon, &["inspect", "no-such-pod"])?;
    ensure!(said.contains("no-such-pod") && said.contains("windlass ps"), "{said}");
    // More pods than digits: two ids begin alike.
    let mut others = Vec::new();
    let mut ids = vec![ground.pod.clone(), main.to_owned()];
    let shared = loop {
        let alike = ids.iter().find(|id| ids.iter().filter(|other| other[..1] == id[..1]).count() > 1);
        if let Some(id) = alike {
            break id[..1].to_owned();
        }
        let id = ground.client.run(&windlass_integration::client::host_network(pod(&ground.daemon.path("logs"))))?;
        ids.push(id.clone());
        others.push(id);
    };
    let said = refused(&ground.daemon, &["inspect", &shared])?;
    ensure!(said.contains("any of these") && said.lines().count() >= 3, "{said}");
    others.iter().try_for_each(|id| ground.client.remove(id).map_err(anyhow::Error::from))
}

fn executes(ground: &Ground, name: &str, main: &str) -> Result<()> {
    let container = format!("{name}/main");
    let mut command = ground.daemon.command(&["exec", "-i", &container, "--", "sh", "-c", "cat; echo err >&2; exit 9"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let input = "x".repeat(200_000);
    child.stdin.take().context("stdin")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(9), "{output:?}");
    ensure!(
        text(&output.stdout) == input && text(&output.stderr) == "err\n",
        "{} bytes, {:?}",
        output.stdout.len(),
        text(&output.stderr)
    );
    much(ground, &container)?;
    ensure!(ground.daemon.windlass(&["exec", &main[..10], "--", "echo", "--flag"])? == "--flag\n");
    let said = refused(&ground.daemon, &["exec", &container, "--", "/no/such"])?;
    ensure!(said.contains("/no/such"), "{said}");
    let said = refused(&ground.daemon, &["exec", "-t", &container, "--", "true"])?;
    ensure!(said.contains("no terminal"), "{said}");
    // A terminal of its own, by script(1): what is typed is echoed, and stty has its size to print once the client has told it; before,
    // BusyBox's prints nothing and succeeds.
    let words = ground.daemon.command(&[
        "exec",
        "-it",
        &container,
        "--",
        "sh",
        "-c",
        "test -t 0 && until stty size 2>/dev/null | grep .; do sleep 0.05; done; read line; echo got $line",
    ])?;
    let quoted: Vec<String> = std::iter::once(words.get_program())
        .chain(words.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let mut script = Command::new("script");
    script.args(["-qec", &format!("stty rows 33 cols 77; {}", quoted.join(" ")), "/dev/null"]);
    let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("stdout")?);
    let mut first = String::new();
    output.read_line(&mut first)?;
    ensure!(first.trim() == "33 77", "{first:?}");
    child.stdin.take().context("stdin")?.write_all(b"typed\r")?;
    let rest: Vec<String> = output.lines().map_while(std::result::Result::ok).collect();
    ensure!(rest.iter().any(|line| line.trim() == "got typed"), "{rest:?}");
    ensure!(child.wait()?.success());
    Ok(())
}

/// Much goes in and comes back, with a reader that begins late: neither direction waits for the other.
fn much(ground: &Ground, container: &str) -> Result<()> {
    const BLOCKS: usize = 256;
    let mut command = ground.daemon.command(&["exec", "-i", container, "--", "cat"])?;
    let mut child = Process::from(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let (mut input, mut output) = (child.stdin.take().context("stdin")?, child.stdout.take().context("stdout")?);
    let (sender, begun) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || -> std::io::Result<()> {
        for number in 0..BLOCKS {
            input.write_all(&[b'a' + (number % 26) as u8; 128 << 10])?;
            let _ = sender.send(());
        }
        Ok(())
    });
    begun.recv()?;
    let mut back = Vec::new();
    std::io::Read::read_to_end(&mut output, &mut back)?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer"))??;
    ensure!(back.len() == BLOCKS * (128 << 10) && child.wait()?.success(), "{} bytes", back.len());
    Ok(())
}

/// A program whose name is no text and would clear the terminal.
fn strange(ground: &Ground) -> Result<()> {
    let script = "p=$(printf '/busybox\\377\\033[2J'); cp /bin/busybox \"$p\"; exec \"$p\" sleep 1000";
    let id = ground.start("strange", &["sh", "-c", script], |_| {})?;
    let found = wait::until("its program", || {
        let found = json(&ground.daemon, &["inspect", &id])?;
        Ok(found["process"]["command"].as_str().is_some_and(|command| command.ends_with("sleep 1000")).then_some(found))
    })?;
    ensure!(found["process"]["program"].as_str().is_some_and(|path| path.contains("busybox\u{fffd}\x1b")), "{found}");
    ensure!(found["process"]["State"].is_string() && found["processes"][0]["state"] == "S", "{found}");
    let said = ground.daemon.windlass(&["inspect", &id])?;
    ensure!(!said.contains('\x1b') && said.contains("\\u{1b}[2J"), "{said}");
    ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
    Ok(())
}

/// What goes on until interrupted ends when nobody reads it any more, and has not failed.
fn unread(ground: &Ground, main: &str) -> Result<()> {
    for words in [&["events"][..], &["stats", "--watch"], &["logs", "--follow", main]] {
        let mut command = ground.daemon.command(words)?;
        let mut child = Process::from(command.stdout(Stdio::piped()).spawn()?);
        drop(child.stdout.take());
        let status = wait::until("the end of a command", || Ok(child.try_wait()?))?;
        ensure!(status.success(), "{words:?}: {status}");
    }
    Ok(())
}

fn logs(ground: &Ground, name: &str, main: &str) -> Result<()> {
    let container = format!("{name}/main");
    let output = ground.daemon.command(&["logs", &container])?.output()?;
    ensure!(text(&output.stdout) == "one\nthree\n" && text(&output.stderr) == "two\n", "{output:?}");
    ensure!(ground.daemon.windlass(&["logs", main, "--tail", "1"])? == "three\n");
    ensure!(ground.daemon.windlass(&["logs", main, "--since", "1h", "-t"])?.lines().all(|line| line.starts_with("20")));
    ensure!(ground.daemon.windlass(&["logs", main, "--since", "2999-01-01T00:00:00Z"])?.is_empty());
    ensure!(refused(&ground.daemon, &["logs", main, "--since", "soon"])?.contains("10m"));
    // Followed to its end, and with the events of it.
    let mut events = ground.daemon.command(&["events"])?;
    let mut events = Process::from(events.stdout(Stdio::piped()).spawn()?);
    let lines = BufReader::new(events.stdout.take().context("stdout")?).lines();
    let (sender, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(std::result::Result::ok).try_for_each(|line| sender.send(line)));
    let mut follow = ground.daemon.command(&["logs", "-f", "--tail", "1", &container])?;
    let mut follow = Process::from(follow.stdout(Stdio::piped()).spawn()?);
    let mut followed = BufReader::new(follow.stdout.take().context("stdout")?).lines();
    ensure!(followed.next().context("a line")?? == "three");
    wait::until("a follower of events", || {
        let other = ground.client.create(&ground.pod, &ground.config, &self::container(&ground.config, "other", &["true"]))?;
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: other })?;
        Ok(seen.recv_timeout(Duration::from_millis(200)).ok())
    })?;
    ground.client.shell(main, "touch /go")?;
    ensure!(followed.next().context("a line")?? == "four" && followed.next().is_none());
    ensure!(follow.wait()?.success());
    let stopped = format!("stopped container {container}");
    let line = wait::until("the event of its end", || {
        Ok(seen.recv_timeout(Duration::from_secs(1)).ok().filter(|line| line.contains(&stopped)))
    })?;
    ensure!(line.contains("code 5 Error"), "{line}");
    events.kill()?;
    events.wait()?;
    Ok(())
}

#[test]
fn without_a_daemon_it_is_said_what_to_do() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        for words in
            [&["status"][..], &["ps"], &["inspect", "x"], &["logs", "x"], &["exec", "x", "--", "true"], &["events"], &["stats"]]
        {
            let said = refused(&daemon, words)?;
            ensure!(said.contains("no daemon answers at") && said.contains("systemctl start windlass"), "{words:?}: {said}");
        }
        daemon.serve()?;
        let mut events = daemon.command(&["events"])?;
        let events = events.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        // Followers are told of the daemon's end; one that has not come so far is refused.
        std::thread::sleep(Duration::from_millis(500));
        daemon.stop()?;
        let output = events.wait_with_output()?;
        ensure!(!output.status.success() && text(&output.stderr).contains("the daemon has ended"), "{output:?}");
        Ok(())
    })
}

#[test]
fn a_command_is_executed_over_tls_of_the_configured_certificate_alone() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::prepare(&[])?;
        let (certificate, key) = (daemon.path("certificate.pem"), daemon.path("key.pem"));
        let signed = || -> Result<(String, String)> {
            let key = rcgen::KeyPair::generate()?;
            let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])?.self_signed(&key)?;
            Ok((certificate.pem(), key.serialize_pem()))
        };
        let pair = signed()?;
        fs::write(&certificate, &pair.0)?;
        fs::write(&key, &pair.1)?;
        daemon.configure(&format!("[streaming]\ntls_certificate = {certificate:?}\ntls_key = {key:?}\n"))?;
        let ground = Ground::on(daemon.with_images()?)?;
        let main = ground.start("main", &["sleep", "1000"], |_| {})?;
        ensure!(ground.daemon.windlass(&["exec", &main, "--", "echo", "safe"])? == "safe\n");
        fs::write(&certificate, signed()?.0)?;
        let said = refused(&ground.daemon, &["exec", &main, "--", "echo", "unsafe"])?;
        ensure!(said.contains("connect to the streaming server at https://127.0.0.1:"), "{said}");
        ground.end()
    })
}

/// What a daemon says that does not start with these flags, and those of its directories that are not among them.
fn start_fails(daemon: &Daemon, flags: &[&str]) -> Result<String> {
    let mut command = Command::new(setup::programs()?.join("windlass"));
    command.arg("serve").args(flags);
    for (flag, path) in [("--config", daemon.path("config.toml")), ("--root", daemon.root()), ("--state", daemon.state())] {
        if !flags.contains(&flag) {
            command.arg(flag).arg(path);
        }
    }
    let mut child = Process::from(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().context("stderr")?, &mut said)?;
    ensure!(child.wait()?.code() == Some(1), "{said}");
    Ok(said)
}

#[test]
fn a_daemon_that_cannot_start_says_what_to_do() -> Result<()> {
    node::run(|| {
        let check = |text: &str, extra: &[&str], words: &[&str]| -> Result<()> {
            let daemon = Daemon::prepare(&[])?;
            daemon.configure(text)?;
            let said = start_fails(&daemon, extra)?;
            for word in words {
                ensure!(said.contains(word), "{word:?} in {said}");
            }
            ensure!(!daemon.socket().exists(), "a socket is left");
            let rules = node::output_of("nft", &["list", "ruleset"])?;
            ensure!(rules.is_empty() && !node::output_of("ip", &["link"])?.contains("wlt"), "left behind: {rules}");
            Ok(())
        };
        check("[imagse]\n", &[], &["line 8: imagse", "did you mean \"images\"?", "windlass config default"])?;
        check("[streaming]\naddress = \"192.0.2.1:80\"\n", &[], &["streaming.address 192.0.2.1:80", "an address of this node"])?;
        check("[metrics]\naddress = \"192.0.2.1:80\"\n", &[], &["metrics.address", "192.0.2.1:80", "a free port"])?;
        check("[monitor]\npath = \"/no/such\"\n", &[], &["/no/such", "install the package again, or set monitor.path"])?;
        check("[handlers.runc]\npath = \"runc\"\n", &[], &["handlers.runc.path", "absolute"])?;
        check("", &["--root", "/proc/windlass"], &["/proc/windlass", "root", "a disk of this node"])?;
        check("", &["--socket", "relative"], &["socket: \"relative\" is not an absolute path"])?;
        check(
            "[streaming]\ntls_certificate = \"/no/cert\"\ntls_key = \"/no/key\"\n",
            &[],
            &["streaming.tls_certificate", "/no/cert"],
        )?;
        if !Path::new("/run/systemd/system").exists() {
            let file = Daemon::prepare(&[])?;
            let config = fs::read_to_string(file.path("config.toml"))?.replace("[cgroup]\n", "[cgroup]\ndriver = \"systemd\"\n");
            fs::write(file.path("config.toml"), config)?;
            let said = start_fails(&file, &[])?;
            ensure!(said.contains("cgroup.driver = \"systemd\"") && said.contains("\"auto\""), "{said}");
        }
        Ok(())
    })
}

#[test]
fn a_second_daemon_takes_neither_the_socket_nor_the_root() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let said = start_fails(&daemon, &["--socket", "/tmp/windlass-second.sock"])?;
        ensure!(said.contains("in use by another windlass") && said.contains("--root"), "{said}");
        let other = Daemon::prepare(&[])?;
        let socket = daemon.socket();
        let said = start_fails(&other, &["--socket", socket.to_str().context("a path")?])?;
        ensure!(said.contains("is served by another process") && said.contains("--socket"), "{said}");
        ensure!(client.version(cri::VersionRequest::default())?.runtime_name == "windlass");
        Client::connect(&daemon)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn somebody_who_is_not_root_is_told_so() -> Result<()> {
    use std::os::unix::process::CommandExt;
    let program = setup::programs()?.join("windlass");
    let output = Command::new(program).arg("serve").uid(65_534).gid(65_534).output()?;
    ensure!(output.status.code() == Some(1) && text(&output.stderr).contains("needs root"), "{output:?}");
    Ok(())
}
