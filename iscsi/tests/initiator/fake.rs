//! A target that does what its script says, honestly or not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use treeboot_iscsi::initiator::SessionOptions;
use treeboot_iscsi::login::{Directory, Refusal, Security, TargetLogin, Terms, Then};
use treeboot_iscsi::pdu::{
    AsyncMessage, DataIn, Framing, LoginResponse, LogoutResponse, LunField, NO_TAG, NopIn, Pdu, Reject,
    Residual, ScsiCommand, ScsiResponse, TaskManagementResponse,
};
use treeboot_types::Iqn;

pub(crate) const DISK_BYTES: u64 = 64 << 20;
pub(crate) const BLOCK: u64 = 512;

/// What the target does.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Script {
    Honest,
    /// Takes the connection and says nothing.
    NoLoginReply,
    /// Answers the first bytes with noise.
    Garbage,
    /// Sends a login status of class 1 with this address.
    MovedTo(String),
    /// Sends a login response with the continue bit, for ever.
    EndlessLogin,
    /// Data-In beyond the expected length.
    TooMuch,
    /// A Data-In that leaves a gap.
    WrongOffset,
    /// A Data-In whose DataSN skips.
    WrongDataSn,
    /// A PDU header that announces 16 MiB.
    HugeSegment,
    /// A response for a task that does not exist.
    UnknownTask,
    /// An operation code that does not exist.
    UnknownOpcode,
    /// Half of the data, with status GOOD.
    Short,
    /// The first reads end with UNIT ATTENTION, the next with BUSY.
    Attention(u64),
    /// MEDIUM ERROR for each read.
    MediumError,
    /// Answers pings, but never a read.
    DeafToReads,
    /// Rejects each read.
    RejectsReads,
    /// After each read asks for a logout.
    AsksForLogout,
    /// Ends the connection in the middle of a Data-In.
    DiesInData,
    /// Pings us before each answer.
    Pings,
    /// Bytes that are not the image's.
    WrongBytes,
    /// Takes this long for each read; answers pings meanwhile.
    Slow(u64),
    /// Opens its command window by one command at a time.
    NarrowWindow,
}

pub(crate) struct Fake {
    pub(crate) addr: SocketAddr,
    pub(crate) shared: Arc<Shared>,
    accept: tokio::task::JoinHandle<()>,
}

pub(crate) struct Shared {
    script: Mutex<Script>,
    pub(crate) reads: AtomicU64,
    pub(crate) sessions: AtomicU64,
    pub(crate) logouts: AtomicU64,
    pub(crate) pongs: AtomicU64,
    connections: Mutex<Vec<tokio::task::AbortHandle>>,
    pub(crate) window_broken: AtomicBool,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.accept.abort();
        self.kill();
    }
}

impl Fake {
    pub(crate) async fn start(script: Script) -> Self {
        Self::start_at(script, SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    pub(crate) async fn start_at(script: Script, at: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            script: Mutex::new(script),
            reads: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            logouts: AtomicU64::new(0),
            pongs: AtomicU64::new(0),
            connections: Mutex::default(),
            window_broken: AtomicBool::new(false),
        });
        let of_task = shared.clone();
        let accept = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let task = tokio::spawn(serve(stream, of_task.clone()));
                of_task.connections.lock().push(task.abort_handle());
            }
        });
        Self { addr, shared, accept }
    }

    pub(crate) fn play(&self, script: Script) {
        *self.shared.script.lock() = script;
    }

    /// Ends every connection, as the death of the process would.
    pub(crate) fn kill(&self) {
        for connection in self.shared.connections.lock().drain(..) {
            connection.abort();
        }
    }

    pub(crate) fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::Relaxed)
    }
}

pub(crate) fn target() -> Iqn {
    Iqn::new("iqn.2026-11.org.example:image").unwrap()
}

pub(crate) fn options(portal: &str) -> SessionOptions {
    let initiator = Iqn::new("iqn.2026-11.org.example:host").unwrap();
    SessionOptions::new(portal, target(), initiator)
}

/// The image: each eight bytes tell their place and LUN.
pub(crate) fn image(lun: u16, offset: u64, bytes: u64) -> Vec<u8> {
    let word = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(lun)).to_le_bytes();
    (offset / 8..(offset + bytes) / 8).flat_map(word).collect()
}

