//! The daemons as HTTP: what a platform asks that cannot speak gRPC, and what a monitoring system asks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tonic::transport::Channel;
use treeboot_identity::authority::{self, Authority};
use treeboot_identity::tls::Dialer;
use treeboot_identity::{Holder, Person, Role, Who, token};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::http::{ask, get, say};
use treeboot_tests::image::Pattern;
use treeboot_tests::wait::wait_until;
use treeboot_types::HostName;

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 41,
    bytes: 1 << 20,
};
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(60);
const JSON: (&str, &str) = ("content-type", "application/json");

async fn attached(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    cluster.treeboot(&["image", "attach", IMAGE, "--all"]).await?;
    Ok(())
}

/// The words under `name` in each of a list.
fn words<'a>(list: &'a Value, name: &str) -> Vec<&'a str> {
    let list = list.as_array().into_iter().flatten();
    list.map(|item| item.pointer(name).and_then(Value::as_str).unwrap_or("-"))
        .collect()
}

#[test]
fn over_http_a_platform_is_told_what_grpc_tells() -> Result<()> {
    let plan = Plan {
        hosts: 2,
        ..Plan::default()
    };
    with_cluster("http", Machine::Shared, plan, async |cluster| {
        attached(cluster).await?;
        let channel = cluster.coordinator.channel_by(&Dialer::Insecure).await?;
        let mut grpc = cluster.coordinator.coordinator().await?;

        let hosts = get(&channel, "/v1/hosts").await?.good()?["hosts"].take();
        let told = grpc.list_hosts(v1::ListHostsRequest {}).await?.into_inner().hosts;
        let infos: Vec<_> = told.iter().filter_map(|host| host.info.as_ref()).collect();
        let expected: Vec<_> = infos.iter().map(|info| info.name.as_str()).collect();
        ensure!(
            words(&hosts, "/info/name") == expected && expected.len() == 3,
            "{hosts}"
        );
        let expected: Vec<_> = infos.iter().map(|info| info.portal.as_str()).collect();
        ensure!(words(&hosts, "/info/portal") == expected, "{hosts}");
        ensure!(words(&hosts, "/info/plane") == ["PLANE_KIND_USER"; 3], "{hosts}");

        let image = Some(v1::ImageId {
            name: IMAGE.into(),
            version: 0,
        });
        let images = get(&channel, "/v1/images").await?.good()?["images"].take();
        ensure!(words(&images, "/id/name") == [IMAGE], "{images}");
        ensure!(
            images[0]["bytes"] == PATTERN.bytes,
            "a number, not a text: {images}"
        );
        let one = get(&channel, "/v1/images/pattern?version=1").await?.good()?;
        ensure!(one["image"] == images[0], "{one}");

        let request = v1::GetTreeRequest { image: image.clone() };
        let nodes = grpc.get_tree(request).await?.into_inner().nodes;
        let tree = get(&channel, "/v1/images/pattern/tree").await?.good()?["nodes"].take();
        let expected: Vec<_> = nodes.iter().map(|node| node.host.as_str()).collect();
        ensure!(words(&tree, "/host") == expected, "{tree}");
        for (node, told) in nodes.iter().zip(tree.as_array().context("nodes")?) {
            ensure!(
                told["depth"] == node.depth && told["origin"] == node.origin,
                "{told}"
            );
            ensure!(told["parents"] == serde_json::json!(node.parents), "{told}");
        }

        let request = v1::SearchRequest {
            image,
            host: "h1".into(),
            limit: 2,
        };
        let found = grpc.search(request).await?.into_inner().candidates;
        let path = "/v1/images/pattern/exports?host=h1&limit=2";
        let exports = get(&channel, path).await?.good()?["candidates"].take();
        let expected: Vec<_> = found.iter().map(|candidate| candidate.reason.as_str()).collect();
        ensure!(
            words(&exports, "/reason") == expected && expected.len() == 2,
            "{exports}"
        );

        let typed = cluster
            .treeboot(&["search", IMAGE, "--host", "h1", "--limit", "2"])
            .await?;
        ensure!(expected.iter().all(|reason| typed.contains(reason)), "{typed}");

        // An agent: a disk made over HTTP is there over gRPC, and goes over HTTP.
        let host = &cluster.hosts[0];
        let channel = host.channel_by(&Dialer::Insecure).await?;
        let made = ask(
            &channel,
            "PUT",
            "/v1/disks/vm1",
            &[JSON],
            r#"{"image":{"name":"pattern"}}"#,
        )
        .await?;
        let made = made.good()?;
        let disks = host
            .agent()
            .await?
            .list(v1::ListRequest {})
            .await?
            .into_inner()
            .disks;
        ensure!(
            made["disk"]["url"] == disks[0].url && disks[0].vm == "vm1",
            "{made}, {disks:?}"
        );
        ask(&channel, "DELETE", "/v1/disks/vm1?keep_base=true", &[], "")
            .await?
            .good()?;
        let left = get(&channel, "/v1/disks").await?.good()?;
        ensure!(left["disks"] == serde_json::json!([]), "{left}");
        Ok(())
    })
}

