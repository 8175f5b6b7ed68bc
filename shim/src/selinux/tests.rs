//! Labels from files and wishes. The kernel's part needs a kernel with a policy.

use super::*;

fn on() -> SeLinux {
    let label = |text| Label::parse(text).expect("a label");
    let (process, file) = (label("system_u:system_r:container_t:s0"), label("system_u:object_r:container_file_t:s0"));
    SeLinux::On(Defaults { process, file, levels: true })
}

fn wish(user: &str, role: &str, typ: &str, level: &str) -> SeLinuxOption {
    SeLinuxOption { user: user.into(), role: role.into(), r#type: typ.into(), level: level.into() }
}

fn check(pod: Option<SeLinuxOption>, container: Option<SeLinuxOption>, process: &str, file: &str) {
    let found = on().labels("c3,c7", pod.as_ref(), container.as_ref(), false).expect("labels");
    assert_eq!((found.process.as_str(), found.file.as_str()), (process, file));
}

#[test]
fn labels_are_the_policys_then_the_pods_then_the_containers() {
    let file = "system_u:object_r:container_file_t:s0:c3,c7";
    check(None, None, "system_u:system_r:container_t:s0:c3,c7", file);
    check(None, Some(wish("", "", "spc_t", "")), "system_u:system_r:spc_t:s0:c3,c7", file);
    check(Some(wish("u", "r", "t", "")), Some(wish("", "", "x", "")), "u:r:x:s0:c3,c7", file);
    check(
        Some(wish("", "", "", "s0:c1,c2")),
        None,
        "system_u:system_r:container_t:s0:c1,c2",
        "system_u:object_r:container_file_t:s0:c1,c2",
    );
}

#[test]
fn a_kernel_without_labels_applies_none() {
    let asked = wish("", "", "", "s0:c0,c1");
    for (pod, container) in [(Some(&asked), None), (None, Some(&asked)), (None, None)] {
        assert_eq!(SeLinux::Absent.labels("", pod, container, false), Ok(Labels::default()));
    }
}

#[test]
fn a_policy_without_containers_refuses_wishes_and_no_wish_is_none() {
    let (node, asked) = (SeLinux::Unready("why".into()), wish("", "", "container_t", ""));
    assert_eq!(node.labels("", None, None, false), Ok(Labels::default()));
    assert_eq!(node.labels("", Some(&wish("", "", "", "")), None, false), Ok(Labels::default()));
    for (pod, container) in [(Some(&asked), None), (None, Some(&asked))] {
        let error = node.labels("", pod, container, false).expect_err("refused");
        assert!(error.message.contains("security_context.selinux_options"), "{error}");
    }
    assert_eq!(node.labels("", None, Some(&asked), true), Ok(Labels::default()));
}

#[test]
fn what_is_no_part_of_a_label_is_refused() {
    for bad in [wish("a:b", "", "", ""), wish("", "a b", "", ""), wish("", "", "t\n", "")] {
        for node in [on(), SeLinux::Absent] {
            assert!(node.labels("", None, Some(&bad), false).is_err(), "{bad:?}");
        }
    }
}

#[test]
fn categories_are_a_pods_own() {
    assert_eq!([pair(0), pair(1), pair(2), pair(3)], ["c0,c1", "c0,c2", "c1,c2", "c0,c3"]);
    assert_eq!(pair(u64::from(CATEGORIES) * u64::from(CATEGORIES - 1) / 2 - 1), "c1022,c1023");
    let id = "0123456789abcdef".repeat(4);
    let first = on().categories(&id, &[]);
    let second = on().categories(&id, std::slice::from_ref(&first));
    assert!(!first.is_empty() && !second.is_empty() && first != second, "{first} {second}");
    assert_eq!(SeLinux::Absent.categories(&id, &[]), "");
    assert_eq!(with_categories("s0-s0:c0.c1023", "c1,c2"), "s0:c1,c2");
}

#[test]
fn defaults_are_read_from_the_policys_files() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let config = directory.path().join("config");
    fs::write(&config, "# comment\nSELINUX=enforcing\nSELINUXTYPE=mine\n").expect("write");
    assert!(defaults(&config, true).expect_err("no file").contains("lxc_contexts"));
    let contexts = directory.path().join("mine/contexts");
    fs::create_dir_all(&contexts).expect("create");
    let text =
        "process = \"system_u:system_r:container_t:s0\"\ncontent = \"x\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";
    fs::write(contexts.join("lxc_contexts"), text).expect("write");
    assert_eq!(SeLinux::On(defaults(&config, true).expect("defaults")), on());
    assert_eq!(Label::parse("only:two"), None);
}
