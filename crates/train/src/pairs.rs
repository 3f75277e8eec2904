//! The low-rank products of an adapter, found by what their parameters are: one that reads the input and one that writes
//! the output under one module path.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;
use espalier_adapters::attach::Attached;
use espalier_adapters::parameter::Role;
use espalier_adapters::{FrozenWeight, Host, LowRankView, ModuleMut};
use espalier_models::Model;

use crate::{Error, Result};

/// One factor of a product.
#[derive(Debug, Clone)]
pub struct Side {
    /// Its full name.
    pub name: String,
    /// Its values.
    pub tensor: Tensor,
    /// Its place among the trainable parameters, where it is one.
    pub index: Option<usize>,
}

/// The product s B A at one site.
#[derive(Debug, Clone)]
pub struct Pair {
    /// Module path.
    pub path: String,
    /// A [r, d_in].
    pub down: Side,
    /// B [d_out, r].
    pub up: Side,
    /// The factor s.
    pub scale: f64,
    /// Rank r.
    pub rank: usize,
    /// The frozen weight as the module holds it.
    pub base: Arc<FrozenWeight>,
    /// Whether the adapter took a part of the base into the product.
    pub moved: bool,
    /// Whether the module looks up rows instead of multiplying.
    pub lookup: bool,
    /// Probability of dropping an input of A.
    pub dropout: f64,
}

/// Whether a view is the product of `down` and `up` and nothing else.
fn is_plain(view: &LowRankView, down: &Tensor, up: &Tensor) -> bool {
    view.gain.is_none() && view.rank_scale.is_none() && view.a.id() == down.id() && view.b.id() == up.id()
}

/// Frozen weights by module path, and whether the module looks up rows.
fn bases(model: &mut Model) -> Result<BTreeMap<String, (Arc<FrozenWeight>, bool)>> {
    let mut found = BTreeMap::new();
    model.walk(&mut |module| {
        match module {
            ModuleMut::Linear(m) => drop(found.insert(m.path().to_owned(), (m.base().clone(), false))),
            ModuleMut::Embedding(m) => drop(found.insert(m.path().to_owned(), (m.base().clone(), true))),
            ModuleMut::Norm(_) => {}
        }
        Ok(())
    })?;
    Ok(found)
}

/// The products of an adapter, in the order of its parameters; `what` asks for them.
///
/// # Errors
/// If the adapter has none, or one of its layers has another form.
pub fn pairs(what: &str, model: &mut Model, attached: &Attached) -> Result<Vec<Pair>> {
    let order: BTreeMap<&str, usize> =
        attached.parameters.trainable().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let bases = bases(model)?;
    let mut pairs = Vec::new();
    for (path, layer) in &attached.layers {
        let parameters = layer.parameters();
        let side = |role: Role| {
            let found = parameters.iter().find(|p| p.role == role)?;
            let name = format!("{path}.{}", found.name);
            Some(Side { index: order.get(name.as_str()).copied(), tensor: found.tensor.clone(), name })
        };
        let (Some(down), Some(up)) = (side(Role::Down), side(Role::Up)) else { continue };
        let Some((base, lookup)) = bases.get(path) else { continue };
        let view = layer.low_rank(base)?.filter(|v| is_plain(v, &down.tensor, &up.tensor));
        let Some(view) = view else {
            return Err(unfit(what, format!("{path}: `{}` is more than a product B A", attached.config.method.name())));
        };
        pairs.push(Pair {
            path: path.clone(),
            rank: down.tensor.dim(0)?,
            scale: view.scale,
            moved: view.residual.is_some(),
            down,
            up,
            base: base.clone(),
            lookup: *lookup,
            dropout: layer.dropout(),
        });
    }
    if pairs.is_empty() {
        let name = attached.config.method.name();
        return Err(unfit(what, format!("the method `{name}` has no product B A whose factors are trained")));
    }
    // The order of the parameters, which is the model's.
    pairs.sort_by_key(|pair| pair.up.index.or(pair.down.index));
    Ok(pairs)
}

/// The error of a dynamics that does not go with the run.
pub fn unfit(what: &str, reason: impl Into<String>) -> Error {
    Error::recipe("dynamics.method", format!("`{what}` does not fit this run: {}", reason.into()))
}
