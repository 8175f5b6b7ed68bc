//! The files that pulls read: registries, credentials, policies.

use super::{Node, report::Report};
use crate::image::{RegistryFiles, TrustFiles, check_files};
use std::os::unix::fs::PermissionsExt;

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("registries");
    let images = &node.config.images;
    let registries = RegistryFiles {
        hosts: images.registry_config_dir.clone(),
        registries_conf: images.registries_conf.clone(),
        auth_file: images.auth_file.clone(),
    };
    let trust = TrustFiles { policy: images.policy.clone(), by_namespace: images.policy_dir.clone() };
    let files = check_files(&registries, &trust);
    if files.is_empty() {
        report.ok("nothing is configured: images are pulled from the registries that their names say, without credentials");
    }
    for (path, outcome) in files {
        let shown = path.display();
        match outcome {
            Ok(()) => report.ok(format!("{shown} is understood")),
            Err(why) if why.contains("ermission denied") && !node.root => report.unseen(format!("{shown}"), "run as root"),
            Err(why) => {
                let named = if why.contains(&shown.to_string()) { why } else { format!("{shown}: {why}") };
                report.error(
                    format!("{named}: pulls that it is about fail"),
                    "correct it; the next pull reads it anew, without a restart",
                );
            }
        }
    }
    let secret = &images.auth_file;
    if std::fs::metadata(secret).is_ok_and(|about| about.permissions().mode() & 0o007 != 0) {
        report.warning(
            format!("{} can be read by everybody, and has passwords", secret.display()),
            format!("chmod 600 {}", secret.display()),
        );
    }
    proxies(report);
}

/// A proxy that a shell has and the daemon has not is a known trap.
fn proxies(report: &mut Report) {
    let set: Vec<&str> = ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"]
        .into_iter()
        .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
        .collect();
    if !set.is_empty() {
        report.ok(format!(
            "{} of this shell: the daemon has only those of its unit (systemctl edit windlass: Environment=HTTPS_PROXY=...)",
            set.join(", ")
        ));
    }
}
