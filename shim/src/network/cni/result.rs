//! The answer of a plugin's ADD, in every version of the specification: read, changed into another version, and as a pod's network.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::config::Version;
use crate::config::Family;
use crate::network::{Interface, PodNetwork};

/// Reads an ADD's output and gives it in the network's version, so that the next plugin understands it.
pub(super) fn read(output: &[u8], version: Version) -> Result<Value, String> {
    let parsed: Value = serde_json::from_slice(output).map_err(|error| format!("result is not JSON: {error}"))?;
    let Value::Object(mut result) = parsed else { return Err("result is not an object".to_owned()) };
    // Plugins that leave the version out mean the one that they were given.
    let own = match result.get("cniVersion").and_then(Value::as_str).filter(|text| !text.is_empty()) {
        None => version,
        Some(text) => Version::try_from(text.to_owned()).map_err(|why| format!("result.cniVersion: {why}"))?,
    };
    addresses(&result)?;
    convert(&mut result, own, version);
    Ok(Value::Object(result))
}

/// Down to a version without them, new fields go; addresses say their family up to 0.4.0 and not after it.
fn convert(result: &mut Map<String, Value>, from: Version, to: Version) {
    result.insert("cniVersion".to_owned(), json!(to));
    for ip in objects(result.get_mut("ips")) {
        if to >= Version::PLAIN_ADDRESSES {
            ip.remove("version");
        } else if let Some(address) = ip.get("address").and_then(Value::as_str) {
            let family = if address.contains(':') { "6" } else { "4" };
            ip.insert("version".to_owned(), json!(family));
        }
    }
    if from >= Version::STATUS && to < Version::STATUS {
        for interface in objects(result.get_mut("interfaces")) {
            interface.retain(|field, _| matches!(field.as_str(), "name" | "mac" | "sandbox"));
        }
        for route in objects(result.get_mut("routes")) {
            route.retain(|field, _| matches!(field.as_str(), "dst" | "gw"));
        }
    }
}

fn objects(list: Option<&mut Value>) -> impl Iterator<Item = &mut Map<String, Value>> {
    list.and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

/// An address of a result: of which interface, and its gateway.
struct Address {
    interface: Option<usize>,
    ip: IpAddr,
    gateway: Option<IpAddr>,
}

fn addresses(result: &Map<String, Value>) -> Result<Vec<Address>, String> {
    let ips = match result.get("ips") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(ips) => ips.as_array().ok_or("result.ips is not a list")?,
    };
    let address = |(index, ip): (usize, &Value)| {
        let text = ip["address"].as_str().unwrap_or_default();
        let parsed = text.split_once('/').and_then(|(address, _)| address.parse().ok());
        Ok(Address {
            interface: ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok()),
            ip: parsed.ok_or_else(|| format!("result.ips[{index}].address {text:?} is not an address with a prefix"))?,
            gateway: ip["gateway"].as_str().and_then(|gateway| gateway.parse().ok()),
        })
    };
    ips.iter().enumerate().map(address).collect()
}

