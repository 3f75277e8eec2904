//! The one abstraction: how a frozen linear map is adapted, and how a method makes such an adapter.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::auxiliary::Auxiliary;
use crate::by_row::ByRow;
use crate::formats::peft_config::{self, PeftNames};
pub use crate::init::{Evidence, EvidenceKind, Init, Shared, Source, Wanted};
use crate::low_rank::LowRankView;
use crate::parameter::ParameterMap;
use crate::parametrisation::MethodConfig;
use crate::prompt::{PromptShape, Prompter};
pub use crate::sites::checked_dropout;
use crate::{Error, Flow, Result};

/// How one frozen linear map is adapted. One implementation per file under `parametrisation/` or `routing/`.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// Adapted output for `x` [.., d_in], without the layer's bias. Most methods add to `base.forward(x)`; weight-space
    /// methods replace it.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        match self.low_rank_in(base, flow)? {
            Some(view) => view.forward(base, x, None),
            None => Err(Error::unsupported("forward", "a method without a low-rank form must define it")),
        }
    }

    /// ΔW [d_out, d_in] in f32, or None where the change depends on the input (routers, gates).
    ///
    /// # Errors
    /// If shapes do not fit.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        self.low_rank(base)?.map(|view| view.delta(base)).transpose()
    }

    /// Change of the vectors [n, width] of the tokens `ids` `[n]` where the map is an embedding; None for methods that are no
    /// plain low-rank product.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn lookup(&self, base: &Arc<FrozenWeight>, ids: &Tensor) -> Result<Option<Tensor>> {
        let view = self.low_rank(base)?.filter(|v| v.gain.is_none() && v.residual.is_none());
        view.map(|view| view.lookup(ids)).transpose()
    }

    /// Factors `[d_out]` on the map's bias, for methods that scale whole outputs; None where the bias stays as it is.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn bias_gain(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Named parameters, trainable or frozen, in the on-disk naming of the method.
    fn parameters(&self) -> ParameterMap;

    /// The method in the low-rank normal form, where it is one; lets models share one fused product between projections
    /// and batches of many adapters without any model or method being named.
    ///
    /// # Errors
    /// If a derived gain cannot be computed.
    fn low_rank(&self, base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        let _ = base;
        Ok(None)
    }

    /// The change of the outputs `rows` alone: an adapter of the map that those rows of the base are. None where an output's weights
    /// change with more than their own row, or are no weights; a merge then needs the matrix as a whole.
    ///
    /// # Errors
    /// If there are no such rows.
    fn rows(&self, rows: Range<usize>) -> Result<Option<Arc<dyn Adapter>>> {
        let _ = rows;
        Ok(None)
    }

    /// The normal form of one pass: as [`Self::low_rank`], unless what travels beside the activations changes it.
    ///
    /// # Errors
    /// As [`Self::low_rank`].
    fn low_rank_in(&self, base: &Arc<FrozenWeight>, flow: &Flow) -> Result<Option<LowRankView>> {
        let _ = flow;
        self.low_rank(base)
    }

    /// The parameters in a form that needs no changed base, where [`Self::parameters`] is not: what [`Method::portable`]
    /// describes.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn portable(&self) -> Result<Option<ParameterMap>> {
        Ok(None)
    }

    /// Whether first parts of the product work by themselves.
    fn is_nested(&self) -> bool {
        false
    }

    /// The first `rank` components as a product of their own, where they work by themselves; what [`Method::cut`] describes.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn cut(&self, rank: usize) -> Result<Option<Cut>> {
        let _ = rank;
        Ok(None)
    }

    /// What the layer asks of its own parameters, beside what the objective measures.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn penalty(&self) -> Result<Option<Auxiliary>> {
        Ok(None)
    }

    /// The choice that this is, where each sequence of a batch goes through an adapter of its own.
    fn by_row(&self) -> Option<&ByRow> {
        None
    }

    /// What of the forward pass the gradients leave out on purpose, and why: [`Self::low_rank`] has it as a gain over norms. None
    /// where gradients are the derivatives.
    fn holds(&self) -> Option<&'static str> {
        None
    }

    /// Dropout probability on the input of the product while training; 0 lets fused paths be taken.
    fn dropout(&self) -> f64 {
        0.0
    }
}

/// The first components of a layer.
#[derive(Debug, Clone)]
pub struct Cut {
    /// Their number.
    pub rank: usize,
    /// Their parameters.
    pub parameters: ParameterMap,
}

/// Makes the layers of one method: one implementation per file. Its settings are its fields, in recipes and in files.
pub trait Method: Clone + Default + Serialize + DeserializeOwned {
    /// What acts at one site.
    type Layer: Adapter + 'static;

    /// What PEFT calls the method and its settings; None where PEFT lacks it.
    const PEFT: Option<PeftNames> = None;

