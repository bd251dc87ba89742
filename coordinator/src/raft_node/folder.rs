//! The folder of one raft node: its lock, its database file and whose it is.
//!
//! Invariants: at most one process uses a folder; a database file either does not exist or is
//! complete with its identity (it is made under another name and renamed); a folder is only ever
//! used by the node, cluster and members that made it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use api::NodeId;
use protobuf::Message as _;
use raft::eraftpb::ConfState;
use redb::{Database, ReadableDatabase, TableDefinition};

use super::options::RaftOptions;

/// Small values of which there is one each, by name.
pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Log entries by index, in raft's own encoding.
pub(super) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// The newest snapshot's data, under [`SNAPSHOT_ROW`]. A table of its own: beside the hard state it
/// would be rewritten with it.
pub(super) const SNAPSHOT: TableDefinition<'_, u8, &[u8]> = TableDefinition::new("snapshot");
/// The folder identity of every peer heard from.
pub(super) const PEERS: TableDefinition<'_, u64, u64> = TableDefinition::new("peers");

/// The only key of [`SNAPSHOT`].
pub(super) const SNAPSHOT_ROW: u8 = 0;

/// Layout of the tables; a folder of another is refused.
const FORMAT: u64 = 1;
const KEY_FORMAT: &str = "format";
const KEY_NODE: &str = "node";
const KEY_CLUSTER: &str = "cluster_id";
const KEY_IDENTITY: &str = "identity";
/// Key in [`META`] of raft's membership.
pub(super) const KEY_CONF_STATE: &str = "conf_state";

const LOCK_FILE: &str = "lock";
const DATABASE_FILE: &str = "raft.redb";
const UNFINISHED_FILE: &str = "raft.redb.new";

/// redb's page cache. The log of small entries fits; its default of 1 GiB is for large databases.
const CACHE_BYTES: usize = 16 << 20;

/// Why a raft folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The file system refused.
    #[error("raft folder: cannot {action} `{}`: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// Another process has it.
    #[error(
        "raft folder `{}` is in use by another process: stop that coordinator, or give this one \
         its own `cluster.dir`",
        path.display()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The database failed or its file is damaged.
    #[error("raft log in `{}`: {cause}", path.display())]
    Database {
        /// The folder.
        path: PathBuf,
        /// What redb reports.
        cause: Box<redb::Error>,
    },
    /// The folder was made for something else.
    #[error(
        "raft folder `{}` belongs to {what} {found}, but the configuration says {expected}: {help}",
        path.display()
    )]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// As stored.
        found: String,
        /// As configured.
        expected: String,
        /// What to do.
        help: &'static str,
    },
    /// No random identity could be drawn for a new folder.
    #[error("cannot draw an identity for raft folder `{}`: {cause}", path.display())]
    Identity {
        /// The folder.
        path: PathBuf,
        /// Why.
        cause: crate::random::RandomError,
    },
}

/// An open raft folder; closing (dropping) it lets another process in.
pub(super) struct Folder {
    path: PathBuf,
    /// The log and everything that must agree with it.
    pub(super) database: Database,
    /// Drawn when the folder was made; another one under the same node id is another, empty log.
    pub(super) identity: u64,
    /// The lock lives as long as this handle; fields drop in order, so it goes last.
    _lock: File,
}

impl Folder {
    /// Locks and opens the folder, making it if it is absent.
    pub(super) fn open(options: &RaftOptions) -> Result<Self, FolderError> {
        let path = options.dir.clone();
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |cause| FolderError::Io { action, path, cause }
        };
        fs::create_dir_all(&path).map_err(io("make", &path))?;
        let lock_path = path.join(LOCK_FILE);
        let mut opening = File::options();
        opening.read(true).write(true).create(true).truncate(false);
        let lock = opening.open(&lock_path).map_err(io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FolderError::InUse { path }),
            Err(TryLockError::Error(cause)) => return Err(io("lock", &lock_path)(cause)),
        }
        let file = path.join(DATABASE_FILE);
        if !file.try_exists().map_err(io("look for", &file))? {
            create(&path, options)?;
        }
        let database = open_database(&file).map_err(|cause| database_fault(&path, cause))?;
        let identity = check_identity(&database, &path, options)?;
        Ok(Self { path, database, identity, _lock: lock })
    }

    /// Wraps a failure of the database.
    pub(super) fn fault(&self, cause: redb::Error) -> FolderError {
        database_fault(&self.path, cause)
    }
}

fn database_fault(path: &Path, cause: redb::Error) -> FolderError {
    match cause {
        // Our own lock is held, so this is a process that does not know about it.
        redb::Error::DatabaseAlreadyOpen => FolderError::InUse { path: path.to_owned() },
        cause => FolderError::Database { path: path.to_owned(), cause: Box::new(cause) },
    }
}

/// Opens the file and verifies every page: a file altered on disk is an error now, not a panic
/// later. The log is short, so this is quick.
fn open_database(file: &Path) -> Result<Database, redb::Error> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    Ok(builder.create(file)?)
}

