#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| treeboot_fuzz::iscsi::pdu(data));
