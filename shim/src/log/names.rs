//! Names of pods and containers by their ids, for whoever writes about them with the id alone. Has a lock of its own that is held for
//! nothing else, because what is written about a pod is often written while the pod's own locks are held. Empty unless [`keep`] was called.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

static KEPT: AtomicBool = AtomicBool::new(false);
static NAMES: Mutex<BTreeMap<String, Vec<(&str, String)>>> = Mutex::new(BTreeMap::new());

fn names() -> MutexGuard<'static, BTreeMap<String, Vec<(&'static str, String)>>> {
    NAMES.lock().expect("never poisoned: no panic while held")
}

/// Names are wanted from now on.
pub fn keep() {
    KEPT.store(true, Ordering::Relaxed);
}

/// The names are known until this is dropped.
#[derive(Debug)]
pub struct Known(Option<String>);

/// Tells what the pod or container of this id is called: pairs of a field and its value.
pub fn learn(id: &str, fields: impl FnOnce() -> Vec<(&'static str, String)>) -> Known {
    learn_if(KEPT.load(Ordering::Relaxed), id, fields)
}

fn learn_if(wanted: bool, id: &str, fields: impl FnOnce() -> Vec<(&'static str, String)>) -> Known {
    if !wanted {
        return Known(None);
    }
    names().insert(id.to_owned(), fields());
    Known(Some(id.to_owned()))
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(id) = &self.0 {
            names().remove(id);
        }
    }
}

/// The names of a pod or container, as they were told.
pub fn of(id: &str) -> Vec<(&'static str, String)> {
    names().get(id).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_for_as_long_as_they_are_held_and_only_if_wanted() {
        let fields = || vec![("namespace", "default".to_owned())];
        let unwanted = learn_if(false, "names-test", fields);
        assert!(of("names-test").is_empty());
        let known = learn_if(true, "names-test", fields);
        drop(unwanted);
        assert_eq!(of("names-test"), [("namespace", "default".to_owned())]);
        drop(known);
        assert!(of("names-test").is_empty());
    }
}
