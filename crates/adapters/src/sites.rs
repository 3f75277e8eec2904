//! Sites: what a model has to adapt, which of it a configuration chooses, and what a site says of itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Device;
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::{Reach, Site};
use crate::config::{AdapterConfig, TokenIndices};
use crate::module::{Host, ModuleMut};
use crate::target::{Candidate, Kind, Placed, Placement, TargetSpec, near_misses};
use crate::{Error, Result};

/// What a walk over the model finds out before layers are made.
pub(crate) struct Survey {
    pub(crate) candidates: Vec<Candidate>,
    /// (d_out, d_in) of every candidate by path.
    pub(crate) widths: BTreeMap<String, (usize, usize)>,
    pub(crate) embeddings: Vec<String>,
    /// Token table and output head of a model where they are one.
    pub(crate) tied: Option<(String, String)>,
}

pub(crate) fn survey(host: &mut dyn Host) -> Result<Survey> {
    let heads = host.head_paths();
    let tied = host.tied_table().zip(heads.first().cloned());
    let mut survey = Survey { candidates: Vec::new(), widths: BTreeMap::new(), embeddings: Vec::new(), tied };
    host.walk(&mut |module| {
        let path = module.path().to_owned();
        match module {
            ModuleMut::Linear(linear) => {
                survey.widths.insert(path.clone(), (linear.base().d_out(), linear.base().d_in()));
                let head = heads.iter().any(|h| path == *h || path.starts_with(&format!("{h}.")));
                survey.candidates.push(Candidate { path, kind: Kind::Linear, head });
            }
            ModuleMut::Embedding(embedding) => {
                survey.widths.insert(path.clone(), (embedding.base().d_in(), embedding.base().d_out()));
                survey.embeddings.push(path.clone());
                survey.candidates.push(Candidate { path, kind: Kind::Embedding, head: false });
            }
            ModuleMut::Norm(_) => survey.candidates.push(Candidate { path, kind: Kind::Norm, head: false }),
        }
        Ok(())
    })?;
    Ok(survey)
}

/// Chooses the sites; a pattern for what the method lacks is refused.
pub(crate) fn place(survey: &Survey, config: &AdapterConfig) -> Result<Placement> {
    let (rank, alpha) = config.method.rank_and_alpha();
    let patterns = [
        ("rank_pattern", "rank", rank == 0 && !config.targets.rank_pattern.is_empty()),
        ("alpha_pattern", "alpha", alpha == 0.0 && !config.targets.alpha_pattern.is_empty()),
    ];
    if let Some((key, what, _)) = patterns.iter().find(|(.., idle)| *idle) {
        return Err(Error::config(*key, format!("the method {} has no {what} to set", config.method.name())));
    }
    let reach = config.method.reach();
    let within: Vec<Candidate> = survey.candidates.iter().filter(|c| c.is_within(reach)).cloned().collect();
    let placement = match reach {
        Reach::Sequence if config.targets == TargetSpec::of(reach) => Placement::default(),
        Reach::Sequence => {
            let reason = format!("{} acts on no module, so there is none to choose", config.method.name());
            return Err(Error::config("target_modules", reason));
        }
        _ => config.targets.place(&within, rank, alpha)?,
    };
    config.method.check_sites(&placement.sites.iter().map(|s| s.path.as_str()).collect::<Vec<_>>())?;
    Ok(placement)
}

impl Site {
    pub(crate) fn of(placed: &Placed, base: &Arc<FrozenWeight>, lookup: bool, device: &Device) -> Self {
        // A table is the map from one-hot tokens, turned.
        let (d_out, d_in) = if lookup { (base.d_in(), base.d_out()) } else { (base.d_out(), base.d_in()) };
        Self {
            path: placed.path.clone(),
            d_out,
            d_in,
            rank: placed.rank,
            alpha: placed.alpha,
            base: base.clone(),
            lookup,
            device: device.clone(),
        }
    }
}

