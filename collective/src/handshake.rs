//! How two ranks prove to each other that they belong to the same group.
//!
//! ```text
//! connector (higher rank)                       acceptor (lower rank)
//!   hello: generation, group, world, ranks,
//!          channel, streams, table, order of
//!          sums, transport, nonce                →
//!                                                   ←  challenge: nonce, proof
//!   proof                                           →
//!                                                   ←  welcome
//! ```
//! A proof is HMAC-SHA256 under the generation's secret over who proves, the job, the group, the
//! generation, the world size, both ranks, the channel and both nonces: it cannot be replayed, reflected or moved
//! to another pair. Proofs are compared in constant time. Either side may answer `refused: reason`.
//! Pure: no sockets and no clock here. With certificates all of it goes through an encrypted
//! connection (see `tls`); without, a group that leaves the host belongs on a private network.

use std::io::Read;

use api::{Generation, Secret};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::communicator::{GroupOptions, Reduction, Transport};
use crate::frame::group_number;
use crate::tcp_options::TcpOptions;

/// Bytes in front of a message: magic, version, kind, length.
pub(crate) const ENVELOPE_BYTES: usize = 8;
/// Most bytes of a message's body: a refusal's reason.
pub(crate) const BODY_BYTES_MAX: usize = 512;
const MAGIC: [u8; 4] = *b"CHHS";
const VERSION: u8 = 2;
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;

type Nonce = [u8; NONCE_BYTES];
type Proof = [u8; PROOF_BYTES];

/// What the ranks of a group have in common, and which one this is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub rank: u32,
    pub world: u32,
    pub generation: Generation,
    pub group: u64,
    /// Connections for frames to each peer.
    pub streams: u8,
    /// The digest of the table of algorithms.
    selection: u64,
    reduction: Reduction,
    transport: Transport,
    job: String,
    group_name: String,
    secret: Secret,
}

impl Identity {
    pub(crate) fn new(options: &GroupOptions, tcp: &TcpOptions) -> Self {
        Self {
            streams: tcp.streams as u8,
            selection: tcp.selection.digest(),
            reduction: options.reduction,
            transport: options.transport,
            rank: options.rank.0,
            world: options.world_size,
            generation: options.generation,
            group: group_number(&options.job, &options.group, options.world_size),
            job: options.job.to_string(),
            group_name: options.group.clone(),
            secret: options.secret.clone(),
        }
    }

    /// The keyed digest that one side of a pair proves itself with.
    fn mac(&self, prover: Side, pair: &Pair) -> Hmac<Sha256> {
        // The secret is revealed to key the digest; only the digest leaves the process.
        let mut mac = Hmac::<Sha256>::new_from_slice(self.secret.reveal().as_bytes())
            .expect("HMAC takes a key of any length");
        let label: &[u8] = match prover {
            Side::Connector => b"cohort collective 1: connector",
            Side::Acceptor => b"cohort collective 1: acceptor",
        };
        for field in [label, self.job.as_bytes(), self.group_name.as_bytes()] {
            mac.update(&(field.len() as u64).to_le_bytes());
            mac.update(field);
        }
        mac.update(&self.generation.0.to_le_bytes());
        for number in [self.world, pair.connector, pair.acceptor] {
            mac.update(&number.to_le_bytes());
        }
        mac.update(&[pair.channel.code()]);
        mac.update(&pair.connector_nonce);
        mac.update(&pair.acceptor_nonce);
        mac
    }

    fn prove(&self, prover: Side, pair: &Pair) -> Proof {
        self.mac(prover, pair).finalize().into_bytes().into()
    }

    fn verify(&self, prover: Side, pair: &Pair, proof: &Proof) -> bool {
        self.mac(prover, pair).verify_slice(proof).is_ok()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Connector,
    Acceptor,
}

/// Which of the connections of a pair.
///
/// A frame of elements may be half written when a rank fails, so that no word fits behind it. Its
/// last words have a connection of their own: a peer that breaks off without any died by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Why a rank failed.
    Words,
    /// Frames of calls; the number of the stream.
    Data(u8),
}

impl Channel {
    /// Every channel of a pair with that many streams, in the order of their codes.
    pub(crate) fn all(streams: u8) -> impl Iterator<Item = Self> {
        std::iter::once(Self::Words).chain((0..streams).map(Self::Data))
    }

