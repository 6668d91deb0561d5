//! The state file: a redb database with a table for each kind of record.
//!
//! redb writes to unused pages and then switches over, so an interrupted commit leaves the previous one intact.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use redb::backends::FileBackend;
use redb::{Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::{QueuePosition, Restored, Save};
use crate::state::{Corrupt, FORMAT, Limits, RecordBatch, Restorer, State};

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const WORKERS: TableDefinition<u32, &[u8]> = TableDefinition::new("workers");
const TASK_SERIES: TableDefinition<u32, &[u8]> = TableDefinition::new("task_series");
const TASKS: TableDefinition<u32, &[u8]> = TableDefinition::new("tasks");
/// Hashes of the last messages: those of one save together, by the number of the save.
const MESSAGE_HASHES: TableDefinition<u64, &[u8]> = TableDefinition::new("message_hashes");

/// Keys of the table `meta`.
const KEY_FORMAT: &str = "format";
const KEY_STORE_ID: &str = "store_id";
const KEY_HEADER: &str = "header";
const KEY_POSITION: &str = "position";

/// Size of the page cache in bytes. A save touches few pages.
const CACHE: usize = 4 << 20;
/// A file is compacted once it exceeds twice its size after the last compaction by this many bytes.
const MIN_COMPACTION_GROWTH: u64 = 16 << 20;
const HASH_LEN: usize = size_of::<u64>();

/// The file cannot be read or written.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum DbError {
    /// Another process has the file open.
    #[error("locked by another process")]
    Locked,
    /// Its content cannot be decoded, or is of another version or another state.
    #[error("{0}")]
    Unreadable(String),
    /// An error of the system or of redb that may be transient.
    #[error("{0}")]
    Unavailable(String),
}

impl<E: Into<redb::Error>> From<E> for DbError {
    fn from(error: E) -> Self {
        match error.into() {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Self::Locked,
            redb::Error::Io(error) => Self::from_io(&error),
            error @ (redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::RepairAborted
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableIsMultimap(_)
            | redb::Error::TableDoesNotExist(_)
            | redb::Error::TypeDefinitionChanged { .. }) => Self::Unreadable(error.to_string()),
            error => Self::Unavailable(error.to_string()),
        }
    }
}

