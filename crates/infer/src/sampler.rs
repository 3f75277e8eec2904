//! The choice of the next token from its scores, in the order and with the semantics of transformers' logits processors.
//!
//! Equation: repetition penalty x_i -> x_i / p if x_i > 0 else x_i p for tokens seen; temperature x / T; top-k keeps
//!           x_i >= the k-th largest; top-p keeps the fewest most likely tokens whose probability together reaches p;
//!           min-p keeps probabilities >= p times the largest; then one draw from the softmax of what is left
//! Source:   transformers `generation/logits_process.py`; top-p arXiv 1904.09751, min-p arXiv 2407.01082,
//!           repetition penalty arXiv 1909.05858
//! Cost:     two passes over the vocabulary; top-p sorts only the tokens it keeps

use std::cmp::Ordering;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// Divisor of the scores; 0 takes the most likely token.
    pub temperature: f32,
    /// Keep the k most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the most likely tokens that together reach this probability, in [0, 1].
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the most likely one, in [0, 1].
    pub min_p: Option<f32>,
    /// Penalty of tokens that occurred in prompt or answer; above 1 discourages, 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// Seed of all draws.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: None, seed: 0 }
    }
}

impl SamplingConfig {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Whether the first of the most likely tokens is taken, whatever came before.
    pub(crate) fn takes_the_best(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty.is_none_or(|p| p == 1.0)
    }

    /// Whether all values can be meant.
    ///
    /// # Errors
    /// Names the first option that cannot, and what is accepted.
    pub fn validate(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(Error::option("temperature", self.temperature, "must be 0 (greedy) or a positive number"));
        }
        if self.top_k == Some(0) {
            return Err(Error::option("top_k", 0, "must be at least 1; leave it out to keep all tokens"));
        }
        for (key, value) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            if let Some(value) = value.filter(|v| !(0.0..=1.0).contains(v)) {
                return Err(Error::option(key, value, "must be between 0 and 1"));
            }
        }
        match self.repetition_penalty {
            Some(p) if !p.is_finite() || p <= 0.0 => {
                Err(Error::option("repetition_penalty", p, "must be a positive number; 1 does nothing"))
            }
            _ => Ok(()),
        }
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Score after the temperature, less that of the most likely token.
    score: f32,
    id: u32,
}

/// From the most likely; equal scores by id, so that the order is always the same.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// Chooses the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    rng: ChaCha8Rng,
    /// Round in which a token was last seen in the history.
    seen: Vec<u32>,
    round: u32,
}

impl Sampler {
    /// The sampler of sequence number `sequence`; its random stream is that of (seed, sequence) and nothing else.
    ///
    /// # Errors
    /// If an option cannot be meant.
    pub fn new(config: &SamplingConfig, sequence: usize) -> Result<Self> {
        config.validate()?;
        let mut key = [0; 32];
        for (slot, part) in
            key.chunks_exact_mut(8).zip([config.seed.to_le_bytes(), *b"sampling", (sequence as u64).to_le_bytes()])
        {
            slot.copy_from_slice(&part);
        }
        Ok(Self { config: config.clone(), rng: ChaCha8Rng::from_seed(key), seen: Vec::new(), round: 0 })
    }

    /// The next token after `history` (prompt and answer so far) by its logits `[vocabulary]`, which are overwritten.
    ///
    /// # Errors
    /// If a score is NaN or positive infinity, if no token has a finite score, or if the history has an id that the
    /// scores do not cover.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        if let Some((id, score)) = logits.iter().enumerate().find(|(_, x)| x.is_nan() || **x == f32::INFINITY) {
            return Err(Error::Scores(format!("token {id} has {score} (of {} tokens)", logits.len())));
        }
        self.penalise(logits, history)?;
        let Some(top) = argmax(logits) else {
            return Err(Error::Scores(format!("none of {} tokens has a finite score", logits.len())));
        };
        if self.config.temperature == 0.0 {
            return Ok(top);
        }
        let mut kept = self.candidates(logits, top);
        let weight = |c: &Candidate| f64::from(c.score).exp();
        if let Some(k) = self.config.top_k
            && k < kept.len()
        {
            let mut ranked = kept.clone();
            let (_, kth, _) = ranked.select_nth_unstable_by(k - 1, by_rank);
            let least = kth.score;
            kept.retain(|c| c.score >= least);
        }
        if let Some(p) = self.config.top_p.filter(|p| *p < 1.0) {
            let total: f64 = kept.iter().map(weight).sum();
            keep_nucleus(&mut kept, f64::from(p) * total, weight);
        }
        if let Some(p) = self.config.min_p {
            kept.retain(|c| weight(c) >= f64::from(p));
        }
        let total: f64 = kept.iter().map(weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        let mut chosen = top;
        for candidate in &kept {
            let w = weight(candidate);
            if w > 0.0 {
                chosen = candidate.id;
                if left < w {
                    break;
                }
            }
            left -= w;
        }
        Ok(chosen)
    }

    /// Scores after the temperature; a very small one may leave nothing finite but the largest.
    fn candidates(&self, logits: &[f32], top: u32) -> Vec<Candidate> {
        let most = logits.get(top as usize).copied().unwrap_or(0.0);
        let candidate =
            |(id, x): (usize, &f32)| Candidate { score: (*x - most) / self.config.temperature, id: id as u32 };
        logits.iter().enumerate().map(candidate).filter(|c| c.score.is_finite()).collect()
    }

    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) -> Result<()> {
        let Some(penalty) = self.config.repetition_penalty.filter(|p| *p != 1.0) else { return Ok(()) };
        self.seen.resize(logits.len(), 0);
        self.round = self.round.wrapping_add(1);
        if self.round == 0 {
            self.seen.fill(0);
            self.round = 1;
        }
        let tokens = logits.len();
        for id in history {
            let (Some(score), Some(seen)) = (logits.get_mut(*id as usize), self.seen.get_mut(*id as usize)) else {
                return Err(Error::Scores(format!("token {id} of the history is none of the {tokens} tokens scored")));
            };
            if *seen != self.round {
                *seen = self.round;
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }
        Ok(())
    }
}

