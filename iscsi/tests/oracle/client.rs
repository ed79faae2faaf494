//! An initiator that sends whatever commands it is told to, many at a time, and the data as the login allows, in pieces
//! of any length.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::time::timeout;
use treeboot_iscsi::login::{InitiatorLogin, InitiatorOptions, LoginError, Parameters, Progress, Terms};
use treeboot_iscsi::pdu::{
    DataOut, Framing, LunField, NO_TAG, NopOut, Pdu, R2t, ScsiCommand, Split, TaskAttribute,
};
use treeboot_iscsi::scsi::Sense;

use crate::support::{TARGET, iqn};

/// Nothing takes longer, unless it never ends.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a command ended.
pub(crate) struct Answer {
    pub(crate) itt: u32,
    pub(crate) status: u8,
    pub(crate) sense: Option<Sense>,
    pub(crate) data: Vec<u8>,
}

struct Pending {
    out: Vec<u8>,
    data: Vec<u8>,
}

pub(crate) struct Client {
    writer: OwnedWriteHalf,
    incoming: mpsc::UnboundedReceiver<(Pdu, Vec<u8>)>,
    framing: Framing,
    parameters: Parameters,
    cmd_sn: u32,
    max_cmd_sn: u32,
    next_itt: u32,
    pending: HashMap<u32, Pending>,
}

