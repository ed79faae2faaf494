//! Compiles the `.proto` files with a compiler written in Rust, so that a build needs no `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "treeboot/v1/types.proto",
        "treeboot/v1/coordinator.proto",
        "treeboot/v1/agent.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        // They hold secrets; `src/secret.rs` prints them without.
        .skip_debug(["treeboot.v1.ExportKey", "treeboot.v1.EdgeSecret"])
        .compile_fds(descriptors)?;
    Ok(())
}
