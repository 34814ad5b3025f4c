//! Opening a SQLite file so that it is ours, private, and survives what it must survive.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use thiserror::Error;

use super::lock::DirectoryLock;
use crate::files;

/// Which of our files this is, and its tables.
pub struct Kind {
    /// `PRAGMA application_id`: a file of another kind is refused instead of being written into.
    pub application_id: i32,
    /// `PRAGMA user_version`: another one is refused; migrations are added when there is a second one.
    pub version: i32,
    pub schema: &'static str,
    /// Read every page at start. For files that stay small.
    pub check_pages: bool,
}

/// What a commit waits for (`PRAGMA synchronous`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The kernel has it: it survives the death of the process, a power cut may take it.
    Process,
    /// The disk has it.
    Power,
}

#[derive(Debug, Error)]
pub enum OpenError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{0}: another process has it open")]
    Locked(PathBuf),
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("{path}: {what}; move the file away to start afresh")]
    Unusable { path: PathBuf, what: String },
}

/// Makes the directory private and takes its lock.
pub fn claim(directory: &Path) -> Result<DirectoryLock, OpenError> {
    let file = |source| OpenError::File { path: directory.to_owned(), source };
    files::private_directory(directory).map_err(file)?;
    DirectoryLock::acquire(directory).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked(directory.to_owned()),
        _ => file(error),
    })
}

/// Opens or creates the file; the flag says that it was created now. The caller holds the directory's lock.
pub fn open(path: &Path, kind: &Kind, durability: Durability) -> Result<(Connection, bool), OpenError> {
    let fresh = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => found.len() == 0,
        Ok(_) => return Err(OpenError::Unusable { path: path.to_owned(), what: "is not a regular file".into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files::create_private(path, b"").map_err(|source| OpenError::File { path: path.to_owned(), source })?;
            true
        }
        Err(source) => return Err(OpenError::File { path: path.to_owned(), source }),
    };
    let connection = configure(path, kind, durability, fresh)?;
    Ok((connection, fresh))
}

fn configure(path: &Path, kind: &Kind, durability: Durability, fresh: bool) -> Result<Connection, OpenError> {
    let database = |source| OpenError::Database { path: path.to_owned(), source };
    let unusable = |what: String| OpenError::Unusable { path: path.to_owned(), what };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(database)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(database)?;
    connection
        .execute_batch("PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON; PRAGMA secure_delete=ON;")
        .map_err(database)?;
    let pragma = |connection: &Connection, name| {
        connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0)).map_err(database)
    };
    // A kill between creating the file and committing its tables leaves a file that is ours and empty.
    let empty = fresh || (pragma(&connection, "user_version")? == 0 && pragma(&connection, "application_id")? == 0);
    if !empty {
        let (id, version) = (pragma(&connection, "application_id")?, pragma(&connection, "user_version")?);
        if id != kind.application_id {
            return Err(unusable("is not a file of this kind".into()));
        }
        if version != kind.version {
            return Err(unusable(format!("has version {version}, and this gate reads version {}", kind.version)));
        }
    }
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(database)?;
    if mode != "wal" {
        return Err(unusable(format!("cannot be written ahead (journal mode {mode})")));
    }
    set_durability(&connection, durability).map_err(database)?;
    if empty {
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(database)?;
        transaction.execute_batch(kind.schema).map_err(database)?;
        transaction.pragma_update(None, "application_id", kind.application_id).map_err(database)?;
        transaction.pragma_update(None, "user_version", kind.version).map_err(database)?;
        transaction.commit().map_err(database)?;
    } else if kind.check_pages {
        let found: String =
            connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).map_err(database)?;
        if found != "ok" {
            return Err(unusable(format!("is damaged: {found}")));
        }
    }
    Ok(connection)
}

/// Takes effect from the next transaction on.
pub fn set_durability(connection: &Connection, durability: Durability) -> rusqlite::Result<()> {
    let level = match durability {
        Durability::Process => "NORMAL",
        Durability::Power => "FULL",
    };
    connection.pragma_update(None, "synchronous", level)
}