    /// Its number on the wire, and among the channels of a pair.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Words => 0,
            Self::Data(stream) => stream.saturating_add(1),
        }
    }

    fn from_code(code: u8) -> Self {
        code.checked_sub(1).map_or(Self::Words, Self::Data)
    }
}

#[derive(Clone, Copy, Debug)]
struct Pair {
    channel: Channel,
    connector: u32,
    acceptor: u32,
    connector_nonce: Nonce,
    acceptor_nonce: Nonce,
}

/// Fresh randomness from the operating system.
pub(crate) fn fresh_nonce() -> std::io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

/// What a connector says of itself, before anything is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    generation: u64,
    group: u64,
    world: u32,
    from: u32,
    to: u32,
    channel: Channel,
    streams: u8,
    selection: u64,
    reduction: u8,
    transport: u8,
    nonce: Nonce,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Message {
    Hello(Hello),
    Challenge { nonce: Nonce, proof: Proof },
    Proof { proof: Proof },
    Welcome,
    Refused { reason: String },
}

/// Splits fields off a body.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Hello(hello) => {
                let mut body = hello.generation.to_le_bytes().to_vec();
                body.extend_from_slice(&hello.group.to_le_bytes());
                for number in [hello.world, hello.from, hello.to] {
                    body.extend_from_slice(&number.to_le_bytes());
                }
                body.extend_from_slice(&[hello.channel.code(), hello.streams]);
                body.extend_from_slice(&hello.selection.to_le_bytes());
                body.extend_from_slice(&[hello.reduction, hello.transport]);
                body.extend_from_slice(&hello.nonce);
                (1, body)
            }
            Self::Challenge { nonce, proof } => (2, [nonce.as_slice(), proof].concat()),
            Self::Proof { proof } => (3, proof.to_vec()),
            Self::Welcome => (4, Vec::new()),
            Self::Refused { reason } => {
                (5, reason.bytes().take(BODY_BYTES_MAX).collect::<Vec<u8>>())
            }
        };
        let mut message = MAGIC.to_vec();
        message.extend_from_slice(&[VERSION, kind]);
        message.extend_from_slice(&(body.len() as u16).to_le_bytes());
        message.extend_from_slice(&body);
        message
    }

    fn decode(kind: u8, body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        let message = match kind {
            1 => Self::Hello(Hello {
                generation: u64::from_le_bytes(fields.take()?),
                group: u64::from_le_bytes(fields.take()?),
                world: u32::from_le_bytes(fields.take()?),
                from: u32::from_le_bytes(fields.take()?),
                to: u32::from_le_bytes(fields.take()?),
                channel: Channel::from_code(u8::from_le_bytes(fields.take()?)),
                streams: u8::from_le_bytes(fields.take()?),
                selection: u64::from_le_bytes(fields.take()?),
                reduction: u8::from_le_bytes(fields.take()?),
                transport: u8::from_le_bytes(fields.take()?),
                nonce: fields.take()?,
            }),
            2 => Self::Challenge { nonce: fields.take()?, proof: fields.take()? },
            3 => Self::Proof { proof: fields.take()? },
            4 => Self::Welcome,
            5 => {
                let reason = String::from_utf8_lossy(std::mem::take(&mut fields.0));
                // Said by a process that has proved nothing yet: keep it to one printable line.
                let reason = reason.chars().filter(|c| !c.is_control()).collect();
                Self::Refused { reason }
            }
            _ => return None,
        };
        fields.0.is_empty().then_some(message)
    }
}

/// What it means that a peer begins with TLS.
pub(crate) const ENCRYPTS: &str = "it encrypts, but this rank has no certificates";

/// Whether bytes are the beginning of a TLS record: of its handshake, or an alert.
pub(crate) fn encrypts(bytes: &[u8]) -> bool {
    matches!(bytes, [21 | 22, 3, ..])
}

/// The bytes of a message's body, given its envelope; an error if it is no such message.
pub(crate) fn body_bytes(envelope: &[u8; ENVELOPE_BYTES]) -> Result<usize, String> {
    let [a, b, c, d, version, _, low, high] = *envelope;
    if encrypts(envelope) {
        return Err(ENCRYPTS.to_owned());
    }
    if [a, b, c, d] != MAGIC {
        return Err("it does not speak the protocol of ranks".to_owned());
    }
    if version != VERSION {
        return Err(format!("it speaks version {version} of the handshake, expected {VERSION}"));
    }
    let len = usize::from(u16::from_le_bytes([low, high]));
    if len > BODY_BYTES_MAX {
        return Err(format!("it announced {len} bytes, at most {BODY_BYTES_MAX} are allowed"));
    }
    Ok(len)
}

