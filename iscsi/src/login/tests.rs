use proptest::prelude::*;
use treeboot_types::Iqn;

use super::*;
use crate::pdu::LoginRequest;

struct Open;

impl Directory for Open {
    fn admit(&self, initiator: &Iqn, target: &Iqn) -> Result<Security, Refusal> {
        match target.as_str() {
            "iqn.a:absent" => Err(Refusal::NotFound(target.clone())),
            "iqn.a:private" => Err(Refusal::Forbidden {
                initiator: initiator.clone(),
                target: target.clone(),
            }),
            _ => Ok(Security::None),
        }
    }

    fn has_session(&self, _: &Iqn, tsih: u16) -> bool {
        tsih == 7
    }

    fn new_tsih(&self) -> Result<u16, Refusal> {
        Ok(9)
    }
}

fn iqn(text: &str) -> Iqn {
    Iqn::new(text).unwrap()
}

fn options(target: Option<&str>, terms: Terms) -> InitiatorOptions {
    InitiatorOptions {
        initiator: iqn("iqn.a:me"),
        target: target.map(iqn),
        isid: [0x80, 0, 0, 0, 0, 1],
        terms,
    }
}

/// Runs both state machines against each other.
fn run(options: InitiatorOptions, target_terms: Terms) -> Result<(Established, Established), String> {
    let mut initiator = InitiatorLogin::new(options);
    let mut target = TargetLogin::new(target_terms);
    loop {
        let (request, text) = initiator.request();
        let reply = target.take(&request, &text, &Open);
        let progress = initiator.response(&reply.response, &reply.text);
        match (progress, reply.then) {
            (Ok(Progress::GoOn), Then::GoOn) => {}
            (Ok(Progress::Done(ours)), Then::FullFeature(theirs)) => return Ok((*ours, *theirs)),
            (Err(error), Then::Close(_)) => return Err(error.to_string()),
            (progress, then) => panic!("{progress:?} against {then:?}"),
        }
    }
}

fn any_digest() -> impl Strategy<Value = DigestTerms> {
    prop::sample::select(vec![
        DigestTerms::Never,
        DigestTerms::IfAsked,
        DigestTerms::Prefer,
        DigestTerms::Require,
    ])
}

fn any_terms() -> impl Strategy<Value = Terms> {
    let lengths = (512u32..0x0100_0000, 512u32..0x0100_0000, 512u32..0x0100_0000);
    (
        any_digest(),
        any_digest(),
        lengths,
        any::<bool>(),
        any::<bool>(),
        1u16..=65535,
    )
        .prop_map(
            |(
                header_digest,
                data_digest,
                (recv, burst, first),
                initial_r2t,
                immediate_data,
                max_outstanding_r2t,
            )| Terms {
                header_digest,
                data_digest,
                max_recv_bytes: recv,
                max_burst_bytes: burst,
                first_burst_bytes: first,
                initial_r2t,
                immediate_data,
                max_outstanding_r2t,
            },
        )
}

fn conflict(a: DigestTerms, b: DigestTerms) -> bool {
    use DigestTerms::{Never, Require};
    matches!((a, b), (Never, Require) | (Require, Never))
}

proptest! {
    #[test]
    fn both_sides_end_with_the_same_agreement(ours in any_terms(), theirs in any_terms()) {
        let result = run(options(Some("iqn.a:t"), ours), theirs);
        if conflict(ours.header_digest, theirs.header_digest) || conflict(ours.data_digest, theirs.data_digest) {
            prop_assert!(result.is_err());
            return Ok(());
        }
        let (i, t) = result.unwrap();
        prop_assert_eq!(i.parameters.max_recv_bytes, t.parameters.peer_max_recv_bytes);
        prop_assert_eq!(t.parameters.max_recv_bytes, i.parameters.peer_max_recv_bytes);
        let mut turned = t.parameters;
        std::mem::swap(&mut turned.max_recv_bytes, &mut turned.peer_max_recv_bytes);
        prop_assert_eq!(i.parameters, turned);
        prop_assert_eq!((i.stat_sn, i.cmd_sn, i.tsih), (t.stat_sn, t.cmd_sn, t.tsih));
        let p = i.parameters;
        prop_assert_eq!(p.max_burst_bytes, ours.max_burst_bytes.min(theirs.max_burst_bytes));
        prop_assert_eq!(p.initial_r2t, ours.initial_r2t || theirs.initial_r2t);
        prop_assert_eq!(p.immediate_data, ours.immediate_data && theirs.immediate_data);
        prop_assert!(p.first_burst_bytes <= p.max_burst_bytes);
    }

    #[test]
    fn text_prints_as_it_parses(pairs in prop::collection::vec(("[A-Za-z.@_-]{1,63}", "[ -~]{0,80}"), 0..20)) {
        let mut data = Vec::new();
        for (key, value) in &pairs {
            append_key(&mut data, key, value);
        }
        let parsed = parse_keys(&data).unwrap();
        let expected: Vec<_> = pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        prop_assert_eq!(parsed, expected);
    }

    #[test]
    fn no_text_makes_a_login_panic(
        data in prop::collection::vec(any::<u8>(), 0..300),
        flags in any::<u8>(),
        keys in prop::collection::vec(("[A-Z][A-Za-z]{2,12}|MaxBurstLength|HeaderDigest|AuthMethod", "[ -~]{0,12}"), 0..8),
    ) {
        let mut target = TargetLogin::new(Terms::default());
        let mut text = data;
        text.push(0);
        append_key(&mut text, "InitiatorName", "iqn.a:me");
        for (key, value) in &keys {
            append_key(&mut text, key, value);
        }
        let request = LoginRequest { transit: flags & 1 != 0, continues: flags & 2 != 0, current_stage: flags >> 2 & 3, next_stage: flags >> 4 & 3, ..first_request() };
        for _ in 0..3 {
            if let Then::Close(_) = target.take(&request, &text, &Open).then {
                break;
            }
        }
    }
}

