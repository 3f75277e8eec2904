//! The modules that models are built from, each with a place where an adapter acts.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::norm;

use crate::adapter::Adapter;
use crate::{Error, Flow, Result};

/// A small dense tensor (norm gain, bias) that stays frozen unless it is trained on purpose.
#[derive(Debug, Clone)]
pub struct Dense {
    frozen: Tensor,
    trained: Option<Tensor>,
}

impl Dense {
    /// A frozen tensor.
    pub fn new(frozen: Tensor) -> Self {
        Self { frozen, trained: None }
    }

    /// The values in use.
    pub fn get(&self) -> &Tensor {
        self.trained.as_ref().unwrap_or(&self.frozen)
    }

    /// The base model's values.
    pub fn frozen(&self) -> &Tensor {
        &self.frozen
    }

    /// Uses `trained` in place of the frozen values, or the frozen ones again.
    pub fn replace(&mut self, trained: Option<Tensor>) {
        self.trained = trained;
    }

    /// Makes the values in use the base's own (merging).
    pub fn bake(&mut self) -> Result<()> {
        if let Some(trained) = self.trained.take() {
            self.frozen = trained.detach().to_dtype(self.frozen.dtype())?;
        }
        Ok(())
    }
}

/// A frozen linear map with a place for an adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    path: String,
    base: Arc<FrozenWeight>,
    bias: Option<Dense>,
    adapter: Option<Arc<dyn Adapter>>,
    transposed_on_disk: bool,
}

impl Linear {
    /// The map of `base` [d_out, d_in] called `path`; `transposed_on_disk` where files keep [d_in, d_out] (GPT-2).
    pub fn new(
        path: impl Into<String>,
        base: FrozenWeight,
        bias: Option<Tensor>,
        transposed_on_disk: bool,
    ) -> Result<Self> {
        let path = path.into();
        if let Some(bias) = &bias
            && bias.dims() != [base.d_out()]
        {
            return Err(Error::Shape {
                tensor: format!("{path}.bias"),
                expected: vec![base.d_out()],
                found: bias.dims().to_vec(),
            });
        }
        Ok(Self { path, base: Arc::new(base), bias: bias.map(Dense::new), adapter: None, transposed_on_disk })
    }

    /// Adapted output for `x` [.., d_in] -> [.., d_out].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let y = match &self.adapter {
            Some(adapter) => adapter.forward(&self.base, x, flow)?,
            None => self.base.forward(x)?,
        };
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&bias.get().to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The frozen weight.
    pub fn base(&self) -> &Arc<FrozenWeight> {
        &self.base
    }

    /// The bias, if the map has one.
    pub fn bias(&self) -> Option<&Dense> {
        self.bias.as_ref()
    }

    /// The bias, to train it.
    pub fn bias_mut(&mut self) -> Option<&mut Dense> {
        self.bias.as_mut()
    }

    /// The adapter that acts now.
    pub fn adapter(&self) -> Option<&Arc<dyn Adapter>> {
        self.adapter.as_ref()
    }

    /// Puts an adapter in the slot, or empties it.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// Replaces the frozen weight (merging and unmerging).
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_base(&mut self, base: Arc<FrozenWeight>) -> Result<()> {
        if (base.d_out(), base.d_in()) != (self.base.d_out(), self.base.d_in()) {
            return Err(Error::Shape {
                tensor: format!("{}.weight", self.path),
                expected: vec![self.base.d_out(), self.base.d_in()],
                found: vec![base.d_out(), base.d_in()],
            });
        }
        self.base = base;
        Ok(())
    }

    /// Whether files keep the weight as [d_in, d_out].
    pub fn transposed_on_disk(&self) -> bool {
        self.transposed_on_disk
    }
}

/// Rows of an embedding that are trained in place of the frozen ones.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// Token ids, in the order of the rows.
    pub indices: Vec<u32>,
    /// Rows [n, width].
    pub values: Tensor,
}

/// A frozen table of token vectors with a place for an adapter, trained rows, or a trained table.
#[derive(Debug, Clone)]
pub struct Embedding {
    path: String,
    weight: Dense,
    base: Arc<FrozenWeight>,
    adapter: Option<Arc<dyn Adapter>>,
    rows: Option<TokenRows>,
    tied_training: bool,
}