#[test]
fn what_is_wrong_with_a_request_is_said_and_a_slow_one_is_not_waited_for() -> Result<()> {
    with_cluster("http-bad", Machine::Shared, Plan::default(), async |cluster| {
        let coordinator = cluster.coordinator.channel_by(&Dialer::Insecure).await?;
        let agent = cluster.hosts[0].channel_by(&Dialer::Insecure).await?;
        let bad = "INVALID_ARGUMENT";
        let put = async |headers: &[(&str, &str)], body: &str| {
            ask(&agent, "PUT", "/v1/disks/vm1", headers, body).await
        };
        put(&[JSON], "{\"image\":")
            .await?
            .refused(400, bad, "the body is not JSON")?;
        put(&[JSON], "[1]").await?.refused(400, bad, "no object")?;
        put(&[JSON], "{\"imag\":{}}").await?.refused(400, bad, "'imag'")?;
        put(&[JSON], "{\"image\":{\"version\":\"x\"}}")
            .await?
            .refused(400, bad, "Create")?;
        put(&[], "{}")
            .await?
            .refused(415, bad, "content-type: application/json")?;
        put(&[JSON], &format!("{{\"vm\":\"{}\"}}", "x".repeat(2 << 20)))
            .await?
            .refused(413, bad, "1048576 bytes")?;
        let unknown = ask(&agent, "DELETE", "/v1/disks/vm9", &[], "").await?;
        unknown.refused(404, "NOT_FOUND", "there is no VM 'vm9' on host 'h1'")?;
        ask(&agent, "DELETE", "/v1/disks/UPPER%20case", &[], "")
            .await?
            .refused(400, bad, "UPPER case")?;
        get(&coordinator, "/v1/images/none")
            .await?
            .refused(404, "NOT_FOUND", "'none'")?;
        get(&coordinator, "/v1/images/none?versoin=1")
            .await?
            .refused(400, bad, "it takes version")?;
        get(&coordinator, "/v1/images/none?version=-1")
            .await?
            .refused(400, bad, "GetImage")?;
        get(&coordinator, "/v1/host")
            .await?
            .refused(404, "NOT_FOUND", "/openapi.json")?;
        ask(&coordinator, "POST", "/v1/hosts", &[], "").await?.refused(
            405,
            "UNIMPLEMENTED",
            "takes no POST",
        )?;
        let body = ask(&coordinator, "GET", "/v1/hosts", &[JSON], "{}").await?;
        body.refused(400, bad, "takes no body")?;
        // Nobody is asked who they are here, so a page in a browser must not pass for somebody.
        let page = ask(
            &coordinator,
            "GET",
            "/v1/hosts",
            &[("origin", "https://example.org")],
            "",
        )
        .await?;
        page.refused(403, "PERMISSION_DENIED", "pages in a browser")?;

        // HTTP/1.1 in bare words, and somebody who begins a body and does not end it.
        let address = cluster.coordinator.bound()?.rpc;
        let line = format!("host: {address}\r\nconnection: close\r\n");
        let heard = say(address, &format!("GET /healthz HTTP/1.1\r\n{line}\r\n")).await?;
        ensure!(
            heard.starts_with("HTTP/1.1 200") && heard.contains("\"state\":\"good\""),
            "{heard}"
        );
        let slow = format!(
            "POST /v1/images HTTP/1.1\r\n{line}content-type: application/json\r\ncontent-length: 1000\r\n\r\n{{"
        );
        // Nor are those waited for who say nothing, or not enough to tell what they speak.
        let (heard, silent, halting) =
            tokio::try_join!(say(address, &slow), say(address, ""), say(address, "PRI * HT"))?;
        ensure!(silent.is_empty() && halting.is_empty(), "{silent:?}, {halting:?}");
        ensure!(
            heard.starts_with("HTTP/1.1 408") && heard.contains("did not arrive within"),
            "{heard}"
        );
        Ok(())
    })
}

