//! What a merge keeps of its adapters' gain when its matrices go into coarser storage.
//!
//! Equation: gain kept = (loss of the base - loss of the stored merge) / (loss of the base - loss of the adapted model)
//! Source:   losses in nats a token (or label) of the probe's labelled rows, under the files read back

use std::path::Path;

use candle_core::Tensor;
use espalier_adapters::formats::piecewise::Piecewise;
use espalier_models::{LoadOptions, Quantization, Streamed};
use serde::Serialize;

use crate::Result;
use crate::verify::{Comparison, Probe};

/// Gains below this, in nats, are not divided by.
const LEAST_GAIN: f64 = 1e-2;

/// What is measured, and how much must be kept.
#[derive(Debug, Clone)]
pub struct GainOptions {
    /// Storages by name.
    pub storages: Vec<(String, Quantization)>,
    /// Smallest share of the gain.
    pub least: f64,
    /// Whether less is accepted.
    pub accept: bool,
}

/// The merge in one storage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stored {
    /// Its name.
    pub storage: String,
    /// Mean loss, in nats.
    pub loss: f64,
    /// Share of the adapters' gain that is left; None where the gain is too small to divide by.
    pub gain_kept: Option<f64>,
    /// Largest difference of scores against the adapted model.
    pub max_difference: f64,
    /// Share of positions whose best score is the adapted model's.
    pub top1_agreement: f64,
}

/// The adapters' gain, and what is left of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gain {
    /// Mean loss of the base, in nats.
    pub loss_base: f64,
    /// The same with the adapters.
    pub loss_adapted: f64,
    /// The first less the second.
    pub gain: f64,
    /// Why no shares are given, where none are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The merge as it was written, and in each storage asked for.
    pub stored: Vec<Stored>,
}

impl Gain {
    /// The gain between two losses over `tokens` tokens or labels, nothing stored yet.
    pub fn new(loss_base: f64, loss_adapted: f64, tokens: usize) -> Self {
        let gain = loss_base - loss_adapted;
        let note = match gain {
            _ if tokens == 0 => Some("the probe has no labelled token".to_owned()),
            g if g >= LEAST_GAIN => None,
            g if g > -LEAST_GAIN => {
                Some(format!("the adapters move the loss by {:+.1e} nats, too little to divide by", -g))
            }
            g => Some(format!(
                "the adapters make the loss on this probe larger by {:.3} nats; there is no gain to keep",
                -g
            )),
        };
        Self { loss_base, loss_adapted, gain, note, stored: Vec::new() }
    }

    /// Adds the merge as it is in `storage`, by what lies between it and the adapted model.
    pub fn add(&mut self, storage: &str, found: &Comparison) {
        let kept = (self.loss_base - found.loss_found) / self.gain;
        self.stored.push(Stored {
            storage: storage.to_owned(),
            loss: found.loss_found,
            gain_kept: (self.note.is_none() && kept.is_finite()).then_some(kept),
            max_difference: found.max_difference,
            top1_agreement: found.top1_agreement,
        });
    }

    /// The figures under names for people.
    pub fn facts(&self) -> Vec<(String, String)> {
        let loss = format!("{:.5} -> {:.5} ({:.5} nats)", self.loss_base, self.loss_adapted, self.gain);
        let note = self.note.as_ref().map_or(String::new(), |note| format!("; {note}"));
        let mut facts = vec![("Gain of the adapters".to_owned(), loss + &note)];
        facts.extend(self.stored.iter().map(|s| {
            let kept = s.gain_kept.map_or_else(|| "no share".to_owned(), |k| format!("{:.2} % of the gain", 100.0 * k));
            let more = format!("loss {:.5}, scores within {:.2e}", s.loss, s.max_difference);
            (format!("Kept as {}", s.storage), format!("{kept}, {more}"))
        }));
        facts
    }
}

impl GainOptions {
    /// Measures the merge in `folder`: as it was written (`dense`), and in each storage.
    ///
    /// # Errors
    /// If the folder cannot be read, or a matrix has no form in a storage.
    pub fn measure(
        &self,
        folder: &Path,
        load: &LoadOptions,
        probe: &Probe,
        loss_base: f64,
        adapted: &[Tensor],
        dense: &Comparison,
    ) -> Result<Gain> {
        let mut gain = Gain::new(loss_base, dense.loss_reference, dense.tokens);
        gain.add("written", dense);
        for (name, quantization) in &self.storages {
            let load = LoadOptions { quantization: Some(*quantization), ..load.clone() };
            let mut model = Streamed::open(folder, &load)?;
            gain.add(name, &probe.compare(adapted, &probe.sides(&mut model, &Piecewise::new())?.base)?);
        }
        Ok(gain)
    }

    /// Why too little is kept, where it is.
    pub fn fault(&self, gain: &Gain) -> Option<String> {
        let less = |s: &&Stored| s.gain_kept.is_some_and(|kept| kept < self.least) || !s.loss.is_finite();
        let short = gain.stored.iter().find(less).filter(|_| !self.accept)?;
        let kept = short.gain_kept.map_or_else(|| "no number".to_owned(), |kept| format!("{:.1} %", 100.0 * kept));
        Some(format!(
            "stored as {}, the merge keeps {kept} of the adapters' gain of {:.4} nats, less than {:.1} %; keep the adapter beside \
             the base, store it finer, or accept the loss (--accept-loss)",
            short.storage,
            gain.gain,
            100.0 * self.least
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(loss: f64) -> Comparison {
        Comparison { loss_found: loss, ..Comparison::default() }
    }

    #[test]
    fn shares_are_of_the_gain_and_none_are_given_without_one() {
        let mut gain = Gain::new(3.0, 1.0, 10);
        gain.add("a", &found(1.5));
        gain.add("b", &found(3.5));
        assert_eq!(gain.stored.iter().map(|s| s.gain_kept).collect::<Vec<_>>(), [Some(0.75), Some(-0.25)]);
        let options = GainOptions { storages: Vec::new(), least: 0.75, accept: false };
        let fault = options.fault(&gain).unwrap_or_default();
        assert!(fault.contains("stored as b") && fault.contains("-25.0 %"), "{fault}");
        assert_eq!(GainOptions { accept: true, ..options.clone() }.fault(&gain), None);
        for (adapted, tokens, word) in [(3.0, 10, "too little"), (3.2, 10, "larger"), (1.0, 0, "no labelled")] {
            let mut gain = Gain::new(3.0, adapted, tokens);
            gain.add("a", &found(1.0));
            assert_eq!(gain.stored[0].gain_kept, None);
            assert!(gain.note.clone().unwrap_or_default().contains(word), "{gain:?}");
            assert_eq!(options.fault(&gain), None);
        }
        let mut gain = Gain::new(3.0, 1.0, 10);
        gain.add("a", &found(f64::NAN));
        assert!(options.fault(&gain).is_some_and(|fault| fault.contains("no number")));
    }
}
