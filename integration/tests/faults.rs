//! System calls that fail, one at a time, in the daemon, in a monitor and in what it forks, in every step of a pod's life. The request
//! fails with its reason or succeeds wholly; asked again it succeeds; the life goes on to its end, and nothing is left of it. Which calls a
//! step has is learnt from one that is not disturbed, in the same run.
//!
//! Here a fixed spread of them fails; `WINDLASS_FAULTS=all` makes every one fail, in each of its ways, and another text those alone
//! in whose names it is.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use serde_json::json;
use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    path::PathBuf,
    time::Duration,
};
use tonic::{Code, Status};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    faults::{Call, Injector},
    image,
    leak::Snapshot,
    node,
    registry::Registry,
    wait::until_within,
};
use windlass_proto::cri;

/// Cases of a form of pods, and of images, where not all are wanted.
const SPREAD: usize = 120;
/// Longest that a request may take: below every time limit of the daemon's own.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest until what is removed beside a reply is gone.
const SETTLE: Duration = Duration::from_secs(60);

/// One call and how it fails.
struct Case<S> {
    step: S,
    call: Call,
    errno: Errno,
}

impl<S: std::fmt::Debug> Case<S> {
    fn name(&self) -> String {
        let occurrence = self.call.occurrence;
        format!("{:?}: {:?} of {} #{occurrence}", self.step, self.errno, self.call.place)
    }
}

/// The cases that are wanted of all that there are: calls of every step, in the order in which they came.
fn chosen<S: Copy + std::fmt::Debug>(calls: &[(S, Vec<Call>)]) -> VecDeque<Case<S>> {
    let wanted = std::env::var("WINDLASS_FAULTS").unwrap_or_default();
    let every = !wanted.is_empty();
    let mut cases = Vec::new();
    for (step, calls) in calls {
        // Where all are not wanted, each place once: what comes again there is seldom another thing.
        for call in calls.iter().filter(|call| every || call.occurrence == 1) {
            let errors = call.place.errors();
            let ways = if every { errors.len() } else { 1 };
            cases.extend(errors.into_iter().take(ways).map(|errno| Case { step: *step, call: call.clone(), errno }));
        }
    }
    if every {
        cases.retain(|case| wanted == "all" || case.name().contains(&wanted));
        return cases.into();
    }
    let stride = cases.len().div_ceil(SPREAD).max(1);
    cases.into_iter().step_by(stride).collect()
}

/// Fails unless a failure says what was asked, of what, and why it failed.
fn clear(status: &Status, object: &[&str], call: &Call, errno: Errno) -> Result<()> {
    let message = status.message();
    let coded = !matches!(status.code(), Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Unimplemented);
    let named = object.iter().any(|name| !name.is_empty() && message.contains(name));
    ensure!(coded && named && told(message, call, errno), "not a clear failure: {:?} {message:?}", status.code());
    Ok(())
}

/// Whether a text has the errno in it, as the standard library or the image store has it.
fn tells(text: &str, errno: Errno) -> bool {
    let full = errno == Errno::ENOSPC && text.contains("no space left on device");
    full || text.contains(&format!("(os error {})", errno as i32))
}

/// The same for a call that fails: std's create_dir_all tells that a directory is there if it cannot find out that it is one.
fn told(text: &str, call: &Call, errno: Errno) -> bool {
    let looks = ["stat", "statx"].contains(&call.place.name());
    tells(text, errno) || looks && tells(text, Errno::EEXIST)
}

/// What was tried and what came of it.
#[derive(Default)]
struct Tally {
    tried: usize,
    hit: usize,
    /// Requests that failed, of those that were hit.
    refused: usize,
    failures: Vec<String>,
}

impl Tally {
    fn note(&mut self, name: &str, outcome: Result<Option<bool>>) -> bool {
        self.tried += 1;
        match outcome {
            Ok(None) => println!("did not come: {name}"),
            Ok(Some(refused)) => {
                self.hit += 1;
                self.refused += usize::from(refused);
            }
            Err(error) => {
                self.failures.push(format!("{name}\n    {error:#}"));
                eprintln!("{name}\n    {error:#}");
                return false;
            }
        }
        true
    }

