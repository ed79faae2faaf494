//! The authority, its certificates and tokens, without a network.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use treeboot_types::HostName;

use crate::authority::Authority;
use crate::gate::{Need, need};
use crate::token::{Gatebook, JoinToken, TokenError, bearer, who_bears};
use crate::{Certified, Credentials, NewKey, Person, Role, Who, unix_now};

const DAY: Duration = Duration::from_secs(86_400);

fn person(role: Role) -> Who {
    Who::Person {
        name: Person::new("anne.b@example").unwrap(),
        role,
    }
}

#[test]
fn a_certificate_says_who_and_until_when_also_after_its_authority_was_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["treeboot.example".to_owned(), "10.0.0.1".to_owned()];
    let made = Authority::create(dir.path(), &names).unwrap();
    let authority = Authority::open(dir.path()).unwrap().unwrap();
    assert_eq!(authority.fingerprint(), made.fingerprint());
    let host = Who::Host(HostName::new("10.0.0.1").unwrap());
    for who in [Who::Coordinator, host, person(Role::Viewer), person(Role::Admin)] {
        let now = unix_now();
        let credentials = authority.issue(&who, DAY).unwrap();
        let certified = credentials.certified();
        assert_eq!(certified.who, who);
        assert!(certified.from <= now && certified.until >= now + 86_400 && certified.until < now + 86_460);
        assert!(certified.renew_at() > now && certified.renew_at() < certified.until);
        let again = Credentials::from_pem(credentials.to_pem().as_bytes(), "the test").unwrap();
        assert_eq!(again.certified(), certified);
    }
    assert!(
        Authority::create(dir.path(), &[]).is_err(),
        "a second one over the first"
    );
}

/// A clock that was ahead when a certificate was made, and was set right: it would not hold for as long as the clock was ahead.
#[test]
fn a_certificate_of_a_clock_that_was_ahead_is_due_when_the_clock_is_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), &[]).unwrap();
    let certified = authority
        .issue(&Who::Coordinator, DAY)
        .unwrap()
        .certified()
        .clone();
    let now = unix_now();
    assert!(certified.holds(now) && !certified.is_due(now));
    let (year, late) = (365 * 86_400, certified.renew_at());
    assert!(
        !certified.holds(now - year) && certified.is_due(now - year),
        "set back"
    );
    assert!(
        certified.holds(late) && certified.is_due(late),
        "two thirds are over"
    );
    assert!(
        !certified.holds(now + year) && certified.is_due(now + year),
        "set ahead"
    );
}

/// A token's end is a time of day: it ends early by a clock that is set ahead, holds again when that is set back, and is used up all the same.
#[test]
fn a_token_that_was_used_up_stays_so_whatever_the_clock_says() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), &[]).unwrap();
    let gatebook = Gatebook::new(&authority);
    let name = HostName::new("h1").unwrap();
    let token = gatebook.create(None, 1, DAY).unwrap();
    let kept = dir.path().join("tokens");
    let file = std::fs::read_dir(&kept).unwrap().next().unwrap().unwrap().path();
    // What a jump of the clock is to a token: its end lies that much nearer, or farther.
    let shift = |seconds: i64| {
        let text = std::fs::read(&file).unwrap();
        let mut entry: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let until = entry["until_unix"].as_u64().unwrap();
        entry["until_unix"] = until.saturating_add_signed(seconds).into();
        std::fs::write(&file, entry.to_string()).unwrap();
    };
    let key = NewKey::generate().unwrap();
    let enroll = |key: &NewKey| gatebook.enroll(&token, &name, &key.request().unwrap(), DAY);
    shift(-2 * 86_400);
    assert!(matches!(enroll(&key), Err(TokenError::Expired { .. })));
    shift(2 * 86_400);
    enroll(&key).unwrap();
    shift(365 * 86_400);
    let another = NewKey::generate().unwrap();
    assert!(matches!(enroll(&another), Err(TokenError::Used { .. })));
}

#[test]
fn secrets_are_their_owners_only() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("identity");
    let authority = Authority::create(&folder, &[]).unwrap();
    Gatebook::new(&authority).create(None, 1, DAY).unwrap();
    let file = dir.path().join("a/b/identity.pem");
    authority
        .issue(&person(Role::Admin), DAY)
        .unwrap()
        .save(&file)
        .unwrap();
    let mut seen = 0;
    let mut folders = vec![folder, dir.path().join("a")];
    while let Some(folder) = folders.pop() {
        assert_eq!(
            std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o700
        );
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            assert_eq!(
                entry.metadata().unwrap().permissions().mode() & 0o777,
                0o600,
                "{entry:?}"
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 4, "authority, names, token, identity");
}

#[test]
fn a_request_claims_nothing_but_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), &[]).unwrap();
    let who = Who::Host(HostName::new("h1").unwrap());
    let request = NewKey::generate().unwrap().request().unwrap();
    let certificate = authority.certify(&request, &who, DAY).unwrap();
    assert_eq!(Certified::of(&certificate.into()).unwrap().who, who);
    for bad in [&[][..], b"x", &request[..request.len() - 1], &[0x30; 5000][..]] {
        assert!(authority.certify(bad, &who, DAY).is_err());
    }
}

#[test]
fn tokens_are_read_as_they_are_written_and_no_other_way() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), &[]).unwrap();
    let token = Gatebook::new(&authority).create(None, 1, DAY).unwrap();
    let text = token.to_string();
    assert_eq!(
        format!(" {text}\n").parse::<JoinToken>().unwrap().to_string(),
        text
    );
    assert!(
        !format!("{token:?}").contains(&text[33..65]),
        "the secret is not for logs"
    );
    for bad in [
        "",
        ".",
        &text[1..],
        &text[..text.len() - 1],
        &text.replace(".", "/"),
    ] {
        assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
    }
    // The id becomes a file's name.
    let parts: Vec<&str> = text.split('.').collect();
    let climbing = ["treeboot-join-1", "../../../../etc/", parts[2], parts[3]].join(".");
    assert!(climbing.parse::<JoinToken>().is_err());
}

#[test]
fn a_bearer_token_is_believed_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), &[]).unwrap();
    let name = Person::new("anne.b@example").unwrap();
    let token = bearer(&authority, &name, Role::Operator, DAY).unwrap();
    let check = |token: &str| who_bears(token, authority.certificate());
    assert_eq!(check(&token).unwrap(), person(Role::Operator));
    for place in 0..token.len() {
        let mut changed = token.clone().into_bytes();
        changed[place] = if changed[place] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(check(&changed).is_err() || changed == token, "byte {place}");
    }
    assert!(check("").is_err() && check("é.é").is_err() && check(&"x".repeat(5000)).is_err());
}

#[test]
fn a_verb_that_nobody_listed_is_an_admins() {
    assert_eq!(need("/treeboot.v1.Agent/Format"), Need::Person(Role::Admin));
    assert_eq!(need("/other.v1.Agent/List"), Need::Person(Role::Admin));
    assert_eq!(need("/treeboot.v1.Agent/List"), Need::Person(Role::Viewer));
}
