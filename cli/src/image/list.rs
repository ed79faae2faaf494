//! `image list`, `image show`, `image remove`.

use std::collections::BTreeMap;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef};

use crate::client::{Agent, Coordinator, Options, PARALLEL_CALLS, find_host, host_name};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table};
use crate::parallel;
use crate::tree::id_words;

use super::{digest_words, endpoint_url};

/// An image in `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct ImageJson {
    name: String,
    version: u32,
    digest: String,
    bytes: u64,
    allocated_bytes: u64,
    chunk_bytes: u32,
    stripes: u32,
    stripe_unit_bytes: u64,
    created_unix_ms: u64,
    origins: Vec<OriginJson>,
}

/// One image in `--json`.
#[derive(Debug, Serialize)]
struct ShownJson {
    #[serde(flatten)]
    image: ImageJson,
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct OriginJson {
    host: Option<String>,
    portal: String,
    target: String,
    data_lun: u32,
    hash_lun: Option<u32>,
    url: String,
    labels: BTreeMap<String, String>,
}

impl From<v1::Image> for ImageJson {
    fn from(image: v1::Image) -> Self {
        let id = image.id.unwrap_or_default();
        Self {
            name: id.name,
            version: id.version,
            digest: digest_words(&image.digest),
            bytes: image.bytes,
            allocated_bytes: image.allocated_bytes,
            chunk_bytes: image.chunk_bytes,
            stripes: image.stripes,
            stripe_unit_bytes: image.stripe_unit_bytes,
            created_unix_ms: image.created_unix_ms,
            origins: image
                .origins
                .into_iter()
                .map(|origin| {
                    let endpoint = origin.endpoint.unwrap_or_default();
                    OriginJson {
                        url: endpoint_url(&endpoint),
                        host: (!origin.host.is_empty()).then_some(origin.host),
                        portal: endpoint.portal,
                        target: endpoint.target,
                        data_lun: endpoint.data_lun,
                        hash_lun: endpoint.hash_lun,
                        labels: origin.labels.into_iter().collect(),
                    }
                })
                .collect(),
        }
    }
}

/// `image list`.
pub(super) async fn list(options: &Options, json: JsonFlag) -> Result<(), Failure> {
    let images = Coordinator::connect(options).await?.images().await?;
    let images: Vec<ImageJson> = images.into_iter().map(ImageJson::from).collect();
    if json.json {
        return output::print_json(&images);
    }
    output::print_text(&render_list(&images))
}

fn render_list(images: &[ImageJson]) -> String {
    if images.is_empty() {
        return "there is no image; add one with 'treeboot image import FILE NAME'\n".to_owned();
    }
    let mut table = Table::new(&[
        ("IMAGE", Align::Left),
        ("SIZE", Align::Right),
        ("STORED", Align::Right),
        ("DIGEST", Align::Left),
        ("ORIGINS", Align::Left),
    ]);
    for image in images {
        let origins: Vec<&str> = image
            .origins
            .iter()
            .map(|origin| origin.host.as_deref().unwrap_or(&origin.portal))
            .collect();
        table.row([
            format!("{}@{}", image.name, image.version),
            output::bytes(image.bytes),
            output::bytes(image.allocated_bytes),
            image.digest.chars().take(12).collect(),
            origins.join(","),
        ]);
    }
    table.render()
}

/// `image show`.
pub(super) async fn show(options: &Options, image: &ImageRef, json: JsonFlag) -> Result<(), Failure> {
    let (image, labels) = Coordinator::connect(options).await?.labelled_image(image).await?;
    let image = ShownJson {
        image: image.into(),
        labels,
    };
    if json.json {
        return output::print_json(&image);
    }
    let mut text = render(&image.image);
    for (key, value) in &image.labels {
        text += &output::printable(&format!("  label     {key}={value}"));
        text += "\n";
    }
    output::print_text(&text)
}

fn render(image: &ImageJson) -> String {
    let mut text = format!("{}@{}\n", output::printable(&image.name), image.version);
    for (what, value) in [
        (
            "size",
            format!("{} ({} bytes)", output::bytes(image.bytes), image.bytes),
        ),
        ("stored", output::bytes(image.allocated_bytes)),
        ("digest", image.digest.clone()),
        ("chunk", output::bytes(image.chunk_bytes.into())),
        (
            "stripes",
            format!(
                "{} of {} each turn",
                image.stripes,
                output::bytes(image.stripe_unit_bytes)
            ),
        ),
    ] {
        text += &format!("  {what:<10}{value}\n");
    }
    for origin in &image.origins {
        let holder = match &origin.host {
            Some(host) => format!("treeboot-agent on host '{host}'"),
            None => "foreign target".to_owned(),
        };
        text += &format!(
            "  {:<10}{}\n",
            "origin",
            output::printable(&format!("{}  {holder}", origin.url))
        );
    }
    text
}

/// `image remove`: the record first, so that nobody attaches to bytes that are going; then the origins' stores.
pub(super) async fn remove(options: &Options, image: &ImageRef, force: bool) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let found = match coordinator.image(image).await {
        Err(failure) if failure.exit == Exit::NotFound => {
            return remove_rest(&coordinator, options, image, failure).await;
        }
        found => found?,
    };
    let id = found
        .id
        .ok_or_else(|| crate::client::incomplete("the coordinator", "image.id"))?;
    let name = id_words(&id);
    let removed = coordinator
        .remove_image(&id, force)
        .await
        .map_err(|failure| match failure.exit {
            Exit::Refused if !force => failure.advice(format!(
                "stop its VMs and detach its hosts (treeboot tree {name}), or use --force"
            )),
            _ => failure,
        })?;
    let mut holders: Vec<String> = removed
        .origins
        .into_iter()
        .map(|origin| origin.host)
        .filter(|host| !host.is_empty())
        .collect();
    holders.sort();
    holders.dedup();
    let hosts = if holders.is_empty() {
        Vec::new()
    } else {
        coordinator.hosts().await?
    };
    let (gone, failures) = drop_stores(options, &hosts, holders.clone(), &id).await;
    let mut text = format!("removed {name}\n");
    for host in &holders {
        if gone.contains_key(host) {
            text += &format!("  its bytes are gone from the store of '{host}'\n");
        }
    }
    output::print_text(&text)?;
    // The record is gone, so this is never a failure of all.
    partly(holders.len(), &failures)
}

