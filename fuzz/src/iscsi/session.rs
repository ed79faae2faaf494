//! Whole sessions as byte streams, against a server over a pipe in memory.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use treeboot_block::{BlockDevice, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::login::{append_key, parse_keys};
use treeboot_iscsi::pdu::{Framing, LoginRequest, Pdu, Split};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::Iqn;

/// The only target there is.
pub const TARGET: &str = "iqn.2026-11.test:disk";
const BYTES: usize = 64 * 1024;
/// No stream of a fuzzer is longer, so none takes longer.
const LIMIT: Duration = Duration::from_secs(20);
/// The first CmdSN of a session that this module logs in.
const FIRST_CMD_SN: u32 = u32::MAX - 1;

struct Memory {
    bytes: Mutex<Vec<u8>>,
    geometry: Geometry,
}

impl Memory {
    fn act<'a, T: Send + 'a>(
        &'a self,
        offset: u64,
        bytes: u64,
        act: impl FnOnce(&mut [u8]) -> T + Send + 'a,
    ) -> IoFuture<'a, T> {
        Box::pin(async move {
            self.check_range(offset, bytes)?;
            if offset & 0x1000 != 0 {
                tokio::task::yield_now().await;
            }
            let mut whole = self.bytes.lock().expect("nobody panicked with it");
            Ok(act(&mut whole[offset as usize..(offset + bytes) as usize]))
        })
    }
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        self.act(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        assert!(!self.geometry.read_only, "a read-only unit is written");
        self.act(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.act(0x1000, 0, |_| ())
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        assert!(!self.geometry.read_only, "a read-only unit is written");
        self.act(offset, bytes, |bytes| bytes.fill(0))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = if offset & 0x2000 == 0 {
            Provisioning::Mapped
        } else {
            Provisioning::Hole
        };
        self.act(offset, bytes, move |_| Extent { bytes, state })
    }
}

fn lun(lun: u16, block_bytes: u32, read_only: bool) -> LunSpec {
    let geometry = Geometry {
        bytes: BYTES as u64,
        block_bytes,
        physical_block_bytes: 4096,
        read_only,
        thin: !read_only,
    };
    LunSpec {
        lun,
        device: Arc::new(Memory {
            bytes: Mutex::new(vec![lun as u8; BYTES]),
            geometry,
        }),
        serial: "1".into(),
        product: "memory".into(),
        ident: [lun as u8; 16],
    }
}

fn runtime() -> &'static Mutex<tokio::runtime::Runtime> {
    static RUNTIME: OnceLock<Mutex<tokio::runtime::Runtime>> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        Mutex::new(runtime.expect("a runtime"))
    })
}

/// The first byte chooses: 0xff, the rest is the initiator's stream from its first byte; otherwise its bits are the
/// login's terms, and the rest are PDUs: a byte of flags, the header, length of the data, data. Lengths and digests are
/// made to fit, so that a mutation reaches what is behind them.
pub fn session(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let stream = if kind == 0xff {
        rest.to_vec()
    } else {
        scripted(kind, rest)
    };
    // A panic of an earlier run leaves nothing half done here.
    let runtime = runtime()
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let answer = runtime.block_on(async {
        let server = Server::without_portals(ServerConfig::default());
        let spec = TargetSpec {
            name: Iqn::new(TARGET).expect("a name"),
            luns: vec![lun(0, 512, false), lun(1, 4096, false), lun(2, 512, true)],
            access: Access::Anyone,
        };
        server.add_target(spec).expect("a target");
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (mut reader, mut writer) = tokio::io::split(near);
        let send = async {
            // The server may close before it has read all.
            let _ = writer.write_all(&stream).await;
            let _ = writer.shutdown().await;
        };
        let mut answer = Vec::new();
        let talk = async { tokio::join!(server.converse(far), send, reader.read_to_end(&mut answer)) };
        let ended = tokio::time::timeout(LIMIT, talk).await;
        // Reading ends where the server closes, in order or not.
        let ((), (), _) = ended.expect("a session ends with its stream");
        answer
    });
    check(&answer);
}

