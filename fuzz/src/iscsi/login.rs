//! Login text, to either side.

use std::error::Error;

use treeboot_iscsi::login::{
    Challenge, Chap, Credentials, Directory, InitiatorLogin, InitiatorOptions, MAX_REQUEST_TEXT_BYTES,
    Refusal, Secret, Security, TargetLogin, Terms, Then, parse_keys,
};
use treeboot_iscsi::pdu::{LoginRequest, LoginResponse};
use treeboot_types::Iqn;

/// Everybody may log in, with a secret or without.
struct Door(Security);

impl Directory for Door {
    fn admit(&self, _initiator: &Iqn, target: &Iqn) -> Result<Security, Refusal> {
        match target.as_str().ends_with("none") {
            true => Err(Refusal::NotFound(target.clone())),
            false => Ok(self.0.clone()),
        }
    }

    fn challenge(&self) -> Option<Challenge> {
        Some(Challenge::from_random([7; 33]))
    }

    fn has_session(&self, _initiator: &Iqn, tsih: u16) -> bool {
        tsih == 1
    }

    fn new_tsih(&self) -> Result<u16, Refusal> {
        Ok(2)
    }
}

fn chap() -> Chap {
    let credentials = |user: &str, secret: &str| {
        let secret = Secret::new(secret).expect("long enough");
        Credentials::new(user, secret).expect("a user")
    };
    Chap::mutual(
        credentials("user", "secret-of-user-1"),
        credentials("target", "secret-of-target"),
    )
    .expect("two secrets that differ")
}

/// What a log would show of an error is one line, printable, and short.
fn is_fit_for_a_log(error: &dyn Error) {
    let mut next = Some(error);
    while let Some(error) = next {
        let line = error.to_string();
        assert!(
            line.len() < 1024 && !line.contains(|c: char| c.is_control()),
            "{line:?}"
        );
        next = error.source();
    }
}

/// The first byte chooses side and secret; then messages: flags, stages, length, text.
pub fn login(data: &[u8]) {
    let Some((&kind, mut rest)) = data.split_first() else {
        return;
    };
    let security = if kind & 1 == 0 {
        Security::None
    } else {
        Security::Chap(chap())
    };
    let mut target = TargetLogin::new(Terms::default());
    let mut initiator = initiator(&security);
    let door = Door(security);
    let mut text_bytes = 0;
    while let Some((&[flags, high, low], after)) = rest.split_first_chunk() {
        let bytes = usize::from(u16::from_be_bytes([high, low])).min(after.len());
        let (text, after) = after.split_at(bytes);
        rest = after;
        text_bytes += text.len();
        let goes_on = match kind & 2 {
            0 => request(&mut target, flags, text, &door),
            _ => response(&mut initiator, flags, text),
        };
        if !goes_on || text_bytes > 4 * MAX_REQUEST_TEXT_BYTES {
            return;
        }
    }
}

fn request(login: &mut TargetLogin, flags: u8, text: &[u8], door: &Door) -> bool {
    let request = LoginRequest {
        transit: flags & 0x80 != 0,
        continues: flags & 0x40 != 0,
        current_stage: flags >> 2 & 3,
        next_stage: flags & 3,
        version_max: 0,
        version_min: flags >> 5 & 1,
        isid: [0x80, 0, 0, 0, 0, 1],
        tsih: u16::from(flags >> 4 & 1),
        itt: 0,
        cid: 0,
        cmd_sn: u32::MAX,
        exp_stat_sn: u32::MAX,
    };
    let reply = login.take(&request, text, door);
    // The initiator takes no more during a login (RFC 7143 §13.12).
    assert!(reply.text.len() <= 8192, "{} bytes of text", reply.text.len());
    parse_keys(&reply.text).expect("our text is text");
    match reply.then {
        Then::GoOn => {
            assert_eq!(reply.response.status_class, 0);
            true
        }
        Then::FullFeature(established) => {
            assert!(reply.response.transit && established.tsih != 0);
            let p = established.parameters;
            assert!((512..=0x00ff_ffff).contains(&p.peer_max_recv_bytes));
            assert!(p.first_burst_bytes <= p.max_burst_bytes && p.max_burst_bytes >= 512);
            assert!(p.max_outstanding_r2t >= 1);
            if let Security::Chap(_) = &door.0
                && established.target.is_some()
            {
                panic!("nobody here knows the secret");
            }
            false
        }
        Then::Close(refusal) => {
            assert_ne!(reply.response.status_class, 0);
            is_fit_for_a_log(&refusal);
            false
        }
    }
}

fn initiator(security: &Security) -> InitiatorLogin {
    let name = |text: &str| Iqn::new(text).expect("a name");
    let options = InitiatorOptions {
        initiator: name("iqn.2026-11.test:a"),
        target: Some(name("iqn.2026-11.test:b")),
        isid: [0x80, 0, 0, 0, 0, 1],
        terms: Terms::default(),
    };
    match security {
        Security::Chap(chap) => {
            InitiatorLogin::with_chap(options, chap.clone(), Challenge::from_random([9; 33]))
        }
        Security::None => InitiatorLogin::new(options),
    }
}

fn response(login: &mut InitiatorLogin, flags: u8, text: &[u8]) -> bool {
    let (request, sent) = login.request();
    assert!(sent.len() <= 8192);
    parse_keys(&sent).expect("our text is text");
    let response = LoginResponse {
        transit: flags & 0x80 != 0,
        continues: flags & 0x40 != 0,
        current_stage: flags >> 2 & 3,
        next_stage: flags & 3,
        version_max: 0,
        version_active: 0,
        isid: request.isid,
        tsih: 2,
        itt: request.itt,
        stat_sn: request.exp_stat_sn,
        exp_cmd_sn: request.cmd_sn,
        max_cmd_sn: request.cmd_sn,
        status_class: flags >> 5 & 1,
        status_detail: flags >> 4 & 1,
    };
    match login.response(&response, text) {
        Ok(treeboot_iscsi::login::Progress::GoOn) => true,
        Ok(treeboot_iscsi::login::Progress::Done(_)) => false,
        Err(error) => {
            is_fit_for_a_log(&error);
            false
        }
    }
}
