//! Whether what was written scores as what it was made from: a probe, the scores of two models on it, and what lies between.
//!
//! The probe is data of the user's, or rows made here: the token rows that the adapters train, a text, and drawn tokens. Scores
//! that are not numbers differ by infinity.

use candle_core::{DType, Device, Tensor};
use espalier_adapters::formats::piecewise::Piecewise;
use espalier_adapters::{Flow, random};
use espalier_data::{Example, IGNORE, TextCodec};
use espalier_models::{Model, ModelConfig, Stage, Streamed, TokenBatch};
use rand::Rng;
use serde::Serialize;

use crate::{Error, Result};

/// Most scores of a probe that are held at once, in values.
const SCORES: usize = 1 << 25;
/// Most tokens of a row made here.
const ROW: usize = 32;
/// English that is in no way special.
const TEXT: &str = "The old bridge over the river was closed for the winter, so we walked along the bank until we came to \
the mill. \"Have you ever seen it frozen?\" she asked. In 1987, he said, the ice was 30 cm thick, and children crossed it \
on their way to school. Nobody had written that down; it was remembered, as most things are, by those who were there.";

/// Rows of token ids to compare models on.
#[derive(Debug, Clone)]
pub struct Probe {
    rows: Vec<Example>,
    /// What the rows are, in words.
    pub about: String,
}

impl Probe {
    /// Rows of data, as many as there is room for; `name` says what they are.
    ///
    /// # Errors
    /// If no row is left.
    pub fn of_examples(config: &ModelConfig, examples: Vec<Example>, name: &str) -> Result<Self> {
        let given = examples.len();
        let mut probe = Self::cut(config, examples)?;
        probe.about = format!("{} of {given} rows of {name}, {} tokens", probe.rows.len(), probe.tokens());
        Ok(probe)
    }

    /// Rows made here: the tokens whose rows are `trained`, a text where there is a tokenizer, and drawn tokens.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn made(config: &ModelConfig, codec: &TextCodec, trained: &[u32]) -> Result<Self> {
        let (vocab, longest) = (config.vocab as u32, ROW.min(config.max_positions).max(2));
        let mut rng = random::stream(0, "probe");
        let mut drawn = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..vocab)).collect() };
        let unlabelled =
            |ids: Vec<u32>| Example { labels: vec![IGNORE; ids.len()], input_ids: ids, ..Example::default() };
        // Each trained token beside a drawn one, so that rows differ from each other.
        let mixed: Vec<u32> = trained.iter().zip(drawn(trained.len())).flat_map(|(t, other)| [other, *t]).collect();
        let mut rows: Vec<Example> = mixed.chunks(longest).map(|ids| unlabelled(ids.to_vec())).collect();
        let mut about = Vec::new();
        if !trained.is_empty() {
            about.push(format!("{} trained tokens", trained.len()));
        }
        if codec.tokenizer().is_some() {
            let ids = codec.encode_text(TEXT, true).map_err(|e| Error::recipe("probe", e.to_string()))?;
            about.push(format!("a text of {} tokens", ids.len()));
            rows.extend(ids.chunks(config.max_positions.clamp(2, 4 * ROW)).map(|ids| Example {
                input_ids: ids.to_vec(),
                labels: ids.iter().map(|id| *id as i32).collect(),
                ..Example::default()
            }));
        }
        let labelled = rows.iter().any(|row| row.trained_tokens() > 0);
        for _ in 0..2 {
            let mut row = unlabelled(drawn(longest));
            if !labelled {
                row.labels = row.input_ids.iter().map(|id| *id as i32).collect();
            }
            rows.push(row);
        }
        about.push(format!("{} drawn tokens", 2 * longest));
        let given = rows.len();
        let mut probe = Self::cut(config, rows)?;
        probe.about = about.join(", ");
        if probe.rows.len() < given {
            probe.about = format!("{} of {given} rows of: {}", probe.rows.len(), probe.about);
        }
        Ok(probe)
    }

    fn cut(config: &ModelConfig, examples: Vec<Example>) -> Result<Self> {
        let width = config.labels().unwrap_or(config.vocab).max(1);
        let (mut left, mut rows) = ((SCORES / width).max(1), Vec::new());
        for row in examples {
            let positions = if config.labels().is_some() { 1 } else { row.input_ids.len() };
            if row.input_ids.is_empty() || (positions > left && !rows.is_empty()) {
                continue;
            }
            left = left.saturating_sub(positions);
            rows.push(row);
        }
        match rows.is_empty() {
            true => Err(Error::recipe("probe", "no row to compare scores on")),
            false => Ok(Self { rows, about: String::new() }),
        }
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.input_ids.len()).sum()
    }

    /// Scores of each row [t, vocabulary], or [1, labels], in f32 on the CPU.
    ///
    /// # Errors
    /// If a row does not fit the model.
    pub fn scores(&self, model: &Model) -> Result<Vec<Tensor>> {
        let classes = model.config().labels().is_some();
        self.rows
            .iter()
            .map(|row| {
                let input = TokenBatch::new(row.input_ids.clone(), 1, row.input_ids.len())?;
                let scores = model.forward(&input, &Flow::eval())?.detach().to_dtype(DType::F32)?;
                Ok(if classes { scores } else { scores.squeeze(0)? }.to_device(&Device::Cpu)?)
            })
            .collect()
    }

    /// The same of a model whose weights stay in their files, and with `adapters` on it: part by part, so that no more than a part
    /// is in memory.
    ///
    /// # Errors
    /// If a row does not fit the model, a weight cannot be read, or an adapter does not fit.
    pub fn sides(&self, model: &mut Streamed, adapters: &Piecewise) -> Result<Sides> {
        let flow = Flow::eval();
        let classes = model.config().labels().is_some();
        let inputs = self.rows.iter().map(|row| TokenBatch::new(row.input_ids.clone(), 1, row.input_ids.len()));
        let inputs = inputs.collect::<espalier_models::Result<Vec<_>>>()?;
        // Vectors after the last stage, of each row without adapters and with them.
        let mut vectors: [Vec<Tensor>; 2] = Default::default();
        model.stages(adapters, &mut |model, stage, adapted| -> Result<()> {
            let side = &mut vectors[usize::from(adapted)];
            for (i, input) in inputs.iter().enumerate() {
                let next = match stage {
                    Stage::Embed => model.begin(input, &flow)?.x.detach(),
                    Stage::Block(index) => model.block(index, &side[i], &model.context(input)?, &flow, None)?.detach(),
                    Stage::Output => {
                        let scores = model.outputs(&model.finish(&side[i])?, &flow)?.detach().to_dtype(DType::F32)?;
                        if classes { scores } else { scores.squeeze(0)? }.to_device(&Device::Cpu)?
                    }
                };
                match stage {
                    Stage::Embed => side.push(next),
                    _ => side[i] = next,
                }
            }
            Ok(())
        })?;
        let [base, adapted] = vectors;
        Ok(Sides { base, adapted })
    }

    /// Mean loss of the labelled tokens, or labels, under scores of every row; in nats.
    ///
    /// # Errors
    /// If the scores are of another shape.
    pub fn loss(&self, scores: &[Tensor]) -> Result<f64> {
        Ok(self.compare(scores, scores)?.loss_reference)
    }

    /// What lies between the scores of a reference and those `found`.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn compare(&self, reference: &[Tensor], found: &[Tensor]) -> Result<Comparison> {
        let mut all = Comparison::default();
        let (mut agree, mut losses) = (0usize, (0.0, 0.0));
        for ((row, a), b) in self.rows.iter().zip(reference).zip(found) {
            if a.dims() != b.dims() {
                let what = format!("scores of shape {:?} became {:?}", a.dims(), b.dims());
                return Err(Error::recipe("probe", what));
            }
            let (a, b) = (a.to_vec2::<f32>()?, b.to_vec2::<f32>()?);
            for (place, (a, b)) in a.iter().zip(&b).enumerate() {
                for (x, y) in a.iter().zip(b) {
                    let d = f64::from((x - y).abs());
                    all.max_difference = if d >= 0.0 { all.max_difference.max(d) } else { f64::INFINITY };
                }
                agree += usize::from(best(a) == best(b));
                all.positions += 1;
                let wanted = match row.class {
                    Some(class) => Some(class as usize),
                    None if a.len() == 1 || (place == 0 && row.labels.is_empty()) => None,
                    None => row.labels.get(place + 1).and_then(|l| usize::try_from(*l).ok()),
                };
                if let Some(wanted) = wanted.filter(|w| *w < a.len()) {
                    losses.0 += loss(a, wanted);
                    losses.1 += loss(b, wanted);
                    all.tokens += 1;
                }
            }
        }
        all.top1_agreement = agree as f64 / all.positions.max(1) as f64;
        all.loss_reference = losses.0 / all.tokens.max(1) as f64;
        all.loss_found = losses.1 / all.tokens.max(1) as f64;
        all.loss_difference = all.loss_found - all.loss_reference;
        Ok(all)
    }
}

