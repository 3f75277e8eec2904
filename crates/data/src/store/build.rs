//! Building a token store: one pass over the source, rows encoded in parallel and stored in the order of the data.
//!
//! The cache key is SHA-256 over the format version, tokenizer, template, options and the bytes of the data: with the same
//! key the same bytes come out, whatever the number of threads.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::answers::Answers;
use super::write::Writer;
use super::{MARK, TokenStore};
use crate::encode::{Example, TextCodec};
use crate::error::{DataError, Location, Result, RowError};
use crate::row::Row;
use crate::source::Source;

/// Refusals that a report quotes.
const QUOTED: usize = 5;
/// Rows, and bytes of text, that are encoded together.
const CHUNK_ROWS: usize = 1024;
const CHUNK_BYTES: usize = 8 << 20;

/// Raised whenever rows become other tokens or labels than before, so that stores of earlier releases are not used again.
const ENCODING: u32 = 3;

/// The key of what `source` becomes with `codec`: 64 hexadecimal digits.
pub fn cache_key(source: &Source, codec: &TextCodec) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(MARK);
    hash.update(ENCODING.to_le_bytes());
    let options = serde_json::to_vec(source.options()).unwrap_or_default();
    let [tokenizer, template, rest] = codec.fingerprint();
    for part in [&tokenizer, &template, &rest, &options] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(source.fingerprint()?);
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

impl TokenStore {
    /// Encodes every row of `source`. With a cache folder, the result lies there under its key and is opened next time.
    ///
    /// The first bad row is an error unless the source's options pass over bad rows; rows with nothing to train are counted
    /// either way. No usable row at all is an error.
    pub fn build(source: &Source, codec: &TextCodec, cache: Option<&Path>) -> Result<Self> {
        Self::build_with(source, codec, cache, |_| ())
    }

    /// [`TokenStore::build`], telling after each chunk how many rows have been read.
    pub fn build_with(
        source: &Source,
        codec: &TextCodec,
        cache: Option<&Path>,
        mut progress: impl FnMut(u64),
    ) -> Result<Self> {
        let key = cache_key(source, codec)?;
        let path = cache.map(|folder| folder.join(format!("{key}.tokens")));
        if let Some(path) = path.as_ref().filter(|path| path.is_file()) {
            match Self::open(path) {
                Ok(store) if store.key() == key => return Ok(store),
                // Damaged: made anew and replaced.
                Ok(_) | Err(DataError::Store { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut writer = Writer::new(path, key)?;
        let skip = source.options().skip_bad_rows;
        let mut rows = source.rows();
        let mut chunk: Vec<(Location, std::result::Result<Row, RowError>)> = Vec::new();
        let mut bytes = 0;
        let mut appends_end = false;
        let mut answers = Answers::default();
        loop {
            let row = rows.next();
            let ended = row.is_none();
            match row {
                Some(Ok((location, row))) => {
                    bytes += row.weight();
                    appends_end |= matches!(row, Row::Text { .. } | Row::PromptCompletion { .. });
                    chunk.push((location, Ok(row)));
                }
                Some(Err(DataError::Row { location, problem })) => chunk.push((location, Err(problem))),
                // Rows before the fault may have faults of their own, which come first.
                Some(Err(error)) => {
                    write_chunk(&mut writer, codec, &chunk, skip, &mut answers)?;
                    return Err(error);
                }
                None => {}
            }
            if ended || chunk.len() >= CHUNK_ROWS || bytes >= CHUNK_BYTES {
                write_chunk(&mut writer, codec, &chunk, skip, &mut answers)?;
                progress(writer.report.rows);
                chunk.clear();
                bytes = 0;
            }
            if ended {
                break;
            }
        }
        if appends_end && codec.options().add_eos && codec.eos_id().is_none() {
            let note = "no end-of-sequence token is known, so none was appended to the texts";
            writer.report.notes.push(note.into());
        }
        writer.report.cut_answers = answers.cut;
        writer.report.last_turn_only = answers.last_turn_only;
        writer.report.notes.extend(answers.notes(codec));
        if writer.report.used == 0 {
            let names: Vec<String> = source.files().map(|file| file.display().to_string()).collect();
            let mut refused: Vec<String> =
                writer.report.refused.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
            refused.extend(writer.report.first_errors.first().map(|first| format!("first: {first}")));
            return Err(DataError::Empty {
                source_name: names.join(", "),
                rows: writer.report.rows,
                refused: if refused.is_empty() { "none".into() } else { refused.join(", ") },
            });
        }
        writer.finish()
    }
}

fn write_chunk(
    writer: &mut Writer,
    codec: &TextCodec,
    chunk: &[(Location, std::result::Result<Row, RowError>)],
    skip: bool,
    answers: &mut Answers,
) -> Result<()> {
    for ((location, row), outcome) in chunk.iter().zip(encode_all(codec, chunk)) {
        writer.report.rows += 1;
        match outcome {
            Ok(example) => {
                if let Ok(row) = row {
                    answers.count(codec, location, row, &example)?;
                }
                writer.add(location, &example)?;
            }
            Err(problem) if skip || problem.is_refusal() => {
                *writer.report.refused.entry(problem.reason().to_string()).or_insert(0) += 1;
                if writer.report.first_errors.len() < QUOTED {
                    writer.report.first_errors.push(format!("{location}: {problem}"));
                }
            }
            Err(problem) => return Err(DataError::Row { location: location.clone(), problem }),
        }
    }
    Ok(())
}

/// Encodes the rows of a chunk on all cores; the outcomes are in the order of the rows.
fn encode_all(
    codec: &TextCodec,
    chunk: &[(Location, std::result::Result<Row, RowError>)],
) -> Vec<std::result::Result<Example, RowError>> {
    let encode = |part: &[(Location, std::result::Result<Row, RowError>)]| -> Vec<_> {
        part.iter().map(|(_, row)| row.as_ref().map_err(Clone::clone).and_then(|row| codec.encode(row))).collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(chunk.len().div_ceil(16));
    if threads < 2 {
        return encode(chunk);
    }
    std::thread::scope(|scope| {
        let parts: Vec<_> =
            chunk.chunks(chunk.len().div_ceil(threads)).map(|part| (part, scope.spawn(move || encode(part)))).collect();
        // A thread that could not finish has its part done here.
        parts.into_iter().flat_map(|(part, handle)| handle.join().unwrap_or_else(|_| encode(part))).collect()
    })
}