/// Makes the database under another name, complete with its identity, and renames it: a crash on
/// the way leaves no half-made folder.
fn create(path: &Path, options: &RaftOptions) -> Result<(), FolderError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |cause| FolderError::Io { action, path, cause }
    };
    let draw = |cause| FolderError::Identity { path: path.to_owned(), cause };
    let identity = crate::random::random_u64().map_err(draw)?;
    let unfinished = path.join(UNFINISHED_FILE);
    if unfinished.try_exists().map_err(io("look for", &unfinished))? {
        fs::remove_file(&unfinished).map_err(io("remove", &unfinished))?;
    }
    write_identity(&unfinished, options, identity).map_err(|cause| database_fault(path, cause))?;
    let file = path.join(DATABASE_FILE);
    fs::rename(&unfinished, &file).map_err(io("rename", &unfinished))?;
    // Without this a power cut could forget the file, and with it this node's votes.
    for folder in [Some(path), path.parent()].into_iter().flatten() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let handle = File::open(folder).map_err(io("open", folder))?;
        handle.sync_all().map_err(io("sync", folder))?;
    }
    tracing::info!(node = %options.node, folder = %path.display(), "made a new raft folder");
    Ok(())
}

fn write_identity(file: &Path, options: &RaftOptions, identity: u64) -> Result<(), redb::Error> {
    let database = open_database(file)?;
    let transaction = database.begin_write()?;
    {
        let mut meta = transaction.open_table(META)?;
        let members = ConfState { voters: options.voters(), ..ConfState::default() };
        let members = members.write_to_bytes().map_err(|e| damaged(KEY_CONF_STATE, &e))?;
        meta.insert(KEY_FORMAT, FORMAT.to_le_bytes().as_slice())?;
        meta.insert(KEY_NODE, options.node.0.to_le_bytes().as_slice())?;
        meta.insert(KEY_CLUSTER, options.cluster_id.as_bytes())?;
        meta.insert(KEY_IDENTITY, identity.to_le_bytes().as_slice())?;
        meta.insert(KEY_CONF_STATE, members.as_slice())?;
        // Made now, so that readers never meet a missing table.
        transaction.open_table(LOG)?;
        transaction.open_table(SNAPSHOT)?;
        transaction.open_table(PEERS)?;
    }
    transaction.commit()?;
    Ok(())
}

/// A stored value that does not decode.
pub(super) fn damaged(key: &str, cause: &dyn std::fmt::Display) -> redb::Error {
    redb::Error::Corrupted(format!("stored `{key}` is damaged: {cause}"))
}

/// Reads a number of `table`, which must be there.
fn number(key: &str, value: Option<&[u8]>) -> Result<u64, redb::Error> {
    let value = value.ok_or_else(|| damaged(key, &"it is missing"))?;
    let bytes = value.try_into().map_err(|_| damaged(key, &"it is not a number"))?;
    Ok(u64::from_le_bytes(bytes))
}

struct Stored {
    format: u64,
    node: u64,
    cluster_id: String,
    identity: u64,
    voters: Vec<u64>,
}

fn read_identity(database: &Database) -> Result<Stored, redb::Error> {
    let transaction = database.begin_read()?;
    let meta = transaction.open_table(META)?;
    let read = |key| -> Result<Option<Vec<u8>>, redb::Error> {
        Ok(meta.get(key)?.map(|value| value.value().to_vec()))
    };
    let cluster_id = read(KEY_CLUSTER)?.unwrap_or_default();
    let members = read(KEY_CONF_STATE)?.unwrap_or_default();
    let members = ConfState::parse_from_bytes(&members).map_err(|e| damaged(KEY_CONF_STATE, &e))?;
    Ok(Stored {
        format: number(KEY_FORMAT, read(KEY_FORMAT)?.as_deref())?,
        node: number(KEY_NODE, read(KEY_NODE)?.as_deref())?,
        cluster_id: String::from_utf8(cluster_id).map_err(|e| damaged(KEY_CLUSTER, &e))?,
        identity: number(KEY_IDENTITY, read(KEY_IDENTITY)?.as_deref())?,
        voters: members.voters,
    })
}

fn check_identity(
    database: &Database,
    path: &Path,
    options: &RaftOptions,
) -> Result<u64, FolderError> {
    let stored = read_identity(database).map_err(|cause| database_fault(path, cause))?;
    let foreign = |what, found: String, expected: String, help| FolderError::Foreign {
        path: path.to_owned(),
        what,
        found,
        expected,
        help,
    };
    if stored.format != FORMAT {
        let help = "run the version of `cluster` that wrote it";
        return Err(foreign("format", stored.format.to_string(), FORMAT.to_string(), help));
    }
    if stored.cluster_id != options.cluster_id {
        let help = "set `cluster.id` back, or give this coordinator an empty `cluster.dir`";
        let (found, expected) = (stored.cluster_id, options.cluster_id.clone());
        return Err(foreign("cluster", format!("`{found}`"), format!("`{expected}`"), help));
    }
    if stored.node != options.node.0 {
        let help = "set `coordinator.node` back, or give this coordinator its own `cluster.dir`";
        let (found, expected) = (NodeId(stored.node), options.node);
        return Err(foreign("node", found.to_string(), expected.to_string(), help));
    }
    if stored.voters != options.voters() {
        let help = "restore `coordinator.members`: the ids of a raft group are fixed at its first \
                    start (addresses may change)";
        let (found, expected) = (list(&stored.voters), list(&options.voters()));
        return Err(foreign("members", found, expected, help));
    }
    Ok(stored.identity)
}

/// `n1, n2, n3`.
pub(super) fn list(nodes: &[u64]) -> String {
    nodes.iter().map(|id| NodeId(*id).to_string()).collect::<Vec<_>>().join(", ")
}
