//! Programs that cannot be started: a container that has exited with code 128 and reason StartError, and says why.

use anyhow::{Result, ensure};
use serde_json::json;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    image,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

/// The first bytes of a program for s390x, which is big-endian.
const FOREIGN: [u8; 64] = {
    let mut header = [0u8; 64];
    let start = [0x7f, b'E', b'L', b'F', 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 22, 0, 0, 0, 1];
    let mut index = 0;
    while index < start.len() {
        header[index] = start[index];
        index += 1;
    }
    header
};

#[test]
fn what_cannot_be_started_says_why() -> Result<()> {
    node::run(|| {
        let [busybox, probe] = image::layers()?;
        let programs = image::programs_layer(&[
            ("foreign", &FOREIGN),
            ("text", b"echo no shebang\n"),
            ("script", b"#!/no/such/interpreter\n"),
            ("empty", b""),
        ])?;
        let daemon = Daemon::start_with(vec![(image::BUSYBOX, vec![busybox, probe, programs], json!({}))])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let pod = client.run(&config)?;
        let before = Snapshot::take(&daemon)?;
        let long = "x".repeat(200_000);
        let cases: [(&str, &[&str], &[&str]); 11] = [
            ("/", &["nothing-like-it"], &["\"nothing-like-it\"", "not found in PATH", "/bin"]),
            ("/", &["/no/such"], &["/no/such", "not found"]),
            ("/", &["/etc/passwd/x"], &["/etc/passwd/x", "not found"]),
            ("/", &["/etc"], &["/etc", "is a directory"]),
            ("/", &["/etc/passwd"], &["/etc/passwd", "not executable"]),
            ("/", &["/foreign"], &["/foreign", "not a program of this machine"]),
            ("/", &["/text"], &["/text", "#!"]),
            ("/", &["/empty"], &["/empty", "not a program"]),
            ("/", &["/script"], &["/script", "interpreter"]),
            ("/", &["true", &long], &["true", "128 KiB"]),
            ("/etc/passwd", &["true"], &["/etc/passwd"]),
        ];
        for (index, (directory, command, words)) in cases.into_iter().enumerate() {
            let mut wanted = container(&config, &format!("case-{index}"), command);
            wanted.working_dir = directory.into();
            let id = client.create(&pod, &config, &wanted)?;
            let error = client.start(&id).expect_err("cannot be started");
            let status = client.container(&id)?;
            ensure!(status.state() == cri::ContainerState::ContainerExited, "{words:?}: {status:?}");
            ensure!(status.exit_code == 128 && status.reason == "StartError", "{words:?}: {status:?}");
            for word in words {
                ensure!(error.message().contains(word) && status.message.contains(word), "{word:?} in {error}, {status:?}");
            }
            ensure!(status.message.len() < 1000, "{} bytes of message", status.message.len());
            client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        }
        before.expect_again(&daemon)
    })
}