    /// Fails if anything did, or if too little was tried for that to mean much.
    fn judge(self, what: &str, least: usize) -> Result<()> {
        println!("{what}: {} calls, {} of them failed, {} requests failed with them", self.tried, self.hit, self.refused);
        ensure!(self.failures.is_empty(), "{} of {}:\n{}", self.failures.len(), self.tried, self.failures.join("\n"));
        let filtered = std::env::var("WINDLASS_FAULTS").is_ok_and(|wanted| wanted != "all");
        ensure!(filtered || self.tried >= least, "only {} cases", self.tried);
        ensure!(self.hit * 10 >= self.tried * 8, "only {} of {} calls came again", self.hit, self.tried);
        Ok(())
    }
}

/// A request of a pod's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    RunPod,
    Create,
    Start,
    Exec,
    StopContainer,
    RemoveContainer,
    StopPod,
    RemovePod,
}

const STEPS: [Step; 8] = [
    Step::RunPod,
    Step::Create,
    Step::Start,
    Step::Exec,
    Step::StopContainer,
    Step::RemoveContainer,
    Step::StopPod,
    Step::RemovePod,
];

/// What kind of pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Form {
    Plain,
    /// With users of its own.
    Users,
    /// With a port of the host.
    Port,
}

/// A daemon whose calls can fail, and a pod beside all that happens.
struct Ground {
    // Before the injector: none of the daemon's calls may go unanswered.
    daemon: Daemon,
    client: Client,
    bystander: String,
    before: Snapshot,
    injector: Injector,
}

impl Ground {
    fn new() -> Result<Ground> {
        let injector = Injector::default();
        let daemon = injector.watch(|| Daemon::start(&[]))?;
        let client = Client::within(&daemon.socket(), PATIENCE)?;
        let config = pod(&daemon.path("logs"));
        let beside = client.run(&config)?;
        let bystander = client.create(&beside, &config, &container(&config, "bystander", &["sleep", "100000"]))?;
        client.start(&bystander)?;
        fs::create_dir(daemon.path("volume"))?;
        fs::write(daemon.path("volume/file"), "content")?;
        let before = Snapshot::warm(&daemon, &client)?;
        Ok(Ground { daemon, client, bystander, before, injector })
    }

    /// Nothing is left, and what has nothing to do with it goes on.
    fn undisturbed(&self) -> Result<()> {
        let mut last = Ok(());
        let same = until_within(SETTLE, "everything as before", || {
            last = self.before.expect_same(&Snapshot::take(&self.daemon)?);
            Ok(last.is_ok().then_some(()))
        });
        same.or(last)?;
        ensure!(self.client.exec(&self.bystander, &["true"])?.exit_code == 0, "the pod beside");
        Ok(())
    }
}

/// One pod and its container.
struct Life<'a> {
    ground: &'a Ground,
    config: cri::PodSandboxConfig,
    wanted: cri::ContainerConfig,
    pod: String,
    container: String,
}

