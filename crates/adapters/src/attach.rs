//! Builds an adapter for a model: one layer per site, and the dense tensors trained beside it.
//!
//! Making a new adapter and loading a saved one are the same walk; only the source of the tensors differs. When it loads,
//! every tensor of the file must find its place and every place its tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::{Adapter, Evidence, Init, Reach, Site, Source};
pub use crate::base::BaseCheck;
use crate::config::{AdapterConfig, BiasMode};
use crate::module::{Host, ModuleMut, TokenRows};
use crate::parameter::ParameterMap;
use crate::parametrisation::full::FullLayer;
use crate::prompt::{self, Prompter};
use crate::random::normal;
pub use crate::sites::{candidates, sites};
use crate::sites::{names_module, place, survey, token_rows};
use crate::target::{Placement, near_misses};
use crate::{Error, Result};

/// A dense tensor of a module that is trained on purpose.
#[derive(Debug, Clone)]
pub struct DenseEntry {
    /// Module path.
    pub path: String,
    /// `weight` or `bias`.
    pub part: &'static str,
    /// The trained values.
    pub tensor: Tensor,
}

/// An adapter built for a model: everything it puts into the model's slots.
#[derive(Debug)]
pub struct Attached {
    /// Its configuration.
    pub config: AdapterConfig,
    /// Layers by module path.
    pub layers: BTreeMap<String, Arc<dyn Adapter>>,
    /// Dense tensors beside them.
    pub dense: Vec<DenseEntry>,
    /// Trained token rows by embedding path.
    pub rows: Vec<(String, TokenRows)>,
    /// What stands before the sequences.
    pub prompt: Option<Arc<dyn Prompter>>,
    /// Sites and pattern counts.
    pub placement: Placement,
    /// All parameters in model order.
    pub parameters: ParameterMap,
    /// What is known of the base that the adapter was made for.
    pub base: BaseCheck,
}

/// Where the tensors come from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// Drawn with this seed.
    Seed(u64),
    /// As [`Self::Seed`], but for tensors that were made from the data.
    Started {
        /// The seed.
        seed: u64,
        /// Those tensors by full name.
        starts: BTreeMap<String, Tensor>,
    },
    /// Taken from the tensors of a file.
    File {
        /// The file, for messages.
        path: &'a Path,
        /// Tensors by full name.
        tensors: BTreeMap<String, Tensor>,
    },
}

/// Names that classification heads have.
pub const CLASSIFIER_NAMES: [&str; 2] = ["classifier", "score"];

/// Makes a new adapter as [`attach`] does, from data where the method asks for it: `evidence` says what is known at a site, in
/// the form of the method's [`wanted`](crate::Method::wanted).
///
/// # Errors
/// As [`attach`]; if a method starts from data that is not given.
pub fn attach_from_data(
    host: &mut dyn Host,
    config: &AdapterConfig,
    (seed, first_lr): (u64, f64),
    dtype: DType,
    device: &Device,
    evidence: &mut dyn FnMut(&Site) -> Result<Tensor>,
) -> Result<Attached> {
    let mut starts = BTreeMap::new();
    if config.method.wanted().is_some() {
        for site in sites(host, config, device)?.iter().filter(|site| !site.lookup) {
            let values = evidence(site)?.to_dtype(DType::F32)?;
            let made = config.method.starts(site, &Evidence { values: &values, first_lr, seed })?;
            starts.extend(made.into_iter().map(|(name, start)| (format!("{}.{name}", site.path), start)));
        }
    }
    attach(host, config, Origin::Started { seed, starts }, dtype, device)
}

/// Builds the adapter `config` for `host` with parameters of `dtype` on `device`.
///
/// # Errors
/// If a pattern matches nothing, a setting does not fit, or the file and the model do not pair up one to one.
pub fn attach(
    host: &mut dyn Host,
    config: &AdapterConfig,
    origin: Origin<'_>,
    dtype: DType,
    device: &Device,
) -> Result<Attached> {
    attach_part(host, config, origin, &|_| true, dtype, device)
}

