//! The weight files of a model, tensor by tensor and row by row: the base's values, from memory or from its own files, with
//! everything that acts on them written in.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::formats::atomic;
use espalier_adapters::formats::piecewise::Piecewise;
use espalier_adapters::formats::safetensors::{self, Head, Sink};
use espalier_adapters::{Dense, Embedding, Host, Linear, ModuleMut, written};
use serde_json::json;

use crate::Result;
use crate::claim::MARK;
use crate::export::{ExportOptions, Exported};
use crate::freed::give_back;
use crate::streamed::{Reader, Store, kept};
use crate::transformer::Model;

/// Which tensor of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Weight,
    Bias,
    /// The output head of a tied model that is its table no longer.
    Head,
}

/// A tensor of the files, and where it comes from.
#[derive(Debug)]
struct Slot {
    path: String,
    part: Part,
}

/// Writes the weights of a model.
pub(crate) struct Writer<'a> {
    pub(crate) model: &'a mut Model,
    /// The base's files, where its weights are not in memory.
    pub(crate) store: Option<&'a mut Store>,
    /// What acts on it, where that is not in the slots already.
    pub(crate) adapters: Option<&'a Piecewise>,
}

/// Whether a table's head is another than the table once everything is written in.
pub(crate) fn parts_from_head(table: &Embedding) -> bool {
    table.head().kept().is_some() || table.is_changed() && !table.change_reaches_head()
}

impl Writer<'_> {
    /// Puts what acts on the module at `path` into its slot.
    fn ready(&mut self, path: &str) -> Result<()> {
        let Some(adapters) = self.adapters.filter(|a| !a.is_empty()) else { return Ok(()) };
        let wanted = |p: &str| p == path;
        match self.store.as_deref_mut().filter(|_| adapters.needs_base()) {
            None => adapters.act(self.model, &wanted, &Device::Cpu)?,
            Some(store) => {
                store.fill(self.model, &wanted, &Device::Cpu)?;
                adapters.act(self.model, &wanted, &Device::Cpu)?;
                store.empty(self.model, &wanted)?;
            }
        }
        Ok(())
    }

    /// Whether a tied architecture is written with a head of its own.
    pub(crate) fn unties(&mut self, options: &ExportOptions) -> Result<bool> {
        let Some(table) = self.model.tied_table() else { return Ok(false) };
        self.ready(&table)?;
        Ok(options.untie || parts_from_head(&self.model.embed))
    }

    /// All tensors of the files in model order.
    fn list(&mut self, dtype: DType, unties: bool) -> Result<Vec<(Head, Slot)>> {
        let mut all = Vec::new();
        self.model.walk(&mut |module| {
            let path = module.path().to_owned();
            let mut add = |part: Part, shape: &[usize]| {
                let name = format!("{path}.{}", if part == Part::Bias { "bias" } else { "weight" });
                all.push((Head { name, dtype, shape: shape.to_vec() }, Slot { path: path.clone(), part }));
            };
            let bias = match &module {
                ModuleMut::Linear(linear) => {
                    let (d_out, d_in) = linear.base().dims();
                    add(Part::Weight, &if linear.transposed_on_disk() { [d_in, d_out] } else { [d_out, d_in] });
                    linear.bias()
                }
                ModuleMut::Norm(norm) => {
                    add(Part::Weight, norm.weight().frozen().dims());
                    norm.bias()
                }
                ModuleMut::Embedding(table) => {
                    add(Part::Weight, table.weight().frozen().dims());
                    None
                }
            };
            if let Some(bias) = bias {
                add(Part::Bias, bias.frozen().dims());
            }
            Ok(())
        })?;
        if unties {
            let (name, table) = (format!("{}.weight", self.model.config.names.head), &self.model.embed);
            let shape = table.weight().frozen().dims().to_vec();
            all.push((Head { name, dtype, shape }, Slot { path: table.path().to_owned(), part: Part::Head }));
        }
        Ok(all)
    }

    /// Writes the weight files into `folder`.
    pub(crate) fn write(&mut self, folder: &Path, options: &ExportOptions) -> Result<Exported> {
        let unties = self.unties(options)?;
        let mut shards: Vec<Vec<(Head, Slot)>> = vec![Vec::new()];
        let mut filled = 0u64;
        for (head, slot) in self.list(options.dtype.unwrap_or(self.model.dtype), unties)? {
            let bytes = head.bytes();
            if filled > 0 && filled + bytes > options.shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push((head, slot));
            }
        }
        let files = shards.len();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), (MARK.to_owned(), "model".to_owned())]);
        let mut written = Exported { tensors: 0, files, bytes: 0, unties };
        let mut map = serde_json::Map::new();
        let mut total = 0u64;
        let mut ready: Option<String> = None;
        for (i, shard) in shards.into_iter().enumerate() {
            let name = if files == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{files:05}.safetensors", i + 1)
            };
            let (heads, slots): (Vec<Head>, Vec<Slot>) = shard.into_iter().unzip();
            for head in &heads {
                map.insert(head.name.clone(), name.clone().into());
                total += head.bytes();
            }
            written.tensors += heads.len();
            let mut failure = None;
            let result = safetensors::write_by(&folder.join(&name), &heads, &metadata, &mut |i, sink| {
                let slot = &slots[i];
                let mut put = || {
                    if ready.as_ref() != Some(&slot.path) {
                        // What the last module took is not kept beside what this one takes.
                        if let Some(adapters) = self.adapters {
                            adapters.rest(self.model)?;
                        }
                        give_back();
                        self.ready(&slot.path)?;
                        ready = Some(slot.path.clone());
                    }
                    self.put(slot, sink)
                };
                put().map_err(|e| kept(&mut failure, e))
            });
            written.bytes += match failure {
                Some(e) => return Err(e),
                None => result?,
            };
        }
        if let Some(adapters) = self.adapters {
            adapters.rest(self.model)?;
        }
        if files > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            atomic::write(&folder.join("model.safetensors.index.json"), |out| writeln!(out, "{index:#}"))?;
        }
        Ok(written)
    }

    /// Puts the values of one tensor.
    fn put(&mut self, slot: &Slot, sink: &mut Sink<'_>) -> Result<()> {
        let (mut failure, mut store) = (None, self.store.as_deref_mut());
        let dtype = self.model.dtype;
        let walked = self.model.walk(&mut |module| {
            if module.path() != slot.path {
                return Ok(());
            }
            let done = match (module, slot.part) {
                (ModuleMut::Linear(linear), Part::Weight) => matrix(linear, store.as_deref_mut(), dtype, sink),
                (ModuleMut::Linear(linear), _) => small(linear.bias(), &slot.path, "bias", store.as_deref_mut(), sink),
                (ModuleMut::Norm(norm), Part::Weight) => {
                    small(Some(norm.weight()), &slot.path, "weight", store.as_deref_mut(), sink)
                }
                (ModuleMut::Norm(norm), _) => small(norm.bias(), &slot.path, "bias", store.as_deref_mut(), sink),
                (ModuleMut::Embedding(table), part) => rows(table, part, store.as_deref_mut(), sink),
            };
            done.map_err(|e| kept(&mut failure, e))
        });
        match failure {
            Some(e) => Err(e),
            None => Ok(walked?),
        }
    }
}

