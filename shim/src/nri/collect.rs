//! What several plugins answer to one request, made into one answer: each sees what those before it have changed, and no two may set the
//! same thing. A name with a `-` before it removes; one that removes and adds the same replaces it.

use super::owners::Owners;
use crate::error::{Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet};
use windlass_proto::nri::{
    Container, ContainerAdjustment, ContainerUpdate, CreateContainerRequest, Field, KeyValue, LinuxContainer,
    LinuxContainerAdjustment, LinuxContainerUpdate, LinuxCpu, LinuxDevice, LinuxMemory, LinuxNamespace, LinuxRdt, LinuxResources,
    Mount,
};

/// The name, and whether it is to be removed.
pub(super) fn removal(name: &str) -> (&str, bool) {
    name.strip_prefix('-').map_or((name, false), |name| (name, true))
}

/// What the plugins make of a container that is created.
pub(super) struct Creation {
    /// As the next plugin is asked.
    pub(super) request: CreateContainerRequest,
    pub(super) adjust: ContainerAdjustment,
    pub(super) updates: Updates,
}

impl Creation {
    pub(super) fn new(request: CreateContainerRequest) -> Creation {
        let id = request.container.as_ref().map(|container| container.id.clone()).unwrap_or_default();
        let updates = Updates { created: Some(id), ..Updates::default() };
        Creation { request, adjust: ContainerAdjustment::default(), updates }
    }

    /// Takes one plugin's answer.
    pub(super) fn take(
        &mut self,
        adjust: Option<ContainerAdjustment>,
        updates: Vec<ContainerUpdate>,
        plugin: &str,
    ) -> Result<()> {
        if let Some(adjust) = adjust {
            let container = self.request.container.get_or_insert_default();
            let id = container.id.clone();
            let mut step = Step { id: &id, plugin, owners: &mut self.updates.owners, container, adjust: &mut self.adjust };
            step.take(adjust)?;
        }
        self.updates.take(updates, plugin)
    }
}

/// One plugin's changes of the container that is created.
struct Step<'a> {
    id: &'a str,
    plugin: &'a str,
    owners: &'a mut Owners,
    container: &'a mut Container,
    adjust: &'a mut ContainerAdjustment,
}

/// Something that is added and removed by a name.
trait Named {
    fn name(&self) -> &str;
}

impl Named for Mount {
    fn name(&self) -> &str {
        &self.destination
    }
}

impl Named for LinuxDevice {
    fn name(&self) -> &str {
        &self.path
    }
}

impl Named for KeyValue {
    fn name(&self) -> &str {
        &self.key
    }
}