/// The first of the largest scores; None if there is no finite one.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, x) in logits.iter().enumerate() {
        if x.is_finite() && best.is_none_or(|(_, most)| *x > most) {
            best = Some((id, *x));
        }
    }
    best.map(|(id, _)| id as u32)
}

/// Keeps the most likely candidates until their weight reaches `goal`, the one that crosses it included, at least one.
fn keep_nucleus(kept: &mut Vec<Candidate>, goal: f64, weight: impl Fn(&Candidate) -> f64) {
    let mut sorted = 64;
    loop {
        let n = kept.len();
        if sorted < n {
            kept.select_nth_unstable_by(sorted, by_rank);
        }
        let head = &mut kept[..sorted.min(n)];
        head.sort_unstable_by(by_rank);
        let mut sum = 0.0;
        for (i, candidate) in head.iter().enumerate() {
            sum += weight(candidate);
            if sum >= goal {
                kept.truncate(i + 1);
                return;
            }
        }
        if sorted >= n {
            return;
        }
        sorted *= 8;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use std::collections::BTreeMap;

    fn with(change: impl FnOnce(&mut SamplingConfig)) -> SamplingConfig {
        let mut config = SamplingConfig { temperature: 1.0, seed: 7, ..SamplingConfig::default() };
        change(&mut config);
        config
    }

    /// Frequencies of 40 000 draws.
    fn frequencies(config: &SamplingConfig, logits: &[f32], history: &[u32]) -> BTreeMap<u32, f64> {
        let mut sampler = Sampler::new(config, 0).unwrap();
        let mut counts = BTreeMap::new();
        let n = 40_000;
        for _ in 0..n {
            *counts.entry(sampler.sample(&mut logits.to_vec(), history).unwrap()).or_insert(0.0) += 1.0;
        }
        counts.values_mut().for_each(|c| *c /= f64::from(n));
        counts
    }

    /// Every frequency within 4.5 standard deviations of its probability, none of probability 0.
    fn expect(found: &BTreeMap<u32, f64>, expected: &[f64]) {
        for (id, p) in expected.iter().enumerate() {
            let f = found.get(&(id as u32)).copied().unwrap_or(0.0);
            let sigma = (p * (1.0 - p) / 40_000.0).sqrt();
            assert!((f - p).abs() <= 4.5 * sigma, "token {id}: {f} for {p}; {found:?}");
        }
    }

    fn logs(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(&SamplingConfig::greedy(), 0).unwrap();
        assert_eq!(sampler.sample(&mut [0.0, 2.0, 2.0, f32::NEG_INFINITY], &[]).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_of_the_tempered_scores() {
        expect(&frequencies(&with(|_| {}), &logs(&[0.5, 0.3, 0.15, 0.05]), &[]), &[0.5, 0.3, 0.15, 0.05]);
        // T = 0.5 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365
        let found = frequencies(&with(|c| c.temperature = 0.5), &logs(&[0.5, 0.3, 0.15, 0.05]), &[]);
        expect(&found, &[0.684_931_5, 0.246_575_3, 0.061_643_8, 0.006_849_3]);
    }

    #[test]
    fn top_k_keeps_ties_with_the_last_kept() {
        let found = frequencies(&with(|c| c.top_k = Some(2)), &logs(&[0.4, 0.25, 0.25, 0.1]), &[]);
        expect(&found, &[0.4 / 0.9, 0.25 / 0.9, 0.25 / 0.9, 0.0]);
        expect(&frequencies(&with(|c| c.top_k = Some(9)), &logs(&[0.75, 0.25]), &[]), &[0.75, 0.25]);
    }

    #[test]
    fn top_p_keeps_the_crossing_token() {
        // 0.5 + 0.3 = 0.8 is short of 0.85, so the third stays: 0.95 in all
        let found = frequencies(&with(|c| c.top_p = Some(0.85)), &logs(&[0.15, 0.5, 0.05, 0.3]), &[]);
        expect(&found, &[0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95]);
        expect(&frequencies(&with(|c| c.top_p = Some(0.0)), &logs(&[0.4, 0.6]), &[]), &[0.0, 1.0]);
    }

    #[test]
    fn top_p_over_a_large_flat_vocabulary_keeps_its_share() {
        let config = with(|c| c.top_p = Some(0.5));
        let mut sampler = Sampler::new(&config, 0).unwrap();
        for _ in 0..200 {
            // Equal scores: the first half by id.
            assert!(sampler.sample(&mut vec![1.0; 2000], &[]).unwrap() <= 1000);
        }
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        // 0.2 * 0.5 = 0.1 keeps 0.3 and 0.15, not 0.05
        let found = frequencies(&with(|c| c.min_p = Some(0.2)), &logs(&[0.5, 0.3, 0.15, 0.05]), &[]);
        expect(&found, &[0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]);
    }

    #[test]
    fn filters_apply_one_after_the_other() {
        // top-k 3 leaves 0.5 0.3 0.15 (of 0.95); top-p 0.8 of those: 0.526 + 0.316 = 0.842 keeps two
        let found =
            frequencies(&with(|c| (c.top_k, c.top_p) = (Some(3), Some(0.8))), &logs(&[0.5, 0.3, 0.15, 0.05]), &[]);
        expect(&found, &[0.625, 0.375, 0.0, 0.0]);
    }

    #[test]
    fn repetition_penalty_divides_positive_and_multiplies_negative_once() {
        let config = SamplingConfig { repetition_penalty: Some(2.0), ..SamplingConfig::greedy() };
        let mut sampler = Sampler::new(&config, 0).unwrap();
        let mut logits = [3.0, -1.0, 2.0, 0.0];
        assert_eq!(sampler.sample(&mut logits, &[0, 1, 0, 3]).unwrap(), 2);
        assert_eq!(logits, [1.5, -2.0, 2.0, 0.0]);
        let message = sampler.sample(&mut [0.0; 4], &[4]).unwrap_err().to_string();
        assert!(message.contains("token 4 of the history"), "{message}");
    }

    #[test]
    fn streams_are_those_of_seed_and_sequence() {
        let draw = |seed, sequence| {
            let mut sampler = Sampler::new(&with(|c| c.seed = seed), sequence).unwrap();
            (0..40).map(|_| sampler.sample(&mut [0.0; 100], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        expect(&frequencies(&with(|c| c.temperature = 1e-38), &[3.0, 40.0, 5.0], &[]), &[0.0, 1.0, 0.0]);
    }

    #[test]
    fn scores_that_are_none_are_errors() {
        let mut sampler = Sampler::new(&with(|_| {}), 0).unwrap();
        let message = |e: Error| e.to_string();
        assert!(message(sampler.sample(&mut [0.0, f32::NAN], &[]).unwrap_err()).contains("token 1 has NaN"));
        assert!(message(sampler.sample(&mut [f32::INFINITY], &[]).unwrap_err()).contains("token 0 has inf"));
        assert!(message(sampler.sample(&mut [f32::NEG_INFINITY; 3], &[]).unwrap_err()).contains("none of 3 tokens"));
        assert!(message(sampler.sample(&mut [], &[]).unwrap_err()).contains("none of 0 tokens"));
    }

    #[test]
    fn options_that_cannot_be_meant_are_named() {
        let cases: [(&str, SamplingConfig); 6] = [
            ("temperature = -1", with(|c| c.temperature = -1.0)),
            ("temperature = NaN", with(|c| c.temperature = f32::NAN)),
            ("top_k = 0", with(|c| c.top_k = Some(0))),
            ("top_p = 1.5", with(|c| c.top_p = Some(1.5))),
            ("min_p = -0.5", with(|c| c.min_p = Some(-0.5))),
            ("repetition_penalty = 0", with(|c| c.repetition_penalty = Some(0.0))),
        ];
        for (expected, config) in cases {
            let message = Sampler::new(&config, 0).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }
}
