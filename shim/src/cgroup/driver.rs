//! Who makes the cgroups of pods: this runtime alone, or systemd down to a scope for each pod.

use super::{
    place::{self, Place},
    systemd::{self, Systemd},
};
use crate::{
    config::{Account, CgroupConfig, DriverChoice},
    error::{Error, Result},
};

/// The driver that pods are run with. Those of another one, from before the configuration was changed, go on as their records say.
pub enum Driver {
    Cgroupfs,
    Systemd(Systemd),
}

impl Driver {
    /// The configured one, or an error where systemd does not answer; `auto` is systemd where it is the first process and answers: with a
    /// second writer in its tree, what either has set may be undone by the other.
    pub async fn start(config: &CgroupConfig, account: Account) -> Result<Driver> {
        let connected = match config.driver {
            DriverChoice::Cgroupfs => return Ok(Driver::Cgroupfs),
            DriverChoice::Auto if !systemd::booted() => return Ok(Driver::Cgroupfs),
            DriverChoice::Systemd if !systemd::booted() => {
                Err(Error::precondition("systemd is not the first process here; \"auto\" and \"cgroupfs\" do without"))
            }
            DriverChoice::Auto | DriverChoice::Systemd => Systemd::connect().await,
        };
        let driver = match connected {
            Ok(systemd) => Driver::Systemd(systemd),
            Err(error) if config.driver == DriverChoice::Auto => {
                tracing::warn!(%error, "systemd runs and does not answer: cgroup.driver is cgroupfs");
                return Ok(Driver::Cgroupfs);
            }
            Err(error) => return Err(error.during("cgroup.driver = \"systemd\"")),
        };
        if account == Account::System {
            return Err(Error::invalid("monitor.account = \"system\": a pod's scope of systemd needs its monitor in it"));
        }
        driver.place("", &config.parent, "").map_err(|error| error.during("cgroup.parent"))?;
        Ok(driver)
    }

    /// Where a pod's cgroups go that asks for a parent, or for none.
    pub fn place(&self, asked: &str, default: &str, pod_id: &str) -> Result<Place> {
        match self {
            Driver::Cgroupfs => place::plain(asked, default),
            Driver::Systemd(systemd) => place::scoped(asked, default, &systemd.root, pod_id),
        }
    }

    pub fn systemd(&self) -> Option<&Systemd> {
        match self {
            Driver::Cgroupfs => None,
            Driver::Systemd(systemd) => Some(systemd),
        }
    }

    /// For a person.
    pub fn describe(&self) -> String {
        match self {
            Driver::Cgroupfs => "cgroupfs".into(),
            Driver::Systemd(systemd) => format!("systemd {}", systemd.version),
        }
    }
}
