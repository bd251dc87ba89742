//! cluster.toml: the whole configuration of every role. The shipped file holds every key with its
//! default and the sentence that stands here; a test keeps the two equal.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data_plane::STREAMS_MAX;
use crate::document::{self, DocumentError};
use crate::ids::{NodeId, Secret};
use crate::price::{HostPrice, Market};
use crate::units::{ByteSize, Span};

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Identity and folders.
    pub cluster: ClusterSection,
    /// The raft group and its API.
    pub coordinator: CoordinatorSection,
    /// The agent of one host.
    pub worker: WorkerSection,
    /// Where data, checkpoints, models and logs are remembered.
    pub store: StoreSection,
    /// Certificates; required by every listener that is not on loopback.
    pub tls: TlsSection,
    /// Model servers.
    pub serve: ServeSection,
}

/// Identity and folders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// Raft groups and workers of another id are refused.
    pub id: String,
    /// Folder for the raft log, certificates, logs and sockets of this host.
    pub dir: PathBuf,
    /// File that holds the token a worker or client must show; made by `cluster up` when absent.
    pub token_file: PathBuf,
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self { id: "cohort".into(), dir: ".cohort".into(), token_file: ".cohort/token".into() }
    }
}

/// The raft group and its API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorSection {
    /// This coordinator's id in `members`; never reuse the id of one whose folder was lost.
    pub node: NodeId,
    /// Every coordinator: id and address. One or three or five of them.
    pub members: Vec<Member>,
    /// Time without a leader's heartbeat after which a follower asks for an election.
    pub election_timeout: Span,
    /// Interval of the leader's heartbeats.
    pub heartbeat_interval: Span,
    /// Time without a word from a worker after which its ranks are counted as lost.
    pub worker_lease: Span,
    /// Time a new leader waits for workers to come back before it evicts any.
    pub grace_period: Span,
    /// Log entries after which a snapshot replaces them.
    pub snapshot_entries: u64,
}

/// One coordinator's id and address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its id, never 0.
    pub node: NodeId,
    /// Where it listens for clients, workers and the other coordinators.
    pub address: SocketAddr,
}

/// A loopback address.
const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

impl Default for CoordinatorSection {
    fn default() -> Self {
        Self {
            node: NodeId(1),
            members: vec![Member { node: NodeId(1), address: loopback(7070) }],
            election_timeout: Span::seconds(1),
            heartbeat_interval: Span::millis(100),
            worker_lease: Span::millis(2_500),
            grace_period: Span::seconds(10),
            snapshot_entries: 10_000,
        }
    }
}

/// The agent of one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSection {
    /// The worker's name; empty: the host's name.
    pub name: String,
    /// Ranks it may run at once; 0: one per processor core (or per GPU).
    pub slots: u32,
    /// Address on which its ranks listen for one another.
    pub data_address: IpAddr,
    /// Do not encrypt the traffic of ranks: needed where data_address is not loopback and `[tls]`
    /// is empty; with `[tls]`, for a network you trust. Ranks authenticate one another either way.
    pub plaintext_data: bool,
    /// Connections for data from each rank to each peer, 1 to 8: more than one where a single
    /// connection does not fill the network. The same on all workers.
    pub data_streams: u32,
    /// Table of algorithms for reductions over TCP, as `cluster bench collective --tune` writes it;
    /// empty: the built-in one. The same on all workers.
    pub algorithms: PathBuf,
    /// Whether the ranks of one host share memory; false: TCP among them, too. The same on all
    /// workers.
    pub shared_memory: bool,
    /// Log bytes kept per rank on the worker's disk; older lines are dropped with a note.
    pub log_bytes: ByteSize,
    /// Time a rank gets between a polite stop, with its last checkpoint, and a kill.
    pub stop_timeout: Span,
    /// Time after which a rank whose process is stopped by a signal is killed, so that it can be
    /// replaced; "0s": never, for people who debug one.
    pub stopped_rank_timeout: Span,
    /// How this host was got, "on-demand" or "spot": what a job used is summed by it.
    pub market: Market,
    /// What is paid for an hour of this host, all its slots together, in any currency that all workers
    /// share; 0: not known, its ranks' time is counted without a price.
    pub price_per_hour: f64,
    /// What an hour of such a host costs on demand, to tell what was saved; 0: what is paid. Needed
    /// on a spot host with a price.
    pub on_demand_price_per_hour: f64,
    /// How this host learns that it is to be reclaimed.
    pub notices: NoticesSection,
}

