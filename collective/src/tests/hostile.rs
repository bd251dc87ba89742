//! A peer that knows the secret and then does not keep to the protocol: raw frames on a real
//! connection.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use api::{Generation, Rank};

use super::{HANG, error, listeners, options};
use crate::buffer::ElementType;
use crate::call::{Call, CallSite};
use crate::frame::{DATA_BYTES_MAX, FrameCodec, FrameKind, HEADER_BYTES, Header, encode_site};
use crate::handshake::Identity;
use crate::wire::Wire;
use crate::{AbortHandle, CollectiveError, Communicator, Operation, ProcessGroup};

type Verdict = mpsc::Receiver<Result<(), CollectiveError>>;

struct Duel {
    stream: TcpStream,
    words: Wire,
    codec: FrameCodec,
    abort: AbortHandle,
    receiver: Verdict,
}

/// Rank 0 makes a call on its own thread; rank 1 is a bare connection and its codec.
fn duel(
    calls: impl FnOnce(&mut ProcessGroup) -> Result<(), CollectiveError> + Send + 'static,
) -> Duel {
    let (mut listeners, peers) = listeners(2);
    let (raw, victim) = (listeners.remove(1), listeners.remove(0));
    let abort = victim.abort_handle();
    let (sender, receiver) = mpsc::channel();
    let addresses = peers.clone();
    thread::spawn(move || {
        let mut communicator = victim.connect(options(0, 2), &addresses).unwrap();
        let _ = sender.send(calls(&mut communicator));
    });
    let identity = Identity::new(&options(1, 2), &Default::default());
    let connection = raw.form(&identity, &peers, HANG).unwrap().swap_remove(0).unwrap();
    let (stream, words) = (connection.data[0].socket().try_clone().unwrap(), connection.words);
    stream.set_nonblocking(false).unwrap();
    let codec = FrameCodec { generation: Generation(3), group: identity.group };
    Duel { stream, words, codec, abort, receiver }
}

fn barrier() -> CallSite {
    CallSite { call: Call::plain(Operation::Barrier), number: 0 }
}

fn message(len: usize) -> CallSite {
    CallSite { call: Call::over(Operation::Send, ElementType::U8, len).with_detail(0), number: 0 }
}

fn data(site: CallSite, payload: u64) -> Header {
    Header { kind: FrameKind::Data, phase: 0, site, payload }
}

fn verdict(receiver: &Verdict) -> String {
    let result = receiver.recv_timeout(HANG).expect("the rank ends at once");
    let found = error(result);
    assert!(found.peer().is_none_or(|peer| peer == Rank(1)), "{found}");
    found.to_string()
}

#[test]
fn lengths_beyond_the_bounds_are_refused_before_memory_is_taken() {
    for payload in [DATA_BYTES_MAX + 1, u64::MAX] {
        let Duel { stream, codec, receiver, words: _words, .. } = duel(|c| c.barrier());
        (&stream).write_all(&codec.encode(&data(barrier(), payload))).unwrap();
        let text = verdict(&receiver);
        assert!(text.contains(&format!("a payload of {payload} bytes was announced")), "{text}");
    }
    // Within the bound of a frame, but not what the call expects.
    let Duel { stream, codec, receiver, words: _words, .. } = duel(|c| c.barrier());
    (&stream).write_all(&codec.encode(&data(barrier(), DATA_BYTES_MAX))).unwrap();
    let text = verdict(&receiver);
    assert!(text.contains("at most 0 are allowed"), "{text}");

    let Duel { stream, codec, receiver, words: _words, .. } =
        duel(|c| c.recv((&mut [0u8; 8]).into(), Rank(1)));
    (&stream).write_all(&codec.encode(&data(message(8), 9))).unwrap();
    let text = verdict(&receiver);
    assert!(text.contains("a payload of 9 bytes, expected 8"), "{text}");

    let Duel { stream, codec, receiver, words: _words, .. } = duel(|c| c.barrier());
    let mut control = codec.control(FrameKind::Failed, barrier(), b"");
    let huge = Header { kind: FrameKind::Failed, phase: 0, site: barrier(), payload: 1 << 40 };
    control.copy_from_slice(&codec.encode(&huge));
    (&stream).write_all(&control).unwrap();
    assert!(verdict(&receiver).contains("at most 1024 are allowed"));
}

#[test]
fn a_huge_message_nobody_asked_for_is_left_in_the_sockets() {
    // The victim is blocked in a large send, where it takes messages early, within a bound.
    let Duel { stream, codec, receiver, words, .. } =
        duel(|c| c.send((&vec![0u8; 64 << 20]).into(), Rank(1)));
    let huge = message(1 << 39);
    (&stream).write_all(&codec.encode(&data(huge, 1 << 39))).unwrap();
    (&stream).write_all(&[7; 1000]).unwrap();
    let mut header = [0; HEADER_BYTES];
    (&stream).read_exact(&mut header).unwrap();
    drop((stream, words));
    let text = verdict(&receiver);
    assert!(text.contains("lost r1 at"), "{text}");
}