impl<'a> Life<'a> {
    fn new(ground: &'a Ground, form: Form) -> Life<'a> {
        let mut config = pod(&ground.daemon.path("logs"));
        match form {
            Form::Plain => {}
            Form::Users => {
                let options = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
                if let Some(options) = options.and_then(|security| security.namespace_options.as_mut()) {
                    let ids = vec![cri::IdMapping { host_id: 200_000, container_id: 0, length: 65536 }];
                    let mode = cri::NamespaceMode::Pod.into();
                    options.userns_options = Some(cri::UserNamespace { mode, uids: ids.clone(), gids: ids });
                }
            }
            Form::Port => {
                config.port_mappings.push(cri::PortMapping { container_port: 80, host_port: 18080, ..Default::default() });
            }
        }
        let mut wanted = container(&config, "main", &["sh", "-c", "echo started; exec sleep 100000"]);
        let host_path = ground.daemon.path("volume").to_string_lossy().into_owned();
        wanted.mounts = vec![cri::Mount { container_path: "/volume".into(), host_path, readonly: true, ..Default::default() }];
        Life { ground, config, wanted, pod: String::new(), container: String::new() }
    }

    fn act(&mut self, step: Step) -> Result<(), Status> {
        let client = &self.ground.client;
        match step {
            Step::RunPod => self.pod = client.run(&self.config)?,
            Step::Create => self.container = client.create(&self.pod, &self.config, &self.wanted)?,
            Step::Start => client.start(&self.container)?,
            Step::Exec => {
                let run = client.exec(&self.container, &["sh", "-c", "echo out; echo err >&2; exit 3"])?;
                if (run.exit_code, run.stdout.as_slice(), run.stderr.as_slice()) != (3, b"out\n", b"err\n") {
                    return Err(Status::data_loss(format!("{run:?}")));
                }
            }
            Step::StopContainer => client.stop(&self.container, 0)?,
            Step::RemoveContainer => {
                client.remove_container(cri::RemoveContainerRequest { container_id: self.container.clone() })?;
            }
            Step::StopPod => {
                client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: self.pod.clone() })?;
            }
            Step::RemovePod => {
                client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: self.pod.clone() })?;
            }
        }
        Ok(())
    }

    /// What a step that has succeeded is to have brought about.
    fn holds(&self, step: Step) -> Result<()> {
        let client = &self.ground.client;
        let state = || client.container(&self.container).map(|status| status.state());
        match step {
            Step::RunPod => ensure!(client.pod(&self.pod)?.state() == cri::PodSandboxState::SandboxReady, "it is not ready"),
            Step::Create => ensure!(state()? == cri::ContainerState::ContainerCreated, "{:?}", state()),
            Step::Start => {
                ensure!(state()? == cri::ContainerState::ContainerRunning, "{:?}", client.container(&self.container));
                let run = client.exec(&self.container, &["cat", "/volume/file"])?;
                ensure!(run.stdout == b"content", "its volume: {run:?}");
            }
            Step::Exec => ensure!(state()? == cri::ContainerState::ContainerRunning, "{:?}", client.container(&self.container)),
            Step::StopContainer => {
                let status = client.exited(&self.container)?;
                ensure!(status.exit_code == 137, "{status:?}");
            }
            Step::StopPod => ensure!(client.pod(&self.pod)?.state() == cri::PodSandboxState::SandboxNotready, "it is ready"),
            Step::RemoveContainer => {
                ensure!(client.container(&self.container).is_err_and(|status| status.code() == Code::NotFound), "it is there");
            }
            Step::RemovePod => {
                ensure!(client.pod(&self.pod).is_err_and(|status| status.code() == Code::NotFound), "it is there");
            }
        }
        Ok(())
    }

    fn act_well(&mut self, step: Step) -> Result<()> {
        self.act(step).with_context(|| format!("{step:?}"))?;
        self.holds(step).with_context(|| format!("after {step:?}"))
    }

    /// Asks once more for a step that has failed.
    fn again(&mut self, step: Step) -> Result<()> {
        let spoilt = step == Step::Start && {
            let state = self.ground.client.container(&self.container)?.state();
            state != cri::ContainerState::ContainerCreated
        };
        if spoilt {
            // A container is started once: the next one has its name.
            self.act_well(Step::RemoveContainer)?;
            self.act_well(Step::Create)?;
        }
        self.act_well(step)
    }

    fn names(&self) -> [&str; 4] {
        [&self.config.hostname, &self.pod, &self.container, "container main"]
    }
}

/// The calls of each step of an undisturbed life.
fn learn(ground: &Ground, form: Form) -> Result<Vec<(Step, Vec<Call>)>> {
    let mut life = Life::new(ground, form);
    let mut calls = Vec::new();
    for step in STEPS {
        ground.injector.record();
        life.act(step)?;
        calls.push((step, ground.injector.recorded()?));
        life.holds(step)?;
    }
    Ok(calls)
}

