use proptest::prelude::*;

use super::*;

/// A header of a known operation code in front of arbitrary bytes: whatever parses must print to a fixed point.
fn any_header() -> impl Strategy<Value = Bhs> {
    let opcodes = prop::sample::select(vec![
        0x00u8, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31,
        0x32, 0x3f,
    ]);
    (
        opcodes,
        any::<bool>(),
        prop::collection::vec(any::<u8>(), BHS_BYTES - 1),
    )
        .prop_map(|(opcode, immediate, rest)| {
            let mut bhs = [0; BHS_BYTES];
            bhs[1..].copy_from_slice(&rest);
            bhs[0] = opcode | if immediate { 0x40 } else { 0 };
            bhs
        })
}

fn any_framing() -> impl Strategy<Value = Framing> {
    (any::<bool>(), any::<bool>()).prop_map(|(header_digest, data_digest)| Framing {
        header_digest,
        data_digest,
        max_data_bytes: 4096,
    })
}

proptest! {
    #[test]
    fn what_is_parsed_prints_and_parses_to_the_same(bhs in any_header()) {
        if let Ok(pdu) = Pdu::parse(&bhs) {
            prop_assert_eq!(Pdu::parse(&pdu.encode()), Ok(pdu));
        }
    }

    #[test]
    fn a_frame_comes_back_whole_from_any_cut_of_the_stream(
        bhs in any_header(),
        framing in any_framing(),
        ahs_words in 0usize..8,
        data in prop::collection::vec(any::<u8>(), 0..300),
        tail in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let Ok(pdu) = Pdu::parse(&bhs) else { return Ok(()) };
        let ahs = vec![0xa5; ahs_words * 4];
        let mut stream = Vec::new();
        framing.append_with_ahs(&mut stream, &pdu, &ahs, &data);
        let bytes = stream.len();
        for cut in 0..bytes {
            match framing.split(&stream[..cut]) {
                Ok(Split::Need(need)) => prop_assert!(need > cut && need <= bytes),
                other => prop_assert!(false, "{other:?} from {cut} of {bytes} bytes"),
            }
        }
        stream.extend_from_slice(&tail);
        let Ok(Split::Frame(frame)) = framing.split(&stream) else {
            return Err(TestCaseError::fail("no frame"));
        };
        prop_assert_eq!(frame.bytes, bytes);
        prop_assert_eq!(frame.ahs, &ahs[..]);
        prop_assert_eq!(frame.data, &data[..]);
        prop_assert_eq!(Pdu::parse(frame.bhs), Ok(pdu));
    }

    #[test]
    fn sealing_in_place_prints_what_appending_prints(
        bhs in any_header(),
        framing in any_framing(),
        data in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let Ok(pdu) = Pdu::parse(&bhs) else { return Ok(()) };
        let mut appended = Vec::new();
        framing.append(&mut appended, &pdu, &data);
        let mut sealed = vec![0xee; framing.frame_bytes(data.len())];
        sealed[framing.data_at()..framing.data_at() + data.len()].copy_from_slice(&data);
        framing.seal(&mut sealed, pdu.encode(), data.len());
        prop_assert_eq!(appended, sealed);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(stream in prop::collection::vec(any::<u8>(), 0..400), framing in any_framing()) {
        if let Ok(Split::Frame(frame)) = framing.split(&stream) {
            let _ = Pdu::parse(frame.bhs);
        }
    }

    #[test]
    fn a_flipped_bit_is_seen_where_digests_are_on(
        data in prop::collection::vec(any::<u8>(), 1..100),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let framing = Framing { header_digest: true, data_digest: true, max_data_bytes: 0x00ff_ffff };
        let pdu = Pdu::from(NopOut { immediate: true, lun: LunField(0), itt: 1, ttt: NO_TAG, cmd_sn: 7, exp_stat_sn: 9 });
        let mut stream = Vec::new();
        framing.append(&mut stream, &pdu, &data);
        let at = at.index(stream.len());
        stream[at] ^= 1 << bit;
        // A flip in a length may also make the PDU longer than what is there.
        prop_assert!(!matches!(framing.split(&stream), Ok(Split::Frame(_))));
    }
}

#[test]
fn a_data_segment_beyond_the_limit_is_refused_before_it_arrives() {
    let mut bhs = [0; BHS_BYTES];
    bhs[5..8].copy_from_slice(&[0, 0x20, 0x01]);
    assert_eq!(
        Framing::LOGIN.split(&bhs),
        Err(FrameError::TooLong {
            bytes: 8193,
            limit: 8192
        })
    );
}

#[test]
fn the_header_digest_is_the_one_of_the_standards_examples() {
    // RFC 7143 appendix A.4: an SCSI READ (10) command PDU has the CRC32C 0xd9963a56.
    let mut bhs = [0; BHS_BYTES];
    bhs[0] = 0x01;
    bhs[1] = 0xc0;
    bhs[16] = 0x14;
    bhs[22] = 0x04;
    bhs[27] = 0x14;
    bhs[31] = 0x18;
    bhs[32] = 0x28;
    bhs[40] = 0x02;
    assert_eq!(crc32c::crc32c(&bhs), 0xd996_3a56);
}

#[test]
fn luns_keep_their_number_and_foreign_forms_have_none() {
    for number in [0, 1, 255, 256, 16_383] {
        assert_eq!(LunField::new(number).number(), Some(number));
    }
    assert_eq!(LunField(0x4003 << 48).number(), Some(3));
    for foreign in [0x8000 << 48, 0xc101 << 48, 1, 0x0100 << 48, 0x0001_0001 << 32] {
        assert_eq!(LunField(foreign).number(), None, "{foreign:#x}");
    }
}
