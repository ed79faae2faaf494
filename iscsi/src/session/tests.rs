use proptest::prelude::*;

use super::*;
use crate::pdu::NO_TAG;

#[test]
fn a_command_outside_the_window_is_ignored_and_a_gap_is_waited_for() {
    let mut window = Window::new(u32::MAX);
    assert_eq!(window.max(), u32::MAX.wrapping_add(QUEUE_DEPTH - 1));
    assert_eq!(window.admit(u32::MAX), Admission::Now);
    assert_eq!(window.admit(0), Admission::Later);
    assert_eq!(window.admit(window.max()), Admission::Later);
    assert_eq!(window.admit(window.max().wrapping_add(1)), Admission::Ignore);
    assert_eq!(window.admit(u32::MAX - 1), Admission::Ignore);
    let max = window.max();
    for _ in 0..QUEUE_DEPTH {
        window.begin();
        assert_eq!(window.max(), max, "it moves only when commands end");
    }
    assert_eq!(
        window.admit(window.expected()),
        Admission::Ignore,
        "a full queue pushes back"
    );
    window.end();
    assert_eq!(window.admit(window.expected()), Admission::Now);
}

fn limits() -> impl Strategy<Value = TransferLimits> {
    (any::<bool>(), any::<bool>(), 1u32..300, 1u32..300, 1u16..4).prop_map(
        |(immediate_data, initial_r2t, first, burst, max_outstanding_r2t)| TransferLimits {
            immediate_data,
            initial_r2t,
            first_burst_bytes: first.min(burst),
            max_burst_bytes: burst,
            max_outstanding_r2t,
        },
    )
}

proptest! {
    /// An initiator that keeps the rules, against the transfer.
    #[test]
    fn every_byte_arrives_once_and_in_place(
        limits in limits(),
        expected in 1u32..2000,
        wanted in 1u32..2000,
        pdu in 1usize..200,
        immediate in any::<prop::sample::Index>(),
        unsolicited in any::<bool>(),
    ) {
        let data: Vec<u8> = (0..expected).map(|i| (i % 251) as u8).collect();
        let first = limits.first_burst_bytes.min(expected);
        let immediate = if limits.immediate_data { immediate.index(first as usize + 1) } else { 0 };
        let unsolicited = unsolicited && !limits.initial_r2t && (immediate as u32) < first;
        let mut transfer =
            Transfer::begin(limits, expected, wanted, &data[..immediate], !unsolicited, Vec::new()).unwrap();
        let send = |transfer: &mut Transfer, ttt: u32, from: usize, to: usize| {
            let mut at = from;
            let mut data_sn = 0;
            while at < to {
                let end = to.min(at + pdu);
                transfer.take(ttt, data_sn, at as u32, &data[at..end], end == to).unwrap();
                (at, data_sn) = (end, data_sn + 1);
            }
        };
        if unsolicited {
            prop_assert_eq!(transfer.solicit(1), None);
            send(&mut transfer, NO_TAG, immediate, first as usize);
        }
        let mut tag = 10;
        while !transfer.is_complete() {
            let mut asked = Vec::new();
            while let Some(solicitation) = transfer.solicit(tag) {
                prop_assert!(solicitation.bytes <= limits.max_burst_bytes);
                asked.push((tag, solicitation));
                tag += 1;
            }
            prop_assert!(!asked.is_empty() && asked.len() <= usize::from(limits.max_outstanding_r2t));
            for (ttt, s) in asked {
                send(&mut transfer, ttt, s.offset as usize, (s.offset + s.bytes) as usize);
            }
        }
        let kept = wanted.min(expected) as usize;
        prop_assert_eq!(transfer.into_data(), &data[..kept]);
    }

    #[test]
    fn no_sequence_of_data_keeps_more_than_the_command_wants(
        limits in limits(),
        expected in 1u32..2000,
        wanted in 1u32..500,
        pdus in prop::collection::vec((any::<bool>(), 0u32..3, 0u32..600, 0usize..300, any::<bool>()), 0..40),
    ) {
        let Ok(mut transfer) = Transfer::begin(limits, expected, wanted, &[], limits.initial_r2t, Vec::new()) else {
            return Ok(());
        };
        for (solicited, data_sn, offset, bytes, final_) in pdus {
            let _ = transfer.solicit(1);
            let ttt = if solicited { 1 } else { NO_TAG };
            let _ = transfer.take(ttt, data_sn, offset, &vec![0; bytes], final_);
            prop_assert!(transfer.kept() <= wanted as usize);
        }
    }
}