/// A norm's gain or a bias.
fn small(dense: Option<&Dense>, path: &str, part: &str, store: Option<&mut Store>, sink: &mut Sink<'_>) -> Result<()> {
    let Some(dense) = dense else { return Ok(()) };
    let stored = match (dense.trained(), store) {
        (None, Some(store)) => store.small(&format!("{path}.{part}"))?,
        _ => None,
    };
    let values = stored.unwrap_or_else(|| dense.get().detach()).to_dtype(dense.frozen().dtype())?;
    Ok(sink.put(&values)?)
}

/// The weight of a map, row by row; one that files keep as [d_in, d_out] is put together in memory first.
fn matrix(linear: &Linear, store: Option<&mut Store>, dtype: DType, sink: &mut Sink<'_>) -> Result<()> {
    let mut failure = None;
    let mut base = source(store, &format!("{}.weight", linear.path()))?;
    let mut own = |run: std::ops::Range<usize>| match &mut base {
        Some((store, reader)) => store.rows(reader, run).map_err(|e| kept(&mut failure, e)),
        None => Ok(linear.base().rows(run)?),
    };
    let done = if linear.transposed_on_disk() {
        let (d_out, d_in) = linear.base().dims();
        let mut turned = vec![0f32; d_out * d_in];
        let all = written::linear(linear, &mut own, dtype, &mut |run, rows| {
            let columns = rows.to_dtype(DType::F32)?.t()?.contiguous()?.to_vec2::<f32>()?;
            for (place, values) in turned.chunks_mut(d_out).zip(&columns) {
                place[run.clone()].copy_from_slice(values);
            }
            Ok(())
        });
        all.and_then(|()| sink.put(&Tensor::from_vec(turned, (d_in, d_out), &Device::Cpu)?))
    } else {
        written::linear(linear, &mut own, dtype, &mut |_, rows| sink.put(rows))
    };
    match failure {
        Some(e) => Err(e),
        None => Ok(done?),
    }
}

/// A token table, or the head beside it.
fn rows(table: &Embedding, part: Part, store: Option<&mut Store>, sink: &mut Sink<'_>) -> Result<()> {
    let mut failure = None;
    let mut base = source(store, &format!("{}.weight", table.path()))?;
    let kept_head = table.head().kept().filter(|_| part == Part::Head);
    let mut own = |run: std::ops::Range<usize>| match (&mut base, kept_head) {
        (_, Some(head)) => Ok(head.rows(run)?),
        (Some((store, reader)), None) => store.rows(reader, run).map_err(|e| kept(&mut failure, e)),
        (None, None) => Ok(table.base().rows(run)?),
    };
    let mut take = |_: std::ops::Range<usize>, rows: &Tensor| sink.put(rows);
    let done = match part {
        Part::Head => written::head(table, &mut own, &mut take),
        _ => written::table(table, &mut own, &mut take),
    };
    match failure {
        Some(e) => Err(e),
        None => Ok(done?),
    }
}

fn source<'a>(store: Option<&'a mut Store>, name: &str) -> Result<Option<(&'a mut Store, Reader)>> {
    match store {
        None => Ok(None),
        Some(store) => {
            let reader = store.reader(name)?;
            Ok(reader.map(|reader| (store, reader)))
        }
    }
}
