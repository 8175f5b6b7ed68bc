//! Random container configurations on the real kernel: each gives a container that can be removed, or an error that names a field.
//! Never a panic, an internal error, or something left behind.

use anyhow::{Context, Result, ensure};
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use windlass_integration::{
    client::{Client, container, pod},
    ground::begin,
    node,
};
use windlass_proto::cri;

/// Configurations that are tried.
const CASES: u32 = 2000;

/// Fields of the CRI, as messages may name them.
const FIELDS: [&str; 40] = [
    "command",
    "args",
    "working_dir",
    "envs",
    "mounts",
    "devices",
    "annotations",
    "log_path",
    "stop_signal",
    "stdin",
    "resources",
    "cpu_period",
    "cpu_quota",
    "cpu_shares",
    "memory_limit_in_bytes",
    "memory_swap_limit_in_bytes",
    "oom_score_adj",
    "cpuset_cpus",
    "cpuset_mems",
    "hugepage_limits",
    "unified",
    "add_capabilities",
    "drop_capabilities",
    "add_ambient_capabilities",
    "namespace_options",
    "selinux_options",
    "run_as_user",
    "run_as_group",
    "run_as_username",
    "supplemental_groups",
    "supplemental_groups_policy",
    "masked_paths",
    "readonly_paths",
    "seccomp",
    "seccomp_profile_path",
    "apparmor",
    "apparmor_profile",
    "image",
    "CDI_devices",
    "metadata",
];

fn pick(values: &[&str]) -> impl Strategy<Value = String> + use<> {
    proptest::sample::select(values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>())
}

/// Mostly `usual`, now and then something else.
fn mostly<T: Clone + std::fmt::Debug + 'static>(usual: T, other: impl Strategy<Value = T> + 'static) -> BoxedStrategy<T> {
    prop_oneof![19 => Just(usual), 1 => other].boxed()
}

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![-3i64..3, Just(1000), Just(i64::from(i32::MAX)), Just(i64::from(u32::MAX)), any::<i64>()]
}

fn path() -> impl Strategy<Value = String> {
    let known = [
        "",
        "/",
        "/tmp",
        "/etc/passwd",
        "relative",
        "/proc",
        "/proc/self",
        "/dev/null",
        "/a/../../b",
        "/no/such",
        "/new//x/.",
        "/sys",
    ];
    prop_oneof![8 => pick(&known), 1 => "(/[a-z.]{1,9}){1,5}", 1 => Just("/x".repeat(3000)), 1 => "/\\PC{1,20}"]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-zA-Z_]{0,9}", "\\PC{0,30}", Just("with\0nul".to_owned()), Just("x".repeat(5000))]
}

fn capability() -> impl Strategy<Value = String> {
    pick(&[
        "ALL",
        "all",
        "NET_ADMIN",
        "CAP_SYS_ADMIN",
        "cap_chown",
        "CAP_CAP_KILL",
        "",
        "NO_SUCH",
        "SYS_RESOURCE",
        "NET_BIND_SERVICE",
    ])
}

fn list<T: std::fmt::Debug>(element: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    proptest::collection::vec(element, 1..4)
}

fn int() -> impl Strategy<Value = Option<cri::Int64Value>> {
    number().prop_map(|value| Some(cri::Int64Value { value }))
}

fn profile() -> impl Strategy<Value = Option<cri::SecurityProfile>> {
    (-1i32..4, path()).prop_map(|(profile_type, localhost_ref)| Some(cri::SecurityProfile { profile_type, localhost_ref }))
}

fn security() -> impl Strategy<Value = cri::LinuxContainerSecurityContext> {
    let capabilities =
        (mostly(vec![], list(capability())), mostly(vec![], list(capability())), mostly(vec![], list(capability()))).prop_map(
            |(add_capabilities, drop_capabilities, add_ambient_capabilities)| cri::Capability {
                add_capabilities,
                drop_capabilities,
                add_ambient_capabilities,
            },
        );
    let identity = (
        mostly(None, int()),
        mostly(None, int()),
        mostly(String::new(), pick(&["root", "user", "nobody-here", "0", ":", "a:b"])),
        mostly(vec![], list(number())),
        mostly(0, -1i32..4),
    );
    let profiles = (
        mostly(None, profile()),
        mostly(String::new(), pick(&["runtime/default", "unconfined", "localhost//no", "localhost/x", "what"])),
        mostly(String::new(), pick(&["unconfined", "localhost/none", "what"])),
    );
    let paths = (mostly(vec![], list(path())), mostly(vec![], list(path())));
    let flags = (any::<bool>(), any::<bool>(), mostly(false, Just(true)));
    (capabilities, identity, profiles, paths, flags).prop_map(|(capabilities, identity, profiles, paths, flags)| {
        #[expect(deprecated, reason = "older clients still send the deprecated fields")]
        cri::LinuxContainerSecurityContext {
            capabilities: Some(capabilities),
            run_as_user: identity.0,
            run_as_group: identity.1,
            run_as_username: identity.2,
            supplemental_groups: identity.3,
            supplemental_groups_policy: identity.4,
            seccomp: profiles.0,
            seccomp_profile_path: profiles.1,
            apparmor_profile: profiles.2,
            masked_paths: paths.0,
            readonly_paths: paths.1,
            readonly_rootfs: flags.0,
            no_new_privs: flags.1,
            privileged: flags.2,
            ..Default::default()
        }
    })
}

