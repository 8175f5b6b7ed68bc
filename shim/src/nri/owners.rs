//! Which plugin has set what: two that set the same thing of one container are a conflict, unless the later has removed it first.

use crate::error::{Error, Kind, Result};
use std::collections::{BTreeMap, btree_map::Entry};
use windlass_proto::nri::{CompoundFieldOwners, Field, FieldOwners, OwningPlugins};

/// Of one thing: who has set it, who has removed what another had set and may set it anew, or who has removed what no plugin had set, which
/// anyone may set.
#[derive(Debug, Clone)]
enum Owner {
    Set(String),
    Cleared(String),
    Removed(String),
}

/// Of all containers that one request is about. A field of many entries is owned entry by entry.
#[derive(Debug, Default)]
pub(super) struct Owners(BTreeMap<String, BTreeMap<(Field, Option<String>), Owner>>);

impl Owners {
    /// Takes a field, or one entry of it, for a plugin.
    pub(super) fn claim(&mut self, container: &str, field: Field, entry: Option<&str>, plugin: &str) -> Result<()> {
        let fields = self.0.entry(container.to_owned()).or_default();
        match fields.entry((field, entry.map(str::to_owned))) {
            Entry::Vacant(vacant) => {
                vacant.insert(Owner::Set(plugin.to_owned()));
                Ok(())
            }
            Entry::Occupied(mut taken) => match taken.get() {
                Owner::Removed(_) => {
                    taken.insert(Owner::Set(plugin.to_owned()));
                    Ok(())
                }
                Owner::Cleared(by) if by == plugin => {
                    taken.insert(Owner::Set(plugin.to_owned()));
                    Ok(())
                }
                Owner::Set(other) | Owner::Cleared(other) => {
                    let what = entry.map(|entry| format!(" {entry:?}")).unwrap_or_default();
                    Err(Error::new(
                        Kind::Precondition,
                        format!(
                            "NRI plugins {other} and {plugin} both set {}{what} of container {container}",
                            field.as_str_name()
                        ),
                    ))
                }
            },
        }
    }

    /// A plugin removes what others may have set, or what there was before.
    pub(super) fn clear(&mut self, container: &str, field: Field, entry: Option<&str>, plugin: &str) {
        let fields = self.0.entry(container.to_owned()).or_default();
        let key = (field, entry.map(str::to_owned));
        let next = match fields.get(&key) {
            Some(Owner::Set(_) | Owner::Cleared(_)) => Owner::Cleared,
            Some(Owner::Removed(_)) | None => Owner::Removed,
        };
        fields.insert(key, next(plugin.to_owned()));
    }

    /// Several plugins may add to this field.
    pub(super) fn share(&mut self, container: &str, field: Field, plugin: &str) {
        let fields = self.0.entry(container.to_owned()).or_default();
        let all = match fields.get(&(field, None)) {
            Some(Owner::Set(others)) => format!("{others},{plugin}"),
            _ => plugin.to_owned(),
        };
        fields.insert((field, None), Owner::Set(all));
    }

    /// As validators are told. Who removes has a `-` before his name.
    pub(super) fn message(&self) -> OwningPlugins {
        let name = |owner: &Owner| match owner {
            Owner::Set(plugin) => plugin.clone(),
            Owner::Cleared(plugin) | Owner::Removed(plugin) => format!("-{plugin}"),
        };
        let of_one = |fields: &BTreeMap<(Field, Option<String>), Owner>| {
            let mut message = FieldOwners::default();
            for ((field, entry), owner) in fields {
                match entry {
                    None => {
                        message.simple.insert(*field as i32, name(owner));
                    }
                    Some(entry) => {
                        let owners: &mut CompoundFieldOwners = message.compound.entry(*field as i32).or_default();
                        owners.owners.insert(entry.clone(), name(owner));
                    }
                }
            }
            message
        };
        OwningPlugins { owners: self.0.iter().map(|(id, fields)| (id.clone(), of_one(fields))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_plugins_may_not_set_the_same_but_one_may_remove_and_set_it() {
        let mut owners = Owners::default();
        let env = |owners: &mut Owners, key: &str, plugin: &str| owners.claim("c", Field::Env, Some(key), plugin);
        env(&mut owners, "A", "00-a").expect("free");
        env(&mut owners, "B", "01-b").expect("another entry");
        owners.claim("d", Field::Env, Some("A"), "01-b").expect("another container");
        let error = env(&mut owners, "A", "01-b").expect_err("taken");
        assert!(error.message.contains("00-a and 01-b both set Env \"A\""), "{error}");
        owners.clear("c", Field::Env, Some("A"), "01-b");
        env(&mut owners, "A", "02-c").expect_err("removed by another");
        env(&mut owners, "A", "01-b").expect("removed by itself");
        env(&mut owners, "A", "01-b").expect_err("twice");
        owners.clear("c", Field::Env, Some("PATH"), "00-a");
        assert_eq!(owners.message().owners["c"].compound[&(Field::Env as i32)].owners["PATH"], "-00-a");
        env(&mut owners, "PATH", "01-b").expect("what no plugin had set");
        env(&mut owners, "PATH", "02-c").expect_err("taken");
        owners.share("c", Field::OciHooks, "00-a");
        owners.share("c", Field::OciHooks, "01-b");
        let message = &owners.message().owners["c"];
        assert_eq!(message.simple[&(Field::OciHooks as i32)], "00-a,01-b");
        assert_eq!(message.compound[&(Field::Env as i32)].owners["A"], "01-b");
    }
}
