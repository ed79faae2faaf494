//! A device in memory, and an initiator that does one thing at a time.

#![allow(
    clippy::unwrap_used,
    reason = "support of tests: a panic here is a test that fails"
)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::login::{
    DigestTerms, InitiatorLogin, InitiatorOptions, LoginError, Progress, Terms, append_key,
};
use treeboot_iscsi::pdu::{
    DataOut, Framing, LunField, NO_TAG, Pdu, ScsiCommand, Split, TaskAttribute, TextRequest,
};
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::Iqn;

pub(crate) const TARGET: &str = "iqn.2026-11.test:disk";
/// No wait of a test is longer.
const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) fn iqn(text: &str) -> Iqn {
    Iqn::new(text).unwrap()
}

pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    geometry: Geometry,
}

impl Memory {
    pub(crate) fn new(bytes: usize, read_only: bool) -> Self {
        let geometry = Geometry {
            bytes: bytes as u64,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only,
            thin: false,
        };
        Self {
            bytes: Mutex::new(vec![0; bytes]),
            geometry,
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// Every third operation is not ready at its first poll, so that both ways through the target are taken.
    fn act<T: Send + 'static>(&self, offset: u64, result: Result<T, BlockError>) -> IoFuture<'_, T> {
        Box::pin(async move {
            if (offset / 512).is_multiple_of(3) {
                tokio::task::yield_now().await;
            }
            result
        })
    }
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let result = self.check_range(offset, buf.len() as u64).map(|()| {
            let at = offset as usize;
            buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        });
        self.act(offset, result)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        let result = self.check_range(offset, data.len() as u64).map(|()| {
            let at = offset as usize;
            self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        });
        self.act(offset, result)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.act(0, Ok(()))
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + bytes as usize].fill(0);
        self.act(offset, Ok(()))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        self.act(offset, Ok(Extent { bytes, state }))
    }
}

pub(crate) fn spec(device: Arc<dyn BlockDevice>, access: Access) -> TargetSpec {
    let lun = LunSpec {
        lun: 0,
        device,
        serial: "1".into(),
        product: "memory".into(),
        ident: [1; 16],
    };
    TargetSpec {
        name: iqn(TARGET),
        luns: vec![lun],
        access,
    }
}

pub(crate) async fn serve(device: Arc<dyn BlockDevice>) -> (Server, SocketAddr) {
    serve_with(device, ServerConfig::default(), Access::Anyone).await
}

pub(crate) async fn serve_with(
    device: Arc<dyn BlockDevice>,
    config: ServerConfig,
    access: Access,
) -> (Server, SocketAddr) {
    let server = Server::bind(&["127.0.0.1:0".parse().unwrap()], config).unwrap();
    server.add_target(spec(device, access)).unwrap();
    let portal = server.local_addrs()[0];
    (server, portal)
}

pub(crate) struct Client {
    socket: TcpStream,
    input: Vec<u8>,
    pub(crate) framing: Framing,
    pub(crate) cmd_sn: u32,
    itt: u32,
}

impl Client {
    pub(crate) async fn connect(portal: SocketAddr) -> Self {
        Self {
            socket: TcpStream::connect(portal).await.unwrap(),
            input: Vec::new(),
            framing: Framing::LOGIN,
            cmd_sn: 1,
            itt: 100,
        }
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        // The other side may have closed already; the test sees that by what it receives.
        let _ = self.socket.write_all(bytes).await;
    }

    pub(crate) async fn send(&mut self, pdu: &Pdu, data: &[u8]) {
        let mut bytes = Vec::new();
        self.framing.append(&mut bytes, pdu, data);
        self.send_bytes(&bytes).await;
    }

