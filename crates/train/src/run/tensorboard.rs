//! TensorBoard event files: scalars by step, written without protobuf or TensorFlow.
//!
//! Equation: record = len u64 | masked(crc32c(len)) u32 | data | masked(crc32c(data)) u32, little endian;
//!           masked(c) = rotr(c, 15) + 0xa282ead8 (mod 2^32); crc32c: Castagnoli, reflected polynomial 0x82f63b78
//! Shapes:   data is one `Event` message: 1 wall_time f64, 2 step i64, 3 file_version string, 5 summary, 7 session_log;
//!           summary = repeated 1 value { 1 tag string, 2 simple_value f32 }; session_log = { 1 status, START = 1 }
//! Source:   tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto, framework/summary.proto

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use espalier_adapters::formats::faults::Limited;

use super::RunError;

const VERSION: &str = "brain.Event:2";

/// Writes one event file into a run folder.
#[derive(Debug)]
pub struct EventWriter {
    file: Limited,
    path: PathBuf,
}

impl EventWriter {
    /// Starts `events.out.tfevents.SECS.HOST.PID` in `folder` with its version record.
    ///
    /// # Errors
    /// [`RunError::Io`] if the file cannot be created or written.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self, RunError> {
        let stem = format!("events.out.tfevents.{}.{}.{}", now().as_secs(), host(), std::process::id());
        let mut path = folder.as_ref().join(&stem);
        let mut again = 0_u32;
        let file = loop {
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => break file,
                // A second writer of this process within the same second.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && again < u32::MAX => {
                    again += 1;
                    path = folder.as_ref().join(format!("{stem}.{again}"));
                }
                Err(e) => return Err(RunError::io("create", &path, e)),
            }
        };
        let mut writer = Self { file: Limited::new(file), path };
        let mut event = Vec::new();
        put_f64(&mut event, 1, now().as_secs_f64());
        put_bytes(&mut event, 3, VERSION.as_bytes());
        writer.record(&event)?;
        Ok(writer)
    }

    /// Like [`create`](Self::create), for a run that continues after optimiser step `step`: tells TensorBoard to
    /// forget what earlier files of the folder say about later steps.
    ///
    /// # Errors
    /// [`RunError::Io`] if the file cannot be created or written.
    pub fn resume(folder: impl AsRef<Path>, step: u64) -> Result<Self, RunError> {
        let mut writer = Self::create(folder)?;
        let mut event = Vec::new();
        put_f64(&mut event, 1, now().as_secs_f64());
        put_varint(&mut event, 2, signed(step.saturating_add(1)));
        put_bytes(&mut event, 7, &[1 << 3, 1]);
        writer.record(&event)?;
        Ok(writer)
    }

    /// Writes the scalars of one step as one record. Values are stored as f32, non-finite ones included.
    ///
    /// # Errors
    /// [`RunError::Io`], for example on a full disk.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<(), RunError> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut item = Vec::with_capacity(tag.len() + 8);
            put_bytes(&mut item, 1, tag.as_bytes());
            put_key(&mut item, 2, 5);
            item.extend_from_slice(&(value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &item);
        }
        let mut event = Vec::with_capacity(summary.len() + 24);
        put_f64(&mut event, 1, now().as_secs_f64());
        put_varint(&mut event, 2, signed(step));
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn record(&mut self, data: &[u8]) -> Result<(), RunError> {
        let len = (data.len() as u64).to_le_bytes();
        let mut bytes = Vec::with_capacity(data.len() + 16);
        bytes.extend_from_slice(&len);
        bytes.extend_from_slice(&masked(crc32c(&len)).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
        let before = self.file.get().metadata().map(|m| m.len());
        self.file.write_all(&bytes).map_err(|e| {
            // A torn record would hide everything behind it from every reader.
            if let Ok(len) = before {
                let _ = self.file.get().set_len(len);
            }
            RunError::io("append to", &self.path, e)
        })
    }
}

/// One event of a file, as far as this module writes them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Event {
    /// Seconds since 1970.
    pub wall_time: f64,
    /// Optimiser step.
    pub step: i64,
    /// File version; only in the first event.
    pub file_version: Option<String>,
    /// Scalars by tag, in file order.
    pub scalars: Vec<(String, f32)>,
    /// Whether the event says that a session starts here and later steps of earlier files are void.
    pub session_start: bool,
}