#[test]
fn the_openapi_document_is_whole_and_every_path_in_it_answers_as_it_says() -> Result<()> {
    with_cluster(
        "http-openapi",
        Machine::Shared,
        Plan::default(),
        async |cluster| {
            attached(cluster).await?;
            // A VM of the image's name, for the paths that read of a VM.
            let create = ["vm", "create", IMAGE, "--image", IMAGE, "--host", "h1"];
            cluster.treeboot(&create).await?;
            for daemon in [&cluster.coordinator, &cluster.hosts[0]] {
                let channel = daemon.channel_by(&Dialer::Insecure).await?;
                let document = get(&channel, "/openapi.json").await?.good()?;
                ensure!(document["openapi"] == "3.1.0", "{document}");
                references_resolve(&document, &document)?;
                let schemas = document["components"]["schemas"].as_object().context("schemas")?;
                let secret = schemas
                    .keys()
                    .filter(|name| name.contains("Secret") || name.contains("Key"))
                    // That of a VM's disk is for operators, who make VMs.
                    .find(|name| !name.contains("DiskSecret"));
                ensure!(secret.is_none(), "secrets are for hosts only: {secret:?}");
                let paths = document["paths"].as_object().context("paths")?;
                let mut names = BTreeSet::new();
                for (path, operations) in paths {
                    for (method, operation) in operations.as_object().context("operations")? {
                        let name = operation["operationId"].as_str().context("a name")?;
                        ensure!(names.insert(name.to_owned()), "two operations are called {name}");
                        answers(&channel, &document, path, method, operation)
                            .await
                            .with_context(|| format!("{method} {path} of {}", daemon.name()))?;
                    }
                }
                ensure!(names.len() >= 11, "{names:?}");
            }
            Ok(())
        },
    )
}

fn references_resolve(document: &Value, part: &Value) -> Result<()> {
    match part {
        Value::Object(map) => {
            if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                let place = reference.strip_prefix('#').context("elsewhere")?;
                ensure!(document.pointer(place).is_some(), "{reference} leads nowhere");
            }
            map.values()
                .try_for_each(|part| references_resolve(document, part))
        }
        Value::Array(list) => list
            .iter()
            .try_for_each(|part| references_resolve(document, part)),
        _ => Ok(()),
    }
}

/// Calls an operation: what reads, of what there is; what changes, of what there is not.
async fn answers(
    channel: &Channel,
    document: &Value,
    path: &str,
    method: &str,
    operation: &Value,
) -> Result<()> {
    let name = if method == "get" { IMAGE } else { "none" };
    let mut place = path.to_owned();
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    for parameter in parameters.filter(|parameter| parameter["in"] == "path") {
        let slot = parameter["name"].as_str().context("a name")?;
        place = place.replace(&format!("{{{slot}}}"), name);
    }
    ensure!(
        !place.contains('{'),
        "a part of the path is not declared: {place}"
    );
    let (headers, body) = match operation.get("requestBody") {
        Some(_) => (&[JSON][..], "{}"),
        None => (&[][..], ""),
    };
    let answer = ask(channel, &method.to_uppercase(), &place, headers, body).await?;
    let responses = &operation["responses"];
    if answer.status != 200 {
        let json = answer.json()?;
        let schema = &responses["default"]["content"]["application/json"]["schema"];
        fits(document, schema, &json)?;
        let there_is_nothing = answer.text.contains("there is nothing at") || answer.status == 405;
        ensure!(!there_is_nothing && method != "get", "{answer:?}");
        return Ok(());
    }
    let contents = responses["200"]["content"].as_object().context("contents")?;
    let content = contents.iter().find(|(kind, _)| answer.kind.starts_with(*kind));
    let (kind, content) = content.with_context(|| format!("not what was said: {}", answer.kind))?;
    match content.get("schema") {
        Some(schema) => fits(document, schema, &answer.json()?),
        None if kind == "application/json" => answer.json().map(drop),
        None => Ok(()),
    }
}

