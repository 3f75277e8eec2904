//! Writes that are whole or not there: a temporary file or folder beside the target, flushed to the disk, then renamed.
//!
//! Beside a target NAME a writer uses `.NAME.PID.tmp` (being written, or being removed), `.NAME.PID.old` (the earlier folder
//! while the new one takes its place) and `.files.PID.new` (a complete set of files on its way in). A writer holds a lock
//! on them, which the system lets go of when the process ends, however it ends; [`recover`] puts right what is left then.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::faults::{Limited, instant};
pub use super::faults::{measured, with_kill_before, with_move_fault, with_write_fault, with_write_limit};
use crate::{Error, Result};

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    instant()?;
    fs::rename(from, to)
}

/// Removes a file or folder; one that is not there is no error.
fn remove(path: &Path) -> io::Result<()> {
    instant()?;
    let result = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn temporary(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    parent(path).join(format!(".{name}.{}.{suffix}", std::process::id()))
}

/// Takes the lock of a temporary file or folder, held until the result is dropped; None where the system has no such locks.
fn hold(path: &Path) -> Option<File> {
    File::open(path).ok().filter(|file| file.try_lock().is_ok())
}

/// Whether the writer of a temporary file or folder still runs.
fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    // Some filesystems refuse to sync a folder; the rename itself is still atomic there.
    match File::open(path).and_then(|f| f.sync_all()) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput || e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

/// Replaces the file at `path` by what `fill` writes, or leaves it as it was.
///
/// # Errors
/// If the disk is full or the folder cannot be written; the earlier file is whole then.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let temp = temporary(path, "tmp");
    let run = || -> io::Result<()> {
        fs::create_dir_all(parent(path))?;
        let file = File::create(&temp)?;
        let _held = hold(&temp);
        let mut out = BufWriter::with_capacity(1 << 20, Limited::new(file));
        fill(&mut out)?;
        out.flush()?;
        out.get_ref().get().sync_all()?;
        rename(&temp, path)?;
        sync_folder(&parent(path))
    };
    run().map_err(|e| {
        let _ = fs::remove_file(&temp);
        Error::io(path, e)
    })
}

/// Replaces the files called `names` in `folder` by those that `fill` writes (given the folder to write into), or leaves all
/// of them as they were; other files stay. At no instant do new files lie beside old ones of the set: between the two a
/// reader finds a file missing, and what a kill leaves there [`recover`] (or the next call) completes with the new ones.
///
/// # Errors
/// Those of `fill`; where the disk fills up, all earlier files are whole then. If a file cannot be renamed, the new set waits
/// for [`recover`].
pub fn replace_files<E: From<Error>>(
    folder: &Path,
    names: &[&str],
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let temp = temporary(&folder.join(SET), "tmp");
    let ready = temporary(&folder.join(SET), "new");
    let io = |e| Error::io(folder, e);
    recover_of(folder, Some(SET))?;
    let _ = fs::remove_dir_all(&temp);
    fs::create_dir_all(&temp).map_err(io)?;
    let _held = hold(&temp);
    let run = || -> Result<(), E> {
        fill(&temp)?;
        if let Some(name) = names.iter().find(|name| !temp.join(name).is_file()) {
            return Err(Error::format(folder.join(name), "was not written").into());
        }
        sync_folder(&temp).map_err(io)?;
        // From here on the new files count.
        Ok(rename(&temp, &ready).map_err(io)?)
    };
    run().inspect_err(|_| {
        let _ = fs::remove_dir_all(&temp);
    })?;
    Ok(move_in(&ready, folder).map_err(io)?)
}

/// Name of the temporary folder of a set of files.
const SET: &str = "files";

