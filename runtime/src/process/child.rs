//! The child that becomes a container's first process: [`Build::STEPS`] in order, then the report, the gate and exec.
//!
//! The order matters: descriptors first (a copy of a pipe's end would hide its end of file); everything that reads the host's tree
//! (bundle, cgroup, bind sources, /proc/sys) before its mount namespace is left; the root before the identity, because
//! mounting needs root; the search for the program last, with the rights that it will have.

use super::entrypoint::Entrypoint;
use super::hooks::{self, Stage, State};
use super::report::ChildReport;
use super::{Context, Kind, PidNamespace, Spawn, Stdio, StepError, identity, stdio};
use crate::bundle::{self, RootfsPlan, read_config, read_rootfs_plan};
use crate::namespace::{self, Owned, User};
use crate::rootfs::{self, Ground, Root, Sources};
use crate::security::{self, Filter};
use crate::sys::clone::{Forked, fork_first_sibling};
use crate::{cgroup, sys};
use oci_spec::runtime::{Process, Spec};
use rustix::fs::Mode;
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A step: its name and what it does.
type Step<'a> = (&'static str, fn(&mut Build<'a>) -> Result<(), StepError>);

/// What the steps have made so far.
struct Build<'a> {
    spawn: &'a Spawn<'a>,
    gate: Option<&'a OwnedFd>,
    report: &'a ChildReport,
    spec: Option<Spec>,
    plan: Option<RootfsPlan>,
    user: Option<User>,
    sources: Option<Sources>,
    /// The bundle in the container's mount namespace, where the root is attached.
    place: Option<OwnedFd>,
    owned: Owned,
    root: Option<Root>,
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
    /// Why the program cannot be run is told at the gate, to whoever starts the container: creating it did not fail.
    entrypoint: Option<Result<Entrypoint, StepError>>,
    filter: Option<Filter>,
    not_enforced: Vec<String>,
    /// The bounding set that was inherited.
    available: u64,
}

/// Builds the container, waits at the gate and executes its program.
pub(super) fn run(spawn: &Spawn<'_>, gate: Option<&OwnedFd>, report: &ChildReport) -> Result<Infallible, StepError> {
    let mut build = Build {
        spawn,
        gate,
        report,
        spec: None,
        plan: None,
        user: None,
        sources: None,
        place: None,
        owned: Owned::default(),
        root: None,
        master: None,
        slave: None,
        entrypoint: None,
        filter: None,
        not_enforced: Vec::new(),
        available: security::own_bounding_set(),
    };
    for (name, step) in Build::STEPS {
        step(&mut build).map_err(|mut error| {
            if error.step.is_empty() {
                error.step = name.into();
            }
            error
        })?;
    }
    let missing = || StepError::because(Kind::Internal, "entrypoint", "", "no program was found");
    let entrypoint = build.entrypoint.take().ok_or_else(missing)?;
    let later =
        build.spec.as_ref().is_some_and(|spec| [Stage::Poststart, Stage::Poststop].iter().any(|at| hooks::listed(spec, *at)));
    let master = build.master.as_ref().map(AsFd::as_fd);
    report.ready(master, std::mem::take(&mut build.not_enforced), later).context("report", "")?;
    let filter = build.filter.take();
    let at_start = build.spec.take().filter(|spec| hooks::listed(spec, Stage::StartContainer));
    // What the gated process need not hold: the root's and the terminal's descriptors and the parsed bundle.
    drop(build);
    let begin = |gate: &ChildReport| {
        if !gate.wait_at_gate().context("wait at the gate", "")? {
            sys::process::exit_now(1);
        }
        sys::descriptors::close_on_exec_from(3).context("close descriptors", "")?;
        let entrypoint = entrypoint?;
        if let Some(spec) = &at_start {
            let state = State { id: spawn.id, status: "created", pid: std::process::id(), bundle: spawn.bundle };
            hooks::run(spec, Stage::StartContainer, &state, Path::new("."))?;
        }
        entrypoint.execute(filter.as_ref())
    };
    let Some(gate) = gate else { return begin(report) };
    let starter = ChildReport::accept(gate).context("wait at the gate", "")?;
    let failed = begin(&starter);
    if let Err(error) = &failed {
        starter.failed(error.clone());
    }
    failed
}

impl<'a> Build<'a> {
    /// The steps, in order.
    const STEPS: [Step<'a>; 13] = [
        ("close descriptors", Self::descriptors),
        ("make session", Self::session),
        ("read bundle", Self::bundle),
        ("set limits", Self::limits),
        ("open bind sources", Self::bind_sources),
        ("enter namespaces", Self::namespaces),
        ("set sysctls", Self::sysctls),
        ("build root", Self::root),
        ("open terminal", Self::terminal),
        ("run hooks", Self::hooks),
        ("change root", Self::pivot),
        ("set identity", Self::identity),
        ("find program", Self::entrypoint),
    ];