    pub(crate) async fn receive(&mut self) -> (Pdu, Vec<u8>) {
        timeout(DEADLINE, async {
            loop {
                // What a test receives may be longer than what it accepts to be sent.
                if let Split::Frame(frame) = self.framing.split(&self.input).unwrap() {
                    let received = (Pdu::parse(frame.bhs).unwrap(), frame.data.to_vec());
                    let bytes = frame.bytes;
                    self.input.drain(..bytes);
                    return received;
                }
                assert_ne!(
                    self.socket.read_buf(&mut self.input).await.unwrap(),
                    0,
                    "the connection ended"
                );
            }
        })
        .await
        .expect("an answer in time")
    }

    /// Does the connection end, whatever else comes before?
    pub(crate) async fn ends(&mut self) -> bool {
        timeout(DEADLINE, async {
            let mut buffer = [0; 4096];
            while self.socket.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
        })
        .await
        .is_ok()
    }

    pub(crate) async fn login(portal: SocketAddr, target: &str, number: u8) -> Self {
        let mut client = Self::try_login(portal, target, number).await.expect("a login");
        client.hear_attention().await;
        client
    }

    pub(crate) async fn login_with_digests(portal: SocketAddr, target: &str) -> Self {
        let terms = Terms {
            header_digest: DigestTerms::Require,
            data_digest: DigestTerms::Require,
            ..Terms::default()
        };
        let mut client = Self::negotiate(portal, Some(target), 0, terms)
            .await
            .expect("a login");
        client.hear_attention().await;
        client
    }

    pub(crate) async fn login_with(portal: SocketAddr, target: &str, number: u8, terms: Terms) -> Self {
        let login = Self::negotiate(portal, Some(target), number, terms).await;
        let mut client = login.expect("a login");
        client.hear_attention().await;
        client
    }

    /// A discovery session that stays.
    pub(crate) async fn try_discovery(portal: SocketAddr) -> Result<Self, (u8, u8)> {
        Self::negotiate(portal, None, 0, Terms::default()).await
    }

    pub(crate) async fn try_login(portal: SocketAddr, target: &str, number: u8) -> Result<Self, (u8, u8)> {
        Self::negotiate(portal, Some(target), number, Terms::default()).await
    }

    /// A login as open-iscsi's.
    pub(crate) async fn login_as_linux(portal: SocketAddr, target: &str) -> Self {
        let isid = [0x00, 0x02, 0x3d, 0x01, 0, 0];
        let login = Self::negotiate_as(portal, Some(target), 0, isid, Terms::default()).await;
        let mut client = login.expect("a login");
        client.hear_attention().await;
        client
    }

    async fn negotiate(
        portal: SocketAddr,
        target: Option<&str>,
        number: u8,
        terms: Terms,
    ) -> Result<Self, (u8, u8)> {
        Self::negotiate_as(portal, target, number, [0x80, 0, 0, 0, 0, number], terms).await
    }