/// Whether a value is what a schema says, as far as ours say anything.
fn fits(document: &Value, schema: &Value, value: &Value) -> Result<()> {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = document
            .pointer(reference.trim_start_matches('#'))
            .context("no such schema")?;
        return fits(document, schema, value);
    }
    let fit = match schema["type"].as_str().context("a type")? {
        "object" => {
            for (name, value) in value.as_object().with_context(|| format!("no object: {value}"))? {
                let inner = schema.pointer(&format!("/properties/{name}"));
                let inner = inner.or_else(|| schema.get("additionalProperties"));
                let inner = inner.with_context(|| format!("no word of '{name}' in {schema}"))?;
                fits(document, inner, value).with_context(|| name.clone())?;
            }
            true
        }
        "array" => {
            let list = value.as_array().with_context(|| format!("no list: {value}"))?;
            list.iter()
                .try_for_each(|value| fits(document, &schema["items"], value))?;
            true
        }
        "string" => match schema["enum"].as_array() {
            Some(words) => words.contains(value),
            None => value.is_string(),
        },
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        other => anyhow::bail!("an unknown type '{other}'"),
    };
    ensure!(fit, "{value} is not {schema}");
    Ok(())
}

/// The figures by name with labels, each line looked at as Prometheus would (text format 0.0.4).
fn figures(text: &str) -> Result<BTreeMap<String, f64>> {
    let mut figures = BTreeMap::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').context("a type")?;
            ensure!(
                kind == "gauge" || (kind == "counter" && name.ends_with("_total")),
                "{line}"
            );
            family = name.to_owned();
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (key, value) = line
            .rsplit_once(' ')
            .with_context(|| format!("no value: {line}"))?;
        let name = key.split('{').next().unwrap_or_default();
        let is_name = |word: &str| {
            let mut bytes = word.bytes();
            bytes.next().is_some_and(|byte| byte.is_ascii_lowercase())
                && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        };
        ensure!(name == family && is_name(name), "{line} stands under {family}");
        if let Some(labels) = key.strip_prefix(name).filter(|labels| !labels.is_empty()) {
            let labels = labels
                .strip_prefix('{')
                .and_then(|labels| labels.strip_suffix("\"}"));
            for label in labels.with_context(|| format!("labels: {line}"))?.split("\",") {
                let (label, value) = label
                    .split_once("=\"")
                    .with_context(|| format!("label: {line}"))?;
                ensure!(is_name(label) && !value.contains('"'), "{line}");
            }
        }
        let value: f64 = value.parse().with_context(|| format!("no number: {line}"))?;
        ensure!(value.is_finite() && value >= 0.0, "{line}");
        ensure!(figures.insert(key.to_owned(), value).is_none(), "twice: {key}");
    }
    Ok(figures)
}

