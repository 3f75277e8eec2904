//! examples of one packed row do not see each other.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::{attach_from_data};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig, ParameterMap};
use espalier_data::Batch;
use espalier_models::{LoadOptions, Model};
use espalier_train::objective::Targets;
use espalier_train::tape::{self, Gradients, Start};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::golden::{self, listed, name_of};
use crate::subject::{self, acting};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-16",
    title: "Packed examples stay apart",
    claim: "Where the tokens of one example of a packed batch change, no logit of another one changes a bit, nor any \
            gradient of a loss on the other one's tokens: on the CPU in f32, through the trainer's own pass. Every decoder \
            of `parity/golden/families`, every method's first example with its parameters off their start, random lengths \
            (1 to 9 tokens, two rows of two to five examples, some padding). The changed example's own logits change.",
    unit: "pairs of examples that saw each other",
    bar: 0.0,
    bounded: 250,
    full: 5000,
    run,
};

/// Most tokens of an example.
const LONGEST: usize = 9;

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut families = Vec::new();
    for family in listed(&golden::folder().join("families"))? {
        if Model::load(&family, &LoadOptions::cpu())?.config().causal {
            families.push(family);
        }
    }
    let mut methods: Vec<(String, MethodConfig)> = Vec::new();
    for (name, method) in MethodConfig::examples() {
        if methods.iter().all(|(_, known)| known.name() != method.name()) {
            methods.push((name, method));
        }
    }
    let subjects = families.iter().flat_map(|f| methods.iter().map(move |m| (f, m))).collect::<Vec<_>>();
    let each = scope.least.div_ceil(subjects.len() as u64);
    for (number, (family, (example, method))) in subjects.into_iter().enumerate() {
        let name = format!("{example} on {}", name_of(family));
        one(family, method, number as u64, each, &name, tally).with_context(|| name.clone())?;
    }
    Ok(())
}

/// Two rows of examples; where each lies.
fn packed(rng: &mut ChaCha8Rng, words: u32) -> (Batch, Vec<std::ops::Range<usize>>) {
    let rows: Vec<Vec<usize>> =
        (0..2).map(|_| (0..rng.random_range(2..=5)).map(|_| rng.random_range(1..=LONGEST)).collect()).collect();
    let cols = rows.iter().map(|row| row.iter().sum::<usize>()).max().unwrap_or(0) + rng.random_range(0..3);
    let mut batch = Batch { rows: rows.len(), cols, ..Batch::default() };
    let mut places = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        for (segment, length) in row.iter().enumerate() {
            let start = batch.ids.len();
            batch.ids.extend((0..*length).map(|_| rng.random_range(3..words)));
            batch.positions.extend(0..*length as u32);
            batch.segments.extend(std::iter::repeat_n(segment as u32, *length));
            places.push(start..start + length);
        }
        batch.ids.resize((i + 1) * cols, 0);
        batch.positions.resize((i + 1) * cols, 0);
        batch.segments.resize((i + 1) * cols, espalier_data::PADDING);
    }
    (batch, places)
}

/// An adapter on a model, off its start.
fn adapted(family: &Path, method: &MethodConfig) -> Result<(Model, ParameterMap, AdapterSet)> {
    let mut model = Model::load(family, &LoadOptions::cpu())?;
    let config = AdapterConfig::new(method.clone());
    let evidence = &mut subject::evidence(&config);
    let attached = attach_from_data(&mut model, &config, (1, 1e-3), DType::F32, &Device::Cpu, evidence)?;
    let parameters = attached.parameters.clone();
    for p in parameters.trainable() {
        let noise = normal(&mut stream(2, &p.name), 0.05, p.tensor.shape(), &Device::Cpu)?;
        p.var()?.set(&(p.tensor.detach() + noise)?)?;
    }
    let set = acting(&mut model, attached)?;
    Ok((model, parameters, set))
}

fn one(family: &Path, method: &MethodConfig, seed: u64, each: u64, name: &str, tally: &mut Tally) -> Result<()> {
    let (model, parameters, _set) = adapted(family, method)?;
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let words = model.config().vocab as u32;
    let mut pairs = 0;
    while pairs < each {
        let (batch, places) = packed(rng, words);
        let (of, other) = (rng.random_range(0..places.len()), rng.random_range(0..places.len()));
        if of == other {
            continue;
        }
        let (watched, changed) = (&places[of], &places[other]);
        let mut second = batch.clone();
        for id in &mut second.ids[changed.clone()] {
            // Another token, whatever it was.
            *id = 3 + (*id - 3 + rng.random_range(1..words - 3)) % (words - 3);
        }
        let targets = Targets {
            places: (watched.start..watched.end).map(|place| place as u32).collect(),
            labels: watched.clone().map(|_| rng.random_range(3..words)).collect(),
            separator: None,
        };
        let (first, second) =
            (seen(&model, &parameters, &batch, &targets)?, seen(&model, &parameters, &second, &targets)?);
        let same = first.logits(watched)? == second.logits(watched)? && first.bits == second.bits;
        anyhow::ensure!(first.logits(changed)? != second.logits(changed)?, "a changed example gives the same logits");
        tally.held(format!("{name}: example {of} saw example {other} of {places:?}"), same);
        pairs += 1;
    }
    tally.count(format!("families of {}", method.name()));
    Ok(())
}

/// What a pass gives.
struct Seen {
    logits: Tensor,
    /// Loss and gradients.
    bits: Vec<u64>,
}

impl Seen {
    /// Bits of the logits of some tokens.
    fn logits(&self, places: &std::ops::Range<usize>) -> Result<Vec<u32>> {
        let rows = self.logits.narrow(0, places.start, places.len())?.flatten_all()?;
        Ok(rows.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }
}

fn seen(model: &Model, parameters: &ParameterMap, batch: &Batch, targets: &Targets) -> Result<Seen> {
    let logits = model.forward(&tape::token_batch(model, batch, None)?, &Flow::eval())?.detach();
    let logits = logits.reshape((batch.rows * batch.cols, logits.dim(2)?))?;
    let mut sums = Gradients::new(parameters);
    let how = (1.0 / targets.weight() as f64, false);
    let start = Start::of(model, parameters, |_| true);
    let loss = tape::accumulate(model, batch, targets, &Flow::train(1, 0, 0), start, how, &mut sums)?;
    let mut bits = vec![loss.value()?.to_bits()];
    for (parameter, sum) in parameters.trainable().zip(sums.sums()) {
        let sum = sum.as_ref().with_context(|| format!("{}: no gradient reaches it", parameter.name))?;
        // Signs of zeros do not count.
        bits.extend(sum.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|g| u64::from((g + 0.0).to_bits())));
    }
    Ok(Seen { logits, bits })
}