impl Default for WorkerSection {
    fn default() -> Self {
        Self {
            name: String::new(),
            slots: 0,
            data_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            plaintext_data: false,
            data_streams: 1,
            algorithms: PathBuf::new(),
            shared_memory: true,
            log_bytes: ByteSize(16 << 20),
            stop_timeout: Span::seconds(60),
            stopped_rank_timeout: Span::seconds(2),
            market: Market::OnDemand,
            price_per_hour: 0.0,
            on_demand_price_per_hour: 0.0,
            notices: NoticesSection::default(),
        }
    }
}

impl WorkerSection {
    /// What it announces of its host's market and prices.
    pub fn host_price(&self) -> HostPrice {
        let known = |price: f64| (price > 0.0).then_some(price);
        let (price, on_demand) = (self.price_per_hour, self.on_demand_price_per_hour);
        HostPrice { market: self.market, price: known(price), on_demand: known(on_demand) }
    }

    /// What is wrong with its prices, if anything.
    fn price_mistake(&self) -> Option<String> {
        let (price, on_demand) = (self.price_per_hour, self.on_demand_price_per_hour);
        let is_amount = |price: f64| price.is_finite() && price >= 0.0;
        for (key, price) in [("price_per_hour", price), ("on_demand_price_per_hour", on_demand)] {
            if !is_amount(price) {
                return Some(format!(
                    "worker.{key} = {price}: expected an amount such as 0.35, or 0 where it is not \
                     known"
                ));
            }
        }
        if on_demand > 0.0 && price == 0.0 {
            return Some(format!(
                "worker.on_demand_price_per_hour = {on_demand} is set and worker.price_per_hour is \
                 not: nothing says what is paid"
            ));
        }
        if self.market == Market::Spot && price > 0.0 && on_demand == 0.0 {
            return Some(format!(
                "worker.market = \"spot\" with worker.price_per_hour = {price} and no \
                 worker.on_demand_price_per_hour: nothing says what is saved; set both or neither"
            ));
        }
        None
    }
}

/// How this host learns that it is to be reclaimed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoticesSection {
    /// Where to look for notices: "aws", "gcp", "azure", "file", any of them. SIGTERM is one always.
    pub sources: Vec<NoticeSource>,
    /// File of the source "file": the worker leaves when it appears. It may be empty or hold JSON such as
    /// {"deadline_seconds": 120, "reason": "maintenance"}, both optional.
    pub file: PathBuf,
    /// Metadata server to ask, such as "http://127.0.0.1:8099"; empty: the provider's own.
    pub endpoint: String,
    /// How often to look, where the source does not tell by itself.
    pub interval: Span,
    /// Whether AWS's recommendation to rebalance is a notice, too; false: nothing more is placed on
    /// this host, and what runs here goes on.
    pub act_on_rebalance: bool,
}

/// Who tells that a host is to be reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoticeSource {
    /// Amazon EC2: spot interruptions and rebalance recommendations.
    Aws,
    /// Google Compute Engine: preemption and host maintenance.
    Gcp,
    /// Azure: scheduled events.
    Azure,
    /// A file that something else on the host writes.
    File,
}

impl Default for NoticesSection {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            file: PathBuf::new(),
            endpoint: String::new(),
            interval: Span::seconds(1),
            act_on_rebalance: false,
        }
    }
}

impl NoticesSection {
    /// What is wrong with it, if anything.
    fn mistake(&self) -> Option<String> {
        let asks_file = self.sources.contains(&NoticeSource::File);
        let has_file = !self.file.as_os_str().is_empty();
        let clouds = self.sources.iter().filter(|source| **source != NoticeSource::File).count();
        if asks_file && !has_file {
            Some(
                "worker.notices.sources has \"file\" and worker.notices.file is empty: name the \
                 file to look for"
                    .into(),
            )
        } else if has_file && !asks_file {
            Some(format!(
                "worker.notices.file = \"{}\" is set and worker.notices.sources lacks \"file\": \
                 nobody would look for it",
                self.file.display()
            ))
        } else if !self.endpoint.is_empty() && clouds == 0 {
            Some(format!(
                "worker.notices.endpoint = \"{}\" is set and worker.notices.sources has none of \
                 \"aws\", \"gcp\", \"azure\": nobody would ask it",
                self.endpoint
            ))
        } else if !self.endpoint.is_empty() && !self.endpoint.starts_with("http://") {
            Some(format!(
                "worker.notices.endpoint = \"{}\": expected http://HOST or http://HOST:PORT, \
                 metadata servers speak no TLS",
                self.endpoint
            ))
        } else if self.interval < NOTICE_INTERVAL_MIN {
            Some(format!(
                "worker.notices.interval = {}: expected at least {NOTICE_INTERVAL_MIN}, metadata \
                 servers refuse who asks too often",
                self.interval
            ))
        } else {
            None
        }
    }
}

