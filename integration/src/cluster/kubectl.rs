//! kubectl, as a person would use it.

use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Longest wait for what a test wants to be so.
const LIMIT_SECONDS: u32 = 90;

fn timeout() -> String {
    format!("--timeout={}s", LIMIT_SECONDS * wait::factor())
}

/// The program with its cluster and a namespace there.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    pub(super) kubeconfig: PathBuf,
    /// Where it keeps what the cluster can do.
    cache: PathBuf,
    namespace: String,
}

impl Kubectl {
    /// For a cluster that was made elsewhere; keeps what it has learnt of it in `cache`.
    pub fn new(program: &Path, kubeconfig: &Path, cache: &Path) -> Kubectl {
        let (program, kubeconfig, cache) = (program.to_owned(), kubeconfig.to_owned(), cache.to_owned());
        Kubectl { program, kubeconfig, cache, namespace: "default".into() }
    }

    /// The same cluster, another namespace.
    pub fn within(&self, namespace: &str) -> Kubectl {
        Kubectl { namespace: namespace.to_owned(), ..self.clone() }
    }

    /// The namespace that it works in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The program itself.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A command, to be started by the caller.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--namespace", &self.namespace]).args(words);
        command.env("KUBECACHEDIR", &self.cache).stdin(Stdio::null());
        command
    }

    /// What a command that must succeed prints.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.feed(words, b"")
    }

    /// The same with an input.
    pub fn feed(&self, words: &[&str], input: &[u8]) -> Result<String> {
        let output = self.outcome(words, input)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "kubectl {}: {}\n{stdout}{stderr}", words.join(" "), output.status);
        Ok(stdout)
    }

    /// How a command ends, whatever its end.
    pub fn outcome(&self, words: &[&str], input: &[u8]) -> Result<Output> {
        let mut command = self.command(words);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("run kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl's input")?;
        std::thread::scope(|scope| {
            // It may end before it has read everything.
            scope.spawn(move || stdin.write_all(input));
            child.wait_with_output().context("wait for kubectl")
        })
    }

    /// Creates an object, or several as a list.
    pub fn create(&self, object: &Value) -> Result<()> {
        self.feed(&["create", "-f", "-"], object.to_string().as_bytes()).map(drop)
    }

    /// An object, as `pod/web`.
    pub fn get(&self, what: &str) -> Result<Value> {
        serde_json::from_str(&self.run(&["get", what, "-o", "json"])?).with_context(|| format!("read {what}"))
    }

    /// The objects of a kind, with the words that select them.
    pub fn list(&self, words: &[&str]) -> Result<Vec<Value>> {
        let words: Vec<&str> = [&["get"], words, &["-o", "json"]].concat();
        let list: Value = serde_json::from_str(&self.run(&words)?).context("read a list")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits, at most 90 s, until `condition` holds, as `condition=Ready` or `jsonpath=...`; an error says how the object stands.
    pub fn wait(&self, what: &str, condition: &str) -> Result<()> {
        let Err(error) = self.run(&["wait", what, &format!("--for={condition}"), &timeout()]) else { return Ok(()) };
        let standing = self.run(&["describe", what]).unwrap_or_default();
        bail!("{error:#}\n{standing}")
    }

    /// Waits until the pod is ready.
    pub fn ready(&self, pod: &str) -> Result<()> {
        self.wait(&format!("pod/{pod}"), "condition=Ready")
    }

    /// Waits until a deployment or daemon set has come to what is wanted of it.
    pub fn rolled_out(&self, what: &str) -> Result<()> {
        let Err(error) = self.run(&["rollout", "status", what, &timeout()]) else { return Ok(()) };
        let standing = self.run(&["describe", "pods"]).unwrap_or_default();
        bail!("{error:#}\n{standing}")
    }
}