async fn next_pdu(
    socket: &mut (impl AsyncReadExt + Unpin),
    input: &mut Vec<u8>,
    framing: &Framing,
) -> io::Result<(Pdu, Vec<u8>)> {
    loop {
        // The proxy cuts, it does not change: whatever is not a PDU is the target's doing.
        if let Split::Frame(frame) = framing.split(input).expect("the target keeps to the framing") {
            let received = (
                Pdu::parse(frame.bhs).expect("the target sends PDUs"),
                frame.data.to_vec(),
            );
            let bytes = frame.bytes;
            input.drain(..bytes);
            return Ok(received);
        }
        if socket.read_buf(input).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

impl Client {
    /// `None`: the connection was cut during the login.
    pub(crate) async fn login(portal: SocketAddr, number: u8, terms: Terms) -> io::Result<Self> {
        timeout(DEADLINE, Self::try_login(portal, number, terms))
            .await
            .expect("a login ends, or its connection does")
    }

    async fn try_login(portal: SocketAddr, number: u8, terms: Terms) -> io::Result<Self> {
        let mut socket = TcpStream::connect(portal).await?;
        socket.set_nodelay(true)?;
        let mut login = InitiatorLogin::new(InitiatorOptions {
            initiator: iqn(&format!("iqn.2026-11.test:client-{number}")),
            target: Some(iqn(TARGET)),
            isid: [0x80, 0, 0, 0, 0, number],
            terms,
        });
        let mut input = Vec::new();
        let (established, max_cmd_sn) = loop {
            let (request, text) = login.request();
            let mut out = Vec::new();
            Framing::LOGIN.append(&mut out, &request.into(), &text);
            socket.write_all(&out).await?;
            let (pdu, data) = next_pdu(&mut socket, &mut input, &Framing::LOGIN).await?;
            let Pdu::LoginResponse(response) = pdu else {
                panic!("not a login response: {pdu:?}")
            };
            match login.response(&response, &data) {
                Ok(Progress::GoOn) => {}
                Ok(Progress::Done(established)) => break (established, response.max_cmd_sn),
                Err(error @ LoginError::Refused { .. }) => panic!("{error}"),
                Err(error) => panic!("{error}"),
            }
        };
        let parameters = established.parameters;
        let framing = Framing {
            header_digest: parameters.header_digest,
            data_digest: parameters.data_digest,
            max_data_bytes: parameters.max_recv_bytes,
        };
        let (mut reader, writer) = socket.into_split();
        // Reading goes on whatever the writer does, so that the two sides never wait for each other.
        let (sender, incoming) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(received) = next_pdu(&mut reader, &mut input, &framing).await {
                if sender.send(received).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            writer,
            incoming,
            framing,
            parameters,
            cmd_sn: established.cmd_sn,
            max_cmd_sn,
            next_itt: 1,
            pending: HashMap::new(),
        })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn may_send(&self) -> bool {
        (self.max_cmd_sn.wrapping_sub(self.cmd_sn) as i32) >= 0
    }

    async fn send(&mut self, pdu: &Pdu, data: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        self.framing.append(&mut out, pdu, data);
        let written = timeout(DEADLINE, self.writer.write_all(&out)).await;
        written.expect("the target reads what it asked for")
    }

    /// Sends a command; gives its tag. `out` is what it writes, `expected` what it reads.
    pub(crate) async fn command(
        &mut self,
        random: &mut StdRng,
        cdb: [u8; 16],
        out: Vec<u8>,
        expected: u32,
    ) -> (u32, io::Result<()>) {
        let itt = self.next_itt;
        self.next_itt = itt.wrapping_add(1);
        let p = self.parameters;
        let first_burst = out.len().min(p.first_burst_bytes as usize);
        let immediate = match p.immediate_data {
            true => random.random_range(0..=first_burst.min(p.peer_max_recv_bytes as usize)),
            false => 0,
        };
        let unsolicited = !p.initial_r2t && immediate < first_burst && random.random();
        let command = ScsiCommand {
            immediate: false,
            final_: !unsolicited,
            read: expected > 0,
            write: !out.is_empty(),
            attribute: TaskAttribute::Simple,
            lun: LunField(0),
            itt,
            expected_bytes: if out.is_empty() {
                expected
            } else {
                out.len() as u32
            },
            cmd_sn: self.cmd_sn,
            exp_stat_sn: 0,
            cdb,
        };
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        let pending = Pending {
            out: out.clone(),
            data: Vec::new(),
        };
        self.pending.insert(itt, pending);
        let mut sent = self.send(&command.into(), &out[..immediate]).await;
        if sent.is_ok() && unsolicited {
            sent = self
                .data_out(random, itt, NO_TAG, LunField(0), immediate..first_burst, &out)
                .await;
        }
        (itt, sent)
    }

    async fn data_out(
        &mut self,
        random: &mut StdRng,
        itt: u32,
        ttt: u32,
        lun: LunField,
        range: std::ops::Range<usize>,
        out: &[u8],
    ) -> io::Result<()> {
        let mut at = range.start;
        let mut data_sn = 0;
        while at < range.end {
            let most = (range.end - at).min(self.parameters.peer_max_recv_bytes as usize);
            let bytes = random.random_range(1..=most.min(8192));
            let header = DataOut {
                final_: at + bytes == range.end,
                lun,
                itt,
                ttt,
                exp_stat_sn: 0,
                data_sn,
                buffer_offset: at as u32,
            };
            self.send(&header.into(), &out[at..at + bytes]).await?;
            at += bytes;
            data_sn += 1;
        }
        Ok(())
    }

    /// Waits for the end of a command, sending what is asked for meanwhile. An error: the connection is lost.
    pub(crate) async fn answer(&mut self, random: &mut StdRng) -> io::Result<Answer> {
        loop {
            let received = timeout(DEADLINE, self.incoming.recv()).await;
            let (pdu, data) = received
                .expect("an answer in time")
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            match pdu {
                Pdu::R2t(r2t) => self.solicited(random, &r2t).await?,
                Pdu::DataIn(header) => {
                    self.max_cmd_sn = header.max_cmd_sn;
                    let pending = self
                        .pending
                        .get_mut(&header.itt)
                        .expect("data of a command of ours");
                    assert_eq!(header.buffer_offset as usize, pending.data.len(), "in order");
                    pending.data.extend_from_slice(&data);
                    if let Some(status) = header.status {
                        return Ok(self.ended(header.itt, status, None));
                    }
                }
                Pdu::ScsiResponse(response) => {
                    self.max_cmd_sn = response.max_cmd_sn;
                    let sense = data.get(2..).and_then(Sense::parse);
                    return Ok(self.ended(response.itt, response.status, sense));
                }
                Pdu::NopIn(nop) => {
                    let answer = NopOut {
                        immediate: true,
                        lun: nop.lun,
                        itt: NO_TAG,
                        ttt: nop.ttt,
                        cmd_sn: self.cmd_sn,
                        exp_stat_sn: 0,
                    };
                    self.send(&answer.into(), &[]).await?;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn solicited(&mut self, random: &mut StdRng, r2t: &R2t) -> io::Result<()> {
        let pending = &self.pending[&r2t.itt];
        let from = r2t.buffer_offset as usize;
        let range = from..from + r2t.desired_bytes as usize;
        let out = pending.out.clone();
        assert!(range.end <= out.len() && r2t.desired_bytes <= self.parameters.max_burst_bytes);
        self.data_out(random, r2t.itt, r2t.ttt, r2t.lun, range, &out)
            .await
    }

    fn ended(&mut self, itt: u32, status: u8, sense: Option<Sense>) -> Answer {
        let pending = self.pending.remove(&itt).expect("an answer to a command of ours");
        Answer {
            itt,
            status,
            sense,
            data: pending.data,
        }
    }
}
