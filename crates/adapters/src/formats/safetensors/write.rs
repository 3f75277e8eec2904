//! Writing safetensors files: a header first, then the values of one tensor after the other, as they are made.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::file_dtype;
use crate::formats::atomic;
use crate::{Error, Result};

/// Values that are turned into bytes at once.
const CHUNK: usize = 1 << 16;

/// Little-endian bytes of a tensor.
///
/// # Errors
/// If its dtype has no place in the format.
pub fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    fn le<T: candle_core::WithDType, const N: usize>(t: &Tensor, f: fn(T) -> [u8; N]) -> Result<Vec<u8>> {
        Ok(t.to_vec1::<T>()?.into_iter().flat_map(f).collect())
    }
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    match tensor.dtype() {
        DType::F64 => le(&flat, f64::to_le_bytes),
        DType::F32 => le(&flat, f32::to_le_bytes),
        DType::F16 => le(&flat, half::f16::to_le_bytes),
        DType::BF16 => le(&flat, half::bf16::to_le_bytes),
        DType::I64 => le(&flat, i64::to_le_bytes),
        DType::U32 => le(&flat, u32::to_le_bytes),
        DType::U8 => Ok(flat.to_vec1::<u8>()?),
        other => Err(Error::unsupported(
            format!("writing dtype {other:?}"),
            "safetensors files here hold floats, i64, u32, u8",
        )),
    }
}

/// What the header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Name in the file.
    pub name: String,
    /// Dtype in the file.
    pub dtype: DType,
    /// Shape in the file.
    pub shape: Vec<usize>,
}

impl Head {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> u64 {
        (self.values() * self.dtype.size_in_bytes()) as u64
    }
}

/// A tensor at hand that is to be written.
#[derive(Debug)]
pub struct Entry {
    head: Head,
    tensor: Tensor,
}

impl Entry {
    /// An entry for `tensor`, in its own dtype.
    pub fn of(name: impl Into<String>, tensor: &Tensor) -> Self {
        let head = Head { name: name.into(), dtype: tensor.dtype(), shape: tensor.dims().to_vec() };
        Self { head, tensor: tensor.clone() }
    }
}

/// Takes the values of one tensor, row after row, as they are made.
pub struct Sink<'a> {
    head: &'a Head,
    out: &'a mut dyn Write,
    taken: usize,
    failure: Option<std::io::Error>,
}

impl std::fmt::Debug for Sink<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {:?}", self.taken, self.head)
    }
}

impl Sink<'_> {
    /// The next values of the tensor, in the order of the file; rounded to the file's dtype.
    ///
    /// # Errors
    /// If they cannot be written, or are more than the tensor has.
    pub fn put(&mut self, values: &Tensor) -> Result<()> {
        let flat = values.flatten_all()?;
        let count = flat.elem_count();
        if self.taken + count > self.head.values() {
            return Err(self.wrong(self.taken + count));
        }
        for start in (0..count).step_by(CHUNK) {
            let piece = flat.narrow(0, start, CHUNK.min(count - start))?;
            let bytes = bytes_of(&piece.to_dtype(self.head.dtype)?)?;
            if let Err(e) = self.out.write_all(&bytes) {
                self.failure = Some(e);
                return Err(Error::unsupported(&self.head.name, "it could not be written"));
            }
        }
        self.taken += count;
        Ok(())
    }

    fn wrong(&self, found: usize) -> Error {
        Error::Shape { tensor: self.head.name.clone(), expected: self.head.shape.clone(), found: vec![found] }
    }
}

/// Writes a safetensors file atomically: all of `entries`, by falling width of the values and then by name. Returns the bytes
/// written.
///
/// # Errors
/// If a dtype has no place in the format, or the file cannot be written.
pub fn write(path: &Path, entries: Vec<Entry>, metadata: &BTreeMap<String, String>) -> Result<u64> {
    let (heads, tensors): (Vec<Head>, Vec<Tensor>) = entries.into_iter().map(|e| (e.head, e.tensor)).unzip();
    write_by(path, &heads, metadata, &mut |i, sink| sink.put(&tensors[i]))
}

/// Writes a safetensors file atomically: the tensors of `heads`, whose values `fill` is asked for one tensor after the other, by
/// its place in `heads`. Returns the bytes written.
///
/// # Errors
/// If `fill` fails or puts another number of values than a tensor has, or the file cannot be written.
pub fn write_by(
    path: &Path,
    heads: &[Head],
    metadata: &BTreeMap<String, String>,
    fill: &mut dyn FnMut(usize, &mut Sink<'_>) -> Result<()>,
) -> Result<u64> {
    let mut order: Vec<usize> = (0..heads.len()).collect();
    let width = |i: usize| heads[i].dtype.size_in_bytes();
    order.sort_by(|x, y| width(*y).cmp(&width(*x)).then_with(|| heads[*x].name.cmp(&heads[*y].name)));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut offset = 0u64;
    for head in order.iter().map(|i| &heads[*i]) {
        let dtype = file_dtype(head.dtype).ok_or_else(|| {
            Error::unsupported(format!("writing `{}`", head.name), "its dtype has no place in the format")
        })?;
        let end = offset + head.bytes();
        header.insert(
            head.name.clone(),
            serde_json::json!({"dtype": format!("{dtype:?}"), "shape": head.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = serde_json::to_vec(&header).map_err(|e| Error::format(path, e.to_string()))?;
    while text.len() % 8 != 0 {
        text.push(b' ');
    }
    let mut failure = None;
    let total = 8 + text.len() as u64 + offset;
    atomic::write(path, |out| {
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)?;
        for i in order {
            let mut sink = Sink { head: &heads[i], out: &mut *out, taken: 0, failure: None };
            let made = fill(i, &mut sink).and_then(|()| match sink.taken == heads[i].values() {
                true => Ok(()),
                false => Err(sink.wrong(sink.taken)),
            });
            if let Some(e) = sink.failure {
                return Err(e);
            }
            if let Err(e) = made {
                failure = Some(e);
                return Err(std::io::Error::other("a tensor could not be made"));
            }
        }
        Ok(())
    })
    .map_err(|e| failure.unwrap_or(e))?;
    Ok(total)
}
