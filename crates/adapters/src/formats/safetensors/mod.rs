//! Reading and writing safetensors files, with errors that name the file, the tensor and what is wrong.
//!
//! Values are read through a map of a megabyte at a time, so that what is in memory is what was asked for and not the
//! pages of the file beside it.

mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

pub use write::{Entry, Head, Sink, bytes_of, write, write_by};

use crate::{Error, Result};

/// Bytes of a file that are mapped at once.
const WINDOW: usize = 1 << 20;

/// A safetensors file, its header read once; values are mapped while they are read.
#[derive(Debug)]
pub struct MappedFile {
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
        drop(map);
        Ok(Self { path: path.to_owned(), file, places, metadata })
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

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).ok_or_else(|| Error::format(&self.path, format!("no tensor named `{name}`")))
    }

    /// Dtype and shape of one tensor, if it is there.
    pub fn entry(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.places.get(name).map(|place| (place.dtype, place.shape.as_slice()))
    }

    /// Hands the bytes of one tensor to `take`, a window after the other; windows end on whole values.
    ///
    /// # Errors
    /// If there is no such tensor, the file cannot be read any more, or `take` fails.
    pub fn windows(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.bytes(self.place(name)?.bytes.clone(), take)
    }

    fn bytes(&self, range: Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let length = self.file.metadata().map_err(|e| Error::io(&self.path, e))?.len();
        if range.end as u64 > length {
            return Err(Error::format(&self.path, format!("the file was cut to {length} bytes while it was read")));
        }
        for start in range.clone().step_by(WINDOW) {
            let mut options = MmapOptions::new();
            let options = options.offset(start as u64).len(WINDOW.min(range.end - start));
            // SAFETY: as in `open`; the window lies within the file, whose length was just asked for.
            let map = unsafe { options.map(&self.file) }.map_err(|e| Error::io(&self.path, e))?;
            take(&map)?;
        }
        Ok(())
    }

    /// One tensor on `device`, in the file's dtype.
    ///
    /// # Errors
    /// If there is no such tensor or its dtype is not read here.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let place = self.place(name)?;
        self.values(name, place, place.bytes.clone(), &place.shape, device)
    }

    /// Rows `rows` (of the first dimension) of one tensor on `device`, in the file's dtype.
    ///
    /// # Errors
    /// As [`Self::load`], and if the tensor has no such rows.
    pub fn load_rows(&self, name: &str, rows: Range<usize>, device: &Device) -> Result<Tensor> {
        let place = self.place(name)?;
        let mut shape = place.shape.clone();
        match shape.first_mut() {
            Some(first) if rows.start <= rows.end && rows.end <= *first => {
                let row = place.bytes.len() / (*first).max(1);
                *first = rows.len();
                let start = place.bytes.start;
                self.values(name, place, start + rows.start * row..start + rows.end * row, &shape, device)
            }
            _ => Err(Error::format(&self.path, format!("tensor `{name}` {:?} has no rows {rows:?}", place.shape))),
        }
    }

    fn values(
        &self,
        name: &str,
        place: &Place,
        bytes: Range<usize>,
        shape: &[usize],
        device: &Device,
    ) -> Result<Tensor> {
        let dtype = dtype_of(place.dtype).ok_or_else(|| {
            Error::format(&self.path, format!("tensor `{name}` has dtype {:?}, which is not read here", place.dtype))
        })?;
        match dtype {
            DType::F64 => self.read(bytes, shape, device, f64::from_le_bytes),
            DType::F32 => self.read(bytes, shape, device, f32::from_le_bytes),
            DType::F16 => self.read(bytes, shape, device, f16::from_le_bytes),
            DType::BF16 => self.read(bytes, shape, device, bf16::from_le_bytes),
            DType::I64 => self.read(bytes, shape, device, i64::from_le_bytes),
            DType::U32 => self.read(bytes, shape, device, u32::from_le_bytes),
            _ => self.read(bytes, shape, device, |[byte]: [u8; 1]| byte),
        }
    }

    fn read<T: WithDType, const N: usize>(
        &self,
        bytes: Range<usize>,
        shape: &[usize],
        device: &Device,
        value: fn([u8; N]) -> T,
    ) -> Result<Tensor> {
        let mut values: Vec<T> = Vec::with_capacity(bytes.len() / N);
        self.bytes(bytes, &mut |window| {
            values.extend(window.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)));
            Ok(())
        })?;
        Ok(Tensor::from_vec(values, shape, device)?)
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
