//! No target, whatever it sends, makes the books wrong.

use proptest::prelude::*;
use tokio::sync::oneshot;

use super::*;
use crate::pdu::{BHS_BYTES, NopIn, TaskManagementResponse};

const READ_BYTES: u32 = 4096;
const WRITE_BYTES: u32 = 8192;

type Answer = oneshot::Receiver<Result<Completed, CommandError>>;

fn exchange() -> Exchange {
    let terms = Terms {
        header_digest: false,
        data_digest: false,
        max_send_bytes: 1024,
        immediate_bytes: 512,
        unsolicited_bytes: 0,
        cmd_sn: u32::MAX - 1,
        exp_stat_sn: 5,
        max_cmd_sn: 2, // across the end of the numbers: four commands
    };
    Exchange::new(terms, 1_000)
}

fn submit(exchange: &mut Exchange, write: bool) -> Answer {
    let (reply, answer) = oneshot::channel();
    let transfer = match write {
        true => Transfer::Write(vec![7; WRITE_BYTES as usize].into()),
        false => Transfer::Read(READ_BYTES),
    };
    exchange.submit(Tick(0), Job::new(0, [0; 16], transfer, reply));
    answer
}

/// What was sent: header and length of data.
fn sent(exchange: &mut Exchange) -> Vec<(Pdu, usize)> {
    let mut out = Vec::new();
    exchange.produce(&mut out);
    let mut rest = &out[..];
    let mut pdus = Vec::new();
    while let Ok(crate::pdu::Split::Frame(frame)) = Framing::LOGIN.split(rest) {
        pdus.push((Pdu::parse(frame.bhs).unwrap(), frame.data.len()));
        rest = &rest[frame.bytes..];
    }
    assert!(rest.is_empty());
    pdus
}

