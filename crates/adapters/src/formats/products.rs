//! An adapter as low-rank products by module, whatever the method: what layouts with two factors a module can hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use super::folder::portable;
use crate::attach::{Attached, Origin, attach};
use crate::low_rank::Gain;
use crate::module::{Host, ModuleMut};
use crate::{Error, Result};

/// scale * B A at one module, under the magnitude of a weight-decomposed one.
#[derive(Debug, Clone)]
pub(super) struct Product {
    /// Module path.
    pub(super) path: String,
    /// A [r, d_in] in f32.
    pub(super) a: Tensor,
    /// B [d_out, r] in f32.
    pub(super) b: Tensor,
    /// Factor on the product.
    pub(super) scale: f64,
    /// Magnitude `[d_out]` that takes the place of the norms of W + scale B A.
    pub(super) magnitude: Option<Tensor>,
    /// Whether the module looks up rows.
    pub(super) lookup: bool,
}

/// The products of `adapter`; `layout` says in errors what cannot hold something.
///
/// # Errors
/// If a part of the adapter is no product: tensors trained whole, token rows, another form of change.
pub(super) fn of(host: &mut dyn Host, adapter: &Attached, layout: &str) -> Result<Vec<Product>> {
    let refuse = |what: String| {
        Err(Error::unsupported(what, format!("a {layout} has no place for it; save the adapter as a PEFT folder")))
    };
    if let Some(dense) = adapter.dense.first() {
        return refuse(format!("{}.{}, which is trained whole", dense.path, dense.part));
    }
    if let Some((path, rows)) = adapter.rows.first() {
        return refuse(format!("{} trained token rows of {path}", rows.indices.len()));
    }
    if let Some(prompt) = &adapter.prompt {
        return refuse(format!("{} virtual tokens before the sequences", prompt.virtual_tokens()));
    }
    let (config, parameters) = portable(adapter)?;
    let again;
    let adapter = match adapter.config.method.portable() {
        None => adapter,
        Some(_) => {
            let tensors = parameters.iter().map(|p| (p.name.clone(), p.tensor.detach())).collect();
            let origin = Origin::File { path: Path::new("(adapter)"), tensors };
            again = attach(host, &config, origin, DType::F32, &Device::Cpu)?;
            &again
        }
    };
    let mut bases: BTreeMap<String, (Arc<FrozenWeight>, bool)> = BTreeMap::new();
    host.walk(&mut |module| {
        match module {
            ModuleMut::Linear(m) => drop(bases.insert(m.path().to_owned(), (m.base().clone(), false))),
            ModuleMut::Embedding(m) => drop(bases.insert(m.path().to_owned(), (m.base().clone(), true))),
            ModuleMut::Norm(_) => {}
        }
        Ok(())
    })?;
    let mut products = Vec::new();
    for (path, layer) in &adapter.layers {
        let Some((base, lookup)) = bases.get(path) else { continue };
        let Some(view) = layer.low_rank(base)?.filter(|v| v.residual.is_none()) else {
            return refuse(format!("the change of {path}, which is no low-rank product"));
        };
        let magnitude = match &view.gain {
            None => None,
            Some(Gain::OverNorm { magnitude, .. }) => Some(plain(magnitude)?),
            Some(Gain::Values(_)) => return refuse(format!("the factors on the outputs of {path}")),
        };
        let a = plain(&view.a)?;
        let a = match &view.rank_scale {
            Some(scale) => a.broadcast_mul(&plain(scale)?.unsqueeze(1)?)?,
            None => a,
        };
        let (b, scale) = (plain(&view.b)?, view.scale);
        products.push(Product { path: path.clone(), a, b, scale, magnitude, lookup: *lookup });
    }
    Ok(products)
}

fn plain(t: &Tensor) -> Result<Tensor> {
    Ok(t.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?)
}

/// `product` with rank `rank`, zeros added, and the factor `scale`, the rest of its own taken into B: the same change.
///
/// # Errors
/// If shapes do not fit.
pub(super) fn widened(product: &Product, rank: usize, scale: f64) -> Result<(Tensor, Tensor)> {
    let own = product.a.dim(0)?;
    let b = if product.scale == scale { product.b.clone() } else { (&product.b * (product.scale / scale))? };
    if own >= rank {
        return Ok((product.a.clone(), b));
    }
    let more = rank - own;
    let a = product.a.pad_with_zeros(0, 0, more)?;
    Ok((a.contiguous()?, b.pad_with_zeros(1, 0, more)?.contiguous()?))
}