    /// Endings of the names that the method's tensors have in files.
    const TENSORS: &'static [&'static str] = &[];

    /// Looks at the paths of all sites before the first layer is made, for settings that name modules.
    ///
    /// # Errors
    /// If such a setting names none of them.
    fn check_sites(&self, paths: &[&str]) -> Result<()> {
        let _ = paths;
        Ok(())
    }

    /// Makes the layer for `site`; every tensor comes from `init`, which draws it (a new adapter) or takes it from a file
    /// (a saved one), so that one code path serves both.
    ///
    /// # Errors
    /// If the settings do not fit the site or the file's tensors do not have the shapes asked for; if the method has no layers
    /// ([`Self::reach`]).
    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<Self::Layer> {
        let _ = init;
        Err(Error::unsupported(format!("a layer at {}", site.path), "the method acts on no linear map"))
    }

    /// What the method acts on, of the modules that its targets name.
    fn reach(&self) -> Reach<'_> {
        Reach::Maps
    }

    /// Makes what stands before the sequences, for methods of [`Reach::Sequence`].
    ///
    /// # Errors
    /// If the settings do not fit the model, or the file's tensors do not have the shapes asked for.
    fn prompter(&self, site: &PromptSite<'_>, init: &mut Init<'_>) -> Result<Arc<dyn Prompter>> {
        let (_, _) = (site, init);
        Err(Error::unsupported("something before the sequences", "the method makes none"))
    }

    /// The settings with the model's sizes filled in, for methods that keep them.
    ///
    /// # Errors
    /// If sizes were given that are not the model's.
    fn fitted(&self, shape: &PromptShape) -> Result<Self> {
        let _ = shape;
        Ok(self.clone())
    }

    /// How many places of a sequence the method takes for what stands before it.
    fn virtual_tokens(&self) -> usize {
        0
    }

    /// The sizes of the model that the settings are for, where they say so.
    fn prompt_shape(&self) -> Option<PromptShape> {
        None
    }

    /// Whether a run of `steps` steps trains the method as its settings say.
    ///
    /// # Errors
    /// If it does not.
    fn check_schedule(&self, steps: usize) -> Result<()> {
        let _ = steps;
        Ok(())
    }

    /// What the method cannot do, each with the reason.
    fn exceptions() -> &'static [(Property, &'static str)] {
        &[]
    }

    /// What must be known of the data before a new adapter can be made.
    fn wanted(&self) -> Option<Wanted> {
        None
    }

    /// The tensors that a new layer at `site` starts with, by their names there, from what is known of the data.
    ///
    /// # Errors
    /// If the evidence has another shape, or a decomposition fails.
    fn starts(&self, site: &Site, evidence: &Evidence<'_>) -> Result<Vec<(String, Tensor)>> {
        let _ = evidence;
        Err(Error::unsupported(format!("evidence for {}", site.path), "the method takes none"))
    }

    /// Rank and scaling numerator of this method before patterns: (r, alpha). Methods without a rank return (0, 0).
    fn rank_and_alpha(&self) -> (usize, f64) {
        (0, 0.0)
    }

    /// The method that [`Adapter::portable`] parameters belong to, with the factors on ranks and alphas; None where saved
    /// parameters need no changed base anyway.
    fn portable(&self) -> Option<(Self, usize, f64)> {
        None
    }

    /// The method of what [`Adapter::cut`] gives; None for methods whose products are not nested.
    fn cut(&self, rank: usize) -> Option<MethodConfig> {
        let _ = rank;
        None
    }

    /// Settings to try the method with, by name: at least as it comes, and one of each way in which it can be set up. What is
    /// promised of every method is tried with each of them.
    fn examples() -> Vec<(String, Self)> {
        vec![("as it comes".to_owned(), Self::default())]
    }

    /// Takes from the tensors of a file what its settings do not say: nothing, for nearly all methods.
    fn settle(&mut self, tensors: &BTreeMap<String, Tensor>) {
        let _ = tensors;
    }

    /// Whether an adapter so set up changes nothing before it is trained.
    fn starts_at_base(&self) -> bool {
        true
    }

    /// The method's settings as keys of PEFT's `adapter_config.json`, with `peft_type`; None where PEFT lacks it.
    fn to_peft(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        Self::PEFT.and_then(|names| peft_config::settings_to_keys(self, &names))
    }

    /// Reads the method from PEFT's keys, removing those it used; None if the file is of another method.
    ///
    /// # Errors
    /// If a key has a value this method does not know.
    fn from_peft(keys: &mut serde_json::Map<String, serde_json::Value>) -> Result<Option<Self>> {
        match Self::PEFT {
            Some(names) => peft_config::settings_from_keys(keys, &names),
            None => Ok(None),
        }
    }
}

/// What a method acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach<'a> {
    /// Linear maps and embeddings, each through a layer of its own ([`Method::attach`]).
    Maps,
    /// Modules of every kind, norms first of all: each is trained whole in place of the frozen one.
    Whole,
    /// Rows of token tables.
    Rows {
        /// The tokens.
        tokens: &'a [u32],
        /// Whether the rows start as the base's, or drawn.
        copied: bool,
    },
    /// No module: what stands before every sequence ([`Method::prompter`]).
    Sequence,
}

/// Where what stands before the sequences is made.
#[derive(Debug)]
pub struct PromptSite<'a> {
    /// The model's sizes.
    pub shape: &'a PromptShape,
    /// The table of its tokens [vocabulary, width].
    pub table: &'a Tensor,
}

/// Something that every method can do unless it says why it cannot. What is promised of all methods is tried with each, and of
/// one with an exception it is tried that it refuses, with that reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// Its change can be written into the base's weights.
    Merge,
    /// It acts on encoders.
    Encoders,
}

/// The layer of a method that acts on no linear map: there is none.
#[derive(Debug, Clone, Copy)]
pub enum NoLayer {}

impl Adapter for NoLayer {
    fn parameters(&self) -> ParameterMap {
        match *self {}
    }
}

/// Where a layer is made: one frozen map and the rank that placement gave it.
#[derive(Debug, Clone)]
pub struct Site {
    /// Module path in the base model's own naming.
    pub path: String,
    /// Output width.
    pub d_out: usize,
    /// Input width.
    pub d_in: usize,
    /// Rank after rank patterns.
    pub rank: usize,
    /// Scaling numerator after alpha patterns.
    pub alpha: f64,
    /// The frozen weight [d_out, d_in]; an embedding is the map from one-hot tokens, [width, vocabulary].
    pub base: Arc<FrozenWeight>,
    /// Whether the module looks up rows (an embedding) instead of multiplying.
    pub lookup: bool,
    /// Device of the parameters.
    pub device: Device,
}
