//! The file of the saved state: a redb database with a table for each kind of row.
//!
//! redb writes to pages that are not in use and then switches over, so that a commit that is cut short, at whatever
//! moment, leaves the one before.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use redb::backends::FileBackend;
use redb::{Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::{Restored, Save};
use crate::state::{Corrupt, FORMAT, Limits, Restoring, Rows, State};

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const WORKERS: TableDefinition<u32, &[u8]> = TableDefinition::new("workers");
const PAIRS: TableDefinition<u32, &[u8]> = TableDefinition::new("pairs");
const TASKS: TableDefinition<u32, &[u8]> = TableDefinition::new("tasks");
/// The hashes of the last messages, those of one save together, by the number of the save.
const RECENT: TableDefinition<u64, &[u8]> = TableDefinition::new("recent");

/// Keys of the table `meta`.
const KEY_FORMAT: &str = "format";
const KEY_LINEAGE: &str = "lineage";
const KEY_HEADER: &str = "header";
const KEY_SOURCE: &str = "source";

/// Pages kept in memory; a save touches few.
const CACHE: usize = 4 << 20;
/// A file that has not grown by so much since it was last compacted is left alone.
const WORTH_COMPACTING: u64 = 16 << 20;
const HASH: usize = size_of::<u64>();

/// Why a file cannot be read or written.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Problem {
    /// Another process has it open.
    #[error("another process has it open")]
    InUse,
    /// What is in it cannot be read.
    #[error("{0}")]
    Unreadable(String),
    /// The system's word, or redb's.
    #[error("{0}")]
    Unusable(String),
}

impl<E: Into<redb::Error>> From<E> for Problem {
    fn from(error: E) -> Self {
        match error.into() {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Self::InUse,
            redb::Error::Io(error) => Self::of(&error),
            error @ (redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::RepairAborted
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableIsMultimap(_)
            | redb::Error::TableDoesNotExist(_)
            | redb::Error::TypeDefinitionChanged { .. }) => Self::Unreadable(error.to_string()),
            error => Self::Unusable(error.to_string()),
        }
    }
}

impl Problem {
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Unreadable(error.to_string()),
            _ => Self::Unusable(error.to_string()),
        }
    }
}

#[derive(Debug)]
pub(super) struct File {
    database: Database,
    path: PathBuf,
    /// Device and inode: by these it is known when the file is gone, though it is open.
    identity: (u64, u64),
    /// Made with the file: by this a state is known as the one we hold.
    pub(super) lineage: u64,
    header: Vec<u8>,
    source: Option<Arc<str>>,
    /// Number of the save, how many hashes.
    recent: VecDeque<(u64, usize)>,
    saves: u64,
    compacted_at: u64,
}

impl File {
    /// Opens the file, or makes one, and reads what is in it. Nothing is read from a new one.
    pub(super) fn open(path: &Path, limits: &Limits) -> Result<(Self, Option<Restored>), Problem> {
        guarded(|| {
            let mut file = Self::attach(path)?;
            let restored = file.load(limits)?;
            Ok((file, restored))
        })
    }

    /// Opens the file again, whose state we hold. Whatever is in it must be of the same lineage.
    pub(super) fn open_again(path: &Path, lineage: u64) -> Result<Self, Problem> {
        guarded(|| {
            let mut file = Self::attach(path)?;
            let read = file.database.begin_read()?;
            if read.list_tables()?.next().is_some()
                && meta(&read, KEY_LINEAGE)?.as_deref() != Some(&lineage.to_le_bytes())
            {
                return Err(Problem::Unreadable("it holds another state".to_owned()));
            }
            file.lineage = lineage;
            Ok(file)
        })
    }