/// Scores of a base, and of the same base with adapters.
#[derive(Debug)]
pub struct Sides {
    /// Of each row, without adapters.
    pub base: Vec<Tensor>,
    /// Of each row, with them; none where there are none.
    pub adapted: Vec<Tensor>,
}

/// What lies between two sets of scores.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Largest difference of scores; infinite where one is no number.
    pub max_difference: f64,
    /// Share of positions whose best score is the same token's or label's.
    pub top1_agreement: f64,
    /// Mean loss of the labelled tokens under the reference, in nats.
    pub loss_reference: f64,
    /// The same under what is compared.
    pub loss_found: f64,
    /// The second less the first.
    pub loss_difference: f64,
    /// Positions compared.
    pub positions: usize,
    /// Tokens, or labels, that the losses are of.
    pub tokens: usize,
}

impl Comparison {
    /// Why scores are too far apart for `limit`, if they are.
    pub fn fault(&self, limit: f64) -> Option<String> {
        let within = self.max_difference <= limit && self.loss_difference.is_finite();
        (!within).then(|| format!("scores differ by {:.3e}, more than {limit:.1e}", self.max_difference))
    }

    /// The figures under names for people.
    pub fn facts(&self, probe: &Probe, limit: f64) -> Vec<(String, String)> {
        let unit = if self.tokens == 1 { "token" } else { "tokens" };
        vec![
            ("Compared on".into(), format!("{} ({} positions)", probe.about, self.positions)),
            ("Largest difference of scores".into(), format!("{:.3e} (limit {limit:.1e})", self.max_difference)),
            ("Same best score".into(), format!("{:.2} % of positions", 100.0 * self.top1_agreement)),
            (
                "Mean loss".into(),
                format!(
                    "{:.5} -> {:.5} ({:+.2e}) over {} {unit}",
                    self.loss_reference, self.loss_found, self.loss_difference, self.tokens
                ),
            ),
        ]
    }
}

fn best(scores: &[f32]) -> Option<usize> {
    (0..scores.len()).max_by(|x, y| scores[*x].total_cmp(&scores[*y]).then(y.cmp(x)))
}

/// -ln of the share of `wanted` in the softmax of `scores`, in nats.
fn loss(scores: &[f32], wanted: usize) -> f64 {
    let top = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(f64::from(*s)));
    let sum: f64 = scores.iter().map(|s| (f64::from(*s) - top).exp()).sum();
    top + sum.ln() - f64::from(scores[wanted])
}