/// What the pod got. Fails when it has no address: nobody could reach it, and kubelet would make it anew for ever.
pub(super) fn pod_network(result: &Value, interface: &str, preferred: Family) -> Result<PodNetwork, String> {
    let empty = Map::new();
    let result = result.as_object().unwrap_or(&empty);
    let addresses = addresses(result)?;
    let listed = result.get("interfaces").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let interfaces: Vec<Interface> = listed
        .iter()
        .enumerate()
        .map(|(index, value)| Interface {
            name: text(value, "name"),
            mac: text(value, "mac"),
            in_pod: !text(value, "sandbox").is_empty(),
            ips: addresses.iter().filter(|address| address.interface == Some(index)).map(|address| address.ip).collect(),
        })
        .collect();
    let in_pod = |address: &&Address| match address.interface {
        Some(index) => interfaces.get(index).is_none_or(|interface| interface.in_pod),
        None => true,
    };
    let mut ips: Vec<IpAddr> = Vec::new();
    let mut gateways: Vec<IpAddr> = Vec::new();
    for address in addresses.iter().filter(in_pod) {
        if !ips.contains(&address.ip) {
            ips.push(address.ip);
        }
        gateways.extend(address.gateway.filter(|new| gateways.iter().all(|old| old.is_ipv4() != new.is_ipv4())));
    }
    if ips.is_empty() {
        return Err("the result gives the pod no address".to_owned());
    }
    // Stable: within a family the plugin's order stays.
    match preferred {
        Family::Ipv4 => ips.sort_by_key(|ip| !ip.is_ipv4()),
        Family::Ipv6 => ips.sort_by_key(|ip| !ip.is_ipv6()),
        Family::Cni => {}
    }
    let own = interfaces.iter().find(|found| found.in_pod && found.name == interface);
    let host = interfaces.iter().rev().find(|found| !found.in_pod);
    Ok(PodNetwork {
        interface: interface.to_owned(),
        host_interface: host.map(|host| host.name.clone()).unwrap_or_default(),
        mac: own.map(|own| own.mac.clone()).unwrap_or_default(),
        ips,
        gateways,
        interfaces,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::try_from(text.to_owned()).unwrap()
    }

    #[test]
    fn results_change_their_version() {
        let old = json!({"cniVersion": "0.3.1", "ips": [
            {"version": "4", "address": "10.1.0.2/16", "gateway": "10.1.0.1"}, {"version": "6", "address": "fd00::2/64"}]});
        let plain = json!({"cniVersion": "1.0.0", "ips": [
            {"address": "10.1.0.2/16", "gateway": "10.1.0.1"}, {"address": "fd00::2/64"}]});
        let new = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.2/16", "gateway": "10.1.0.1"}, {"address": "fd00::2/64"}],
            "interfaces": [{"name": "eth0", "sandbox": "/n", "mtu": 1400}], "routes": [{"dst": "0.0.0.0/0", "priority": 5}]});
        let named = |mut value: Value, version: &str| {
            value["cniVersion"] = json!(version);
            value
        };
        let lowered = json!({"cniVersion": "0.4.0", "ips": old["ips"], "interfaces": [{"name": "eth0", "sandbox": "/n"}],
            "routes": [{"dst": "0.0.0.0/0"}]});
        for (given, to, expected) in [
            (old.clone(), "0.3.1", old.clone()),
            (old.clone(), "0.4.0", named(old.clone(), "0.4.0")),
            (old.clone(), "1.0.0", plain.clone()),
            (old.clone(), "1.1.0", named(plain.clone(), "1.1.0")),
            (plain.clone(), "0.3.1", old.clone()),
            (new.clone(), "1.1.0", new.clone()),
            (new, "0.4.0", lowered),
            (named(plain.clone(), ""), "1.0.0", plain),
        ] {
            assert_eq!(read(given.to_string().as_bytes(), version(to)), Ok(expected), "{given} to {to}");
        }
    }

    #[test]
    fn what_is_no_result_is_refused() {
        for (text, part) in [
            ("garbage", "not JSON"),
            ("", "not JSON"),
            ("[]", "not an object"),
            (r#"{"cniVersion":"7.0.0"}"#, "result.cniVersion: version \"7.0.0\""),
            (r#"{"ips":{}}"#, "result.ips is not a list"),
            (r#"{"ips":[{"address":"10.0.0.1"}]}"#, "result.ips[0].address \"10.0.0.1\""),
        ] {
            let error = read(text.as_bytes(), version("1.0.0")).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_pods_addresses_are_those_inside_it_in_the_preferred_order() {
        let result = json!({
            "interfaces": [{"name": "br", "mac": "a"}, {"name": "veth1"}, {"name": "eth0", "mac": "b", "sandbox": "/n"}],
            "ips": [{"interface": 2, "address": "fd00::2/64", "gateway": "fd00::1"}, {"interface": 0, "address": "10.9.0.1/24"},
                    {"interface": 2, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}, {"address": "10.9.0.2/24"}]});
        for (preferred, expected) in [
            (Family::Ipv4, ["10.9.0.2", "fd00::2"]),
            (Family::Ipv6, ["fd00::2", "10.9.0.2"]),
            (Family::Cni, ["fd00::2", "10.9.0.2"]),
        ] {
            let network = pod_network(&result, "eth0", preferred).unwrap();
            assert_eq!(network.ips.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
            assert_eq!((network.mac.as_str(), network.host_interface.as_str(), network.gateways.len()), ("b", "veth1", 2));
        }
        assert!(pod_network(&json!({}), "eth0", Family::Cni).is_err());
    }
}
