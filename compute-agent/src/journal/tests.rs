use treeboot_types::{Digest, VmName};

use super::*;
use crate::desired::DiskState;
use crate::stack::WantedDisk;

fn disk_change(n: u8) -> Change {
    Change::Disk {
        vm: VmName::new(&format!("vm-{n}")).unwrap(),
        disk: DiskState::new(
            "debian@1".parse().unwrap(),
            WantedDisk {
                digest: Digest([n; 32]),
                bytes: 4096,
            },
            [n; 16],
        ),
    }
}

fn stop(n: u8) -> Step {
    Step::StopDisk {
        vm: VmName::new(&format!("vm-{n}")).unwrap(),
    }
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart_and_a_half_done_step_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    for n in 0..3 {
        journal.commit([disk_change(n)]).await.unwrap();
    }
    let first = journal.intend(&stop(1)).await.unwrap();
    let _second = journal.intend(&stop(2)).await.unwrap();
    journal.settle(first, Outcome::Done).await.unwrap();
    let desired = journal.desired();
    assert_eq!(desired.disks.len(), 3);
    drop(journal);
    let (journal, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.desired(), desired);
    assert_eq!(recovered.unfinished, [stop(2)]);
    assert_eq!(recovered.damage, None);
    drop(journal);
    let (_, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(recovered.unfinished, [], "a restart takes note of them once");
}

#[tokio::test]
async fn a_file_cut_off_at_any_byte_gives_the_records_before_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let mut ends = vec![(std::fs::metadata(dir.path().join(FILE)).unwrap().len(), 0)];
    for n in 0..3 {
        journal.commit([disk_change(n)]).await.unwrap();
        ends.push((
            std::fs::metadata(dir.path().join(FILE)).unwrap().len(),
            n as usize + 1,
        ));
    }
    drop(journal);
    let whole = std::fs::read(dir.path().join(FILE)).unwrap();
    let start = ends[0].0 as usize;
    for cut in start..=whole.len() {
        let copy = tempfile::tempdir().unwrap();
        std::fs::write(copy.path().join(FILE), &whole[..cut]).unwrap();
        let (desired, recovered) = replay(&copy.path().join(FILE)).unwrap();
        let expected = ends.iter().rev().find(|(end, _)| *end as usize <= cut).unwrap().1;
        assert_eq!(desired.disks.len(), expected, "cut at {cut}");
        let at_a_boundary = ends.iter().any(|(end, _)| *end as usize == cut);
        assert_eq!(recovered.damage.is_none(), at_a_boundary);
    }
}

#[tokio::test]
async fn a_flipped_bit_drops_the_end_keeps_the_file_aside_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.commit([disk_change(0)]).await.unwrap();
    let good = std::fs::metadata(dir.path().join(FILE)).unwrap().len() as usize;
    journal.commit([disk_change(1)]).await.unwrap();
    drop(journal);
    let mut bytes = std::fs::read(dir.path().join(FILE)).unwrap();
    bytes[good + 20] ^= 1;
    std::fs::write(dir.path().join(FILE), &bytes).unwrap();
    let (journal, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.desired().disks.len(), 1);
    assert!(recovered.damage.unwrap().contains(DAMAGED_FILE));
    assert_eq!(std::fs::read(dir.path().join(DAMAGED_FILE)).unwrap(), bytes);
}

#[tokio::test]
async fn a_journal_of_a_later_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    frame::encode(&Record::Format(FORMAT + 1), &mut bytes).unwrap();
    std::fs::write(dir.path().join(FILE), bytes).unwrap();
    assert!(matches!(
        Journal::open(dir.path()),
        Err(JournalError::Format { found, .. }) if found == FORMAT + 1
    ));
}

#[tokio::test]
async fn many_commits_at_once_all_stand_and_the_file_is_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    let commits = (0..2000).map(|n| {
        let journal = journal.clone();
        async move { journal.commit([disk_change((n % 100) as u8)]).await }
    });
    futures_util::future::try_join_all(commits).await.unwrap();
    assert_eq!(journal.desired().disks.len(), 100);
    drop(journal);
    let (journal, _) = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.desired().disks.len(), 100);
    assert!(std::fs::metadata(dir.path().join(FILE)).unwrap().len() < 64 << 10);
}

#[tokio::test]
async fn a_journal_that_could_not_be_written_says_so_until_it_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let whole = rewrite(&state, &Desired::default()).unwrap();
    // As a full disk would do: nothing can be added to this one.
    let full = JournalFile {
        file: File::open(state.join(FILE)).unwrap(),
        ..whole
    };
    let journal = Journal::over(&state, state.join(FILE), full, Desired::default()).unwrap();
    assert_eq!(journal.problem().await, None, "nothing was tried yet");
    std::fs::rename(&state, dir.path().join("away")).unwrap();
    journal.commit([disk_change(0)]).await.unwrap_err();
    assert_eq!(journal.errors(), 1);
    let why = journal.problem().await.unwrap();
    assert!(
        why.contains("cannot be written") && why.contains("make room"),
        "{why}"
    );
    std::fs::rename(dir.path().join("away"), &state).unwrap();
    assert_eq!(journal.problem().await, None, "asked again, it tries again");
    journal.commit([disk_change(1)]).await.unwrap();
    drop(journal);
    let (journal, _) = Journal::open(&state).unwrap();
    assert_eq!(journal.desired().disks.len(), 1, "what failed is not there");
}
