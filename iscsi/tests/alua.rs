//! States of access on the wire: what a foreign initiator sees.

#![allow(dead_code, reason = "the support is shared with other tests")]
#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

mod support;

use std::sync::Arc;

use support::{Client, Memory, TARGET, iqn, spec};
use treeboot_iscsi::scsi::alua::PortGroup;
use treeboot_iscsi::scsi::{AccessState, Sense, status};
use treeboot_iscsi::target::{Access, Server, ServerConfig, TargetOptions};

async fn report(client: &mut Client) -> Vec<u8> {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[9]) = (0xa3, 0x0a, 64);
    let ((answer, _), data) = client.command(cdb, 64, None).await;
    assert_eq!(answer, status::GOOD);
    data
}

async fn inquiry(client: &mut Client, page: u8) -> Vec<u8> {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[2], cdb[4]) = (0x12, 1, page, 255);
    client.command(cdb, 255, None).await.1
}

#[tokio::test]
async fn a_change_of_state_is_a_unit_attention_for_every_session_and_the_report_follows() {
    let server = Server::bind(&["127.0.0.1:0".parse().unwrap()], ServerConfig::default()).unwrap();
    let options = TargetOptions {
        port_group: PortGroup::new(0x0102).unwrap(),
        access_state: AccessState::Attaching,
        ..TargetOptions::default()
    };
    let memory = Arc::new(Memory::new(1 << 20, false));
    server
        .add_target_with(spec(memory, Access::Anyone), options)
        .unwrap();
    let portal = server.local_addrs()[0];
    let mut one = Client::login(portal, TARGET, 1).await;
    let mut two = Client::login(portal, TARGET, 2).await;
    assert_eq!(
        report(&mut one).await,
        [0, 0, 0, 12, 0x0f, 0x8f, 1, 2, 0, 0, 0, 1, 0, 0, 1, 2]
    );
    // Relative target port and target port group are those of the report.
    let page = inquiry(&mut one, 0x83).await;
    for kind in [0x14, 0x15] {
        let wanted = [1, kind, 0, 4, 0, 0, 1, 2];
        assert!(
            page.windows(8).any(|part| part == wanted),
            "{kind:#x} in {page:x?}"
        );
    }
    assert_eq!(one.read(0, 1).await, [0; 512], "it attaches and serves");

    assert!(server.set_access_state(&iqn(TARGET), None, AccessState::Unavailable));
    assert!(server.set_access_state(&iqn(TARGET), None, AccessState::NonOptimized));
    for client in [&mut one, &mut two] {
        let (answer, sense) = client.command([0; 16], 0, None).await.0;
        assert_eq!(
            (answer, sense),
            (status::CHECK_CONDITION, Some(Sense::ACCESS_STATE_CHANGED))
        );
        // Once, however often it changed.
        assert_eq!(client.command([0; 16], 0, None).await.0, (status::GOOD, None));
        let report = report(client).await;
        assert_eq!((report[4], report[9]), (0x01, 0x02), "implicitly altered");
    }
    assert!(server.set_access_state(&iqn(TARGET), Some(0), AccessState::NonOptimized));
    assert_eq!(
        one.command([0; 16], 0, None).await.0,
        (status::GOOD, None),
        "no change, no attention"
    );
    assert!(server.set_access_state(&iqn(TARGET), None, AccessState::Standby));
    let _attention = one.command([0; 16], 0, None).await;
    assert_eq!(
        one.command([0; 16], 0, None).await.0,
        (status::CHECK_CONDITION, Some(Sense::STANDBY))
    );
}