/// How a handshake goes on after a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Send this and wait for the answer.
    Answer(Vec<u8>),
    /// Send this (it may be empty): the peer is authenticated: its rank, and the channel.
    Joined(u32, Channel, Vec<u8>),
    /// Send this and give up.
    Failed(Failure, Vec<u8>),
}

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The peer's proof is wrong.
    WrongSecret,
    /// The peer refused, or said what cannot be.
    Refused(String),
}

/// One side of a handshake.
#[derive(Debug)]
pub(crate) struct Negotiation {
    side: Side,
    /// The other rank and the channel: known to a connector, claimed by the hello to an acceptor.
    peer: Option<(u32, Channel)>,
    nonce: Nonce,
    pair: Option<Pair>,
}

impl Negotiation {
    /// Begins as the connector; the bytes are its hello.
    pub(crate) fn connect(
        identity: &Identity,
        peer: u32,
        channel: Channel,
        nonce: Nonce,
    ) -> (Self, Vec<u8>) {
        let hello = Message::Hello(Hello {
            generation: identity.generation.0,
            group: identity.group,
            world: identity.world,
            from: identity.rank,
            to: peer,
            channel,
            streams: identity.streams,
            selection: identity.selection,
            reduction: identity.reduction as u8,
            transport: identity.transport as u8,
            nonce,
        });
        let negotiation =
            Self { side: Side::Connector, peer: Some((peer, channel)), nonce, pair: None };
        (negotiation, hello.encode())
    }

    /// Begins as the acceptor.
    pub(crate) fn accept(nonce: Nonce) -> Self {
        Self { side: Side::Acceptor, peer: None, nonce, pair: None }
    }

    /// The other rank, as far as it is known; only a claim before the handshake is over.
    pub(crate) fn peer(&self) -> Option<u32> {
        self.peer.map(|(rank, _)| rank)
    }

    /// Takes a whole message: the envelope's kind, and the body.
    pub(crate) fn receive(&mut self, identity: &Identity, kind: u8, body: &[u8]) -> Progress {
        let Some(message) = Message::decode(kind, body) else {
            return refuse("it sent a malformed handshake message".to_owned());
        };
        match (self.side, message, self.pair) {
            (_, Message::Refused { reason }, _) => {
                Progress::Failed(Failure::Refused(format!("it refused: {reason}")), Vec::new())
            }
            (Side::Acceptor, Message::Hello(hello), None) => {
                if let Some(reason) = object(identity, &hello) {
                    return refuse(reason);
                }
                self.peer = Some((hello.from, hello.channel));
                let pair = Pair {
                    channel: hello.channel,
                    connector: hello.from,
                    acceptor: identity.rank,
                    connector_nonce: hello.nonce,
                    acceptor_nonce: self.nonce,
                };
                self.pair = Some(pair);
                let proof = identity.prove(Side::Acceptor, &pair);
                Progress::Answer(Message::Challenge { nonce: self.nonce, proof }.encode())
            }
            (Side::Connector, Message::Challenge { nonce, proof }, None) => {
                let Some((peer, channel)) = self.peer else {
                    return refuse("it answers a hello that was not sent".to_owned());
                };
                let pair = Pair {
                    channel,
                    connector: identity.rank,
                    acceptor: peer,
                    connector_nonce: self.nonce,
                    acceptor_nonce: nonce,
                };
                if !identity.verify(Side::Acceptor, &pair, &proof) {
                    return wrong_secret();
                }
                self.pair = Some(pair);
                let proof = identity.prove(Side::Connector, &pair);
                Progress::Answer(Message::Proof { proof }.encode())
            }
            (Side::Acceptor, Message::Proof { proof }, Some(pair)) => {
                if identity.verify(Side::Connector, &pair, &proof) {
                    Progress::Joined(pair.connector, pair.channel, Message::Welcome.encode())
                } else {
                    wrong_secret()
                }
            }
            (Side::Connector, Message::Welcome, Some(pair)) => {
                Progress::Joined(pair.acceptor, pair.channel, Vec::new())
            }
            _ => refuse("it sent a handshake message out of turn".to_owned()),
        }
    }
}

