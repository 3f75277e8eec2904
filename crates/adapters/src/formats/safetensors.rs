//! Reading and writing safetensors files, with errors that name the file, the tensor and what is wrong.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, WithDType};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::atomic;
use crate::{Error, Result};

/// A safetensors file, its header read once. Tensors are read when they are asked for, by the handle that read the header: a
/// file that another process cuts off meanwhile is an error, and one that takes its name is not read.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<u64>,
}

/// Longest header that is read.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes that are read at once.
const PIECE: usize = 1 << 18;

impl TensorFile {
    /// Opens the file and checks its header against its length.
    ///
    /// # Errors
    /// If it cannot be read, is truncated, or its header is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length < 8 {
            return Err(Error::format(
                path,
                format!("not a safetensors file: {length} bytes are too few for a header"),
            ));
        }
        let mut head = [0; 8];
        read_at(&file, &mut head, 0).map_err(io)?;
        let size = u64::from_le_bytes(head);
        let start = size.saturating_add(8);
        if start > length {
            return Err(Error::format(
                path,
                format!(
                    "truncated or not a safetensors file: the header should take {size} bytes, the file has {length}"
                ),
            ));
        }
        let wrong =
            |e: String| Error::format(path, format!("truncated or malformed safetensors file of {length} bytes ({e})"));
        if size > LONGEST_HEADER {
            return Err(wrong(format!("a header of {size} bytes")));
        }
        let mut text = vec![0; size as usize];
        read_at(&file, &mut text, 8).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        check_names(path, &text)?;
        let held = header.data_len() as u64;
        if start.checked_add(held) != Some(length) {
            return Err(wrong(format!("its tensors take {held} bytes, {} are there", length - start)));
        }
        let place = |(name, info): (String, &TensorInfo)| {
            let bytes = start + info.data_offsets.0 as u64..start + info.data_offsets.1 as u64;
            (name, Place { dtype: info.dtype, shape: info.shape.clone(), bytes })
        };
        let places = header.tensors().into_iter().map(place).collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.to_owned(), file, places, metadata })
    }

    /// Names, dtypes and shapes in name order.
    pub fn entries(&self) -> Vec<(String, Dtype, Vec<usize>)> {
        self.places.iter().map(|(name, p)| (name.clone(), p.dtype, p.shape.clone())).collect()
    }

    /// The header's free metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).ok_or_else(|| Error::format(&self.path, format!("no tensor named `{name}`")))
    }

    /// Dtype and shape of one tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn kind(&self, name: &str) -> Result<(Dtype, &[usize])> {
        self.place(name).map(|place| (place.dtype, place.shape.as_slice()))
    }

    /// Gives the bytes of one tensor to `take`, piece by piece; each piece is whole numbers of 8 bytes, the last one aside.
    ///
    /// # Errors
    /// If there is no such tensor, or the file has become shorter since it was opened.
    pub fn read(&self, name: &str, mut take: impl FnMut(&[u8])) -> Result<()> {
        let Range { start, end } = self.place(name)?.bytes;
        let mut piece = vec![0; PIECE.min((end - start) as usize)];
        let mut at = start;
        while at < end {
            let here = piece.len().min((end - at) as usize);
            let piece = &mut piece[..here];
            read_at(&self.file, piece, at).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => Error::format(
                    &self.path,
                    format!(
                        "tensor `{name}`: the file was cut off after it was opened; bytes {start} to {end} are wanted"
                    ),
                ),
                _ => Error::io(&self.path, e),
            })?;
            take(piece);
            at += here as u64;
        }
        Ok(())
    }

    /// One tensor on `device`, in the file's dtype.
    ///
    /// # Errors
    /// If there is no such tensor, its dtype is not read here, or the file has become shorter.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        fn values<T: WithDType, const N: usize>(
            file: &TensorFile,
            name: &str,
            shape: &[usize],
            device: &Device,
            from: fn([u8; N]) -> T,
        ) -> Result<Tensor> {
            let mut all = Vec::with_capacity(shape.iter().product());
            file.read(name, |piece| all.extend(piece.as_chunks().0.iter().copied().map(from)))?;
            Ok(Tensor::from_vec(all, shape, device)?)
        }
        let (dtype, shape) = self.kind(name)?;
        match dtype {
            Dtype::F64 => values(self, name, shape, device, f64::from_le_bytes),
            Dtype::F32 => values(self, name, shape, device, f32::from_le_bytes),
            Dtype::F16 => values(self, name, shape, device, half::f16::from_le_bytes),
            Dtype::BF16 => values(self, name, shape, device, half::bf16::from_le_bytes),
            Dtype::I64 => values(self, name, shape, device, i64::from_le_bytes),
            Dtype::U32 => values(self, name, shape, device, u32::from_le_bytes),
            Dtype::U8 => values(self, name, shape, device, u8::from_le_bytes),
            _ => Err(Error::format(&self.path, format!("tensor `{name}` has dtype {dtype:?}, which is not read here"))),
        }
    }

    /// All tensors on `device`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_all(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        self.places.keys().map(|name| Ok((name.clone(), self.load(name, device)?))).collect()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Fills `to` with the bytes from `offset` on, wherever other readers of the file are.