/// The record is gone, and a host that did not hear of it then may still store the image.
async fn remove_rest(
    coordinator: &Coordinator,
    options: &Options,
    image: &ImageRef,
    unknown: Failure,
) -> Result<(), Failure> {
    let Some(version) = image.version else {
        return Err(unknown);
    };
    let id = v1::ImageId {
        name: image.name.to_string(),
        version,
    };
    let mut hosts = coordinator.hosts().await?;
    hosts.retain(|host| host.connected && host.info.as_ref().is_some_and(|info| info.holds_store));
    let names: Vec<_> = hosts.iter().map(|host| host_name(host).to_owned()).collect();
    let (gone, failures) = drop_stores(options, &hosts, names, &id).await;
    let had: Vec<_> = gone.into_iter().filter(|(_, had)| *had).collect();
    if had.is_empty() && failures.is_empty() {
        return Err(unknown);
    }
    for (host, _) in &had {
        output::print_text(&format!(
            "the bytes of {image} are gone from the store of '{host}'\n"
        ))?;
    }
    partly(hosts.len(), &failures)
}

fn partly(stores: usize, failures: &[Failure]) -> Result<(), Failure> {
    parallel::verdict("store", stores, failures).map_err(|mut failure| {
        failure.exit = Exit::Partly;
        failure.advice("run the same command again when that agent is there")
    })
}

