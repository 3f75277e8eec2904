//! Streaming of a generated corpus to a JSONL file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::Serialize;

use super::{Generator, Source, Split, to_row};

/// What was written for one skill, or in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Rows.
    pub samples: u64,
    /// Rows in chat form.
    pub chats: u64,
    /// Characters (ASCII, so also bytes) of text or of all turns' contents, without JSON.
    pub chars: u64,
}

/// What [`write_corpus`] wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All rows together.
    pub total: Count,
    /// By name of skill.
    pub by_skill: BTreeMap<&'static str, Count>,
}

/// Writes samples `0..samples` as one JSON row a line. The file appears whole or not at all: it is written beside `path`,
/// synced and renamed.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] where the mixture cannot be drawn from; otherwise what the file system answers.
pub fn write_corpus(
    path: &Path,
    samples: u64,
    seed: u64,
    split: Split,
    source: impl Into<Source>,
) -> io::Result<Counts> {
    let generator =
        Generator::new(source, seed, split).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".synthetic-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut out = BufWriter::with_capacity(1 << 20, builder.tempfile_in(folder)?);
    let mut counts = Counts::default();
    for index in 0..samples {
        let sample = generator.sample(index);
        serde_json::to_writer(&mut out, &to_row(&sample))?;
        out.write_all(b"\n")?;
        let chars = match &sample.messages {
            Some(turns) => turns.iter().map(|(_, content)| content.len()).sum(),
            None => sample.text.as_deref().map_or(0, str::len),
        } as u64;
        for count in [&mut counts.total, counts.by_skill.entry(sample.skill.name()).or_default()] {
            count.samples += 1;
            count.chars += chars;
            count.chats += u64::from(sample.messages.is_some());
        }
    }
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|failed| failed.error)?;
    // The rename itself must reach the disk too; folders cannot be synced everywhere.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(counts)
}