fn resources() -> impl Strategy<Value = cri::LinuxContainerResources> {
    let numbers = (
        mostly(0, number()),
        mostly(0, number()),
        mostly(0, number()),
        mostly(0, number()),
        mostly(0, number()),
        mostly(0, number()),
    );
    (numbers, mostly(String::new(), pick(&["0", "0-1", "x", "9999"])), mostly(String::new(), pick(&["0", "-", "7"]))).prop_map(
        |(numbers, cpuset_cpus, cpuset_mems)| cri::LinuxContainerResources {
            cpu_period: numbers.0,
            cpu_quota: numbers.1,
            cpu_shares: numbers.2,
            memory_limit_in_bytes: numbers.3,
            memory_swap_limit_in_bytes: numbers.4,
            oom_score_adj: numbers.5,
            cpuset_cpus,
            cpuset_mems,
            ..Default::default()
        },
    )
}

fn target() -> impl Strategy<Value = String> {
    let odd = [
        "",
        "relative",
        "/",
        "//.",
        "/etc",
        "/etc/passwd",
        "/etc/passwd/x",
        "/proc/self",
        "/proc/new",
        "/sys/x",
        "/dev",
        "/dev/null",
        "/a/../etc",
    ];
    prop_oneof![pick(&["/data", "/data/inner", "/new/place", "/tmp"]), pick(&odd)]
}

fn mount() -> impl Strategy<Value = cri::Mount> {
    (
        target(),
        pick(&["", "/tmp", "/etc", "/etc/hostname", "relative", "/etc/hostname/none"]),
        any::<bool>(),
        mostly(false, Just(true)),
        mostly(0, -1i32..4),
    )
        .prop_map(|(container_path, host_path, readonly, recursive_read_only, propagation)| cri::Mount {
            container_path,
            host_path,
            readonly,
            recursive_read_only,
            propagation,
            ..Default::default()
        })
}

fn device() -> impl Strategy<Value = cri::Device> {
    (
        pick(&["", "/dev/extra", "/dev/more/x", "/etc", "/", "/dev", "/etc/passwd/x", "/proc/x"]),
        pick(&["/dev/null", "/dev/zero", "/dev/shm", "/proc", "", "/no/such", "/etc/passwd"]),
        pick(&["rwm", "r", "", "x", "mr"]),
    )
        .prop_map(|(container_path, host_path, permissions)| cri::Device { container_path, host_path, permissions })
}

/// A configuration without metadata, image and namespaces, which the test adds.
fn config() -> impl Strategy<Value = cri::ContainerConfig> {
    let words = (mostly(vec!["true".to_owned()], list(text())), mostly(vec![], list(text())), mostly(String::new(), path()));
    let envs = mostly(
        vec![],
        list(
            (text(), prop_oneof![Just(vec![0xff, 0xfe]), text().prop_map(String::into_bytes)])
                .prop_map(|(key, value)| cri::KeyValue { key, value }),
        ),
    );
    let things = (prop_oneof![Just(vec![]), list(mount())], mostly(vec![], list(device())));
    let rest = (mostly(String::new(), path()), any::<bool>(), any::<bool>(), mostly(0, -1i32..70));
    (words, envs, things, rest, security(), resources()).prop_map(|(words, envs, things, rest, security, resources)| {
        cri::ContainerConfig {
            command: words.0,
            args: words.1,
            working_dir: words.2,
            envs,
            mounts: things.0,
            devices: things.1,
            log_path: rest.0,
            stdin: rest.1,
            tty: rest.2,
            stop_signal: rest.3,
            linux: Some(cri::LinuxContainerConfig { resources: Some(resources), security_context: Some(security) }),
            ..Default::default()
        }
    })
}

/// Creates it; what came of it must be a container or a named refusal.
fn try_one(client: &Client, pod_id: &str, pod: &cri::PodSandboxConfig, mut config: cri::ContainerConfig) -> Result<bool> {
    let base = container(pod, "random", &[]);
    config.metadata = base.metadata;
    config.image = base.image;
    let options = base.linux.and_then(|linux| linux.security_context).and_then(|security| security.namespace_options);
    if let Some(security) = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()) {
        security.namespace_options = options;
    }
    match client.create(pod_id, pod, &config) {
        Ok(id) => {
            ensure!(client.container(&id)?.user.is_some(), "no user in the status");
            // It may fail, with a message, and then it has ended.
            if let Err(error) = client.start(&id) {
                ensure!(!error.message().is_empty() && !error.message().contains("panicked"), "start: {error}");
            }
            client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
            Ok(true)
        }
        Err(error) => {
            let refused = matches!(error.code(), tonic::Code::InvalidArgument | tonic::Code::Unimplemented);
            let named = FIELDS.iter().any(|field| error.message().contains(field));
            ensure!(refused && named, "{:?}: {}", error.code(), error.message());
            Ok(false)
        }
    }
}

#[test]
fn any_configuration_makes_a_container_or_names_a_field() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config_of_pod = pod(&daemon.path("logs"));
        let pod_id = client.run(&config_of_pod)?;
        // The same cases each time: a failure is there for everybody.
        let seed = [7u8; 32];
        let settings = Config { cases: CASES, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(settings, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
        let made = std::cell::Cell::new(0u32);
        let result = runner.run(&config(), |config| {
            let outcome = try_one(&client, &pod_id, &config_of_pod, config);
            made.set(made.get() + u32::from(*outcome.as_ref().unwrap_or(&false)));
            outcome.map(drop).map_err(|error| TestCaseError::fail(error.to_string()))
        });
        result.map_err(|error| anyhow::anyhow!("{error}")).context("a random configuration")?;
        println!("{} of {CASES} made a container", made.get());
        ensure!(made.get() > CASES / 5, "only {} of {CASES} made a container", made.get());
        client.remove(&pod_id)?;
        before.expect_again(&daemon)
    })
}