/// From which hosts' stores an image is gone, and whether it was there; and what failed.
async fn drop_stores(
    options: &Options,
    hosts: &[v1::HostRecord],
    names: Vec<String>,
    id: &v1::ImageId,
) -> (BTreeMap<String, bool>, Vec<Failure>) {
    let results = parallel::each(names, PARALLEL_CALLS, |host| async move {
        match drop_store(hosts, &host, id, options.timeout).await {
            Ok(had) => Ok((host, had)),
            Err(failure) => {
                let name = id_words(id);
                let what = format!(
                    "host '{host}' may still store the bytes of {name}: {}",
                    failure.what
                );
                Err(Failure::new(failure.exit, what))
            }
        }
    })
    .await;
    let (mut gone, mut failures) = (BTreeMap::new(), Vec::new());
    for result in results {
        match result {
            Ok((host, had)) => drop(gone.insert(host, had)),
            Err(failure) => failures.push(failure),
        }
    }
    (gone, failures)
}

/// Whether it was there.
async fn drop_store(
    hosts: &[v1::HostRecord],
    host: &str,
    id: &v1::ImageId,
    timeout: std::time::Duration,
) -> Result<bool, Failure> {
    let host = HostName::new(host).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let agent = Agent::connect(&find_host(hosts, &host)?, timeout).await?;
    let request = v1::DropImageRequest {
        image: Some(id.clone()),
    };
    let dropped = agent
        .call("drop its bytes", agent.client.clone().drop_image(request))
        .await;
    match dropped {
        // Told by the coordinator already, or never stored.
        Err(failure) if failure.exit == Exit::NotFound => Ok(false),
        other => other.map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageJson {
        ImageJson::from(v1::Image {
            id: Some(v1::ImageId {
                name: "debian".into(),
                version: 2,
            }),
            digest: vec![0xab; 32],
            bytes: 2 << 30,
            allocated_bytes: 700 << 20,
            chunk_bytes: 65536,
            stripes: 1,
            stripe_unit_bytes: 65536,
            origins: vec![
                v1::Origin {
                    host: "origin".into(),
                    endpoint: Some(v1::Endpoint {
                        portal: "10.0.0.1:3260".into(),
                        target: "iqn.2026-11.dev.treeboot:image:debian:2".into(),
                        data_lun: 0,
                        hash_lun: Some(1),
                    }),
                    ..Default::default()
                },
                v1::Origin {
                    endpoint: Some(v1::Endpoint {
                        portal: "[fd00::1]:3260".into(),
                        target: "iqn.2001-04.com.example:disk".into(),
                        data_lun: 3,
                        hash_lun: None,
                    }),
                    ..Default::default()
                },
            ],
            ..Default::default()
        })
    }

    #[test]
    fn a_list_names_origins_by_host_or_portal() {
        assert_eq!(
            render_list(&[image()]),
            "IMAGE         SIZE   STORED  DIGEST        ORIGINS\n\
             debian@2  2.00 GiB  700 MiB  abababababab  origin,[fd00::1]:3260\n"
        );
    }

    #[test]
    fn an_image_shows_the_urls_that_serve_it() {
        let text = render(&image());
        assert!(text.contains(
            "  origin    iscsi://10.0.0.1:3260/iqn.2026-11.dev.treeboot:image:debian:2/0  treeboot-agent on host 'origin'\n"
        ));
        assert!(
            text.contains(
                "  origin    iscsi://[fd00::1]:3260/iqn.2001-04.com.example:disk/3  foreign target\n"
            )
        );
    }

    #[test]
    fn json_fields_keep_their_names() {
        let json = serde_json::to_value(image()).unwrap();
        let fields: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            fields,
            [
                "allocated_bytes",
                "bytes",
                "chunk_bytes",
                "created_unix_ms",
                "digest",
                "name",
                "origins",
                "stripe_unit_bytes",
                "stripes",
                "version"
            ]
        );
        assert_eq!(json["origins"][1]["host"], serde_json::Value::Null);
        assert_eq!(json["origins"][1]["data_lun"], 3);
    }
}
