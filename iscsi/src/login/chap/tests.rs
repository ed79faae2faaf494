use std::cell::RefCell;

use proptest::prelude::*;
use treeboot_types::Iqn;

use super::*;
use crate::login::{
    Directory, InitiatorLogin, InitiatorOptions, LoginError, Progress, Refusal, Reply, Security, TargetLogin,
    Terms, Then, append_key, parse_keys, stage,
};
use crate::pdu::LoginRequest;

const SECRET: &str = "a secret of the initiator";
const OTHER: &str = "a secret of the target";

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn credentials(user: &str, text: &str) -> Credentials {
    Credentials::new(user, secret(text)).unwrap()
}

fn one_way() -> Chap {
    Chap::one_way(credentials("alice", SECRET))
}

fn mutual() -> Chap {
    Chap::mutual(credentials("alice", SECRET), credentials("disk", OTHER)).unwrap()
}

fn iqn(text: &str) -> Iqn {
    Iqn::new(text).unwrap()
}

/// One target for all, which asks for this, and whose challenges are 1, 2, 3 …
struct Desk {
    security: Security,
    asked: RefCell<Vec<Vec<u8>>>,
}

impl Desk {
    fn new(security: Security) -> Self {
        Self {
            security,
            asked: RefCell::default(),
        }
    }
}

impl Directory for Desk {
    fn admit(&self, _: &Iqn, _: &Iqn) -> Result<Security, Refusal> {
        Ok(self.security.clone())
    }

    fn challenge(&self) -> Option<Challenge> {
        let mut asked = self.asked.borrow_mut();
        let challenge = Challenge::from_random([asked.len() as u8 + 1; CHALLENGE_BYTES + 1]);
        asked.push(challenge.bytes().to_vec());
        Some(challenge)
    }

    fn is_ours(&self, challenge: &[u8]) -> bool {
        self.asked.borrow().iter().any(|ours| ours == challenge)
    }

    fn has_session(&self, _: &Iqn, _: u16) -> bool {
        false
    }

    fn new_tsih(&self) -> Result<u16, Refusal> {
        Ok(1)
    }
}

fn initiator(chap: Option<Chap>) -> InitiatorLogin {
    let options = InitiatorOptions {
        initiator: iqn("iqn.a:me"),
        target: Some(iqn("iqn.a:t")),
        isid: [0x80, 0, 0, 0, 0, 1],
        terms: Terms::default(),
    };
    match chap {
        Some(chap) => {
            InitiatorLogin::with_chap(options, chap, Challenge::from_random([0xee; CHALLENGE_BYTES + 1]))
        }
        None => InitiatorLogin::new(options),
    }
}

#[derive(Debug)]
enum End {
    Agreed,
    /// By the target, with this status.
    Refused(u8, u8),
    /// By the initiator.
    Left(LoginError),
}

/// Runs the two machines against each other; `meddle` may change what the target answers.
fn run(ours: Option<Chap>, desk: &Desk, mut meddle: impl FnMut(&mut Reply)) -> End {
    let mut initiator = initiator(ours);
    let mut target = TargetLogin::new(Terms::default());
    loop {
        let (request, text) = initiator.request();
        let mut reply = target.take(&request, &text, desk);
        meddle(&mut reply);
        match (initiator.response(&reply.response, &reply.text), reply.then) {
            (Ok(Progress::GoOn), Then::GoOn) => {}
            (Ok(Progress::Done(ours)), Then::FullFeature(theirs)) => {
                assert_eq!(
                    (ours.security, theirs.security.clone()),
                    (desk.security.clone(), desk.security.clone())
                );
                return End::Agreed;
            }
            (Err(LoginError::Refused { class, detail }), Then::Close(_)) => {
                return End::Refused(class, detail);
            }
            (Err(error), _) => return End::Left(error),
            (progress, then) => panic!("{progress:?} against {then:?}"),
        }
    }
}

