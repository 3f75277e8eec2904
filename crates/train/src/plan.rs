//! What a run will do, before it does it: sites, ranks, pattern counts, memory, rows and their trained tokens.

use espalier_data::{TextCodec, TokenView, describe_example};
use serde::Serialize;

use crate::Result;
use crate::memory::{self, Estimate};
use crate::trainer::Run;

/// An adapted module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SitePlan {
    /// Module path.
    pub path: String,
    /// Rank; 0 for methods without one.
    pub rank: usize,
    /// Scaling numerator.
    pub alpha: f64,
    /// Trainable values.
    pub parameters: usize,
}

/// Rows of one source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourcePlan {
    /// File or folder.
    pub path: String,
    /// What became of its rows.
    pub report: espalier_data::Report,
}

/// A row token by token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowView {
    /// File and line.
    pub place: String,
    /// Its tokens.
    pub tokens: Vec<TokenView>,
}

/// A run before it runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Family of the model.
    pub family: String,
    /// Values of the base.
    pub base_parameters: usize,
    /// Device.
    pub device: String,
    /// Dtype of activations.
    pub dtype: String,
    /// Storage of the frozen matrices and how many have it.
    pub storage: std::collections::BTreeMap<String, usize>,
    /// What must be said of the adapter's base, where it was loaded and is not known to fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_note: Option<String>,
    /// Method of the adapter.
    pub method: String,
    /// How the parameters move.
    pub dynamics: &'static str,
    /// Adapted modules.
    pub sites: Vec<SitePlan>,
    /// Patterns and how many modules each matched.
    pub patterns: Vec<(String, usize)>,
    /// Dense tensors trained beside the adapter.
    pub dense: Vec<String>,
    /// Trainable values altogether.
    pub trainable_parameters: usize,
    /// Training sources.
    pub data: Vec<SourcePlan>,
    /// Evaluation sources.
    pub eval_data: Vec<SourcePlan>,
    /// Share of tokens that are trained on.
    pub trained_share: f64,
    /// Steps.
    pub steps: usize,
    /// Estimated peak memory.
    pub memory: Estimate,
    /// The first rows.
    pub rows: Vec<RowView>,
}

impl Run {
    /// Describes the run, with the first `rows` rows token by token.
    ///
    /// # Errors
    /// If a row cannot be read back.
    pub fn plan(&mut self, rows: usize) -> Result<Plan> {
        use espalier_adapters::{Host, ModuleMut};
        let attached = self.adapters.get(&self.name)?;
        let dynamics = self.recipe.dynamics_config()?.name();
        let own = |path: &str| -> usize {
            let inside = |n: &str| n.strip_prefix(path).is_some_and(|r| r.starts_with('.'));
            attached.parameters.trainable().filter(|p| inside(&p.name)).map(|p| p.tensor.elem_count()).sum()
        };
        let sites = attached
            .placement
            .sites
            .iter()
            .map(|s| SitePlan { path: s.path.clone(), rank: s.rank, alpha: s.alpha, parameters: own(&s.path) })
            .collect();
        let patterns = attached.placement.counts.clone();
        let mut dense: Vec<String> = attached.dense.iter().map(|d| format!("{}.{}", d.path, d.part)).collect();
        dense
            .extend(attached.rows.iter().map(|(path, rows)| format!("{path} (rows of {} tokens)", rows.indices.len())));
        let virtual_tokens = attached.prompt.as_ref().map(|prompt| prompt.virtual_tokens());
        dense.extend(virtual_tokens.map(|n| format!("{n} virtual tokens before each sequence")));
        let method = attached.config.method.name().to_owned();
        let (base, path) = ((attached.base, &attached.config), self.model.provenance().path());
        let base_note = crate::setup::base_note(base, self.model.config(), path, &self.recipe.model);
        let trainable_parameters = attached.parameters.trainable_count();
        let mut storage = std::collections::BTreeMap::new();
        let mut base_parameters = 0;
        self.model.walk(&mut |module| {
            match module {
                ModuleMut::Linear(l) => {
                    *storage.entry(l.base().dtype_name()).or_insert(0) += 1;
                    base_parameters += l.base().d_in() * l.base().d_out();
                    base_parameters += l.bias().map_or(0, |b| b.frozen().elem_count());
                }
                ModuleMut::Embedding(e) => base_parameters += e.weight().frozen().elem_count(),
                ModuleMut::Norm(n) => base_parameters += n.weight().frozen().elem_count(),
            }
            Ok(())
        })?;
        let source = |(path, report): &(String, espalier_data::Report)| SourcePlan {
            path: path.clone(),
            report: report.clone(),
        };
        let data: Vec<SourcePlan> = self.data.reports.iter().map(source).collect();
        let (tokens, trained) =
            data.iter().fold((0, 0), |(t, l), s| (t + s.report.tokens, l + s.report.trained_tokens));
        let memory = memory::estimate(self)?;
        Ok(Plan {
            family: self.model.config().family.clone(),
            base_parameters,
            device: format!("{:?}", self.model.device().location()),
            dtype: format!("{:?}", self.model.dtype()).to_lowercase(),
            storage,
            base_note,
            method,
            dynamics,
            sites,
            patterns,
            dense,
            trainable_parameters,
            eval_data: self.data.eval_reports.iter().map(source).collect(),
            data,
            trained_share: if tokens == 0 { 0.0 } else { trained as f64 / tokens as f64 },
            steps: self.total_steps()?,
            memory,
            rows: first_rows(self, rows)?,
        })
    }
}

fn first_rows(run: &Run, count: usize) -> Result<Vec<RowView>> {
    let mut views = Vec::new();
    let codec: &TextCodec = &run.codec;
    for store in &run.data.stores {
        for i in 0..store.len().min(count - views.len().min(count)) {
            let row = store.get(i)?;
            let place = format!("{}:{}", row.file.display(), row.line);
            views.push(RowView { place, tokens: describe_example(codec, &row.to_example()) });
        }
    }
    Ok(views)
}