fn first_request() -> LoginRequest {
    LoginRequest {
        transit: true,
        continues: false,
        current_stage: stage::OPERATIONAL,
        next_stage: stage::FULL_FEATURE,
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

fn normal() -> Vec<u8> {
    text(&[("InitiatorName", "iqn.a:me"), ("TargetName", "iqn.a:t")])
}

fn status_of(request: &LoginRequest, data: &[u8]) -> (u8, u8) {
    let response = TargetLogin::new(Terms::default())
        .take(request, data, &Open)
        .response;
    (response.status_class, response.status_detail)
}

#[test]
fn a_login_may_begin_in_the_operational_stage() {
    let reply = TargetLogin::new(Terms::default()).take(&first_request(), &normal(), &Open);
    let Then::FullFeature(established) = reply.then else {
        panic!("{reply:?}")
    };
    assert_eq!(
        (established.cmd_sn, established.stat_sn, established.tsih),
        (100, 51, 9)
    );
    assert!(
        reply
            .text
            .windows(25)
            .any(|w| w == b"MaxRecvDataSegmentLength=" as &[u8])
    );
}

/// RFC 7143 §13, key by key: what is offered, what a target of default terms answers; `None`: nothing, it is a declaration.
#[test]
fn each_key_is_answered_by_its_rule() {
    let answers = [
        ("HeaderDigest", "CRC32C,None", Some("CRC32C")),
        ("HeaderDigest", "None,CRC32C", Some("None")),
        ("DataDigest", "X-other,None", Some("None")),
        ("MaxConnections", "8", Some("1")),
        ("ErrorRecoveryLevel", "2", Some("0")),
        ("InitialR2T", "Yes", Some("Yes")),
        ("InitialR2T", "No", Some("No")),
        ("ImmediateData", "Yes", Some("Yes")),
        ("ImmediateData", "No", Some("No")),
        ("MaxBurstLength", "16776192", Some("1048576")),
        ("MaxBurstLength", "0x2000", Some("8192")),
        ("FirstBurstLength", "65536", Some("65536")),
        ("FirstBurstLength", "16776192", Some("262144")),
        ("MaxOutstandingR2T", "65535", Some("8")),
        ("MaxOutstandingR2T", "1", Some("1")),
        ("DefaultTime2Wait", "0", Some("2")),
        ("DefaultTime2Wait", "5", Some("5")),
        ("DefaultTime2Retain", "20", Some("0")),
        ("DataPDUInOrder", "No", Some("Yes")),
        ("DataSequenceInOrder", "No", Some("Yes")),
        ("iSCSIProtocolLevel", "2", Some("1")),
        (
            "TaskReporting",
            "FastAbort,ResponseFence,RFC3720",
            Some("RFC3720"),
        ),
        ("TaskReporting", "FastAbort", Some("Reject")),
        ("OFMarker", "Yes", Some("No")),
        ("IFMarkInt", "1~65535", Some("Irrelevant")),
        ("X-org.example.key", "1", Some("NotUnderstood")),
        ("MaxRecvDataSegmentLength", "512", None),
        ("InitiatorAlias", "a disk's friend", None),
    ];
    for (key, value, answer) in answers {
        let mut keys = normal();
        append_key(&mut keys, key, value);
        let reply = TargetLogin::new(Terms::default()).take(&first_request(), &keys, &Open);
        assert_eq!(reply.response.status_class, 0, "{key}={value}: {reply:?}");
        let all = parse_keys(&reply.text).unwrap();
        // The target declares its own MaxRecvDataSegmentLength in any case.
        let of_key = all.iter().filter(|(name, value)| {
            *name == key && (key != "MaxRecvDataSegmentLength" || *value != "262144")
        });
        let values: Vec<_> = of_key.map(|(_, value)| *value).collect();
        assert_eq!(values, answer.into_iter().collect::<Vec<_>>(), "{key}={value}");
    }
    // Outside of what the standard allows, or twice: initiator error.
    for wrong in [
        &[("MaxBurstLength", "511")][..],
        &[("MaxBurstLength", "16777216")],
        &[("FirstBurstLength", "-1")],
        &[("MaxRecvDataSegmentLength", "0")],
        &[("MaxConnections", "0")],
        &[("MaxOutstandingR2T", "65536")],
        &[("ErrorRecoveryLevel", "3")],
        &[("DefaultTime2Wait", "3601")],
        &[("DefaultTime2Retain", "yes")],
        &[("InitialR2T", "yes")],
        &[("ImmediateData", "1")],
        &[("HeaderDigest", "CRC64")],
        &[("iSCSIProtocolLevel", "32")],
        &[("InitialR2T", "Yes"), ("InitialR2T", "Yes")],
    ] {
        let keys = [normal(), text(wrong)].concat();
        assert_eq!(status_of(&first_request(), &keys), (2, 0), "{wrong:?}");
    }
}

#[test]
fn each_wrong_login_gets_the_status_of_the_standard() {
    let first = first_request();
    assert_eq!(
        status_of(&first, &text(&[("TargetName", "iqn.a:t")])),
        status::MISSING_PARAMETER
    );
    assert_eq!(
        status_of(&first, &text(&[("InitiatorName", "iqn.a:me")])),
        status::MISSING_PARAMETER
    );
    let to = |target| text(&[("InitiatorName", "iqn.a:me"), ("TargetName", target)]);
    assert_eq!(status_of(&first, &to("iqn.a:absent")), status::NOT_FOUND);
    assert_eq!(
        status_of(&first, &to("iqn.a:private")),
        status::AUTHORIZATION_FAILURE
    );
    assert_eq!(
        status_of(
            &LoginRequest {
                version_min: 1,
                ..first
            },
            &normal()
        ),
        status::UNSUPPORTED_VERSION
    );
    assert_eq!(
        status_of(&LoginRequest { tsih: 7, ..first }, &normal()),
        status::TOO_MANY_CONNECTIONS
    );
    assert_eq!(
        status_of(&LoginRequest { tsih: 8, ..first }, &normal()),
        status::NO_SESSION
    );
    assert_eq!(
        status_of(
            &LoginRequest {
                next_stage: 0,
                ..first
            },
            &normal()
        ),
        status::INITIATOR_ERROR
    );
    assert_eq!(
        status_of(
            &LoginRequest {
                current_stage: 2,
                ..first
            },
            &normal()
        ),
        status::INITIATOR_ERROR
    );
    let security = LoginRequest {
        current_stage: stage::SECURITY,
        next_stage: stage::OPERATIONAL,
        ..first
    };
    let chap = text(&[
        ("InitiatorName", "iqn.a:me"),
        ("TargetName", "iqn.a:t"),
        ("AuthMethod", "CHAP"),
    ]);
    assert_eq!(status_of(&security, &chap), status::AUTHENTICATION_FAILURE);
    let odd = text(&[("InitiatorName", "iqn.a:me"), ("SessionType", "Odd")]);
    assert_eq!(status_of(&first, &odd), status::SESSION_TYPE);
}

#[test]
fn a_login_that_never_ends_is_ended() {
    let mut target = TargetLogin::new(Terms::default());
    let request = LoginRequest {
        transit: false,
        continues: true,
        ..first_request()
    };
    let replies = (0..)
        .take_while(|_| !matches!(target.take(&request, b"X", &Open).then, Then::Close(_)))
        .count();
    assert_eq!(replies as u32, MAX_LOGIN_REQUESTS);
    let mut target = TargetLogin::new(Terms::default());
    let reply = (0..3)
        .map(|_| target.take(&request, &[b'X'; 8192], &Open))
        .last()
        .unwrap();
    assert!(matches!(reply.then, Then::Close(Refusal::TooLong)));
}

#[test]
fn text_may_come_in_parts() {
    let mut target = TargetLogin::new(Terms::default());
    let whole = normal();
    let (head, tail) = whole.split_at(20);
    let part = LoginRequest {
        transit: false,
        continues: true,
        ..first_request()
    };
    assert!(matches!(target.take(&part, head, &Open).then, Then::GoOn));
    assert!(matches!(
        target.take(&first_request(), tail, &Open).then,
        Then::FullFeature(_)
    ));
}

#[test]
fn a_discovery_session_answers_irrelevant_to_keys_of_normal_sessions() {
    let mut target = TargetLogin::new(Terms::default());
    let keys = text(&[
        ("InitiatorName", "iqn.a:me"),
        ("SessionType", "Discovery"),
        ("MaxBurstLength", "262144"),
        ("X-com.example.thing", "1"),
    ]);
    let reply = target.take(&first_request(), &keys, &Open);
    let answers = parse_keys(&reply.text).unwrap();
    assert!(answers.contains(&("MaxBurstLength", "Irrelevant")));
    assert!(answers.contains(&("X-com.example.thing", "NotUnderstood")));
}

#[test]
fn a_refusal_reaches_the_initiator_in_words() {
    let error = run(options(Some("iqn.a:absent"), Terms::default()), Terms::default()).unwrap_err();
    assert!(error.contains("no such target"), "{error}");
    let discovery = run(options(None, Terms::default()), Terms::default()).unwrap();
    assert_eq!(discovery.0.target, None);
}
