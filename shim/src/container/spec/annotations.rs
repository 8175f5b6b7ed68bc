//! Annotations of a bundle: who the container is, by the names that containerd gave them and that hooks and runtimes look for, and those of pod and
//! container that the configuration lets through.

use super::Input;
use crate::{config::Config, container::create, glob, pod};
use std::collections::{BTreeMap, HashMap};

/// Before each of the names.
const PREFIX: &str = "io.kubernetes.cri.";

/// Annotations of the container's bundle.
pub(super) fn build(input: &Input) -> BTreeMap<String, String> {
    let mut found = of_pod(&input.node.config, &input.pod);
    let passed = input.node.config.passed_annotations(&input.pod.runtime_handler);
    found.extend(selected(&input.config.annotations, passed.of_containers));
    let name = input.config.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default();
    let own = [("container-name", name), ("image-name", create::image_name(&input.config, &input.image))];
    found.extend(names(&input.pod, "container").chain(named(own)));
    found
}

/// Annotations that tell of the pod alone.
pub(crate) fn of_sandbox(config: &Config, pod: &pod::Record) -> BTreeMap<String, String> {
    let mut found = of_pod(config, pod);
    found.extend(names(pod, "sandbox"));
    found
}

fn of_pod(config: &Config, pod: &pod::Record) -> BTreeMap<String, String> {
    selected(&pod.config.annotations, config.passed_annotations(&pod.runtime_handler).of_pods).collect()
}

fn names(pod: &pod::Record, kind: &str) -> impl Iterator<Item = (String, String)> {
    let meta = pod.config.metadata.clone().unwrap_or_default();
    named([
        ("container-type", kind.to_owned()),
        ("sandbox-id", pod.id.clone()),
        ("sandbox-name", meta.name),
        ("sandbox-namespace", meta.namespace),
        ("sandbox-uid", meta.uid),
    ])
}

fn named<const N: usize>(list: [(&'static str, String); N]) -> impl Iterator<Item = (String, String)> {
    list.into_iter().map(|(name, value)| (format!("{PREFIX}{name}"), value))
}

fn selected<'a>(given: &'a HashMap<String, String>, patterns: &'a [String]) -> impl Iterator<Item = (String, String)> + 'a {
    let wanted = |key: &str| patterns.iter().any(|pattern| glob::matches(pattern, key));
    given.iter().filter(move |(key, _)| wanted(key)).map(|(key, value)| (key.clone(), value.clone()))
}