    fn attach(path: &Path) -> Result<Self, Problem> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(|error| Problem::of(&error))?;
        let metadata = file.metadata().map_err(|error| Problem::of(&error))?;
        if !metadata.is_file() {
            return Err(Problem::Unusable("it is not a regular file".to_owned()));
        }
        let is_new = metadata.len() == 0;
        let begun = file.try_clone().map_err(|error| Problem::of(&error))?;
        let database = Self::database(file);
        if is_new && matches!(database, Err(Problem::Unreadable(_) | Problem::Unusable(_))) {
            // There is nothing in it, and it is not to be taken for a damaged one. If this fails it will be, and set aside.
            let _ = begun.set_len(0);
        }
        let database = database?;
        Ok(Self {
            database,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            lineage: fastrand::u64(..),
            header: Vec::new(),
            source: None,
            recent: VecDeque::new(),
            saves: 0,
            compacted_at: metadata.len(),
        })
    }

    fn database(file: fs::File) -> Result<Database, Problem> {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        Ok(builder.create_with_backend(FileBackend::new(file)?)?)
    }

    fn load(&mut self, limits: &Limits) -> Result<Option<Restored>, Problem> {
        let read = self.database.begin_read()?;
        if read.list_tables()?.next().is_none() {
            return Ok(None);
        }
        match meta(&read, KEY_FORMAT)? {
            Some(format) if *format == FORMAT.to_le_bytes() => {}
            Some(format) if format.len() == 4 => {
                return Err(Problem::Unreadable("it is of another version".to_owned()));
            }
            _ => return Err(Problem::Unreadable("it is not the state of an exporter".to_owned())),
        }
        let missing = || Problem::Unreadable("it is incomplete".to_owned());
        let lineage = meta(&read, KEY_LINEAGE)?.ok_or_else(missing)?;
        self.lineage = u64::from_le_bytes(lineage.as_slice().try_into().map_err(|_| missing())?);
        self.header = meta(&read, KEY_HEADER)?.ok_or_else(missing)?;
        let source = meta(&read, KEY_SOURCE)?.map(|source| String::from_utf8_lossy(&source).into());
        let state = restore(&read, limits, &self.header)?;
        self.source.clone_from(&source);
        let recent = self.load_recent(&read)?;
        Ok(Some(Restored { state, recent, source }))
    }

    fn load_recent(&mut self, read: &ReadTransaction) -> Result<Vec<u64>, Problem> {
        let mut hashes = Vec::new();
        for row in read.open_table(RECENT)?.iter()? {
            let (number, bytes) = row?;
            let bytes = bytes.value();
            self.recent.push_back((number.value(), bytes.len() / HASH));
            self.saves = number.value() + 1;
            hashes.extend(bytes.as_chunks().0.iter().map(|hash| u64::from_le_bytes(*hash)));
        }
        Ok(hashes)
    }

    /// Writes a save, all of it or nothing. When this returns, it is on disk.
    pub(super) fn commit(&mut self, save: &Save, kept_hashes: usize) -> Result<(), Problem> {
        guarded(|| {
            self.is_in_place()?;
            let write = self.database.begin_write()?;
            if save.changes.whole {
                for table in [WORKERS, PAIRS, TASKS] {
                    write.delete_table(table)?;
                }
            }
            self.commit_meta(&write, save)?;
            put(&write, WORKERS, &save.changes.workers)?;
            put(&write, PAIRS, &save.changes.pairs)?;
            put(&write, TASKS, &save.changes.tasks)?;
            let recent = self.commit_recent(&write, save, kept_hashes)?;
            write.commit()?;
            self.recent = recent;
            self.saves += 1;
            self.header.clone_from(&save.changes.header);
            self.source.clone_from(&save.source);
            Ok(())
        })
    }

    fn commit_meta(&self, write: &WriteTransaction, save: &Save) -> Result<(), Problem> {
        let mut meta = write.open_table(META)?;
        if save.changes.whole || self.header.is_empty() {
            meta.insert(KEY_FORMAT, FORMAT.to_le_bytes().as_slice())?;
            meta.insert(KEY_LINEAGE, self.lineage.to_le_bytes().as_slice())?;
        }
        if save.changes.header != self.header {
            meta.insert(KEY_HEADER, save.changes.header.as_slice())?;
        }
        match &save.source {
            source if *source == self.source => {}
            Some(source) => drop(meta.insert(KEY_SOURCE, source.as_bytes())?),
            None => drop(meta.remove(KEY_SOURCE)?),
        }
        Ok(())
    }

    fn commit_recent(
        &self,
        write: &WriteTransaction,
        save: &Save,
        kept_hashes: usize,
    ) -> Result<VecDeque<(u64, usize)>, Problem> {
        if save.changes.whole {
            write.delete_table(RECENT)?;
        }
        let mut table = write.open_table(RECENT)?;
        let mut recent = if save.changes.whole { VecDeque::new() } else { self.recent.clone() };
        if !save.recent.is_empty() {
            let bytes: Vec<u8> = save.recent.iter().flat_map(|hash| hash.to_le_bytes()).collect();
            table.insert(self.saves, bytes.as_slice())?;
            recent.push_back((self.saves, save.recent.len()));
        }
        let mut kept: usize = recent.iter().map(|(_, count)| count).sum();
        while let Some((number, count)) = recent.front().copied()
            && kept - count >= kept_hashes
        {
            kept -= count;
            recent.pop_front();
            table.remove(number)?;
        }
        Ok(recent)
    }

    /// A file that was removed, or replaced by another, can be written to for as long as it is open: to no avail.
    fn is_in_place(&self) -> Result<(), Problem> {
        let metadata = fs::metadata(&self.path).map_err(|error| Problem::Unusable(error.to_string()))?;
        if (metadata.dev(), metadata.ino()) == self.identity {
            Ok(())
        } else {
            Err(Problem::Unusable("the file was replaced by another".to_owned()))
        }
    }

    /// Gives back what the file has grown by, if that is worth it.
    pub(super) fn compact(&mut self) -> Result<(), Problem> {
        let length = fs::metadata(&self.path).map_err(|error| Problem::of(&error))?.len();
        if length < self.compacted_at.saturating_mul(2).saturating_add(WORTH_COMPACTING) {
            return Ok(());
        }
        guarded(|| Ok(self.database.compact()?))?;
        self.compacted_at = fs::metadata(&self.path).map_err(|error| Problem::of(&error))?.len();
        tracing::debug!(before = length, after = self.compacted_at, "the saved state is compacted");
        Ok(())
    }
}

