//! The built-in bridge as kubelet sees it: both families, PodCIDRs, bandwidth, and thousands of pods that leave nothing.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::Write,
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, pod},
    ground::begin,
    node, soak,
    wait::until,
};
use windlass_proto::cri;

/// Pods of the soak here; `WINDLASS_SOAK_PODS` sets another number.
const SOAK_PODS: usize = 2000;
/// As many of them at a time.
const SOAK_WIDTH: usize = 20;

fn addresses(client: &Client, pod: &str) -> Result<Vec<String>> {
    let network = client.pod(pod)?.network.context("network")?;
    Ok(std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip)).collect())
}

fn assign(client: &Client, cidr: &str) -> Result<(), tonic::Status> {
    let network_config = Some(cri::NetworkConfig { pod_cidr: cidr.into() });
    let request = cri::UpdateRuntimeConfigRequest { runtime_config: Some(cri::RuntimeConfig { network_config }) };
    client.update_runtime_config(request).map(drop)
}

#[test]
fn a_pod_has_both_families_and_reaches_its_neighbour_by_each() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let (first, second) = (client.run(&config)?, client.run(&pod(&daemon.path("logs")))?);
        let neighbour = addresses(&client, &second)?;
        ensure!(neighbour.len() == 2 && neighbour[0].starts_with("10.57.") && neighbour[1].starts_with("fd57:"), "{neighbour:?}");
        let shell = client.create(&first, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&shell)?;
        for (ping, address) in [("ping", &neighbour[0]), ("ping6", &neighbour[1])] {
            let run = client.exec(&shell, &[ping, "-c", "1", "-W", "3", address])?;
            ensure!(run.exit_code == 0, "{ping} {address}: {run:?}");
            node::run_command("/bin/busybox", &[ping, "-c", "1", "-W", "3", address])?;
        }
        let listens = client.exec(&shell, &["cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra"])?;
        ensure!(listens.stdout == b"0\n", "a neighbour could be its router: {listens:?}");
        client.remove(&first)?;
        client.remove(&second)?;
        before.expect_again(&daemon)
    })
}

/// As kube-proxy leads a service's address to its pods, with bridged packets passing the rules as kubeadm wants it.
#[test]
fn a_pod_reaches_itself_and_its_neighbour_through_a_service() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1").context("let bridged packets pass the rules")?;
        let mut pods = Vec::new();
        for _ in 0..2 {
            let config = pod(&daemon.path("logs"));
            let id = client.run(&config)?;
            let serve = "mkdir /www; hostname -i > /www/address; exec httpd -f -p 8080 -h /www";
            let shell = client.create(&id, &config, &container(&config, "main", &["sh", "-c", serve]))?;
            client.start(&shell)?;
            pods.push((addresses(&client, &id)?.swap_remove(0), shell, id));
        }
        for (address, ..) in &pods {
            let lead = "add table ip service; add chain ip service in { type nat hook prerouting priority dstnat; }; \
                        add chain ip service out { type nat hook postrouting priority srcnat; }; flush table ip service; ";
            let to = format!("add rule ip service in ip daddr 10.96.0.9 tcp dport 80 dnat to {address}:8080; ");
            let from = format!("add rule ip service out ct status dnat ip saddr {address} ip daddr {address} masquerade");
            node::run_command("nft", &[&format!("{lead}{to}{from}")])?;
            for (_, shell, _) in &pods {
                let ask = "printf 'GET /address HTTP/1.0\\r\\n\\r\\n' | nc -w 3 10.96.0.9 80 | tail -n 1";
                until("the service answers", || Ok((client.shell(shell, ask)? == *address).then_some(())))?;
            }
        }
        node::run_command("nft", &["delete table ip service"])?;
        pods.iter().try_for_each(|(_, _, id)| client.remove(id))?;
        before.expect_again(&daemon)
    })
}