impl Embedding {
    /// The table `weight` [vocabulary, width] called `path`.
    pub fn new(path: impl Into<String>, weight: Tensor) -> Result<Self> {
        let base = Arc::new(FrozenWeight::dense(weight.clone())?);
        Ok(Self { path: path.into(), weight: Dense::new(weight), base, adapter: None, rows: None, tied_training: true })
    }

    /// Vectors of `ids` [..] (u32) -> [.., width].
    ///
    /// # Errors
    /// If an id is outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let shape = ids.dims().to_vec();
        let flat = ids.flatten_all()?;
        let weight = self.weight.get();
        let mut out = weight.index_select(&flat, 0)?;
        if let Some(adapter) = &self.adapter {
            let view = adapter.low_rank(&self.base)?.filter(|v| v.gain.is_none() && v.residual.is_none());
            let Some(view) = view else {
                return Err(Error::unsupported(&self.path, "an embedding takes only a low-rank product as its adapter"));
            };
            let inner = view.a.t()?.contiguous()?.index_select(&flat, 0)?;
            let inner = match view.rank_scale {
                Some(c) => inner.broadcast_mul(c)?,
                None => inner,
            };
            let change = (inner.matmul(&view.b.t()?)? * view.scale)?;
            out = (out.to_dtype(change.dtype())? + change)?.to_dtype(out.dtype())?;
        }
        if let Some(rows) = &self.rows {
            out = replace_rows(&out, &flat, rows)?;
        }
        let mut dims = shape;
        dims.push(out.dim(D::Minus1)?);
        Ok(out.reshape(dims)?)
    }

    /// Scores of `hidden` [n, width] against every token -> [n, vocabulary]: the output head of tied models. Trained
    /// rows act here too, and a trained table where [`Self::set_tied_training`] says so; a low-rank adapter does not, as
    /// in PEFT.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn scores(&self, hidden: &Tensor) -> Result<Tensor> {
        let trained = self.weight.trained.as_ref().filter(|_| self.tied_training);
        let out = match trained {
            Some(weight) => hidden.to_dtype(weight.dtype())?.matmul(&weight.t()?)?,
            None => self.base.forward(hidden)?,
        };
        let Some(rows) = &self.rows else { return Ok(out) };
        let index = Tensor::new(rows.indices.as_slice(), out.device())?;
        let frozen = self.weight.frozen.index_select(&index, 0)?.to_dtype(rows.values.dtype())?;
        let shift = (&rows.values - frozen)?;
        let change = hidden.to_dtype(shift.dtype())?.matmul(&shift.t()?)?;
        Ok(out.to_dtype(change.dtype())?.contiguous()?.index_add(&index, &change, 1)?)
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The table as the linear map from one-hot tokens would be its transpose; this is the table [vocabulary, width].
    pub fn weight(&self) -> &Dense {
        &self.weight
    }

    /// The table, to train it.
    pub fn weight_mut(&mut self) -> &mut Dense {
        &mut self.weight
    }

    /// The table as a frozen map [vocabulary, width] (the output head of tied models).
    pub fn base(&self) -> &Arc<FrozenWeight> {
        &self.base
    }

    /// Puts an adapter in the slot, or empties it.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// The adapter that acts now.
    pub fn adapter(&self) -> Option<&Arc<dyn Adapter>> {
        self.adapter.as_ref()
    }

    /// Uses trained rows in place of the frozen ones, or none.
    pub fn set_rows(&mut self, rows: Option<TokenRows>) {
        self.rows = rows;
    }

    /// Whether a trained table also serves as the output head of a tied model (PEFT's default keeps the frozen one there).
    pub fn set_tied_training(&mut self, tied: bool) {
        self.tied_training = tied;
    }

    /// Whether anything acts on the table.
    pub fn is_changed(&self) -> bool {
        self.adapter.is_some() || self.rows.is_some() || self.weight.trained.is_some()
    }

    /// Whether everything that acts on the table acts on the output head of a tied model as well.
    pub fn change_reaches_head(&self) -> bool {
        self.adapter.is_none() && (self.weight.trained.is_none() || self.tied_training)
    }

    /// The table with everything that acts on it written in, in the table's dtype.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn effective(&self) -> Result<Tensor> {
        let dtype = self.weight.frozen.dtype();
        let mut table = self.weight.get().detach().to_dtype(DType::F32)?;
        if let Some(view) = self.adapter.as_ref().map(|a| a.low_rank(&self.base)).transpose()?.flatten() {
            table = (table + view.dense_product(DType::F32)?.t()?)?;
        }
        if let Some(rows) = &self.rows {
            let index = Tensor::new(rows.indices.as_slice(), table.device())?;
            let values = rows.values.detach().to_dtype(DType::F32)?;
            let shift = (values - table.index_select(&index, 0)?)?;
            table = table.contiguous()?.index_add(&index, &shift, 0)?;
        }
        Ok(table.to_dtype(dtype)?)
    }

    /// Replaces the frozen table (merging).
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_table(&mut self, table: Tensor) -> Result<()> {
        if table.dims() != self.weight.frozen.dims() {
            return Err(Error::Shape {
                tensor: format!("{}.weight", self.path),
                expected: self.weight.frozen.dims().to_vec(),
                found: table.dims().to_vec(),
            });
        }
        self.base = Arc::new(FrozenWeight::dense(table.clone())?);
        self.weight = Dense::new(table);
        Ok(())
    }
}

