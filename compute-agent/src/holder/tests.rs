//! A holder in a thread, as an agent meets it.

use std::io::{Read as _, Seek as _, Write as _};

use std::thread::JoinHandle;

use super::*;

fn start(state: &Path) -> (Holder, JoinHandle<io::Result<()>>) {
    let owned = state.to_owned();
    let serving = std::thread::spawn(move || run(&owned));
    let began = std::time::Instant::now();
    while wire::connect(state).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "no holder");
        std::thread::yield_now();
    }
    (Holder::new(state), serving)
}

fn put(holder: &Holder, name: &str) {
    let file = tempfile::tempfile().unwrap();
    holder.put(name, &OwnedFd::from(file)).unwrap();
}

/// An agent that is killed between its question and the answer.
#[test]
fn clients_that_go_before_the_answer_end_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (holder, serving) = start(dir.path());
    (0..64).for_each(|n| put(&holder, &n.to_string()));
    for round in 0..200 {
        let socket = wire::connect(dir.path()).unwrap();
        let word = match round % 4 {
            0 => Word::Drop("none".into()),
            1 => Word::Done,
            _ => Word::List,
        };
        wire::send(&socket, &word, None).unwrap();
    }
    assert_eq!(holder.held().unwrap().len(), 64);
    for n in 0..64 {
        holder.drop_one(&n.to_string()).unwrap();
    }
    serving.join().unwrap().unwrap();
}

/// An agent that is stopped while it is answered. A socket's buffer holds some hundred words.
#[test]
fn one_who_does_not_hear_its_answer_keeps_nobody_else_from_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let (holder, serving) = start(dir.path());
    (0..64).for_each(|n| put(&holder, &n.to_string()));
    let deaf = wire::connect(dir.path()).unwrap();
    for _ in 0..16 {
        wire::send(&deaf, &Word::List, None).unwrap();
    }
    assert_eq!(holder.held().unwrap().len(), 64);
    for n in 0..64 {
        holder.drop_one(&n.to_string()).unwrap();
    }
    serving.join().unwrap().unwrap();
}

#[test]
fn what_is_held_outlives_who_gave_it_and_the_holder_ends_with_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let (holder, serving) = start(dir.path());
    for name in ["a", "b"] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(name.as_bytes()).unwrap();
        holder.put(name, &OwnedFd::from(file)).unwrap();
    }
    assert!(run(dir.path()).is_err(), "one holder at a place");
    let held = holder.held().unwrap();
    assert_eq!(held.keys().collect::<Vec<_>>(), ["a", "b"]);
    for (name, fd) in held {
        let mut file = std::fs::File::from(fd);
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, name);
    }
    holder.drop_one("a").unwrap();
    assert_eq!(holder.held().unwrap().len(), 1);
    holder.drop_one("b").unwrap();
    serving.join().unwrap().unwrap();
    assert!(holder.held().unwrap().is_empty(), "nobody holds anything");
    holder.drop_one("b").unwrap();
}