/// Why a hello does not belong here, in words for the rank that sent it.
fn object(identity: &Identity, hello: &Hello) -> Option<String> {
    let Hello { generation, group, world, from, to, channel, streams, selection, .. } = *hello;
    let Hello { reduction, transport, .. } = *hello;
    if generation != identity.generation.0 {
        let found = Generation(generation);
        return Some(format!("generation {found}, expected {}", identity.generation));
    }
    if world != identity.world {
        return Some(format!("a world of {world} ranks, expected {}", identity.world));
    }
    if group != identity.group {
        return Some("another job or group".to_owned());
    }
    if to != identity.rank {
        return Some(format!("a hello to r{to}, but this is r{}", identity.rank));
    }
    if from <= identity.rank || from >= identity.world {
        return Some(format!(
            "a hello from r{from}, expected a rank above r{} and below {}",
            identity.rank, identity.world
        ));
    }
    if streams != identity.streams {
        return Some(format!("{streams} streams per peer, expected {}", identity.streams));
    }
    if channel.code() > streams {
        return Some(format!("a channel {}, expected at most {streams}", channel.code()));
    }
    if selection != identity.selection {
        return Some("another table of algorithms".to_owned());
    }
    // Ranks that differ in these would wait for each other in calls that cannot meet.
    if reduction != identity.reduction as u8 {
        return Some(format!("another order of sums, expected {:?}", identity.reduction));
    }
    if transport != identity.transport as u8 {
        return Some(format!("another transport, expected {:?}", identity.transport));
    }
    None
}

/// What tells a peer why it is refused.
pub(crate) fn refusal(reason: &str) -> Vec<u8> {
    Message::Refused { reason: reason.to_owned() }.encode()
}

fn refuse(reason: String) -> Progress {
    let message = refusal(&reason);
    Progress::Failed(Failure::Refused(reason), message)
}