/// `out` [n, width] with the rows of trained tokens in place of the frozen ones.
fn replace_rows(out: &Tensor, flat: &Tensor, rows: &TokenRows) -> Result<Tensor> {
    let ids = flat.to_vec1::<u32>()?;
    let place = |id: &u32| rows.indices.iter().position(|i| i == id);
    if !ids.iter().any(|id| place(id).is_some()) {
        return Ok(out.clone());
    }
    let picks: Vec<u32> = ids.iter().map(|id| place(id).unwrap_or(0) as u32).collect();
    let mask: Vec<u8> = ids.iter().map(|id| u8::from(place(id).is_some())).collect();
    let device = out.device();
    let values = rows.values.index_select(&Tensor::from_vec(picks, flat.dims(), device)?, 0)?;
    let mask = Tensor::from_vec(mask, (ids.len(), 1), device)?.broadcast_as(out.shape())?.contiguous()?;
    let frozen = out.to_dtype(values.dtype())?;
    Ok(mask.where_cond(&values, &frozen)?.to_dtype(out.dtype())?)
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    path: String,
    kind: NormKind,
    weight: Dense,
    bias: Option<Dense>,
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// x / rms(x) * (offset + w).
    Rms {
        /// Added to the variance.
        eps: f64,
        /// Added to the gain (1 in Gemma).
        offset: f64,
    },
    /// (x - mean) / std * w + b.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

impl Norm {
    /// The normalisation called `path` with gain `weight` [n] and, for layer norms, `bias` [n].
    pub fn new(path: impl Into<String>, kind: NormKind, weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { path: path.into(), kind, weight: Dense::new(weight), bias: bias.map(Dense::new) }
    }

    /// Normalised `x` [.., n].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.kind {
            NormKind::Rms { eps, offset } => norm::rms_norm(x, self.weight.get(), eps, offset)?,
            NormKind::Layer { eps } => norm::layer_norm(x, self.weight.get(), self.bias.as_ref().map(Dense::get), eps)?,
        })
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The gain.
    pub fn weight(&self) -> &Dense {
        &self.weight
    }

    /// The gain, to train it.
    pub fn weight_mut(&mut self) -> &mut Dense {
        &mut self.weight
    }

    /// The shift.
    pub fn bias(&self) -> Option<&Dense> {
        self.bias.as_ref()
    }

    /// The shift, to train it.
    pub fn bias_mut(&mut self) -> Option<&mut Dense> {
        self.bias.as_mut()
    }
}

/// A module of a model, on a walk over all of them.
#[derive(Debug)]
pub enum ModuleMut<'a> {
    /// A linear map.
    Linear(&'a mut Linear),
    /// A token table.
    Embedding(&'a mut Embedding),
    /// A normalisation.
    Norm(&'a mut Norm),
}

impl ModuleMut<'_> {
    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        match self {
            Self::Linear(m) => m.path(),
            Self::Embedding(m) => m.path(),
            Self::Norm(m) => m.path(),
        }
    }
}

/// A model seen as a sequence of modules: all that adapters know of it.
pub trait Host {
    /// Calls `visit` on every module in a fixed order.
    ///
    /// # Errors
    /// The first error of `visit`.
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()>;

    /// Paths of the output head (excluded from `all-linear`), in the base model's naming.
    fn head_paths(&self) -> Vec<String>;

    /// Content hash of the base weights as they were loaded.
    ///
    /// # Errors
    /// If the weights cannot be read.
    fn base_hash(&self) -> Result<String>;
}