/// Shortest interval between two questions to a metadata server.
const NOTICE_INTERVAL_MIN: Span = Span::millis(10);

/// Where data, checkpoints, models and logs are remembered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreSection {
    /// `file://` folder or `s3://bucket/prefix`; empty: the folder `store` under cluster.dir.
    pub uri: String,
    /// How long a checkpoint is written again and again while the store is full or does not answer,
    /// before that fails the rank.
    pub patience: Span,
    /// How to reach S3; also used for `s3://` data channels.
    pub s3: S3Section,
    /// The key under which checkpoints and models are encrypted.
    pub encryption: EncryptionSection,
}

impl Default for StoreSection {
    fn default() -> Self {
        Self {
            uri: String::new(),
            patience: Span::seconds(180),
            s3: S3Section::default(),
            encryption: EncryptionSection::default(),
        }
    }
}

/// The key under which checkpoints and models are encrypted; neither: they are not. The same on every
/// host, and from the store's first object on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionSection {
    /// File that holds the key: 64 hexadecimal digits, or 32 bytes.
    pub key_file: PathBuf,
    /// Program and arguments that print the key, in place of a file.
    pub key_command: Vec<String>,
}

/// How to reach S3.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Section {
    /// Endpoint of an S3-compatible server; empty: AWS.
    pub endpoint: String,
    /// Region; empty: AWS_REGION, else us-east-1.
    pub region: String,
    /// Access key; empty: AWS_ACCESS_KEY_ID; without either, the role of the container or, on AWS, of
    /// the instance: see docs/guide.md.
    pub access_key_id: String,
    /// Secret key; empty: AWS_SECRET_ACCESS_KEY.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_access_key: Option<Secret>,
    /// Session token of temporary credentials; absent: AWS_SESSION_TOKEN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_token: Option<Secret>,
    /// Allow an endpoint without TLS.
    pub allow_http: bool,
}

/// Certificates; required by every listener that is not on loopback.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSection {
    /// Certificate authority of the cluster, PEM; empty: no TLS, loopback only.
    pub ca: PathBuf,
    /// This host's certificate, PEM.
    pub certificate: PathBuf,
    /// This host's private key, PEM.
    pub key: PathBuf,
}

impl TlsSection {
    /// Whether certificates are configured.
    pub fn is_enabled(&self) -> bool {
        !self.ca.as_os_str().is_empty()
    }

    /// A key that is set beside one that is not.
    fn half(&self) -> Option<(&'static str, &'static str)> {
        let keys =
            [("tls.ca", &self.ca), ("tls.certificate", &self.certificate), ("tls.key", &self.key)];
        let find = |empty| keys.iter().find(|(_, path)| path.as_os_str().is_empty() == empty);
        Some((find(false)?.0, find(true)?.0))
    }
}

/// Model servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSection {
    /// Where `cluster serve` listens.
    pub listen: SocketAddr,
    /// Most requests computed together.
    pub batch_max: u32,
    /// Longest time a request waits for others to join its batch.
    pub batch_wait: Span,
    /// Requests that may wait; one more is answered 503.
    pub queue_max: u32,
    /// Largest request body.
    pub body_max: ByteSize,
    /// Bytes of request bodies held at once; one more body is answered 503.
    pub queue_bytes: ByteSize,
    /// Time running requests get to finish when the server stops.
    pub drain_timeout: Span,
    /// Threads that compute; 0: one per core.
    pub threads: u32,
}

impl Default for ServeSection {
    fn default() -> Self {
        Self {
            listen: loopback(8080),
            batch_max: 32,
            batch_wait: Span::millis(2),
            queue_max: 256,
            body_max: ByteSize(8 << 20),
            queue_bytes: ByteSize(256 << 20),
            drain_timeout: Span::seconds(10),
            threads: 0,
        }
    }
}

/// A cluster.toml that cannot be used as it stands.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not a cluster document.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// Two settings disagree, or one is unsafe.
    #[error("{0}")]
    Disagreement(String),
}