fn refused(end: End) -> (u8, u8) {
    match end {
        End::Refused(class, detail) => (class, detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_knows_the_secret_is_let_in_one_way_and_mutually() {
    for chap in [one_way(), mutual()] {
        let desk = Desk::new(Security::Chap(chap.clone()));
        assert!(matches!(run(Some(chap), &desk, |_| {}), End::Agreed));
    }
    // The target's proof is for initiators that want it.
    let desk = Desk::new(Security::Chap(mutual()));
    let mut login = initiator(Some(one_way()));
    let mut target = TargetLogin::new(Terms::default());
    for _ in 0..3 {
        let (request, text) = login.request();
        let reply = target.take(&request, &text, &desk);
        login.response(&reply.response, &reply.text).unwrap();
    }
    assert_eq!(login.request().0.current_stage, stage::OPERATIONAL);
}

#[test]
fn who_does_not_prove_itself_is_refused_in_the_same_way_whatever_is_wrong() {
    let desk = Desk::new(Security::Chap(one_way()));
    let wrong = |user, text| Some(Chap::one_way(credentials(user, text)));
    for ours in [
        wrong("alice", OTHER),
        wrong("mallory", SECRET),
        wrong("alicf", "yet another secret"),
        wrong("ALICE", SECRET),
        None,
        Some(mutual()),
    ] {
        let status = refused(run(ours.clone(), &desk, |_| {}));
        assert_eq!(status, status::AUTHENTICATION_FAILURE, "{ours:?}");
    }
    let open = Desk::new(Security::None);
    assert_eq!(
        refused(run(Some(one_way()), &open, |_| {})),
        status::AUTHENTICATION_FAILURE
    );
}

/// Takes keys away from a reply, and adds others.
fn replace(reply: &mut Reply, without: &[&str], with: &[(&str, &str)]) {
    let old = std::mem::take(&mut reply.text);
    for (key, value) in parse_keys(&old).unwrap() {
        if !without.contains(&key) {
            append_key(&mut reply.text, key, value);
        }
    }
    for (key, value) in with {
        append_key(&mut reply.text, key, value);
    }
}

fn has(reply: &Reply, key: &str) -> bool {
    parse_keys(&reply.text)
        .unwrap()
        .iter()
        .any(|(name, _)| *name == key)
}

#[test]
fn a_target_that_does_not_prove_itself_is_left() {
    let desk = Desk::new(Security::Chap(mutual()));
    let zeroes = format!("0x{}", "00".repeat(32));
    let own_challenge = format!("0x{}", "ee".repeat(32));
    let other = format!("0x{}", "ab".repeat(16));
    type Meddling<'a> = (&'a [&'a str], Vec<(&'a str, &'a str)>);
    let at_proof: [Meddling<'_>; 5] = [
        (&["CHAP_R"], vec![("CHAP_R", &zeroes)]),
        (&["CHAP_N"], vec![("CHAP_N", "other")]),
        (&["CHAP_N", "CHAP_R"], vec![]),
        (&["CHAP_R"], vec![("CHAP_R", "0xzz")]),
        (&[], vec![("CHAP_C", &other)]),
    ];
    for (without, with) in at_proof {
        let end = run(Some(mutual()), &desk, |reply| {
            if has(reply, "CHAP_R") {
                replace(reply, without, &with);
            }
        });
        assert!(
            matches!(end, End::Left(LoginError::Chap(_))),
            "{without:?} {with:?}: {end:?}"
        );
    }
    // Our question back, an algorithm that was not offered, a way around it all.
    let at_question: [Meddling<'_>; 4] = [
        (&["CHAP_C"], vec![("CHAP_C", &own_challenge)]),
        (&["CHAP_A"], vec![("CHAP_A", "6")]),
        (&["CHAP_I"], vec![("CHAP_I", "256")]),
        (&["CHAP_A"], vec![]),
    ];
    for (without, with) in at_question {
        let end = run(Some(mutual()), &desk, |reply| {
            if has(reply, "CHAP_A") {
                replace(reply, without, &with);
            }
        });
        assert!(
            matches!(end, End::Left(LoginError::Chap(_))),
            "{without:?} {with:?}: {end:?}"
        );
    }
    let end = run(Some(mutual()), &desk, |reply| {
        replace(reply, &["AuthMethod"], &[("AuthMethod", "None")]);
    });
    assert!(matches!(end, End::Left(LoginError::Authentication(_))), "{end:?}");
    for chap in [one_way(), mutual()] {
        let end = run(Some(chap), &desk, |reply| {
            reply.text.clear();
            reply.response.transit = true;
            reply.response.next_stage = stage::OPERATIONAL;
        });
        assert!(
            matches!(end, End::Left(LoginError::Chap(ChapError::Required))),
            "{end:?}"
        );
    }
}

fn request(current_stage: u8, next_stage: u8, transit: bool) -> LoginRequest {
    LoginRequest {
        transit,
        continues: false,
        current_stage,
        next_stage: if transit { next_stage } else { 0 },
        version_max: 0,
        version_min: 0,
        isid: [0; 6],
        tsih: 0,
        itt: 5,
        cid: 1,
        cmd_sn: 100,
        exp_stat_sn: 50,
    }
}

fn text(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in pairs {
        append_key(&mut data, key, value);
    }
    data
}

const NAMES: [(&str, &str); 2] = [("InitiatorName", "iqn.a:me"), ("TargetName", "iqn.a:t")];

/// A target that has agreed on CHAP and, on the second call, has asked.
fn talk(desk: &Desk, steps: &[&[(&str, &str)]]) -> (TargetLogin, Reply) {
    let mut target = TargetLogin::new(Terms::default());
    let security = request(stage::SECURITY, stage::OPERATIONAL, true);
    let mut first = NAMES.to_vec();
    first.extend_from_slice(steps[0]);
    let mut reply = target.take(&security, &text(&first), desk);
    for step in &steps[1..] {
        assert!(
            matches!(reply.then, Then::GoOn) && !reply.response.transit,
            "{reply:?}"
        );
        reply = target.take(&security, &text(step), desk);
    }
    (target, reply)
}

fn status_of(desk: &Desk, steps: &[&[(&str, &str)]]) -> (u8, u8) {
    let (_, reply) = talk(desk, steps);
    (reply.response.status_class, reply.response.status_detail)
}

const OFFER: &[(&str, &str)] = &[("AuthMethod", "CHAP,None")];
const ALGORITHM: &[(&str, &str)] = &[("CHAP_A", "5")];

#[test]
fn each_malformed_step_has_its_status() {
    let desk = || Desk::new(Security::Chap(mutual()));
    let begin = |keys: &[(&str, &str)]| status_of(&desk(), &[keys]);
    assert_eq!(begin(&[]), status::AUTHENTICATION_FAILURE);
    assert_eq!(begin(&[("AuthMethod", "None")]), status::AUTHENTICATION_FAILURE);
    assert_eq!(
        begin(&[("AuthMethod", "SRP,KRB5")]),
        status::AUTHENTICATION_FAILURE
    );
    assert_eq!(
        begin(&[("AuthMethod", "CHAP"), ("CHAP_A", "5")]),
        status::INITIATOR_ERROR
    );
    assert_eq!(
        begin(&[("AuthMethod", "CHAP"), ("AuthMethod", "CHAP")]),
        status::INITIATOR_ERROR
    );
    assert_eq!(begin(ALGORITHM), status::INITIATOR_ERROR);

    let algorithm = |keys: &[(&str, &str)]| status_of(&desk(), &[OFFER, keys]);
    assert_eq!(algorithm(&[("CHAP_A", "5")]), status::SUCCESS);
    assert_eq!(
        algorithm(&[("CHAP_A", "8,6,99999")]),
        status::AUTHENTICATION_FAILURE
    );
    assert_eq!(algorithm(&[("CHAP_A", "")]), status::AUTHENTICATION_FAILURE);
    assert_eq!(
        algorithm(&[("CHAP_A", "5"), ("CHAP_A", "7")]),
        status::INITIATOR_ERROR
    );
    assert_eq!(algorithm(&[("CHAP_N", "alice")]), status::MISSING_PARAMETER);
    assert_eq!(
        algorithm(&[("CHAP_A", "5"), ("CHAP_N", "alice")]),
        status::INITIATOR_ERROR
    );
    assert_eq!(algorithm(OFFER), status::INITIATOR_ERROR);

    let answer = |keys: &[(&str, &str)]| status_of(&desk(), &[OFFER, ALGORITHM, keys]);
    let zeroes = format!("0x{}", "00".repeat(16));
    let name = ("CHAP_N", "alice");
    let wrong = ("CHAP_R", zeroes.as_str());
    assert_eq!(answer(&[name]), status::MISSING_PARAMETER);
    assert_eq!(answer(&[wrong]), status::MISSING_PARAMETER);
    assert_eq!(answer(&[name, wrong]), status::AUTHENTICATION_FAILURE);
    assert_eq!(
        answer(&[name, ("CHAP_R", "0x00")]),
        status::AUTHENTICATION_FAILURE
    );
    assert_eq!(answer(&[name, wrong, ("CHAP_A", "5")]), status::INITIATOR_ERROR);
    assert_eq!(answer(&[name, wrong, ("CHAP_I", "1")]), status::MISSING_PARAMETER);
    assert_eq!(
        answer(&[name, wrong, ("CHAP_C", "0x01")]),
        status::MISSING_PARAMETER
    );
    for bad in ["", "0x", "0b", "00", "0xg0", "0b*", "0x 0", "0bAAA", "0xé0"] {
        assert_eq!(answer(&[name, ("CHAP_R", bad)]), status::INITIATOR_ERROR, "{bad}");
        let mutual = [name, wrong, ("CHAP_I", "1"), ("CHAP_C", bad)];
        assert_eq!(answer(&mutual), status::INITIATOR_ERROR, "{bad}");
    }
    let long = format!("0x{}", "00".repeat(MAX_CHALLENGE_BYTES + 1));
    assert_eq!(
        answer(&[name, wrong, ("CHAP_I", "1"), ("CHAP_C", &long)]),
        status::INITIATOR_ERROR
    );
    for bad in ["256", "-1", "", "x", "0x100"] {
        let keys = [name, wrong, ("CHAP_I", bad), ("CHAP_C", "0x01")];
        assert_eq!(answer(&keys), status::INITIATOR_ERROR, "{bad}");
    }
}

/// The right answer to what the target asked.
fn answer_to(reply: &Reply, text: &str) -> String {
    let keys = parse_keys(&reply.text).unwrap();
    let value = |name: &str| keys.iter().find(|(key, _)| *key == name).unwrap().1;
    let (challenge, _) = binary::parse(value("CHAP_C"), MAX_CHALLENGE_BYTES).unwrap();
    let algorithm = Algorithm::from_code(value("CHAP_A")).unwrap();
    let id = value("CHAP_I").parse().unwrap();
    Encoding::Base64.print(&algorithm.answer(id, &secret(text), &challenge))
}

#[test]
fn a_challenge_of_ours_is_not_answered_even_if_it_is_of_another_login() {
    let desk = Desk::new(Security::Chap(mutual()));
    let (_other, _) = talk(&desk, &[OFFER, ALGORITHM]);
    for reflected in [1u8, 2] {
        let (mut target, asked) = talk(&desk, &[OFFER, ALGORITHM]);
        let response = answer_to(&asked, SECRET);
        let challenge = Encoding::Hex.print(&[reflected; CHALLENGE_BYTES]);
        let keys = [
            ("CHAP_N", "alice"),
            ("CHAP_R", response.as_str()),
            ("CHAP_I", "9"),
            ("CHAP_C", challenge.as_str()),
        ];
        let reply = target.take(
            &request(stage::SECURITY, stage::OPERATIONAL, true),
            &text(&keys),
            &desk,
        );
        assert!(
            matches!(
                reply.then,
                Then::Close(Refusal::Chap {
                    why: ChapError::Reflected,
                    ..
                })
            ),
            "{reply:?}"
        );
        assert!(reply.text.is_empty());
    }
}

#[test]
fn a_mutual_answer_is_written_as_the_question_was() {
    let desk = Desk::new(Security::Chap(mutual()));
    let (mut target, asked) = talk(&desk, &[OFFER, &[("CHAP_A", "6,7,5")]]);
    assert!(asked.text.windows(8).any(|w| w == b"CHAP_A=7"));
    let response = answer_to(&asked, SECRET);
    let keys = [
        ("CHAP_N", "alice"),
        ("CHAP_R", response.as_str()),
        ("CHAP_I", "0x10"),
        ("CHAP_C", "0bAAECAw=="),
    ];
    // The transit to the full feature phase may be asked for in one with the proof.
    let reply = target.take(
        &request(stage::SECURITY, stage::FULL_FEATURE, true),
        &text(&keys),
        &desk,
    );
    assert!(matches!(reply.then, Then::FullFeature(_)), "{reply:?}");
    let expected = Algorithm::Sha256.answer(0x10, &secret(OTHER), &[0, 1, 2, 3]);
    let pairs = parse_keys(&reply.text).unwrap();
    assert!(pairs.contains(&("CHAP_N", "disk")));
    assert!(pairs.contains(&("CHAP_R", &Encoding::Base64.print(&expected))));
}

#[test]
fn nothing_leads_around_the_proof() {
    let desk = Desk::new(Security::Chap(one_way()));
    let operational = request(stage::OPERATIONAL, stage::FULL_FEATURE, true);
    // From the start, after the agreement, after the question.
    for steps in 0..3 {
        let mut target = match steps {
            0 => TargetLogin::new(Terms::default()),
            1 => talk(&desk, &[OFFER]).0,
            _ => talk(&desk, &[OFFER, ALGORITHM]).0,
        };
        let reply = target.take(&operational, &text(&NAMES), &desk);
        assert!(matches!(reply.then, Then::Close(_)), "{reply:?}");
    }
    let security = request(stage::SECURITY, stage::FULL_FEATURE, true);
    let mut target = TargetLogin::new(Terms::default());
    let status = |reply: &Reply| (reply.response.status_class, reply.response.status_detail);
    let reply = target.take(&security, &text(&NAMES), &desk);
    assert_eq!(status(&reply), status::AUTHENTICATION_FAILURE);
    // CHAP agreed on in the wrong stage is none.
    let mut target = TargetLogin::new(Terms::default());
    let mut keys = NAMES.to_vec();
    keys.extend_from_slice(OFFER);
    for _ in 0..3 {
        let reply = target.take(&operational, &text(&keys), &desk);
        assert!(
            !reply.response.transit && !matches!(reply.then, Then::FullFeature(_)),
            "{reply:?}"
        );
        keys.clear();
    }
    // Empty requests do not help.
    let (mut target, _) = talk(&desk, &[OFFER, ALGORITHM]);
    for _ in 0..40 {
        let reply = target.take(&security, &[], &desk);
        assert!(!reply.response.transit, "{reply:?}");
    }
}

#[test]
fn secrets_have_a_least_length_and_are_not_printed() {
    let short = Secret::new("eleven byte").unwrap_err();
    assert_eq!(short, ChapSetupError::TooShort { bytes: 11 });
    assert!(short.to_string().contains("at least 12"), "{short}");
    assert!(Secret::new("twelve bytes").is_ok());
    assert_eq!(
        Secret::new(vec![0; 256]).unwrap_err(),
        ChapSetupError::TooLong { bytes: 256 }
    );
    for bad in ["", "a\0b", "a\nb", &"x".repeat(256)] {
        assert!(Credentials::new(bad, secret(SECRET)).is_err(), "{bad:?}");
    }
    let same = Chap::mutual(credentials("a", SECRET), credentials("b", SECRET)).unwrap_err();
    assert_eq!(same, ChapSetupError::SameSecret);
    let printed = format!("{:?} {:#?}", mutual(), Security::Chap(mutual()));
    assert!(!printed.contains("secret of"), "{printed}");
    assert!(secret(SECRET) == secret(SECRET) && secret(SECRET) != secret(OTHER));
}

#[test]
fn the_answer_is_the_hash_of_identifier_secret_and_challenge() {
    // By `printf '\x07twelve bytesABC' | md5sum`, and sha256sum.
    let md5 = Algorithm::Md5.answer(7, &secret("twelve bytes"), b"ABC");
    let sha = Algorithm::Sha256.answer(7, &secret("twelve bytes"), b"ABC");
    assert_eq!(Encoding::Hex.print(&md5), "0xdbff9d0aba4f4a03cb7a9d6537c0bafc");
    assert_eq!(
        Encoding::Hex.print(&sha),
        "0x4bece1f608e6dd681a9705deb2ff45c335658cb33ce41b72967de65502b6a372"
    );
}

#[test]
fn challenges_differ() {
    let (one, two) = (Challenge::from_os().unwrap(), Challenge::from_os().unwrap());
    assert_ne!(one.bytes(), two.bytes());
}

proptest! {
    #[test]
    fn binary_values_print_as_they_parse(bytes in prop::collection::vec(any::<u8>(), 1..80)) {
        for encoding in [Encoding::Hex, Encoding::Base64] {
            let printed = encoding.print(&bytes);
            prop_assert_eq!(binary::parse(&printed, 80), Some((bytes.clone(), encoding)));
            prop_assert_eq!(binary::parse(&printed, bytes.len() - 1), None);
        }
        // The prefix and the digits in capitals; a first digit that is a byte of its own (RFC 7143 §6.1).
        let upper = Encoding::Hex.print(&bytes).to_uppercase();
        prop_assert_eq!(binary::parse(&upper, 80).map(|(bytes, _)| bytes), Some(bytes.clone()));
        if bytes[0] < 16 {
            let short = format!("0x{}", &Encoding::Hex.print(&bytes)[3..]);
            prop_assert_eq!(binary::parse(&short, 80).map(|(bytes, _)| bytes), Some(bytes));
        }
    }

    #[test]
    fn no_keys_make_either_side_panic_or_let_anybody_in(
        steps in prop::collection::vec(prop::collection::vec(
            ("AuthMethod|CHAP_[AICNRX]|HeaderDigest", "[ -~]{0,12}|CHAP|None|[57]|0x[0-9a-f]{1,64}|0b[A-Za-z0-9+/=]{0,20}"), 0..6), 1..6),
        flags in any::<u8>(),
    ) {
        let desk = Desk::new(Security::Chap(mutual()));
        let mut target = TargetLogin::new(Terms::default());
        let mut ours = initiator(Some(mutual()));
        let (next, transit) = (if flags & 1 == 0 { 1 } else { 3 }, flags & 2 != 0);
        for (index, step) in steps.iter().enumerate() {
            let mut keys = if index == 0 { text(&NAMES) } else { Vec::new() };
            for (key, value) in step {
                append_key(&mut keys, key, value);
            }
            let mut reply = target.take(&request(stage::SECURITY, next, transit), &keys, &desk);
            prop_assert!(!reply.response.transit && !matches!(reply.then, Then::FullFeature(_)));
            let _ = ours.request();
            reply.response.itt = 0;
            reply.response.status_class = 0;
            reply.response.transit = transit;
            reply.response.next_stage = next;
            prop_assert!(!matches!(ours.response(&reply.response, &keys), Ok(Progress::Done(_))));
        }
    }
}