    fn spec(&self) -> Result<&Spec, StepError> {
        self.spec.as_ref().ok_or_else(|| StepError::because(Kind::Internal, "bundle", "", "not read yet"))
    }

    fn process(&self) -> Result<&Process, StepError> {
        let missing = || StepError::because(Kind::Invalid, "read", "config.json", "no process");
        self.spec()?.process().as_ref().ok_or_else(missing)
    }

    fn built_root(&self) -> Result<&Root, StepError> {
        self.root.as_ref().ok_or_else(|| StepError::because(Kind::Internal, "root", "", "not composed yet"))
    }

    fn descriptors(&mut self) -> Result<(), StepError> {
        stdio::install(&self.spawn.stdio)?;
        let pod = &self.spawn.namespaces;
        let mut keep = vec![0, 1, 2, self.report.as_fd().as_raw_fd()];
        keep.extend([pod.user, pod.net, pod.ipc, pod.uts, pod.shm, pod.layers].into_iter().flatten().map(|fd| fd.as_raw_fd()));
        keep.extend(self.gate.map(AsRawFd::as_raw_fd));
        // SAFETY: the child runs nothing of the parent's code any more; of the parent's descriptors it uses those kept here.
        unsafe { sys::descriptors::close_all_but(&keep) }.context("close descriptors", "")
    }

    fn session(&mut self) -> Result<(), StepError> {
        rustix::process::setsid().context("make session", "")?;
        // A kernel or quota without keyrings is no reason to fail.
        let _ = sys::keyring::new_session();
        sys::signal::reset_all();
        rustix::process::umask(Mode::empty());
        Ok(())
    }

    fn bundle(&mut self) -> Result<(), StepError> {
        let spec = read_config(self.spawn.bundle)?;
        self.plan = read_rootfs_plan(self.spawn.bundle)?;
        bundle::check(&spec)?;
        namespace::check(&spec)?;
        self.filter = Filter::of(&spec, self.plan.as_ref().and_then(|plan| plan.seccomp_program.as_deref()))?;
        self.spec = Some(spec);
        security::check(self.spec.as_ref(), self.process()?)
    }

    fn limits(&mut self) -> Result<(), StepError> {
        let resources = self.spec()?.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let devices = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        cgroup::restrict(self.spawn.cgroup_path, devices)?;
        if let Some(resources) = resources {
            self.not_enforced = cgroup::apply(self.spawn.cgroup_path, resources)?;
        }
        let process = self.process()?;
        security::set_rlimits(process.rlimits().as_deref().unwrap_or_default())?;
        security::set_oom_score(process.oom_score_adj().unwrap_or(0))?;
        security::set_priorities(process)?;
        // Hooks that the child executes before its program come from the host, and are not for the container's profile.
        if hooks::listed(self.spec()?, Stage::CreateContainer) { Ok(()) } else { self.confine() }
    }

    fn confine(&self) -> Result<(), StepError> {
        security::confine_at_exec(self.process()?)?;
        security::label_at_exec(self.process()?)
    }

    /// Where the root is attached: over the bundle's directory, which exists anyway. Hooks find it at `root.path`, and the rest of the
    /// bundle beside it.
    fn place_path(&self) -> Result<PathBuf, StepError> {
        let spec = self.spec()?;
        let stages = [Stage::Prestart, Stage::CreateRuntime, Stage::CreateContainer];
        let path =
            spec.root().as_ref().map(|root| root.path()).filter(|_| stages.iter().any(|stage| hooks::listed(spec, *stage)));
        Ok(self.spawn.bundle.join(path.map_or(Path::new(""), PathBuf::as_path)))
    }

    fn bind_sources(&mut self) -> Result<(), StepError> {
        let place = self.place_path()?;
        if place != self.spawn.bundle {
            std::fs::create_dir_all(&place).context("make directory", place.display())?;
        }
        self.user = User::of(self.spec()?, self.spawn.namespaces.user)?;
        self.sources = Some(Sources::open(&Ground {
            bundle: self.spawn.bundle,
            spec: self.spec()?,
            plan: self.plan.as_ref(),
            shm: self.spawn.namespaces.shm,
            layers: self.spawn.namespaces.layers,
            user: self.user.as_ref(),
        })?);
        Ok(())
    }