struct Anyone;

impl Directory for Anyone {
    fn admit(&self, _: &Iqn, asked: &Iqn) -> Result<Security, Refusal> {
        match *asked == target() {
            true => Ok(Security::None),
            false => Err(Refusal::NotFound(asked.clone())),
        }
    }

    fn has_session(&self, _: &Iqn, _: u16) -> bool {
        false
    }

    fn new_tsih(&self) -> Result<u16, Refusal> {
        Ok(1)
    }
}

struct Peer {
    stream: TcpStream,
    shared: Arc<Shared>,
    stat_sn: u32,
    exp_cmd_sn: u32,
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    stream.set_nodelay(true).unwrap();
    let mut peer = Peer {
        stream,
        shared,
        stat_sn: 0,
        exp_cmd_sn: 0,
    };
    // The end of a connection, whatever its reason, is the end of the task.
    drop(peer.run().await);
}

impl Peer {
    fn script(&self) -> Script {
        self.shared.script.lock().clone()
    }

    async fn receive(&mut self) -> std::io::Result<(Pdu, Vec<u8>)> {
        let mut bhs = [0; 48];
        self.stream.read_exact(&mut bhs).await?;
        let bytes = u32::from_be_bytes([0, bhs[5], bhs[6], bhs[7]]) as usize;
        let mut data = vec![0; bytes.next_multiple_of(4)];
        self.stream.read_exact(&mut data).await?;
        data.truncate(bytes);
        Ok((Pdu::parse(&bhs).expect("our initiator sends PDUs"), data))
    }

    async fn send(&mut self, pdu: impl Into<Pdu>, data: &[u8]) -> std::io::Result<()> {
        let mut out = Vec::new();
        Framing::LOGIN.append(&mut out, &pdu.into(), data);
        self.stream.write_all(&out).await
    }

    async fn run(&mut self) -> std::io::Result<()> {
        self.log_in().await?;
        self.shared.sessions.fetch_add(1, Ordering::Relaxed);
        loop {
            let (pdu, data) = self.receive().await?;
            match pdu {
                Pdu::ScsiCommand(command) => {
                    if command.cmd_sn != self.exp_cmd_sn {
                        self.shared.window_broken.store(true, Ordering::Relaxed);
                    }
                    self.exp_cmd_sn = self.exp_cmd_sn.wrapping_add(1);
                    self.command(command).await?;
                }
                Pdu::NopOut(nop) if nop.itt != NO_TAG => {
                    let pong = self.nop_in(nop.itt, NO_TAG);
                    self.send(pong, &data).await?;
                }
                Pdu::NopOut(nop) => {
                    assert_eq!((nop.ttt, &data[..]), (77, &b"ping"[..]));
                    self.shared.pongs.fetch_add(1, Ordering::Relaxed);
                }
                Pdu::TaskManagementRequest(request) => {
                    let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.next_status();
                    let done = TaskManagementResponse {
                        response: 0,
                        itt: request.itt,
                        stat_sn,
                        exp_cmd_sn,
                        max_cmd_sn,
                    };
                    self.send(done, &[]).await?;
                }
                Pdu::LogoutRequest(request) => {
                    self.shared.logouts.fetch_add(1, Ordering::Relaxed);
                    let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.next_status();
                    let done = LogoutResponse {
                        response: 0,
                        itt: request.itt,
                        stat_sn,
                        exp_cmd_sn,
                        max_cmd_sn,
                        time2wait_s: 0,
                        time2retain_s: 0,
                    };
                    return self.send(done, &[]).await;
                }
                other => panic!("our initiator sent {other:?}"),
            }
        }
    }

    fn max_cmd_sn(&self) -> u32 {
        match self.script() {
            Script::NarrowWindow => self.exp_cmd_sn,
            _ => self.exp_cmd_sn.wrapping_add(127),
        }
    }

    /// A new StatSN, ExpCmdSN, MaxCmdSN.
    fn next_status(&mut self) -> (u32, u32, u32) {
        self.stat_sn = self.stat_sn.wrapping_add(1);
        (self.stat_sn.wrapping_sub(1), self.exp_cmd_sn, self.max_cmd_sn())
    }

