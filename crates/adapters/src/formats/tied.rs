//! What files say twice where an adapter keeps the output head tied to the token table: once for the table, once for the head.
//! A low-rank change of the table is that of the head turned around, A and B changing places.
//!
//! Source: PEFT's `ensure_weight_tying`

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use crate::adapter::Reach;
use crate::config::AdapterConfig;
use crate::module::Host;
use crate::parameter::ParameterMap;
use crate::{Error, Result};

/// Name under the head, name under the table, whether the one is the other transposed. Rows are repeated where they are all that
/// the method trains.
fn pairs(host: &dyn Host, config: &AdapterConfig) -> Vec<(String, String, bool)> {
    let (Some(table), Some(head)) = (host.tied_table(), host.head_paths().into_iter().next()) else {
        return Vec::new();
    };
    let rows = matches!(config.method.reach(), Reach::Rows { .. });
    let rows =
        rows.then(|| (format!("{head}.trainable_tokens_delta"), format!("{table}.trainable_tokens_delta"), false));
    let pairs = vec![
        (format!("{head}.weight"), format!("{table}.weight"), false),
        (format!("{head}.lora_A.weight"), format!("{table}.lora_embedding_B"), true),
        (format!("{head}.lora_B.weight"), format!("{table}.lora_embedding_A"), true),
    ];
    pairs.into_iter().chain(rows).collect()
}

/// Takes the head's tensors out of `tensors` where the table's are there and equal. A file may leave them out, but not one factor
/// of two.
///
/// # Errors
/// If they differ, or one of two is missing.
pub(super) fn take(
    host: &dyn Host,
    path: &Path,
    config: &AdapterConfig,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let pairs = pairs(host, config);
    let there = |(head, ..): &&(String, String, bool)| tensors.contains_key(head);
    if let [_, first, second, ..] = pairs.as_slice()
        && let factors = [first, second]
        && factors.iter().filter(|pair| there(pair)).count() == 1
        && let Some((absent, ..)) = factors.iter().find(|pair| !there(pair))
    {
        return Err(Error::format(path, format!("`{absent}` is missing, but the other factor of the head is there")));
    }
    for (head, table, turned) in pairs {
        if !tensors.contains_key(&table) {
            continue;
        }
        let Some(second) = tensors.remove(&head) else { continue };
        let second = if turned && second.rank() == 2 { second.t()?.contiguous()? } else { second };
        let first = &tensors[&table];
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        if first.dims() != second.dims() || values(first)? != values(&second)? {
            let what = format!("`{head}` and `{table}` differ, but the settings say that the two are tied");
            return Err(Error::format(path, what));
        }
    }
    Ok(())
}

/// The head's tensors that go with `parameters` into a file.
///
/// # Errors
/// If a tensor cannot be turned.
pub(super) fn repeated(
    host: &dyn Host,
    config: &AdapterConfig,
    parameters: &ParameterMap,
) -> Result<Vec<(String, Tensor)>> {
    let mut found = Vec::new();
    for (head, table, turned) in pairs(host, config) {
        if let Some(p) = parameters.get(&table) {
            let tensor = p.tensor.detach();
            found.push((head, if turned { tensor.t()?.contiguous()? } else { tensor }));
        }
    }
    Ok(found)
}
