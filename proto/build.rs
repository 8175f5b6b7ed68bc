//! Generates Rust types from the .proto files, with a parser in Rust instead of a system protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let monitor = protox::compile(["proto/monitor.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(monitor)?;
    let criu = protox::compile(["proto/criu.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(criu)?;

    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        let cri = protox::compile(["proto/cri.proto"], ["proto"])?;
        tonic_prost_build::configure()
            .build_transport(false)
            .type_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
            .message_attribute(".", "#[serde(default)]")
            .compile_fds(cri)?;
        let image = protox::compile(["proto/image.proto"], ["proto"])?;
        tonic_prost_build::configure()
            .build_transport(false)
            .type_attribute(".", "#[derive(serde::Serialize)]")
            .compile_fds(image)?;
        let files = ["containers", "tasks", "version"].map(|name| format!("proto/containerd/{name}.proto"));
        tonic_prost_build::configure().build_transport(false).compile_fds(protox::compile(files, ["proto"])?)?;
        // Maps in order, so that what plugins are told is the same each time.
        for name in ["nri", "ttrpc"] {
            let file = protox::compile([format!("proto/{name}.proto")], ["proto"])?;
            prost_build::Config::new().btree_map(["."]).compile_fds(file)?;
        }
        let trace = protox::compile(["proto/trace.proto"], ["proto"])?;
        tonic_prost_build::configure().build_transport(false).compile_fds(trace)?;
    }
    Ok(())
}