fn read_at(file: &File, to: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, to, offset);
    #[cfg(windows)]
    {
        let (mut to, mut offset) = (to, offset);
        while !to.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(file, to, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => (to, offset) = (&mut to[n..], offset + n as u64),
            }
        }
        Ok(())
    }
}

/// Whether the header has every name once: of two entries the reader would take one in silence.
fn check_names(path: &Path, header: &[u8]) -> Result<()> {
    let Names(mut names) = serde_json::from_slice(header).map_err(|e| Error::format(path, e.to_string()))?;
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::format(path, format!("tensor `{}` is twice in the header", pair[0]))),
        None => Ok(()),
    }
}

/// All keys of a JSON object, repeated ones too.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Names;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a header object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Names, M::Error> {
                let mut names = Vec::new();
                while let Some((name, IgnoredAny)) = map.next_entry()? {
                    names.push(name);
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

fn file_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::U32 => Dtype::U32,
        DType::U8 => Dtype::U8,
        _ => return None,
    })
}

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

/// A tensor to be written: its header entry, and its values made when they are written, so that no more than one is in
/// memory at once.
pub struct Entry<'a> {
    /// Name in the file.
    pub name: String,
    /// Dtype in the file.
    pub dtype: DType,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// Makes the values.
    pub values: Box<dyn FnOnce() -> Result<Tensor> + 'a>,
}

impl std::fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

impl Entry<'_> {
    /// An entry for a tensor at hand.
    pub fn of(name: impl Into<String>, tensor: &Tensor) -> Entry<'static> {
        let tensor = tensor.clone();
        Entry {
            name: name.into(),
            dtype: tensor.dtype(),
            shape: tensor.dims().to_vec(),
            values: Box::new(move || Ok(tensor)),
        }
    }
}

/// Writes a safetensors file tensor by tensor, atomically. Returns the bytes written.
///
/// # Errors
/// If a tensor cannot be made, has another shape than its entry, or the file cannot be written.
pub fn write(path: &Path, mut entries: Vec<Entry<'_>>, metadata: &BTreeMap<String, String>) -> Result<u64> {
    entries.sort_by(|x, y| y.dtype.size_in_bytes().cmp(&x.dtype.size_in_bytes()).then_with(|| x.name.cmp(&y.name)));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut offset = 0u64;
    for entry in &entries {
        let dtype = file_dtype(entry.dtype).ok_or_else(|| {
            Error::unsupported(format!("writing `{}`", entry.name), "its dtype has no place in the format")
        })?;
        let size = (entry.shape.iter().product::<usize>() * entry.dtype.size_in_bytes()) as u64;
        header.insert(
            entry.name.clone(),
            serde_json::json!({"dtype": format!("{dtype:?}"), "shape": entry.shape, "data_offsets": [offset, offset + size]}),
        );
        offset += size;
    }
    let mut head = serde_json::to_vec(&header).map_err(|e| Error::format(path, e.to_string()))?;
    while head.len() % 8 != 0 {
        head.push(b' ');
    }
    let mut failure = None;
    let total = 8 + head.len() as u64 + offset;
    atomic::write(path, |out| {
        out.write_all(&(head.len() as u64).to_le_bytes())?;
        out.write_all(&head)?;
        for entry in entries {
            match values(entry) {
                Ok(bytes) => out.write_all(&bytes)?,
                Err(e) => {
                    failure = Some(e);
                    return Err(std::io::Error::other("a tensor could not be made"));
                }
            }
        }
        Ok(())
    })
    .map_err(|e| failure.unwrap_or(e))?;
    Ok(total)
}

fn values(entry: Entry<'_>) -> Result<Vec<u8>> {
    let tensor = (entry.values)()?;
    if tensor.dims() != entry.shape {
        return Err(Error::Shape { tensor: entry.name, expected: entry.shape, found: tensor.dims().to_vec() });
    }
    bytes_of(&tensor.to_dtype(entry.dtype)?)
}