/// Whatever was sent, what comes back are PDUs of a target.
fn check(mut answer: &[u8]) {
    let mut framing = Framing::LOGIN;
    while let Ok(Split::Frame(frame)) = framing.split(answer) {
        let pdu = Pdu::parse(frame.bhs).expect("a target sends PDUs");
        assert!(frame.bhs[0] & 0x20 != 0, "{pdu:?}");
        if let Pdu::LoginResponse(response) = &pdu {
            let keys = parse_keys(frame.data).expect("text");
            let on = |key| keys.contains(&(key, "CRC32C"));
            let (header_digest, data_digest) = (on("HeaderDigest"), on("DataDigest"));
            framing.header_digest |= header_digest;
            framing.data_digest |= data_digest;
            if response.status_class == 0 && !(response.transit && response.next_stage == 3) {
                // Digests begin with the full feature phase; a login of several steps is not followed further.
                if framing.header_digest || framing.data_digest {
                    return;
                }
            } else {
                framing.max_data_bytes = 0x00ff_ffff;
            }
        }
        answer = &answer[frame.bytes..];
    }
    let cut = matches!(framing.split(answer), Ok(Split::Need(_)));
    assert!(
        cut,
        "the target's stream cannot be followed: {:02x?}",
        &answer[..answer.len().min(64)]
    );
}

/// A raw input.
pub fn raw(stream: &[u8]) -> Vec<u8> {
    let mut input = vec![0xff];
    input.extend_from_slice(stream);
    input
}

/// One PDU of an input of the other kind.
pub fn framed(input: &mut Vec<u8>, flags: u8, pdu: &Pdu, data: &[u8]) {
    input.push(flags);
    input.extend_from_slice(&pdu.encode());
    input.extend_from_slice(&(data.len() as u16).to_be_bytes());
    input.extend_from_slice(data);
}

fn scripted(kind: u8, mut rest: &[u8]) -> Vec<u8> {
    let digest = |bit: u8| kind & bit != 0;
    let mut text = Vec::new();
    append_key(&mut text, "InitiatorName", "iqn.2026-11.test:fuzz");
    if digest(0x40) {
        append_key(&mut text, "SessionType", "Discovery");
    } else {
        append_key(&mut text, "TargetName", TARGET);
    }
    for (bit, key, value) in [
        (1, "HeaderDigest", "CRC32C"),
        (2, "DataDigest", "CRC32C"),
        (4, "InitialR2T", "No"),
        (8, "ImmediateData", "No"),
        (16, "MaxBurstLength", "512"),
        (32, "MaxRecvDataSegmentLength", "512"),
    ] {
        if digest(bit) {
            append_key(&mut text, key, value);
        }
    }
    let request = LoginRequest {
        transit: true,
        continues: false,
        current_stage: 1,
        next_stage: 3,
        version_max: 0,
        version_min: 0,
        isid: [0x80, 0, 0, 0, 0, 1],
        tsih: 0,
        itt: 0,
        cid: 0,
        cmd_sn: FIRST_CMD_SN,
        exp_stat_sn: 0,
    };
    let mut stream = Vec::new();
    Framing::LOGIN.append(&mut stream, &request.into(), &text);
    let framing = Framing {
        header_digest: digest(1),
        data_digest: digest(2),
        max_data_bytes: 0x00ff_ffff,
    };
    let mut cmd_sn = FIRST_CMD_SN;
    while let Some((&flags, after)) = rest.split_first() {
        let Some((bhs, after)) = after.split_first_chunk::<48>() else {
            break;
        };
        let (high, low) = (
            after.first().copied().unwrap_or(0),
            after.get(1).copied().unwrap_or(0),
        );
        let after = after.get(2..).unwrap_or(&[]);
        let bytes = usize::from(u16::from_be_bytes([high, low])).min(after.len());
        let (data, after) = after.split_at(bytes);
        rest = after;
        let mut bhs = *bhs;
        bhs[4] = 0;
        if flags & 1 == 0 {
            // The number that is due, unless it is delivered at once.
            bhs[24..28].copy_from_slice(&cmd_sn.to_be_bytes());
            if bhs[0] & 0x40 == 0 && matches!(bhs[0] & 0x3f, 0..=2 | 4 | 6) {
                cmd_sn = cmd_sn.wrapping_add(1);
            }
        }
        if flags & 2 == 0 {
            // Few tags, so that PDUs meet.
            bhs[16..19].fill(0);
            bhs[19] &= 7;
        }
        if flags & 4 == 0 {
            bhs[8..16].fill(0);
            bhs[9] = flags >> 6;
        }
        let at = stream.len();
        stream.resize(at + framing.frame_bytes(data.len()), 0);
        let data_at = at + framing.data_at();
        stream[data_at..data_at + data.len()].copy_from_slice(data);
        framing.seal(&mut stream[at..], bhs, data.len());
    }
    stream
}