/// A life with one fault. Whether the request failed, none if the call did not come.
fn live(ground: &Ground, form: Form, case: &Case<Step>) -> Result<Option<bool>> {
    let mut life = Life::new(ground, form);
    let at = STEPS.iter().position(|step| *step == case.step).unwrap_or_default();
    let (earlier, later) = STEPS.split_at(at);
    for step in earlier {
        life.act_well(*step)?;
    }
    ground.injector.arm(&case.call, case.errno)?;
    let outcome = life.act(case.step);
    let hit = ground.injector.disarm();
    let refused = outcome.is_err();
    match outcome {
        Ok(()) => life.holds(case.step).context("it is said to have succeeded")?,
        Err(status) => {
            let judged = clear(&status, &life.names(), &case.call, case.errno);
            life.again(case.step).with_context(|| format!("asked again after {:?}", status.message()))?;
            judged?;
        }
    }
    for step in later.iter().skip(1) {
        // What a child finds wrong with its program while it is created is told when that is to start.
        let late = hit && case.step == Step::Create && *step == Step::Start && case.call.place.to_string().starts_with("Child ");
        match life.act(*step) {
            Err(status) if late => {
                clear(&status, &life.names(), &case.call, case.errno)?;
                life.again(*step)?;
            }
            outcome => {
                outcome.with_context(|| format!("{step:?}"))?;
                life.holds(*step).with_context(|| format!("after {step:?}"))?;
            }
        }
    }
    ground.undisturbed()?;
    Ok(hit.then_some(refused))
}

/// The faults that are wanted, by what undisturbed lives do.
fn plan() -> Result<VecDeque<(Form, Case<Step>)>> {
    let ground = Ground::new()?;
    let mut known = BTreeSet::new();
    let mut plan = VecDeque::new();
    for form in [Form::Plain, Form::Users, Form::Port] {
        let mut calls = learn(&ground, form)?;
        for (step, calls) in &mut calls {
            // Only what other forms have not.
            calls.retain(|call| known.insert((format!("{step:?}"), call.clone())));
        }
        plan.extend(chosen(&calls).into_iter().map(|case| (form, case)));
    }
    Ok(plan)
}

/// Goes on with the plan until something is wrong. The next life has a node of its own then.
fn go_on(plan: &mut VecDeque<(Form, Case<Step>)>, tally: &mut Tally) -> Result<()> {
    let ground = Ground::new()?;
    while let Some((form, case)) = plan.pop_front() {
        let outcome = live(&ground, form, &case);
        if !tally.note(&format!("{form:?} {}", case.name()), outcome) {
            eprintln!("{}", ground.daemon.log().lines().rev().take(6).collect::<Vec<_>>().join("\n"));
            break;
        }
    }
    Ok(())
}

#[test]
fn whatever_call_fails_a_pod_is_whole_or_gone() -> Result<()> {
    let (mut plan, mut tally) = (node::run(plan)?, Tally::default());
    while !plan.is_empty() {
        (plan, tally) = node::run(move || go_on(&mut plan, &mut tally).map(|()| (plan, tally)))?;
    }
    tally.judge("lives of pods", SPREAD)
}

/// A daemon that starts after a killed one, with one fault: it serves, or ends with the reason and the next one does. The pods never notice.
fn start_badly(plan: &mut Option<VecDeque<Case<Start>>>, tally: &mut Tally) -> Result<()> {
    let mut ground = Ground::new()?;
    let config = pod(&ground.daemon.path("logs"));
    let id = ground.client.run(&config)?;
    let main = ground.client.create(&id, &config, &container(&config, "main", &["sleep", "100000"]))?;
    ground.client.start(&main)?;
    let waiting = ground.client.create(&id, &config, &container(&config, "waiting", &["sleep", "100000"]))?;
    let process = ground.client.shell(&main, "cat /proc/sys/kernel/random/uuid > /id; cat /id")?;
    if plan.is_none() {
        ground.daemon.kill9()?;
        ground.injector.record();
        let Ground { daemon, injector, .. } = &mut ground;
        injector.watch(|| daemon.serve())?;
        ground.client = Client::within(&ground.daemon.socket(), PATIENCE)?;
        ground.client.version(cri::VersionRequest::default())?;
        *plan = Some(chosen(&[(Start, ground.injector.recorded()?)]));
    }
    while let Some(case) = plan.as_mut().and_then(VecDeque::pop_front) {
        let outcome = start_once(&mut ground, &case).and_then(|outcome| {
            ensure!(ground.client.pod(&id)?.state() == cri::PodSandboxState::SandboxReady, "the pod is not ready");
            let status = ground.client.container(&main)?;
            ensure!(status.state() == cri::ContainerState::ContainerRunning, "{status:?}");
            ensure!(ground.client.shell(&main, "cat /id")? == process, "another container");
            let status = ground.client.container(&waiting)?;
            ensure!(status.state() == cri::ContainerState::ContainerCreated, "{status:?}");
            ensure!(ground.client.exec(&ground.bystander, &["true"])?.exit_code == 0, "the pod beside");
            Ok(outcome)
        });
        if !tally.note(&case.name(), outcome) {
            eprintln!("{}", ground.daemon.log().lines().rev().take(6).collect::<Vec<_>>().join("\n"));
            return Ok(());
        }
    }
    ground.client.remove(&id)?;
    ground.undisturbed()
}

