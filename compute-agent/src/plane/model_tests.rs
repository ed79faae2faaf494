use std::sync::Arc;

use treeboot_types::{Digest, Endpoint, HostName, ImageId, Iqn, VmName};

use super::Plane;
use super::model::ModelPlane;
use crate::conformance::{self, Rig, TestImage};
use crate::journal::Journal;
use crate::stack::{Content, Found, PathTo, Sources, StripePaths};

struct ModelRig {
    plane: Arc<ModelPlane>,
    journal: Journal,
    dir: tempfile::TempDir,
    images: [TestImage; 2],
}

fn image(n: u8) -> TestImage {
    let id: ImageId = format!("image-{n}@1").parse().unwrap();
    let bytes: Vec<u8> = (0..300 * 4096usize).map(|i| ((i / 7) as u8) ^ n).collect();
    let sources = |port| Sources {
        unit_bytes: 1 << 20,
        stripes: vec![StripePaths {
            active: vec![PathTo {
                host: None,
                endpoint: Endpoint {
                    portal: format!("model:{port}").parse().unwrap(),
                    target: Iqn::of_image(&id),
                    data_lun: 0,
                    hash_lun: Some(1),
                },
            }],
            ..StripePaths::default()
        }],
    };
    TestImage {
        content: Content {
            digest: Digest([n; 32]),
            bytes: bytes.len() as u64,
            chunk_bytes: 65536,
        },
        bytes: Arc::new(bytes),
        sources: [sources(1), sources(2)],
        id,
    }
}

async fn rig() -> ModelRig {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let images = [image(0), image(1)];
    let plane = Arc::new(ModelPlane::default());
    for image in &images {
        plane.serve(image.content.digest, image.bytes.to_vec());
    }
    ModelRig {
        plane,
        journal,
        dir,
        images,
    }
}

impl Rig for ModelRig {
    fn plane(&self) -> Arc<dyn Plane> {
        Arc::clone(&self.plane) as Arc<dyn Plane>
    }
    fn journal(&self) -> Journal {
        self.journal.clone()
    }
    fn image(&self, n: usize) -> TestImage {
        self.images[n].clone()
    }
    async fn restart(&mut self) {
        self.plane.restart();
        self.journal = Journal::open(self.dir.path()).unwrap().0;
    }
    async fn read_export(
        &self,
        id: &ImageId,
        host: &HostName,
        at: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, String> {
        self.plane.read_export(id, host, at, bytes)
    }
    async fn write_export(&self, _: &ImageId, _: &HostName, _: u64, _: &[u8]) -> Result<(), String> {
        Err("read-only".into())
    }
    async fn read_disk(&self, vm: &VmName, at: u64, bytes: usize) -> Result<Vec<u8>, String> {
        self.plane.read_disk(vm, at, bytes)
    }
    async fn write_disk(&self, vm: &VmName, at: u64, data: &[u8]) -> Result<(), String> {
        self.plane.write_disk(vm, at, data)
    }
    async fn flush_disk(&self, _: &VmName) -> Result<(), String> {
        Ok(())
    }
    async fn residue(&self) -> Vec<String> {
        let found = self.plane.found();
        if found == Found::default() {
            Vec::new()
        } else {
            vec![format!("{found:?}")]
        }
    }
}

#[tokio::test]
async fn the_model_conforms() {
    conformance::run(rig).await;
}

#[tokio::test]
async fn the_model_survives_a_fault_at_every_step() {
    assert!(conformance::fail_at_every_step(rig).await >= 3 * (7 + 7));
}

#[test]
fn what_a_plane_refuses_stands_in_the_docs() {
    use super::{PlaneKind, Verb};
    let docs = include_str!("../../../docs/verbs.md");
    let kernel = |verb: Verb| verb.refusal(PlaneKind::Kernel);
    for verb in [
        Verb::Snapshot,
        Verb::CheckDelta,
        Verb::Clone,
        Verb::Migrate,
        Verb::Cache,
    ] {
        assert!(verb.refusal(PlaneKind::User).is_none(), "{verb:?}");
        assert!(kernel(verb).is_some(), "{verb:?}");
        assert!(docs.contains(&format!("`{}`", verb.name())), "{verb:?}");
    }
}