#[test]
fn a_frame_of_an_older_generation_is_refused() {
    let Duel { stream, codec, receiver, words: _words, .. } = duel(|c| c.barrier());
    let stale = FrameCodec { generation: Generation(2), ..codec };
    (&stream).write_all(&stale.encode(&data(barrier(), 0))).unwrap();
    let text = verdict(&receiver);
    assert!(text.contains("r1 at") && text.contains("generation g2, expected g3"), "{text}");
}

#[test]
fn nonsense_and_replays_are_refused() {
    let Duel { stream, receiver, words: _words, .. } = duel(|c| c.barrier());
    (&stream).write_all(&[b'x'; HEADER_BYTES]).unwrap();
    assert!(verdict(&receiver).contains("where a frame begins"));

    // The same frame twice: the second is of a call that is over.
    let Duel { stream, codec, receiver, words: _words, .. } =
        duel(|c| c.barrier().and_then(|()| c.barrier()));
    (&stream).write_all(&codec.encode(&data(barrier(), 0)).repeat(2)).unwrap();
    let text = verdict(&receiver);
    assert!(text.contains("`barrier() #0` came during `barrier() #1`"), "{text}");
}

#[test]
fn a_connection_that_ends_inside_a_payload_is_a_lost_peer() {
    let Duel { stream, codec, receiver, words, .. } =
        duel(|c| c.recv((&mut vec![0u8; 1000]).into(), Rank(1)));
    (&stream).write_all(&codec.encode(&data(message(1000), 1000))).unwrap();
    (&stream).write_all(&[1; 999]).unwrap();
    drop((stream, words));
    let text = verdict(&receiver);
    assert!(text.contains("lost r1 at `127.0.0.1:"), "{text}");
    assert!(text.contains("during `recv(1000 u8 from r1) #0`"), "{text}");
}

#[test]
fn the_last_words_of_a_peer_are_heard_although_its_frames_broke_off() {
    // The victim is blocked in a send and holds half a frame; its peer says why it fails, and ends
    // with unread data, so that the victim's connection is reset.
    for (kind, payload, expected) in [
        (
            FrameKind::Mismatch,
            encode_site(&message(3)),
            "r0 called `send(3 u8 to r0) #0` but r1 at",
        ),
        (FrameKind::Failed, [&1u32.to_le_bytes()[..], b"out of memory"].concat(), "out of memory"),
    ] {
        let Duel { stream, words, codec, receiver, .. } =
            duel(|c| c.send((&vec![0u8; 64 << 20]).into(), Rank(1)));
        (&stream).write_all(&codec.encode(&data(message(100_000), 100_000))).unwrap();
        (&stream).write_all(&[0; 50_000]).unwrap();
        let mut header = [0; HEADER_BYTES];
        (&stream).read_exact(&mut header).unwrap();
        let other = CallSite { call: Call::plain(Operation::GatherBytes), number: 5 };
        words.socket().write_all(&codec.control(kind, other, &payload)).unwrap();
        drop((stream, words));
        let text = verdict(&receiver);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_peer_whose_frames_break_off_may_take_a_moment_to_say_why() {
    let Duel { stream, words, codec, receiver, .. } = duel(|c| c.barrier());
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    let other = CallSite { call: Call::plain(Operation::GatherBytes), number: 5 };
    words.socket().write_all(&codec.control(FrameKind::Failed, other, &[0xff; 4])).unwrap();
    let text = verdict(&receiver);
    assert!(text.contains("r1 at") && text.contains("failed: "), "{text}");
}

#[test]
fn last_words_among_the_frames_of_calls_are_refused() {
    let Duel { stream, codec, receiver, words: _words, .. } = duel(|c| c.barrier());
    (&stream).write_all(&codec.control(FrameKind::Failed, barrier(), b"oops")).unwrap();
    assert!(verdict(&receiver).contains("last words among the frames of calls"));
}

#[test]
fn an_abort_reaches_a_rank_that_is_certainly_blocked() {
    let Duel { stream, codec, abort, receiver, words: _words } =
        duel(|c| c.recv((&mut [0u8; 8]).into(), Rank(1)));
    // A rank says so when it is blocked.
    let mut header = [0; HEADER_BYTES];
    (&stream).read_exact(&mut header).unwrap();
    let header = codec.decode(&header).unwrap();
    assert_eq!(header.kind, FrameKind::Waiting);
    assert_eq!(header.site.to_string(), "recv(8 u8 from r1) #0");
    assert!(receiver.try_recv().is_err());
    abort.abort("the gang changes");
    assert_eq!(verdict(&receiver), "aborted: the gang changes");
    // The peer sees the end of the connection, not silence.
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
}