impl Step<'_> {
    fn claim(&mut self, field: Field, entry: Option<&str>) -> Result<()> {
        self.owners.claim(self.id, field, entry, self.plugin)
    }

    fn take(&mut self, given: ContainerAdjustment) -> Result<()> {
        let mut annotations = std::mem::take(&mut self.adjust.annotations);
        let mut shown = std::mem::take(&mut self.container.annotations);
        self.map(Field::Annotations, given.annotations, &mut annotations, &mut shown)?;
        (self.adjust.annotations, self.container.annotations) = (annotations, shown);

        let mut mounts = std::mem::take(&mut self.adjust.mounts);
        let mut shown = std::mem::take(&mut self.container.mounts);
        self.list(Field::Mounts, given.mounts, &mut mounts, &mut shown)?;
        (self.adjust.mounts, self.container.mounts) = (mounts, shown);

        self.env(given.env)?;
        self.args(given.args)?;
        self.hooks(given.hooks);
        for limit in given.rlimits {
            self.claim(Field::Rlimits, Some(&limit.r#type))?;
            self.container.rlimits.retain(|have| have.r#type != limit.r#type);
            self.container.rlimits.push(limit.clone());
            self.adjust.rlimits.push(limit);
        }
        for device in given.cdi_devices {
            self.claim(Field::CdiDevices, Some(&device.name))?;
            self.adjust.cdi_devices.push(device);
        }
        given.linux.map_or(Ok(()), |linux| self.linux(linux))
    }

    fn env(&mut self, given: Vec<KeyValue>) -> Result<()> {
        let split = |entry: &String| {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            KeyValue { key: key.into(), value: value.into() }
        };
        let mut shown: Vec<KeyValue> = self.container.env.iter().map(split).collect();
        let mut env = std::mem::take(&mut self.adjust.env);
        self.list(Field::Env, given, &mut env, &mut shown)?;
        self.adjust.env = env;
        self.container.env = shown.into_iter().map(|one| format!("{}={}", one.key, one.value)).collect();
        Ok(())
    }

    /// An empty first argument says that it replaces what another plugin has set.
    fn args(&mut self, mut given: Vec<String>) -> Result<()> {
        if given.is_empty() {
            return Ok(());
        }
        if given.first().is_some_and(String::is_empty) {
            given.remove(0);
            self.owners.clear(self.id, Field::Args, None, self.plugin);
        }
        self.claim(Field::Args, None)?;
        self.container.args.clone_from(&given);
        self.adjust.args = given;
        Ok(())
    }

    fn hooks(&mut self, given: Option<windlass_proto::nri::Hooks>) {
        let Some(given) = given else { return };
        let (adjust, shown) = (self.adjust.hooks.get_or_insert_default(), self.container.hooks.get_or_insert_default());
        let mut any = false;
        for (given, adjust, shown) in [
            (given.prestart, &mut adjust.prestart, &mut shown.prestart),
            (given.create_runtime, &mut adjust.create_runtime, &mut shown.create_runtime),
            (given.create_container, &mut adjust.create_container, &mut shown.create_container),
            (given.start_container, &mut adjust.start_container, &mut shown.start_container),
            (given.poststart, &mut adjust.poststart, &mut shown.poststart),
            (given.poststop, &mut adjust.poststop, &mut shown.poststop),
        ] {
            any |= !given.is_empty();
            adjust.extend(given.iter().cloned());
            shown.extend(given);
        }
        if any {
            self.owners.share(self.id, Field::OciHooks, self.plugin);
        }
    }

    fn linux(&mut self, given: LinuxContainerAdjustment) -> Result<()> {
        let mut linux = self.adjust.linux.take().unwrap_or_default();
        let mut shown = self.container.linux.take().unwrap_or_default();
        self.linux_of(given, &mut linux, &mut shown)?;
        (self.adjust.linux, self.container.linux) = (Some(linux), Some(shown));
        Ok(())
    }

    fn linux_of(
        &mut self,
        given: LinuxContainerAdjustment,
        linux: &mut LinuxContainerAdjustment,
        shown: &mut LinuxContainer,
    ) -> Result<()> {
        self.list(Field::Devices, given.devices, &mut linux.devices, &mut shown.devices)?;
        if let Some(resources) = given.resources {
            merge(self.owners, self.id, self.plugin, &resources, shown.resources.get_or_insert_default())?;
            lay(linux.resources.get_or_insert_default(), &resources);
        }
        if !given.cgroups_path.is_empty() {
            self.claim(Field::CgroupsPath, None)?;
            shown.cgroups_path.clone_from(&given.cgroups_path);
            linux.cgroups_path = given.cgroups_path;
        }
        self.one(Field::OomScoreAdj, given.oom_score_adj, &mut linux.oom_score_adj, Some(&mut shown.oom_score_adj))?;
        self.one(Field::IoPriority, given.io_priority, &mut linux.io_priority, Some(&mut shown.io_priority))?;
        self.one(Field::SeccompPolicy, given.seccomp_policy, &mut linux.seccomp_policy, Some(&mut shown.seccomp_policy))?;
        self.one(Field::LinuxSched, given.scheduler, &mut linux.scheduler, Some(&mut shown.scheduler))?;
        self.one(Field::MemoryPolicy, given.memory_policy, &mut linux.memory_policy, None)?;
        self.namespaces(given.namespaces, linux, shown)?;
        self.map(Field::Sysctl, given.sysctl, &mut linux.sysctl, &mut shown.sysctl)?;
        self.map(Field::LinuxNetDevices, given.net_devices, &mut linux.net_devices, &mut shown.net_devices)?;
        given.rdt.map_or(Ok(()), |rdt| self.rdt(rdt, linux.rdt.get_or_insert_default()))
    }

    fn one<T: Clone>(
        &mut self,
        field: Field,
        given: Option<T>,
        adjust: &mut Option<T>,
        shown: Option<&mut Option<T>>,
    ) -> Result<()> {
        if given.is_some() {
            self.claim(field, None)?;
            if let Some(shown) = shown {
                shown.clone_from(&given);
            }
            *adjust = given;
        }
        Ok(())
    }

    fn namespaces(
        &mut self,
        given: Vec<LinuxNamespace>,
        linux: &mut LinuxContainerAdjustment,
        shown: &mut LinuxContainer,
    ) -> Result<()> {
        for namespace in given {
            let (kind, removed) = removal(&namespace.r#type);
            self.claim(Field::Namespace, Some(kind))?;
            shown.namespaces.retain(|have| have.r#type != kind);
            if !removed {
                shown.namespaces.push(namespace.clone());
            }
            linux.namespaces.push(namespace);
        }
        Ok(())
    }

    fn rdt(&mut self, given: LinuxRdt, adjust: &mut LinuxRdt) -> Result<()> {
        let fields = [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring];
        if given.remove {
            fields.into_iter().for_each(|field| self.owners.clear(self.id, field, None, self.plugin));
            *adjust = LinuxRdt { remove: true, ..LinuxRdt::default() };
        }
        self.one(Field::RdtClosId, given.clos_id, &mut adjust.clos_id, None)?;
        self.one(Field::RdtSchemata, given.schemata, &mut adjust.schemata, None)?;
        self.one(Field::RdtEnableMonitoring, given.enable_monitoring, &mut adjust.enable_monitoring, None)
    }

    /// Removals come before additions, wherever they stand.
    fn list<T: Named + Clone>(&mut self, field: Field, given: Vec<T>, adjust: &mut Vec<T>, shown: &mut Vec<T>) -> Result<()> {
        let (gone, added): (Vec<T>, Vec<T>) = given.into_iter().partition(|one| removal(one.name()).1);
        let replaced: BTreeSet<String> = added.iter().map(|one| one.name().to_owned()).collect();
        for one in gone {
            let name = removal(one.name()).0.to_owned();
            self.owners.clear(self.id, field, Some(&name), self.plugin);
            adjust.retain(|have| removal(have.name()).0 != name);
            shown.retain(|have| have.name() != name);
            if !replaced.contains(&name) {
                adjust.push(one);
            }
        }
        for one in added {
            self.claim(field, Some(one.name()))?;
            adjust.retain(|have| removal(have.name()).0 != one.name());
            shown.retain(|have| have.name() != one.name());
            adjust.push(one.clone());
            shown.push(one);
        }
        Ok(())
    }

    fn map<T: Clone + Default>(
        &mut self,
        field: Field,
        given: BTreeMap<String, T>,
        adjust: &mut BTreeMap<String, T>,
        shown: &mut BTreeMap<String, T>,
    ) -> Result<()> {
        let (gone, added): (BTreeMap<_, _>, BTreeMap<_, _>) = given.into_iter().partition(|(name, _)| removal(name).1);
        for (marked, value) in gone {
            let name = removal(&marked).0;
            self.owners.clear(self.id, field, Some(name), self.plugin);
            adjust.remove(name);
            shown.remove(name);
            adjust.insert(marked, value);
        }
        for (name, value) in added {
            self.claim(field, Some(&name))?;
            adjust.remove(&format!("-{name}"));
            adjust.insert(name.clone(), value.clone());
            shown.insert(name, value);
        }
        Ok(())
    }
}

/// Updates of containers that there are, by their ids; the order is that in which they were first asked for.
#[derive(Debug, Default)]
pub(super) struct Updates {
    pub(super) owners: Owners,
    pub(super) list: Vec<ContainerUpdate>,
    /// The container that is created, which cannot be updated yet.
    created: Option<String>,
}

impl Updates {
    /// Those of a request that updates this container, which begin with what it asks for.
    pub(super) fn of(container: &str, asked: LinuxResources) -> Updates {
        let list = vec![update(container, asked)];
        Updates { list, ..Updates::default() }
    }

    /// Takes one plugin's.
    pub(super) fn take(&mut self, updates: Vec<ContainerUpdate>, plugin: &str) -> Result<()> {
        for given in updates {
            let id = given.container_id.clone();
            if self.created.as_ref() == Some(&id) {
                return Err(Error::new(
                    Kind::Precondition,
                    format!("NRI plugin {plugin} updates container {id} while it is created; it may adjust it"),
                ));
            }
            let Some(resources) = given.linux.and_then(|linux| linux.resources) else { continue };
            let at = self.list.iter().position(|have| have.container_id == id).unwrap_or_else(|| {
                self.list
                    .push(ContainerUpdate { ignore_failure: given.ignore_failure, ..update(&id, LinuxResources::default()) });
                self.list.len() - 1
            });
            let Some(have) = self.list.get_mut(at) else { continue };
            have.ignore_failure &= given.ignore_failure;
            let target = have.linux.get_or_insert_default().resources.get_or_insert_default();
            let mut next = target.clone();
            match merge(&mut self.owners, &id, plugin, &resources, &mut next) {
                Ok(()) => *target = next,
                Err(error) if given.ignore_failure => tracing::warn!(plugin, container = %id, %error, "NRI update ignored"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn update(id: &str, resources: LinuxResources) -> ContainerUpdate {
    ContainerUpdate {
        container_id: id.into(),
        linux: Some(LinuxContainerUpdate { resources: Some(resources) }),
        ignore_failure: false,
    }
}

/// Claims everything that is given, and lays it over what there is.
fn merge(owners: &mut Owners, id: &str, plugin: &str, given: &LinuxResources, over: &mut LinuxResources) -> Result<()> {
    let memory = given.memory.unwrap_or_default();
    let cpu = given.cpu.clone().unwrap_or_default();
    let simple = [
        (Field::MemLimit, memory.limit.is_some()),
        (Field::MemReservation, memory.reservation.is_some()),
        (Field::MemSwapLimit, memory.swap.is_some()),
        (Field::MemKernelLimit, memory.kernel.is_some()),
        (Field::MemTcpLimit, memory.kernel_tcp.is_some()),
        (Field::MemSwappiness, memory.swappiness.is_some()),
        (Field::MemDisableOomKiller, memory.disable_oom_killer.is_some()),
        (Field::MemUseHierarchy, memory.use_hierarchy.is_some()),
        (Field::CpuShares, cpu.shares.is_some()),
        (Field::CpuQuota, cpu.quota.is_some()),
        (Field::CpuPeriod, cpu.period.is_some()),
        (Field::CpuRealtimeRuntime, cpu.realtime_runtime.is_some()),
        (Field::CpuRealtimePeriod, cpu.realtime_period.is_some()),
        (Field::CpuSetCpUs, !cpu.cpus.is_empty()),
        (Field::CpuSetMems, !cpu.mems.is_empty()),
        (Field::PidsLimit, given.pids.is_some()),
        (Field::BlockioClass, given.blockio_class.is_some()),
        (Field::RdtClass, given.rdt_class.is_some()),
    ];
    for (field, _) in simple.into_iter().filter(|(_, given)| *given) {
        owners.claim(id, field, None, plugin)?;
    }
    for limit in &given.hugepage_limits {
        owners.claim(id, Field::HugepageLimits, Some(&limit.page_size), plugin)?;
    }
    for key in given.unified.keys() {
        owners.claim(id, Field::CgroupsUnified, Some(key), plugin)?;
    }
    lay(over, given);
    Ok(())
}

/// Lays what is given over what there is.
fn lay(over: &mut LinuxResources, given: &LinuxResources) {
    fn set<T: Clone>(over: &mut Option<T>, given: &Option<T>) {
        if given.is_some() {
            over.clone_from(given);
        }
    }
    fn text(over: &mut String, given: &String) {
        if !given.is_empty() {
            over.clone_from(given);
        }
    }
    if let Some(LinuxMemory { limit, reservation, swap, kernel, kernel_tcp, swappiness, disable_oom_killer, use_hierarchy }) =
        &given.memory
    {
        let over = over.memory.get_or_insert_default();
        set(&mut over.limit, limit);
        set(&mut over.reservation, reservation);
        set(&mut over.swap, swap);
        set(&mut over.kernel, kernel);
        set(&mut over.kernel_tcp, kernel_tcp);
        set(&mut over.swappiness, swappiness);
        set(&mut over.disable_oom_killer, disable_oom_killer);
        set(&mut over.use_hierarchy, use_hierarchy);
    }
    if let Some(LinuxCpu { shares, quota, period, realtime_runtime, realtime_period, cpus, mems }) = &given.cpu {
        let over = over.cpu.get_or_insert_default();
        set(&mut over.shares, shares);
        set(&mut over.quota, quota);
        set(&mut over.period, period);
        set(&mut over.realtime_runtime, realtime_runtime);
        set(&mut over.realtime_period, realtime_period);
        text(&mut over.cpus, cpus);
        text(&mut over.mems, mems);
    }
    for limit in &given.hugepage_limits {
        over.hugepage_limits.retain(|have| have.page_size != limit.page_size);
        over.hugepage_limits.push(limit.clone());
    }
    over.unified.extend(given.unified.clone());
    over.devices.extend(given.devices.iter().cloned());
    set(&mut over.blockio_class, &given.blockio_class);
    set(&mut over.rdt_class, &given.rdt_class);
    set(&mut over.pids, &given.pids);
}

#[cfg(test)]
mod tests;