impl DbError {
    fn from_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Unreadable(error.to_string()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

#[derive(Debug)]
pub(super) struct StateDb {
    database: Database,
    path: PathBuf,
    /// Device and inode. They show whether the open file is still the one at the path.
    identity: (u64, u64),
    /// Chosen when the file was created. It shows whether the file contains the state in memory.
    pub(super) store_id: u64,
    header: Vec<u8>,
    position: Option<QueuePosition>,
    /// The number of each save with message hashes, and how many it has.
    hash_counts: VecDeque<(u64, usize)>,
    /// The number of the next save.
    next_save: u64,
    size_after_compaction: u64,
}

impl StateDb {
    /// Opens or creates the file, and reads its state. `None` if the file is new.
    pub(super) fn open(path: &Path, limits: &Limits) -> Result<(Self, Option<Restored>), DbError> {
        catch_redb_panic(|| {
            // Opening the file may change its time.
            let saved_at = fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
            let mut file = Self::open_file(path)?;
            let restored = file.load(limits)?.map(|restored| Restored { saved_at, ..restored });
            Ok((file, restored))
        })
    }

    /// Opens the file again. If it contains a state, that must be an older version of the one in memory.
    pub(super) fn reopen(path: &Path, store_id: u64) -> Result<Self, DbError> {
        catch_redb_panic(|| {
            let mut file = Self::open_file(path)?;
            let read = file.database.begin_read()?;
            if read.list_tables()?.next().is_some()
                && meta(&read, KEY_STORE_ID)?.as_deref() != Some(&store_id.to_le_bytes())
            {
                return Err(DbError::Unreadable("the file contains another state".to_owned()));
            }
            file.store_id = store_id;
            Ok(file)
        })
    }

    fn open_file(path: &Path) -> Result<Self, DbError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(|error| DbError::from_io(&error))?;
        let metadata = file.metadata().map_err(|error| DbError::from_io(&error))?;
        if !metadata.is_file() {
            return Err(DbError::Unavailable("not a regular file".to_owned()));
        }
        let is_new = metadata.len() == 0;
        let truncatable = file.try_clone().map_err(|error| DbError::from_io(&error))?;
        let database = Self::database(file);
        if is_new && matches!(database, Err(DbError::Unreadable(_) | DbError::Unavailable(_))) {
            // Truncates the file again, because an empty file counts as new. If that fails, the next attempt moves it
            // aside.
            let _ = truncatable.set_len(0);
        }
        let database = database?;
        Ok(Self {
            database,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            store_id: fastrand::u64(..),
            header: Vec::new(),
            position: None,
            hash_counts: VecDeque::new(),
            next_save: 0,
            size_after_compaction: metadata.len(),
        })
    }

    fn database(file: fs::File) -> Result<Database, DbError> {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        Ok(builder.create_with_backend(FileBackend::new(file)?)?)
    }

    fn load(&mut self, limits: &Limits) -> Result<Option<Restored>, DbError> {
        let read = self.database.begin_read()?;
        if read.list_tables()?.next().is_none() {
            return Ok(None);
        }
        match meta(&read, KEY_FORMAT)? {
            Some(format) if *format == FORMAT.to_le_bytes() => {}
            Some(format) if format.len() == 4 => {
                return Err(DbError::Unreadable("unsupported format version".to_owned()));
            }
            _ => return Err(DbError::Unreadable("not a state file".to_owned())),
        }
        let missing = || DbError::Unreadable("the state is incomplete".to_owned());
        let store_id = meta(&read, KEY_STORE_ID)?.ok_or_else(missing)?;
        self.store_id = u64::from_le_bytes(store_id.as_slice().try_into().map_err(|_| missing())?);
        self.header = meta(&read, KEY_HEADER)?.ok_or_else(missing)?;
        let position = meta(&read, KEY_POSITION)?.and_then(|bytes| decode_position(&bytes));
        let state = restore(&read, limits, &self.header)?;
        self.position.clone_from(&position);
        let message_hashes = self.load_message_hashes(&read)?;
        Ok(Some(Restored { state, message_hashes, position, is_new: false, saved_at: None }))
    }

    fn load_message_hashes(&mut self, read: &ReadTransaction) -> Result<Vec<u64>, DbError> {
        let mut hashes = Vec::new();
        for entry in read.open_table(MESSAGE_HASHES)?.iter()? {
            let (number, bytes) = entry?;
            let bytes = bytes.value();
            self.hash_counts.push_back((number.value(), bytes.len() / HASH_LEN));
            self.next_save = number.value() + 1;
            hashes.extend(bytes.as_chunks().0.iter().map(|hash| u64::from_le_bytes(*hash)));
        }
        Ok(hashes)
    }

    /// Writes a save in one transaction. When this returns `Ok`, it is on disk.
    pub(super) fn commit(&mut self, save: &Save, hashes_to_keep: usize) -> Result<(), DbError> {
        catch_redb_panic(|| {
            self.ensure_not_replaced()?;
            let write = self.database.begin_write()?;
            if save.delta.is_full {
                for table in [WORKERS, TASK_SERIES, TASKS] {
                    write.delete_table(table)?;
                }
            }
            self.commit_meta(&write, save)?;
            put(&write, WORKERS, &save.delta.workers)?;
            put(&write, TASK_SERIES, &save.delta.task_series)?;
            put(&write, TASKS, &save.delta.tasks)?;
            let hash_counts = self.commit_message_hashes(&write, save, hashes_to_keep)?;
            write.commit()?;
            self.hash_counts = hash_counts;
            self.next_save += 1;
            self.header.clone_from(&save.delta.header);
            self.position.clone_from(&save.position);
            Ok(())
        })
    }

    fn commit_meta(&self, write: &WriteTransaction, save: &Save) -> Result<(), DbError> {
        let mut meta = write.open_table(META)?;
        if save.delta.is_full || self.header.is_empty() {
            meta.insert(KEY_FORMAT, FORMAT.to_le_bytes().as_slice())?;
            meta.insert(KEY_STORE_ID, self.store_id.to_le_bytes().as_slice())?;
        }
        if save.delta.header != self.header {
            meta.insert(KEY_HEADER, save.delta.header.as_slice())?;
        }
        match &save.position {
            position if *position == self.position => {}
            Some(position) => drop(meta.insert(KEY_POSITION, encode_position(position).as_slice())?),
            None => drop(meta.remove(KEY_POSITION)?),
        }
        Ok(())
    }

    fn commit_message_hashes(
        &self,
        write: &WriteTransaction,
        save: &Save,
        hashes_to_keep: usize,
    ) -> Result<VecDeque<(u64, usize)>, DbError> {
        if save.delta.is_full {
            write.delete_table(MESSAGE_HASHES)?;
        }
        let mut table = write.open_table(MESSAGE_HASHES)?;
        let mut hash_counts = if save.delta.is_full { VecDeque::new() } else { self.hash_counts.clone() };
        if !save.message_hashes.is_empty() {
            let bytes: Vec<u8> = save.message_hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
            table.insert(self.next_save, bytes.as_slice())?;
            hash_counts.push_back((self.next_save, save.message_hashes.len()));
        }
        let mut kept: usize = hash_counts.iter().map(|(_, count)| count).sum();
        while let Some((number, count)) = hash_counts.front().copied()
            && kept - count >= hashes_to_keep
        {
            kept -= count;
            hash_counts.pop_front();
            table.remove(number)?;
        }
        Ok(hash_counts)
    }

    /// A file that was removed or replaced can still be written to while it is open, but the data is lost.
    fn ensure_not_replaced(&self) -> Result<(), DbError> {
        let metadata = fs::metadata(&self.path).map_err(|error| DbError::Unavailable(error.to_string()))?;
        if (metadata.dev(), metadata.ino()) == self.identity {
            Ok(())
        } else {
            Err(DbError::Unavailable("the file was replaced by another".to_owned()))
        }
    }

    /// Shrinks the file once it exceeds twice its size after the last compaction plus 16 MiB.
    pub(super) fn compact(&mut self) -> Result<(), DbError> {
        let length = fs::metadata(&self.path).map_err(|error| DbError::from_io(&error))?.len();
        if length < self.size_after_compaction.saturating_mul(2).saturating_add(MIN_COMPACTION_GROWTH) {
            return Ok(());
        }
        catch_redb_panic(|| Ok(self.database.compact()?))?;
        self.size_after_compaction = fs::metadata(&self.path).map_err(|error| DbError::from_io(&error))?.len();
        tracing::debug!(before = length, after = self.size_after_compaction, "state file compacted");
        Ok(())
    }
}

/// redb checks what it reads, and still panics on some inconsistencies.
fn catch_redb_panic<T>(work: impl FnOnce() -> Result<T, DbError>) -> Result<T, DbError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(DbError::Unreadable("database is corrupt".to_owned())))
}

