//! The verbs on hosts, trees, VMs and fleets against a coordinator and agents that are played.

// Helpers are outside of what clippy takes for a test.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;

use support::fake::Fakes;
use support::{run, treeboot};
use treeboot_proto::v1;

fn three() -> Fakes {
    Fakes::start(&[("origin", &["store"]), ("host-1", &["vms"]), ("host-2", &["vms"])])
        .with_image("debian", 2, "origin")
}

#[test]
fn listings_are_json_with_numbers_as_numbers() {
    let fakes = three();
    let hosts = fakes.run(&["host", "list", "--json"]).ok().json();
    assert_eq!(hosts.as_array().unwrap().len(), 3);
    assert_eq!(
        (&hosts[2]["name"], &hosts[2]["holds_store"]),
        (&"origin".into(), &true.into())
    );
    assert!(hosts[0]["silent_ms"].is_number());
    let images = fakes.run(&["image", "list", "--json"]).ok().json();
    assert_eq!(
        (&images[0]["name"], &images[0]["version"]),
        (&"debian".into(), &2.into())
    );
    let status = fakes.run(&["host", "show", "host-1", "--json"]).ok().json();
    assert_eq!(
        (&status["name"], &status["uptime_ms"]),
        (&"host-1".into(), &4200.into())
    );
    assert_eq!(
        fakes.run(&["vm", "list", "--json"]).ok().json(),
        serde_json::json!([])
    );
    for verb in [
        &["host", "list"][..],
        &["image", "list"],
        &["image", "show", "debian"],
        &["vm", "list"],
        &["host", "show", "host-2"],
    ] {
        assert!(!fakes.run(verb).ok().stdout.is_empty());
    }
}

#[test]
fn a_tree_is_drawn() {
    let fakes = three();
    let node = |host: &str, parents: &[&str]| v1::TreeNode {
        host: host.into(),
        portal: "127.0.0.1:3260".into(),
        origin: parents.is_empty(),
        connected: true,
        state: v1::AttachState::Ready.into(),
        parents: parents.iter().map(|&parent| parent.into()).collect(),
        ..Default::default()
    };
    fakes.world.lock().unwrap().nodes = vec![
        node("origin", &[]),
        node("host-1", &["origin"]),
        node("host-2", &["host-1"]),
    ];
    assert_eq!(
        fakes.run(&["tree", "debian"]).ok().stdout,
        "debian@2  1.00 MiB, fan-out 2, epoch 1.9\n\
         2 hosts, 0 deep: 2 ready\n\
         origin        origin  127.0.0.1:3260\n\
         └─ host-1     ready\n   └─ host-2  ready\n"
    );
    let json = fakes.run(&["tree", "debian", "--json"]).ok().json();
    assert_eq!(
        (&json["image"], &json["nodes"][2]["parents"][0]),
        (&"debian@2".into(), &"host-1".into())
    );
}

#[test]
fn a_search_is_a_partial_list_with_reasons() {
    let fakes = three();
    let found = fakes
        .run(&["search", "debian", "--host", "host-9", "--limit", "2"])
        .ok();
    assert_eq!(
        found.stdout,
        "   HOST    PORTAL          STRIPE  WHY IT STANDS HERE\n\
         1  host-0  127.0.0.1:3260       0  for 'host-9'\n\
         2  host-1  127.0.0.1:3260       1  for 'host-9'\n"
    );
    let json = fakes.run(&["search", "debian", "--json"]).ok().json();
    assert_eq!(
        (json.as_array().unwrap().len(), &json[1]["stripe"]),
        (3, &1.into())
    );
    fakes.run(&["search", "absent"]).fails(3, &["absent"]);
    fakes.run(&["search", "debian", "--limit", "0"]).fails(2, &["0"]);
}