    async fn negotiate_as(
        portal: SocketAddr,
        target: Option<&str>,
        number: u8,
        isid: [u8; 6],
        terms: Terms,
    ) -> Result<Self, (u8, u8)> {
        let mut client = Self::connect(portal).await;
        let mut login = InitiatorLogin::new(InitiatorOptions {
            initiator: iqn(&format!("iqn.2026-11.test:client-{number}")),
            target: target.map(iqn),
            isid,
            terms,
        });
        loop {
            let (request, text) = login.request();
            client.send(&request.into(), &text).await;
            let (Pdu::LoginResponse(response), data) = client.receive().await else {
                panic!("no login response")
            };
            match login.response(&response, &data) {
                Ok(Progress::GoOn) => {}
                Ok(Progress::Done(established)) => {
                    client.cmd_sn = established.cmd_sn;
                    client.framing = Framing {
                        header_digest: established.parameters.header_digest,
                        data_digest: established.parameters.data_digest,
                        max_data_bytes: established.parameters.max_recv_bytes,
                    };
                    return Ok(client);
                }
                Err(LoginError::Refused { class, detail }) => return Err((class, detail)),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// A new session's first command is told of the power-on.
    async fn hear_attention(&mut self) {
        let (answer, sense) = self.command([0; 16], 0, None).await.0;
        assert_eq!((answer, sense), (status::CHECK_CONDITION, Some(Sense::POWER_ON)));
    }

    fn cdb(opcode: u8, lba: u64, blocks: u32) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        cdb
    }

    pub(crate) async fn read(&mut self, lba: u64, blocks: u32) -> Vec<u8> {
        let ((answer, sense), data) = self
            .command(Self::cdb(0x88, lba, blocks), blocks * 512, None)
            .await;
        assert_eq!((answer, sense), (status::GOOD, None));
        data
    }

    pub(crate) async fn write(&mut self, lba: u64, data: &[u8]) {
        assert_eq!(self.try_write(lba, data).await, (status::GOOD, None));
    }

    pub(crate) async fn try_write(&mut self, lba: u64, data: &[u8]) -> (u8, Option<Sense>) {
        let cdb = Self::cdb(0x8a, lba, (data.len() / 512) as u32);
        self.command(cdb, data.len() as u32, Some(data)).await.0
    }

    /// One command to its end. Data to write go by R2T only, without immediate ones.
    pub(crate) async fn command(
        &mut self,
        cdb: [u8; 16],
        expected_bytes: u32,
        out: Option<&[u8]>,
    ) -> ((u8, Option<Sense>), Vec<u8>) {
        self.itt += 1;
        let command = ScsiCommand {
            immediate: false,
            final_: true,
            read: out.is_none() && expected_bytes > 0,
            write: out.is_some(),
            attribute: TaskAttribute::Simple,
            lun: LunField(0),
            itt: self.itt,
            expected_bytes,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: 0,
            cdb,
        };
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        // Short writes go as immediate data, so that both ways are taken.
        let immediate = out.filter(|data| data.len() <= 4096).unwrap_or(&[]);
        self.send(&command.into(), immediate).await;
        let mut data_in = Vec::new();
        loop {
            match self.receive().await {
                (Pdu::R2t(r2t), _) => {
                    let (from, to) = (
                        r2t.buffer_offset as usize,
                        (r2t.buffer_offset + r2t.desired_bytes) as usize,
                    );
                    let data = &out.expect("an R2T for a write")[from..to];
                    let pieces: Vec<_> = data.chunks(10_000).collect();
                    for (data_sn, piece) in pieces.iter().enumerate() {
                        let header = DataOut {
                            final_: data_sn + 1 == pieces.len(),
                            lun: r2t.lun,
                            itt: r2t.itt,
                            ttt: r2t.ttt,
                            exp_stat_sn: 0,
                            data_sn: data_sn as u32,
                            buffer_offset: r2t.buffer_offset + data_sn as u32 * 10_000,
                        };
                        self.send(&header.into(), piece).await;
                    }
                }
                (Pdu::DataIn(header), data) => {
                    assert_eq!(
                        (header.itt, header.buffer_offset as usize),
                        (self.itt, data_in.len())
                    );
                    data_in.extend_from_slice(&data);
                    if let Some(answer) = header.status {
                        return ((answer, None), data_in);
                    }
                }
                (Pdu::ScsiResponse(response), data) => {
                    assert_eq!(response.itt, self.itt);
                    let sense = data.get(2..).and_then(Sense::parse);
                    return ((response.status, sense), data_in);
                }
                (other, _) => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn discover(portal: SocketAddr) -> String {
        let mut client = Self::try_discovery(portal).await.expect("a login");
        client.text(&[("SendTargets", "All")]).await
    }

    /// The answer to a text request.
    pub(crate) async fn text(&mut self, keys: &[(&str, &str)]) -> String {
        let mut text = Vec::new();
        for (key, value) in keys {
            append_key(&mut text, key, value);
        }
        let request = TextRequest {
            immediate: false,
            final_: true,
            continues: false,
            lun: LunField(0),
            itt: 1,
            ttt: NO_TAG,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: 0,
        };
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        self.send(&request.into(), &text).await;
        let (Pdu::TextResponse(response), text) = self.receive().await else {
            panic!("no text")
        };
        assert!(response.final_);
        String::from_utf8(text).unwrap()
    }
}