    fn namespaces(&mut self) -> Result<(), StepError> {
        if let Some(user) = &self.user {
            // From inside, the host's root cannot be given a successor.
            let process = self.process()?.user();
            stdio::give_to(user.host_uid(process.uid())?, user.host_gid(process.gid())?)?;
        }
        self.owned = namespace::enter(self.spec()?, &self.spawn.namespaces, self.user.as_ref())?;
        // Still with the host's ids, which may walk to the bundle.
        self.place = Some(rootfs::open_path(&self.place_path()?)?);
        if self.user.is_some() {
            if matches!(self.spawn.pid, PidNamespace::NewInside) {
                self.become_first()?;
            }
            namespace::user::become_root()?;
            // A user namespace begins with all capabilities over itself.
            self.available = security::own_bounding_set();
        }
        if !self.owned.new_uts {
            return Ok(());
        }
        let spec = self.spec()?;
        if let Some(name) = spec.hostname() {
            rustix::system::sethostname(name.as_bytes()).context("set hostname", name)?;
        }
        match spec.domainname() {
            Some(name) => rustix::system::setdomainname(name.as_bytes()).context("set domain name", name),
            None => Ok(()),
        }
    }

    /// Goes on as the first process of a new pid namespace, which the user namespace owns; the caller ends. The new process begins when
    /// the parent can know it: nobody could reap it before.
    fn become_first(&mut self) -> Result<(), StepError> {
        let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("make", "pipe")?;
        // SAFETY: a child of a single-threaded process has a single thread.
        match unsafe { fork_first_sibling() }.context("make namespace", "Pid")? {
            Forked::Child => {
                drop(go);
                let mut byte = [0u8; 1];
                if rustix::io::retry_on_intr(|| rustix::io::read(&wait, &mut byte)).context("begin", "")? == 0 {
                    sys::process::exit_now(1);
                }
                rustix::process::setsid().context("make session", "").map(drop)
            }
            Forked::Parent { pid, pidfd } => {
                drop(wait);
                self.report.moved(pid, pidfd.as_fd()).context("report", "the first process")?;
                let begun = rustix::io::retry_on_intr(|| rustix::io::write(&go, b"g"));
                sys::process::exit_now(i32::from(begun.is_err()))
            }
        }
    }

    fn sysctls(&mut self) -> Result<(), StepError> {
        match self.spec()?.linux().as_ref().and_then(|linux| linux.sysctl().as_ref()) {
            Some(sysctls) => namespace::write_sysctls(sysctls, self.owned),
            None => Ok(()),
        }
    }

    fn root(&mut self) -> Result<(), StepError> {
        let missing = || StepError::because(Kind::Internal, "root", "", "no sources were opened");
        let sources = self.sources.take().ok_or_else(missing)?;
        let place = self.place.take().ok_or_else(missing)?;
        let root = Root::attach(place.as_fd(), self.spec()?, self.plan.as_ref(), sources.root)?;
        root.mount_all(self.spec()?, sources.mounts)?;
        root.populate_dev(self.spec()?, self.user.is_some())?;
        self.root = Some(root);
        Ok(())
    }

    fn terminal(&mut self) -> Result<(), StepError> {
        if !matches!(self.spawn.stdio, Stdio::Terminal) {
            return Ok(());
        }
        let (master, slave) = self.built_root()?.open_terminal()?;
        stdio::set_size(master.as_fd(), self.process()?);
        (self.master, self.slave) = (Some(master), Some(slave));
        Ok(())
    }

    /// prestart and createRuntime in the caller's namespaces, createContainer here.
    fn hooks(&mut self) -> Result<(), StepError> {
        let spec = self.spec()?;
        if [Stage::Prestart, Stage::CreateRuntime].iter().any(|stage| hooks::listed(spec, *stage)) {
            hooks::ask(self.report)?;
        }
        if !hooks::listed(spec, Stage::CreateContainer) {
            return Ok(());
        }
        let state = State { id: self.spawn.id, status: "created", pid: std::process::id(), bundle: self.spawn.bundle };
        hooks::run(spec, Stage::CreateContainer, &state, self.spawn.bundle)?;
        self.confine()
    }

    fn pivot(&mut self) -> Result<(), StepError> {
        let root = self.built_root()?;
        root.restrict(self.spec()?)?;
        root.pivot(self.spec()?)
    }

    fn identity(&mut self) -> Result<(), StepError> {
        if let Some(slave) = &self.slave {
            stdio::install_terminal(slave.as_fd())?;
        }
        stdio::own_null()?;
        let user = self.process()?.user();
        stdio::give_to(user.uid(), user.gid())?;
        match identity::assume(self.process()?, self.available, self.filter.is_some()) {
            // A working directory that cannot be used. Told at the gate; what runs here until then is ours alone.
            Err(error) if error.kind == Kind::Entrypoint => self.entrypoint = Some(Err(error)),
            other => other?,
        }
        Ok(())
    }

    fn entrypoint(&mut self) -> Result<(), StepError> {
        if self.entrypoint.is_none() {
            self.entrypoint = Some(Entrypoint::find(self.process()?));
        }
        Ok(())
    }
}