#[test]
fn a_fleet_is_spread_evenly_and_stopped_by_its_prefix() {
    let fakes = three();
    let booted = fakes
        .run(&[
            "fleet", "boot", "--image", "debian", "--count", "4", "--prefix", "web", "--json",
        ])
        .ok();
    let json = booted.json();
    assert_eq!((&json["vms_ready"], &json["vms_failed"]), (&4.into(), &0.into()));
    assert_eq!(json["vms"][0]["ready_us"], 2_500_000);
    for host in ["host-1", "host-2"] {
        assert_eq!(fakes.world.lock().unwrap().vms[host].len(), 2, "{host}");
    }
    let taken = fakes.run(&[
        "fleet", "boot", "--image", "debian", "--count", "5", "--prefix", "web",
    ]);
    taken.fails(4, &["web-1", "exists"]);
    // Of another fleet, whose prefix begins alike.
    fakes
        .run(&[
            "vm", "start", "web-db-1", "--image", "debian", "--host", "host-1", "--wait",
        ])
        .ok();
    let stopped = fakes.run(&["fleet", "stop", "--prefix", "web", "--destroy"]).ok();
    assert_eq!(stopped.stdout, "destroyed 4 VMs of the fleet 'web'\n");
    let left = fakes.run(&["vm", "list", "--json"]).ok().json();
    assert_eq!(
        (left.as_array().unwrap().len(), &left[0]["name"]),
        (1, &"web-db-1".into())
    );
}

#[test]
fn a_fleet_that_fails_in_part_says_which_and_exits_with_6() {
    let fakes = three();
    fakes.world.lock().unwrap().failing = vec!["fleet-2".into()];
    let booted = fakes.run(&["fleet", "boot", "--image", "debian", "--count", "3", "--json"]);
    let json = booted.json();
    assert_eq!((&json["vms_ready"], &json["vms_failed"]), (&2.into(), &1.into()));
    assert_eq!(json["vms"][1]["state"], "failed");
    assert!(
        json["vms"][1]["error"]
            .as_str()
            .unwrap()
            .contains("QEMU ended at once")
    );
    booted.fails(6, &["1 of 3 VMs failed"]);
}

#[test]
fn a_vm_is_found_by_its_name_unless_there_are_two() {
    let fakes = three();
    let created = fakes
        .run(&["vm", "create", "a", "--image", "debian", "--host", "host-1"])
        .ok();
    assert!(
        created
            .stdout
            .contains("iscsi://127.0.0.1:3260/iqn.2026-11.dev.treeboot:disk:a/0"),
        "{created:?}"
    );
    fakes.run(&["vm", "start", "a", "--wait"]).ok();
    fakes.run(&["vm", "stop", "a"]).ok();
    fakes
        .run(&["vm", "create", "a", "--image", "debian"])
        .fails(2, &["2 hosts run VMs"]);
    fakes
        .run(&["vm", "create", "a", "--image", "debian", "--host", "host-2"])
        .ok();
    fakes
        .run(&["vm", "destroy", "a"])
        .fails(2, &["several VMs", "host-1", "host-2"]);
    fakes.run(&["vm", "destroy", "a", "--host", "host-2"]).ok();
    fakes.run(&["vm", "destroy", "a"]).ok();
    assert_eq!(
        fakes.seen(),
        [
            "create a on host-1",
            "start a on host-1",
            "stop a on host-1",
            "create a on host-2",
            "destroy a on host-2",
            "destroy a on host-1"
        ]
    );
}

#[test]
fn an_image_is_attached_on_all_hosts_but_its_origin() {
    let fakes = three();
    let attached = fakes
        .run(&["image", "attach", "debian", "--all", "--json"])
        .ok()
        .json();
    assert_eq!(attached.as_array().unwrap().len(), 2);
    assert_eq!(
        (&attached[0]["state"], &attached[0]["took_us"]),
        (&"ready".into(), &12_345.into())
    );
    fakes
        .run(&["image", "detach", "debian", "--host", "host-1,host-1"])
        .ok();
    let mut seen = fakes.seen();
    seen.sort();
    assert_eq!(
        seen,
        [
            "attach debian on host-1",
            "attach debian on host-2",
            "detach debian on host-1"
        ]
    );
}

#[test]
fn completions_and_help_go_to_standard_output() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]).ok();
        assert!(script.stdout.contains("treeboot"), "{shell}");
    }
    let help = run(&["--help"]).ok();
    assert!(help.stdout.contains("Exit codes:") && help.stderr.is_empty());
    assert_eq!(run(&[]).exit, 2);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = treeboot()
        .args(["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 1]).unwrap();
    drop(out);
    assert!(child.wait().unwrap().success());
}