/// Delivers a PDU with this many bytes of data, as the shell does.
fn deliver(exchange: &mut Exchange, pdu: impl Into<Pdu>, data: &[u8]) -> Result<Notice, ProtocolError> {
    let mut bhs = pdu.into().encode();
    bhs[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
    deliver_raw(exchange, &bhs, data)
}

fn deliver_raw(exchange: &mut Exchange, bhs: &Bhs, data: &[u8]) -> Result<Notice, ProtocolError> {
    let incoming = exchange.header(bhs)?;
    assert_eq!(incoming.data_bytes, data.len());
    match incoming.place {
        Place::Slot(at) => exchange.sink(at).unwrap().extend_from_slice(data),
        Place::Side | Place::Nowhere => {}
    }
    exchange.finish(&incoming, data)
}

fn data_in(itt: u32, data_sn: u32, buffer_offset: u32, status: Option<u8>) -> DataIn {
    DataIn {
        final_: true,
        acknowledge: false,
        status,
        residual: Residual::None,
        lun: LunField::default(),
        itt,
        ttt: NO_TAG,
        stat_sn: 5,
        exp_cmd_sn: 0,
        max_cmd_sn: 2,
        data_sn,
        buffer_offset,
    }
}

fn command_itts(pdus: &[(Pdu, usize)]) -> Vec<u32> {
    let itt = |(pdu, _): &(Pdu, usize)| match pdu {
        Pdu::ScsiCommand(command) => Some(command.itt),
        _ => None,
    };
    pdus.iter().filter_map(itt).collect()
}

#[test]
fn the_command_window_is_kept_across_the_end_of_the_numbers() {
    let mut exchange = exchange();
    let answers: Vec<Answer> = (0..10).map(|_| submit(&mut exchange, false)).collect();
    let first = sent(&mut exchange);
    let numbers: Vec<u32> = first
        .iter()
        .map(|(pdu, _)| match pdu {
            Pdu::ScsiCommand(command) => command.cmd_sn,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(numbers, [u32::MAX - 1, u32::MAX, 0, 1, 2]);
    assert!(sent(&mut exchange).is_empty());
    // A window that shrinks is an old one.
    let nop = |max_cmd_sn| NopIn {
        lun: LunField::default(),
        itt: NO_TAG,
        ttt: NO_TAG,
        stat_sn: 0,
        exp_cmd_sn: 3,
        max_cmd_sn,
    };
    deliver(&mut exchange, nop(u32::MAX), &[]).unwrap();
    assert!(sent(&mut exchange).is_empty());
    deliver(&mut exchange, nop(4), &[]).unwrap();
    assert_eq!(sent(&mut exchange).len(), 2);
    drop(answers);
}

#[test]
fn a_write_sends_its_first_bytes_and_then_what_is_asked_for() {
    let mut exchange = exchange();
    let mut answer = submit(&mut exchange, true);
    let pdus = sent(&mut exchange);
    assert_eq!(pdus[0].1, 512);
    let itt = command_itts(&pdus)[0];
    let r2t = |offset, bytes| R2t {
        lun: LunField::default(),
        itt,
        ttt: 9,
        stat_sn: 5,
        exp_cmd_sn: 0,
        max_cmd_sn: 2,
        r2t_sn: 0,
        buffer_offset: offset,
        desired_bytes: bytes,
    };
    deliver(&mut exchange, r2t(512, 2500), &[]).unwrap();
    let lengths: Vec<usize> = sent(&mut exchange).iter().map(|(_, bytes)| *bytes).collect();
    assert_eq!(lengths, [1024, 1024, 452]);
    assert!(deliver(&mut exchange, r2t(8000, 193), &[]).is_err());
    assert!(answer.try_recv().is_err());
}

#[test]
fn a_command_over_its_limit_is_aborted_and_its_slot_is_used_again() {
    let mut exchange = exchange();
    let mut answer = submit(&mut exchange, false);
    let itt = command_itts(&sent(&mut exchange))[0];
    assert_eq!(exchange.expire(Tick(999)).unwrap(), Some(Tick(1_000)));
    exchange.expire(Tick(1_000)).unwrap();
    assert!(matches!(
        answer.try_recv(),
        Ok(Err(CommandError::TimedOut { .. }))
    ));
    let abort = match &sent(&mut exchange)[0].0 {
        Pdu::TaskManagementRequest(request) => *request,
        other => panic!("{other:?}"),
    };
    assert_eq!((abort.referenced_itt, exchange.outstanding()), (itt, 1));
    // Data that was on its way is thrown away.
    deliver(&mut exchange, data_in(itt, 0, 0, None), &[1; 512]).unwrap();
    let done = TaskManagementResponse {
        response: 0,
        itt: abort.itt,
        stat_sn: 6,
        exp_cmd_sn: 0,
        max_cmd_sn: 2,
    };
    deliver(&mut exchange, done, &[]).unwrap();
    assert_eq!(exchange.outstanding(), 0);
    assert!(deliver(&mut exchange, data_in(itt, 1, 512, None), &[1; 512]).is_err());
}

#[derive(Debug, Clone)]
enum Move {
    Submit(bool),
    Abandon(usize),
    Produce,
    Expire(u64),
    Data {
        task: usize,
        data_sn: u32,
        offset: u32,
        bytes: usize,
        status: Option<u8>,
    },
    R2t {
        task: usize,
        offset: u32,
        bytes: u32,
    },
    Response {
        task: usize,
        status: u8,
        sense: Vec<u8>,
    },
    Aborted(usize),
    Raw(Vec<u8>),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let task = || 0usize..6;
    let one = prop_oneof![
        6 => any::<bool>().prop_map(Move::Submit),
        1 => task().prop_map(Move::Abandon),
        6 => Just(Move::Produce),
        1 => (0u64..3_000).prop_map(Move::Expire),
        6 => (task(), 0u32..3, prop_oneof![Just(0u32), 0u32..5_000], 0usize..5_000, proptest::option::of(0u8..3))
            .prop_map(|(task, data_sn, offset, bytes, status)| Move::Data { task, data_sn, offset, bytes, status }),
        2 => (task(), 0u32..9_000, 0u32..9_000).prop_map(|(task, offset, bytes)| Move::R2t { task, offset, bytes }),
        4 => (task(), 0u8..40, proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(task, status, sense)| Move::Response { task, status, sense }),
        1 => task().prop_map(Move::Aborted),
        1 => proptest::collection::vec(any::<u8>(), BHS_BYTES).prop_map(Move::Raw),
    ];
    proptest::collection::vec(one, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_command_ends_once_and_a_read_never_has_more_than_it_asked_for(moves in moves()) {
        let mut exchange = exchange();
        let mut answers = Vec::<Answer>::new();
        let mut itts = Vec::new();
        for one in moves {
            let itt = |task: usize| itts.get(task % itts.len().max(1)).copied().unwrap_or(0);
            // An error is the end of a session; here the books go on, which is harder.
            let result = match one {
                Move::Submit(write) => {
                    if exchange.has_room() {
                        answers.push(submit(&mut exchange, write));
                    }
                    Ok(Notice::Nothing)
                }
                Move::Abandon(at) => {
                    if at < answers.len() {
                        drop(answers.remove(at));
                    }
                    Ok(Notice::Nothing)
                }
                Move::Produce => {
                    itts.extend(command_itts(&sent(&mut exchange)));
                    Ok(Notice::Nothing)
                }
                Move::Expire(at) => {
                    exchange.expire(Tick(at)).unwrap();
                    Ok(Notice::Nothing)
                }
                Move::Data { task, data_sn, offset, bytes, status } => {
                    let pdu = data_in(itt(task), data_sn, offset, status);
                    deliver(&mut exchange, pdu, &vec![0; bytes])
                }
                Move::R2t { task, offset, bytes } => {
                    let pdu = R2t {
                        lun: LunField::default(), itt: itt(task), ttt: 1, stat_sn: 0, exp_cmd_sn: 0, max_cmd_sn: 9,
                        r2t_sn: 0, buffer_offset: offset, desired_bytes: bytes,
                    };
                    deliver(&mut exchange, pdu, &[])
                }
                Move::Response { task, status, sense } => {
                    let pdu = ScsiResponse {
                        residual: Residual::None, response: 0, status, itt: itt(task), snack_tag: 0, stat_sn: 0,
                        exp_cmd_sn: 0, max_cmd_sn: 9, exp_data_sn: 0,
                    };
                    deliver(&mut exchange, pdu, &sense)
                }
                Move::Aborted(task) => {
                    let pdu = TaskManagementResponse {
                        response: 0, itt: itt(task) | ABORT_BIT, stat_sn: 0, exp_cmd_sn: 0, max_cmd_sn: 9,
                    };
                    deliver(&mut exchange, pdu, &[])
                }
                Move::Raw(mut bytes) => {
                    bytes[4..8].fill(0);
                    deliver_raw(&mut exchange, bytes.first_chunk().unwrap(), &[])
                }
            };
            drop(result);
            prop_assert!(exchange.wanted() <= exchange.outstanding());
        }
        exchange.end(&SessionEnd::Closed);
        prop_assert_eq!(exchange.outstanding(), 0);
        for mut answer in answers {
            if let Ok(done) = answer.try_recv().expect("each command has an answer") {
                prop_assert!(done.data.len() <= READ_BYTES as usize);
            }
        }
    }
}