/// The one step of a daemon.
#[derive(Debug, Clone, Copy)]
struct Start;

fn start_once(ground: &mut Ground, case: &Case<Start>) -> Result<Option<bool>> {
    ground.daemon.kill9()?;
    ground.injector.arm(&case.call, case.errno)?;
    let Ground { daemon, injector, .. } = ground;
    let begun = injector.watch(|| daemon.serve());
    let reached = begun.and_then(|()| {
        ground.client = Client::within(&ground.daemon.socket(), PATIENCE)?;
        Ok(ground.client.version(cri::VersionRequest::default())?)
    });
    let hit = ground.injector.disarm();
    if let Err(error) = &reached {
        let log = ground.daemon.log();
        let last: Vec<&str> = log.lines().rev().take_while(|line| !line.contains(" INFO serving ")).collect();
        // A panic of the asynchronous runtime, before there is anything to lose, has the bare number.
        let bare = format!("code: {}", case.errno as i32);
        ensure!(
            last.iter().any(|line| told(line, &case.call, case.errno) || line.contains(&bare)),
            "no clear end: {error:#}: {last:#?}"
        );
        let _ = ground.daemon.kill9();
        let Ground { daemon, injector, .. } = ground;
        injector.watch(|| daemon.serve()).context("the next daemon")?;
        ground.client = Client::within(&ground.daemon.socket(), PATIENCE)?;
    }
    Ok(hit.then_some(reached.is_err()))
}

#[test]
fn a_daemon_that_starts_badly_loses_no_pod() -> Result<()> {
    let (mut plan, mut tally) = (None, Tally::default());
    while plan.as_ref().is_none_or(|plan: &VecDeque<_>| !plan.is_empty()) {
        (plan, tally) = node::run(move || start_badly(&mut plan, &mut tally).map(|()| (plan, tally)))?;
    }
    tally.judge("starts of a daemon", SPREAD / 2)
}

/// What an image goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Import,
    Pull,
    Remove,
}

/// A daemon without images, an archive and a registry that have one.
struct Dock {
    daemon: Daemon,
    client: Client,
    injector: Injector,
    archive: String,
    name: String,
    _registry: Registry,
    before: BTreeSet<PathBuf>,
}

impl Dock {
    fn new() -> Result<Dock> {
        let registry = Registry::start()?;
        let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"] } });
        registry.add("test/busybox", "v1", &image::layers()?, &config)?;
        let name = format!("{}/test/busybox:v1", registry.host());
        let injector = Injector::default();
        let daemon = injector.watch(|| {
            let mut daemon = Daemon::prepare(&[])?;
            daemon.serve()?;
            Ok(daemon)
        })?;
        let archive = daemon.path("images.tar");
        image::write_archive(&archive)?;
        let client = Client::within(&daemon.socket(), PATIENCE)?;
        let archive = archive.to_string_lossy().into_owned();
        let mut dock = Dock { daemon, client, injector, archive, name, _registry: registry, before: BTreeSet::new() };
        for way in [Way::Import, Way::Remove, Way::Pull, Way::Remove] {
            dock.act(way)?;
        }
        // What was removed is deleted beside the reply.
        dock.before = until_within(SETTLE, "nothing in the trash", || {
            let stored = dock.stored();
            let trash = stored.iter().any(|path| path.to_string_lossy().contains("/trash-"));
            Ok((!trash).then_some(stored))
        })?;
        Ok(dock)
    }