fn wrong_secret() -> Progress {
    let reason = "the proof is wrong: the secrets differ".to_owned();
    Progress::Failed(Failure::WrongSecret, Message::Refused { reason }.encode())
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::Rank;
    use std::time::Duration;

    fn identity(rank: u32, change: impl Fn(&mut GroupOptions)) -> Identity {
        let mut options = GroupOptions {
            job: "digits".parse().unwrap(),
            group: "world".to_owned(),
            generation: Generation(3),
            rank: Rank(rank),
            world_size: 4,
            secret: Secret::new("correct horse"),
            connect_timeout: Duration::from_secs(1),
            reduction: Default::default(),
            transport: Default::default(),
            host: None,
        };
        change(&mut options);
        Identity::new(&options, &TcpOptions { streams: 2, ..TcpOptions::default() })
    }

    fn deliver(to: &mut Negotiation, identity: &Identity, message: &[u8]) -> Progress {
        let (envelope, body) = message.split_first_chunk::<ENVELOPE_BYTES>().unwrap();
        assert_eq!(body_bytes(envelope), Ok(body.len()));
        to.receive(identity, envelope[5], body)
    }

    /// Runs a handshake; what each side ends with.
    fn negotiate(connector: &Identity, acceptor: &Identity, to: u32) -> (Progress, Progress) {
        let (mut a, mut message) = Negotiation::connect(connector, to, Channel::Words, [1; 32]);
        let mut b = Negotiation::accept([2; 32]);
        let mut last = Progress::Answer(Vec::new());
        for turn in 0.. {
            let (side, who) = if turn % 2 == 0 { (&mut b, acceptor) } else { (&mut a, connector) };
            let progress = deliver(side, who, &message);
            let (Progress::Answer(next) | Progress::Joined(_, _, next) | Progress::Failed(_, next)) =
                &progress;
            message = next.clone();
            let over = message.is_empty();
            let before = std::mem::replace(&mut last, progress);
            if over {
                return if turn % 2 == 0 { (before, last) } else { (last, before) };
            }
        }
        unreachable!("a handshake ends")
    }

    #[test]
    fn ranks_of_one_group_join() {
        let (connector, acceptor) = (identity(2, |_| ()), identity(1, |_| ()));
        let (a, b) = negotiate(&connector, &acceptor, 1);
        assert_eq!(a, Progress::Joined(1, Channel::Words, Vec::new()));
        assert!(matches!(b, Progress::Joined(2, Channel::Words, _)));
        for channel in Channel::all(8) {
            assert_eq!(Channel::from_code(channel.code()), channel);
        }
    }

    #[test]
    fn what_the_connections_must_have_in_common_is_compared() {
        let acceptor = identity(1, |_| ());
        let mut connector = identity(2, |_| ());
        connector.streams = 3;
        let (a, _) = negotiate(&connector, &acceptor, 1);
        let refused = |progress| match progress {
            Progress::Failed(Failure::Refused(reason), _) => reason,
            other => panic!("expected a refusal, found {other:?}"),
        };
        assert!(refused(a).contains("3 streams per peer, expected 2"));
        let mut connector = identity(2, |_| ());
        connector.selection += 1;
        let (a, _) = negotiate(&connector, &acceptor, 1);
        assert!(refused(a).contains("another table of algorithms"));
        let connector = identity(2, |o| o.reduction = Reduction::Fast);
        let (a, _) = negotiate(&connector, &acceptor, 1);
        assert!(refused(a).contains("another order of sums, expected Deterministic"));
        let connector = identity(2, |o| o.transport = Transport::Tcp);
        let (a, _) = negotiate(&connector, &acceptor, 1);
        assert!(refused(a).contains("another transport, expected Auto"));
        let connector = identity(2, |_| ());
        let (_, hello) = Negotiation::connect(&connector, 1, Channel::Data(2), [1; 32]);
        let end = deliver(&mut Negotiation::accept([2; 32]), &acceptor, &hello);
        assert!(refused(end).contains("a channel 3, expected at most 2"));
    }

    #[test]
    fn every_difference_is_refused_and_named() {
        type Change = fn(&mut GroupOptions);
        let cases: [(&str, Change, u32); 6] = [
            ("generation g2, expected g3", |o| o.generation = Generation(2), 1),
            ("a world of 5 ranks, expected 4", |o| o.world_size = 5, 1),
            ("another job or group", |o| o.group = "pipeline".to_owned(), 1),
            ("another job or group", |o| o.job = "other".parse().unwrap(), 1),
            ("a hello to r0, but this is r1", |_| (), 0),
            ("a hello from r1, expected a rank above r1", |o| o.rank = Rank(1), 1),
        ];
        for (expected, change, to) in cases {
            let (a, b) = negotiate(&identity(2, change), &identity(1, |_| ()), to);
            for side in [a, b] {
                let Progress::Failed(Failure::Refused(reason), _) = side else {
                    panic!("expected a refusal, found {side:?}")
                };
                assert!(reason.contains(expected), "`{reason}` does not say `{expected}`");
            }
        }
    }

    #[test]
    fn a_wrong_secret_is_noticed_by_either_side() {
        let liar = identity(2, |o| o.secret = Secret::new("battery staple"));
        let (a, b) = negotiate(&liar, &identity(1, |_| ()), 1);
        assert!(matches!(a, Progress::Failed(Failure::WrongSecret, _)), "{a:?}");
        assert!(matches!(b, Progress::Failed(Failure::Refused(_), _)), "{b:?}");

        // A connector that does not check: the acceptor does, and no proof of its own helps.
        let acceptor = identity(1, |_| ());
        let (_, hello) = Negotiation::connect(&liar, 1, Channel::Data(0), [1; 32]);
        let mut b = Negotiation::accept([2; 32]);
        let Progress::Answer(challenge) = deliver(&mut b, &acceptor, &hello) else {
            panic!("a hello is answered")
        };
        let reflected: Proof = challenge[ENVELOPE_BYTES + 32..].try_into().unwrap();
        for proof in [[0; 32], reflected] {
            let mut b = Negotiation::accept([2; 32]);
            deliver(&mut b, &acceptor, &hello);
            let end = deliver(&mut b, &acceptor, &Message::Proof { proof }.encode());
            assert!(matches!(end, Progress::Failed(Failure::WrongSecret, _)), "{end:?}");
        }
    }

    #[test]
    fn messages_out_of_turn_and_malformed_ones_are_refused() {
        let me = identity(1, |_| ());
        for message in [Message::Welcome, Message::Proof { proof: [0; 32] }] {
            let end = deliver(&mut Negotiation::accept([0; 32]), &me, &message.encode());
            assert!(matches!(end, Progress::Failed(Failure::Refused(_), _)), "{end:?}");
        }
        let end = Negotiation::accept([0; 32]).receive(&me, 1, &[0; 7]);
        assert!(matches!(end, Progress::Failed(Failure::Refused(_), _)));
        assert!(body_bytes(b"GET / HT").is_err());
        assert!(body_bytes(&[b'C', b'H', b'H', b'S', 1, 1, 0xff, 0xff]).is_err());
    }
}