/// As [`attach`], but only what the adapter has at the modules whose paths are `wanted` (the output head of a tied model is part
/// of its table); a file's tensors are those of that part.
///
/// # Errors
/// As [`attach`].
pub fn attach_part(
    host: &mut dyn Host,
    config: &AdapterConfig,
    origin: Origin<'_>,
    wanted: &dyn Fn(&str) -> bool,
    dtype: DType,
    device: &Device,
) -> Result<Attached> {
    let survey = survey(host)?;
    let mut placement = place(&survey, config)?;
    let reach = config.method.reach();
    let placed: BTreeMap<&str, _> = placement.sites.iter().map(|s| (s.path.as_str(), s)).collect();
    let rows_wanted = token_rows(config, &survey.embeddings)?;
    let (mut tensors, file, seed) = match origin {
        Origin::Seed(seed) => (BTreeMap::new(), None, seed),
        Origin::Started { seed, starts } => (starts, None, seed),
        Origin::File { path, tensors } => (tensors, Some(path), 0),
    };
    let mut missing = Vec::new();
    let source = match file {
        None => Source::Fresh { seed, starts: &mut tensors },
        Some(_) => Source::File { tensors: &mut tensors, missing: &mut missing },
    };
    let at_site = |(path, _): &(&String, &(usize, usize))| placed.contains_key(path.as_str());
    let widest = survey.widths.iter().filter(at_site).fold((0, 0), |w, (_, d)| (w.0.max(d.0), w.1.max(d.1)));
    let mut init = Init::new(source, dtype, device, widest);
    let mut build = Builder {
        config,
        layers: BTreeMap::new(),
        dense: Vec::new(),
        rows: Vec::new(),
        parameters: ParameterMap::new(),
        saved: config.modules_to_save.iter().map(|m| (m.clone(), 0)).collect(),
        whole: BTreeSet::new(),
        made: 0,
    };
    host.walk(&mut |module| {
        let path = module.path().to_owned();
        init.path.clone_from(&path);
        let sited = placed.contains_key(path.as_str());
        let whole = build.saved_whole(&path) || (sited && reach == Reach::Whole);
        let head = survey.tied.as_ref().filter(|(t, _)| *t == path).map(|(_, head)| head.as_str());
        let head = head.filter(|head| build.saved_whole(head));
        if !wanted(&path) {
            return Ok(());
        }
        match module {
            ModuleMut::Linear(linear) => {
                if whole {
                    let base = linear.base();
                    let weight = init.copy_with("weight", base.dims(), || Ok(base.dequantize(dtype)?))?;
                    build.layer(&path, Arc::new(FullLayer::new(weight)));
                } else if let Some(site) = placed.get(path.as_str()) {
                    let site = Site::of(site, linear.base(), false, device);
                    let layer = config.method.attach(&site, &mut init)?;
                    build.made += 1;
                    build.layer(&path, layer);
                }
                if let Some(bias) = linear.bias()
                    && (whole || build.bias_wanted(sited))
                {
                    build.dense(&mut init, &path, "bias", bias.frozen())?;
                }
            }
            ModuleMut::Norm(norm) => {
                if whole {
                    build.dense(&mut init, &path, "weight", norm.weight().frozen())?;
                }
                if let Some(bias) = norm.bias()
                    && (whole || build.bias_wanted(false))
                {
                    build.dense(&mut init, &path, "bias", bias.frozen())?;
                }
            }
            ModuleMut::Embedding(embedding) => {
                let table = embedding.weight().frozen();
                let whole = whole || (head.is_some() && config.tie_weights);
                if whole {
                    build.dense(&mut init, &path, "weight", table)?;
                } else if let (Reach::Rows { tokens, copied }, true) = (reach, sited) {
                    build.token_rows(&mut init, &path, ("token_indices", tokens, copied), table)?;
                } else if let Some(site) = placed.get(path.as_str()) {
                    let site = Site::of(site, embedding.base(), true, device);
                    let layer = config.method.attach(&site, &mut init)?;
                    build.made += 1;
                    build.layer(&path, layer);
                }
                if let Some(head) = head.filter(|_| !config.tie_weights) {
                    let own = embedding.head().kept().unwrap_or(embedding.base());
                    init.path = head.to_owned();
                    let tensor = init.copy_with("weight", own.dims(), || Ok(own.dequantize(dtype)?))?;
                    build.push_dense(head, "weight", tensor);
                    init.path.clone_from(&path);
                }
                if let Some((_, ids)) = rows_wanted.iter().find(|(p, _)| *p == path) {
                    if head.is_some() {
                        return Err(Error::config(
                            "trainable_tokens",
                            "rows of a table whose output head is trained whole; train the table whole as well",
                        ));
                    }
                    if sited && matches!(reach, Reach::Rows { .. }) {
                        return Err(Error::config(
                            "trainable_tokens",
                            format!("rows of {path} are trained by the method itself; list them there"),
                        ));
                    }
                    build.token_rows(&mut init, &path, ("trainable_tokens", ids, true), table)?;
                }
            }
        }
        Ok(())
    })?;
    // PEFT lists both names of classification heads; a model has one of them.
    let head_found = build.saved.iter().any(|(m, n)| *n > 0 && CLASSIFIER_NAMES.contains(&m.as_str()));
    let alias = |m: &str| head_found && CLASSIFIER_NAMES.contains(&m);
    if let Some((pattern, _)) = build.saved.iter().find(|(m, n)| *n == 0 && !alias(m)) {
        return Err(Error::NoTarget {
            key: "modules_to_save",
            pattern: pattern.clone(),
            near_misses: near_misses(pattern, survey.candidates.iter().map(|c| c.path.clone())),
        });
    }
    let Builder { layers, dense, rows, mut parameters, whole, made, .. } = build;
    let mut config = config.clone();
    let prompt = prompt::make(host, &mut config, &mut init)?;
    parameters.extend(init.shared_parameters());
    placement.sites.retain(|site| !whole.contains(&site.path));
    if let Some(path) = file {
        // What all sites share belongs to a part without sites as well.
        let taken = made > 0 || prompt.is_some();
        let unused: Vec<String> = tensors.keys().filter(|name| name.contains('.') || taken).cloned().collect();
        if !(missing.is_empty() && unused.is_empty()) {
            return Err(Error::Unpaired { path: path.to_owned(), missing, unused });
        }
        tensors.clear();
    }
    if let Some(name) = tensors.into_keys().next() {
        return Err(Error::unsupported(name, "a start was made from data, but no layer takes it"));
    }
    let base = BaseCheck::Same;
    Ok(Attached { config, layers, prompt, dense, rows, placement, parameters, base })
}

