//! Cutting a stream into PDUs.

use treeboot_iscsi::pdu::{BHS_BYTES, Framing, MAX_AHS_BYTES, Pdu, Split};

/// The first byte is how the stream is laid out, the rest is the stream.
pub fn pdu(data: &[u8]) {
    let Some((&layout, mut stream)) = data.split_first() else {
        return;
    };
    let framing = Framing {
        header_digest: layout & 1 != 0,
        data_digest: layout & 2 != 0,
        max_data_bytes: 512 << (layout >> 4),
    };
    while let Ok(Split::Frame(frame)) = framing.split(stream) {
        assert!(frame.bytes >= BHS_BYTES && frame.bytes <= stream.len());
        assert!(frame.ahs.len() <= MAX_AHS_BYTES && frame.data.len() <= framing.max_data_bytes as usize);
        if let Ok(parsed) = Pdu::parse(frame.bhs) {
            // What was understood is printed so that it is understood again, in a frame of its own.
            let mut again = Vec::new();
            framing.append_with_ahs(&mut again, &parsed, frame.ahs, frame.data);
            let Ok(Split::Frame(second)) = framing.split(&again) else {
                panic!("a PDU of ours is none: {parsed:?}");
            };
            assert_eq!(
                (second.ahs, second.data, second.bytes),
                (frame.ahs, frame.data, again.len())
            );
            assert_eq!(Pdu::parse(second.bhs).as_ref(), Ok(&parsed));
        }
        stream = &stream[frame.bytes..];
    }
    if let Ok(Split::Need(bytes)) = framing.split(stream) {
        assert!(bytes > stream.len(), "nothing is waited for that is there");
        let longest = BHS_BYTES + MAX_AHS_BYTES + 4 + framing.max_data_bytes as usize + 3 + 4;
        assert!(bytes <= longest, "{bytes} bytes are waited for");
    }
}