/// redb checks what it reads, and panics where it finds a contradiction nevertheless.
fn guarded<T>(work: impl FnOnce() -> Result<T, Problem>) -> Result<T, Problem> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Problem::Unreadable("the database contradicts itself".to_owned())))
}

fn meta(read: &ReadTransaction, key: &str) -> Result<Option<Vec<u8>>, Problem> {
    Ok(read.open_table(META)?.get(key)?.map(|value| value.value().to_vec()))
}

fn restore(read: &ReadTransaction, limits: &Limits, header: &[u8]) -> Result<State, Problem> {
    let mut restoring = Restoring::start(limits, header)?;
    for row in read.open_table(WORKERS)?.iter()? {
        let (number, record) = row?;
        restoring.worker(number.value(), record.value())?;
    }
    for row in read.open_table(PAIRS)?.iter()? {
        let (number, record) = row?;
        restoring.pair(number.value(), record.value())?;
    }
    for row in read.open_table(TASKS)?.iter()? {
        let (number, record) = row?;
        restoring.task(number.value(), record.value())?;
    }
    Ok(restoring.finish())
}

impl From<Corrupt> for Problem {
    fn from(corrupt: Corrupt) -> Self {
        Self::Unreadable(corrupt.to_string())
    }
}

/// In the order of their numbers, so that a page is touched once.
fn put(write: &WriteTransaction, table: TableDefinition<u32, &[u8]>, rows: &Rows) -> Result<(), Problem> {
    let mut rows: Vec<_> = rows.iter().collect();
    rows.sort_unstable_by_key(|(number, _)| *number);
    let mut table = write.open_table(table)?;
    for (number, record) in rows {
        match record {
            Some(record) => table.insert(number, record)?,
            None => table.remove(number)?,
        };
    }
    Ok(())
}

/// Renames an unreadable file, so that nothing is lost by starting anew. Returns its new name.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "-");
    for number in 1.. {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".unreadable-{time}"));
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let aside = path.with_file_name(name);
        if !aside.try_exists()? {
            fs::rename(path, &aside)?;
            return Ok(aside);
        }
    }
    unreachable!("there is no end to the numbers")
}