/// Reads the events of a file; a record cut short at the end (a run still writing, or killed) is left out.
///
/// # Errors
/// [`RunError::Io`] if the file cannot be read; [`RunError::Event`] on a wrong checksum or a malformed message.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Event>, RunError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|e| RunError::io("read", path, e))?;
    let mut events = Vec::new();
    let mut offset = 0;
    while let Some(head) = bytes.get(offset..offset + 12) {
        let bad = |reason: &str| RunError::Event {
            path: path.to_path_buf(),
            record: events.len(),
            offset,
            reason: reason.to_owned(),
        };
        if word(head, 8) != Some(masked(crc32c(&head[..8]))) {
            return Err(bad("the checksum of the length does not match: damaged, or not an event file"));
        }
        let len = usize::try_from(long(head)).map_err(|_| bad("the record is larger than memory"))?;
        let end = (offset + 12).checked_add(len).ok_or_else(|| bad("the record is larger than memory"))?;
        let (Some(data), Some(sum)) = (bytes.get(offset + 12..end), word(&bytes, end)) else { break };
        if sum != masked(crc32c(data)) {
            return Err(bad("the checksum of the data does not match: damaged"));
        }
        let event = event(data).ok_or_else(|| bad("not an Event message"))?;
        events.push(event);
        offset = end + 4;
    }
    Ok(events)
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .or_else(|| std::env::var("COMPUTERNAME").ok())
        .unwrap_or_default();
    let name: String =
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).take(64).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

fn signed(step: u64) -> u64 {
    step.min(i64::MAX as u64)
}

// Protobuf wire format: key = field << 3 | type; types: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.

fn put_raw(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push((v & 0x7f) as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn put_key(out: &mut Vec<u8>, field: u64, kind: u64) {
    put_raw(out, field << 3 | kind);
}

fn put_varint(out: &mut Vec<u8>, field: u64, v: u64) {
    put_key(out, field, 0);
    put_raw(out, v);
}

fn put_f64(out: &mut Vec<u8>, field: u64, v: f64) {
    put_key(out, field, 1);
    out.extend_from_slice(&v.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, v: &[u8]) {
    put_key(out, field, 2);
    put_raw(out, v.len() as u64);
    out.extend_from_slice(v);
}

enum Field<'a> {
    Varint(u64),
    Eight(u64),
    Bytes(&'a [u8]),
    Four(u32),
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn long(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

fn take_raw(bytes: &mut &[u8]) -> Option<u64> {
    let mut v = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        v |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(v);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = take_raw(bytes)?;
    let value = match key & 7 {
        0 => Field::Varint(take_raw(bytes)?),
        1 => Field::Eight(long(take(bytes, 8)?)),
        2 => {
            let len = usize::try_from(take_raw(bytes)?).ok()?;
            Field::Bytes(take(bytes, len)?)
        }
        5 => Field::Four(word(take(bytes, 4)?, 0)?),
        _ => return None,
    };
    Some((key >> 3, value))
}

fn event(mut data: &[u8]) -> Option<Event> {
    let mut event = Event::default();
    while !data.is_empty() {
        match field(&mut data)? {
            (1, Field::Eight(v)) => event.wall_time = f64::from_bits(v),
            (2, Field::Varint(v)) => event.step = v as i64,
            (3, Field::Bytes(v)) => event.file_version = Some(std::str::from_utf8(v).ok()?.to_owned()),
            (5, Field::Bytes(v)) => scalars(v, &mut event.scalars)?,
            (7, Field::Bytes(v)) => event.session_start = v == [1 << 3, 1],
            _ => {}
        }
    }
    Some(event)
}

fn scalars(mut summary: &[u8], out: &mut Vec<(String, f32)>) -> Option<()> {
    while !summary.is_empty() {
        let (1, Field::Bytes(mut item)) = field(&mut summary)? else { continue };
        let (mut tag, mut value) = (String::new(), None);
        while !item.is_empty() {
            match field(&mut item)? {
                (1, Field::Bytes(v)) => tag = std::str::from_utf8(v).ok()?.to_owned(),
                (2, Field::Four(v)) => value = Some(f32::from_bits(v)),
                _ => {}
            }
        }
        out.extend(value.map(|v| (tag, v)));
    }
    Some(())
}

const TABLE: [u32; 256] = {
    let mut table = [0_u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

/// CRC-32C (Castagnoli) of `bytes`.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |c, b| c >> 8 ^ TABLE[((c ^ u32::from(*b)) & 0xff) as usize])
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn crc32c_known_values() {
        // RFC 3720, appendix B.4, and the usual check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn version_record_has_the_known_head() {
        let dir = tempfile::tempdir().unwrap();
        let writer = EventWriter::create(dir.path()).unwrap();
        let bytes = std::fs::read(writer.path()).unwrap();
        // Every event file TensorFlow ever wrote starts with these: length 24, its masked checksum, field 1 (f64).
        assert_eq!(bytes[..13], [0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22, 0x09]);
        assert_eq!(bytes[21..36], *b"\x1a\x0dbrain.Event:2");
        assert_eq!(bytes.len(), 40);
    }
}
