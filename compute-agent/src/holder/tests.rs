//! A holder in a thread, as an agent meets it.

use std::io::{Read as _, Seek as _, Write as _};

use super::*;

#[test]
fn what_is_held_outlives_who_gave_it_and_the_holder_ends_with_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_owned();
    let serving = std::thread::spawn(move || run(&state));
    let holder = Holder::new(dir.path());
    let began = std::time::Instant::now();
    while wire::connect(dir.path()).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "no holder");
        std::thread::yield_now();
    }
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
