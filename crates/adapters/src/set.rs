//! Several adapters by name on one base: switch, enable, disable, combine, merge and unmerge.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::Adapter;
use crate::attach::{Attached, merged_weight};
use crate::by_row::ByRow;
use crate::combine::WeightedSum;
use crate::module::{Host, ModuleMut};
use crate::prompt::NO_WEIGHT;
use crate::written::no_weight;
use crate::{Error, Result};

/// Named adapters of one base model, and which of them act.
#[derive(Debug, Default)]
pub struct AdapterSet {
    adapters: BTreeMap<String, Attached>,
    active: Vec<(String, f64)>,
}

/// What merging changed, to put it back exactly.
#[derive(Debug, Default)]
pub struct Merged {
    weights: BTreeMap<String, Arc<FrozenWeight>>,
    heads: BTreeMap<String, Option<Arc<FrozenWeight>>>,
    dense: BTreeMap<(String, &'static str), Tensor>,
    /// Modules that were changed.
    pub modules: usize,
    /// Whether the token table of a tied model and its output head were changed apart, so that they are tied no more.
    pub unties: bool,
}

impl AdapterSet {
    /// No adapters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an adapter under a name; it does not act yet.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn add(&mut self, name: &str, adapter: Attached) -> Result<()> {
        if self.adapters.contains_key(name) {
            return Err(Error::config("name", format!("an adapter named `{name}` is already loaded")));
        }
        self.adapters.insert(name.to_owned(), adapter);
        Ok(())
    }

