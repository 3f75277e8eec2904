//! Reading and writing safetensors files, with errors that name the file, the tensor and what is wrong.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::atomic;
use crate::{Error, Result};

/// A safetensors file mapped into memory, its header read once.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl MappedFile {
    /// Maps the file and checks its header against its length.
    ///
    /// # Errors
    /// If it cannot be read, is truncated, or its header is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only; a file changed by another process while it is mapped would change the values read,
        // as with any reader of a file being written, but every access is bounds-checked against the mapped length.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        // The library checks sizes and offsets against the length of the file.
        let wrong = |e| Error::format(path, describe(&map, &e));
        SafeTensors::deserialize(&map).map_err(wrong)?;
        let (length, header) = SafeTensors::read_metadata(&map).map_err(wrong)?;
        check_names(path, &map)?;
        let start = length + 8;
        let places = header.tensors().into_iter().map(|(name, info)| {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            (name, Place { dtype: info.dtype, shape: info.shape.clone(), bytes })
        });
        let places = places.collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.to_owned(), map, places, metadata })
    }

    /// Names, dtypes and shapes in name order.
    ///
    /// # Errors
    /// None any more: the header was read when the file was opened.
    pub fn entries(&self) -> Result<Vec<(String, Dtype, Vec<usize>)>> {
        Ok(self.places.iter().map(|(name, p)| (name.clone(), p.dtype, p.shape.clone())).collect())
    }

    /// The header's free metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of one tensor, with dtype and shape.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || Error::format(&self.path, format!("no tensor named `{name}`"));
        let place = self.places.get(name).ok_or_else(missing)?;
        let bytes = self.map.get(place.bytes.clone()).ok_or_else(missing)?;
        let fault = |e| Error::format(&self.path, format!("tensor `{name}`: {e}"));
        TensorView::new(place.dtype, place.shape.clone(), bytes).map_err(fault)
    }

    /// One tensor on `device`, in the file's dtype.
    ///
    /// # Errors
    /// If there is no such tensor or its dtype is not read here.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let view = self.view(name)?;
        let dtype = dtype_of(view.dtype()).ok_or_else(|| {
            Error::format(&self.path, format!("tensor `{name}` has dtype {:?}, which is not read here", view.dtype()))
        })?;
        Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), device)?)
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

/// Whether the header has every name once: of two entries the reader would take one in silence.
fn check_names(path: &Path, map: &[u8]) -> Result<()> {
    let end = map.get(..8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes) as usize;
    let header = map.get(8..end.saturating_add(8)).unwrap_or_default();
    let Names(mut names) = serde_json::from_slice(header).map_err(|e| Error::format(path, e.to_string()))?;
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::format(path, format!("tensor `{}` is twice in the header", pair[0]))),
        None => Ok(()),
    }
}

fn describe(map: &[u8], error: &safetensors::SafeTensorError) -> String {
    let length = map.len();
    let header = map.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    match header {
        None => format!("not a safetensors file: {length} bytes are too few for a header"),
        Some(n) if n.saturating_add(8) > length as u64 => {
            format!("truncated or not a safetensors file: the header should take {n} bytes, the file has {length}")
        }
        Some(_) => format!("truncated or malformed safetensors file of {length} bytes ({error})"),
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

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
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
