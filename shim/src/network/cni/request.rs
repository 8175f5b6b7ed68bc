//! What plugins are told: `CNI_ARGS`, `runtimeConfig` and the configuration on standard input, as libcni makes them.

use serde_json::{Map, Value, json};

use super::config::{NetworkList, Plugin};
use crate::network::Attachment;
use crate::network::bandwidth::Bandwidth;

/// The largest burst that the bandwidth plugin takes, in bits; the rate alone is to count.
const BURST: u64 = u32::MAX as u64;

/// `CNI_ARGS` of a pod.
pub(super) fn arguments(pod: &str, name: &str, namespace: &str, uid: &str) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={pod};K8S_POD_UID={uid}"
    )
}

/// All that a plugin can have the capability for.
pub(super) fn runtime(pod: &Attachment, pod_cidrs: &[String]) -> Result<Map<String, Value>, String> {
    let mut all = Map::new();
    let mut put = |name: &str, value: Value| all.insert(name.to_owned(), value);
    if !pod.port_mappings.is_empty() {
        let mappings = pod.port_mappings.iter().map(|mapping| {
            let mut value = json!({
                "hostPort": mapping.host_port, "containerPort": mapping.container_port, "protocol": mapping.protocol,
            });
            if let Some(ip) = mapping.host_ip {
                value["hostIP"] = json!(ip);
            }
            value
        });
        put("portMappings", mappings.collect());
    }
    let mut bandwidth = Map::new();
    let limits = Bandwidth::of(&pod.annotations)?;
    for (direction, rate) in [("ingress", limits.ingress), ("egress", limits.egress)] {
        if let Some(rate) = rate {
            bandwidth.insert(format!("{direction}Rate"), json!(rate));
            bandwidth.insert(format!("{direction}Burst"), json!(BURST));
        }
    }
    if !bandwidth.is_empty() {
        put("bandwidth", Value::Object(bandwidth));
    }
    if !(pod.dns.servers.is_empty() && pod.dns.searches.is_empty() && pod.dns.options.is_empty()) {
        put("dns", json!(pod.dns));
    }
    if !pod_cidrs.is_empty() {
        put("ipRanges", pod_cidrs.iter().map(|cidr| json!([{ "subnet": cidr }])).collect());
    }
    let mut aliases = vec![pod.name.as_str()];
    aliases.extend(Some(pod.hostname.as_str()).filter(|hostname| !hostname.is_empty() && *hostname != pod.name));
    put("aliases", json!(aliases));
    put("io.kubernetes.cri.pod-annotations", json!(pod.annotations));
    put("cgroupPath", json!(pod.cgroup_parent));
    Ok(all)
}

/// What the pod asks for that no plugin of the network has the capability for. It is not refused: an agent of the network may see to it
/// by itself, as Cilium does to host ports.
pub(super) fn ungranted(network: &NetworkList, runtime: &Map<String, Value>) -> Vec<&'static str> {
    let missing = |name: &&'static str| {
        runtime.contains_key(*name) && !network.plugins.iter().any(|plugin| plugin.capabilities.contains(*name))
    };
    ["portMappings", "bandwidth"].into_iter().filter(missing).collect()
}

/// A plugin's standard input: its part of the file with the network's name and version, the result so far, and what of the runtime's
/// data it has the capability for.
pub(super) fn input(
    network: &NetworkList,
    plugin: &Plugin,
    runtime: &Map<String, Value>,
    previous: Option<&Value>,
    extra: &[(&str, Value)],
) -> Vec<u8> {
    let mut config = plugin.config.clone();
    config.insert("name".to_owned(), json!(network.name));
    config.insert("cniVersion".to_owned(), json!(network.version));
    config.remove("cniVersions");
    let granted: Map<String, Value> = runtime
        .iter()
        .filter(|(name, _)| plugin.capabilities.contains(name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !granted.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(granted));
    }
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    config.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    Value::Object(config).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_plugin_gets_what_it_has_the_capability_for() {
        let text = r#"{"name":"n","cniVersion":"1.0.0","plugins":[
            {"type":"a","x":1,"capabilities":{"portMappings":true,"dns":false}},{"type":"b"}]}"#;
        let network = super::super::config::parse(Path::new("f"), text).unwrap();
        let runtime = Map::from_iter([("portMappings".to_owned(), json!([1])), ("dns".to_owned(), json!({}))]);
        let inputs = network.plugins.iter().map(|plugin| input(&network, plugin, &runtime, Some(&json!({"ips": []})), &[]));
        let inputs: Vec<Value> = inputs.map(|bytes| serde_json::from_slice(&bytes).unwrap()).collect();
        let expected = [
            json!({"type": "a", "x": 1, "capabilities": {"portMappings": true, "dns": false}, "name": "n", "cniVersion": "1.0.0",
                "runtimeConfig": {"portMappings": [1]}, "prevResult": {"ips": []}}),
            json!({"type": "b", "name": "n", "cniVersion": "1.0.0", "prevResult": {"ips": []}}),
        ];
        assert_eq!(inputs, expected);
        let asked = Map::from_iter(["portMappings", "bandwidth", "dns"].map(|name| (name.to_owned(), json!({}))));
        assert_eq!(ungranted(&network, &asked), ["bandwidth"]);
        assert_eq!(ungranted(&network, &runtime), [""; 0]);
    }
}