    fn nop_in(&mut self, itt: u32, ttt: u32) -> NopIn {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = match itt {
            NO_TAG => (self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn()),
            _ => self.next_status(),
        };
        NopIn {
            lun: LunField::default(),
            itt,
            ttt,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
        }
    }

    async fn log_in(&mut self) -> std::io::Result<()> {
        let mut login = TargetLogin::new(Terms::default());
        loop {
            let (pdu, data) = self.receive().await?;
            let Pdu::LoginRequest(request) = pdu else {
                panic!("{pdu:?}")
            };
            let mut reply = login.take(&request, &data, &Anyone);
            match self.script() {
                Script::NoLoginReply => std::future::pending::<()>().await,
                Script::Garbage => return self.stream.write_all(&[0xa5; 400]).await,
                Script::EndlessLogin => {
                    let response = LoginResponse {
                        continues: true,
                        transit: false,
                        next_stage: 0,
                        ..reply.response
                    };
                    self.send(response, b"X-com.example.endless=1").await?;
                    continue;
                }
                Script::MovedTo(address) => {
                    reply.response.status_class = 1;
                    reply.response.status_detail = 1;
                    reply.response.transit = false;
                    let text = format!("TargetAddress={address},1\0");
                    return self.send(reply.response, text.as_bytes()).await;
                }
                Script::NarrowWindow => reply.response.max_cmd_sn = reply.response.exp_cmd_sn,
                _ => {}
            }
            self.send(reply.response, &reply.text).await?;
            match reply.then {
                Then::GoOn => {}
                Then::FullFeature(established) => {
                    self.exp_cmd_sn = established.cmd_sn;
                    self.stat_sn = established.stat_sn;
                    return Ok(());
                }
                Then::Close(_) => return Err(std::io::ErrorKind::Other.into()),
            }
        }
    }

    async fn status(&mut self, itt: u32, status: u8, sense: &[u8]) -> std::io::Result<()> {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.next_status();
        let response = ScsiResponse {
            residual: Residual::None,
            response: 0,
            status,
            itt,
            snack_tag: 0,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            exp_data_sn: 0,
        };
        let mut data = Vec::new();
        if !sense.is_empty() {
            data.extend_from_slice(&(sense.len() as u16).to_be_bytes());
            data.extend_from_slice(sense);
        }
        self.send(response, &data).await
    }

    fn data_in(&mut self, itt: u32, data_sn: u32, buffer_offset: u32, last: bool) -> DataIn {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = match last {
            true => self.next_status(),
            false => (0, self.exp_cmd_sn, self.max_cmd_sn()),
        };
        DataIn {
            final_: last,
            acknowledge: false,
            status: last.then_some(0),
            residual: Residual::None,
            lun: LunField::default(),
            itt,
            ttt: NO_TAG,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            data_sn,
            buffer_offset,
        }
    }

    async fn command(&mut self, command: ScsiCommand) -> std::io::Result<()> {
        let cdb = command.cdb;
        let lun = command.lun.number().unwrap();
        let (lba, blocks) = match cdb[0] {
            0x00 => return self.status(command.itt, 0, &[]).await,
            // It knows no states of access.
            0x12 => {
                let pdu = self.data_in(command.itt, 0, 0, true);
                return self.send(pdu, &[0; 36]).await;
            }
            0x9e => {
                let mut data = [0; 32];
                data[..8].copy_from_slice(&(DISK_BYTES / BLOCK - 1).to_be_bytes());
                data[8..12].copy_from_slice(&(BLOCK as u32).to_be_bytes());
                let pdu = self.data_in(command.itt, 0, 0, true);
                return self.send(pdu, &data).await;
            }
            0x28 => (
                u64::from(u32::from_be_bytes(cdb[2..6].try_into().unwrap())),
                u64::from(u16::from_be_bytes(cdb[7..9].try_into().unwrap())),
            ),
            0x88 => (
                u64::from_be_bytes(cdb[2..10].try_into().unwrap()),
                u64::from(u32::from_be_bytes(cdb[10..14].try_into().unwrap())),
            ),
            other => panic!("our initiator sent command {other:#x}"),
        };
        let nth = self.shared.reads.fetch_add(1, Ordering::Relaxed);
        let data = image(lun, lba * BLOCK, blocks * BLOCK);
        self.read(command, nth, data).await
    }

