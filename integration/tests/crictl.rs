//! The main job with the real `crictl`: an image, a pod, a container, its log, an exec, its end. Needs `go` and root.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use windlass_integration::{daemon::Daemon, go, node, standin::Images, standin_registry::StandinRegistry};

const IMAGE: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// Longest wait for a line of a container's log.
const LOG_LIMIT: Duration = Duration::from_secs(60);

struct Crictl {
    program: PathBuf,
    endpoint: String,
    /// An empty configuration: the one of the machine has no say.
    config: PathBuf,
}

impl Crictl {
    fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config);
        command.args(["--runtime-endpoint", &self.endpoint, "--image-endpoint", &self.endpoint]).args(words);
        Ok(node::succeed(&format!("crictl {}", words.join(" ")), &mut command)?.trim().to_owned())
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self.run(words)?;
        serde_json::from_str(&text).with_context(|| format!("crictl {}: {text}", words.join(" ")))
    }

    /// Runs a command whose output must contain `part`.
    fn shows(&self, words: &[&str], part: &str) -> Result<()> {
        let text = self.run(words)?;
        ensure!(text.contains(part), "crictl {} lacks {part:?}:\n{text}", words.join(" "));
        Ok(())
    }
}

fn write(path: &Path, value: &Value) -> Result<String> {
    fs::write(path, value.to_string()).with_context(|| format!("write {}", path.display()))?;
    Ok(path.to_string_lossy().into_owned())
}

fn session() -> Result<()> {
    let tools = go::tools()?;
    let scratch = tempfile::tempdir()?;
    let registry = StandinRegistry::start(Images::build()?)?;
    let mirrors = scratch.path().join("certs.d");
    registry.write_mirrors(&mirrors)?;
    let mut daemon = Daemon::prepare(&["--registry-config-dir", &mirrors.to_string_lossy()])?;
    daemon.serve()?;
    let config = scratch.path().join("crictl.yaml");
    fs::write(&config, "")?;
    let crictl = Crictl { program: tools.crictl, endpoint: format!("unix://{}", daemon.socket().display()), config };

    crictl.shows(&["version"], "windlass")?;
    ensure!(crictl.json(&["info"])?["status"]["conditions"][0]["status"] == true, "the runtime is not ready");
    crictl.run(&["pull", IMAGE])?;
    crictl.shows(&["images"], "e2e-test-images/busybox")?;
    ensure!(crictl.json(&["inspecti", IMAGE])?["status"]["repoTags"][0] == IMAGE, "inspecti names the tag");

    let logs = scratch.path().join("logs");
    fs::create_dir_all(&logs)?;
    let pod = json!({ "metadata": { "name": "session", "namespace": "default", "uid": "u1", "attempt": 1 }, "log_directory": logs, "linux": {} });
    let pod = write(&scratch.path().join("pod.json"), &pod)?;
    let command = ["sh", "-c", "echo a line; trap 'exit 3' TERM; while :; do sleep 0.1; done"];
    let container = json!({
        "metadata": { "name": "worker" }, "image": { "image": IMAGE }, "command": command, "log_path": "worker.log", "linux": {},
    });
    let container = write(&scratch.path().join("container.json"), &container)?;
    let pod_id = crictl.run(&["runp", &pod])?;
    let id = crictl.run(&["create", &pod_id, &container, &pod])?;
    crictl.run(&["start", &id])?;
    in_its_life(&crictl, &pod_id, &id)?;
    in_its_end(&crictl, &pod_id, &id)
}

fn in_its_life(crictl: &Crictl, pod: &str, id: &str) -> Result<()> {
    crictl.shows(&["ps"], "worker")?;
    crictl.shows(&["pods"], "session")?;
    let deadline = Instant::now() + LOG_LIMIT;
    while !crictl.run(&["logs", id])?.contains("a line") {
        ensure!(Instant::now() < deadline, "the log has no line");
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(crictl.run(&["exec", "-s", id, "echo", "from inside"])? == "from inside", "the output of exec");
    ensure!(crictl.run(&["exec", "-s", id, "false"]).is_err(), "the exit code of exec");
    ensure!(crictl.json(&["inspect", id])?["status"]["state"] == "CONTAINER_RUNNING", "inspect says that it runs");
    let address = crictl.json(&["inspectp", pod])?["status"]["network"]["ip"].clone();
    ensure!(address.as_str().is_some_and(|text| text.parse::<std::net::IpAddr>().is_ok()), "the pod's address is {address}");
    crictl.run(&["update", "--cpu-share", "512", id]).map(drop)
}

fn in_its_end(crictl: &Crictl, pod: &str, id: &str) -> Result<()> {
    crictl.run(&["stop", "--timeout", "5", id])?;
    let status = crictl.json(&["inspect", id])?;
    ensure!(
        status["status"]["state"] == "CONTAINER_EXITED" && status["status"]["exitCode"] == 3,
        "after stop: {}",
        status["status"]
    );
    crictl.run(&["rm", id])?;
    crictl.run(&["stopp", pod])?;
    ensure!(crictl.json(&["inspectp", pod])?["status"]["state"] == "SANDBOX_NOTREADY", "after stopp");
    crictl.run(&["rmp", pod])?;
    ensure!(crictl.run(&["ps", "-a", "-q"])?.is_empty() && crictl.run(&["pods", "-q"])?.is_empty(), "something is left");
    crictl.run(&["rmi", IMAGE])?;
    ensure!(crictl.run(&["images", "-q"])?.is_empty(), "the image is left");
    Ok(())
}

#[test]
fn a_session_of_crictl() {
    // Built before: a node has no network.
    go::tools().expect("crictl");
    node::run(session).expect("a session of crictl");
}