impl ClusterConfig {
    /// Reads and validates a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = document::read_text(path)?;
        let config: Self = document::parse(&text, &path.display().to_string())?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every rule that needs only the file; names both values where two disagree.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |message: String| Err(ConfigError::Disagreement(message));
        let coordinator = &self.coordinator;
        let mut nodes: Vec<NodeId> = coordinator.members.iter().map(|m| m.node).collect();
        nodes.sort();
        nodes.dedup();
        if nodes.len() != coordinator.members.len() || nodes.first() == Some(&NodeId(0)) {
            return fail("coordinator.members: ids must be distinct and not 0".into());
        }
        if !nodes.contains(&coordinator.node) {
            return fail(format!(
                "coordinator.node = {} is not among coordinator.members",
                coordinator.node.0
            ));
        }
        if coordinator.members.len().is_multiple_of(2) {
            return fail(format!(
                "coordinator.members has {} entries, expected an odd number: an even one \
                 tolerates no more failures and needs a larger majority",
                coordinator.members.len()
            ));
        }
        if coordinator.heartbeat_interval.0 * 4 > coordinator.election_timeout.0 {
            return fail(format!(
                "coordinator.heartbeat_interval = {} must be at most a quarter of \
                 coordinator.election_timeout = {}",
                coordinator.heartbeat_interval, coordinator.election_timeout
            ));
        }
        if self.serve.body_max > self.serve.queue_bytes {
            return fail(format!(
                "serve.body_max = {} is more than serve.queue_bytes = {}: the largest body would \
                 never fit",
                self.serve.body_max, self.serve.queue_bytes
            ));
        }
        let EncryptionSection { key_file, key_command } = &self.store.encryption;
        if !key_file.as_os_str().is_empty() && !key_command.is_empty() {
            return fail(format!(
                "store.encryption.key_file = `{}` and store.encryption.key_command = `{}` are both \
                 set: the key comes from one of them",
                key_file.display(),
                key_command[0]
            ));
        }
        if let Some((given, missing)) = self.tls.half() {
            return fail(format!(
                "{given} is set and {missing} is not: TLS needs tls.ca, tls.certificate and tls.key"
            ));
        }
        for member in &coordinator.members {
            self.check_listener("coordinator.members", member.address.ip())?;
        }
        let worker = &self.worker;
        if let Some(mistake) = worker.notices.mistake().or_else(|| worker.price_mistake()) {
            return fail(mistake);
        }
        self.check_data_plane()
    }

    /// Ranks encrypt what leaves the host, unless it is said that they need not.
    fn check_data_plane(&self) -> Result<(), ConfigError> {
        let worker = &self.worker;
        let plaintext = worker.plaintext_data || self.tls.is_enabled();
        let message = if !worker.data_address.is_loopback() && !plaintext {
            format!(
                "worker.data_address = {} is not loopback and [tls] is not configured: set tls.ca, \
                 tls.certificate and tls.key (`cluster certs` makes them), or \
                 worker.plaintext_data = true on a network you trust",
                worker.data_address
            )
        } else if !(1..=STREAMS_MAX).contains(&worker.data_streams) {
            format!("worker.data_streams = {}: expected 1 to {STREAMS_MAX}", worker.data_streams)
        } else {
            return Ok(());
        };
        Err(ConfigError::Disagreement(message))
    }

    /// Refuses an address that is not loopback while no certificates are configured.
    pub fn check_listener(&self, key: &str, address: IpAddr) -> Result<(), ConfigError> {
        if address.is_loopback() || self.tls.is_enabled() {
            return Ok(());
        }
        Err(ConfigError::Disagreement(format!(
            "{key}: {address} is not loopback and [tls] is not configured: set tls.ca, \
             tls.certificate and tls.key (`cluster certs` makes them), or listen on 127.0.0.1"
        )))
    }

    /// This coordinator's own address.
    pub fn own_address(&self) -> Option<SocketAddr> {
        let own = |m: &&Member| m.node == self.coordinator.node;
        self.coordinator.members.iter().find(own).map(|m| m.address)
    }

    /// The store's URI with its default filled in.
    pub fn store_uri(&self) -> String {
        if !self.store.uri.is_empty() {
            return self.store.uri.clone();
        }
        let folder = self.cluster.dir.join("store");
        format!("file://{}", std::path::absolute(&folder).unwrap_or(folder).display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_parses_to_the_defaults() {
        let text = include_str!("../../cluster.toml");
        let shipped: ClusterConfig = document::parse(text, "cluster.toml").expect("parses");
        assert_eq!(shipped, ClusterConfig::default());
        // Every key is present, so that the file documents all of them.
        let given: toml::Table = text.parse().expect("a table");
        let all = toml::Table::try_from(ClusterConfig::default()).expect("a table");
        assert_has_keys(&given, &all, "");
    }

    fn assert_has_keys(given: &toml::Table, all: &toml::Table, within: &str) {
        for (key, value) in all {
            let found =
                given.get(key).unwrap_or_else(|| panic!("cluster.toml lacks {within}{key}"));
            if let (toml::Value::Table(given), toml::Value::Table(all)) = (found, value) {
                assert_has_keys(given, all, &format!("{within}{key}."));
            }
        }
    }

    #[test]
    fn notices_that_nobody_would_see_are_refused() {
        let mistake = |text: &str| {
            let config: ClusterConfig = document::parse(text, "cluster.toml").expect("parses");
            config.validate().map_err(|error| error.to_string())
        };
        let file = "[worker.notices]\nsources = [\"file\"]\n";
        let text = mistake(file).expect_err("no file");
        assert!(text.contains("worker.notices.file is empty"), "{text}");
        mistake(&format!("{file}file = \"/run/leave\"\n")).expect("complete");
        let text = mistake("[worker.notices]\nfile = \"/run/leave\"\n").expect_err("no source");
        assert!(text.contains("lacks \"file\""), "{text}");
        let aws = "[worker.notices]\nsources = [\"aws\"]\n";
        mistake(&format!("{aws}endpoint = \"http://127.0.0.1:1\"\n")).expect("complete");
        let text = mistake(&format!("{aws}endpoint = \"https://h\"\n")).expect_err("TLS");
        assert!(text.contains("expected http://HOST"), "{text}");
        let text = mistake(&format!("{aws}interval = \"1ms\"\n")).expect_err("too often");
        assert!(text.contains("1ms") && text.contains("at least 10ms"), "{text}");
        let unknown = document::parse::<ClusterConfig>(
            "[worker.notices]\nsources = [\"azur\"]\n",
            "cluster.toml",
        );
        let text = unknown.expect_err("unknown").to_string();
        assert!(text.contains("did you mean `azure`?"), "{text}");
    }

    #[test]
    fn open_listeners_without_tls_are_refused() {
        let mut config = ClusterConfig::default();
        config.coordinator.members[0].address = "0.0.0.0:7070".parse().expect("an address");
        let text = config.validate().expect_err("open").to_string();
        assert!(text.contains("0.0.0.0 is not loopback"), "{text}");
    }

    #[test]
    fn data_leaves_the_host_encrypted_or_by_permission() {
        let mut config = ClusterConfig::default();
        config.worker.data_address = IpAddr::from([10, 0, 0, 1]);
        let text = config.validate().expect_err("in the open").to_string();
        for part in ["worker.data_address = 10.0.0.1", "[tls]", "worker.plaintext_data = true"] {
            assert!(text.contains(part), "`{part}` is missing: {text}");
        }
        config.worker.plaintext_data = true;
        config.validate().expect("permitted");
        config.worker.plaintext_data = false;
        config.tls =
            TlsSection { ca: "ca".into(), certificate: "host".into(), key: "host.key".into() };
        config.validate().expect("encrypted");
    }

    #[test]
    fn half_of_the_certificates_is_a_mistake() {
        let mut config = ClusterConfig::default();
        config.tls.key = "host.key".into();
        let text = config.validate().expect_err("no authority").to_string();
        assert!(text.starts_with("tls.key is set and tls.ca is not"), "{text}");
        config.tls.ca = "ca.pem".into();
        let text = config.validate().expect_err("no certificate").to_string();
        assert!(text.starts_with("tls.ca is set and tls.certificate is not"), "{text}");
    }

    #[test]
    fn disagreements_are_refused() {
        let mut config = ClusterConfig::default();
        config.coordinator.node = NodeId(9);
        assert!(config.validate().is_err());
        let mut config = ClusterConfig::default();
        config.coordinator.heartbeat_interval = Span::seconds(1);
        let text = config.validate().expect_err("too slow").to_string();
        assert!(text.contains("1s") && text.contains("a quarter"), "{text}");
        let mut config = ClusterConfig::default();
        config.worker.data_streams = 9;
        let text = config.validate().expect_err("too many").to_string();
        assert_eq!(text, "worker.data_streams = 9: expected 1 to 8");
        let mut config = ClusterConfig::default();
        config.worker.market = Market::Spot;
        config.worker.price_per_hour = 0.3;
        let text = config.validate().expect_err("nothing to compare with").to_string();
        assert!(text.contains("= 0.3 and no worker.on_demand_price_per_hour"), "{text}");
        config.worker.on_demand_price_per_hour = 1.2;
        assert!(config.validate().is_ok());
        config.worker.price_per_hour = -1.0;
        let text = config.validate().expect_err("no amount").to_string();
        assert!(text.starts_with("worker.price_per_hour = -1: expected an amount"), "{text}");
        let mut config = ClusterConfig::default();
        config.serve.body_max = ByteSize(512 << 20);
        let text = config.validate().expect_err("too large").to_string();
        assert!(text.contains("512MiB") && text.contains("256MiB"), "{text}");
    }
}