fn meta(read: &ReadTransaction, key: &str) -> Result<Option<Vec<u8>>, DbError> {
    Ok(read.open_table(META)?.get(key)?.map(|value| value.value().to_vec()))
}

/// The hash, then the queue. A position without a message is empty.
fn encode_position(position: &QueuePosition) -> Vec<u8> {
    let Some(message) = position.message else { return Vec::new() };
    [message.to_le_bytes().as_slice(), position.queue.as_bytes()].concat()
}

fn decode_position(bytes: &[u8]) -> Option<QueuePosition> {
    let (message, queue) = bytes.split_first_chunk()?;
    let message = Some(u64::from_le_bytes(*message));
    Some(QueuePosition { queue: String::from_utf8_lossy(queue).into(), message })
}

fn restore(read: &ReadTransaction, limits: &Limits, header: &[u8]) -> Result<State, DbError> {
    let mut restorer = Restorer::start(limits, header)?;
    for entry in read.open_table(WORKERS)?.iter()? {
        let (key, record) = entry?;
        restorer.worker(key.value(), record.value())?;
    }
    for entry in read.open_table(TASK_SERIES)?.iter()? {
        let (key, record) = entry?;
        restorer.task_series(key.value(), record.value())?;
    }
    for entry in read.open_table(TASKS)?.iter()? {
        let (key, record) = entry?;
        restorer.task(key.value(), record.value())?;
    }
    Ok(restorer.finish())
}

impl From<Corrupt> for DbError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Unreadable(corrupt.to_string())
    }
}

/// Writes records in key order, so that each page is written once.
fn put(write: &WriteTransaction, table: TableDefinition<u32, &[u8]>, batch: &RecordBatch) -> Result<(), DbError> {
    let mut records: Vec<_> = batch.iter().collect();
    records.sort_unstable_by_key(|(key, _)| *key);
    let mut table = write.open_table(table)?;
    for (key, record) in records {
        match record {
            Some(record) => table.insert(key, record)?,
            None => table.remove(key)?,
        };
    }
    Ok(())
}

/// Renames an unreadable file, so that its content is kept. Returns the new path.
pub(super) fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "-");
    for number in 1.. {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".unreadable-{time}"));
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let moved_to = path.with_file_name(name);
        if !moved_to.try_exists()? {
            fs::rename(path, &moved_to)?;
            return Ok(moved_to);
        }
    }
    unreachable!("the range has no end")
}