/// Moves the files of a complete set into `folder`, the ones they replace removed before the first of them appears.
fn move_in(ready: &Path, folder: &Path) -> io::Result<()> {
    let mut names = fs::read_dir(ready)?.map(|e| Ok(e?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in &names {
        remove(&folder.join(name))?;
    }
    for name in &names {
        rename(&ready.join(name), &folder.join(name))?;
    }
    sync_folder(folder)?;
    remove(ready)
}

/// Replaces the folder at `path` by one that `fill` fills (given the folder to write into), or leaves it as it was. A kill
/// between the two renames leaves the earlier folder beside the target, where [`recover`] (or the next call) finds it.
///
/// # Errors
/// Those of `fill`, or if the folder cannot be renamed; the earlier folder is whole then.
pub fn replace_folder<E: From<Error>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let temp = temporary(path, "tmp");
    let old = temporary(path, "old");
    let io = |e| Error::io(path, e);
    recover_of(&parent(path), path.file_name().and_then(|n| n.to_str()))?;
    let _ = fs::remove_dir_all(&temp);
    fs::create_dir_all(&temp).map_err(io)?;
    let _held = hold(&temp);
    let run = || -> Result<(), E> {
        fill(&temp)?;
        sync_folder(&temp).map_err(io)?;
        let replaced = path.exists();
        let _held = hold(path);
        if replaced {
            rename(path, &old).map_err(io)?;
        }
        if let Err(e) = rename(&temp, path) {
            let _ = fs::rename(&old, path);
            return Err(io(e).into());
        }
        sync_folder(&parent(path)).map_err(io)?;
        if replaced {
            // Half of a folder must not look like a whole earlier one.
            rename(&old, &temp).and_then(|()| remove(&temp)).map_err(io)?;
        }
        Ok(())
    };
    run().inspect_err(|_| {
        let _ = fs::remove_dir_all(&temp);
    })
}

/// Removes the folder at `path`; a kill leaves it whole, or a leftover that [`recover`] removes.
///
/// # Errors
/// If it cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<()> {
    let temp = temporary(path, "tmp");
    let _ = fs::remove_dir_all(&temp);
    rename(path, &temp).and_then(|()| remove(&temp)).map_err(|e| Error::io(path, e))
}

/// What [`recover`] found of killed writers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Earlier folders put back in the place from which they had been moved.
    pub restored: Vec<PathBuf>,
    /// Folders into which a complete set of new files was moved.
    pub completed: Vec<PathBuf>,
    /// Leftovers removed: writes that had not come to their end, and folders that had been replaced.
    pub removed: Vec<PathBuf>,
}

impl Recovered {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.restored.is_empty() && self.completed.is_empty() && self.removed.is_empty()
    }
}

/// Puts right what killed writers left directly in `folder`: an earlier folder whose successor had not taken its place goes
/// back, a complete set of files is moved in, everything else is removed. What a running process writes is let alone; a
/// folder that is not there holds nothing.
///
/// # Errors
/// If the folder cannot be read, or a leftover cannot be renamed or removed.
pub fn recover(folder: &Path) -> Result<Recovered> {
    recover_of(folder, None)
}

/// NAME and kind of `.NAME.PID.KIND`.
fn leftover(file_name: &str) -> Option<(&str, &str)> {
    let (rest, kind) = file_name.strip_prefix('.')?.rsplit_once('.')?;
    let (name, pid) = rest.rsplit_once('.')?;
    let is_pid = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
    (is_pid && !name.is_empty() && ["tmp", "old", "new"].contains(&kind)).then_some((name, kind))
}

/// [`recover`], of one NAME only where it is given: for folders in which other programs keep files too.
///
/// # Errors
/// As [`recover`].
pub fn recover_of(folder: &Path, only: Option<&str>) -> Result<Recovered> {
    let io = |e| Error::io(folder, e);
    let mut found = Recovered::default();
    let entries = match fs::read_dir(folder) {
        Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(found),
        other => other.map_err(io)?,
    };
    let mut left = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let file_name = entry.file_name();
        let Some((name, kind)) = file_name.to_str().and_then(leftover) else { continue };
        if only.is_none_or(|only| only == name) && !is_held(&entry.path()) {
            let age = entry.metadata().and_then(|m| m.modified()).ok();
            left.push((age, name.to_owned(), kind.to_owned(), entry.path()));
        }
    }
    // The newest first: of several earlier folders it is the one to put back.
    left.sort_by(|a, b| b.cmp(a));
    for (_, name, kind, path) in left {
        let target = folder.join(&name);
        if kind == "old" && target.symlink_metadata().is_err() {
            rename(&path, &target).map_err(io)?;
            found.restored.push(target);
        } else if kind == "new" && name == SET && path.is_dir() {
            move_in(&path, folder).map_err(io)?;
            found.completed.push(folder.to_owned());
        } else {
            remove(&path).map_err(io)?;
            found.removed.push(path);
        }
    }
    if !found.is_empty() {
        sync_folder(folder).map_err(io)?;
    }
    Ok(found)
}