#[test]
fn figures_and_health_say_how_a_daemon_does() -> Result<()> {
    with_cluster(
        "http-figures",
        Machine::Shared,
        Plan::default(),
        async |cluster| {
            attached(cluster).await?;
            let coordinator = cluster.coordinator.channel_by(&Dialer::Insecure).await?;
            let agent = cluster.hosts[0].channel_by(&Dialer::Insecure).await?;
            let scrape = async |channel: &Channel| {
                let answer = get(channel, "/metrics").await?;
                ensure!(answer.kind.starts_with("text/plain; version=0.0.4"), "{answer:?}");
                figures(&answer.text)
            };
            let told = scrape(&coordinator).await?;
            let expected = [
                ("treeboot_coordinator_hosts{state=\"connected\"}", 2.0),
                ("treeboot_coordinator_hosts{state=\"silent\"}", 0.0),
                ("treeboot_coordinator_images", 1.0),
                (
                    "treeboot_coordinator_image_hosts{image=\"pattern@1\",state=\"ready\"}",
                    1.0,
                ),
                (
                    "treeboot_coordinator_image_hosts{image=\"pattern@1\",state=\"pending\"}",
                    0.0,
                ),
                (
                    "treeboot_coordinator_tree_depth{image=\"pattern@1\",stripe=\"0\"}",
                    1.0,
                ),
                ("treeboot_coordinator_placements_total", 1.0),
                ("treeboot_coordinator_hosts_came_total", 2.0),
                ("treeboot_coordinator_record_write_errors_total", 0.0),
                ("treeboot_coordinator_record_failing", 0.0),
            ];
            for (name, value) in expected {
                ensure!(
                    told.get(name) == Some(&value),
                    "{name} is not {value} in {told:?}"
                );
            }
            ensure!(told["treeboot_coordinator_beats_total"] >= 2.0, "{told:?}");
            ensure!(
                told["treeboot_coordinator_record_writes_total"] >= 1.0,
                "{told:?}"
            );
            let told = scrape(&agent).await?;
            ensure!(told["treeboot_agent_connected"] == 1.0, "{told:?}");
            ensure!(told["treeboot_agent_journal_errors_total"] == 0.0, "{told:?}");
            ensure!(told["treeboot_agent_bases{state=\"ready\"}"] == 1.0, "{told:?}");
            let fetched = told["treeboot_agent_fetched_bytes_total{image=\"pattern@1\",from=\"parent\"}"];
            let from_fallback =
                told["treeboot_agent_fetched_bytes_total{image=\"pattern@1\",from=\"fallback\"}"];
            ensure!(
                fetched + from_fallback > 0.0,
                "the hash tree's top was read: {told:?}"
            );

            let health = async |channel: &Channel, service: &str| -> Result<i32> {
                let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
                let request = tonic_health::pb::HealthCheckRequest {
                    service: service.into(),
                };
                Ok(client.check(request).await?.into_inner().status)
            };
            use tonic_health::pb::health_check_response::ServingStatus;
            for (channel, service) in [
                (&coordinator, "treeboot.v1.Coordinator"),
                (&agent, "treeboot.v1.Agent"),
            ] {
                for path in ["/healthz", "/readyz"] {
                    ensure!(get(channel, path).await?.good()?["state"] == "good");
                }
                for name in ["", service] {
                    wait_until(SOON, "health over gRPC", async || {
                        let serves = health(channel, name).await? == i32::from(ServingStatus::Serving);
                        Ok(serves.then_some(()))
                    })
                    .await?;
                }
            }
            // An agent without its coordinator lives and serves, and is not ready for more.
            cluster.coordinator.kill()?;
            wait_until(SOON, "the agent to miss its coordinator", async || {
                let ready = get(&agent, "/readyz").await?;
                let health = health(&agent, "").await? == i32::from(ServingStatus::NotServing);
                Ok((ready.status == 503 && health).then_some(()))
            })
            .await?;
            let ready = get(&agent, "/readyz").await?.json()?;
            ensure!(ready["state"] == "impaired", "{ready}");
            ensure!(
                words(&ready["checks"], "/why")[0].contains("no word from the coordinator"),
                "{ready}"
            );
            ensure!(get(&agent, "/healthz").await?.status == 200);
            Ok(())
        },
    )
}