/// The sites that [`attach`](crate::attach::attach) will make layers for, in order.
///
/// # Errors
/// As [`attach`](crate::attach::attach) of the placement.
pub fn sites(host: &mut dyn Host, config: &AdapterConfig, device: &Device) -> Result<Vec<Site>> {
    let placement = place(&survey(host)?, config)?;
    let placed: BTreeMap<&str, _> = placement.sites.iter().map(|s| (s.path.as_str(), s)).collect();
    let mut sites = Vec::new();
    host.walk(&mut |module| {
        let Some(placed) = placed.get(module.path()) else { return Ok(()) };
        match module {
            ModuleMut::Linear(linear) => sites.push(Site::of(placed, linear.base(), false, device)),
            ModuleMut::Embedding(embedding) => sites.push(Site::of(placed, embedding.base(), true, device)),
            ModuleMut::Norm(_) => {}
        }
        Ok(())
    })?;
    Ok(sites)
}

/// The candidates of a model: its linear maps, embeddings and norms, in order.
///
/// # Errors
/// If the walk fails.
pub fn candidates(host: &mut dyn Host) -> Result<Vec<Candidate>> {
    Ok(survey(host)?.candidates)
}

/// Whether `pattern` names the module at `path` or one that contains it: by PEFT's rule for whole modules, a path that ends
/// so, also within a name (`norm` is `input_layernorm` too).
pub(crate) fn names_module(path: &str, pattern: &str) -> bool {
    if pattern.is_empty() {
        return false;
    }
    let mut end = path.len();
    loop {
        let head = &path[..end];
        if head.ends_with(pattern) {
            return true;
        }
        match head.rfind('.') {
            Some(dot) => end = dot,
            None => return false,
        }
    }
}

/// Token rows to train, by embedding path.
pub(crate) fn token_rows(config: &AdapterConfig, embeddings: &[String]) -> Result<Vec<(String, Vec<u32>)>> {
    let input = || embeddings.first().cloned().ok_or_else(|| Error::config("trainable_tokens", "no embedding"));
    match &config.trainable_tokens {
        None => Ok(Vec::new()),
        Some(TokenIndices::Input(ids)) => Ok(vec![(input()?, ids.clone())]),
        Some(TokenIndices::ByModule(map)) => map
            .iter()
            .map(|(name, ids)| {
                let path = embeddings.iter().find(|p| names_module(p, name)).ok_or_else(|| Error::NoTarget {
                    key: "trainable_tokens",
                    pattern: name.clone(),
                    near_misses: near_misses(name, embeddings.iter().cloned()),
                })?;
                Ok((path.clone(), ids.clone()))
            })
            .collect(),
    }
}

/// Ranks above this are typing errors, and their factors would not fit into memory.
const MAX_RANK: usize = 1 << 16;

impl Site {
    /// The rank.
    ///
    /// # Errors
    /// If it is 0, or so large that it is a typing error.
    pub fn checked_rank(&self) -> Result<usize> {
        match self.rank {
            0 => Err(Error::config("r", format!("{}: the rank must be at least 1", self.path))),
            rank if rank > MAX_RANK => {
                Err(Error::config("r", format!("{}: rank {rank} is above {MAX_RANK}", self.path)))
            }
            rank => Ok(rank),
        }
    }

    /// Refuses an embedding, for a method called `name` that acts on products alone.
    ///
    /// # Errors
    /// If the site looks up rows.
    pub fn refuse_lookup(&self, name: &str) -> Result<()> {
        if self.lookup {
            return Err(Error::unsupported(
                format!("{name} on {}", self.path),
                "it acts on the inputs or outputs of a product, not on looked-up rows; use lora for embeddings",
            ));
        }
        Ok(())
    }
}

/// A probability of dropping inputs.
///
/// # Errors
/// If it is none below 1.
pub fn checked_dropout(dropout: f64) -> Result<f64> {
    if (0.0..1.0).contains(&dropout) {
        return Ok(dropout);
    }
    Err(Error::config("dropout", format!("{dropout} is not a probability below 1")))
}
