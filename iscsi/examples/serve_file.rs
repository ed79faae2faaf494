//! Serves one raw file as an iSCSI target, for trying initiators against:
//! `cargo run --release -p treeboot-iscsi --example serve_file -- disk.raw 127.0.0.1:3260 [writable] [4096]`

use std::error::Error;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use treeboot_block::{BlockDevice, FileDevice, FileOptions};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::Iqn;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: serve_file FILE ADDR:PORT [writable] [4096]";
    let path = words.next().ok_or(usage)?;
    let portal: SocketAddr = words.next().ok_or(usage)?.parse()?;
    let rest: Vec<String> = words.collect();
    let has = |word: &str| rest.iter().any(|given| given == word);
    let options = FileOptions {
        read_only: !has("writable"),
        block_bytes: if has("4096") { 4096 } else { 512 },
        ..FileOptions::default()
    };
    let device: Arc<dyn BlockDevice> = Arc::new(FileDevice::open(Path::new(&path), options)?);
    let name = Iqn::new("iqn.2026-11.dev.treeboot:serve-file")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let other = SocketAddr::new(portal.ip(), portal.port() + 1);
        let server = Server::bind(&[portal, other], ServerConfig::default())?;
        let lun = LunSpec {
            lun: 0,
            device,
            serial: "serve-file-0".into(),
            product: "file".into(),
            ident: *b"treeboot-example",
        };
        server.add_target(TargetSpec {
            name: name.clone(),
            luns: vec![lun],
            access: Access::Anyone,
        })?;
        eprintln!("iscsi://{portal}/{name}/0");
        tokio::signal::ctrl_c().await?;
        server.shutdown(Duration::from_secs(1)).await;
        Ok(())
    })
}