struct Builder<'a> {
    config: &'a AdapterConfig,
    layers: BTreeMap<String, Arc<dyn Adapter>>,
    dense: Vec<DenseEntry>,
    rows: Vec<(String, TokenRows)>,
    parameters: ParameterMap,
    saved: Vec<(String, usize)>,
    /// Paths of the modules that are saved whole.
    whole: BTreeSet<String>,
    /// Layers of the method itself.
    made: usize,
}

impl Builder<'_> {
    fn saved_whole(&mut self, path: &str) -> bool {
        let mut whole = false;
        for (pattern, count) in &mut self.saved {
            if names_module(path, pattern) {
                *count += 1;
                whole = true;
            }
        }
        if whole {
            self.whole.insert(path.to_owned());
        }
        whole
    }

    fn bias_wanted(&self, adapted: bool) -> bool {
        match self.config.bias {
            BiasMode::None => false,
            BiasMode::All => true,
            BiasMode::LoraOnly => adapted,
        }
    }

    fn layer(&mut self, path: &str, layer: Arc<dyn Adapter>) {
        self.parameters.extend_under(path, layer.parameters());
        self.layers.insert(path.to_owned(), layer);
    }

    fn dense(&mut self, init: &mut Init<'_>, path: &str, part: &'static str, start: &Tensor) -> Result<()> {
        let tensor = init.copy_of(part, start)?;
        self.push_dense(path, part, tensor);
        Ok(())
    }

    fn push_dense(&mut self, path: &str, part: &'static str, tensor: Tensor) {
        self.parameters.push(format!("{path}.{part}"), &tensor, true);
        self.dense.push(DenseEntry { path: path.to_owned(), part, tensor });
    }

    fn token_rows(
        &mut self,
        init: &mut Init<'_>,
        path: &str,
        (key, ids, copied): (&str, &[u32], bool),
        table: &Tensor,
    ) -> Result<()> {
        let (tokens, width) = table.dims2()?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= tokens) {
            return Err(Error::config(key, format!("token {id} is outside {path}, which has {tokens} rows")));
        }
        if ids.iter().collect::<BTreeSet<_>>().len() != ids.len() || ids.is_empty() {
            return Err(Error::config(key, "the ids must be distinct, and at least one"));
        }
        let start = || Ok(table.index_select(&Tensor::new(ids, table.device())?, 0)?);
        let values = match copied {
            true => init.copy_with("trainable_tokens_delta", (ids.len(), width), start)?,
            false => init.trainable("trainable_tokens_delta", (ids.len(), width), |rng, shape, device| {
                normal(rng, 1.0, shape.dims(), device)
            })?,
        };
        self.parameters.push(format!("{path}.trainable_tokens_delta"), &values, true);
        self.rows.push((path.to_owned(), TokenRows { indices: ids.to_vec(), values }));
        Ok(())
    }
}

/// The frozen weight a merged module gets: W + ΔW, kept in W's dtype where W is dense and in `dtype` where it is not.
pub(crate) fn merged_weight(base: &Arc<FrozenWeight>, delta: &Tensor, dtype: DType) -> Result<FrozenWeight> {
    let target = base.as_dense().map_or(dtype, Tensor::dtype);
    let sum = (base.dequantize(DType::F32)? + delta)?;
    Ok(FrozenWeight::dense(sum.to_dtype(target)?)?)
}