#[test]
fn pod_cidrs_are_for_new_pods_outlive_the_daemon_and_wrong_ones_are_named() -> Result<()> {
    node::run(|| {
        let (mut daemon, mut client, before) = begin()?;
        let logs = daemon.path("logs");
        let old = client.run(&pod(&logs))?;
        for (wrong, word) in [
            ("10.1.0.0", "\"10.1.0.0\" is not a network"),
            ("10.1.0.0/24,10.2.0.0/24", "at most one subnet of each family"),
            ("10.1.0.7/24", "\"10.1.0.7/24\" is not a network"),
        ] {
            let error = assign(&client, wrong).expect_err(wrong);
            ensure!(error.code() == tonic::Code::InvalidArgument, "{error}");
            ensure!(error.message().contains("network_config.pod_cidr") && error.message().contains(word), "{error}");
        }
        assign(&client, "")?;
        assign(&client, "10.244.3.0/24,fd44:3::/64")?;
        let new = client.run(&pod(&logs))?;
        ensure!(addresses(&client, &new)? == ["10.244.3.2", "fd44:3::2"], "{:?}", addresses(&client, &new)?);
        let kept = addresses(&client, &old)?;
        node::run_command("/bin/busybox", &["ping", "-c", "1", "-W", "3", &kept[0]])?;
        daemon.kill9()?;
        daemon.serve()?;
        client = Client::connect(&daemon)?;
        let newest = client.run(&pod(&logs))?;
        ensure!(addresses(&client, &newest)?[0] == "10.244.3.3", "{:?}", addresses(&client, &newest)?);
        ensure!(addresses(&client, &old)? == kept);
        for id in [&old, &new, &newest] {
            for address in addresses(&client, id)? {
                let ping = if address.contains(':') { "ping6" } else { "ping" };
                node::run_command("/bin/busybox", &[ping, "-c", "1", "-W", "3", &address])?;
            }
        }
        let status = client.status(cri::StatusRequest { verbose: true })?;
        let network = status.info.get("network").context("network")?;
        ensure!(network.contains("10.244.3.0/24") && network.contains("fd44:3::/64"), "{network}");
        for id in [&old, &new, &newest] {
            client.remove(id)?;
        }
        assign(&client, "10.57.0.0/16,fd57:494e:444c::/64")?;
        before.expect_again(&daemon)
    })
}

#[test]
fn bandwidth_annotations_are_kept_and_wrong_ones_refused() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let mut config = pod(&daemon.path("logs"));
        config.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "fast".into());
        let error = client.run(&config).expect_err("no rate");
        ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains("\"fast\""), "{error}");
        before.expect_again(&daemon)?;
        config.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "16M".into());
        config.annotations.insert("kubernetes.io/egress-bandwidth".into(), "16M".into());
        let id = client.run(&config)?;
        let server = client.create(&id, &config, &container(&config, "main", &["nc", "-l", "-p", "7", "-e", "cat"]))?;
        client.start(&server)?;
        let address = addresses(&client, &id)?.swap_remove(0);
        // 1 MB there and back at 2 MB/s; 20 ms' worth of each is free.
        let sent = vec![b'x'; 1_000_000];
        let mut stream =
            windlass_integration::wait::until("the server", || Ok(std::net::TcpStream::connect((address.as_str(), 7)).ok()))?;
        let begun = Instant::now();
        let (mut writer, payload) = (stream.try_clone()?, sent.clone());
        let writing = std::thread::spawn(move || writer.write_all(&payload));
        let mut heard = vec![0; sent.len()];
        std::io::Read::read_exact(&mut stream, &mut heard)?;
        let took = begun.elapsed();
        writing.join().ok().context("writer")??;
        ensure!(heard == sent && took > Duration::from_millis(400), "{took:?} for what takes 500 ms");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn many_pods_at_a_time_leave_nothing_and_the_last_starts_as_fast() -> Result<()> {
    node::run(|| {
        let (daemon, _, before) = begin()?;
        let file = daemon.root().join("network/addresses.json");
        let held = || -> Result<usize> {
            let stored: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
            Ok(stored["pods"].as_object().context("pods")?.len())
        };
        ensure!(held()? == 0);
        let clients = (0..SOAK_WIDTH).map(|_| Client::connect(&daemon)).collect::<Result<Vec<_>>>()?;
        let logs = daemon.path("logs");
        let report = soak::run(clients, soak::number("WINDLASS_SOAK_PODS", SOAK_PODS)?, || {
            let mut config = pod(&logs);
            let number: u16 = config.hostname.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or_default();
            // Every fourth has a port of the host.
            if number.is_multiple_of(4) {
                let host_port = i32::from(number % 20_000) + 20_000;
                config.port_mappings.push(cri::PortMapping { container_port: 80, host_port, ..Default::default() });
            }
            config
        })?;
        println!("{report}");
        let (first, last) = report.ends();
        ensure!(last < first * 5 + Duration::from_secs(2), "the last pods start slower: {report}");
        ensure!(held()? == 0, "addresses are held");
        before.expect_again(&daemon)
    })
}