    /// The adapter of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&Attached> {
        self.adapters
            .get(name)
            .ok_or_else(|| Error::NoAdapter { name: name.to_owned(), loaded: self.adapters.keys().cloned().collect() })
    }

    /// Names of all adapters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// The adapters that act, with their weights.
    pub fn active(&self) -> &[(String, f64)] {
        &self.active
    }

    /// Takes an adapter out, after emptying the slots if it acts.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn remove(&mut self, host: &mut dyn Host, name: &str) -> Result<Attached> {
        self.get(name)?;
        if self.active.iter().any(|(n, _)| n == name) {
            let rest: Vec<_> = self.active.iter().filter(|(n, _)| n != name).cloned().collect();
            self.activate(host, &rest.iter().map(|(n, w)| (n.as_str(), *w)).collect::<Vec<_>>())?;
        }
        self.adapters.remove(name).ok_or_else(|| Error::NoAdapter { name: name.to_owned(), loaded: Vec::new() })
    }

    /// Empties all slots: the base model alone. [`Self::activate`] puts adapters back.
    ///
    /// # Errors
    /// If the walk fails.
    pub fn disable(&mut self, host: &mut dyn Host) -> Result<()> {
        self.activate(host, &[])
    }

    /// Puts the weighted sum of the named adapters into the slots (one adapter at weight 1 acts as itself).
    ///
    /// # Errors
    /// If a name is unknown, or two of them train the same dense tensor.
    pub fn activate(&mut self, host: &mut dyn Host, wanted: &[(&str, f64)]) -> Result<()> {
        let chosen = wanted.iter().map(|(n, w)| Ok((self.get(n)?, *w))).collect::<Result<Vec<_>>>()?;
        let mut seen = BTreeSet::new();
        let prompts = chosen.iter().filter(|(a, _)| a.prompt.is_some()).count();
        for (adapter, weight) in &chosen {
            if adapter.prompt.is_some() && (*weight != 1.0 || prompts > 1) {
                return Err(Error::unsupported(
                    format!(
                        "combining adapters that put something before the sequences ({})",
                        adapter.config.method.name()
                    ),
                    "it is no change that can be weighed or added up; activate one of them, at weight 1",
                ));
            }
            let dense = adapter.dense.iter().map(|d| format!("{}.{}", d.path, d.part));
            let rows = adapter.rows.iter().map(|(path, _)| format!("{path} (rows)"));
            for name in dense.chain(rows) {
                if *weight != 1.0 || !seen.insert(name.clone()) {
                    return Err(Error::unsupported(
                        format!("combining adapters that train {name} whole"),
                        "dense tensors are not a change that can be weighed; activate that adapter alone",
                    ));
                }
            }
        }
        let (tied, head) = (host.tied_table(), host.head_paths().into_iter().next());
        let shared = tied.as_deref().map_or(Ok(true), |table| shares_head(&chosen, table))?;
        host.walk(&mut |module| {
            let path = module.path().to_owned();
            let layer = layer_at(&chosen, &path);
            let dense_of = |path: &str, part: &str| {
                let mut all = chosen.iter().flat_map(|(a, _)| &a.dense);
                all.find(|d| d.path == path && d.part == part).map(|d| d.tensor.clone())
            };
            let dense = |part: &str| dense_of(&path, part);
            match module {
                ModuleMut::Linear(linear) => {
                    linear.set_adapter(layer);
                    if let Some(bias) = linear.bias_mut() {
                        bias.replace(dense("bias"));
                    }
                }
                ModuleMut::Norm(norm) => {
                    norm.weight_mut().replace(dense("weight"));
                    if let Some(bias) = norm.bias_mut() {
                        bias.replace(dense("bias"));
                    }
                }
                ModuleMut::Embedding(embedding) => {
                    embedding.set_adapter(layer);
                    embedding.weight_mut().replace(dense("weight"));
                    let rows = chosen.iter().flat_map(|(a, _)| &a.rows).find(|(p, _)| *p == path);
                    embedding.set_rows(rows.map(|(_, r)| r.clone()));
                    let own = head.as_deref().filter(|_| tied.as_ref() == Some(&path));
                    embedding.head_mut().set_trained(own.and_then(|head| dense_of(head, "weight")));
                    embedding.head_mut().set_shared(shared);
                }
            }
            Ok(())
        })?;
        let prompt = chosen.iter().find_map(|(a, _)| a.prompt.clone());
        if let Some(slot) = host.prompt_slot() {
            slot.set(prompt);
        }
        self.active = wanted.iter().map(|(n, w)| ((*n).to_owned(), *w)).collect();
        Ok(())
    }

    fn chosen(&self, wanted: &[Option<&str>]) -> Result<Vec<Option<&Attached>>> {
        wanted.iter().map(|name| name.map(|n| self.get(n)).transpose()).collect()
    }

    /// Puts the named adapters into the slots side by side, for batches in which each sequence goes through one of them:
    /// [`Flow::by_row`](crate::Flow::by_row) names them by their place here; None is the base alone.
    ///
    /// # Errors
    /// If a name is unknown, or one of them changes more than linear maps.
    pub fn activate_by_row(&mut self, host: &mut dyn Host, wanted: &[Option<&str>]) -> Result<()> {
        let chosen = self.chosen(wanted)?;
        let (mut tables, mut found, mut biased) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        host.walk(&mut |module| {
            match module {
                ModuleMut::Linear(linear) => {
                    biased.extend(linear.bias().map(|_| linear.path().to_owned()));
                    found.insert(linear.path().to_owned())
                }
                other => tables.insert(other.path().to_owned()),
            };
            Ok(())
        })?;
        for (name, adapter) in wanted.iter().zip(&chosen) {
            let Some(adapter) = adapter else { continue };
            if adapter.prompt.is_some() {
                return Err(Error::unsupported(
                    format!("adapter {} beside others in one batch", name.unwrap_or_default()),
                    "it puts something before the sequences; activate it alone",
                ));
            }
            let whole = adapter.dense.iter().map(|d| d.path.clone()).chain(adapter.rows.iter().map(|(p, _)| p.clone()));
            let other = adapter.layers.keys().filter(|path| !found.contains(*path)).cloned();
            for (path, layer) in adapter.layers.iter().filter(|(path, _)| biased.contains(*path)) {
                if layer.bias_gain()?.is_some() {
                    let what = format!("adapter {} beside others in one batch", name.unwrap_or_default());
                    return Err(Error::unsupported(what, format!("it scales the bias of {path}; activate it alone")));
                }
            }
            if let Some(path) = whole.chain(other).next() {
                let what = format!("adapter {} beside others in one batch", name.unwrap_or_default());
                return Err(Error::unsupported(
                    what,
                    format!("it changes {path}, which is no linear map; activate it alone"),
                ));
            }
        }
        self.activate(host, &[])?;
        let chosen = self.chosen(wanted)?;
        host.walk(&mut |module| {
            if let ModuleMut::Linear(linear) = module {
                let parts: Vec<_> =
                    chosen.iter().map(|a| a.and_then(|a| a.layers.get(linear.path()).cloned())).collect();
                if parts.iter().any(Option::is_some) {
                    linear.set_adapter(Some(Arc::new(ByRow::new(parts))));
                }
            }
            Ok(())
        })
    }

    /// Writes what acts now into the base weights and empties the slots. Quantised weights become dense in `dtype`.
    ///
    /// # Errors
    /// If a change depends on the input and so is no weight.
    pub fn merge(&mut self, host: &mut dyn Host, dtype: DType) -> Result<Merged> {
        if host.prompt_slot().is_some_and(|slot| slot.get().is_some()) {
            return Err(Error::unsupported("merging what stands before the sequences", NO_WEIGHT));
        }
        let mut merged = Merged::default();
        let tied = host.tied_table();
        host.walk(&mut |module| {
            let path = module.path().to_owned();
            match module {
                ModuleMut::Linear(linear) => {
                    let mut gain = None;
                    if let Some(adapter) = linear.adapter().cloned() {
                        let Some(delta) = adapter.delta(linear.base())? else { return Err(no_weight(&path)) };
                        let weight = merged_weight(linear.base(), &delta, dtype)?;
                        gain = linear.bias_gain()?;
                        merged.weights.insert(path.clone(), linear.base().clone());
                        linear.set_base(Arc::new(weight))?;
                        linear.set_adapter(None);
                        merged.modules += 1;
                    }
                    if let Some(bias) = linear.bias_mut() {
                        merged.dense.insert((path, "bias"), bias.frozen().clone());
                        bias.bake(gain.as_ref())?;
                    }
                }
                ModuleMut::Norm(norm) => {
                    merged.dense.insert((path.clone(), "weight"), norm.weight().frozen().clone());
                    norm.weight_mut().bake(None)?;
                    if let Some(bias) = norm.bias_mut() {
                        merged.dense.insert((path, "bias"), bias.frozen().clone());
                        bias.bake(None)?;
                    }
                }
                ModuleMut::Embedding(embedding) => {
                    if embedding.is_changed() {
                        let reaches = embedding.change_reaches_head() && embedding.head().kept().is_none();
                        let unties = tied.as_ref() == Some(&path) && !reaches;
                        let head = unties.then(|| embedding.head().effective(embedding)).transpose()?;
                        let head = head.map(FrozenWeight::dense).transpose()?.map(Arc::new);
                        merged.unties |= unties;
                        merged.dense.insert((path.clone(), "weight"), embedding.weight().frozen().clone());
                        merged.heads.insert(path, embedding.head().kept().cloned());
                        let table = embedding.effective()?;
                        embedding.set_adapter(None);
                        embedding.set_rows(None);
                        embedding.set_table(table)?;
                        embedding.head_mut().set_trained(None);
                        embedding.head_mut().keep(head);
                        merged.modules += 1;
                    }
                }
            }
            Ok(())
        })?;
        self.active.clear();
        Ok(merged)
    }

    /// Puts the base weights back exactly as they were before [`Self::merge`].
    ///
    /// # Errors
    /// If the walk fails.
    pub fn unmerge(&mut self, host: &mut dyn Host, merged: Merged) -> Result<()> {
        host.walk(&mut |module| {
            let path = module.path().to_owned();
            let dense = |part: &'static str| merged.dense.get(&(path.clone(), part)).cloned();
            match module {
                ModuleMut::Linear(linear) => {
                    if let Some(base) = merged.weights.get(&path) {
                        linear.set_base(base.clone())?;
                    }
                    if let (Some(bias), Some(old)) = (linear.bias_mut(), dense("bias")) {
                        *bias = crate::Dense::new(old);
                    }
                }
                ModuleMut::Norm(norm) => {
                    if let Some(old) = dense("weight") {
                        *norm.weight_mut() = crate::Dense::new(old);
                    }
                    if let (Some(bias), Some(old)) = (norm.bias_mut(), dense("bias")) {
                        *bias = crate::Dense::new(old);
                    }
                }
                ModuleMut::Embedding(embedding) => {
                    if let Some(old) = dense("weight") {
                        embedding.set_table(old)?;
                        embedding.head_mut().keep(merged.heads.get(&path).cloned().flatten());
                    }
                }
            }
            Ok(())
        })
    }
}

/// Whether the head of a tied model follows what the adapters do to its table; they must agree.
fn shares_head(chosen: &[(&Attached, f64)], table: &str) -> Result<bool> {
    let touches = |a: &Attached| a.layers.contains_key(table) || a.dense.iter().any(|d| d.path == table);
    let mut wishes = chosen.iter().filter(|(a, _)| touches(a)).map(|(a, _)| a.config.tie_weights);
    let first = wishes.next().unwrap_or(true);
    if wishes.all(|wish| wish == first) {
        return Ok(first);
    }
    Err(Error::unsupported(
        format!("combining adapters of {table}"),
        "one keeps the output head tied to the table and another does not; activate them one at a time",
    ))
}

/// What goes into the slot at `path`.
fn layer_at(chosen: &[(&Attached, f64)], path: &str) -> Option<Arc<dyn Adapter>> {
    let mut parts: Vec<(f64, Arc<dyn Adapter>)> =
        chosen.iter().filter_map(|(a, w)| Some((*w, a.layers.get(path)?.clone()))).collect();
    match parts.len() {
        0 => None,
        1 if parts[0].0 == 1.0 => parts.pop().map(|(_, layer)| layer),
        _ => Some(Arc::new(WeightedSum::new(parts))),
    }
}