    fn stored(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        let mut waiting = vec![self.daemon.root().join("images")];
        while let Some(directory) = waiting.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                found.insert(entry.path());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    waiting.push(entry.path());
                }
            }
        }
        found
    }

    fn images(&self) -> Result<Vec<cri::Image>> {
        Ok(self.client.list_images(cri::ListImagesRequest::default())?.images)
    }

    fn act(&self, way: Way) -> Result<()> {
        let spec = |image: &str| Some(cri::ImageSpec { image: image.into(), ..Default::default() });
        match way {
            Way::Import => drop(self.daemon.windlass(&["image", "import", &self.archive])?),
            Way::Pull => {
                self.client.pull_image(cri::PullImageRequest { image: spec(&self.name), ..Default::default() })?;
            }
            Way::Remove => {
                for image in self.images()? {
                    self.client.remove_image(cri::RemoveImageRequest { image: spec(&image.id) })?;
                }
            }
        }
        Ok(())
    }

    /// The image is there and whole, or nothing of it is, once what is removed beside a reply is gone.
    fn settled(&self, there: bool) -> Result<()> {
        ensure!(self.images()?.len() == usize::from(there), "{:?}", self.images());
        if there {
            return self.daemon.windlass(&["image", "verify"]).map(drop);
        }
        until_within(SETTLE, "the store as before", || Ok((self.stored() == self.before).then_some(()))).with_context(|| {
            let stored = self.stored();
            let left: Vec<_> = stored.difference(&self.before).take(9).collect();
            let lost: Vec<_> = self.before.difference(&stored).take(9).collect();
            format!("left: {left:#?}\nlost: {lost:#?}")
        })
    }

    fn case(&self, case: &Case<Way>) -> Result<Option<bool>> {
        let removes = case.step == Way::Remove;
        if removes {
            self.act(Way::Import)?;
        }
        self.injector.arm(&case.call, case.errno)?;
        let outcome = self.act(case.step);
        let hit = self.injector.disarm();
        if let Err(error) = &outcome {
            if !removes {
                self.settled(false).with_context(|| format!("after {error:#}"))?;
            }
            self.act(case.step).with_context(|| format!("asked again after {error:#}"))?;
            ensure!(tells(&format!("{error:#}"), case.errno), "not a clear failure: {error:#}");
        }
        self.settled(!removes)?;
        self.act(Way::Remove)?;
        self.settled(false)?;
        Ok(hit.then_some(outcome.is_err()))
    }
}

fn ship(plan: &mut Option<VecDeque<Case<Way>>>, tally: &mut Tally) -> Result<()> {
    let dock = Dock::new()?;
    if plan.is_none() {
        let mut calls = Vec::new();
        for way in [Way::Import, Way::Remove, Way::Pull] {
            dock.injector.record();
            dock.act(way)?;
            calls.push((way, dock.injector.recorded()?));
        }
        dock.act(Way::Remove)?;
        *plan = Some(chosen(&calls));
    }
    while let Some(case) = plan.as_mut().and_then(VecDeque::pop_front) {
        if !tally.note(&case.name(), dock.case(&case)) {
            eprintln!("{}", dock.daemon.log().lines().rev().take(6).collect::<Vec<_>>().join("\n"));
            break;
        }
    }
    Ok(())
}

#[test]
fn whatever_call_fails_an_image_is_whole_or_absent() -> Result<()> {
    let (mut plan, mut tally) = (None, Tally::default());
    while plan.as_ref().is_none_or(|plan: &VecDeque<_>| !plan.is_empty()) {
        (plan, tally) = node::run(move || ship(&mut plan, &mut tally).map(|()| (plan, tally)))?;
    }
    tally.judge("ways of images", SPREAD / 2)
}