    async fn read(&mut self, command: ScsiCommand, nth: u64, mut data: Vec<u8>) -> std::io::Result<()> {
        let itt = command.itt;
        let half = (data.len() / 2).next_multiple_of(4);
        match self.script() {
            Script::TooMuch => {
                data.extend_from_slice(&[0; 512]);
            }
            Script::WrongOffset => {
                let pdu = self.data_in(itt, 0, 512, true);
                return self.send(pdu, &data[512..]).await;
            }
            Script::WrongDataSn => {
                let pdu = self.data_in(itt, 3, 0, true);
                return self.send(pdu, &data).await;
            }
            Script::HugeSegment => {
                let mut bhs = Pdu::from(self.data_in(itt, 0, 0, true)).encode();
                bhs[5..8].copy_from_slice(&[0xff; 3]);
                return self.stream.write_all(&bhs).await;
            }
            Script::UnknownTask => return self.status(itt ^ 0x5555_0000, 0, &[]).await,
            Script::UnknownOpcode => return self.stream.write_all(&[0x3e; 48]).await,
            Script::Short => data.truncate(half),
            Script::Attention(times) if nth < times => {
                return match nth % 2 {
                    0 => {
                        self.status(itt, 2, &[0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 0])
                            .await
                    }
                    _ => self.status(itt, 8, &[]).await,
                };
            }
            Script::MediumError => {
                return self.status(itt, 2, &[0x72, 3, 0x11, 0]).await;
            }
            Script::DeafToReads => return Ok(()),
            Script::RejectsReads => {
                let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.next_status();
                let reject = Reject {
                    reason: 9,
                    stat_sn,
                    exp_cmd_sn,
                    max_cmd_sn,
                    data_sn: 0,
                };
                return self.send(reject, &Pdu::from(command).encode()).await;
            }
            Script::AsksForLogout => {
                let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.next_status();
                let message = AsyncMessage {
                    lun: LunField::default(),
                    stat_sn,
                    exp_cmd_sn,
                    max_cmd_sn,
                    event: 1,
                    vendor_code: 0,
                    parameters: [0, 0, 3],
                };
                self.send(message, &[]).await?;
            }
            Script::DiesInData => {
                let mut out = Vec::new();
                let pdu = self.data_in(itt, 0, 0, true);
                Framing::LOGIN.append(&mut out, &pdu.into(), &data);
                self.stream.write_all(&out[..out.len() / 2]).await?;
                return Err(std::io::ErrorKind::Other.into());
            }
            Script::Pings => {
                let ping = self.nop_in(NO_TAG, 77);
                self.send(ping, b"ping").await?;
            }
            Script::WrongBytes => data.fill(0xee),
            Script::Slow(ms) => self.dawdle(ms).await?,
            _ => {}
        }
        // In two PDUs, as a target with a small segment limit would.
        if data.len() > half {
            let first = self.data_in(itt, 0, 0, false);
            self.send(first, &data[..half]).await?;
            let second = self.data_in(itt, 1, half as u32, true);
            self.send(second, &data[half..]).await
        } else {
            let only = self.data_in(itt, 0, 0, true);
            self.send(only, &data).await
        }
    }

    /// Answers pings for a while, and nothing else.
    async fn dawdle(&mut self, ms: u64) -> std::io::Result<()> {
        let until = tokio::time::Instant::now() + Duration::from_millis(ms);
        let mut bhs = [0; 48];
        loop {
            // Only whole PDUs are taken, so that a timeout loses nothing.
            match tokio::time::timeout_at(until, self.stream.peek(&mut bhs)).await {
                Err(_) => return Ok(()),
                Ok(Ok(48)) => {}
                Ok(Ok(0)) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(other) => {
                    other?;
                    continue;
                }
            }
            match self.receive().await? {
                (Pdu::NopOut(nop), data) => {
                    let pong = self.nop_in(nop.itt, NO_TAG);
                    self.send(pong, &data).await?;
                }
                // Further commands on a slow path get no answer in this script.
                (Pdu::ScsiCommand(_), _) => self.exp_cmd_sn = self.exp_cmd_sn.wrapping_add(1),
                (other, _) => panic!("our initiator sent {other:?}"),
            }
        }
    }
}
