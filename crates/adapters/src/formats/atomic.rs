//! Writes that are whole or not there: a temporary file or folder beside the target, flushed to the disk, then renamed.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

thread_local! {
    static WRITE_LIMIT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `f` with every atomic write of this thread failing as a full disk after `bytes` more bytes: fault injection for
/// tests of what survives.
#[doc(hidden)]
pub fn with_write_limit<T>(bytes: u64, f: impl FnOnce() -> T) -> T {
    WRITE_LIMIT.set(Some(bytes));
    let result = f();
    WRITE_LIMIT.set(None);
    result
}

/// A file that honours the injected limit.
struct Limited(File);

impl Write for Limited {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some(left) = WRITE_LIMIT.get() else { return self.0.write(buf) };
        if left == 0 && !buf.is_empty() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let n = self.0.write(&buf[..buf.len().min(left as usize)])?;
        WRITE_LIMIT.set(Some(left - n as u64));
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
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
        let mut out = BufWriter::with_capacity(1 << 20, Limited(File::create(&temp)?));
        fill(&mut out)?;
        out.flush()?;
        out.get_ref().0.sync_all()?;
        fs::rename(&temp, path)?;
        sync_folder(&parent(path))
    };
    run().map_err(|e| {
        let _ = fs::remove_file(&temp);
        Error::io(path, e)
    })
}

/// Replaces the files called `names` in `folder` by those that `fill` writes (given the folder to write into), or leaves all
/// of them as they were; other files stay.
///
/// # Errors
/// Those of `fill`, or if a file cannot be renamed; where the disk fills up, all earlier files are whole then.
pub fn replace_files<E: From<Error>>(
    folder: &Path,
    names: &[&str],
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let temp = temporary(&folder.join("files"), "tmp");
    let io = |e| Error::io(folder, e);
    let _ = fs::remove_dir_all(&temp);
    fs::create_dir_all(&temp).map_err(io)?;
    let run = || -> Result<(), E> {
        fill(&temp)?;
        for name in names {
            fs::rename(temp.join(name), folder.join(name)).map_err(io)?;
        }
        Ok(sync_folder(folder).map_err(io)?)
    };
    let result = run();
    let _ = fs::remove_dir_all(&temp);
    result
}

/// Replaces the folder at `path` by one that `fill` fills (given the folder to write into), or leaves it as it was.
///
/// # Errors
/// Those of `fill`, or if the folder cannot be renamed; the earlier folder is whole then.
pub fn replace_folder<E: From<Error>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let temp = temporary(path, "tmp");
    let old = temporary(path, "old");
    let io = |e| Error::io(path, e);
    let _ = fs::remove_dir_all(&temp);
    fs::create_dir_all(&temp).map_err(io)?;
    let run = || -> Result<(), E> {
        fill(&temp)?;
        sync_folder(&temp).map_err(io)?;
        if path.exists() {
            let _ = fs::remove_dir_all(&old);
            fs::rename(path, &old).map_err(io)?;
        }
        if let Err(e) = fs::rename(&temp, path) {
            let _ = fs::rename(&old, path);
            return Err(io(e).into());
        }
        sync_folder(&parent(path)).map_err(io)?;
        let _ = fs::remove_dir_all(&old);
        Ok(())
    };
    run().inspect_err(|_| {
        let _ = fs::remove_dir_all(&temp);
    })
}
