//! The validator that is built in: which adjustments no plugin may make, and which plugins must be there. Its options are those of
//! containerd and CRI-O.

use serde::{Deserialize, Serialize};
use windlass_proto::nri::{Field, PodSandbox, ValidateContainerAdjustmentRequest, security_profile::ProfileType};

/// Annotation of a pod with a list (YAML) of plugins that its containers need.
const REQUIRED_PLUGINS: &str = "required-plugins.noderesource.dev";

/// `[nri.validator]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidatorConfig {
    /// Whether adjustments are validated at all.
    pub enable: bool,
    /// Hooks may not be added.
    pub reject_oci_hook_adjustment: bool,
    /// The seccomp profile may not be changed where it is the default one.
    pub reject_runtime_default_seccomp_adjustment: bool,
    /// Where there is none.
    pub reject_unconfined_seccomp_adjustment: bool,
    /// Where it is a file of the node.
    pub reject_custom_seccomp_adjustment: bool,
    /// Namespaces may not be changed.
    pub reject_namespace_adjustment: bool,
    /// Sysctls may not be changed.
    pub reject_sysctl_adjustment: bool,
    /// Names of plugins without which no container is created.
    pub required_plugins: Vec<String>,
    /// Annotation by which a pod does without them (`true`). Empty: none does.
    pub tolerate_missing_plugins_annotation: String,
}

/// Why the adjustment is not allowed.
pub(super) fn check(config: &ValidatorConfig, request: &ValidateContainerAdjustmentRequest) -> Result<(), String> {
    let container = request.container.clone().unwrap_or_default();
    let owners = request.owners.as_ref().and_then(|owners| owners.owners.get(&container.id)).cloned().unwrap_or_default();
    let simple = |field: Field| owners.simple.get(&(field as i32)).cloned();
    let compound = |field: Field| {
        let all = owners.compound.get(&(field as i32)).map(|all| all.owners.clone()).unwrap_or_default();
        let all: Vec<String> = all.iter().map(|(entry, plugin)| format!("{plugin} ({entry})")).collect();
        (!all.is_empty()).then(|| all.join(", "))
    };
    let profile = container.linux.as_ref().and_then(|linux| linux.seccomp_profile.as_ref()).map(|profile| profile.profile_type());
    let (seccomp, kind) = match profile {
        None | Some(ProfileType::Unconfined) => (config.reject_unconfined_seccomp_adjustment, "unconfined"),
        Some(ProfileType::RuntimeDefault) => (config.reject_runtime_default_seccomp_adjustment, "runtime default"),
        Some(ProfileType::Localhost) => (config.reject_custom_seccomp_adjustment, "custom"),
    };
    for (rejected, what, by) in [
        (config.reject_oci_hook_adjustment, "OCI hooks".to_owned(), simple(Field::OciHooks)),
        (seccomp, format!("{kind} seccomp policy"), simple(Field::SeccompPolicy)),
        (config.reject_namespace_adjustment, "namespaces".to_owned(), compound(Field::Namespace)),
        (config.reject_sysctl_adjustment, "sysctls".to_owned(), compound(Field::Sysctl)),
    ] {
        if let (true, Some(by)) = (rejected, by) {
            return Err(format!("adjustment of {what} is not allowed: plugin {by}"));
        }
    }
    required(config, request, &container.name)
}

fn required(config: &ValidatorConfig, request: &ValidateContainerAdjustmentRequest, container: &str) -> Result<(), String> {
    let pod = request.pod.clone().unwrap_or_default();
    let annotation = &config.tolerate_missing_plugins_annotation;
    match effective(&pod, annotation, container).filter(|_| !annotation.is_empty()) {
        Some("true" | "1" | "t" | "T" | "TRUE" | "True") => return Ok(()),
        None | Some("false" | "0" | "f" | "F" | "FALSE" | "False") => {}
        Some(other) => return Err(format!("annotation {annotation} {other:?} is not true or false")),
    }
    let mut needed = config.required_plugins.clone();
    if let Some(value) = effective(&pod, REQUIRED_PLUGINS, container) {
        let own: Vec<String> = serde_saphyr::from_str(value)
            .map_err(|error| format!("annotation {REQUIRED_PLUGINS} {value:?} is not a list of names: {error}"))?;
        needed.extend(own);
    }
    let there = |name: &String| request.plugins.iter().any(|plugin| plugin.name == *name);
    let missing: Vec<&str> = needed.iter().filter(|name| !there(name)).map(String::as_str).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("required plugins are not there: {}", missing.join(", "))) }
}

