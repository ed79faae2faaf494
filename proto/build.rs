//! Compiles the `.proto` files with a compiler written in Rust, so that a build needs no `protoc`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    // With the comments, which are what an OpenAPI document and gRPC's reflection say of a verb.
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files([
        "treeboot/v1/types.proto",
        "treeboot/v1/coordinator.proto",
        "treeboot/v1/agent.proto",
    ])?;
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(
        Path::new(&out).join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure()
        .codec_path("crate::codec::Sparing")
        // They hold secrets; `src/secret.rs` prints them without.
        .skip_debug([
            "treeboot.v1.ExportKey",
            "treeboot.v1.EdgeSecret",
            "treeboot.v1.DiskSecret",
        ])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
