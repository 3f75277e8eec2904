//! Copies of the base's own weights that some tools save beside an adapter: they must be what the base has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::module::{Host, ModuleMut};
use crate::{Error, Result};

/// Largest error that quantising a weight makes, relative to its norm (two-bit blocks make the largest).
const ROUNDED: f64 = 0.4;

/// A weight of the base [d_out, d_in] in f32, and whether it is stored rounded.
fn own_weight(module: ModuleMut<'_>) -> Result<(Tensor, DType, bool)> {
    let (tensor, dtype, rounded) = match module {
        ModuleMut::Linear(linear) => match linear.base().as_dense() {
            Some(dense) => (dense.clone(), dense.dtype(), false),
            None => (linear.base().dequantize(DType::F32)?, DType::F32, true),
        },
        ModuleMut::Embedding(embedding) => {
            let table = embedding.weight().frozen().clone();
            (table.clone(), table.dtype(), false)
        }
        ModuleMut::Norm(norm) => {
            let gain = norm.weight().frozen().clone();
            (gain.clone(), gain.dtype(), false)
        }
    };
    Ok((tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?, dtype, rounded))
}

/// Whether `copy` is `own`: value by value in the dtype the base is loaded in, or up to the rounding of a quantised base.
fn same(own: &Tensor, copy: &Tensor, dtype: DType, rounded: bool) -> Result<bool> {
    if own.dims() != copy.dims() {
        return Ok(false);
    }
    let copy = copy.to_device(&Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
    let (own, copy) = (own.flatten_all()?.to_vec1::<f32>()?, copy.flatten_all()?.to_vec1::<f32>()?);
    if own == copy {
        return Ok(true);
    }
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let error = square(&mut own.iter().zip(&copy).map(|(x, y)| x - y));
    Ok(rounded && error <= ROUNDED * ROUNDED * square(&mut copy.iter().copied()))
}

/// Whether `copies`, by the name of the weight, are what the base has; `turned` are the modules whose files keep weights
/// transposed.
///
/// # Errors
/// If one differs, or is of a weight that the model does not have.
pub(super) fn check(
    host: &mut dyn Host,
    path: &Path,
    copies: &BTreeMap<String, Tensor>,
    turned: &BTreeSet<String>,
) -> Result<()> {
    if copies.is_empty() {
        return Ok(());
    }
    let mut left: BTreeSet<&str> = copies.keys().map(String::as_str).collect();
    let head = host.head_paths().into_iter().next().map(|head| format!("{head}.weight"));
    let (tied, file_rounded) = (host.tied_table(), host.is_rounded());
    host.walk(&mut |module| {
        let place = module.path().to_owned();
        let name = format!("{place}.weight");
        // The head of a tied model is the token table under another name.
        let second = head.as_ref().filter(|_| tied.as_ref() == Some(&place));
        let names: Vec<&String> =
            std::iter::once(&name).chain(second).filter(|n| copies.contains_key(n.as_str())).collect();
        if names.is_empty() {
            return Ok(());
        }
        let (own, dtype, rounded) = own_weight(module)?;
        for name in names {
            let copy = match turned.contains(&place) && copies[name].rank() == 2 {
                true => copies[name].t()?.contiguous()?,
                false => copies[name].clone(),
            };
            if !same(&own, &copy, dtype, rounded || file_rounded)? {
                let what = "the file's copy of the base weight differs from the base's; it was made for another base";
                return Err(Error::format(path, format!("`{name}`: {what}")));
            }
            left.remove(name.as_str());
        }
        Ok(())
    })?;
    match left.into_iter().next() {
        Some(name) => {
            Err(Error::format(path, format!("`{name}`: a copy of a base weight that the model does not have")))
        }
        None => Ok(()),
    }
}