/// The annotation for this container, else for the pod.
fn effective<'a>(pod: &'a PodSandbox, key: &str, container: &str) -> Option<&'a str> {
    let keys = [format!("{key}/container.{container}"), format!("{key}/pod"), key.to_owned()];
    keys.iter().find_map(|key| pod.annotations.get(key)).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::nri::{Container, FieldOwners, OwningPlugins, PluginInstance};

    fn request(field: Field, annotations: &[(&str, &str)]) -> ValidateContainerAdjustmentRequest {
        let mut owners = FieldOwners::default();
        owners.simple.insert(field as i32, "10-x".into());
        owners.compound.entry(field as i32).or_default().owners.insert("entry".into(), "10-x".into());
        ValidateContainerAdjustmentRequest {
            pod: Some(PodSandbox {
                annotations: annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
                ..Default::default()
            }),
            container: Some(Container { id: "c".into(), name: "main".into(), ..Default::default() }),
            owners: Some(OwningPlugins { owners: [("c".to_owned(), owners)].into() }),
            plugins: vec![PluginInstance { name: "there".into(), index: "10".into() }],
            ..Default::default()
        }
    }

    #[test]
    fn each_option_rejects_its_own_adjustment() {
        let on = |set: fn(&mut ValidatorConfig)| {
            let mut config = ValidatorConfig::default();
            set(&mut config);
            config
        };
        for (config, field) in [
            (on(|config| config.reject_oci_hook_adjustment = true), Field::OciHooks),
            (on(|config| config.reject_unconfined_seccomp_adjustment = true), Field::SeccompPolicy),
            (on(|config| config.reject_namespace_adjustment = true), Field::Namespace),
            (on(|config| config.reject_sysctl_adjustment = true), Field::Sysctl),
        ] {
            let error = check(&config, &request(field, &[])).expect_err("rejected");
            assert!(error.contains("10-x"), "{error}");
            check(&config, &request(Field::Env, &[])).expect("another field");
            check(&ValidatorConfig::default(), &request(field, &[])).expect("not asked for");
        }
    }

    #[test]
    fn required_plugins_are_the_nodes_and_the_pods() {
        let needs = |names: &[&str], tolerate: &str| ValidatorConfig {
            required_plugins: names.iter().map(|name| (*name).to_owned()).collect(),
            tolerate_missing_plugins_annotation: tolerate.into(),
            ..Default::default()
        };
        let with = |annotations: &[(&str, &str)]| request(Field::Env, annotations);
        check(&needs(&["there"], ""), &with(&[])).expect("there");
        check(&needs(&["gone"], ""), &with(&[])).expect_err("gone");
        check(&needs(&["gone"], "ok"), &with(&[("ok/pod", "true")])).expect("tolerated");
        check(&needs(&["gone"], "ok"), &with(&[("ok/pod", "false")])).expect_err("not tolerated");
        check(&needs(&["gone"], "ok"), &with(&[("ok/pod", "maybe")])).expect_err("neither");
        let own = "required-plugins.noderesource.dev/container.main";
        check(&needs(&[], ""), &with(&[(own, "[ there ]")])).expect("there");
        assert!(check(&needs(&[], ""), &with(&[(own, "[ gone ]")])).expect_err("gone").contains("gone"));
        check(&needs(&[], ""), &with(&[(own, "{")])).expect_err("no list");
    }
}
