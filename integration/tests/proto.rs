//! Our transcription of the CRI against the interface file that Kubernetes publishes: every service, method, message,
//! field and enum value. Needs `go` and its module cache or proxy.

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, field_descriptor_proto as field,
};
use std::collections::BTreeMap;
use std::path::Path;
use windlass_integration::go;

const MODULE: &str = "k8s.io/cri-api";
const VERSION: &str = "v0.37.2";
const SUM: &str = "h1:UMvN3s6yoG3SVbxX9Mw6yVmVmaLwVAjy0hXUpJzXogo=";

/// What a file declares: the name of each thing, and all about it that a peer on the wire or generated code can notice.
type Facts = BTreeMap<String, String>;

fn compile(folder: &Path, file: &str) -> FileDescriptorProto {
    let set = protox::compile([folder.join(file)], [folder]).unwrap_or_else(|error| panic!("compile {file}: {error}"));
    set.file.into_iter().find(|found| found.name() == file).expect("the compiled file is in its own set")
}

fn ours() -> FileDescriptorProto {
    compile(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../proto/proto")), "cri.proto")
}

fn facts(file: &FileDescriptorProto) -> Facts {
    let mut facts = Facts::new();
    facts.insert("file".into(), format!("package {} syntax {}", file.package(), file.syntax()));
    for service in &file.service {
        for method in &service.method {
            let about = format!(
                "{}{} -> {}{}",
                if method.client_streaming() { "stream " } else { "" },
                method.input_type(),
                if method.server_streaming() { "stream " } else { "" },
                method.output_type()
            );
            facts.insert(format!("service {} method {}", service.name(), method.name()), about);
        }
        facts.insert(format!("service {}", service.name()), format!("{} methods", service.method.len()));
    }
    for message in &file.message_type {
        message_facts(&mut facts, &format!(".{}", file.package()), message);
    }
    for declared in &file.enum_type {
        enum_facts(&mut facts, &format!(".{}", file.package()), declared);
    }
    facts
}

fn message_facts(facts: &mut Facts, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    let map_entry = message.options.as_ref().is_some_and(|options| options.map_entry());
    facts.insert(format!("message {name}"), format!("{} fields, map entry: {map_entry}", message.field.len()));
    for declared in &message.field {
        facts.insert(format!("message {name} field {}", declared.number()), field_facts(message, declared));
    }
    for nested in &message.nested_type {
        message_facts(facts, &name, nested);
    }
    for nested in &message.enum_type {
        enum_facts(facts, &name, nested);
    }
}

fn field_facts(message: &DescriptorProto, declared: &FieldDescriptorProto) -> String {
    let oneof = match declared.oneof_index {
        Some(index) => message.oneof_decl[index as usize].name(),
        None => "none",
    };
    let packed = declared.options.as_ref().and_then(|options| options.packed);
    format!(
        "{} {:?} {:?} {} oneof {oneof} optional {} json {} packed {packed:?}",
        declared.name(),
        declared.label(),
        declared.r#type(),
        declared.type_name(),
        declared.proto3_optional(),
        declared.json_name(),
    )
}

fn enum_facts(facts: &mut Facts, scope: &str, declared: &EnumDescriptorProto) {
    let name = format!("{scope}.{}", declared.name());
    for value in &declared.value {
        facts.insert(format!("enum {name} value {}", value.name()), value.number().to_string());
    }
    facts.insert(format!("enum {name}"), format!("{} values", declared.value.len()));
}

fn differences(published: &Facts, ours: &Facts) -> Vec<String> {
    let mut found = Vec::new();
    for (name, theirs) in published {
        match ours.get(name) {
            None => found.push(format!("{name}: missing from ours, published as {theirs}")),
            Some(mine) if mine != theirs => found.push(format!("{name}: published as {theirs}, ours is {mine}")),
            Some(_) => {}
        }
    }
    found.extend(ours.keys().filter(|name| !published.contains_key(*name)).map(|name| format!("{name}: only in ours")));
    found
}

#[test]
fn the_cri_is_the_published_one() {
    let module = go::module(MODULE, VERSION, SUM).expect("the published interface");
    let published = facts(&compile(&module.join("pkg/apis/runtime/v1"), "api.proto"));
    let methods = published.keys().filter(|name| name.contains(" method ")).count();
    assert!(methods > 0 && published.len() > 500, "the published file has {methods} methods, {} facts", published.len());
    println!("compared {} facts, {methods} methods among them", published.len());
    let found = differences(&published, &facts(&ours()));
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

const NRI: (&str, &str, &str) = ("github.com/containerd/nri", "v0.12.5", "h1:sPYUCT4fRbshF0ewiIaFXv2n6+tLIwY0kKII9ycMszY=");

/// All but its services, which no code is generated from, and what only plugins inside the runtime call.
#[test]
fn nri_is_the_published_one() {
    let module = go::module(NRI.0, NRI.1, NRI.2).expect("the published interface");
    let messages = |folder: &Path, file: &str| {
        let mut facts = facts(&compile(folder, file));
        facts.retain(|name, _| !name.starts_with("service ") && !name.contains(".LogRequest"));
        facts
    };
    let published = messages(&module.join("pkg/api"), "api.proto");
    assert!(published.len() > 300, "the published file has {} facts", published.len());
    let found =
        differences(&published, &messages(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../proto/proto")), "nri.proto"));
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// Applies `change` to our file and expects exactly the differences whose names are listed.
fn check(change: impl FnOnce(&mut FileDescriptorProto), expected: &[&str]) {
    let original = ours();
    let mut changed = original.clone();
    change(&mut changed);
    let found = differences(&facts(&original), &facts(&changed));
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (difference, name) in found.iter().zip(expected) {
        assert!(difference.starts_with(&format!("{name}:")), "{difference} is not about {name}");
    }
}

fn message<'a>(file: &'a mut FileDescriptorProto, name: &str) -> &'a mut DescriptorProto {
    file.message_type.iter_mut().find(|message| message.name() == name).expect("such a message")
}

#[test]
fn each_kind_of_change_is_noticed() {
    let version = "message .runtime.v1.VersionRequest field 1";
    check(|_| {}, &[]);
    check(|file| message(file, "VersionRequest").field[0].name = Some("release".into()), &[version]);
    check(|file| message(file, "VersionRequest").field[0].set_type(field::Type::Bytes), &[version]);
    check(|file| message(file, "VersionRequest").field[0].set_label(field::Label::Repeated), &[version]);
    check(
        |file| message(file, "VersionRequest").field[0].number = Some(9),
        &[version, "message .runtime.v1.VersionRequest field 9"],
    );
    check(|file| drop(message(file, "VersionRequest").field.pop()), &["message .runtime.v1.VersionRequest", version]);
    check(|file| file.service[0].method[0].server_streaming = Some(true), &["service RuntimeService method Version"]);
    let first = ours().enum_type[0].clone();
    let name = format!("enum .runtime.v1.{} value {}", first.name(), first.value[0].name());
    check(|file| file.enum_type[0].value[0].number = Some(77), &[&name]);
}