#[test]
fn over_http_everybody_may_do_what_they_may_over_grpc_and_no_more() -> Result<()> {
    let plan = Plan {
        secure: true,
        ..Plan::default()
    };
    with_cluster("http-roles", Machine::Shared, plan, async |cluster| {
        attached(cluster).await?;
        let own = Authority::open(&authority::dir(&cluster.coordinator_state()))?.context("an authority")?;
        let nobody = Dialer::unnamed(own.fingerprint())?;
        let nobody = cluster.coordinator.channel_by(&nobody).await?;
        let bearer = |role| -> Result<String> {
            let token = token::bearer(&own, &Person::new("vera")?, role, HOUR)?;
            Ok(format!("Bearer {token}"))
        };
        let (viewer, operator, admin) = (
            bearer(Role::Viewer)?,
            bearer(Role::Operator)?,
            bearer(Role::Admin)?,
        );
        // Health and the document are everybody's.
        for path in ["/healthz", "/readyz", "/openapi.json"] {
            get(&nobody, path).await?.good()?;
        }
        for path in ["/v1/hosts", "/v1/images", "/v1/images/pattern/tree", "/metrics"] {
            let refused = get(&nobody, path).await?;
            refused.refused(401, "UNAUTHENTICATED", "no certificate was shown")?;
            let forged = ask(&nobody, "GET", path, &[("authorization", "Bearer x")], "").await?;
            ensure!(forged.status == 401, "{forged:?}");
            let seen = ask(&nobody, "GET", path, &[("authorization", &viewer)], "").await?;
            ensure!(seen.status == 200, "{seen:?}");
        }
        let remove = async |token: &str| {
            let headers = [("authorization", token)];
            ask(
                &nobody,
                "DELETE",
                "/v1/images/pattern?version=1&force=true",
                &headers,
                "",
            )
            .await
        };
        let words = "RemoveImage needs the role admin; this is viewer 'vera'";
        remove(&viewer).await?.refused(403, "PERMISSION_DENIED", words)?;
        remove(&operator)
            .await?
            .refused(403, "PERMISSION_DENIED", "needs the role admin")?;
        // At a host, by certificate.
        let host = &cluster.hosts[0];
        let certified = async |role| -> Result<Channel> {
            let who = Who::Person {
                name: Person::new("vera")?,
                role,
            };
            let holder = Holder::new(own.issue(&who, HOUR)?);
            let dialer = Dialer::mutual(&holder, Who::Host(HostName::new(host.name())?))?;
            host.channel_by(&dialer).await
        };
        let destroy = async |role| ask(&certified(role).await?, "DELETE", "/v1/disks/vm1", &[], "").await;
        let words = "Destroy needs the role operator; this is viewer 'vera'";
        destroy(Role::Viewer)
            .await?
            .refused(403, "PERMISSION_DENIED", words)?;
        destroy(Role::Operator).await?.refused(404, "NOT_FOUND", "vm1")?;
        let metrics = get(&certified(Role::Viewer).await?, "/metrics").await?;
        ensure!(metrics.status == 200, "{metrics:?}");
        // A certificate counts before a token, as with gRPC.
        let channel = certified(Role::Viewer).await?;
        let both = ask(
            &channel,
            "DELETE",
            "/v1/disks/vm1",
            &[("authorization", &admin)],
            "",
        )
        .await?;
        ensure!(both.status == 403, "{both:?}");
        // Health over gRPC is everybody's, reflection is not.
        let mut client = tonic_health::pb::health_client::HealthClient::new(nobody.clone());
        client
            .check(tonic_health::pb::HealthCheckRequest::default())
            .await?;
        let mut client =
            tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(nobody.clone());
        let question = || {
            use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
            let request = tonic_reflection::pb::v1::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(MessageRequest::ListServices(String::new())),
            };
            futures_util::stream::iter([request])
        };
        let refused = client.server_reflection_info(question()).await;
        ensure!(refused.is_err_and(|status| status.code() == tonic::Code::Unauthenticated));
        let mut request = tonic::Request::new(question());
        request.metadata_mut().insert("authorization", viewer.parse()?);
        let mut answers = client.server_reflection_info(request).await?.into_inner();
        let answer = format!("{:?}", answers.message().await?);
        ensure!(
            answer.contains("treeboot.v1.Coordinator") && answer.contains("grpc.health.v1.Health"),
            "{answer}"
        );
        // What an admin may.
        remove(&admin).await?.good()?;
        Ok(())
    })
}
