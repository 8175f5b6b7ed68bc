//! The CRI's metrics as a test looks at them: checked against their descriptors, and found by name and labels.

use crate::client::Client;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use windlass_proto::cri;

/// All metrics of a moment.
pub struct Metrics {
    keys: BTreeMap<String, Vec<String>>,
    all: Vec<cri::Metric>,
}

impl Metrics {
    /// Takes them, and fails unless each is described, has a label for each key, has the type that its name promises and is told once.
    pub fn take(client: &Client) -> Result<Metrics> {
        let descriptors = client.list_metric_descriptors(cri::ListMetricDescriptorsRequest {})?.descriptors;
        let pods = client.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {})?.pod_metrics;
        let mut keys = BTreeMap::new();
        for descriptor in descriptors {
            ensure!(!descriptor.help.is_empty(), "{} has no help", descriptor.name);
            let name = descriptor.name.clone();
            ensure!(keys.insert(descriptor.name, descriptor.label_keys).is_none(), "{name} is described twice");
        }
        let mut all = Vec::new();
        for pod in pods {
            all.extend(pod.metrics);
            all.extend(pod.container_metrics.into_iter().flat_map(|container| container.metrics));
        }
        let mut told = BTreeSet::new();
        for metric in &all {
            let keys = keys.get(&metric.name).with_context(|| format!("{} is not described", metric.name))?;
            ensure!(keys.len() == metric.label_values.len(), "{keys:?} are the keys of {metric:?}");
            ensure!(metric.value.is_some() && metric.timestamp == 0, "{metric:?}");
            ensure!(told.insert((&metric.name, &metric.label_values)), "told twice: {metric:?}");
            let total = metric.name.ends_with("_total") && metric.name != "container_fs_inodes_total";
            ensure!(!total || metric.metric_type() == cri::MetricType::Counter, "{metric:?}");
        }
        Ok(Metrics { keys, all })
    }

    /// Values of a metric with these labels.
    pub fn values(&self, name: &str, labels: &[(&str, &str)]) -> Vec<u64> {
        let Some(keys) = self.keys.get(name) else { return Vec::new() };
        let has = |metric: &&cri::Metric| {
            let label = |wanted: &str| keys.iter().position(|key| key == wanted).and_then(|at| metric.label_values.get(at));
            metric.name == name && labels.iter().all(|(key, value)| label(key).is_some_and(|found| found == value))
        };
        self.all.iter().filter(has).filter_map(|metric| metric.value.map(|value| value.value)).collect()
    }

    /// The one value with these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<u64> {
        match self.values(name, labels)[..] {
            [value] => Ok(value),
            ref values => anyhow::bail!("{name}{labels:?} has the values {values:?}"),
        }
    }

    /// Names that have a value with these labels.
    pub fn names(&self, labels: &[(&str, &str)]) -> BTreeSet<&str> {
        let names: BTreeSet<&str> = self.all.iter().map(|metric| metric.name.as_str()).collect();
        names.into_iter().filter(|name| !self.values(name, labels).is_empty()).collect()
    }

    /// All names that are described.
    pub fn described(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    pub fn labels_of(&self, name: &str) -> Option<&[String]> {
        self.keys.get(name).map(Vec::as_slice)
    }
}
